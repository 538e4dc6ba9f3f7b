"""Requests that mean harm, or nothing: no hang, no row lost, other streams as they were."""

import gc
import json
import random
import socket
import threading
import time
from http.client import HTTPResponse
from urllib.parse import urlparse

import httpx2 as httpx
import pytest

from tests.inference.writers import Letters, small_model
from tests.serving import servers
from wavelet_lm import Engine
from wavelet_lm.serving import bodies as reading
from wavelet_lm.serving import server as process
from wavelet_lm.serving.job import Job
from wavelet_lm.serving.options import ServeOptions

PATHS = [
    *("/v1/completions", "/v1/chat/completions", "/v1/states", "/v1/states/x/file", "/v1/scope"),
    *("/nothing", "/", "/health"),
]
NAMES = [
    *("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "x" * 5000, "%ff%fe"),
    *("....//", "%5c..%5c", "a;b", "-rf", "\u00e9"),
]
VALUES = [
    *(None, True, -1, 0, 1.5, 10**30, "", "a", [], {}, [[]], [None], "\ud800", "\x00", 1e308),
    *({"a": {"b": [1]}}, "a" * 500, [1] * 50, [-5], [10**18]),
]
FIELDS = [
    *("prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "best_of", "stop"),
    *("stream", "logprobs", "state", "save_state", "messages", "text", "tokens", "at", "name"),
    *("model", "strategies", "stream_options", "echo", "__proto__", "repetition_penalty"),
]


def bodies(choose):
    """A request's body as bytes, which is mostly no request."""
    kind = choose.randrange(8)
    if kind == 0:
        return choose.randbytes(choose.randrange(200))
    if kind == 1:
        return b"[" * choose.randrange(1, 100_000)
    if kind == 2:
        return b'{"prompt": "' + bytes([0xC3, 0x28, 0xFF]) + b'"}'
    if kind == 3:
        return b"x" * choose.randrange(20_000, 60_000)
    if kind == 4:
        return b'{"max_tokens": ' + b"9" * choose.choice([10, 5000]) + b"}"
    fields = choose.sample(FIELDS, choose.randrange(1, 4))
    body = {name: choose.choice(VALUES) for name in fields}
    if kind == 5:
        body = {"prompt": "bad", "max_tokens": choose.randrange(1, 40), "stream": True}
    text = json.dumps(body).encode()
    return text[: choose.randrange(len(text))] if kind == 6 else text


def attack(choose, address):
    """One hostile connection: what is sent, how, and when it is given up."""
    path = choose.choice(PATHS)
    method = choose.choice(["POST", "POST", "POST", "GET", "PUT", "DELETE", "BREW"])
    if choose.random() < 0.25:
        name = choose.choice(NAMES)
        path = f"/v1/states/{name}" + choose.choice(["", "/file"])
    body, how = bodies(choose), choose.randrange(8)
    length = len(body)
    if how == 0:
        length += choose.choice([-5, 5, 10**12, -length - 1])
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"
    data = head.encode("utf-8") + body
    if how == 1:
        data = choose.randbytes(60) + data
    if how == 2:  # in chunks, one of which says a wrong size
        head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        size = choose.choice([len(body), 0xFFFFFFFFFF, 3])
        data = head.encode("utf-8") + f"{size:x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    if how == 3:
        data += data  # one after the other, without waiting
    if how == 4:
        data = data[: choose.randrange(len(data))]
    with socket.create_connection(address, timeout=10) as connection:
        try:
            if how == 5:  # byte after byte, and then no more
                for at in range(0, min(len(data), 12), 3):
                    connection.sendall(data[at : at + 3])
                    time.sleep(0.001)
            else:
                connection.sendall(data)
            if how == 6:
                return  # gone at once
            connection.settimeout(choose.choice([0.001, 0.02, 0.2]))
            connection.recv(choose.choice([1, 4096]))
            if how == 7:  # gone with a reset, in the middle of what comes
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                )
        except OSError:
            pass


@pytest.mark.parametrize(
    "n", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "campaign"]
)
def test_nobody_else_is_affected(n, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(reading, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(process, "IDLE_SECONDS", 1)
    lines, model = [], small_model()
    limits = ServeOptions(
        max_streams=32, max_tokens=50, max_prompt=400, max_body=16384, max_states=20, timeout=60.0
    )
    service = servers.make_service(
        model, limits=limits, folder=tmp_path / "states", log=lines.append
    )
    plain = Engine(model, Letters(), context="stream")
    expected = {seed: plain.generate("bad cab", 40, seed=seed) for seed in range(5)}
    wrong = []
    with servers.served(service) as url:
        address = urlparse(url).hostname, urlparse(url).port
        stop = threading.Event()

        def honest():
            """Streams that are read all the while."""
            seed = 0
            while not stop.is_set():
                seed, text = (seed + 1) % 5, ""
                body = {"prompt": "bad cab", "max_tokens": 40, "seed": seed, "stream": True}
                with httpx.stream("POST", url + PATHS[0], json=body, timeout=20) as response:
                    if response.status_code == 503:  # full, as it may be
                        continue
                    for line in response.iter_lines():
                        if line.startswith("data: {"):
                            text += json.loads(line[6:])["choices"][0]["text"]
                if text != expected[seed]:
                    wrong.append((seed, text))

        def hostile(number):
            choose = random.Random(number)
            for _ in range(n // 4):
                attack(choose, address)

        reader = threading.Thread(target=honest)
        reader.start()
        attackers = [threading.Thread(target=hostile, args=(i,)) for i in range(4)]
        for attacker in attackers:
            attacker.start()
        for attacker in attackers:
            attacker.join(3000)
        stop.set()
        reader.join(30)
        assert not reader.is_alive()
        servers.wait_for(lambda: service.n_streams == 0 == service.scheduler.n_writing, 10)
        servers.wait_for(lambda: service.scheduler.n_reading == 0)
        assert service.scheduler._batch.n == 0
        done = servers.post(url, PATHS[0], {"prompt": "bad cab", "max_tokens": 40, "seed": 1})
        assert done.json()["choices"][0]["text"] == expected[1]
    assert wrong == []
    assert lines == []
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err + printed.out
    folder = tmp_path / "states"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(folder.glob("*.state"))


def test_damaged_states_harm_nobody(tmp_path):
    """Whatever numbers a file holds, it is refused or ends its own text alone."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    model = small_model(model="gpt", C=16, heads=2, block_size=64)
    lines = []
    service = servers.make_service(model, log=lines.append)
    with servers.served(service) as url:
        servers.post(url, "/v1/states", {"text": "bad cab", "name": "good"})
        path = tmp_path / "good"
        path.write_bytes(httpx.get(f"{url}/v1/states/good/file").content)
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            for value in (-5, 10**12) if tensor.dtype == torch.int64 else (float("nan"), 1e30):
                if tensor.dtype == torch.uint8:
                    continue
                changed = {**tensors, name: torch.full_like(tensor, value)}
                sent = httpx.put(f"{url}/v1/states/bad/file", content=save(changed, header))
                if sent.status_code == 201:
                    body = {"prompt": "a", "state": "bad", "max_tokens": 5}
                    assert servers.post(url, PATHS[0], body).status_code in (200, 500)
                else:
                    assert sent.status_code == 400
        assert servers.post(url, PATHS[0], {"prompt": "a"}).status_code == 200
    assert not [line for line in lines if "step failed" in line]


def test_a_slow_client_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(reading, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.2)
    with servers.served(servers.make_service()) as url:
        address = urlparse(url).hostname, urlparse(url).port
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{"
        for sent, answer in ((b"", b""), (b"POST /v1", b""), (head, b"HTTP/1.1 408")):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(sent)
                assert connection.recv(12) == answer


def status_of(connection):
    """The status of the next answer, which is read whole: it may come in several parts."""
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def test_a_further_request_is_not_waited_for_either(monkeypatch):
    monkeypatch.setattr(process, "HEAD_SECONDS", 0.2)
    with servers.served(servers.make_service()) as url:
        address = urlparse(url).hostname, urlparse(url).port
        with socket.create_connection(address, timeout=10) as connection:
            for _ in range(2):
                connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
                assert status_of(connection) == 200
            connection.sendall(b"GET /v1")
            assert connection.recv(4096) == b""


def test_a_head_is_bounded_and_a_body_that_nobody_reads_is_none():
    more = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
    refused = b"POST /nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n"
    with servers.served(servers.make_service()) as url:
        address = urlparse(url).hostname, urlparse(url).port
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(refused)
            assert status_of(connection) == 404
            for _ in range(30):  # in parts, of which no one ends the request and begins another
                connection.sendall(b"x" * 10_000)
                time.sleep(0.005)
            connection.sendall(more)
            assert status_of(connection) == 200
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: ")
            for _ in range(7):
                connection.sendall(b"y" * 10_000)
                time.sleep(0.005)
            assert status_of(connection) == 400
            assert connection.recv(4096) == b""


def test_who_takes_nothing_is_given_up(monkeypatch):
    """Its row has long ended; so must the request, which counts as a stream."""
    monkeypatch.setattr(process, "TAKE_SECONDS", 0.2)

    def listen(host, port):
        listener = process.listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(servers, "listen", listen)
    service = servers.make_service()
    with servers.served(service) as url, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((urlparse(url).hostname, urlparse(url).port))
        body = {"prompt": "bad", "max_tokens": 400, "logprobs": 10, "stream": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        servers.wait_for(lambda: service.n_streams == 1)
        servers.wait_for(lambda: service.n_streams == 0 == service.scheduler.n_writing)


def test_a_context_that_ends_ends_no_other_text():
    """The state after an answer has read one token more than the answer needs."""
    lines, longest = [], 24
    model = small_model(model="gpt", C=16, heads=2, block_size=longest)
    service = servers.make_service(model, log=lines.append)
    with servers.served(service) as url:
        for n, name, status in ((22, "s", 400), (21, "s", 200), (22, None, 200), (23, None, 400)):
            body = {"prompt": "bad", "max_tokens": n, "seed": 1}
            body |= {} if name is None else {"save_state": name}
            sent = servers.post(url, PATHS[0], body)
            assert sent.status_code == status, sent.text
        assert service.states.get("s").n == longest
    assert lines == []


def test_a_state_of_a_prompt_that_was_not_read_is_refused(monkeypatch):
    service = servers.make_service(limits=ServeOptions(timeout=0.001))
    monkeypatch.setattr(service.scheduler, "_read", lambda: None)
    with servers.served(service) as url:
        body = {"prompt": "bad", "max_tokens": 5, "save_state": "s"}
        sent = servers.post(url, PATHS[0], body)
        assert (sent.status_code, sent.headers["retry-after"]) == (503, "2")
        sent = servers.post(url, PATHS[0], {**body, "stream": True})
        assert "not read to its end" in sent.text
    assert not service.states.all()


def test_a_request_leaves_nothing_to_the_collector():
    """A state in a circle of objects would stay until that is looked for, which is seldom."""

    def n_jobs():
        return sum(type(found) is Job for found in gc.get_objects())

    with servers.served(servers.make_service()) as url:
        gc.collect()
        gc.disable()
        try:
            before = n_jobs()
            for _ in range(3):
                servers.post(url, PATHS[0], {"prompt": "bad", "max_tokens": 3})
            servers.wait_for(lambda: n_jobs() <= before)
        finally:
            gc.enable()
