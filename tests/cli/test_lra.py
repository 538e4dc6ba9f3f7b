"""`python -m wavelet_lm.evaluation.lra` as it is typed."""

import json
import sys

import numpy as np
import pytest

from tests.data.tasks.test_pixels import images
from wavelet_lm.cli import lra
from wavelet_lm.errors import UserError


def flags(**options) -> list[str]:
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)]


SMALL = flags(layers=1, C=8, heads=2, levels=2, head_hidden=8, device="cpu", steps=3)
SHORT = flags(min_length=5, max_length=30, max_depth=3, max_args=4)
SIZES = flags(train_examples=40, valid_examples=12, test_examples=9)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command in this process; its output and the JSON that it wrote."""

    def run(*arguments):
        file = tmp_path / "results.json"
        fixed = ["--cache_dir", str(tmp_path / "cache"), "--json", str(file)]
        fixed += ["--out_dir", str(tmp_path / "logs")]
        monkeypatch.setattr(sys, "argv", ["lra", *SMALL, *fixed, *map(str, arguments)])
        lra.main()
        return capsys.readouterr().out, json.loads(file.read_text())

    return run


def test_models_are_compared_on_generated_listops(command, tmp_path):
    models = "gpt,wavelet_gpt:learnable,wavelet_lm"
    options = ["--task", "listops", *SHORT, *SIZES, "--wavelet_fraction", "0.25", "--seed", "5"]
    out, results = command("--model", models, *options)
    assert out.startswith("listops: 40 train, 12 valid, 9 test; 10 classes, 16 tokens, lengths ")
    rows = results["rows"]
    assert [row["model"] for row in rows] == models.split(",")
    assert [row["config"]["wavelet_fraction"] for row in rows] == [0.5, 0.25, 0.5]
    assert rows[1]["config"]["wavelet_module"] == "learnable"
    (folder,) = (tmp_path / "cache").iterdir()
    lines = (folder / "basic_test.tsv").read_text().splitlines()[1:]
    digits = np.array([int(line[-1]) for line in lines])
    for row, line in zip(rows, out.splitlines()[2:], strict=True):
        assert row["steps"] == row["best_step"] == 3
        assert row["config"]["block_size"] < 30
        assert row["test"]["examples"] == 9
        assert row["test"]["majority"] == pytest.approx(np.bincount(digits).max() / 9)
        assert line.split()[:3] == [row["model"], f"{row['n_params']:,}", "3"]
        assert f"{100 * row['test']['accuracy']:.2f}" in line
    # Generated once; and a file of it reads as --data.
    before = (folder / "basic_train.tsv").stat().st_mtime_ns
    again = command("--model", models, *options)[1]["rows"]
    assert (folder / "basic_train.tsv").stat().st_mtime_ns == before
    assert [row["curve"][0]["train_loss"] for row in again] == [
        row["curve"][0]["train_loss"] for row in rows
    ]
    read = command("--task", "listops", "--data", folder, "--test_examples", 5)[1]
    assert read["rows"][0]["test"]["examples"] == 5


def test_reviews_and_images(command, tmp_path):
    table = tmp_path / "reviews.tsv"
    rows = [f"{label}\t{'good' if label else 'bad'} film\n" for label in (0, 1) for _ in range(20)]
    table.write_text("label\ttext\n" + "".join(rows))
    reviews = ("--task", "text", "--data", table)
    out, results = command(*reviews, "--max_length", 7, "--pooling", "mean")
    assert out.startswith("text: 32 train, 4 valid, 4 test; 2 classes, 256 tokens, lengths 7 … 7")
    assert results["max_length"] == 7
    images(50).tofile(tmp_path / "data_batch_1.bin")
    images(20).tofile(tmp_path / "test_batch.bin")
    pictures = ("--task", "image", "--data", tmp_path, "--train_examples", 4)
    small = ("--valid_examples", 2, "--test_examples", 2, "--steps", 1, "--micro_batch_size", 2)
    out, results = command(*pictures, *small, "--pixels", "rgb")
    assert "lengths 3,072 … 3,072" in out
    assert results["rows"][0]["config"]["block_size"] == 3072


def test_a_config_file_lies_between_the_defaults_and_the_flags(command, tmp_path):
    file = tmp_path / "some.json"
    changes = {"lr": 0.5, "layers": 7, "model": "gpt", "max_steps": None, "epochs": 2}
    file.write_text(json.dumps({**changes, "micro_batch_size": 10}))
    options = ["--task", "listops", *SHORT, *SIZES, "--config", file]
    (row,) = command(*options, "--steps", "none")[1]["rows"]
    config = row["config"]
    assert (config["lr"], config["layers"], config["optimizer"]) == (0.5, 1, "AdamW")
    assert (row["model"], row["steps"]) == ("gpt", 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "--task listops or text or image"),
        ("--task image", "needs --data; download cifar-10-binary.tar.gz"),
        ("--task text", "needs --data; download aclImdb_v1.tar.gz"),
        ("--task text --data nowhere", "nowhere does not exist"),
        ("--task listops --data nowhere", "there is no basic_train.tsv"),
        ("--task listops --data nowhere --max_depth 3", "--max_depth shapes what is generated"),
        ("--task text --max_depth 3", "--max_depth is an option of the task listops"),
        ("--task listops --pixels rgb", "--pixels is an option of the task image"),
        ("--task listops --max_length 400", "max_length is 400"),
        ("--task listops --block_size 9", "block_size is the length of"),
        ("--task listops --model gtp", "model is gtp"),
        ("--task listops --model gpt+block_size=9", "block_size is the length of"),
        ("--task listops --model gpt:haar", "gpt has no moving averages"),
        ("--task listops --model gpt --wavelet_fraction 0.1", "no moving averages"),
        ("--task listops --train_examples 0", "is not 1 or more"),
        ("--task listops --steps 0", "max_steps is 0"),
        ("--task text --data nowhere --max_length 0", "max_length is 0"),
        ("--task listops --json nowhere/results.json", "there is no folder nowhere; make it"),
        ("--task listops --device tpu", "device is 'tpu'"),
    ],
)
def test_mistakes_are_one_line_before_any_work(arguments, words, command, tmp_path):
    with pytest.raises(UserError) as error:
        command(*arguments.split())
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["wavelet_gpt:haar", "wavelet_lm"])
def test_small_models_learn_short_listops(model, command):
    task = flags(task="listops", min_length=5, max_length=50, max_depth=4, max_args=5)
    sizes = flags(train_examples=20_000, valid_examples=1000, test_examples=1000)
    training = flags(steps=800, eval_interval=400, lr=0.002)
    network = flags(model=model, layers=3, C=32, levels=4, head_hidden=64)
    (row,) = command(*task, *sizes, *training, *network)[1]["rows"]
    for part in ("valid", "test"):
        assert row[part]["accuracy"] > row[part]["majority"] + 0.1
