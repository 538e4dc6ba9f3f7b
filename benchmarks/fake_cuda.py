"""A CUDA device that is not there: enough of one for torch.compile to write its kernels.

`pretend` comes before anything imports PyTorch, in a process of its own, whose PyTorch may be built
without CUDA; whatever is then computed on "cuda" must be fake tensors (`FakeTensorMode`). It needs
triton and a C++ compiler, and is tied to the tested PyTorch (constraints.txt).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

from wavelet_lm.errors import UserError
from wavelet_lm.user_cache import user_cache

CAPABILITY = (9, 0)  # of a Hopper card, an H100 or H200
PROPERTIES = {
    "name": "a fake of it",
    "major": CAPABILITY[0],
    "minor": CAPABILITY[1],
    "multi_processor_count": 132,
    "warp_size": 32,
    "total_memory": 80 * 2**30,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_multiprocessor": 228 * 2**10,
    "L2_cache_size": 50 * 2**20,
    "gcnArchName": "",
}


def pretend() -> None:
    """Let PyTorch and triton believe in one CUDA device.

    Raises:
        UserError: triton or a C++ compiler is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "counting a CUDA step needs triton; install it with"
            ' python -m pip install -c constraints.txt -e ".[test]"'
        )
    # Every count is to be of code written now.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # Before PyTorch asks for the first time what devices there are.
    ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)
    import torch

    _patch(torch, torch.cuda)
    _tell_triton()
    _spare_the_compiler()


def _patch(torch, cuda) -> None:
    """torch.cuda, before the compiler takes its functions from there."""
    properties = SimpleNamespace(**PROPERTIES)
    cuda._lazy_init = lambda: None
    for name, answer in {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
        "synchronize": None,
    }.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    # Of fake tensors, which make their numbers on the device.
    torch.Tensor.new_tensor = lambda x, data: torch.tensor(data, dtype=x.dtype).to(x.device)


def _tell_triton() -> None:
    import torch
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    major, minor = CAPABILITY
    device = torch.device("cuda", 0)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        get_active_torch_device=lambda: device,
    )
    triton.runtime.driver.set_active(driver)
    CudaInterface.raise_if_triton_unavailable = staticmethod(lambda *_: None)


def _spare_the_compiler() -> None:
    """Nothing that needs tensors of the device: no folded constants, no trial of paddings.

    Nor does it look for attention written out, which no model of the project has.
    """
    import torch._inductor.config
    from torch._inductor.fx_passes import fuse_attention

    fuse_attention._sfdp_init = lambda *_: None
    torch._inductor.config.shape_padding = False
    torch._inductor.config.joint_graph_constant_folding = False


def _library() -> Path:
    """fake_cuda.cpp compiled for the PyTorch that is installed, and kept."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    target = user_cache() / f"fake_cuda-{importlib.metadata.version('torch')}.so"
    if target.is_file():
        return target
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise UserError("counting a CUDA step needs a C++ compiler (c++, g++ or clang++)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        source, lib = Path(__file__).with_suffix(".cpp"), torch / "lib"
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}"]
        command += [str(source), "-o", str(made)]
        command += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise UserError(f"{compiler} cannot compile fake_cuda.cpp: {said[0]}")
        made.replace(target)  # whole, however many processes do the same
    return target
