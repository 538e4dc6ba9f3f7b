"""Every form of the gated delta rule against the recurrence, written out number by number."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from wavelet_lm.kernels import delta_rule as module
from wavelet_lm.kernels.delta_rule import CHUNK, chunked, delta_rule, recurrent

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(B, T, H, dk, dv, dtype=torch.float64, seed=0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=g)

    return [
        normalize(normal(B, T, H, dk), dim=-1),
        normalize(normal(B, T, H, dk), dim=-1),
        normal(B, T, H, dv),
        logsigmoid(normal(B, T, H) + 1),
        normal(B, T, H).sigmoid(),
        normal(B, H, dk, dv),
    ]


def by_hand(q, k, v, log_decay, beta, state) -> tuple[Tensor, Tensor]:
    """The formulas for one position of one head after the other: y and the state after each."""
    B, T, H, _ = q.shape
    y, states = torch.empty_like(v), torch.empty(B, T, *state.shape[1:], dtype=v.dtype)
    for b in range(B):
        for h in range(H):
            S = state[b, h]
            for t in range(T):
                S = log_decay[b, t, h].exp() * S
                u = beta[b, t, h] * (v[b, t, h] - S.T @ k[b, t, h])
                S = S + torch.outer(k[b, t, h], u)
                y[b, t, h], states[b, t, h] = S.T @ q[b, t, h], S
    return y, states


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 2 * CHUNK + 3),
    H=st.integers(1, 3),
    dk=st.sampled_from([1, 4]),
    dv=st.sampled_from([3, 8]),
    seed=st.integers(0, 99),
)
def test_all_forms_are_the_recurrence(dtype, B, T, H, dk, dv, seed):
    inputs = draw(B, T, H, dk, dv, dtype, seed)
    y, states = by_hand(*inputs)
    near = {"rtol": 0, "atol": TOLERANCE[dtype]}
    for form in (recurrent, chunked, delta_rule):
        own_y, own_states = form(*inputs)
        torch.testing.assert_close(own_y, y, **near)
        torch.testing.assert_close(own_states[:, -1], states[:, -1], **near)
    for form in (recurrent, delta_rule):
        torch.testing.assert_close(form(*inputs, every=1)[1], states, **near)
    after_chunks = [*range(CHUNK - 1, T - 1, CHUNK), T - 1]
    torch.testing.assert_close(chunked(*inputs)[1], states[:, after_chunks], **near)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_chunks_are_the_whole(dtype):
    inputs = draw(2, 150, 2, 4, 4, dtype)
    whole, _ = delta_rule(*inputs)
    *parts, state = inputs
    for cuts in ([1], [75], [31, 32, 33], [1, 2, 64, 149]):
        pieces, now = [], state
        for start, end in pairwise([0, *cuts, 150]):
            y, states = delta_rule(*(x[:, start:end] for x in parts), now)
            pieces.append(y)
            now = states[:, -1]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("form", [chunked, delta_rule])
@pytest.mark.parametrize("T", [1, 7, CHUNK, CHUNK + 2])
def test_gradients_are_those_of_the_recurrence(form, T):
    inputs = [x.requires_grad_() for x in draw(2, T, 2, 3, 5)]
    weights_y, weights_s = torch.randn(2, T, 2, 5).double(), torch.randn(2, 2, 3, 5).double()

    def gradients(form):
        y, states = form(*inputs)
        total = (y * weights_y).sum() + (states[:, -1] * weights_s).sum()
        return torch.autograd.grad(total, inputs)

    for own, true in zip(gradients(form), gradients(recurrent), strict=True):
        torch.testing.assert_close(own, true, rtol=0, atol=1e-10)


def test_gradients_are_finite_differences():
    inputs = [x.requires_grad_() for x in draw(1, 6, 2, 2, 3)]
    assert torch.autograd.gradcheck(lambda *x: delta_rule(*x, every=2), inputs)


def test_gradients_of_states_on_the_way_count():
    inputs = [x.requires_grad_() for x in draw(1, 9, 1, 2, 3)]
    for every in (1, 4):
        own = torch.autograd.grad(delta_rule(*inputs, every)[1].sin().sum(), inputs[1:])
        true = torch.autograd.grad(recurrent(*inputs, every)[1].sin().sum(), inputs[1:])
        for a, b in zip(own, true, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_what_was_written_is_recalled_until_it_is_written_again():
    """Orthogonal keys, no decay, full gates: the memory is a table."""
    H, d = 1, 4
    keys = torch.eye(d).double()
    values = torch.randn(d, 3).double()
    newer = torch.randn(3).double()
    k = torch.cat((keys, keys[1:2]))[None, :, None]
    v = torch.cat((values, newer[None]))[None, :, None]
    ones, zeros = torch.ones(1, d + 1, H).double(), torch.zeros(1, d + 1, H).double()
    for form in (recurrent, chunked, delta_rule):
        _, states = form(k, k, v, zeros, ones, torch.zeros(1, H, d, 3).double())
        table = values.clone()
        table[1] = newer
        torch.testing.assert_close(states[0, -1, 0], table, rtol=0, atol=1e-12)


def test_a_strong_decay_does_not_overflow_the_chunks():
    q, k, v, log_decay, beta, state = draw(1, 3 * CHUNK, 1, 4, 4, torch.float32)
    inputs = (q, k, v, log_decay * 200, beta, state)  # to exp(-1000) and below in a chunk
    inputs = tuple(x.requires_grad_() for x in (x.detach() for x in inputs))
    y, _ = chunked(*inputs)
    torch.testing.assert_close(y, recurrent(*inputs)[0], rtol=0, atol=1e-5)
    for gradient in torch.autograd.grad(y.sum(), inputs):
        assert gradient.isfinite().all()


def test_parts_of_wider_tensors_need_no_copy_and_others_are_copied():
    wide = torch.randn(2, 40, 3, 2, 8).double()
    q, k = normalize(wide[:, :, :2], dim=-1).unbind(3)  # heads are 16 numbers apart
    v = torch.randn(2, 40, 40).double()[..., 4:20].unflatten(-1, (2, 8))
    log_decay, beta = (-torch.rand(2, 40, 4).double()).split(2, -1)
    state = torch.randn(2, 8, 2, 8).double().transpose(1, 2)
    inputs = (q, k, v, log_decay, -beta, state)
    for own, true in zip(delta_rule(*inputs), recurrent(*inputs), strict=True):
        torch.testing.assert_close(own, true, rtol=0, atol=1e-10)


@pytest.mark.parametrize("T", [1, 70])
def test_threads_change_no_bit(T, monkeypatch):
    inputs = [x.requires_grad_() for x in draw(3, T, 3, 4, 4)]

    def results():
        y, states = delta_rule(*inputs)
        return [y, states, *torch.autograd.grad(y.sum() + states.sum(), inputs)]

    before, threads = results(), torch.get_num_threads()
    monkeypatch.setattr(module, "THREAD_WORK", 1)
    try:
        torch.set_num_threads(4)
        assert all(map(torch.equal, before, results()))
    finally:
        torch.set_num_threads(threads)


def test_a_text_is_what_it_is_alone():
    *parts, state = draw(5, 40, 2, 4, 4, torch.float32)
    whole, _ = delta_rule(*parts, state)
    for b in range(5):
        alone, _ = delta_rule(*(x[b : b + 1] for x in parts), state[b : b + 1])
        assert torch.equal(alone, whole[b : b + 1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_state_is_written_over_itself(compiled, dtype, monkeypatch):
    """With the same bits as where it is new; that of other texts in the same memory stays."""
    if not compiled:
        monkeypatch.setattr(module, "library", lambda *names, **values: None)
    *parts, state = draw(3, 1, 2, 4, 8, dtype)
    buffer = torch.cat((state, state))
    y, states = delta_rule(*parts, state, every=1)
    own_y, own_states = delta_rule(*parts, buffer[:3], every=1, into=buffer[:3, None])
    assert torch.equal(own_y, y) and torch.equal(own_states, states)
    assert own_states.data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, torch.cat((states[:, 0], state)))


@pytest.mark.parametrize("every", [None, 1])
def test_without_a_compiler_the_plain_forms_do_it(every, monkeypatch):
    inputs = [x.requires_grad_() for x in draw(2, 40, 2, 3, 4)]

    def results():
        y, states = delta_rule(*inputs, every)
        return [y, states, *torch.autograd.grad(y.sum() + states.sum(), inputs)]

    before = results()
    monkeypatch.setattr(module, "_kernel", lambda inputs: None)
    for own, true in zip(results(), before, strict=True):
        torch.testing.assert_close(own, true, rtol=0, atol=1e-10)


def test_not_a_number_is_passed_on():
    q, k, v, *rest = draw(1, 40, 1, 4, 4, torch.float32)
    v[0, 5] = torch.nan
    y, states = delta_rule(q, k, v, *rest)
    assert y[0, :5].isfinite().all()
    assert y[0, 5:].isnan().all()
    assert states.isnan().all()


def test_the_operators_are_what_the_compiler_expects():
    inputs = [x.requires_grad_() for x in draw(2, 40, 2, 4, 4)]
    torch.library.opcheck(torch.ops.wavelet_lm.delta_rule.default, (*inputs, 32))


def test_fla_gets_what_it_asks_for(monkeypatch):
    """Its kernels need a GPU; this stand-in has their signatures and checks their layout."""

    def form(q, k, v, g, beta, state):
        B, T, H, dk = q.shape
        assert g.shape == beta.shape == (B, T, H)
        assert state.shape == (B, H, dk, v.shape[-1])
        y, states = recurrent(q, k, v, g, beta, state)
        return y, states[:, -1]

    def forward(q, k, v, g, beta, scale, initial_state, output_final_state):
        assert scale == 1.0 and output_final_state
        y, last = form(q, k, v, g, beta, initial_state)
        system = torch.zeros(*k.shape[:3], module.FLA_CHUNK).double()
        return g.cumsum(1), y, system, last, initial_state, None

    def backward(q, k, v, g, beta, A, scale, initial_state, do, dht):
        assert scale == 1.0 and A.shape[-1] == module.FLA_CHUNK
        g = g.diff(dim=1, prepend=torch.zeros_like(g[:, :1]))  # of the sums that forward gave
        _, pull_back = torch.func.vjp(form, q, k, v, g, beta, initial_state)
        dq, dk, dv, dg, db, dh0 = pull_back((do, dht))
        return dq, dk, dv, db, dg, dh0, None, None

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.gated_delta_rule.chunk"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    chunk = sys.modules["fla.ops.gated_delta_rule.chunk"]
    chunk.chunk_gated_delta_rule_fwd, chunk.chunk_gated_delta_rule_bwd = forward, backward
    inputs = [x.requires_grad_() for x in draw(2, 40, 2, 3, 5)]

    def results(form):
        y, states, *_ = form(*inputs)
        total = y.sin().sum() + states[:, -1].cos().sum()
        return [y, states[:, -1], *torch.autograd.grad(total, inputs)]

    for own, true in zip(results(module._by_fla), results(recurrent), strict=True):
        torch.testing.assert_close(own, true, rtol=0, atol=1e-10)


@pytest.mark.cuda
@pytest.mark.parametrize("T", [1, 5, 100])
def test_on_cuda(T):
    inputs = [x.cuda() for x in draw(2, T, 2, 32, 32, torch.float32)]
    for own, true in zip(delta_rule(*inputs), recurrent(*inputs), strict=True):
        # fla-core multiplies in TF32 or bfloat16, with 8 to 11 bits.
        torch.testing.assert_close(own, true, rtol=0, atol=3e-2 if module.HAS_FLA else 1e-4)
