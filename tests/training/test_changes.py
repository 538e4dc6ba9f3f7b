"""A run that is resumed with flags: longer, at another rate, watched otherwise."""

import json
import signal

import pytest
import torch

from tests.training import runs
from tests.training.test_resume import before_step, found, killed_run, whole_run
from wavelet_lm.config import Config, ConfigError
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.models.checkpoint import Checkpoint, load_own_model, save_checkpoint
from wavelet_lm.training import changes
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.run import resume
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.schedule import learning_rate

# One rate from the first step to the last, whatever the length.
FLAT = {"warmup_fraction": 0, "min_lr": 0.01}


def rows(run, event):
    return [row for row in RunFolder(run).metrics() if row["event"] == event]


@pytest.fixture
def done(tmp_path):
    """A run of 20 steps that is finished."""
    return whole_run(tmp_path, max_steps=20)


def test_a_finished_run_goes_on_as_one_that_was_longer_from_the_start(tmp_path):
    """With a rate that does not depend on the length, bit for bit."""
    folders = [tmp_path / "long", tmp_path / "short"]
    for folder in folders:
        folder.mkdir()
    long = whole_run(folders[0], **FLAT, max_steps=40)
    short = whole_run(folders[1], **FLAT, max_steps=20)
    resume(short, {"max_steps": 40})
    assert runs.figures(short) == runs.figures(long)
    a, b = (Checkpoint(run / "last.safetensors") for run in (long, short))
    assert a.names == b.names
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.names)
    assert [row["step"] for row in rows(short, "test")] == [20, 40]
    assert [row["step"] for row in rows(short, "end")] == [20, 40]
    table = (folders[1] / "runs.md").read_text(encoding="utf-8")
    assert table.count(short.name) == 2
    assert ", 40 steps |" in table


def test_the_rate_is_that_of_the_schedule_of_the_new_length(done):
    resume(done, {"max_steps": 30, "lr": 0.02, "min_lr": 0.001})
    config = Config.from_json(done / "config.json")
    assert (config.max_steps, config.lr, config.min_lr) == (30, 0.02, 0.001)
    rates = {row["step"]: row["lr"] for row in rows(done, "train")}
    old = config.replace(lr=0.01, min_lr=2e-4)
    assert rates[20] == learning_rate(old, 19, 20) == pytest.approx(2e-4)
    for step in range(20, 30):
        assert rates[step + 1] == learning_rate(config, step, 30)
    assert rates[30] == pytest.approx(0.001)


def test_config_and_log_say_from_which_step_on_what_changed(done):
    resume(done, {"max_steps": 30})
    resume(done, {"max_steps": 32, "log_interval": 2})
    values = json.loads((done / "config.json").read_text(encoding="utf-8"))
    assert values["max_steps"] == 32
    assert values["changes"] == [
        {"step": 20, "max_steps": [20, 30]},
        {"step": 30, "max_steps": [30, 32], "log_interval": [1, 2]},
    ]
    log = (done / "log.txt").read_text(encoding="utf-8")
    assert "from step 20 on: max_steps 30 (was 20)\n" in log
    assert "from step 30 on: max_steps 32 (was 30), log_interval 2 (was 1)\n" in log
    # Its config.json still is the config of any other run, and the record no option.
    assert Config.from_dict(values).max_steps == 32
    assert "changes" not in Config.from_dict(values).to_dict()
    with pytest.raises(ConfigError, match="unknown key 'change'"):
        Config.from_dict({"change": 1})


def test_a_stopped_run_ends_earlier_but_not_before_its_step(tmp_path, monkeypatch):
    run = killed_run(tmp_path, monkeypatch)  # saved at step 20 of 40
    with pytest.raises(UserError, match="19 steps are asked for and step 20 is reached already"):
        resume(run, {"max_steps": 19})
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["max_steps"] == 40
    resume(run, {"max_steps": 20})
    assert [row["step"] for row in rows(run, "end")] == [20]
    with pytest.raises(UserError, match="finished at step 20; --max_steps N with N above 20"):
        resume(run, {"max_steps": 20})
    for flags in ({}, {"lr": 0.1}, {"runs_file": None}):
        with pytest.raises(UserError, match="this run is finished"):
            resume(run, flags)


def test_epochs_take_the_place_of_max_steps(done):
    per_epoch = Checkpoint(done / "last.safetensors").metadata["train_tokens"] // (2 * 16)
    resume(done, {"epochs": 24 / per_epoch})
    assert rows(done, "end")[-1]["step"] == 24
    assert Config.from_json(done / "config.json").max_steps is None


def test_a_run_that_is_stopped_after_a_change_keeps_it(tmp_path, monkeypatch, done):
    """Stopped at its first step, killed at another, and resumed without any flag."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 21 of 40"):
        before_step(patch, 20, lambda trainer: signal.raise_signal(signal.SIGINT))
        resume(done, {"max_steps": 40, "lr": 0.02})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        before_step(patch, 25, lambda trainer: 1 / 0)
        resume(done)
    before = (done / "config.json").read_bytes()
    resume(done)
    assert (done / "config.json").read_bytes() == before
    rates = [row["lr"] for row in rows(done, "train")]
    config = Config.from_json(done / "config.json")
    assert rates[20:] == [learning_rate(config, s, 40) for s in range(20, 40)]


def test_a_kill_between_checkpoint_and_config_is_mended_by_the_flag(done, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RunFolder, "write_config", lambda *arguments: 1 / 0)
        resume(done, {"max_steps": 22})
    with pytest.raises(UserError, match=r"max_steps is 20 .* of 22; give --max_steps to --resume"):
        resume(done)
    resume(done, {"max_steps": 22})
    assert rows(done, "end")[-1]["step"] == 22


def test_other_validation_windows_measure_the_best_anew(tmp_path, monkeypatch):
    """Losses on other windows do not compete: best is kept with its loss on the new ones."""
    run = killed_run(tmp_path, monkeypatch)
    best = Checkpoint(run / "best.safetensors").metadata
    seen = []
    restored = Trainer._restore_best

    def spy(trainer, revalidate):
        restored(trainer, revalidate)
        done, n_passes = trainer.progress, len(trainer.task.validation)
        seen.append((revalidate, done.best_step, done.best_loss, n_passes))

    monkeypatch.setattr(Trainer, "_restore_best", spy)
    resume(run, {"eval_batches": 5, "max_steps": 21})
    ((revalidate, step, loss, n_passes),) = seen
    assert (revalidate, step, n_passes) == (True, best["step"], 5)
    assert loss != best["val_loss"]
    assert "validation reads other windows than before" in (run / "log.txt").read_text("utf-8")
    assert Checkpoint(run / "best.safetensors").metadata["val_loss"] <= loss
    assert load_own_model(run).config.eval_batches == 5


def test_best_of_an_abandoned_future_is_the_one_to_beat(tmp_path, monkeypatch):
    """Killed after a better `best` than the last checkpoint knows, and then changed."""
    run = killed_run(tmp_path, monkeypatch, step=22, save_interval=15)
    assert Checkpoint(run / "best.safetensors").metadata["step"] == 20
    monkeypatch.setattr(Trainer, "validate", found(lambda step: 100.0))
    resume(run, {"max_steps": 16})
    assert Checkpoint(run / "best.safetensors").metadata["step"] == 20
    assert Checkpoint(run / "last.safetensors").metadata["best_step"] == 20


def test_data_that_moved_are_named_by_a_flag(done, tmp_path):
    (tmp_path / "words.txt").rename(tmp_path / "elsewhere.txt")
    places = {"dataset": str(tmp_path / "elsewhere.txt"), "runs_file": str(tmp_path / "new.md")}
    resume(done, {"max_steps": 22, **places})
    assert rows(done, "end")[-1]["step"] == 22
    assert (tmp_path / "new.md").is_file()


@pytest.mark.parametrize(
    "key",
    ["C", "seed", "optimizer", "micro_batch_size", "data_order", "init_from", "config"],
)
def test_what_would_make_another_run_is_refused(done, key):
    before = {file: file.read_bytes() for file in done.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=rf"does not take --{key}, .*--init_from {done}"):
        resume(done, {key: "1", "max_steps": 40})
    with pytest.raises(ConfigError, match=r"--resume: .*min_lr"):
        resume(done, {"max_steps": 40, "min_lr": -1.0})
    assert {file: file.read_bytes() for file in done.iterdir() if file.is_file()} == before


def test_every_allowed_flag_is_none_of_the_network_or_the_data():
    from wavelet_lm.config import FIELDS, ModelConfig

    network = {spec.name for spec in ModelConfig.__dataclass_fields__.values()}
    recomputed = {"gradient_checkpointing"}  # of the network, but computes the same
    assert network & set(changes.FLAGS) == recomputed
    assert set(changes.FLAGS) <= {*FIELDS, "threads"}


def test_a_checkpoint_of_before_the_whole_batch_resumes(tmp_path, monkeypatch):
    """Its carry is that of a micro-batch, and neither windows nor data keys are in it."""
    run = killed_run(tmp_path, monkeypatch, data_order="sequential", grad_accum=2)
    last = Checkpoint(run / "last.safetensors")
    metadata = {k: v for k, v in last.metadata.items() if k not in ("eval_windows", "data")}
    extra = last.extra()
    extra["carry"] = extra["carry"][:2]
    model = load_own_model(run / "last.safetensors")
    save_checkpoint(run / "last.safetensors", model, metadata, extra)
    resume(run)
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert "the steps up to 20 drew their windows by micro-batch" in log
    assert "validation reads other windows than before" in log
    assert rows(run, "end")[-1]["step"] == 40
    assert "changes" not in json.loads((run / "config.json").read_text(encoding="utf-8"))
