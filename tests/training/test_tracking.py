"""A run that is watched: what trackers are told is what it wrote, and it computes the same."""

import json
import math
import struct

import pytest
import torch

from tests.training import runs
from tests.training.test_optimizers import make
from wavelet_lm.errors import UserError
from wavelet_lm.training import report, tracking
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.run import resume, train
from wavelet_lm.training.run_folder import RunFolder, SilentRunFolder
from wavelet_lm.training.tracking import TRACKERS, Tracker, check_tracker, scalars, tracked
from wavelet_lm.training.weights import Weights

SHORT = {"max_steps": 6, "eval_interval": 3, "save_interval": 3, "sample_interval": 2}


def trained(folder, **overrides):
    folder.mkdir(exist_ok=True)
    return train(runs.run_config(folder, **{**SHORT, **overrides}))


def told(run):
    """Every number that the lines of a run give a tracker, by name and step."""
    values = {}
    for row in run.metrics():
        for name, value in scalars(row).items():
            values.setdefault(name, {})[row["step"]] = value
    return values


def in_float32(values):
    return {step: torch.tensor(value).item() for step, value in values.items()}


def test_tensorboard_reads_what_the_run_wrote_and_nothing_else_is_changed(tmp_path, monkeypatch):
    """A run that was cut off and went on, without a terminal, with samples: bit for bit the same
    as one that nobody watched."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = trained(tmp_path / "plain", sample_interval=0)
    real, update = RunFolder.write_metrics, report.Report.trained

    def fails(run, **values):
        real(run, **values)
        if values["event"] == "train" and values["step"] == 5:
            raise RuntimeError("the power is cut")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_metrics", fails)
        with pytest.raises(RuntimeError, match="power"):
            trained(tmp_path / "watched", track="tensorboard")
    assert report.Report.trained is update
    run = resume(runs.only_run(tmp_path / "watched"))
    runs.assert_same_run(plain.path, run.path)

    read = EventAccumulator(str(run.path / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()
    expected = told(run)
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"} < set(expected)
    assert {"train/memory_bytes", "valid/loss", "valid/bits_per_byte"} < set(expected)
    assert {"scale weight/block 2/d1", "lag/block 1/d0"} < set(expected)
    assert "test/sliding/bits_per_byte" in expected
    assert set(read.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        found = [(event.step, event.value) for event in read.Scalars(name)]
        assert found == sorted(in_float32(values).items()), name
    samples = [row for row in run.metrics() if row["event"] == "sample"]
    assert [row["step"] for row in samples] == [2, 4, 6, 6]
    texts = read.Tensors("sample/text_summary")
    assert {event.step for event in texts} == {2, 4, 6}
    assert f"    {samples[-1]['prompt']}{samples[-1]['text']}" in str(
        texts[-1].tensor_proto.string_val[0], "utf-8"
    )


def records(file):
    """Those of wandb's own format, that of LevelDB's log with protocol buffers in it."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_keeps_the_run_on_this_machine(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run = trained(tmp_path, track="wandb")
    wandb.teardown()  # waits for its process, which writes on after a run has finished
    (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for record in records(file):
        values = {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in values.items():
            found.setdefault(name, {})[values.get("_step")] = value
    expected = told(run)
    assert expected.items() <= found.items()
    assert sorted(found["sample/path"]) == [2, 4, 6]
    assert f"wandb sync {file.parent}" in (run.path / "log.txt").read_text()


def test_trackio_keeps_the_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    import sqlite3

    run = trained(tmp_path, track="trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    found = {}
    for step, metrics in sqlite3.connect(file).execute("select step, metrics from metrics"):
        for name, value in json.loads(metrics).items():
            found.setdefault(name, {})[step] = value
    assert told(run).items() <= found.items()
    assert sorted(found["sample"]) == [2, 4, 6]


def test_a_tracker_that_fails_ends_the_tracking_and_not_the_run(tmp_path, monkeypatch):
    class Full(Tracker):
        def __init__(self, *_):
            self.steps = []

        def log(self, step, values):
            if step:
                raise OSError("the disk is full")

    monkeypatch.setitem(TRACKERS, "tensorboard", Full)
    run = RunFolder(tmp_path)
    config = runs.run_config(tmp_path, track="tensorboard")
    with tracked(config, run, 0):
        for step in range(4):
            run.write_metrics(event="train", step=step, loss=1.0)
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("tensorboard fails, and the run goes on without: OSError: the disk") == 1
    assert not run.listeners


def test_of_several_processes_the_first_one_tracks(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda *_: pytest.fail("a tracker was opened"))
    run = SilentRunFolder(tmp_path)
    with tracked(runs.run_config(tmp_path, track="tensorboard"), run, 0):
        run.write_metrics(event="train", step=1, loss=1.0)
    assert not list(tmp_path.glob("tensorboard"))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_missing_is_refused_before_the_run(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"track {name} needs {name}; install it with pip install"):
        train(runs.run_config(tmp_path, track=name))
    assert not (tmp_path / "logs").exists()
    check_tracker(runs.run_config(tmp_path))


def test_without_a_terminal_a_line_tells_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 0.0)
    run = trained(tmp_path, max_steps=3, sample_interval=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
    assert [line.split(" | ")[0] for line in lines] == ["step      2/3", "step      3/3"]
    parts = lines[-1].split(" | ")
    assert [part.split()[0] for part in parts[1:3]] == ["loss", "lr"]
    assert parts[3].endswith(" tokens/s")
    assert parts[4] == "0:00:00 left"
    assert " left" not in (run.path / "log.txt").read_text()


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_the_norm_is_that_of_the_gradients_before_clipping(clip):
    model, optimizer = make("AdamW")
    gradients = []
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
            gradients.append(p.grad.flatten().clone())
    precision = Precision(model.config.replace(track="tensorboard"), torch.device("cpu"))
    norm = precision.update(optimizer, Weights(model), clip)
    assert norm.item() == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-5)
    precision = Precision(model.config, torch.device("cpu"))
    found = precision.update(optimizer, Weights(model), clip)
    assert (found is None) == (clip == 0)  # nothing is computed that nobody asked for


def test_a_norm_that_overflowed_is_null(tmp_path):
    run = RunFolder(tmp_path)

    class Speaker(report.Report):
        def __init__(self):
            self.run = run
            self.config = runs.run_config(tmp_path)
            self.task = type("Task", (), {"unit": "tokens", "device": torch.device("cpu")})
            self.progress = type("Progress", (), {"seconds": 0.0, "total_steps": 9, "step": 1})

    Speaker().trained(1, 2.5, math.inf)
    Speaker().trained(2, 2.5, math.nan)
    first, second = run.metrics()
    assert first["grad_norm"] is None
    assert "grad_norm" not in second
