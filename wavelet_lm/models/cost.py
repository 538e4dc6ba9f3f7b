"""What a config costs, by component: parameters, FLOPs, weights read, state, reach.

Nothing is computed: the model is built on the meta device, and every weight is taken by its name
to what one token does with it.
"""

import re
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from wavelet_lm.config import Config
from wavelet_lm.models.gpt.model import GPT
from wavelet_lm.models.registry import model_without_weights, n_params
from wavelet_lm.models.wavelet_lm.memory import ProductKeyMemory
from wavelet_lm.models.wavelet_lm.mixer import SpectralMixer
from wavelet_lm.models.wavelet_lm.model import WaveletLM
from wavelet_lm.transforms.moving_averages import LearnedFilters

# The first pattern that a parameter's name matches says what it is a part of.
COMPONENTS = {
    "delta memory": r"\.delta_memory\.",
    "norms": r"norm",
    "embedding": r"^embedding\.",
    "wavelet nets": r"^wavelets\.",
    "routing and bypass": r"\.routing$|\.bypass\.|\.phase_gate\.|^gates\.",
    "mixers": r"\.mixer\.",
    "projection": r"\.projection\.",
    "gains": r"gain|scale_weights",
    "MLP": r"\.branches\.mlp\.",
    "PKM": r"\.branches\.pkm\.",
    "FwPKM": r"\.branches\.fwpkm\.",
    "head": r"^head\.",
}
ORDER = (
    "embedding",
    "wavelet nets",
    "mixers",
    "routing and bypass",
    "projection",
    "delta memory",
    "MLP",
    "PKM",
    "FwPKM",
    "norms",
    "gains",
    "head",
)
GPT_COMPONENTS = {
    "embedding": r"^embedding\.",
    "positions": r"^position_embedding\.",
    "attention": r"\.attention\.",
    "MLP": r"\.mlp\.",
    "moving averages": r"\.average\.",
    "norms": r"norm",
    "head": r"^head\.|^dense\.",
}
BACKWARD = 3  # a product's backward takes two of its size, one for each factor


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
    stack see, or a GPT's attention; sees_everything: whether a running mean reaches further still.
    """

    n_params: int
    components: dict[str, Cost]
    hadamard_flops: int
    state_elements: int
    state_bytes: int
    block_reach: int
    reach: int
    sees_everything: bool

    @property
    def total(self) -> Cost:
        """The sum of all components."""
        return sum(self.components.values(), Cost())


def breakdown(config: Config, vocab_size: int) -> Breakdown:
    """Count a config on the meta device, in about a second whatever its size."""
    model = model_without_weights(config, vocab_size).eval()
    with torch.device("meta"):
        _, state = model(torch.zeros(1, 1, dtype=torch.int64))
    if isinstance(model, GPT):
        return _gpt_breakdown(model, state)
    cells = list(model.cells) if config.multinodal_enabled else [model]
    components = {name: Cost() for name in ORDER}
    for cell in cells:
        _count_cell(cell, components)
    if config.multinodal_enabled:
        runs = config.loop_iterations
        for gate in model.gates:  # every cell is gated by the same matrix, side by side
            size = gate.proj.weight.numel()
            flops = BACKWARD * 2 * size * runs * len(cells)
            components["routing and bypass"] += Cost(0, size, flops, size, size * runs)
    applications = len(cells[0].order) * config.loop_iterations
    reach = cells[0].wavelets[0].reach
    return Breakdown(
        n_params=n_params(model),
        components={name: cost for name, cost in components.items() if cost != Cost()},
        hadamard_flops=sum(map(_hadamard_flops, cells)),
        **_state_size(state),
        block_reach=reach,
        reach=reach * applications,
        sees_everything=config.decompose_bypass,
    )


def _state_size(state: Any) -> dict[str, int]:
    leaves = [t for t in tree_leaves(state) if t is not None]
    return {
        "state_elements": sum(t.numel() for t in leaves),
        "state_bytes": sum(t.numel() * t.element_size() for t in leaves),
    }


def _gpt_breakdown(model: GPT, state: Any) -> Breakdown:
    """A GPT's figures; those of attention's own products are for a whole window of block_size.

    Half of these products are masked; they count as they are computed in training.
    """
    config = model.config
    components = {name: Cost() for name in GPT_COMPONENTS}
    for name, p in model.named_parameters():  # a tied head goes by the embedding's name
        size = p.numel()
        cost = Cost(size * name.startswith("blocks.0."), size, 0, size, size)
        if re.search(r"^(position_)?embedding\.", name):
            cost.distinct = cost.read = config.C  # one row
        elif p.ndim == 2:
            cost.flops = BACKWARD * 2 * size
        component = next(c for c, pattern in GPT_COMPONENTS.items() if re.search(pattern, name))
        components[component] += cost
    if config.tie_embedding_to_lm_head:
        size = model.head.weight.numel()
        components["head"] += Cost(flops=BACKWARD * 2 * size, distinct=size, read=size)
    # Scores and their product with the values, for every layer and position of the window.
    products = 2 * config.layers * config.block_size * config.C
    components["attention"].flops += BACKWARD * 2 * products
    for module in model.modules():
        if isinstance(module, LearnedFilters):
            components["moving averages"].flops += BACKWARD * 2 * module.n_taps
    return Breakdown(
        n_params=n_params(model),
        components={name: cost for name, cost in components.items() if cost != Cost()},
        hadamard_flops=0,
        **_state_size(state),
        block_reach=config.block_size - 1,
        reach=config.block_size - 1,
        sees_everything=False,
    )


def _count_cell(model: WaveletLM, components: dict[str, Cost]) -> None:
    """Add every parameter of one WaveletLM to its component."""
    memories = {n: m for n, m in model.named_modules() if isinstance(m, ProductKeyMemory)}
    tied = model.config.tie_embedding_to_lm_head
    for name, p in model.named_parameters():  # a tied head goes by the embedding's name
        uses = _uses(model, name)
        cost = Cost(n_params=p.numel(), distinct=p.numel() * (uses > 0), read=p.numel() * uses)
        cost.flops = BACKWARD * 2 * p.numel() * _products(model, name, p, uses)
        if name == "embedding.weight":
            cost.distinct = cost.read = model.config.C  # the row of the token
        elif name.endswith(".values.weight"):
            memory = memories[name.removesuffix(".values.weight")]
            cost.distinct = memory.heads * memory.top_k * model.config.C
            cost.read = cost.distinct * uses
        of_a_block = name.startswith("blocks.0.") or (
            name.startswith("wavelets.0.") and not model.config.shared_lifting_weights
        )
        cost.per_block = p.numel() * of_a_block
        component = next(c for c, pattern in COMPONENTS.items() if re.search(pattern, name))
        components[component] += cost
    if tied:  # its matrix is counted above, its work here; the token's row is one of its own
        size = model.head.weight.numel()
        passes = model.config.loop_iterations
        components["embedding"].distinct -= model.config.C
        components["head"] += Cost(flops=BACKWARD * 2 * size * passes, distinct=size, read=size)


def _uses(model: WaveletLM, name: str) -> int:
    """How often one token of a text meets a parameter: blocks and wavelets may be shared."""
    passes = model.config.loop_iterations
    part, *rest = name.split(".")
    if part == "head":
        return 1  # in training it judges every pass, in generation only the last
    if part not in ("blocks", "wavelets"):
        return passes
    number, numbers = int(rest[0]), list(model.order)
    if part == "blocks":
        uses = passes * numbers.count(number)
        unmixed = name == "blocks.0.bypass.cross_layer_mix.weight"
        return uses - unmixed  # the first block has no mean before it
    uses = passes * sum(n % len(model.wavelets) == number for n in numbers)
    # The reconstruction reads the update nets again, or nets of its own.
    return uses * (2 if ".update." in name and not model.config.untied_reconstruction else 1)


def _products(model: WaveletLM, name: str, p: nn.Parameter, uses: int) -> int:
    """How many vectors each token multiplies by a matrix; 0 where it is no factor of a product."""
    if p.ndim < 2 or re.search(
        r"norm|embedding\.|\.values\.|\.gains$|\.bias$|wavelets\.\d+\.weights", name
    ):
        return 0
    if name == "head.weight":
        return model.config.loop_iterations
    if name.endswith(".routing"):  # S × S, for every channel, once per stacked mixer
        return uses * model.config.mixer_depth * model.config.padded_channels
    if name.endswith(".A") and model.config.cross_scale_gating:
        return 2 * uses  # it narrows the signal and, apart, what the gates read
    net = re.search(r"^wavelets\..*(?:predict|update)\.(\d+)\.", name)
    if net and model.config.wavelet_packets:  # level k splits 2^k bands by the same nets
        return uses << int(net[1])
    return uses


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
        "running_mean_sees_everything": result.sees_everything,
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
    everything = "; the running mean sees everything" if result.sees_everything else ""
    lines += [
        "",
        "FLOPs/token: matrix products of training, forward and backward (3 × forward), without the",
        f"  Hadamard transforms, which as products would add {result.hadamard_flops:,} per token",
        "read/token: weights that one generated token needs; of tables the rows that it reads",
        f"state of a text: {result.state_elements:,} numbers, {result.state_bytes:,} bytes",
        f"reach: {result.block_reach:,} positions a block, {result.reach:,} the stack{everything}",
    ]
    return "\n".join(lines)
