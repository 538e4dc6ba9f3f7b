"""`compile`: false, auto and true, with a compiler that works and one that does not."""

import pytest
import torch

from tests.training import runs
from wavelet_lm.compiler import MERGED_KERNELS
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.run import train


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def loss(self, x):
        return (torch.rand(()) * x * self.weight).sum(), None


def broken_at_once(function, **options):
    raise RuntimeError("no C++ compiler\nfound here")


def broken_when_called(function, **options):
    def call(*args, **kwargs):
        torch.rand(5)
        return broken_at_once(function)

    return call


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        torch.rand(5)
        broken_at_once(None)


def broken_in_backward(function, **options):
    def call(*args, **kwargs):
        loss, state = function(*args, **kwargs)
        return FailsInBackward.apply(loss), state

    return call


MERGED = MERGED_KERNELS | {"max_autotune_allow_flexible_layouts": True}
SEPARATE = {"triton.mix_order_reduction": False}
APART = "triton.mix_order_reduction false"
MERGING = "combo_kernels true and max_autotune_allow_flexible_layouts true"
BROKEN = pytest.mark.parametrize("broken", [broken_at_once, broken_when_called, broken_in_backward])


def losses(setting, device="cuda", n=3):
    """The first values of a loss that depends on the generator, and what was logged."""
    lines = []
    config = runs.tiny_config(compile=setting)
    function = compiled(Loss(), config, torch.device(device), lines.append)
    torch.manual_seed(5)
    values = []
    for _ in range(n):
        loss, _ = function(torch.ones(3))
        loss.backward()
        values.append(loss.item())
    return values, lines


@pytest.fixture
def no_cuda_generator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


@pytest.mark.parametrize(("setting", "device"), [(False, "cuda"), (False, "cpu"), ("auto", "cpu")])
def test_false_and_auto_on_a_cpu_do_not_compile(monkeypatch, setting, device):
    monkeypatch.setattr(torch, "compile", broken_at_once)
    assert losses(setting, device)[1] == []


@BROKEN
def test_auto_falls_back_with_a_notice_and_the_same_losses(monkeypatch, no_cuda_generator, broken):
    eager, _ = losses(False)
    monkeypatch.setattr(torch, "compile", broken)
    values, lines = losses("auto")
    assert values == eager
    assert lines[1:] == [
        f"compiling once more with {MERGING} and {APART}: no C++ compiler",
        f"compiling once more with {APART}: no C++ compiler",
        "going on without torch.compile, which failed: no C++ compiler found here",
    ]


@pytest.mark.parametrize("n", [1, 2])
def test_a_gpu_merges_less_where_merging_fails(monkeypatch, no_cuda_generator, n):
    asked = []

    def compiler(function, options):
        asked.append(options)
        return broken_when_called(function) if len(asked) <= n else function

    eager, _ = losses(False)
    monkeypatch.setattr(torch, "compile", compiler)
    values, lines = losses(True)
    assert values == eager
    assert asked == [MERGED, MERGED | SEPARATE, SEPARATE][: n + 1]
    assert len(lines) == 1 + n


@BROKEN
def test_true_stops_in_one_line(monkeypatch, broken):
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"\(no C\+\+ compiler found here\); use --compile auto"):
        losses(True, "cpu")


def test_a_compiler_that_works_is_asked_once_and_used(monkeypatch):
    calls = []

    def compiler(function):
        calls.append("compile")
        return lambda x: (calls.append("run"), function(x))[1]

    monkeypatch.setattr(torch, "compile", compiler)
    losses(True, "cpu")
    assert calls == ["compile", "run", "run", "run", "run"]  # once more, to try it


def test_the_trial_leaves_no_trace(monkeypatch):
    """The losses are those without it, and no gradient is left."""
    eager, _ = losses(False, "cpu")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert losses(True, "cpu")[0] == eager
    model = Loss()
    function = compiled(model, runs.tiny_config(compile=True), torch.device("cpu"), print)
    function(torch.ones(3))
    assert model.weight.grad is None


def test_failures_after_the_first_step_are_not_taken_for_the_compiler(monkeypatch):
    def compiler(function):
        return lambda x: function(x) if len(x) == 3 else broken_at_once(function)

    monkeypatch.setattr(torch, "compile", compiler)
    function = compiled(
        Loss(), runs.tiny_config(compile=True), torch.device("cpu"), lambda line: None
    )
    function(torch.ones(3))
    with pytest.raises(RuntimeError, match="no C"):
        function(torch.ones(4))


@pytest.mark.parametrize("broken", [broken_when_called, broken_in_backward])
def test_a_run_that_fell_back_has_the_losses_of_an_eager_run(
    tmp_path, monkeypatch, no_cuda_generator, broken
):
    folders = [tmp_path / "eager", tmp_path / "fallback"]
    for folder in folders:
        folder.mkdir()
    train(runs.run_config(folders[0], compile=False, max_steps=10))
    monkeypatch.setattr(torch, "compile", broken)
    real = compiled
    monkeypatch.setattr(
        "wavelet_lm.training.run.compiled",
        lambda model, config, device, log: real(model, config, torch.device("cuda"), log),
    )
    train(runs.run_config(folders[1], compile="auto", max_steps=10))
    log = (runs.only_run(folders[1]) / "log.txt").read_text(encoding="utf-8")
    assert "going on without torch.compile" in log
    assert runs.figures(runs.only_run(folders[0])) == runs.figures(runs.only_run(folders[1]))


def compiled_beside_plain(config: Config, device: torch.device) -> None:
    """The loss and all gradients of one step, in float32."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = build_model(config, 64).to(device).train()
    idx = torch.randint(64, (config.micro_batch_size, config.block_size + 1), device=device)
    results, lines = [], []
    for loss_of in (model.loss, compiled(model, config, device, lines.append)):
        model.zero_grad()
        loss, _ = loss_of(idx[:, :-1], idx[:, 1:])
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients))
    (plain, expected), (loss, got) = results
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4 * max(1, float(b.abs().max())))
    assert not any("without" in line for line in lines)


SWITCHES = [{}, {"delta_memory": True, "mixer_transform": "identity"}, {"model": "gpt", "heads": 4}]


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES)
def test_a_compiled_step_has_the_loss_and_gradients_of_the_plain_one(switches):
    compiled_beside_plain(step_config(switches), torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("switches", SWITCHES)
def test_merged_kernels_have_the_loss_and_gradients_of_the_plain_step(switches):
    compiled_beside_plain(step_config(switches), torch.device("cuda"))


def step_config(switches: dict) -> Config:
    keys = {"C": 64, "layers": 2, "block_size": 64, "micro_batch_size": 4, "compile": True}
    no_dropout = {f"dropout_{part}": 0 for part in ("embedding", "projection", "mlp", "lm_head")}
    if switches.get("model") == "gpt":
        return Config.from_dict({**keys, **no_dropout, **switches}, source="test")
    keys |= {"levels": 3, "per_scale_mixer_widths": [1, 1, 0.5, 0.5], "pkm_enabled": True}
    keys |= {"pkm_num_keys": 64, "pkm_top_k": 4, "fwpkm_enabled": False, "dropout_mixer": 0}
    return Config.from_dict({**keys, **no_dropout, **switches}, source="test")
