"""The figures against slow ones, and `python -m wavelet_lm.evaluation.fsd50k` as it is typed."""

import json
import sys

import numpy as np
import pytest

from tests.data.tasks.test_fsd50k import make_data
from wavelet_lm.cli import fsd50k
from wavelet_lm.cli.fsd50k import average_precision, mean_average_precision, top_accuracy
from wavelet_lm.errors import UserError


def slow_average_precision(scores, labels):
    """The area under the steps of precision over recall, threshold by threshold."""
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        recall = sum(chosen) / sum(labels)
        area += (recall - recall_before) * sum(chosen) / len(chosen)
        recall_before = recall
    return area


def test_average_precision():
    assert average_precision(np.array([0.9, 0.8, 0.7, 0.1]), np.array([1, 0, 1, 0])) == (
        pytest.approx((1 + 2 / 3) / 2)
    )
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = generator.integers(1, 12)
        scores = generator.integers(0, 5, n) / 4  # with many equal ones
        labels = generator.integers(0, 2, n).astype(bool)
        labels[generator.integers(n)] = True
        expected = slow_average_precision(scores.tolist(), labels.tolist())
        assert average_precision(scores, labels) == pytest.approx(expected)


def test_means_over_classes_and_clips():
    scores = np.array([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4]])
    labels = np.array([[1, 0, 0], [1, 0, 1]], dtype=bool)
    assert mean_average_precision(scores, labels) == 1.0  # the class that no clip has is left out
    assert [top_accuracy(scores, labels, k) for k in (1, 2, 3)] == [0.5, 0.5, 1.0]


SMALL = {"layers": 1, "C": 16, "heads": 2, "head_hidden": 16, "levels": 2}
SMALL |= {"device": "cpu", "micro_batch_size": 2, "steps": 12, "eval_interval": 6, "lr": 0.01}


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    def run(*arguments):
        small = [str(word) for key, value in SMALL.items() for word in (f"--{key}", value)]
        places = ["--json", str(tmp_path / "x.json"), "--out_dir", str(tmp_path / "logs")]
        words = ["fsd50k", *small, *places, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        fsd50k.main()
        return capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())

    return run


def test_tones_are_told_apart(command, tmp_path):
    data = make_data(tmp_path / "data", n=4, rate=16000)
    models = "wavelet_gpt:haar,wavelet_lm"
    out, results = command("--data", data, "--model", models)
    assert out.startswith("fsd50k: 4 train clips (6 s), 4 valid clips (6 s), 4 test clips (6 s); 3")
    assert [row["model"] for row in results["rows"]] == models.split(",")
    for row in results["rows"]:
        assert row["test"]["mAP"] == 1.0
        assert row["config"]["block_size"] == 40
    assert results["prior"]["test"]["mAP"] == pytest.approx(0.5)
    assert results["prior"]["test"]["top5"] == 1.0
    assert out.splitlines()[-1].startswith("class frequencies ")


def test_a_config_file_may_name_the_model_and_epochs(command, tmp_path):
    data = make_data(tmp_path / "data", n=2, rate=16000)
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"model": "gpt", "max_steps": None, "epochs": 2, "lr": 0.5}))
    (row,) = command("--data", data, "--config", file, "--steps", "none")[1]["rows"]
    assert (row["model"], row["config"]["model"], row["config"]["lr"]) == ("gpt", "gpt", 0.01)
    assert row["steps"] == row["curve"][-1]["step"] == 3  # twice 3 pieces, in batches of 2


def test_mistakes_are_one_line(command, tmp_path):
    for arguments, message in (
        ((), "--data is missing; FSD50K"),
        (("--data", tmp_path / "no"), "there is no folder FSD50K.ground_truth"),
        (("--data", tmp_path, "--block_size", 50), "block_size is the length of"),
        (("--data", tmp_path, "--model", "gpt:haar"), "gpt has no moving averages"),
        (("--data", tmp_path, "--json", tmp_path / "none" / "x.json"), "there is no folder"),
    ):
        with pytest.raises(UserError) as error:
            command(*arguments)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
