"""`python -m wavelet_lm.evaluation.recall` as it is typed."""

import json
import signal
import sys

import pytest
import torch

from tests.cli.test_evaluate import make_run
from wavelet_lm.cli import recall
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.experiments import recall as experiment
from wavelet_lm.experiments.recall import summary

SMALL = "--layers 2 --C 16 --heads 2 --levels 2 --device cpu --steps 6 --batch 4 --examples 30"
SMALL += " --eval_interval 3 --eval_batches 2"
SHORT = "--task mqar --pairs 4 --keys 8 --values 8 --length 24"


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command in this process; its output and the JSON that it wrote."""
    monkeypatch.setattr(experiment, "forget_the_last_run", lambda: None)
    file = tmp_path / "results.json"

    def run(*arguments):
        words = [str(word) for part in arguments for word in str(part).split()]
        monkeypatch.setattr(sys, "argv", ["recall", *words, "--json", str(file)])
        try:
            recall.main()
        finally:
            run.results = json.loads(file.read_text()) if file.exists() else None
        return capsys.readouterr().out, run.results

    return run


def test_models_are_compared_with_several_seeds(command, tmp_path):
    pytest.importorskip("matplotlib")
    image = tmp_path / "recall.png"
    names = ["gpt", "wavelet_gpt:haar@0.25", "wavelet_lm+levels=3"]
    models = f"--model {','.join(names)} --seeds 3,4 --plot {image}"
    out, results = command(SHORT, SMALL, models)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "4 pairs of 8 keys and 8 values, 4 queries, length 24; 17 tokens, chance 12.50%" in out
    assert results["shape"] == {"values": 8, "length": 24, "pairs": 4, "keys": 8, "queries": 4}
    assert (results["task"], results["chance"], results["seeds"]) == ("mqar", 0.125, [3, 4])
    runs = results["runs"]
    assert [(run["model"], run["seed"]) for run in runs] == [
        (name, seed) for seed in (3, 4) for name in names
    ]
    for run in runs:
        assert [point["step"] for point in run["curve"]] == [3, 6]
        assert run["questions"] == sum(row["questions"] for row in run["by_distance"]) == 120
        total = sum(row["questions"] * row["accuracy"] for row in run["by_distance"])
        assert total / 120 == pytest.approx(run["accuracy"])
        assert run["streamed"] == pytest.approx(run["accuracy"], abs=0.01)
        assert run["largest_difference"] < 1e-3
        assert run["config"]["block_size"] == 24
    # What was written says as much as what was measured.
    assert results["rows"] == summary(runs)
    head, *lines = out.splitlines()[-4:]
    titles = "model parameters seeds steps seconds right % spread streamed % to 8 to 16 to 32"
    assert " ".join(head.split()) == titles
    for name, row, line in zip(names, results["rows"], lines, strict=True):
        own = [run["accuracy"] for run in runs if run["model"] == name]
        cells = line.split()
        assert cells[:4] == [name, f"{row['n_params']:,}", "2", "6"]
        assert cells[5] == f"{100 * sum(own) / 2:.2f}"
        assert cells[6] == f"{100 * abs(own[0] - own[1]):.2f}"


@pytest.mark.parametrize("task", ["copying --items 6 --length 30", "induction --length 30"])
def test_the_other_tasks_and_equal_seeds(task, command):
    first, again = (
        command(f"--task {task} --model gpt --seed 5", SMALL)[1]["runs"] for _ in range(2)
    )
    assert [run["seed"] for run in first] == [5]
    for key in ("curve", "by_distance", "nats"):
        assert first[0][key] == again[0][key]


def test_a_config_file_lies_between_the_defaults_and_the_flags(command, tmp_path):
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"lr": 0.5, "layers": 7, "model": "gpt", "dataset": "mine.txt"}))
    (run,) = command(SHORT, SMALL, "--config", file, "--lr 0.002")[1]["runs"]
    config = run["config"]
    assert (config["lr"], config["layers"], config["optimizer"]) == (0.002, 2, "AdamW")
    assert run["model"] == "gpt"


def test_a_run_that_diverges_is_a_row(command):
    out, results = command(SHORT, SMALL, "--model gpt,gpt+layers=1 --lr 1e30 --grad_clip 0")
    assert len(results["runs"]) == 2
    assert all("diverged" in row for row in results["rows"])
    cells = out.splitlines()[-1].split()
    assert cells == ["gpt+layers=1", "-", "1", "-", "-", "diverged", "-", "-"]


def test_an_interrupted_comparison_keeps_what_is_finished(command, monkeypatch, tmp_path):
    real, started = experiment._run, []

    def stopped(*arguments):
        started.append(arguments)
        if len(started) == 2:
            raise Interrupted(signal.SIGTERM, "stopped")
        return real(*arguments)

    monkeypatch.setattr(experiment, "_run", stopped)
    with pytest.raises(Interrupted, match=r"1 of 2 runs are finished and kept in .*json") as stop:
        command(SHORT, SMALL, "--model gpt,wavelet_lm")
    assert stop.value.signum == signal.SIGTERM
    assert len(command.results["rows"]) == 1


def test_a_needle_in_the_run_s_own_text_or_another(command, tmp_path):
    pytest.importorskip("matplotlib")
    run, image, other = make_run(tmp_path), tmp_path / "needle.svg", tmp_path / "other.txt"
    other.write_text("Here is a sentence of some length. And here stands another one! " * 20)
    needle = f"{run} --task needle --distances 60,64 --needles 3"
    out, results = command(needle, f"--dataset {other} --device cpu --plot {image}")
    assert image.read_text().startswith("<?xml")
    assert (results["dataset"], results["split"], results["block_size"]) == ("other", "all", 8)
    assert [row["distance"] for row in results["rows"]] == [60, 64]
    for row, line in zip(results["rows"], out.splitlines()[-2:], strict=True):
        # The run gives every byte the same probability.
        for reading in ("first", "again", "unseen"):
            assert row[reading]["nats"] == pytest.approx(torch.tensor(256.0).log().item())
            assert row[reading]["accuracy"] == row["window"] == 0
        cells = line.split()
        assert cells[:3] == [str(row["distance"]), "3", str(row["tokens"])]
        assert cells[3:7] == ["5.545", "5.545", "5.545", "+0.000"]
    with pytest.raises(UserError, match="no sentence of 16 to 60 tokens"):
        command(needle)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "which task? give --task mqar, copying, induction or needle"),
        ("--task mqr", "invalid choice: 'mqr'"),
        ("--task mqar --items 3", "--items is an option of copying, not of mqar; drop it"),
        ("--task induction --pairs 3", "--pairs is an option of mqar, not of induction"),
        ("--task mqar --distances 3", "--distances is an option of needle, not of mqar"),
        ("--task mqar --pairs 0", "'0' is not 1 or more"),
        ("--task mqar --pairs 65", "65 pairs need as many keys, and keys is 64"),
        ("--task mqar --length 40", "need 48 positions, and length is 40"),
        ("--task induction --length 5", "would come twice"),
        ("--task mqar --dataset some.txt", "are generated; drop --dataset"),
        ("--task mqar --block_size 9", "block_size is the length of"),
        ("--task mqar --seeds 1,1", "--seeds lists 1 twice"),
        ("--task mqar --seeds 1 --seed 2", "--seeds decides seed; drop --seed"),
        ("--task mqar --seeds one", "seed"),
        ("--task mqar --steps none", "give --steps"),
        ("--task mqar --steps 0", "max_steps is 0"),
        ("--task mqar --curriculum 9", "a curriculum of 9 begins too small: length is 0"),
        ("--task mqar --curriculum 0", "'0' is not 1 or more"),
        ("RUN --task needle --curriculum 1", "--curriculum is an option of mqar"),
        ("--task mqar --batch 0", "micro_batch_size is 0"),
        ("--task mqar --init_from RUN", "start from random weights; drop it"),
        ("--task mqar --model gtp", "model is gtp"),
        ("--task mqar --model gpt,gpt", "gpt is given twice"),
        ("--task mqar --device tpu", "device is 'tpu'"),
        ("--task mqar --config nowhere.json", "nowhere.json"),
        ("--task mqar --plot nowhere.gif", "must end in .png, .svg or .pdf"),
        ("--task mqar --plot nowhere/some.png", "there is no folder nowhere"),
        ("RUN --task mqar", "RUN: the task mqar trains models of its own; drop the run"),
        ("--task needle", "needs a trained run; give RUN first"),
        ("RUN --task needle --pairs 3", "--pairs is an option of mqar, not of needle"),
        ("RUN --task needle --model gpt", "reads the run as it is; drop --model"),
        ("RUN --task needle --seeds 1", "--seeds is an option of mqar and copying and induction"),
        ("RUN --task needle --distances 64,x", "--distances: 'x' is not 1 or more"),
        ("RUN --task needle --distances 64,64", "--distances lists a number twice"),
        ("RUN --task needle --needles 0", "'0' is not 1 or more"),
        ("nowhere --task needle", "nowhere"),
    ],
)
def test_mistakes_are_one_line_before_any_work(arguments, words, command, tmp_path):
    with pytest.raises(UserError) as error:
        command(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results.json").exists()


def test_a_run_that_cannot_be_asked(command, tmp_path):
    run = make_run(tmp_path, model="gpt", heads=2)
    with pytest.raises(UserError, match="reads 8 tokens at most, and --distances up to 64 need"):
        command(f"{run} --task needle --distances 64")
    with pytest.raises(UserError, match="a distance is 3; it must be 16 or more"):
        command(f"{run} --task needle --distances 3")


@pytest.mark.slow
def test_attention_begins_to_recall(command):
    """Values of the sequence are told from others soon, which one it is much later."""
    options = "--model gpt --C 64 --heads 4 --device cpu --steps 150 --examples 200"
    (row,) = command(f"{SHORT} {options}")[1]["rows"]
    assert row["accuracy"] > 0.25
