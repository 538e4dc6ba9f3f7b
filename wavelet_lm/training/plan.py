"""What a config takes on given GPUs, on paper: memory of each rank, bytes sent, time of a step.

The step is rehearsed (`rehearsal.py`, and for FSDP `simulated_ranks.py`), and its operations are
timed by a card's data sheet (`gpus.py`): each takes as long as its products at the card's rate or
its bytes at the memory's bandwidth, which takes longer; the optimizer reads and writes weights,
gradients and state once. What ranks send each other goes over the link while they compute, so a
step takes at least the longer of the two. Operations are counted one by one, as without
torch.compile, which spares many of the bytes; no card reaches its data sheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wavelet_lm.config import Config
from wavelet_lm.data.batches import batch_size, passes_per_step
from wavelet_lm.devices import AMP_DTYPES
from wavelet_lm.errors import UserError
from wavelet_lm.tables import aligned
from wavelet_lm.training.gpus import GB, GPUS
from wavelet_lm.training.rehearsal import GRADIENTS, STATE, WEIGHTS, Rehearsal, rehearse

GiB = 2**30
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """A step of a config on N ranks.

    parallel: none, ddp or fsdp; held: bytes of a rank by kind, when most is held; on_host: of its
    state in the CPU's memory; flops: of a rank's products; moved: bytes that a rank reads and
    writes; sent: bytes that a rank sends; seconds: that a rank takes for its products at the
    card's rate, for its bytes at the memory's bandwidth, for both together, and on the link.
    """

    parallel: str
    held: dict[str, int]
    on_host: int
    flops: int
    moved: int
    sent: int
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        """Bytes on a rank at one time."""
        return sum(self.held.values())

    @property
    def step(self) -> float:
        """Seconds of a step at least."""
        return max(self.seconds["computing"], self.seconds["link"])

    @property
    def limit(self) -> str:
        """What a step waits for most: link, products or memory."""
        if self.seconds["link"] > self.seconds["computing"]:
            return "link"
        return max(("products", "memory"), key=lambda name: self.seconds[name])


def plans(config: Config, vocab_size: int, world_size: int, gpu: str) -> list[Plan]:
    """The ways in which so many GPUs of a kind can train a config, as `parallel` asks.

    Raises:
        UserError: the windows of a step cannot be shared evenly, or the GPU lacks a number format.
    """
    n_passes = passes_per_step(config, world_size)
    windows = batch_size(config) // world_size // n_passes
    changes = {"micro_batch_size": windows, "grad_accum": n_passes, "parallel": "auto"}
    if config.amp_dtype == "auto":
        changes["amp_dtype"] = "bf16"
    own = config.replace(**changes)
    dtype = AMP_DTYPES[own.amp_dtype] if own.use_amp else torch.float32
    if own.amp_dtype == "fp8" and GPUS[gpu].fp8 is None:
        raise UserError(f"{gpu} has no float8 products; use --amp_dtype bf16")
    kinds = ("ddp", "fsdp") if config.parallel == "auto" else (config.parallel,)
    if world_size == 1:
        kinds = ("none",)
    return [_plan(kind, own, vocab_size, world_size, gpu, dtype) for kind in kinds]


def _plan(
    parallel: str, config: Config, vocab_size: int, n: int, name: str, dtype: torch.dtype
) -> Plan:
    gpu, others = GPUS[name], (n - 1) / n
    if parallel == "fsdp":
        from wavelet_lm.training.simulated_ranks import rehearse_fsdp

        found = rehearse_fsdp(config, vocab_size, n, "cuda", dtype)
        held = found.held
        # A gather and a scatter send all but a rank's own part, whichever way round.
        sent = found.n_passes * others * sum(n_bytes for _, n_bytes in found.collectives)
    else:
        found = rehearse(config, vocab_size, "cuda", dtype)
        held, sent = found.held, 0.0
        if parallel == "ddp":  # whose buckets hold all gradients for good; a ring sends them twice
            gradients = held[WEIGHTS]
            held, sent = {**held, GRADIENTS: gradients}, 2 * others * gradients
    state = found.held[STATE] + found.on_host
    stepped = 3 * found.held[WEIGHTS] + 2 * state  # read, and all but the gradients written
    rates = {False: gpu.bf16 if dtype in HALF else gpu.tf32 if config.allow_tf32 else gpu.fp32}
    rates[True] = gpu.fp8 or rates[False]
    times = [(o.flops / rates[o.fp8], o.n_bytes / gpu.bandwidth) for o in found.operations]
    step = stepped / gpu.bandwidth + 2 * found.on_host / gpu.host
    seconds = {
        "products": found.n_passes * sum(t for t, _ in times),
        "memory": found.n_passes * sum(t for _, t in times) + step,
        "computing": found.n_passes * sum(map(max, times)) + step,
        "link": sent / (gpu.link if n <= gpu.node else min(gpu.link, gpu.network)),
    }
    return Plan(
        parallel, held, found.on_host, found.flops, _moved(found, stepped), int(sent), seconds
    )


def _moved(found: Rehearsal, stepped: int) -> int:
    return found.n_passes * sum(o.n_bytes for o in found.operations) + stepped


def table(found: Sequence[Plan], config: Config, world_size: int, gpu: str) -> str:
    """The plans as people read them, a column each."""
    tokens, memory = batch_size(config) * config.block_size, GPUS[gpu].memory

    def row(title: str, *cells: str) -> list[str]:
        return [title, *cells]

    kinds = [kind for kind in found[0].held if any(plan.held[kind] for plan in found)]
    rows = [row(f"a rank of {world_size}", *(plan.parallel for plan in found))]
    rows += [row(kind, *(f"{p.held[kind] / GiB:,.2f} GiB" for p in found)) for kind in kinds]
    rows += [
        row("all of it", *(f"{p.peak / GiB:,.2f} GiB" for p in found)),
        row(f"fits in {memory / GB:.0f} GB", *("yes" if p.peak < memory else "no" for p in found)),
        *(
            [row("on the CPU", *(f"{p.on_host / GiB:,.2f} GiB" for p in found))]
            if any(p.on_host for p in found)
            else []
        ),
        row("products", *(f"{p.flops / 1e12:,.2f} TFLOP" for p in found)),
        row("read and written", *(f"{p.moved / GiB:,.1f} GiB" for p in found)),
        row("sent", *(f"{p.sent / GiB:,.2f} GiB" for p in found)),
        *(
            row(f"time of {name}", *(f"{1000 * p.seconds[key]:,.1f} ms" for p in found))
            for name, key in (("products", "products"), ("memory", "memory"), ("the link", "link"))
        ),
        row("a step at least", *(f"{1000 * p.step:,.1f} ms" for p in found)),
        row("tokens/s at most", *(f"{tokens / p.step:,.0f}" for p in found)),
        row("limited by", *(p.limit for p in found)),
    ]
    return (
        f"{world_size} × {gpu}, a step of {tokens:,} tokens, {config.optimizer}, by data sheets:"
        f"\n\n{aligned(rows)}"
    )


def as_dict(found: Sequence[Plan], world_size: int, gpu: str) -> dict[str, Any]:
    """The figures for a JSON file: bytes and seconds of a rank's step, by `parallel`."""
    return {
        "world_size": world_size,
        "gpu": gpu,
        "plans": {
            plan.parallel: {
                "bytes_held": plan.held,
                "bytes_held_at_most": plan.peak,
                "bytes_on_the_cpu": plan.on_host,
                "flops": plan.flops,
                "bytes_moved": plan.moved,
                "bytes_sent": plan.sent,
                "seconds": plan.seconds,
                "step_seconds": plan.step,
                "limit": plan.limit,
            }
            for plan in found
        },
    }
