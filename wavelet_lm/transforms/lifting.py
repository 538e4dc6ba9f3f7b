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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from wavelet_lm.roles import Runs
from wavelet_lm.transforms.batched_linear import (
    batched_linear,
    linear_by_text,
    products_stand_alone,
)
from wavelet_lm.transforms.correlation import FilterLess, in_one_product
from wavelet_lm.transforms.delays import CausalFilter, Crawl, Shift
from wavelet_lm.transforms.dropout import Dropout
from wavelet_lm.transforms.dtypes import as_factor, as_summand, in_gpu_step
from wavelet_lm.transforms.history import Ring, remember
from wavelet_lm.transforms.joined import Joint, joined
from wavelet_lm.transforms.wavelet import Histories, Wavelet

INIT_NOISE = 0.01
INITS = ("haar", "zero", "random")


class LiftingWavelet(Wavelet):
    """A wavelet whose predict and update nets are learned.

    The reconstruction uses the decomposition's own update nets, and then inverts it exactly, or
    nets of its own.

    Args:
        levels: L.
        channels: C of the signal.
        init: how the nets start (`lifting_net`).
        crawl: lags of the learned mixture that delays a level; 0 = a plain shift by 2^k.
        untied: own update nets for the reconstruction.
        net: further arguments of `lifting_net`.

    Examples:
        >>> x = torch.randn(2, 10, 4)  # [B, T, C]
        >>> wavelet = LiftingWavelet(levels=3, channels=4)
        >>> bands, state = wavelet.decompose(x)
        >>> [tuple(band.shape) for band in bands]  # coarse to fine
        [(2, 10, 4), (2, 10, 4), (2, 10, 4), (2, 10, 4)]
        >>> torch.allclose(wavelet.reconstruct(bands), x, atol=1e-4)  # whatever the nets are
        True
    """

    def __init__(
        self,
        levels: int,
        channels: int,
        init: str = "haar",
        *,
        crawl: int = 0,
        untied: bool = False,
        **net: int | float | bool,
    ):
        super().__init__()
        self.delays = nn.ModuleList(
            Crawl(k, crawl) if crawl else Shift(2**k) for k in range(levels)
        )

        def nets(gain: float) -> nn.ModuleList:
            return nn.ModuleList(lifting_net(channels, k, init, gain, **net) for k in range(levels))

        self.predict, self.update = nets(1.0), nets(0.5)
        # Of a new predict net on a normal input: that of a GELU is ½ on average.
        self.first_slope = (1.0 if net.get("linear") else 0.5) if init == "haar" else 0.0
        self.own_update = nets(0.5) if untied else None

    def runs(self) -> dict[nn.Module, Runs]:
        """The reconstruction runs the update nets again, or nets of its own."""
        return {self.update: Runs(2, 2)} if self.own_update is None else {}

    def past_by_detail(self) -> tuple[float, float]:
        return self.first_slope, math.sqrt(2)

    def joints(self) -> Iterator[Joint]:
        """What a reconstruction reads together."""
        nets = list(reversed(self._updates))
        if all(map(is_plain, nets)):
            for layers in _layers(nets):
                yield Joint([layer.weight for layer in layers])
                yield Joint([layer.bias for layer in layers])

    def at_level(self, k: int) -> list[nn.Module]:
        nets = (self.predict, self.update, self.own_update)
        return [level[k] for level in nets if level is not None]

    @property
    def is_static(self) -> bool:
        """Whether its nets are plain matrices and activations."""
        return not isinstance(self.update[0], DataDependentNet)

    def split(
        self, k: int, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor, Tensor | Ring]:
        predicted = applied(self.predict[k], x).flatten(2)
        detail, history = less(self.delays[k], x.flatten(2), predicted, history)
        # Nets and mixers read details in half precision; what goes from level to level is wide.
        detail = as_factor(detail).view_as(x)
        return (x + applied(self.update[k], detail)) / math.sqrt(2), detail, history

    def merge(self, k: int, approximation: Tensor, detail: Tensor) -> Tensor:
        return math.sqrt(2) * approximation - self._updates[k](detail)

    def reconstruct(self, bands: Sequence[Tensor] | Tensor) -> Tensor:
        """As `Wavelet.reconstruct`: bands, each [B, T, C], back to [B, T, C].

        The update nets are one product where they are alike. None of them waits for another:
        c_0 = √2^L a − Σ_k √2^k U_k(d_k).
        """
        if products_stand_alone(bands[0]) or not all(map(is_plain, self._updates)):
            return super().reconstruct(bands)
        if isinstance(bands, Tensor):
            approximation, details = bands.split((1, self.levels))
        else:
            approximation, details = bands[:1], torch.stack(list(bands[1:]))
        x = 2 ** (self.levels / 2) * as_summand(approximation[0])
        *firsts, lasts = _layers(list(reversed(self._updates)))
        for layers in firsts:
            details = nn.functional.gelu(batched_linear(details, *_weights(layers)))
        factors = map(as_factor, (details.flatten(1, 2), *_weights(lasts)))
        return LessUpdates.apply(x.flatten(0, 1), *factors).view_as(x)

    @property
    def _updates(self) -> nn.ModuleList:
        """Of the reconstruction."""
        return self.update if self.own_update is None else self.own_update


class MultiBasisWavelet(nn.Module):
    """Several lifting wavelets side by side, mixed per scale.

        c_s = Σ_b softmax(w)_{b,s} c_{b,s}

    Every basis reconstructs from the same mixed bands, and their results are averaged with the
    approximation's weights softmax(w)_{b,0}. `weights` [K, S] start at 10 for the first basis and
    0 for the others, so that a new model has one basis.

    Args:
        bases: lifting wavelets of one depth, or the packets of them.
        n_scales: S, the bands that each of them has.
    """

    component = "wavelet nets"

    def __init__(self, bases: Sequence[nn.Module], n_scales: int):
        super().__init__()
        self.bases = nn.ModuleList(bases)
        weights = torch.zeros(len(bases), n_scales)
        weights[0] = 10.0
        self.weights = nn.Parameter(weights)

    def past_by_detail(self) -> tuple[float, float] | None:
        """That of the first basis, which is nearly all of a new model's."""
        return self.bases[0].past_by_detail()

    @property
    def reach(self) -> int:
        """How many positions back the coarsest band sees."""
        return max(basis.reach for basis in self.bases)

    def decompose(
        self, x: Tensor, state: tuple[Histories, ...] | None = None
    ) -> tuple[list[Tensor], tuple[Histories, ...]]:
        """As `Wavelet.decompose`, [B, T, C] -> bands of this shape; the state is one per basis."""
        states = [None] * len(self.bases) if state is None else state
        results = [basis.decompose(x, s) for basis, s in zip(self.bases, states, strict=True)]
        weights = self.weights.softmax(0).to(x.dtype)
        bands = [
            sum(w * band for w, band in zip(weights[:, s], same_scale, strict=True))
            for s, same_scale in enumerate(zip(*(bands for bands, _ in results), strict=True))
        ]
        return bands, tuple(state for _, state in results)

    def reconstruct(self, bands: Sequence[Tensor] | Tensor) -> Tensor:
        """Bands, coarse to fine, back to [B, T, C]."""
        weights = self.weights[:, 0].softmax(0).to(bands[0].dtype)
        return sum(
            w * basis.reconstruct(bands) for w, basis in zip(weights, self.bases, strict=True)
        )


def lifting_net(
    channels: int,
    level: int,
    init: str,
    gain: float,
    *,
    linear: bool = False,
    hidden_mult: int = 1,
    dropout: float = 0.0,
    rank: int = 0,
    level_scaling: bool = False,
) -> nn.Module:
    """A predict (gain 1) or update (gain ½) net, [..., C] -> [..., C].

    Args:
        init: `haar` starts it near gain times the identity, `random` at N(0, 0.01), `zero` at 0.
        linear: one matrix in place of two layers with GELU, `hidden_mult` · C wide inside.
        dropout: of what is inside.
        rank: of a term that the input chooses (`DataDependentNet`), 0 = none.
        level_scaling: its last matrix starts over 1 + 0.1 level.
    """
    hidden = channels * hidden_mult
    if linear:
        net: nn.Module = nn.Linear(channels, channels)
        layers = [net]
    else:
        first, last = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        net = nn.Sequential(first, nn.GELU(), Dropout(dropout), last)
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
        if level_scaling:
            layers[-1].weight.mul_(1 / (1 + 0.1 * level))
    return DataDependentNet(net, channels, rank) if rank else net


def applied(net: nn.Module, x: Tensor) -> Tensor:
    """net(x), [..., C] -> [..., C]: in a GPU's compiled step with biases summed by text."""
    if not (in_gpu_step(x) and x.ndim == 3 and is_plain(net)):
        return net(x)
    *firsts, last = [layers[0] for layers in _layers([net])]
    for layer in firsts:
        x = nn.functional.gelu(linear_by_text(x, layer.weight, layer.bias))
    return linear_by_text(x, last.weight, last.bias)


def less(
    delay: nn.Module, x: Tensor, predicted: Tensor, history: Tensor | Ring | None
) -> tuple[Tensor, Tensor | Ring]:
    """(delay(x) − predicted) / √2 of two of [B, T, C], in this shape, and the delay's history."""
    if history is None and isinstance(delay, CausalFilter) and in_one_product(x):
        factors = map(as_factor, (delay.taps(), x, predicted))
        detail = FilterLess.apply(*factors, delay.min_lag, 1 / math.sqrt(2))
        return detail, remember(x, None, delay.max_lag).state
    past, history = delay(x, history)
    return (past - predicted) / math.sqrt(2), history


def is_plain(net: nn.Module) -> bool:
    """Whether a net is of ordinary layers, as in training, and draws no random numbers.

    Layers of others in their place, as adapters are, and weights of others' types, as quantized
    ones are, know themselves how to be applied.
    """
    layers = list(net) if isinstance(net, nn.Sequential) else [net]
    dropped = any(isinstance(layer, Dropout) and layer.p > 0 for layer in layers)
    types = {type(layer) for layer in layers}
    if dropped or not types <= {nn.Linear, nn.GELU, Dropout}:
        return False
    linears = [layer for layer in layers if type(layer) is nn.Linear]
    return not any(hasattr(layer.weight, "__tensor_flatten__") for layer in linears)


def _layers(nets: list[nn.Module]) -> list[list[nn.Linear]]:
    """The linear layers of plain nets of one shape: all first ones, then all last ones."""
    if isinstance(nets[0], nn.Linear):
        return [nets]
    return [[net[0] for net in nets], [net[-1] for net in nets]]


def _weights(layers: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Of n linear layers of one shape: weights [n, out, in] and biases [n, out]."""
    weights, biases = joined([x.weight for x in layers]), joined([x.bias for x in layers])
    return weights.unflatten(0, (len(layers), -1)), biases.unflatten(0, (len(layers), -1))


class LessUpdates(torch.autograd.Function):
    """x − Σ_k 2^(k/2) (h_k W_kᵀ + b_k) over k = L − 1 … 0, in x's dtype.

    The products of the backward pass read the gradient of the sum, scaled for each level; where
    `scales_results`, all of them read the same one, and what they give is scaled.
    """

    @staticmethod
    def forward(ctx, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[N, C], [L, N, hidden], [L, C, hidden], [L, C] -> [N, C]."""
        ctx.save_for_backward(h, weight)
        updates = torch.baddbmm(bias[:, None], h, weight.mT)
        for k, update in zip(reversed(range(len(h))), updates, strict=True):
            x = torch.sub(x, update, alpha=2 ** (k / 2))
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        """[N, C] -> [N, C], [L, N, hidden], [L, C, hidden], [L, C]."""
        h, weight = ctx.saved_tensors
        k = torch.arange(len(h) - 1, -1, -1, dtype=grad.dtype, device=grad.device)
        scales = -(k / 2).exp2()[:, None, None]
        if not scales_results(grad):
            each = (scales * grad).to(h.dtype)
            return grad, torch.bmm(each, weight), torch.bmm(each.mT, h), each.sum(1)
        each = grad.to(h.dtype).expand(len(h), *grad.shape)
        products = torch.bmm(each, weight), torch.bmm(each.mT, h), grad.sum(0).expand(len(h), 1, -1)
        for_h, for_weight, for_bias = ((scales * y).to(h.dtype) for y in products)
        return grad, for_h, for_weight, for_bias[:, 0]


def scales_results(x: Tensor) -> bool:
    """Whether to scale what products with x, of any shape, give, and not x for each of them.

    In a compiled step on a GPU that is part of what reads the results.
    """
    return torch.compiler.is_compiling() and x.is_cuda


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
