"""A step of decoding on a CUDA device, of fake tensors: it neither waits nor copies from the host.

`test_no_waiting.py` asks this of steps on the meta device. Here a step takes the ways that only a
CUDA device has, as it is and as torch.compile makes one graph of it. No GPU is needed: the tests
run in a process of their own that pretends to have one (`test_where_there_is_none`).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from tests.conftest import ROOT, tiny_config
from tests.inference.test_no_waiting import LOOKS, SCHEMES, Waits, no_waiting
from wavelet_lm.config import Config
from wavelet_lm.fusion.fuse import fuse
from wavelet_lm.inference.decoder import Decoder, StaticSession
from wavelet_lm.models.registry import model_without_weights
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme

PRETENDS = "fake_cuda" in sys.modules
pretending = pytest.mark.skipif(not PRETENDS, reason="needs a process that pretends to have a GPU")
HAS_TOOLS = importlib.util.find_spec("triton") is not None and any(
    map(shutil.which, ("c++", "g++", "clang++"))
)
MID_BITS = Scheme(
    bits=dict.fromkeys(SCHEMES["bands apart"].bits, 16) | {"mixer_mid": 4}, group_size=16
)


def preset(name: str, **keys) -> Config:
    """A preset's parts, small."""
    small = {"C": 16, "layers": 1, "block_size": 32, "device": "auto", "amp_dtype": "bf16"}
    return Config.from_json(ROOT / name, **{**small, **keys})


def small(**keys) -> Config:
    """The headline's parts, small."""
    return tiny_config(
        **{"layers": 1, "levels": 2, "per_scale_mixer_widths": (1, 0.5, 0.5), **keys}
    )


DELTA = {"delta_heads": 2, "delta_key_dim": 4, "delta_value_dim": 4}
HEADLINE = {"pkm_num_keys": 16, "pkm_top_k": 3, "fwpkm_num_keys": 16, "fwpkm_top_k": 3}
HEADLINE |= {"mlp_expansion": 2, "levels": 3, "per_scale_mixer_widths": (1, 1, 0.5, 0.5)}
MINI = {"levels": 3, "per_scale_mixer_widths": (1, 1, 0.5, 0.5)}
EIGHT_SCALES = {"levels": 7, "per_scale_mixer_widths": None}
TWO_BASES = {"multi_basis_lifting": True, "multi_basis_inits": ("haar", "random")}
TWO_BASES |= {"shared_lifting_weights": False}
STEPS = {
    "headline": (preset("config.json", **HEADLINE), None),
    "mini": (preset("configs/mini.json", **MINI), None),
    "quickstart": (preset("configs/quickstart.json", **DELTA), None),
    "efficient": (preset("configs/efficient.json", **DELTA), None),
    "headline in 8 bits": (preset("config.json", **HEADLINE), SCHEMES["8 bits"]),
    "efficient in 8 bits": (preset("configs/efficient.json", **DELTA), SCHEMES["8 bits"]),
    "bands apart": (small(), SCHEMES["bands apart"]),
    "middle bands in 4 bits": (small(**EIGHT_SCALES), MID_BITS),
    "packets": (small(wavelet_packets=True, per_scale_mixer_widths=None), None),
    "crawl": (small(wavelet_crawl=True, wavelet_crawl_k=5), None),
    "running mean": (small(decompose_bypass=True, decompose_bypass_ema=False), None),
    "exponential mean": (small(decompose_bypass=True, decompose_bypass_ema=True), None),
    "pkm alone": (small(pkm_enabled=True, fwpkm_enabled=False), None),
    "fwpkm alone": (small(pkm_enabled=False, fwpkm_enabled=True), None),
    "memories of two shapes": (small(fwpkm_num_keys=9), None),
    "data-dependent nets": (small(lifting_data_dependent=2), None),
    "several bases": (small(**TWO_BASES), None),
    "phases": (small(phase_gating=True, cross_scale_gating=True, mixer_depth=2), None),
    "cells": (small(multinodal_enabled=True, multinodal_num_cells=2, multinodal_cell_dim=8), None),
    "gpt": (small(model="gpt"), None),
    "wavelet_gpt": (small(model="wavelet_gpt"), None),
}

# Wavelets that are one operator, a kernel's: one, but for these. Quantized weights have kernels of
# their own.
AT_ONCE = {"cells": 2, "headline in 8 bits": 0, "efficient in 8 bits": 0, "bands apart": 0}
AT_ONCE |= {"packets": 0, "data-dependent nets": 0, "several bases": 0, "gpt": 0, "wavelet_gpt": 0}


@pytest.fixture(autouse=True)
def of_fake_tensors():
    """Nothing here has values. Weights come from the meta device."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def session_of(config: Config, scheme: Scheme | None) -> StaticSession:
    from step_cost import without_storage

    model = model_without_weights(config, 11).eval()
    model = fuse(model, torch.bfloat16) if scheme is None else quantize(model, scheme)
    decoder = Decoder(without_storage(model, torch.device("cuda", 0)))
    state = decoder.model(tokens(3), None)[1]
    return StaticSession(decoder, state, max_step=1)


def tokens(n: int) -> Tensor:
    return torch.zeros(1, n, dtype=torch.int64, device="cuda")


@pretending
@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits(name):
    session, token = session_of(*STEPS[name]), tokens(1)
    with no_waiting("cuda"):
        for _ in range(2):  # the first may make what the others find
            session.decode(token)


@pretending
@pytest.mark.parametrize("name", STEPS)
def test_no_compiled_step_waits(name):
    """It is one graph: what looked at a value would have broken it."""
    session, token = session_of(*STEPS[name]), tokens(1)
    operators = checked(session.decode, token)
    assert len(operators) > 10
    assert sum("lifting_step" in operator for operator in operators) == AT_ONCE.get(name, 1)


class Ready(Exception):
    """The graph is there, and is about to run."""


def checked(step, *args) -> list[str]:
    """The operators in the graph of a step, none of which waits; else `Waits`."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return run

    def run(*inputs):
        raise Ready

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    with pytest.raises(Ready):
        compiled(*args)
    (graph,) = graphs
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    for node in nodes:
        constant = getattr(graph, node.target) if node.op == "get_attr" else None
        values = tree_leaves((node.meta.get("val"), constant))
        devices = {x.device.type for x in values if isinstance(x, Tensor)}
        looks = any(word in str(node.target) for word in LOOKS) or is_masked(node)
        if looks or devices - {"cuda"}:
            raise Waits(f"{node.target} of {devices}")
    return [str(node.target) for node in nodes if node.op == "call_function"]


def is_masked(node: torch.fx.Node) -> bool:
    """Whether it takes a mask for an index, whose count is waited for."""
    if not str(node.target).startswith("aten.index"):
        return False
    parts = [x for x in tree_leaves(node.args[1]) if isinstance(x, torch.fx.Node)]
    return any(part.meta["val"].dtype == torch.bool for part in parts)


OFFENCES = {
    "a list as an index": lambda x: x[[0, 2]],
    "an index on the host": lambda x: x[torch.zeros(2, dtype=torch.int64)],
    "a tensor of the host": lambda x: x.clone().copy_(torch.zeros(4, 3)),
    "to the device": lambda x: x + torch.zeros(3).to(x.device),
    "to the host": lambda x: x.to("cpu"),
    "a mask as an index": lambda x: x[x[:, 0] > 0],
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: x + 1 if x.sum() > 0 else x,
    "a count": lambda x: (x > 0).nonzero(),
}


@pretending
@pytest.mark.parametrize("name", OFFENCES)
def test_what_waits_is_seen(name):
    with pytest.raises(Waits), no_waiting("cuda"):
        OFFENCES[name](torch.zeros(4, 3, device="cuda"))


@pretending
@pytest.mark.parametrize("name", OFFENCES)
def test_what_waits_is_seen_in_a_graph(name):
    """Where the compiler does not refuse it first."""
    with pytest.raises((Waits, Unsupported)):
        checked(OFFENCES[name], torch.zeros(4, 3, device="cuda"))


@pytest.mark.skipif(PRETENDS, reason="the tests above run in this process")
@pytest.mark.skipif(not HAS_TOOLS, reason="needs triton and a C++ compiler")
def test_where_there_is_none():
    program = (
        "import sys, fake_cuda; fake_cuda.pretend(); import pytest;"
        " sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", program, __file__]
    folders = [str(ROOT / "benchmarks"), str(ROOT)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    n = 2 * (len(STEPS) + len(OFFENCES))
    assert re.search(rf"\b{n} passed", done.stdout), done.stdout[-400:]
