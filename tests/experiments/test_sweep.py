"""Sweeps: members are plain runs, failures are rows, mistakes train nothing."""

import itertools
import json
import signal

import pytest
import torch

from tests.training import runs
from wavelet_lm.config import Config, ConfigError
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.experiments import sweep as sweep_module
from wavelet_lm.experiments.sweep import read_grid, sweep, table
from wavelet_lm.training.run import train

SHORT = {"max_steps": 4, "eval_interval": 2, "micro_batch_size": 1}


def start(folder, members, **overrides):
    """Sweep over the small config; what was logged, and the table file."""
    base = runs.run_config(folder, **{**SHORT, **overrides}).to_dict()
    log = []
    try:
        sweep(members, lambda member: {**base, **member}, log=log.append)
    finally:
        (file,) = (folder / "logs").glob("sweep_*.md")
    return log, file.read_text(encoding="utf-8"), file


def rows(text):
    """The cells of a Markdown table by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(head, cells, strict=True)) for cells in body]


def test_a_member_is_the_run_of_the_plain_command(tmp_path):
    members = read_grid(["lr=0.001,0.02", "per_scale_mixer_widths=1,1,1;1,.5,.5"], None, {})
    assert len(members) == 4
    _, text, _ = start(tmp_path, members)
    results = rows(text)
    assert len(results) == 4
    assert [float(row["bits/byte"]) for row in results] == sorted(
        float(row["bits/byte"]) for row in results
    )
    assert text.startswith("# Sweep\n\n`python ")
    alone = tmp_path / "alone"
    alone.mkdir()
    for row in results:
        options = {
            "lr": float(row["lr"]),
            "per_scale_mixer_widths": tuple(map(float, row["per_scale_mixer_widths"].split(","))),
        }
        torch.manual_seed(3)  # what came before a run is nothing to it
        plain = train(runs.run_config(alone, **{**SHORT, **options})).path
        runs.assert_same_run(plain, tmp_path / "logs" / row["run"].rsplit("/", 1)[1])
        losses = {
            line["step"]: line["bits_per_byte"]
            for line in runs.figures(plain)
            if line["event"] == "eval"
        }
        assert row["bits/byte"] == f"{losses[int(row['best step'])]:.4f}"
    table_of_runs = (tmp_path / "runs.md").read_text(encoding="utf-8")
    assert all(row["run"].rsplit("/", 1)[1] in table_of_runs for row in results)


def test_failures_are_rows_and_the_sweep_goes_on(tmp_path, monkeypatch):
    def fragile(config, command):
        if config.seed == 5:
            raise RuntimeError("out | of luck")
        return train(config, command)

    monkeypatch.setattr(sweep_module, "train", fragile)
    members = [{"lr": 1e9}, {"levels": 3}, {"seed": 5}, {"lr": 0.01}]
    members = [{"lr": 0.01, "levels": 2, "seed": 1, **member} for member in members]
    _, text, file = start(tmp_path, members)
    good, *bad = rows(text)
    assert (good["lr"], good["result"]) == ("0.01", "done")
    diverged, contradicting, unlucky = (row["result"] for row in bad)
    assert "training diverged" in diverged
    assert "per_scale_mixer_widths has 3 entries but levels 3 makes 4" in contradicting
    trace = file.with_suffix(".log")
    assert unlucky == f"failed: RuntimeError, see {trace}"
    assert "RuntimeError: out | of luck" in trace.read_text(encoding="utf-8")
    assert "Traceback" in trace.read_text(encoding="utf-8")


def test_nothing_but_failures_is_an_error(tmp_path):
    with pytest.raises(UserError, match="all 2 runs of the sweep failed"):
        start(tmp_path, [{"levels": 3}, {"levels": 4}])


def test_ctrl_c_ends_the_sweep_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(config, command):
        if config.lr == 0.02:
            raise Interrupted(signal.SIGTERM, "stopped; go on with: python train.py --resume RUN")
        return train(config, command)

    monkeypatch.setattr(sweep_module, "train", interrupted)
    monkeypatch.setattr("sys.argv", ["train.py", "--set", "lr=0.01,0.02", "--seed", "7", "--set=x"])
    base = runs.run_config(tmp_path, **SHORT).to_dict()
    members = [{"lr": lr} for lr in (0.01, 0.02, 0.03, 0.04)]
    with pytest.raises(Interrupted, match="--resume RUN; 2 runs of the sweep are left") as stop:
        sweep(members, lambda member: {**base, **member})
    assert stop.value.signum == signal.SIGTERM
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("left to train")] == [
        "left to train: python train.py --seed 7 --lr 0.03",
        "left to train: python train.py --seed 7 --lr 0.04",
    ]
    (file,) = (tmp_path / "logs").glob("sweep_*.md")
    assert [row["result"] for row in rows(file.read_text())] == ["done", "stopped"]


def test_the_real_thing_is_stopped_in_a_run(tmp_path):
    file = runs.config_file(tmp_path, max_steps=10**6, eval_interval=10**6, save_interval=10**6)
    process = runs.command("--config", file, "--set", "lr=0.001,0.002")
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    run = next(path for path in (tmp_path / "logs").iterdir() if path.is_dir())
    assert f"--resume {run}; 1 runs of the sweep are left" in stderr
    assert "--lr 0.002" in stdout.splitlines()[-1]
    assert (run / "last.safetensors").is_file()
    command = json.loads((run / "environment.json").read_text())["command"]
    assert command == f"python train.py --config {file} --lr 0.001"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "lr"], "--set is 'lr'; it must be KEY=V1,V2"),
        (["--set", "layer=1,2"], "--set: unknown key 'layer'; did you mean layers?"),
        (["--set", "lr=0.1,fast"], "--lr is 'fast'; it must be a number"),
        (["--set", "lr=0.1,-1"], "--set: lr is -1; it must be > 0"),
        (["--set", "lr=0.1,"], "--lr is ''"),
        (["--set", "layers=1,1"], "--set: layers lists 1 twice"),
        (["--set", "lr=0.1", "--set", "lr=0.2"], "lr is given twice"),
        (["--set", "lr=0.1", "--lr", "0.2"], "lr is given twice"),
        (["--set", "lr=0.1", "--benchmark_only", "--benchmark_run_dir", "x"], "benchmark_only"),
        (["--set", "lr=0.1", "--resume", "x"], "--resume does not take --config"),
        (["--set", "per_scale_mixer_widths=1,1,1;1,x"], "must be a list of numbers"),
        (["--sweep", "missing.json"], "missing.json: cannot be read"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_mistakes_train_nothing(tmp_path, arguments, message):
    file = runs.config_file(tmp_path)
    line = runs.error_line("--config", file, *arguments)
    assert message in line
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"lr": 0.1}', "lr is 0.1; it must be a list"),
        ('{"lr": []}', "must be a list"),
        ('{"lr": [0.1, "x"]}', "lr is 'x'; it must be a number"),
        ('{"rl": [0.1]}', "unknown key 'rl'"),
        ("{}", "is empty"),
    ],
)
def test_files_that_are_no_grid(tmp_path, content, message):
    file = tmp_path / "grid.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_grid([], str(file), {})


def test_a_bad_config_below_the_grid_trains_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"base\.json: C is 0"):
        sweep([{"lr": 0.1}], lambda member: {"C": 0, **member}, source="base.json")


def test_a_grid_from_a_file_and_flags_together(tmp_path):
    file = tmp_path / "grid.json"
    file.write_text('{"mixer_transform": ["fwht", "identity"], "split": [[0.8, 0.1, 0.1]]}')
    members = read_grid(["low_rank=0,2", "wavelet_crawl=true,false"], str(file), {"lr": 1})
    names = ("mixer_transform", "low_rank", "wavelet_crawl")
    combinations = itertools.product(("fwht", "identity"), (0, 2), (True, False))
    assert [tuple(member[name] for name in names) for member in members] == list(combinations)
    assert all(Config(**member).split == (0.8, 0.1, 0.1) for member in members)


def test_the_table_escapes_and_aligns():
    text = table(
        [
            {"lr": "1", "result": "failed: a | b\nc"},
            {"lr": "0.001", "bits/byte": "10.5", "result": "done"},
            {"lr": "2", "bits/byte": "9.5", "result": "done"},
        ]
    )
    lines = text.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["2", "0.001", "1"]
    assert lines[4].endswith("| failed: a \\| b c |")
    assert len({line.index("|", 2) for line in lines}) == 1
