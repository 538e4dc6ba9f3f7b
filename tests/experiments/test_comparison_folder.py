"""A comparison of classifiers that was stopped, however rudely, and resumed is the whole one."""

import json
import signal
import sys
from pathlib import Path

import pytest

from tests.training import runs
from tests.training.test_resume import Killed, before_step
from wavelet_lm.cli import fsd50k, lra
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.experiments.comparison_folder import FILE, ComparisonFolder
from wavelet_lm.models.checkpoint import load_own_model

MODELS = "gpt,wavelet_gpt:haar"
OPTIONS = {
    "task": "listops",
    "min_length": 5,
    "max_length": 30,
    "max_depth": 3,
    "max_args": 4,
    "train_examples": 40,
    "valid_examples": 12,
    "test_examples": 9,
    "model": MODELS,
    "layers": 1,
    "C": 8,
    "heads": 2,
    "levels": 2,
    "head_hidden": 8,
    "device": "cpu",
    "steps": 13,
    "eval_interval": 5,
    "save_interval": 4,
    "micro_batch_size": 3,
}


class Command:
    """`lra` as it is typed, with all that it writes in one folder."""

    def __init__(self, monkeypatch, folder: Path):
        self.monkeypatch, self.folder = monkeypatch, folder
        self.json = folder / "results.json"
        folder.mkdir()

    def type(self, *arguments, main=lra.main) -> None:
        self.monkeypatch.setattr(sys, "argv", ["lra", *map(str, arguments)])
        main()

    def begin(self, **changes) -> None:
        places = {"cache_dir": self.folder.parent / "cache", "out_dir": self.folder / "logs"}
        options = {**OPTIONS, **places, "json": self.json, **changes}
        self.type(*(word for key, value in options.items() for word in (f"--{key}", value)))

    @property
    def comparison(self) -> Path:
        (folder,) = (self.folder / "logs").iterdir()
        return folder

    def resume(self) -> None:
        self.type("--resume", self.comparison)

    def rows(self) -> list[dict]:
        """What was found, without times and places."""
        rows = json.loads(self.json.read_text())["rows"]
        for row in rows:
            del row["seconds"], row["config"]
            for point in row["curve"]:
                del point["seconds"]
        return rows


@pytest.fixture
def whole(monkeypatch, tmp_path):
    command = Command(monkeypatch, tmp_path / "whole")
    command.begin()
    return command


@pytest.fixture
def command(monkeypatch, tmp_path):
    return Command(monkeypatch, tmp_path / "stopped")


def in_model(title, action):
    """The action, in the steps of this model alone."""
    return lambda trainer: action(trainer) if trainer.run.title == title else None


def kill(*arguments):
    raise Killed


def assert_same(whole, command):
    assert command.rows() == whole.rows()
    for run in (path for path in whole.comparison.iterdir() if path.is_dir()):
        a, b = (runs.figures(c.comparison / run.name) for c in (whole, command))
        for row in a + b:
            row.pop("sequences_per_second", None)
        assert a == b
        for name in ("last.safetensors", "best.safetensors"):
            a, b = (runs.tensors(c.comparison / run.name / name) for c in (whole, command))
            assert a.keys() == b.keys()
            assert all(bool((a[key] == b[key]).all()) for key in a)


@pytest.mark.parametrize(
    ("model", "step"), [("gpt", 2), ("gpt", 10), ("wavelet_gpt:haar", 0), ("wavelet_gpt:haar", 9)]
)
def test_a_killed_comparison_goes_on_bit_for_bit(whole, command, monkeypatch, model, step):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, step, in_model(model, kill))
        command.begin()
    trained = []
    with monkeypatch.context() as patch:
        for i in range(13):
            before_step(patch, i, lambda trainer: trained.append(trainer.run.title))
        command.resume()
    assert_same(whole, command)
    # What is finished is not trained again, and what was saved is gone on with.
    first = 13 - step // 4 * 4
    n = [first, 13] if model == "gpt" else [0, first]
    assert [trained.count(name) for name in MODELS.split(",")] == n


def test_a_stop_says_how_to_go_on(whole, command, monkeypatch):
    def terminate(trainer):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        before_step(patch, 6, in_model("wavelet_gpt:haar", terminate))
        command.begin()
    resume = f"--resume {command.comparison}"
    said = "wavelet_gpt:haar: stopped and saved at step 7 of 13; go on with: python "
    assert str(stop.value).startswith(said)
    assert str(stop.value).endswith(resume)
    assert stop.value.signum == signal.SIGTERM
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(lra, "judge", lambda *arguments: signal.raise_signal(signal.SIGINT))
        command.resume()
    assert str(stop.value).startswith("wavelet_gpt:haar: stopped; go on with: python ")
    assert str(stop.value).endswith(resume)
    command.resume()
    assert_same(whole, command)


def test_a_finished_comparison_is_shown_again(whole, capsys):
    before, texts = whole.rows(), []
    for _ in range(2):
        whole.json.unlink()
        whole.resume()
        assert whole.rows() == before
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("listops: 40 train, 12 valid, 9 test;")


def test_a_diverged_model_is_named_in_one_line(command):
    with pytest.raises(UserError, match=r"^gpt: training diverged: the loss is nan at step") as no:
        command.begin(lr=1e30, min_lr=1e30, warmup_fraction=0, grad_clip=0, optimizer="Adagrad")
    assert "\n" not in str(no.value)


def test_no_folder_is_left_where_no_model_can_be_built(command, monkeypatch):
    def fail(*arguments, **options):
        raise UserError("no such model")

    monkeypatch.setattr(lra, "build_classifier", fail)
    with pytest.raises(UserError, match="gpt: no such model"):
        command.begin()
    assert not list((command.folder / "logs").iterdir())


def test_what_would_be_another_comparison_is_refused(command, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 9, kill)
        command.begin()
    folder = command.comparison

    def refusal(*arguments, main=lra.main):
        with pytest.raises(UserError) as error:
            command.type(*arguments, main=main)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "drop --lr" in refusal("--resume", folder, "--lr", 1)
    assert "drop --pooling" in refusal("--resume", folder, "--pooling", "mean")
    assert "of the command lra" in refusal("--resume", folder, main=fsd50k.main)
    assert "it has no comparison.json" in refusal("--resume", tmp_path)
    file = folder / "gpt" / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"lr": 0.001', '"lr": 0.002'))
    assert "lr was 0.002 when the run began and is 0.001 now" in refusal("--resume", folder)
    file.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(lra, "load_task", other_examples(lra.load_task))
        assert "the data changed: the train examples are not" in refusal("--resume", folder)
    (folder / FILE).write_text('{"kind": "lra", "arguments": "--task"}')
    assert "its arguments are no list of words" in refusal("--resume", folder)


def other_examples(load):
    """A label that is otherwise."""

    def loaded(*arguments):
        task = load(*arguments)
        task.train.labels[3] = (task.train.labels[3] + 1) % task.n_classes
        return task

    return loaded


def test_a_classifier_is_refused_where_texts_are_written(whole):
    with pytest.raises(UserError, match="the weights of a classifier") as error:
        load_own_model(whole.comparison / "gpt")
    assert "\n" not in str(error.value)


def test_every_name_of_a_model_has_a_folder_of_its_own(tmp_path):
    folder = ComparisonFolder(tmp_path, [])
    names = ["gpt", "gpt:haar", "gpt_haar", "gpt+layers=2", "a/b", "a%2Fb", "a b", "../x"]
    paths = {folder.run(name).path for name in names}
    assert len(paths) == len(names)
    assert all(path.parent == tmp_path for path in paths)
