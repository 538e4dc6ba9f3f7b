"""A run that was stopped, however rudely, and resumed is the run that was never stopped."""

import json
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.training import runs
from wavelet_lm.data import batches
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.training import stop_signals
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.run import resume, train
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.task import Validation


class Killed(BaseException):
    """What ends a run at once: nothing in the program expects it."""


def before_step(monkeypatch, step, action):
    """Call `action(trainer)` in place of the update number `step` (from 0), and then go on."""
    update = Trainer._update

    def patched(trainer):
        if trainer.progress.step == step:
            action(trainer)
        update(trainer)

    monkeypatch.setattr(Trainer, "_update", patched)


def found(loss_of):
    """A validation that finds this loss of a step."""

    def validate(trainer):
        loss = loss_of(trainer.progress.step)
        return Validation(loss, {"val_loss": loss, "bits_per_byte": None}, [])

    return validate


def kill(trainer):
    raise Killed


def killed_run(folder, monkeypatch, step=27, **overrides):
    """The folder of a run that died before its update number `step`."""
    config = runs.run_config(folder, **overrides)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, step, kill)
        train(config)
    return runs.only_run(folder)


def whole_run(folder, **overrides):
    return train(runs.run_config(folder, **overrides)).path


@pytest.fixture
def folders(tmp_path):
    a, b = tmp_path / "whole", tmp_path / "killed"
    a.mkdir()
    b.mkdir()
    return a, b


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run that was never stopped, to be looked at only."""
    return whole_run(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer": "Adagrad", "grad_accum": 2},
        {"optimizer": "AdamW", "optimizer_eps": 1e-8, "amp_dtype": "bf16"},
        {"optimizer": "Muon", "optimizer_eps": 1e-8, "tie_embedding_to_lm_head": True},
        {"data_order": "sequential", "grad_accum": 2, "shared_lifting_weights": False},
        {"data_order": "sequential", "grad_accum": 2, "carry_state": True, "delta_memory": True},
        {"optimizer": "Adagrad8bit", "C": 64, "max_steps": 30, "save_interval": 5},
        {"optimizer": "AdamW8bit", "C": 64, "max_steps": 30, "optimizer_eps": 1e-8},
    ],
    ids=lambda overrides: overrides.get("optimizer", "sequential"),
)
def test_resuming_a_killed_run_is_bit_identical(folders, monkeypatch, overrides):
    if "8bit" in overrides.get("optimizer", ""):
        pytest.importorskip("bitsandbytes")
    whole = whole_run(folders[0], **overrides)
    killed = killed_run(folders[1], monkeypatch, **overrides)
    assert runs.figures(killed) != runs.figures(whole)
    resume(killed)
    runs.assert_same_run(whole, killed)


def test_every_part_of_the_saved_state_matters(folders, monkeypatch):
    """Without the carry, the generator or the optimizer's state the rest comes out otherwise."""
    overrides = {"data_order": "sequential", "max_steps": 24}
    whole = whole_run(folders[0], **overrides)
    killed = killed_run(folders[1], monkeypatch, step=23, **overrides)
    kept = {file: file.read_bytes() for file in killed.iterdir() if file.is_file()}
    real = Checkpoint.extra
    for part in ("carry", "generator/cpu", "optimizer/"):

        def forgetful(checkpoint, part=part):
            fresh = {"generator/cpu": torch.get_rng_state()}
            return {
                name: fresh.get(name, torch.zeros_like(t)) if name.startswith(part) else t
                for name, t in real(checkpoint).items()
            }

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "extra", forgetful)
            resume(killed)
        assert runs.figures(killed) != runs.figures(whole), part
        for file, content in kept.items():
            file.write_bytes(content)
    resume(killed)
    runs.assert_same_run(whole, killed)


def test_what_a_kill_leaves_behind_does_not_disturb(tmp_path, plain_run, monkeypatch):
    killed = killed_run(tmp_path, monkeypatch)
    for name in (".last.safetensors.4711.tmp", ".tmpAbCdEf", ".best.safetensors.4711.tmp"):
        (killed / name).write_bytes(b"half a checkpoint")
    with (killed / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"event": "train", "step": 28, "lo')
    resume(killed)
    runs.assert_same_run(plain_run, killed)
    assert not [file.name for file in killed.iterdir() if file.name.startswith(".")]
    for line in (killed / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)


@pytest.mark.parametrize("step", [10, 13, 20, 40])
def test_a_stop_where_an_evaluation_is_due_and_then_a_kill(tmp_path, plain_run, monkeypatch, step):
    """Saved before the evaluation of its step, resumed, evaluated, killed, resumed again."""
    config = runs.run_config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"at step {step} of 40"):
        before_step(patch, step - 1, lambda trainer: signal.raise_signal(signal.SIGINT))
        train(config)
    run = runs.only_run(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        # The checkpoint that follows the evaluation, or the sample that follows the last one.
        unreached = "loop.Trainer.save" if step < 40 else "conclusion._write_sample"
        patch.setattr(f"wavelet_lm.training.{unreached}", kill)
        resume(run)
    resume(run)
    runs.assert_same_run(plain_run, run)
    events = [row["event"] for row in RunFolder(run).metrics()]
    assert events.count("test") == events.count("end") == 1
    table = (tmp_path / "runs.md").read_text(encoding="utf-8")
    assert table.count(run.name) == 1


def test_best_of_a_killed_run_is_written_again(folders, monkeypatch):
    """The kill comes after a better `best` than the checkpoint knows of."""
    whole = whole_run(folders[0], save_interval=15)
    killed = killed_run(folders[1], monkeypatch, step=22, save_interval=15)
    assert Checkpoint(killed / "best.safetensors").metadata["step"] == 20
    assert Checkpoint(killed / "last.safetensors").metadata["step"] == 15
    resume(killed)
    runs.assert_same_run(whole, killed)


def test_a_resumed_run_knows_its_best_loss(tmp_path, monkeypatch):
    """Validation losses that only rise: the best checkpoint is one of before the kill."""
    monkeypatch.setattr(Trainer, "validate", found(lambda step: 1 + step / 100))
    run = killed_run(tmp_path, monkeypatch)
    resume(run)
    assert Checkpoint(run / "best.safetensors").metadata == {"step": 10, "val_loss": 1.1}


def test_real_processes_kill_terminate_and_interrupt(folders, monkeypatch):
    """kill -9, SIGTERM, SIGHUP, Ctrl-C, each resumed; against one run that reached the step."""
    overrides = {"max_steps": 1_000_000, "warmup_fraction": 0.00001, "skip_warmup_saves": False}
    process = runs.command("--config", runs.config_file(folders[1], **overrides))
    wait_for_step(process, 20)  # whose evaluation comes after the checkpoint of step 10
    process.kill()
    process.communicate()
    run = runs.only_run(folders[1])
    stops = ((signal.SIGTERM, 143, 30), (signal.SIGHUP, 129, 40), (signal.SIGINT, 130, 50))
    for signum, status, step in stops:
        process = runs.command("--resume", run)
        wait_for_step(process, step)
        process.send_signal(signum)
        _, errors = process.communicate()
        assert process.returncode == status
        assert errors.count("\n") == 1
        assert f"go on with: python train.py --resume {run}" in errors
    last = Checkpoint(run / "last.safetensors").metadata["step"]
    assert f"saved at step {last} of 1000000" in errors

    before_step(monkeypatch, last - 1, lambda trainer: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        train(runs.run_config(folders[0], **overrides))
    runs.assert_same_run(runs.only_run(folders[0]), run)
    losses = [row["step"] for row in runs.figures(run) if row["event"] == "train"]
    assert losses == list(range(1, last + 1))


def wait_for_step(process, step):
    """Read the output up to the evaluation of a step at or after this one."""
    for line in process.stdout:
        words = line.split()
        if words[:1] == ["step"] and int(words[1].split("/")[0]) >= step:
            return
    raise AssertionError(process.stderr.read())


def test_ctrl_c_after_the_last_step_tells_how_to_evaluate(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="evaluate it with:"):
        patch.setattr("wavelet_lm.training.conclusion.evaluate_run", interrupted)
        train(runs.run_config(tmp_path))
    run = resume(runs.only_run(tmp_path))
    assert [row["event"] for row in run.metrics()][-3:] == ["test", "sample", "end"]


@pytest.mark.parametrize("during", ["validate", "save"])
def test_ctrl_c_in_the_last_evaluation_or_save_stops(tmp_path, monkeypatch, during):
    real = getattr(Trainer, during)

    def patched(trainer):
        if trainer.progress.step == trainer.progress.total_steps:
            signal.raise_signal(signal.SIGTERM)
        return real(trainer)

    config = runs.run_config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="at step 40 of 40"):
        patch.setattr(Trainer, during, patched)
        train(config)
    resume(runs.only_run(tmp_path))


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_is_signalled_twice_is_one(tmp_path, monkeypatch, second):
    """As `timeout`, service managers and terminals that close do it."""

    def twice(trainer):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(second)

    before_step(monkeypatch, 25, twice)
    with pytest.raises(Interrupted, match="stopped and saved at step 26") as stop:
        train(runs.run_config(tmp_path))
    assert stop.value.signum == signal.SIGTERM


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def twice(trainer):
        signal.raise_signal(signal.SIGINT)
        later = time.monotonic() + 60
        monkeypatch.setattr(stop_signals.time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGINT)

    before_step(monkeypatch, 25, twice)
    with pytest.raises(Interrupted, match="without saving"):
        train(runs.run_config(tmp_path))
    assert Checkpoint(runs.only_run(tmp_path) / "last.safetensors").metadata["step"] == 20


def test_signal_handlers_are_given_back(tmp_path):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(s) for s in signals]
    whole_run(tmp_path, max_steps=2)
    assert [signal.getsignal(s) for s in signals] == before


def test_a_hang_up_that_nohup_ignores_does_not_stop(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_step(monkeypatch, 3, lambda trainer: signal.raise_signal(signal.SIGHUP))
        run = train(runs.run_config(tmp_path, max_steps=6))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.metrics()[-1]["event"] == "end"


# --- what cannot be resumed ----------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    return killed_run(tmp_path, monkeypatch)


def test_data_that_changed_are_refused(stopped, tmp_path):
    (tmp_path / "words.txt").write_text(runs.some_text(700), encoding="utf-8")
    with pytest.raises(UserError, match="the data changed"):
        resume(stopped)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_other_data_of_the_same_length_are_refused(tmp_path, monkeypatch, split):
    folder = tmp_path / "text"
    folder.mkdir()
    for seed, name in enumerate(("train", "valid", "test")):
        text = runs.some_text(300, seed=seed)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    run = killed_run(tmp_path, monkeypatch, dataset=str(folder))
    file = folder / f"{split}.txt"
    text = file.read_text(encoding="utf-8")
    file.write_text(text[::-1], encoding="utf-8")
    with pytest.raises(UserError, match=f"the data changed: the {split} split"):
        resume(run)
    file.write_text(text, encoding="utf-8")
    assert resume(run).metrics()[-1]["event"] == "end"


def test_an_edited_config_is_refused_by_key(stopped):
    file = stopped / "config.json"
    text = file.read_text(encoding="utf-8")
    for key, old, new in (("C", "16", "32"), ("optimizer", '"Adagrad"', '"AdamW"'), ("lr",) * 3):
        if key == "lr":
            old, new = "0.01", "0.02"
        edited = text.replace(f'"{key}": {old}', f'"{key}": {new}')
        assert edited != text
        file.write_text(edited, encoding="utf-8")
        with pytest.raises(UserError, match=f"config.json: {key} is") as caught:
            resume(stopped)
        assert ("give --lr to --resume" in str(caught.value)) == (key == "lr")


def test_places_may_be_edited(stopped, tmp_path):
    (tmp_path / "words.txt").rename(tmp_path / "elsewhere.txt")
    file = stopped / "config.json"
    text = file.read_text(encoding="utf-8").replace("words.txt", "elsewhere.txt")
    file.write_text(text, encoding="utf-8")
    assert resume(stopped).metrics()[-1]["event"] == "end"


def test_a_damaged_saved_state_is_refused_in_one_line(stopped):
    last = stopped / "last.safetensors"
    before, metadata, tensors = last.read_bytes(), Checkpoint(last).metadata, runs.tensors(last)
    with safe_open(str(last), framework="pt") as file:
        header = file.metadata()

    def refusal(tensors, **changes):
        text = json.dumps({**metadata, **changes})
        save_file(tensors, last, metadata={**header, "metadata": text})
        with pytest.raises(UserError, match="its header is damaged") as caught:
            resume(stopped)
        last.write_bytes(before)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for key in ("step", "total_steps", "best_step", "optimizer", "seconds", "best_loss"):
        for value in ("7", [], True):
            assert f"the {key} in its metadata is {value!r}" in refusal(tensors, **{key: value})
    without = {name: t for name, t in tensors.items() if name != "training/generator/cpu"}
    assert "do not fit" in refusal(without)
    assert "do not fit" in refusal(tensors, optimizer={"0/nothing/step": 1})
    assert "do not fit" in refusal({**tensors, "training/optimizer/0": torch.ones(1)})


def test_weights_alone_are_refused(stopped):
    (stopped / "best.safetensors").replace(stopped / "last.safetensors")
    with pytest.raises(UserError, match="holds weights only"):
        resume(stopped)


def test_a_run_without_a_checkpoint_or_finished_is_refused(tmp_path, monkeypatch):
    early = killed_run(tmp_path, monkeypatch, step=5)
    with pytest.raises(UserError, match="stopped before its first checkpoint"):
        resume(early)
    done = tmp_path / "done"
    done.mkdir()
    with pytest.raises(UserError, match="this run is finished"):
        resume(whole_run(done, max_steps=2))
    with pytest.raises(UserError, match="not a run folder"):
        resume(tmp_path)


def test_batches_need_no_state(tmp_path):
    """What makes resuming possible without saving a data position."""
    tokens = torch.arange(500).numpy()
    for order in ("random", "sequential"):
        config = runs.run_config(tmp_path, data_order=order)
        a, b = (batches.training_batches(config, tokens) for _ in range(2))
        for i in range(7):
            a[i]
        assert torch.equal(a[7][0], b[7][0])
