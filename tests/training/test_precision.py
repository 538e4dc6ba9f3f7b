"""Clipping and loss scaling against PyTorch's own, and that no step waits for the device."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.test_optimizers import make, weights
from wavelet_lm.kernels.adagrad import adagrad_
from wavelet_lm.kernels.adamw import adamw_
from wavelet_lm.roles import maps
from wavelet_lm.training.precision import LossScale, Precision, collapsed
from wavelet_lm.training.weights import Weights

CPU = torch.device("cpu")


def precision_of(model, *, scale=None, on_device=False):
    """As of a run; with a loss scale as fp16 has it, and as on a GPU if so told."""
    precision = Precision(model.config, CPU)
    if scale is not None:
        precision.scaler = LossScale(CPU, enabled=True)
        precision.scaler.value.fill_(scale)
    if on_device:
        precision.device = torch.device("cuda")
    return precision


def set_gradients(model, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = size * torch.randn(p.shape, generator=generator)


def as_on_a_gpu(optimizer):
    """Let the twins of the kernels step."""
    for part in optimizer.parts:
        if hasattr(part, "_update"):
            part._update = adamw_ if isinstance(part, torch.optim.AdamW) else adagrad_


class NothingIsRead(TorchDispatchMode):
    """Fails where the host asks for a number, as it would wait for on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a number is read"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon"))
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_on_a_cpu_a_clipped_step_is_pytorchs_bit_for_bit(name, size):
    (model, optimizer), (twin, other) = make(name), make(name)
    precision = precision_of(model)
    for seed in range(3):
        set_gradients(model, seed, size)
        set_gradients(twin, seed, size)
        precision.update(optimizer, Weights(model), 1.0)
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        other.step()
    for (key, a), b in zip(weights(model).items(), weights(twin).values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon", "Adagrad8bit"))
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_in_the_step_itself_clipping_and_scale_are_what_they_are_apart(name, clip, scale):
    """As on a GPU, and beside what GradScaler and clip_grad_norm_ do."""
    (model, optimizer), (twin, other) = make(name, lr=1e-3), make(name, lr=1e-3)
    precision = precision_of(model, scale=scale, on_device=True)
    for seed in range(3):
        set_gradients(model, seed, scale or 1)
        set_gradients(twin, seed)
        precision.update(optimizer, Weights(model), clip)
        if clip:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        other.step()
    for (key, a), b in zip(weights(model).items(), weights(twin).values(), strict=True):
        # Muon rounds to bfloat16, and in another place where a number differs in its last bit.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5 if name == "Muon" else 1e-7, msg=key)


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon"))
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("gpu", [False, True])
def test_an_overflow_anywhere_leaves_weights_and_state_as_they_were(name, clip, gpu):
    model, optimizer = make(name)
    if gpu:
        as_on_a_gpu(optimizer)
    precision = precision_of(model, scale=1024.0)
    set_gradients(model, 0)
    precision.update(optimizer, Weights(model), clip)
    before, state = weights(model), {k: t.clone() for k, t in optimizer.state()[0].items()}
    set_gradients(model, 1)
    matrix = next(p for p in model.parameters() if p in maps(model))
    matrix.grad[0, 0] = float("inf")
    precision.update(optimizer, Weights(model), clip)
    assert all(torch.equal(before[key], p) for key, p in weights(model).items())
    assert all(torch.equal(state[key], t) for key, t in optimizer.state()[0].items())
    assert precision.scaler.value == 512
    set_gradients(model, 2)
    precision.update(optimizer, Weights(model), clip)
    assert not torch.equal(before["embedding.weight"], model.embedding.weight)


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon"))
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_no_step_on_a_gpu_reads_a_number(name, scale):
    model, optimizer = make(name, weight_decay=0.1)
    as_on_a_gpu(optimizer)
    precision = precision_of(model, scale=scale, on_device=True)
    set_gradients(model, 0)
    with NothingIsRead():
        precision.update(optimizer, Weights(model), 1.0)
    with pytest.raises(AssertionError, match="a number is read"), NothingIsRead():
        float(model.embedding.weight.detach().sum())


def test_gradients_that_are_no_numbers_are_not_hidden_by_clipping():
    for on_device in (False, True):
        model, optimizer = make("AdamW")
        set_gradients(model, 0)
        model.embedding.weight.grad[0, 0] = float("nan")
        precision_of(model, on_device=on_device).update(optimizer, Weights(model), 1.0)
        assert any(bool(p.isnan().any()) for p in model.parameters())


def test_the_loss_scale_moves_as_gradscalers_does():
    ours = LossScale(CPU, enabled=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=ours.FIRST)
    theirs.scale(torch.ones(()))
    overflows = [True, False, True, *[False] * 2001, True, *[False] * 4000]
    for step, overflow in enumerate(overflows):
        ours.update(torch.tensor(float(overflow)))
        args = (torch.tensor(float(overflow)), 2.0, 0.5, 2000)
        torch._amp_update_scale_(theirs._scale, theirs._growth_tracker, *args)
        if step in (0, 3, 2002, len(overflows) - 1):
            assert ours.state_dict() == theirs.state_dict()
    again = LossScale(CPU, enabled=True)
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == ours.state_dict()
    assert LossScale(CPU, enabled=False).state_dict() == {}
    assert collapsed(2.0**-11)
    assert not collapsed(1.0)
