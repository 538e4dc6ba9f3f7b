"""An ensemble of small WaveletLMs that share their tokens and their prediction."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.config import Config, cell_config
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.wavelet_lm.model import Carry, State, WaveletLM
from wavelet_lm.roles import Runs


class MultinodalLM(LanguageModel):
    """`multinodal_num_cells` whole models of width `multinodal_cell_dim`; logits add up or average.

    Averaged logits are those of one head over the cells' hidden vectors side by side, and so is the
    chunked loss. The loss's gradient is scaled by 1/√cells. With `multinodal_features_per_cell`
    each cell sees only some channels of its embedding; with `multinodal_cross_cell_gating` the
    cells gate each other every few blocks.
    """

    def __init__(self, config: Config, vocab_size: int):
        super().__init__(config, vocab_size)
        n = config.multinodal_num_cells
        # One by one, so that an absurd number of them can be refused while they are made.
        self.cells = nn.ModuleList(
            WaveletLM(cell_config(config), vocab_size, feature_bag(config, i)) for i in range(n)
        )
        self.interval = config.multinodal_cross_cell_gate_interval
        n_gates = len(self.cells[0].order) // self.interval
        self.gates = nn.ModuleList(
            CellGate(config.multinodal_cell_dim)
            for _ in range(n_gates if config.multinodal_cross_cell_gating else 0)
        )

    def runs(self) -> dict[nn.Module, Runs]:
        """Every cell is gated by the same matrix, in a product of its own."""
        n_products = self.config.loop_iterations * len(self.cells)
        return {self.gates: Runs(n_products, n_products)}

    def output_weight(self) -> Tensor:
        weight = torch.cat([cell.head.weight for cell in self.cells], dim=1)
        return weight / len(self.cells) if self.config.multinodal_combination == "mean" else weight

    def project(self, x: Tensor) -> Tensor:
        parts = zip(self.cells, x.chunk(len(self.cells), dim=-1), strict=True)
        logits = sum(cell.head(part) for cell, part in parts)
        return logits / len(self.cells) if self.config.multinodal_combination == "mean" else logits

    def loss(
        self, idx: Tensor, targets: Tensor, state: Any = None, at: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """As every model's, of [B, T] int64; the gradient alone is scaled by 1/√cells."""
        loss, state = super().loss(idx, targets, state, at)
        value = loss.detach()
        return value + (loss - value) / math.sqrt(len(self.cells)), state

    def passes(
        self, idx: Tensor, state: tuple[State, ...] | Carry | None
    ) -> tuple[list[Tensor], tuple[State, ...]]:
        """All cells side by side: idx [B, T] int64 -> vectors [B, T, cells · cell_dim].

        The state is a tuple of the cells' states; a carry has the cells' means side by side.
        """
        n = len(self.cells)
        carries: list[Carry | None] = [None] * n
        if isinstance(state, Carry):
            carries, state = [Carry(mean) for mean in state.mean.chunk(n, dim=-1)], None
        streams = [cell.start(idx, c) for cell, c in zip(self.cells, carries, strict=True)]
        old = [iter(s) for s in (state or [()] * n)]
        new: list[list] = [[] for _ in self.cells]
        passes = []
        for _ in range(self.config.loop_iterations):
            for i in range(len(self.cells[0].order)):
                for k, cell in enumerate(self.cells):
                    streams[k], block_state = cell.run_block(i, streams[k], next(old[k], None))
                    new[k].append(block_state)
                if self.gates and (i + 1) % self.interval == 0:
                    gated = self.gates[i // self.interval]([stream.x for stream in streams])
                    streams = [
                        stream._replace(x=x) for stream, x in zip(streams, gated, strict=True)
                    ]
            finished = [c.finish(stream) for c, stream in zip(self.cells, streams, strict=True)]
            passes.append(torch.cat(finished, dim=-1))
        return passes, tuple(tuple(states) for states in new)

    def first_window(self, B: int, device: torch.device) -> Carry | None:
        return _side_by_side([cell.first_window(B, device) for cell in self.cells])

    def next_window(self, state: tuple[State, ...]) -> tuple[State, ...] | Carry | None:
        if self.config.carry_state:
            return super().next_window(state)
        pairs = zip(self.cells, state, strict=True)
        return _side_by_side([cell.next_window(s) for cell, s in pairs])

    def networks(self) -> list[LanguageModel]:
        return list(self.cells)


def _side_by_side(carries: list[Carry | None]) -> Carry | None:
    """The cells' means as one carry [B, cells · cell_dim]."""
    if carries[0] is None:
        return None
    return Carry(torch.cat([carry.mean for carry in carries], dim=-1))


def feature_bag(config: Config, cell: int) -> nn.Module | None:
    """What limits the features that a cell sees, None where it sees all."""
    if not config.multinodal_features_per_cell:
        return None
    return FeatureBag(config, config.seed + cell)


class FeatureBag(nn.Module):
    """Sets all but `multinodal_features_per_cell` channels to `multinodal_bagged_eps`.

    Which channels a cell keeps is drawn from its seed, so the config alone says it.
    """

    def __init__(self, config: Config, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        ranks = torch.rand(config.multinodal_cell_dim, generator=generator, device="cpu").argsort()
        keep = ranks < config.multinodal_features_per_cell
        self.register_buffer("keep", keep.to(torch.get_default_device()), persistent=False)
        self.eps = config.multinodal_bagged_eps

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return torch.where(self.keep, embedding, self.eps)


class CellGate(nn.Module):
    """x_i ⊙ (1 + tanh(G · mean of the other cells' x)), G zero at first: no gate."""

    component = "routing and bypass"

    def __init__(self, C: int):
        super().__init__()
        self.proj = nn.Linear(C, C, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Every cell's [B, T, C] -> the same."""
        total = sum(xs)
        return [x * (1 + torch.tanh(self.proj((total - x) / (len(xs) - 1)))) for x in xs]
