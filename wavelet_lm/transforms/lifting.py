"""Learned lifting wavelet, undecimated and causal.

The lifting scheme (Sweldens, 1996) builds a wavelet from a predict step P and an update step U and
inverts exactly whatever they are. Here both are small networks over the channels, and the signal
is split not into even and odd samples but into the present and a delayed copy of itself, so every
level keeps the full length and looks only back:

    past_k  = delay_k(c_k)                       lag 2^k, or a learned mixture of lags (crawl)
    d_k     = (past_k − P_k(c_k)) / √2           detail
    c_{k+1} = (c_k + U_k(d_k)) / √2              approximation

The inverse needs no past: c_k = √2 c_{k+1} − U_k(d_k).
"""

import math

import torch
from torch import Tensor, nn

from wavelet_lm.config import ModelConfig
from wavelet_lm.transforms.crawl import Crawl, Shift
from wavelet_lm.transforms.haar import HaarWavelet
from wavelet_lm.transforms.packets import WaveletPackets

INIT_NOISE = 0.01


def build_wavelet(config: ModelConfig, channels: int) -> nn.Module:
    """The decomposition that the config names, for signals [B, T, channels]."""
    if config.wavelet_mode == "haar":
        wavelet: nn.Module = HaarWavelet(config.levels)
        return WaveletPackets(wavelet) if config.wavelet_packets else wavelet
    if config.multi_basis_lifting:
        return MultiBasisWavelet(config, channels)
    return build_lifting(config, channels, config.lifting_init)


def build_lifting(config: ModelConfig, channels: int, init: str) -> nn.Module:
    """A lifting wavelet, or the packets of one."""
    wavelet = LiftingWavelet(config, channels, init)
    return WaveletPackets(wavelet) if config.wavelet_packets else wavelet


class LiftingWavelet(nn.Module):
    """`decompose` into levels + 1 bands and `reconstruct` from them.

    The reconstruction uses the decomposition's own update nets, and then inverts it exactly, or
    nets of its own (`untied_reconstruction`).
    """

    def __init__(self, config: ModelConfig, channels: int, init: str):
        super().__init__()
        levels = range(config.levels)
        self.delays = nn.ModuleList(
            Crawl(k, config.wavelet_crawl_k) if config.wavelet_crawl else Shift(2**k)
            for k in levels
        )

        def nets(gain: float) -> nn.ModuleList:
            return nn.ModuleList(lifting_net(config, channels, k, init, gain) for k in levels)

        self.predict, self.update = nets(1.0), nets(0.5)
        self.own_update = nets(0.5) if config.untied_reconstruction else None

    @property
    def is_static(self) -> bool:
        """Whether its nets are plain matrices and activations."""
        return not isinstance(self.update[0], DataDependentNet)

    def split(
        self, k: int, x: Tensor, history: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Level k of x [B, T, …, C]: approximation, detail, and the history of the delay."""
        past, history = self.delays[k](x.flatten(2), history)
        detail = (past.view_as(x) - self.predict[k](x)) / math.sqrt(2)
        return (x + self.update[k](detail)) / math.sqrt(2), detail, history

    def merge(self, k: int, approximation: Tensor, detail: Tensor) -> Tensor:
        """The inverse of `split`, pointwise in time."""
        updates = self.update if self.own_update is None else self.own_update
        return math.sqrt(2) * approximation - updates[k](detail)

    def decompose(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Split a signal into bands.

        Args:
            x: [B, T, C], a whole signal or its next chunk.
            state: per level the positions that its delay still needs; None starts a text.

        Returns:
            The bands [a, d_{L−1}, …, d_0], coarse to fine, each [B, T, C], and the state.
        """
        details, histories = [], []
        for k in range(len(self.delays)):
            x, detail, history = self.split(k, x, None if state is None else state[k])
            details.append(detail)
            histories.append(history)
        return [x, *reversed(details)], tuple(histories)

    def reconstruct(self, bands: list[Tensor]) -> Tensor:
        """Bands, coarse to fine, back to [B, T, C]: exact when they are what `decompose` gave."""
        x, *details = bands
        for k, detail in zip(reversed(range(len(self.delays))), details, strict=True):
            x = self.merge(k, x, detail)
        return x


class MultiBasisWavelet(nn.Module):
    """Several lifting wavelets side by side, mixed per scale.

        c_s = Σ_b softmax(w)_{b,s} c_{b,s}

    Every basis reconstructs from the same mixed bands, and their results are averaged with the
    approximation's weights softmax(w)_{b,0}. `weights` [K, S] start at 10 for the first basis and
    0 for the others, so that a new model has one basis.
    """

    def __init__(self, config: ModelConfig, channels: int):
        super().__init__()
        inits = config.multi_basis_inits
        self.bases = nn.ModuleList(build_lifting(config, channels, init) for init in inits)
        weights = torch.zeros(len(inits), config.n_scales)
        weights[0] = 10.0
        self.weights = nn.Parameter(weights)

    def decompose(
        self, x: Tensor, state: tuple[tuple[Tensor, ...], ...] | None = None
    ) -> tuple[list[Tensor], tuple[tuple[Tensor, ...], ...]]:
        """As `LiftingWavelet.decompose`; the state is one per basis."""
        states = [None] * len(self.bases) if state is None else state
        results = [basis.decompose(x, s) for basis, s in zip(self.bases, states, strict=True)]
        weights = self.weights.softmax(0).to(x.dtype)
        bands = [
            sum(w * band for w, band in zip(weights[:, s], same_scale, strict=True))
            for s, same_scale in enumerate(zip(*(bands for bands, _ in results), strict=True))
        ]
        return bands, tuple(state for _, state in results)

    def reconstruct(self, bands: list[Tensor]) -> Tensor:
        """Bands, coarse to fine, back to [B, T, C]."""
        weights = self.weights[:, 0].softmax(0).to(bands[0].dtype)
        return sum(
            w * basis.reconstruct(bands) for w, basis in zip(weights, self.bases, strict=True)
        )


def lifting_net(
    config: ModelConfig, channels: int, level: int, init: str, gain: float
) -> nn.Module:
    """A predict (gain 1) or update (gain ½) net; `haar` starts it near gain times the identity."""
    hidden = channels * config.lifting_hidden_mult
    if config.lifting_linear_only:
        net: nn.Module = nn.Linear(channels, channels)
        layers = [net]
    else:
        first, last = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        net = nn.Sequential(first, nn.GELU(), nn.Dropout(config.lifting_dropout), last)
        layers = [first, last]
    with torch.no_grad():
        for layer in layers:
            layer.bias.zero_()
        if init == "zero":
            layers[-1].weight.zero_()
        else:
            for layer in layers:
                layer.weight.normal_(0, INIT_NOISE)
        if init == "haar":
            for layer in layers:
                layer.weight[:channels, :channels] = torch.eye(channels)
            layers[-1].weight[:, :channels] *= gain
        if config.stabilized("lifting_level_scaling"):
            layers[-1].weight.mul_(1 / (1 + 0.1 * level))
    rank = config.lifting_data_dependent
    return DataDependentNet(net, channels, rank) if rank else net


class DataDependentNet(nn.Module):
    """A static net and a low-rank map that the input itself chooses: net(c) + A(B c ⊙ tanh(D c)).

    That is net(c) + A diag(tanh(D c)) B c. A starts at zero, B and D at N(0, 1/√C). The tanh keeps
    the term from growing faster than c: a plain product is quadratic, and through the levels of
    some blocks its degree is in the thousands.
    """

    def __init__(self, net: nn.Module, channels: int, rank: int):
        super().__init__()
        self.net = net
        self.down = nn.Linear(channels, rank, bias=False)
        self.gate = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)
        with torch.no_grad():
            self.down.weight.normal_(0, channels**-0.5)
            self.gate.weight.normal_(0, channels**-0.5)
            self.up.weight.zero_()

    def forward(self, c: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.net(c) + self.up(self.down(c) * self.gate(c).tanh())
