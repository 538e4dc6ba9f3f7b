"""The estimate of memory against real tensors, against closed forms, and against the process."""

import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import ROOT, tiny_config
from wavelet_lm.errors import UserError
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.training import memory_estimate
from wavelet_lm.training.memory_estimate import refuse_what_cannot_train, savings
from wavelet_lm.training.optimizers import Optimizer, state_bytes, step_bytes
from wavelet_lm.training.rehearsal import ACTIVATIONS, GRADIENTS, STATE, WEIGHTS, rehearse
from wavelet_lm.training.working_weights import WorkingWeights

V = 256
CPU = torch.device("cpu")
NETWORK = {
    "C": 64,
    "levels": 2,
    "per_scale_mixer_widths": None,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    "block_size": 96,
    "micro_batch_size": 2,
}
IN_BACKWARD = {"optimizer_in_backward": True, "grad_clip": 0.0}


class Allocated(TorchDispatchMode):
    """The most bytes at one time of tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in held:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        n = storage.nbytes()
        self.now += n
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, n)

    def _freed(self, n):
        self.now -= n


def said(dtype=torch.float32, **options):
    return rehearse(tiny_config(**{**NETWORK, **options}), V, "cpu", dtype)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"gradient_checkpointing": True}, torch.float32),
        ({"layers": 3, "gradient_checkpointing": 2}, torch.float32),
        ({"grad_accum": 2}, torch.float32),
        (IN_BACKWARD, torch.float32),
        ({**IN_BACKWARD, "optimizer": "AdamW", "gradient_checkpointing": 1}, torch.float32),
        ({"optimizer": "Muon", "pkm_enabled": True, "loop_iterations": 2}, torch.float32),
        ({"delta_memory": True}, torch.float32),
        ({"model": "gpt", "gradient_checkpointing": 1}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=str,
)
def test_a_rehearsed_step_holds_what_a_real_one_does(options, dtype):
    """Real tensors on the CPU, the second step, in which the optimizer has its state."""
    config = tiny_config(**{**NETWORK, "optimizer_eps": 1e-8, **options})
    model = build_model(config, V)
    optimizer = Optimizer(model, config)
    tokens = torch.randint(V, (config.micro_batch_size, config.block_size))

    def step():
        for _ in range(config.grad_accum):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss, _ = model.loss(tokens, tokens)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Allocated() as allocated:
        step()
    state = sum(t.nbytes for t in optimizer.state()[0].values())
    taken = 4 * n_params(model) + state + allocated.most
    assert rehearse(config, V, "cpu", dtype).peak == pytest.approx(taken, rel=0.05)


def test_what_each_kind_holds():
    plain, model = said(), build_model(tiny_config(**NETWORK), V)
    n = n_params(model)
    assert plain.held[WEIGHTS] == 4 * n + sum(b.nbytes for b in model.buffers())
    assert plain.held[STATE] == pytest.approx(4 * n, rel=0.1)  # the first mix is frozen
    assert plain.on_host == 0
    away = said(optimizer_offload=True)
    assert away.held[STATE] == 0
    assert away.on_host == plain.held[STATE]
    # Where activations are few, most gradients are there at the peak; in backward never.
    few = {"C": 256, "block_size": 4, "micro_batch_size": 1}
    late, early = said(**few).held, said(**few, **IN_BACKWARD).held
    assert late[GRADIENTS] > 0.5 * late[WEIGHTS] > 2 * early[GRADIENTS]


def test_recomputed_blocks_keep_what_goes_in():
    """A block that is kept adds all that it makes, one that is not its inputs of [B, T, C]."""
    position = 4 * NETWORK["micro_batch_size"] * NETWORK["block_size"] * NETWORK["C"]
    for switch, least, most in ((False, 20, 1000), (True, 1.9, 5)):
        three, four = (said(layers=n, gradient_checkpointing=switch).held for n in (3, 4))
        assert least < (four[ACTIVATIONS] - three[ACTIVATIONS]) / position < most


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon", "Adagrad8bit", "AdamW8bit"))
def test_an_optimizer_takes_what_is_said(name):
    """Its state, and beside it nothing of the size of the weights but Muon's stacks."""
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    config = tiny_config(**{**NETWORK, "C": 128}, optimizer=name, optimizer_eps=1e-8)
    model = build_model(config, V)
    optimizer = Optimizer(model, config)

    def step():
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        with Allocated() as allocated:
            optimizer.step(torch.tensor(2.0))
        return allocated.most

    step()  # makes what is kept
    state = sum(t.nbytes for t in optimizer.state()[0].values())
    assert state == pytest.approx(sum(state_bytes(model).values()), rel=0.1)
    taken = max(step_bytes(model, "cpu").values())
    if name == "Muon":
        assert step() == pytest.approx(taken, rel=0.4)
    elif name in ("Adagrad", "AdamW"):
        assert step() <= 0.05 * n_params(model)
        assert taken == 0


def test_what_cannot_fit_is_told_what_to_try(monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda device: 1000)
    config = tiny_config(**NETWORK)
    with pytest.raises(UserError) as caught:
        refuse_what_cannot_train(build_model(config, V), CPU)
    line = str(caught.value)
    assert "\n" not in line
    for word in ("cpu has 0.0 GiB", "--gradient_checkpointing", "--optimizer Adagrad8bit"):
        assert word in line
    assert "--optimizer_offload" not in line  # to where it is
    assert "--optimizer_offload" in savings(config, torch.device("cuda"))
    best = config.replace(gradient_checkpointing=True, optimizer="Muon", **IN_BACKWARD)
    assert savings(best, CPU).startswith("lower micro_batch_size (2), block_size (96)")


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", ["plain", "two micro-batches", "blocks recomputed", "in backward, recomputed"]
)
def test_a_process_takes_what_is_said(row, monkeypatch):
    """Within a tenth of the memory that the system counts (benchmarks/training_memory.py)."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training_memory

    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "training_memory.py")])
    assert abs(training_memory.apart(row)["error"]) <= 0.1


@pytest.mark.parametrize("optimizer, accum", [("Adagrad", 1), ("Adagrad", 2), ("AdamW", 1)])
def test_copies_in_half_precision_are_held(optimizer, accum):
    config = tiny_config(**NETWORK, optimizer=optimizer, grad_accum=accum, amp_dtype="bf16")
    model = build_model(config, V)
    n = sum(p.numel() for p in WorkingWeights(model, torch.bfloat16).copies)
    held = rehearse(config, V, "cuda", torch.bfloat16).held
    buffers = sum(b.nbytes for b in model.buffers())
    assert held[WEIGHTS] == 4 * n_params(model) + 2 * n + buffers
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if held[ACTIVATIONS] < 8 * n:  # most is held in the optimizer's step
        assert held[GRADIENTS] == 4 * trained - 2 * n * (accum == 1)
