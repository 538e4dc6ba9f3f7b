"""`python -m wavelet_lm.evaluation.compare` as it is typed."""

import json
import signal
import sys

import pytest

from tests.training import runs
from wavelet_lm.cli import compare
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.experiments import comparison
from wavelet_lm.experiments.comparison import summary

SHORT = {"max_steps": 4, "eval_interval": 2, "heads": 2, "head_hidden": 0}


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command in this process; its output and the JSON that it wrote."""
    monkeypatch.setattr(comparison, "forget_the_last_run", lambda: None)
    config, file = runs.config_file(tmp_path, **SHORT), tmp_path / "results.json"

    def run(*arguments):
        words = ["--config", config, "--json", file, *arguments]
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, words)])
        try:
            compare.main()
        finally:
            run.results = json.loads(file.read_text()) if file.exists() else None
        return capsys.readouterr().out, run.results

    return run


def test_table_file_and_plot(command, tmp_path):
    pytest.importorskip("matplotlib")
    image = tmp_path / "curves.PNG"
    names = ["gpt", "wavelet_gpt:ema@0.25", "wavelet_lm+layers=1"]
    options = ["--models", ",".join(names), "--seeds", "3,4", "--lrs", "0.001,0.01"]
    out, results = command(*options, "--budget", "steps:3", "--plot", image)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert results["budget"] == {"kind": "steps", "amount": 3}
    assert (results["lrs"], results["seeds"], results["tokens_per_step"]) == (
        [0.001, 0.01],
        [3, 4],
        32,
    )
    assert len(results["runs"]) == 12
    # What was written says as much as what was measured.
    assert results["rows"] == summary(results["runs"])
    head, *lines = out.splitlines()[-4:]
    assert head.split()[:3] == ["model", "parameters", "runs"]
    for name, row, line in zip(names, results["rows"], lines, strict=True):
        cells = line.split()
        assert (row["model"], row["n_runs"], row["seeds"]) == (name, 4, [3, 4])
        assert cells[:4] == [name, f"{row['n_params']:,}", "4", f"{row['lr']:g}"]
        assert cells[4] == "3" and f"{row['valid_loss']:.4f}" in cells
        runs_of_it = [r for r in results["runs"] if (r["model"], r["lr"]) == (name, row["lr"])]
        mean = sum(r["curve"][-1]["valid_loss"] for r in runs_of_it) / 2
        assert row["valid_loss"] == pytest.approx(mean)
        assert len(line) == len(head)
    gpt, averaged, wavelet_lm = (run["config"] for run in results["runs"][::2][:3])
    assert (gpt["wavelet_fraction"], averaged["wavelet_fraction"]) == (0.5, 0.25)
    assert (averaged["wavelet_module"], wavelet_lm["layers"]) == ("ema", 1)
    assert {run["steps"] for run in results["runs"]} == {3}


def test_ctrl_c_keeps_what_is_finished(command, monkeypatch, capsys):
    train_one = comparison.train_one

    def interrupted(config, *rest):
        if config.model == "wavelet_lm":
            raise Interrupted(signal.SIGTERM, "go on with --resume of a folder that is gone")
        return train_one(config, *rest)

    monkeypatch.setattr(comparison, "train_one", interrupted)
    message = "stopped; 1 of 2 runs are finished and kept in .*results.json"
    with pytest.raises(Interrupted, match=message) as stop:
        command("--models", "gpt,wavelet_lm")
    assert stop.value.signum == signal.SIGTERM
    assert [row["model"] for row in command.results["rows"]] == ["gpt"]
    assert command.results["budget"] is None and command.results["runs"][0]["steps"] == 4
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "gpt"


def test_a_model_that_diverges_is_a_line_of_dashes(command):
    options = ["--lrs", "1e9", "--grad_clip", "0", "--min_lr", "0", "--warmup_fraction", "0"]
    out, results = command("--models", "gpt,wavelet_gpt:haar", *options)
    assert all("diverged" in row for row in results["rows"])
    assert [line.split()[-6] for line in out.splitlines()[-2:]] == ["diverged"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "which models? give --models MODEL"),
        ("--models gpt,wavlet", "model is wavlet; it must be"),
        ("--models gpt,wavelet_gpt:harr", "wavelet_gpt:harr: wavelet_module is 'harr'"),
        ("--models gpt --budget 2000", "budget is '2000'"),
        ("--models gpt --budget flops:10", "less than one step"),
        ("--models gpt --budget steps:5 --max_steps 7", "--budget decides max_steps"),
        ("--models gpt --model gpt", "--models decides model; drop --model"),
        ("--models gpt --lrs 0.1 --lr 0.2", "--lrs decides lr"),
        ("--models gpt --lrs 0.1,x", "--lr is 'x'; it must be a number"),
        ("--models gpt --lrs 0.1,0", "--lrs: lr is 0; it must be > 0"),
        ("--models gpt --lrs 0.1,.1", "--lrs lists .1 twice"),
        ("--models gpt --lrs 1e-5", "gpt: min_lr (0.0002) is above lr"),
        ("--models gpt --seeds 1,1.5", "--seed is '1.5'"),
        ("--models gpt --layer 2", "unknown option --layer; did you mean --layers"),
        ("--models gpt --heads 3", "gpt: heads is 3"),
        ("--models gpt --init_from logs", "start from random weights"),
        ("--models gpt --dataset nowhere.txt", "does not exist"),
        ("--models gpt --plot curves.txt", "must end in .png, .svg or .pdf"),
        ("--models gpt --plot nowhere/curves.png", "there is no folder nowhere"),
        ("--models gpt --config nowhere.json", "nowhere.json: there is no such file; presets are"),
    ],
)
def test_mistakes_are_one_line_before_any_training(arguments, words, command, monkeypatch):
    monkeypatch.setattr(comparison, "train_one", lambda *_: pytest.fail("trains"))
    with pytest.raises(UserError) as error:
        command(*arguments.split())
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert command.results is None
