"""The training benchmark, at a size where it says nothing about speed."""

import json
import sys

import pytest
import training
import training_memory
from equal_gpt import gpt_config, gpt_shape_of_flops, gpt_training_flops
from products import flops_per_token

from tests.conftest import TINY, tiny_config
from wavelet_lm import build_model
from wavelet_lm.errors import UserError
from wavelet_lm.models.registry import n_params

VOCAB = 40


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command on a tiny config: the results that it wrote."""
    config, results = tmp_path / "tiny.json", tmp_path / "results.json"
    config.write_text(json.dumps({**TINY, "micro_batch_size": 2, "optimizer": "AdamW"}))

    def run(*more):
        arguments = ["--config", config, "--steps", 10, "--vocab_size", VOCAB, "--device", "cpu"]
        arguments += [*more, "--json", results]
        monkeypatch.setattr(sys, "argv", ["training.py", *map(str, arguments)])
        training.main()
        return json.loads(results.read_text())["rows"]

    return run


def test_a_row_for_every_model(run, capsys, monkeypatch):
    monkeypatch.setattr(training, "LARGE", {"cpu": 32})
    T = tiny_config().block_size
    rows = run("--modes", "eager", "--step_tokens", T, "--gpt")
    assert [row["model"] for row in rows] == ["wavelet_lm", "gpt, parameters", "gpt, FLOPs"]
    for row in rows:
        assert row["tokens_per_step"] == T
        assert row["last_loss"] < row["first_loss"]
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert row["shares"]["products"] > 0
        seconds = row["step_milliseconds"] / 1000
        rate = row["flops_per_token"] * row["tokens_per_step"] / seconds / row["matrix_rate"] / 1e9
        assert row["of_matrix_rate"] == pytest.approx(rate, rel=0.02, abs=1e-3)
    ours, as_many, as_dear = rows
    # ± 5%, and the table of positions, which is not counted there
    assert as_many["parameters"] == pytest.approx(ours["parameters"], rel=0.1)
    assert as_dear["flops_per_token"] == pytest.approx(ours["flops_per_token"], rel=0.05)
    assert "of rate" in capsys.readouterr().out


def test_the_same_tokens_are_cut_into_micro_batches():
    config = tiny_config(micro_batch_size=4, grad_accum=3, block_size=16)
    sizes = {n: training.of_step(config, n) for n in (16, 48, 64, 256)}
    assert {n: (c.micro_batch_size, c.grad_accum) for n, c in sizes.items()} == {
        16: (1, 1),
        48: (3, 1),
        64: (4, 1),
        256: (4, 4),
    }
    for n in (8, 40, 80):
        with pytest.raises(UserError, match=f"--step_tokens has {n}"):
            training.of_step(config, n)


@pytest.mark.parametrize(("layers", "C", "T"), [(1, 64, 16), (3, 32, 64)])
def test_flops_of_a_gpt_are_those_that_are_counted(layers, C, T):
    config = gpt_config((layers, C, 1), T)
    counted = flops_per_token(build_model(config, VOCAB), T)
    assert gpt_training_flops(layers, C, VOCAB, T) == counted


def test_a_gpt_of_as_many_flops():
    V, T = 256, 256
    flops = 6_000_000
    layers, C, heads = gpt_shape_of_flops(flops, V, T)
    assert C % heads == 0
    assert gpt_training_flops(layers, C, V, T) == pytest.approx(flops, rel=0.05)
    longer = gpt_shape_of_flops(flops, V, 4 * T)  # attention takes its part
    sizes = [n_params(build_model(gpt_config(s, T), V)) for s in ((layers, C, heads), longer)]
    assert sizes[1] < sizes[0]


def test_names_of_kernels_have_a_kind():
    times = {
        "aten::addmm": 1,
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": 1,
        "wavelet_lm::delta_rule_backward": 2,
        "void at::native::multi_tensor_apply_kernel": 1,
        "triton_poi_fused_gelu_3": 1,
        "aten::embedding": 4,
    }
    assert training.shares_of(times) == {
        "delta rule": 0.2,
        "products": 0.2,
        "compiled": 0.1,
        "optimizer": 0.1,
        "rest": 0.4,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modes", "eager,fast"], "--modes has 'fast'; known are eager, compiled, config"),
        (["--steps", "3"], "--steps is 3; it must be 10 or more"),
    ],
)
def test_what_cannot_be_is_one_line(run, arguments, said):
    with pytest.raises(UserError, match=said):
        run(*arguments)


def test_memory_beside_its_estimate(tmp_path, monkeypatch, capsys):
    config, results = tmp_path / "tiny.json", tmp_path / "results.json"
    config.write_text(json.dumps({**TINY, "C": 64, "mlp_expansion": 16, "layers": 2}))
    arguments = ["--config", config, "--vocab_size", 4096, "--rows", "AdamW", "--json", results]
    monkeypatch.setattr(sys, "argv", [training_memory.__file__, *map(str, arguments)])
    training_memory.main()
    (row,) = json.loads(results.read_text())["rows"]
    assert row["options"] == "AdamW" and row["changed"] == {"optimizer": "AdamW"}
    assert row["peak_GiB"] > 16 * row["parameters"] / 2**30  # weights, gradients, two states
    assert row["estimated_GiB"] / row["peak_GiB"] - 1 == pytest.approx(row["error"], abs=1e-3)
    assert "AdamW: " in capsys.readouterr().out


@pytest.mark.cuda
def test_a_gpu_step_is_profiled():
    config = tiny_config(max_steps=10, log_interval=1, eval_interval=10, device="cuda")
    row = training.measure(config, VOCAB)
    assert row["shares"]["products"] > 0 and 0 < row["of_matrix_rate"] < 1
