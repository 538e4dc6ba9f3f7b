"""What saves memory changes no number: weights that step in backward, state that is offloaded."""

import pytest
import torch

from tests.conftest import tiny_config
from tests.training import runs
from tests.training.test_optimizers import NAMES, VOCAB, make, step, weights
from tests.training.test_resume import whole_run
from wavelet_lm.config import ConfigError
from wavelet_lm.errors import UserError
from wavelet_lm.models.registry import build_model
from wavelet_lm.models.wavelet_lm import model as network
from wavelet_lm.training import optimizers
from wavelet_lm.training.offload import brought
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.run import resume

IN_BACKWARD = {"optimizer_in_backward": True, "grad_clip": 0.0}
# Weights that several places share have one gradient, when the last of them has added its part.
SHARED = {"tie_embedding_to_lm_head": True, "loop_iterations": 2, "gradient_checkpointing": 1}


def assert_same_weights(a, b, **tolerance):
    for (key, left), right in zip(weights(a).items(), weights(b).values(), strict=True):
        if tolerance:
            torch.testing.assert_close(left, right, msg=key, **tolerance)
        else:
            assert torch.equal(left, right), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("switches", [{}, SHARED], ids=("plain", "shared"))
def test_stepping_in_backward_is_stepping_after_it(name, switches):
    model, optimizer = make(name, **switches)
    early, other = make(name, **switches, **IN_BACKWARD)
    for seed in range(3):
        assert step(model, optimizer, seed) == step(early, other, seed)
        if name == "Muon":  # whose products of several matrices at once round otherwise
            assert_same_weights(model, early, rtol=1e-2, atol=1e-3)
            early.load_state_dict(model.state_dict())
        else:
            assert_same_weights(model, early)


def test_in_backward_a_gradient_is_freed_before_the_next_comes():
    model, _ = make("Adagrad", **IN_BACKWARD)
    alive = []

    def count(p):
        alive.append(sum(q.grad is not None for q in model.parameters()))

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(count)
    tokens = torch.randint(VOCAB, (2, 17))
    model.loss(tokens, tokens)[0].backward()
    assert set(alive) == {0}  # after the hook that has stepped
    assert len(alive) == sum(p.requires_grad for p in model.parameters())


@pytest.fixture
def offloading(monkeypatch):
    """As on a GPU: the state of a weight is another tensor while it steps than where it waits."""
    monkeypatch.setattr(optimizers, "refuse_offload_to_itself", lambda device: None)

    def away_and_back(state, device):
        there = {key: t.clone() if torch.is_tensor(t) else t for key, t in state.items()}
        state.update(there)
        return brought(state, device)

    monkeypatch.setattr(optimizers, "brought", away_and_back)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("early", [{}, IN_BACKWARD], ids=("after backward", "in backward"))
def test_an_offloaded_state_steps_as_one_on_the_device(name, early, offloading):
    (model, optimizer), (away, other) = make(name), make(name, optimizer_offload=True, **early)
    for seed in range(2):
        step(model, optimizer, seed)
        step(away, other, seed)
    if name == "Muon":
        assert_same_weights(model, away, rtol=1e-2, atol=1e-3)
        return
    assert_same_weights(model, away)
    (a, scalars), (b, others) = optimizer.state(), other.state()
    assert a.keys() == b.keys()
    assert scalars == others
    assert all(torch.equal(a[key], b[key]) for key in a)
    # A state that was saved on the device goes on offloaded.
    other.load_state({key: t.clone() for key, t in a.items()}, scalars)
    step(model, optimizer, 2)
    step(away, other, 2)
    assert_same_weights(model, away)


def test_a_state_that_moves_is_copied_back_in_place():
    state = {"step": torch.zeros(()), "sum": torch.ones(3), "count": 2}
    waiting = state["sum"]
    with brought(state, torch.device("cpu")):
        state["sum"] = state["sum"] + 1
        state["new"] = torch.full((2,), 7.0)
    assert state["sum"] is waiting
    assert state["sum"].tolist() == [2, 2, 2]
    assert state["new"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_in_backward": True}, "grad_clip is 1; set it to 0"),
        ({**IN_BACKWARD, "grad_accum": 2}, "grad_accum is 2; set it to 1"),
        ({**IN_BACKWARD, "compile": True}, "set compile to auto"),
        ({"gradient_checkpointing": 3}, "a pass runs 2 blocks; give 2 or less"),
        ({"gradient_checkpointing": -1}, "it must be >= 0"),
        ({"gradient_checkpointing": "some"}, "true, false or a whole number"),
        ({"amp_dtype": "fp8", "use_amp": False}, "set use_amp to true"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(**options)
    assert "\n" not in str(caught.value)


def test_what_the_device_does_not_have_is_refused(tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"amp_dtype fp8 needs a GPU with float8 .* this is cpu"):
        Precision(tiny_config(amp_dtype="fp8"), cpu)
    config = runs.config_file(tmp_path, optimizer_offload=True)
    line = runs.error_line("--config", config)
    assert "where device cpu has it already; leave it out" in line
    assert not list((tmp_path / "logs").glob("*"))  # no folder of a run that has not begun


def test_blocks_are_chosen_by_number(monkeypatch):
    again = []
    real = network.checkpoint

    def noted(block, *inputs, **options):
        again.append(block)
        return real(block, *inputs, **options)

    monkeypatch.setattr(network, "checkpoint", noted)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    for chosen, n in [(False, 0), (0, 0), (1, 1), (3, 3), (True, 3)]:
        model = build_model(tiny_config(layers=3, gradient_checkpointing=chosen), VOCAB)
        again.clear()
        model.loss(tokens, tokens)
        assert [*map(id, again)] == [*map(id, list(model.blocks)[:n])]


def test_a_resumed_run_may_take_less_memory(tmp_path):
    """And what it computes is what it would have computed."""
    folders = [tmp_path / "whole", tmp_path / "resumed"]
    for folder in folders:
        folder.mkdir()
    flat = {"warmup_fraction": 0, "min_lr": 0.01, "grad_clip": 0.0}
    whole = whole_run(folders[0], **flat, max_steps=20)
    short = whole_run(folders[1], **flat, max_steps=10)
    resume(short, {"max_steps": 20, "gradient_checkpointing": 1, "optimizer_in_backward": True})
    assert runs.figures(short) == runs.figures(whole)
    a, b = (runs.tensors(run / "last.safetensors") for run in (whole, short))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
