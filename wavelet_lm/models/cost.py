"""What a config costs, by component: parameters, FLOPs, weights read, state, reach.

Nothing is computed: the model is built on the meta device, and its modules say what one token does
with every weight (`wavelet_lm/roles.py`).
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from wavelet_lm.config import Config
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.gpt.model import GPT
from wavelet_lm.models.registry import model_without_weights, n_params
from wavelet_lm.models.wavelet_lm.mixer import SpectralMixer
from wavelet_lm.models.wavelet_lm.model import WaveletLM
from wavelet_lm.roles import Use, uses

BACKWARD = 3  # a product's backward takes two of its size, one for each factor
MEAN, MEMORY = "running mean", "delta memory"


@dataclass
class Cost:
    """What one component costs.

    per_block: parameters of one block (shared ones are of none); n_params: in total, shared ones
    once; flops: of the matrix products of one training token, forward and backward; distinct, read:
    weights that one generated token needs, each once, and as often as they are read again.
    """

    per_block: int = 0
    n_params: int = 0
    flops: int = 0
    distinct: int = 0
    read: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Breakdown:
    """All figures of a config.

    components: by name, in the order of the computation; hadamard_flops: of one training token, for
    transforms done as products, at the config's micro-batch; state_elements, state_bytes: of one
    text in float32; block_reach, reach: positions back that the wavelets of one block and of the
    stack see, or a GPT's attention; sees_everything: what reaches further still, a running
    mean or a delta memory.
    """

    n_params: int
    components: dict[str, Cost]
    hadamard_flops: int
    state_elements: int
    state_bytes: int
    block_reach: int
    reach: int
    sees_everything: tuple[str, ...]

    @property
    def total(self) -> Cost:
        """The sum of all components."""
        return sum(self.components.values(), Cost())


def breakdown(config: Config, vocab_size: int) -> Breakdown:
    """Count a config on the meta device, in about a second whatever its size."""
    model = model_without_weights(config, vocab_size).eval()
    with torch.device("meta"):
        _, state = model(torch.zeros(1, 1, dtype=torch.int64))
    cells = model.networks()
    if isinstance(model, GPT):
        reach = block_reach = config.block_size - 1
    else:
        block_reach = cells[0].wavelets[0].reach
        reach = block_reach * len(cells[0].order) * config.loop_iterations
    return Breakdown(
        n_params=n_params(model),
        components=_components(model),
        hadamard_flops=sum(_hadamard_flops(c) for c in cells if isinstance(c, WaveletLM)),
        **_state_size(state),
        block_reach=block_reach,
        reach=reach,
        sees_everything=_endless(config) if isinstance(cells[0], WaveletLM) else (),
    )


def _endless(config: Config) -> tuple[str, ...]:
    """The parts of a WaveletLM that look back any number of positions."""
    parts = {MEAN: config.decompose_bypass, MEMORY: config.delta_memory}
    return tuple(part for part, is_there in parts.items() if is_there)


def _components(model: LanguageModel) -> dict[str, Cost]:
    """The cost of every component, in the order in which the modules name them.

    A tied matrix is counted in the first place, its work in every one; the token's row of it is one
    of its own. Products without weights are those of a whole window of block_size.
    """
    of_a_block = {p for part in model.first_block() for p in part.parameters()}
    whole = {use.parameter for use in uses(model) if use.role.vectors}
    components: dict[str, Cost] = {}
    seen: set[nn.Parameter] = set()
    for use in uses(model):
        if use.component is None:
            raise TypeError(f"{use.name}: no module that holds it names a component")
        cost = _cost(use)
        if use.role.rows is not None and use.parameter in whole:
            cost.distinct = 0
        if use.parameter is not None and use.parameter not in seen:
            seen.add(use.parameter)
            cost.n_params = use.parameter.numel()
            cost.per_block = cost.n_params * (use.parameter in of_a_block)
        components[use.component] = components.get(use.component, Cost()) + cost
    return {name: cost for name, cost in components.items() if cost != Cost()}


def _cost(use: Use) -> Cost:
    """Of one place of a parameter, without its size."""
    reads, products = use.runs
    if use.parameter is None:
        return Cost(flops=int(BACKWARD * 2 * use.role.vectors * products))
    read = use.n_read
    flops = BACKWARD * 2 * use.parameter.numel() * use.role.vectors * products
    return Cost(flops=int(flops), distinct=read * (reads > 0), read=int(read * reads))


def _state_size(state: Any) -> dict[str, int]:
    leaves = [t for t in tree_leaves(state) if t is not None]
    return {
        "state_elements": sum(t.numel() for t in leaves),
        "state_bytes": sum(t.numel() * t.element_size() for t in leaves),
    }


def _hadamard_flops(model: WaveletLM) -> int:
    """FLOPs of the Hadamard transforms per training token, forward and backward.

    A transform has no weights to learn, so its backward is one transform. On the way out it acts on
    the bands; on the way in on the mixers' weights once a step, or on the bands where they are few.
    """
    config = model.config
    if config.mixer_transform != "fwht":
        return 0
    positions = config.micro_batch_size * config.block_size
    signal = positions * config.n_scales
    flops = 0
    for number in model.order:
        mixer: SpectralMixer = model.blocks[number].mixer
        inward = signal if mixer.reads_rotated else min(signal, mixer.n_weight_rows)
        flops += 2 * 2 * config.padded_channels * sum(mixer.rotate.sizes) * (signal + inward)
    return flops * config.loop_iterations // positions


def as_dict(result: Breakdown) -> dict[str, Any]:
    """The figures for a JSON file."""
    total = result.total

    def row(cost: Cost) -> dict[str, int]:
        return {
            "n_params_per_block": cost.per_block,
            "n_params": cost.n_params,
            "training_flops_per_token": cost.flops,
            "weights_read_per_token": cost.distinct,
            "weights_read_per_token_with_rereads": cost.read,
        }

    return {
        **row(total),
        "hadamard_flops_per_token": result.hadamard_flops,
        "state_elements": result.state_elements,
        "state_bytes": result.state_bytes,
        "reach_per_block": result.block_reach,
        "reach": result.reach,
        "running_mean_sees_everything": MEAN in result.sees_everything,
        "delta_memory_sees_everything": MEMORY in result.sees_everything,
        "components": {name: row(cost) for name, cost in result.components.items()},
    }


def table(result: Breakdown) -> str:
    """The figures as people read them."""
    heads = ("component", "parameters", "per block", "FLOPs/token", "read/token", "re-reads too")
    rows = [heads]
    for name, c in [*result.components.items(), ("total", result.total)]:
        cells = (c.n_params, c.per_block, c.flops, c.distinct, c.read)
        rows.append((name, *(f"{n:,}" for n in cells)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(w)}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    everything = "".join(f"; the {part} sees everything" for part in result.sees_everything)
    lines += [
        "",
        "FLOPs/token: matrix products of training, forward and backward (3 × forward), without the",
        f"  Hadamard transforms, which as products would add {result.hadamard_flops:,} per token",
        "read/token: weights that one generated token needs; of tables the rows that it reads",
        f"state of a text: {result.state_elements:,} numbers, {result.state_bytes:,} bytes",
        f"reach: {result.block_reach:,} positions a block, {result.reach:,} the stack{everything}",
    ]
    return "\n".join(lines)
