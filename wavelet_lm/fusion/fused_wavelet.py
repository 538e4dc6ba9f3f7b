"""The wavelet of a fused model: the reconstruction's update nets as one batched product.

They do not wait for one another, since their inputs are all known: the reconstruction is linear in
what they give, c_0 = √2^L a − Σ_k √2^k U_k(d_k). As in all of a fused model, the trained modules
are left as they are, and every matrix is a module of `linear.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavelet_lm.fusion.linear import (
    BatchedLinear,
    FusedLinear,
    OneOfBatch,
    as_parameter,
    dense,
    steps_in_one_launch,
)
from wavelet_lm.kernels.lifting import lifting_step_in_one
from wavelet_lm.roles import Runs
from wavelet_lm.transforms.history import Ring, RingSignal
from wavelet_lm.transforms.lifting import LiftingWavelet
from wavelet_lm.transforms.wavelet import Histories


class UpdateNets(nn.Module):
    """The nets that a reconstruction runs on the details, all at once: −Σ_k √2^k U_k(d_k).

    Args:
        wavelet: whose nets depend on nothing but their input.
        transform: H where the details come in the Hadamard domain, else an identity.
    """

    component = "wavelet nets"

    def __init__(self, wavelet: LiftingWavelet, transform: nn.Module):
        super().__init__()
        nets = list(reversed(wavelet.update if wavelet.own_update is None else wavelet.own_update))
        self.transform = transform
        self.hidden, turn = None, transform
        lasts = nets
        if not isinstance(nets[0], nn.Linear):
            firsts, lasts = [net[0] for net in nets], [net[-1] for net in nets]
            self.hidden = _batch([transform(m.weight) for m in firsts], firsts)
            turn = nn.Identity()
        self.last = _batch([turn(m.weight) for m in lasts], lasts)
        factors = [-(2 ** (k / 2)) for k in reversed(range(len(nets)))]
        self.factors = as_parameter(self.last.weight.new_tensor(factors)[:, None, None, None])

    def decomposing(self, update: nn.ModuleList) -> nn.ModuleList:
        """The update nets of the decomposition, which read from here what is the same here.

        It saves memory, and what one of them reads the cache may still hold for the other.
        """
        rotated = not isinstance(self.transform, nn.Identity)
        nets: list[nn.Module] = []
        for i, net in enumerate(reversed(update)):
            last = OneOfBatch(self.last, i)
            if self.hidden is None:
                nets.append(net if rotated else last)
            else:
                first = net[0] if rotated else OneOfBatch(self.hidden, i)
                nets.append(nn.Sequential(first, nn.GELU(), last))
        return nn.ModuleList(reversed(nets))

    def forward(self, details: Tensor) -> Tensor:
        """Details [L, B, T, Cp] -> [B, T, Cp], not in the Hadamard domain."""
        x = details
        if self.hidden is not None:
            x = nn.functional.gelu(self.hidden(x))
        return (self.last(x) * self.factors).sum(0)


class DecomposingWavelet(LiftingWavelet):
    """A `LiftingWavelet` whose reconstruction another module does, with `UpdateNets`.

    A compiled step of one text on a GPU is one launch for all levels (`kernels/lifting.py`).
    """

    def __init__(self, wavelet: LiftingWavelet):
        nn.Module.__init__(self)
        self.delays, self.predict, self.update = wavelet.delays, wavelet.predict, wavelet.update
        self.own_update = None

    def decompose(
        self, x: Tensor, state: Histories | None = None
    ) -> tuple[list[Tensor], Histories]:
        if steps_in_one_launch(x) and state is not None and isinstance(state[0], Ring):
            layers = self._dense_layers(x.dtype)
            if layers is not None:
                return self._step(x, state, layers)
        return super().decompose(x, state)

    def _step(
        self, x: Tensor, rings: tuple[Ring, ...], layers: list[tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], Histories]:
        """One position of one text; no delay is of less than one."""
        signals = [RingSignal(ring, 1) for ring in rings]
        pasts = [delay.past(s) for delay, s in zip(self.delays, signals, strict=True)]
        weights, biases = map(list, zip(*layers, strict=True))
        arrivals = torch.zeros(1, dtype=torch.int32, device=x.device)
        approximations, details = lifting_step_in_one(
            x[0, 0], torch.cat(pasts, 1)[0].to(x.dtype), weights, biases, arrivals
        )
        bands = torch.cat((approximations[-1:], details.flip(0)))[:, None, None]
        for ring, signal in zip(rings, (x, *approximations[:-1, None, None]), strict=True):
            ring.write(signal)
        return list(bands), rings

    def _dense_layers(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]] | None:
        """Weight and bias of all layers in the order in which they run; None if one has others."""
        nets = [net for level in zip(self.predict, self.update, strict=True) for net in level]
        layers = [
            dense(layer)
            for net in nets
            for layer in ((net[0], net[-1]) if isinstance(net, nn.Sequential) else (net,))
        ]
        known = all(layer is not None and layer[0].dtype == dtype for layer in layers)
        return layers if known else None

    def runs(self) -> dict[nn.Module, Runs]:
        """Its nets run once."""
        return {}


class FusedReconstruction(nn.Module):
    """c_0 = √2^L a − Σ_k √2^k U_k(d_k), then the projection W_o c_0 + b where there is one.

    In the Hadamard domain the projection is [√2^L W_o H | W_o] of a and the sum side by side.
    """

    def __init__(self, updates: UpdateNets, projection: nn.Module):
        super().__init__()
        self.updates, self.gain = updates, 2 ** (len(updates.factors) / 2)
        self.transform, self.projection = updates.transform, projection
        self.side_by_side = isinstance(projection, nn.Linear) and not isinstance(
            updates.transform, nn.Identity
        )
        if self.side_by_side:
            W_o = projection.weight
            both = torch.cat((self.gain * updates.transform(W_o), W_o), 1)
            self.projection = FusedLinear.of(both, projection.bias)

    def forward(self, bands: Tensor) -> Tensor:
        """Mixed bands [S, B, T, Cp] -> [B, T, C]."""
        a, sums = bands[0], self.updates(bands[1:])
        if self.side_by_side:
            return self.projection(torch.cat((a, sums), -1))
        return self.projection(torch.add(sums, self.transform(a), alpha=self.gain))


def _batch(weights: list[Tensor], layers: list[nn.Linear]) -> BatchedLinear:
    return BatchedLinear(torch.stack(weights), torch.stack([m.bias for m in layers]))
