"""What each of several processes holds of a model that they share: each prints it as JSON.

`python -m tests.training.shares ddp|fsdp`, in several processes.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from tests.conftest import tiny_config
from wavelet_lm.allocator import returning_memory
from wavelet_lm.config import Config
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.training.memory_estimate import reset_peak
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.parallelize import parallelize, sharded_model, weights_of
from wavelet_lm.training.processes import Processes
from wavelet_lm.training.together import together

MiB, CPU = 2**20, torch.device("cpu")
# Weights are nearly all of what a process holds: few positions, wide layers.
SHAPE = {
    "C": 384,
    "layers": 8,
    "lifting_linear_only": True,
    "mlp_expansion": 16,
    "per_scale_mixer_widths": None,
    "block_size": 8,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    "optimizer_eps": 1e-8,
}


def measured(kind: str, config: Config, processes: Processes) -> dict[str, float]:
    """MiB that this process holds: the weights at rest, at most in a forward pass, in a step."""
    base, found = status("VmRSS"), {}

    def build() -> nn.Module:
        return build_model(config, 256)

    model = sharded_model(build, config, CPU, processes) if kind == "fsdp" else build()
    found["weights"] = status("VmRSS") - base
    weights = weights_of(model, processes)
    loss = parallelize(model, model.loss, CPU, 1)
    idx = torch.randint(256, (1, config.block_size))
    with torch.no_grad():
        reset_peak()
        loss(idx, idx)
        found["forward"] = status("VmHWM") - base
    optimizer = Optimizer(model, config, weights)
    for _ in range(2):
        reset_peak()
        loss(idx, idx)[0].backward()
        weights.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
    found["step"] = status("VmHWM") - base
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return {**found, "all": 4 * n_params(model) / MiB, "block": 4 * max(sizes) / MiB}


def status(key: str) -> float:
    """MiB that are resident (VmRSS), or were at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(key))
    return int(line.split()[1]) / 1024


def main() -> None:
    kind, out = sys.argv[1], os.dup(1)  # the first process alone speaks on standard output
    torch.set_num_threads(1)
    # What is freed goes back at once, so that what is resident is what is held.
    with together() as processes, returning_memory():
        processes.connect(CPU)
        measured(kind, tiny_config(**{**SHAPE, "C": 16}), processes)  # what libraries take
        found = measured(kind, tiny_config(**SHAPE), processes)
        os.write(out, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
