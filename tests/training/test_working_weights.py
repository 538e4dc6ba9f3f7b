"""Copies in half precision: the same products as under autocast, and the weights stay float32."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import tiny_config
from tests.training import runs
from tests.training.test_precision import as_on_a_gpu
from tests.training.test_resume import before_step, killed_run, whole_run
from wavelet_lm.models import losses
from wavelet_lm.models.classifier.model import SequenceClassifier
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.run import resume
from wavelet_lm.training.weights import Weights, total_norm
from wavelet_lm.training.working_weights import WorkingWeights, copied_dtype, gradient

VOCAB = 30
CPU = torch.device("cpu")
BF16 = {"amp_dtype": "bf16", "C": 32, "weight_decay": 0.0, "lr": 1e-3, "optimizer_eps": 1e-8}
MODELS = [
    {},
    {"tie_embedding_to_lm_head": True},
    {"delta_memory": True, "wavelet_decomp_norm": True},
    {"mixer_exp_parametrization": True, "mixer_depth": 2, "phase_gating": True},
    {"lifting_linear_only": True, "decompose_bypass_ema": True},
    {"multinodal_enabled": True, "multinodal_cell_dim": 32, "multinodal_cross_cell_gating": True},
    {"model": "gpt"},
    {"model": "wavelet_gpt", "wavelet_module": "learnable", "head_hidden": 32},
]
models = pytest.mark.parametrize("keys", MODELS, ids=lambda keys: "-".join(keys) or "plain")


class Trial:
    """A model that trains in bfloat16, with copies or as autocast alone has it."""

    def __init__(self, keys, *, copies):
        config = tiny_config(**{**BF16, **keys})
        torch.manual_seed(0)
        self.model = build_model(config, VOCAB)
        self.precision = Precision(config, CPU)
        self.working = WorkingWeights(self.model, torch.bfloat16 if copies else torch.float32)
        self.optimizer = Optimizer(self.model, config, copies=self.working.copies)

    def backward(self, seed, in_float32=False):
        """The loss of a batch, whose gradients are there after it."""
        torch.manual_seed(seed)
        tokens = torch.randint(VOCAB, (2, 17))
        with self.working.in_place():
            with self.precision.autocast():
                loss, _ = self.model.loss(tokens[:, :-1], tokens[:, 1:])
            self.precision.backward(loss)
            self.working.gather(in_float32=in_float32)
        return loss.item()

    def step(self, seed):
        loss = self.backward(seed)
        self.precision.update(self.optimizer, Weights(self.model), 1.0)
        self.optimizer.zero_grad()
        return loss

    def gradients(self):
        copies = self.working.copies
        found = {n: gradient(p, copies) for n, p in self.model.named_parameters()}
        return {n: g.clone() for n, g in found.items() if g is not None}


class CastParameters(TorchDispatchMode):
    """The parameters of float32 that something asks for in half precision."""

    def __init__(self, model):
        super().__init__()
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.found.add(self.names.get(id(args[0])))
        return function(*args, **(kwargs or {}))


@models
def test_no_weight_is_cast_and_what_had_been_cast_has_a_copy(keys):
    """Autocast itself says which weights products read."""
    plain, working = Trial(keys, copies=False), Trial(keys, copies=True)
    with CastParameters(plain.model) as cast:
        plain.backward(0)
    names = {id(p): n for n, p in working.model.named_parameters()}
    copied = {names[id(p)] for p in working.working.copies}
    assert len(copied) > 10
    frozen = {n for n, p in plain.model.named_parameters() if not p.requires_grad}
    assert cast.found - {None} <= copied | frozen
    with CastParameters(working.model) as cast:
        working.backward(0)
    assert cast.found - {None} <= frozen


class PutTogether(TorchDispatchMode):
    """How many numbers of weights are put together, or padded, before products read them."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.n = {p.untyped_storage().data_ptr() for p in weights}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.stack):
            read = [p for p in args[0] if p.untyped_storage().data_ptr() in self.weights]
            self.n += sum(p.numel() for p in read)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "keys",
    [{}, {"mixer_depth": 2}, {"untied_reconstruction": True}, {"mixer_transform": "identity"}],
)
def test_what_products_read_together_is_not_put_together(keys, monkeypatch):
    monkeypatch.setattr(losses, "VOCAB_MULTIPLE", {"cpu": 64})
    monkeypatch.setattr(losses, "IN_BLOCKS", set())  # as a GPU reads it
    plain, working = Trial(keys, copies=False), Trial(keys, copies=True)
    with PutTogether(plain.model.parameters()) as mode:
        plain.backward(0)
    assert mode.n > 1000
    copies = working.working.copies.values()
    few = sum(p.numel() for name, p in working.model.named_parameters() if name.endswith(".V"))
    with PutTogether(copies) as mode:
        working.backward(0)
    assert mode.n <= few


@models
def test_a_first_step_computes_what_autocast_does(keys):
    plain, working = Trial(keys, copies=False), Trial(keys, copies=True)
    assert plain.backward(0) == pytest.approx(working.backward(0), rel=2e-3)
    theirs, ours = plain.gradients(), working.gradients()
    assert ours.keys() == theirs.keys()
    halves = [g for g in ours.values() if g.dtype == torch.bfloat16]
    assert halves
    flat = [torch.cat([g.float().flatten() for g in gs.values()]) for gs in (ours, theirs)]
    torch.testing.assert_close(flat[0], flat[1], rtol=0, atol=0.02 * float(flat[1].abs().max()))
    assert (flat[0] - flat[1]).norm() < 0.02 * flat[1].norm()


@pytest.mark.parametrize("optimizer", ["Adagrad", "AdamW", "Muon"])
def test_fifty_steps_learn_as_autocast_does(optimizer):
    keys = {"optimizer": optimizer, "lr": 3e-3}
    losses = []
    for copies in (False, True):
        trial = Trial(keys, copies=copies)
        losses.append([trial.step(seed % 4) for seed in range(50)])
    plain, working = losses
    assert max(abs(a - b) for a, b in zip(plain, working, strict=True)) < 0.1
    assert working[-1] < working[0] - 0.5


def test_a_step_is_the_slow_one_on_float32_weights_and_leaves_them_cast():
    trial, twin, sums = Trial({}, copies=True), Trial({}, copies=False), {}
    for seed in range(3):
        trial.backward(seed)
        gradients = trial.gradients()
        norm = torch.cat([g.double().flatten() for g in gradients.values()]).norm()
        assert total_norm(list(gradients.values())) == pytest.approx(norm.item(), rel=1e-6)
        divisor = ((norm + 1e-6) / 1.0).clamp(min=1)
        for name, p in twin.model.named_parameters():
            if name in gradients:
                g = gradients[name].float() / divisor
                sums[name] = sums.get(name, 0) + g * g
                with torch.no_grad():
                    p -= twin.model.config.lr * g / (sums[name].sqrt() + 1e-8)
        trial.precision.update(trial.optimizer, Weights(trial.model), 1.0)
        trial.optimizer.zero_grad()
        assert trial.optimizer.gradients() == []
    for (name, p), q in zip(trial.model.named_parameters(), twin.model.parameters(), strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)
    assert_fresh(trial.working)


def assert_fresh(working):
    for p, copy in working.copies.items():
        assert torch.equal(copy, p.to(copy.dtype))


@pytest.mark.parametrize("name", ["Adagrad", "AdamW"])
def test_on_a_gpu_the_pass_of_the_step_reads_and_writes_the_copies(name):
    """The twin of its kernel: no float32 gradient is made for a weight that has a copy."""
    trial, other = (Trial({"optimizer": name}, copies=True) for _ in range(2))
    as_on_a_gpu(trial.optimizer)
    for each in (trial, other):
        each.backward(0)
        each.precision.update(each.optimizer, Weights(each.model), 1.0)
    assert all(p.grad is None for p in trial.working.copies)
    for p, q in zip(trial.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert_fresh(trial.working)


def test_micro_steps_add_up_in_float32():
    """Sixty-four small gradients beside one: in bfloat16 most of them would be lost."""
    layer = nn.Sequential(nn.Linear(1, 1, bias=False))
    working = WorkingWeights(layer, torch.bfloat16)
    (weight,) = working.copies
    for x in [1.0] + 64 * [1 / 512]:
        with working.in_place():
            layer(torch.tensor([[x]], dtype=torch.bfloat16)).sum().backward()
            working.gather(in_float32=True)
    assert weight.grad.item() == 1 + 64 / 512
    assert weight.grad.dtype == torch.float32


def test_a_tied_table_gets_both_of_its_gradients():
    plain = Trial({"tie_embedding_to_lm_head": True}, copies=False)
    tied = Trial({"tie_embedding_to_lm_head": True}, copies=True)
    weight = tied.model.embedding.weight
    with tied.working.in_place():
        assert tied.model.embedding.weight is weight
        assert tied.model.head.weight.dtype == torch.bfloat16
    assert tied.model.head.weight is weight
    plain.backward(0), tied.backward(0)
    ours, theirs = (t.gradients()["embedding.weight"] for t in (tied, plain))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_float32_has_no_copies():
    trial = Trial({}, copies=False)
    assert not trial.working.copies
    before = [id(p) for p in trial.model.parameters()]
    with trial.working.in_place():
        assert [id(p) for p in trial.model.parameters()] == before


@pytest.mark.parametrize("keys", [{"model": "gpt"}, {}, {"multinodal_enabled": True}])
def test_a_classifier_has_copies_and_no_head(keys):
    model = SequenceClassifier(build_model(tiny_config(**keys), 16), 3)
    copies = WorkingWeights(model, torch.bfloat16).copies
    assert model.classify[0].weight in copies
    assert not any("head" in name for name, p in model.backbone.named_parameters() if p in copies)


def test_weights_that_step_alone_or_are_shared_have_no_copies():
    half = torch.bfloat16
    assert copied_dtype(tiny_config(), half) == half
    assert copied_dtype(tiny_config(), half, n_processes=2) == torch.float32
    alone = tiny_config(optimizer_in_backward=True, grad_clip=0.0)
    assert copied_dtype(alone, half) == torch.float32


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": "Adagrad", "grad_accum": 2, "tie_embedding_to_lm_head": True},
        {"optimizer": "Adagrad", "gradient_checkpointing": True},
    ],
    ids=["accumulated", "recomputed"],
)
def test_a_killed_run_in_bf16_goes_on_bit_for_bit(tmp_path, monkeypatch, keys):
    """Its file has float32 weights under their own names, and no copies."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    keys = {**keys, "amp_dtype": "bf16", "max_steps": 20}
    whole = whole_run(folders[0], **keys)
    killed = killed_run(folders[1], monkeypatch, step=13, **keys)
    resume(killed)
    runs.assert_same_run(whole, killed)
    weights = {n: t for n, t in runs.tensors(whole / "last.safetensors").items() if "/" not in n}
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_weights_that_a_checkpoint_brings_reach_the_copies(tmp_path, monkeypatch):
    def look(trainer):
        assert trainer.working.copies
        assert_fresh(trainer.working)

    killed = killed_run(tmp_path, monkeypatch, step=13, amp_dtype="bf16", max_steps=14)
    before_step(monkeypatch, 10, look)
    resume(killed)
