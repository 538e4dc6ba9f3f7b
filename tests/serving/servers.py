"""A small model behind a real server, on a port of its own, in a thread of the test."""

import contextlib
import json
import threading
import time

import httpx2 as httpx
import torch

from tests.conftest import tiny_config
from tests.inference.writers import Letters, small_model
from wavelet_lm import build_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.state_file import ModelRecord
from wavelet_lm.serving.app import build_app
from wavelet_lm.serving.options import ServeOptions
from wavelet_lm.serving.server import listen, make_server
from wavelet_lm.serving.service import Service


def byte_model(**config):
    """A new model of bytes; `small_model` is one of a few letters."""
    torch.manual_seed(0)
    small = {"C": 16, "layers": 1, "levels": 2, "per_scale_mixer_widths": None, **config}
    return build_model(tiny_config(**small), 256).eval()


def make_service(model=None, tokenizer=None, limits=None, folder=None, log=None, **decoding):
    model = small_model() if model is None else model
    return Service(
        Decoder(model, adapt=False, **decoding),
        ModelRecord.of(model),
        tokenizer or Letters(),
        limits or ServeOptions(),
        "RUN",
        folder,
        log or (lambda line: None),
    )


@contextlib.contextmanager
def served(service, **options):
    """The address of a server, which ends in good order afterwards."""
    listener = listen("127.0.0.1", 0)
    server = make_server(build_app(service, **options), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        host, port = listener.getsockname()[:2]
        url = f"http://{host}:{port}"
        wait_for(lambda: server.started)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def wait_for(condition, seconds=20):
    """Wait until something holds that another thread brings about."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


def post(url, path, body, **options):
    content = json.dumps(body).encode()  # with escapes, which may be half a character
    return httpx.post(url + path, content=content, timeout=30, **options)
