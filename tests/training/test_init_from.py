"""`init_from`: the weights of a run, for new data and another schedule."""

import json
from dataclasses import replace

import pytest

from tests.training import runs
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.training.run import train


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained run, in a folder of its own."""
    return train(runs.run_config(tmp_path_factory.mktemp("source"), max_steps=60)).path


def evaluations(run):
    return [row for row in runs.figures(run) if row["event"] == "eval"]


@pytest.mark.parametrize("name", [".", "last.safetensors"])
def test_the_first_validation_loss_is_the_last_of_the_source(source, tmp_path, name):
    config = replace(Config.from_json(source / "config.json"), init_from=str(source / name))
    config = config.replace(out_dir=str(tmp_path), runs_file="", max_steps=3, lr=0.02)
    run = train(config)
    rows = evaluations(source)
    best = min(rows[1:], key=lambda row: row["val_loss"])
    expected = best if name == "." else rows[-1]
    assert evaluations(run.path)[0]["val_loss"] == expected["val_loss"]
    assert evaluations(run.path)[0]["step"] == 0
    assert next(row["lr"] for row in runs.figures(run.path) if row["event"] == "train") == 0.02


def test_without_a_config_the_command_takes_that_of_the_run(source, tmp_path):
    """Here with other text of the same letters, as fine-tuning has it."""
    (tmp_path / "other.txt").write_text(runs.some_text(600, seed=9), encoding="utf-8")
    done = runs.finished(
        "--init_from", source, "--dataset", tmp_path / "other.txt", "--max_steps", 2,
        "--out_dir", tmp_path / "logs", "--runs_file", "",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    run = runs.only_run(tmp_path)
    old, new = (json.loads((r / "config.json").read_text(encoding="utf-8")) for r in (source, run))
    changed = {key for key in new if new[key] != old[key]}
    assert changed == {"dataset", "init_from", "max_steps", "out_dir", "runs_file"}
    assert evaluations(run)[0]["val_loss"] < 0.7 * evaluations(source)[0]["val_loss"]
    saved = (run / "tokenizer" / "tokenizer.json").read_bytes()
    assert saved == (source / "tokenizer" / "tokenizer.json").read_bytes()
    # The run can go on by itself: nothing of it refers to the source's optimizer or steps.
    assert Checkpoint(run / "last.safetensors").metadata["step"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tokenizer": "bytes"}, "was trained with char; leave tokenizer at auto"),
        ({"C": 8}, "a checkpoint of another config.*; without --init_from a new run begins"),
        ({"layers": 3}, "a checkpoint of another config: no blocks.2"),
        ({"tie_embedding_to_lm_head": True}, "unknown head.weight"),
        ({"init_from": "nowhere/at/all"}, "nowhere/at/all"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_fit(source, tmp_path, overrides, message):
    config = runs.run_config(tmp_path, **{"init_from": str(source), **overrides})
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (tmp_path / "logs").exists()


def test_text_that_the_alphabet_cannot_spell(source, tmp_path):
    (tmp_path / "words.txt").write_text("Ж" * 500, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        train(runs.run_config(tmp_path, init_from=str(source)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "logs").exists()
