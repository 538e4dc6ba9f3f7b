"""The gated delta rule: a matrix that is written and read like a memory, in three forms.

For each text and head, with S [dk, dv], keys of length 1, a decay 0 < α ≤ 1 and a gate 0 ≤ β ≤ 1:

    u_t = β_t (v_t − α_t S_{t−1}ᵀ k_t)       what the memory lacks of the value
    S_t = α_t S_{t−1} + k_t u_tᵀ
    y_t = S_tᵀ q_t

(Yang, Kautz and Hatamizadeh, 2024, "Gated Delta Networks"). `recurrent` computes just that.
`chunked` takes `CHUNK` positions at once: within a chunk the u_t solve a unit lower-triangular
system, between chunks one product passes the state on. On a CPU `delta_rule.cpp` runs the
recurrence with the state in the first-level cache, where there is a compiler for it; on CUDA it is
the kernel of fla-core where that is installed and keys have up to 256 numbers.

All tensors: q, k [B, T, H, dk], v [B, T, H, dv], log_decay, beta [B, T, H], state [B, H, dk, dv],
of one dtype, float32 or float64. All forms return y [B, T, H, dv] and the states after every
`every`-th position and after the last, [B, N, H, dk, dv] with N = ⌈T / every⌉.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from wavelet_lm.kernels.native import library

CHUNK = 32
# Up to so many positions the recurrence itself takes fewer passes than the chunked form.
FEW_POSITIONS = 4
# Numbers of the states, times positions, from which a CPU kernel is worth a second thread.
THREAD_WORK = 1 << 19
SOURCE = Path(__file__).with_suffix(".cpp")
FLA_CHUNK, FLA_LONGEST_KEY = 64, 256  # fla-core's own
HAS_FLA = importlib.util.find_spec("fla") is not None

INPUTS = ("q", "k", "v", "log_decay", "beta", "state")

Result = tuple[Tensor, Tensor]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    every: int | None = None,
    into: Tensor | None = None,
) -> Result:
    """The rule in the form that suits device and length.

    Returns y [B, T, H, dv] and the states after every `every`-th position and after the last,
    [B, N, H, dk, dv]; `every` None: after the last alone. Shapes and dtypes as the module says.

    into: where the states of one position are put, [B, 1, H, dk, dv], dense, without gradients; it
        may be the memory of `state`, which is then neither copied nor kept. None: a new tensor.
    """
    T = q.shape[1]
    inputs = (q, k, v, log_decay, beta, state)
    if into is not None:
        return _one_position(inputs, into)
    if q.is_cpu and not torch.compiler.is_exporting():  # to where there is no such kernel
        y, states = _on_cpu(*inputs, every or CHUNK)
    elif every or T <= FEW_POSITIONS:
        y, states = recurrent(*inputs, every)
    elif q.is_cuda and HAS_FLA and q.shape[-1] <= FLA_LONGEST_KEY:
        y, states, _, _ = _by_fla(*inputs)
    else:
        y, states = chunked(*inputs)
    return y, states if every else states[:, -1:]


def _one_position(inputs: tuple[Tensor, ...], into: Tensor) -> Result:
    """y and `into`; a kernel holds the state that it reads apart from the one that it writes."""
    v = inputs[2]
    kernel = _kernel(inputs) if v.is_cpu else None
    if kernel is None:
        y, states = recurrent(*inputs)
        return y, into.copy_(states)
    y = v.new_empty(v.shape)
    _run(kernel.delta_rule_forward, _Inputs.of(inputs, 1), y, into)
    return y, into


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    every: int | None = None,
) -> Result:
    """Position by position: y [B, T, H, dv] and states [B, N, H, dk, dv] as `delta_rule`."""
    T = q.shape[1]
    decay = log_decay.exp()
    outputs, states = [], []
    for t in range(T):
        faded = decay[:, t, :, None, None] * state
        recalled = (faded * k[:, t, :, :, None]).sum(-2)
        u = beta[:, t, :, None] * (v[:, t] - recalled)
        state = faded + k[:, t, :, :, None] * u[:, :, None]
        outputs.append((state * q[:, t, :, :, None]).sum(-2))
        if t + 1 == T or (every and (t + 1) % every == 0):
            states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> Result:
    """Chunk by chunk: y [B, T, H, dv], and the state after every chunk, [B, N, H, dk, dv].

    With γ_i the decay from the chunk's start to position i, the u of a chunk solve (I + L) U =
    diag(β) (V − diag(γ) K S) with L_ij = β_i (γ_i / γ_j) (k_i · k_j) for j < i. U is linear in the
    state S that the chunk starts with, so the systems of all chunks are solved before any S is
    known. All quotients of γ that are taken are at most 1.
    """
    T, dk = q.shape[1], q.shape[3]
    n_chunks = -(-T // CHUNK)
    padding = n_chunks * CHUNK - T

    def chunks(x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B, H, n_chunks, CHUNK, ...]; a pad of zeros changes no state."""
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
        return x.unflatten(1, (n_chunks, CHUNK)).movedim(3, 1)

    q, k, v, beta = chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]
    log_gamma = chunks(log_decay).cumsum(-1)
    gamma = log_gamma.exp()[..., None]
    # Above the diagonal the quotient may be too large for the dtype: it is never taken.
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = (log_gamma[..., :, None] - log_gamma[..., None, :]).where(lower, 0).exp()
    between = between.where(lower, 0)
    system = (beta * between * (k @ k.mT)).tril(-1)
    right = torch.cat((beta * v, beta * gamma * k), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    known, of_state = solved.split((v.shape[-1], dk), -1)  # U = known − of_state S
    scores = between * (q @ k.mT)
    fading_k = (log_gamma[..., -1:] - log_gamma).exp()[..., None] * k
    outputs, states = [], []
    for n in range(n_chunks):
        u = known[:, :, n] - of_state[:, :, n] @ state
        outputs.append(gamma[:, :, n] * (q[:, :, n] @ state) + scores[:, :, n] @ u)
        state = gamma[:, :, n, -1:] * state + fading_k[:, :, n].mT @ u
        states.append(state)
    y = torch.stack(outputs, 2).flatten(2, 3)[:, :, :T].transpose(1, 2)
    return y, torch.stack(states, 1)


# --- on a CPU ------------------------------------------------------------------------------------

# Operators are defined piece by piece: torch.library.custom_op loads the compiler at its first
# call, which takes seconds.

torch.library.define(
    "wavelet_lm::delta_rule",
    f"({', '.join(f'Tensor {name}' for name in INPUTS)}, int every) -> (Tensor, Tensor)",
)
torch.library.define(
    "wavelet_lm::delta_rule_backward",
    f"({', '.join(f'Tensor {name}' for name in INPUTS)}, Tensor states, Tensor d_y,"
    f" Tensor d_states, int every) -> ({', '.join(['Tensor'] * len(INPUTS))})",
)
_on_cpu = torch.ops.wavelet_lm.delta_rule.default
_on_cpu_backward = torch.ops.wavelet_lm.delta_rule_backward.default


@torch.library.impl("wavelet_lm::delta_rule", "CPU")
def _forward(*arguments: Tensor | int) -> Result:
    *inputs, every = arguments
    kernel = _kernel(inputs)
    if kernel is None:
        y, states = _plain(every, *inputs)
        return y.contiguous(), states.contiguous()
    y, states = _empty_result(*arguments)
    _run(kernel.delta_rule_forward, _Inputs.of(inputs, every), y, states)
    return y, states


@torch.library.register_fake("wavelet_lm::delta_rule")
def _empty_result(*arguments: Tensor | int) -> Result:
    q, _, v, _, _, state, every = arguments
    B, T, H, dk = q.shape
    dv = v.shape[-1]
    return v.new_empty(B, T, H, dv), state.new_empty(B, -(-T // every), H, dk, dv)


@torch.library.impl("wavelet_lm::delta_rule_backward", "CPU")
def _gradients(*arguments: Tensor | int) -> tuple[Tensor, ...]:
    *inputs, states, d_y, d_states, every = arguments
    kernel = _kernel(inputs)
    if kernel is None:
        _, pull_back = torch.func.vjp(partial(_plain, every), *inputs)
        return tuple(x.contiguous() for x in pull_back((d_y, d_states)))
    gradients = _empty_gradients(*arguments)
    read = [part.contiguous() for part in (states, d_y, d_states)]
    _run(kernel.delta_rule_backward, _Inputs.of(inputs, every), *read, *gradients)
    gradients[3].mul_(inputs[3].exp())  # of the decay's logarithm
    return gradients


@torch.library.register_fake("wavelet_lm::delta_rule_backward")
def _empty_gradients(*arguments: Tensor | int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments[: len(INPUTS)])


def _keep_inputs(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.every = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, d_y: Tensor, d_states: Tensor) -> tuple[Tensor | None, ...]:
    return *_on_cpu_backward(*ctx.saved_tensors, d_y, d_states, ctx.every), None


torch.library.register_autograd(_on_cpu, _backward, setup_context=_keep_inputs)


def _plain(every: int, *inputs: Tensor) -> Result:
    """What the kernel computes, where there is none."""
    return chunked(*inputs) if every == CHUNK else recurrent(*inputs, every)


class _Inputs(ctypes.Structure):
    """`Inputs` of delta_rule.cpp. What it points to lives as long as the tensors `kept`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "decay", "beta", "initial")),
        *((f"{name}_step", ctypes.c_long) for name in "qkv"),
        *((name, ctypes.c_long) for name in ("B", "T", "H", "every")),
    )
    kept: tuple[Tensor, ...]

    @classmethod
    def of(cls, inputs: Sequence[Tensor], every: int) -> _Inputs:
        """For the tensors of `INPUTS`."""
        *vectors, log_decay, beta, state = inputs
        vectors = [x if _is_dense_in_a_token(x) else x.contiguous() for x in vectors]
        kept = (*vectors, log_decay.exp().contiguous(), beta.contiguous(), state.contiguous())
        steps = [x.stride(1) for x in vectors]
        new = cls(*(x.data_ptr() for x in kept), *steps, *vectors[0].shape[:3], every)
        new.kept = kept
        return new


def _is_dense_in_a_token(x: Tensor) -> bool:
    """Whether a token of [B, T, H, d] is one piece, and texts follow each other."""
    batch, token, head, one = x.stride()
    return one == 1 and head == x.shape[3] and batch == x.shape[1] * token


def _kernel(inputs: Sequence[Tensor]) -> ctypes.CDLL | None:
    q, _, v, *_ = inputs
    real = {torch.float32: "float", torch.float64: "double"}[q.dtype]
    return library(SOURCE, REAL=real, DK=q.shape[-1], DV=v.shape[-1])


def _run(function: Callable[..., None], inputs: _Inputs, *tensors: Tensor) -> None:
    """All texts and heads, shared out among as many threads as PyTorch has."""
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    n_items = inputs.B * inputs.H
    work = inputs.kept[5].numel() * inputs.T
    n_threads = max(1, min(torch.get_num_threads(), n_items, work // THREAD_WORK))
    bounds = [n_items * i // n_threads for i in range(n_threads + 1)]

    def part(i: int) -> None:
        function(inputs, *pointers, ctypes.c_long(bounds[i]), ctypes.c_long(bounds[i + 1]))

    # ctypes lets other threads run while it is in the kernel.
    others = [_pool(n_threads - 1).submit(part, i) for i in range(1, n_threads)]
    part(0)
    for other in others:
        other.result()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="delta_rule")


# --- on CUDA -------------------------------------------------------------------------------------


torch.library.define(
    "wavelet_lm::delta_rule_by_fla",
    f"({', '.join(f'Tensor {name}' for name in INPUTS)}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "wavelet_lm::delta_rule_by_fla_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor state, Tensor decays, Tensor system,"
    f" Tensor d_y, Tensor d_states) -> ({', '.join(['Tensor'] * len(INPUTS))})",
)
_by_fla = torch.ops.wavelet_lm.delta_rule_by_fla.default
_by_fla_backward = torch.ops.wavelet_lm.delta_rule_by_fla_backward.default


@torch.library.impl("wavelet_lm::delta_rule_by_fla", "CompositeExplicitAutograd")
def _fla_forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state [B, 1, H, dk, dv], and what the backward pass reads.

    fla-core's own function stops torch.compile; its two halves are operators here.
    """
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_fwd

    *others, state = (x.contiguous() for x in inputs)
    decays, y, system, last, *_ = chunk_gated_delta_rule_fwd(
        *others, scale=1.0, initial_state=state, output_final_state=True
    )
    return y, last[:, None], decays, system


@torch.library.register_fake("wavelet_lm::delta_rule_by_fla")
def _(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, k, _, log_decay, *_ = inputs
    decays = log_decay.new_empty(log_decay.shape, dtype=torch.float32)
    y, states = _empty_result(*inputs, k.shape[1])
    return y, states, decays, k.new_empty(*k.shape[:3], FLA_CHUNK)


@torch.library.impl("wavelet_lm::delta_rule_by_fla_backward", "CompositeExplicitAutograd")
def _fla_gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
    from fla.ops.gated_delta_rule.chunk import chunk_gated_delta_rule_bwd

    q, k, v, beta, state, decays, system, d_y, d_states = (x.contiguous() for x in arguments)
    d_q, d_k, d_v, d_beta, d_log_decay, d_state, *_ = chunk_gated_delta_rule_bwd(
        *(q, k, v, decays, beta, system),
        scale=1.0,
        initial_state=state,
        do=d_y,
        dht=d_states[:, 0].contiguous(),
    )
    gradients = (d_q, d_k, d_v, d_log_decay, d_beta, d_state)
    return tuple(gradient.to(q.dtype) for gradient in gradients)


@torch.library.register_fake("wavelet_lm::delta_rule_by_fla_backward")
def _(*arguments: Tensor) -> tuple[Tensor, ...]:
    q, k, v, beta, state, *_ = arguments
    return tuple(x.new_empty(x.shape) for x in (q, k, v, beta, beta, state))


def _keep_for_fla(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, _, beta, state = inputs
    ctx.save_for_backward(q, k, v, beta, state, *output[2:])


def _backward_of_fla(ctx, d_y: Tensor, d_states: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return _by_fla_backward(*ctx.saved_tensors, d_y, d_states)


torch.library.register_autograd(_by_fla, _backward_of_fla, setup_context=_keep_for_fla)
