"""`train.py` as it is typed: mistakes are one line and leave nothing behind."""

import json

import pytest

from tests.training import runs
from wavelet_lm.config import Config
from wavelet_lm.training.run import train

FLAGS = {
    "device": "cpu",
    "tokenizer": "char",
    "C": 16,
    "layers": 1,
    "block_size": 16,
    "max_steps": 3,
    "amp_dtype": "auto",
    "compile": "false",
    "generation_prompt": "a",
    "pkm_num_keys": 16,
    "fwpkm_num_keys": 16,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(runs.run_config(folder, max_steps=12)).path


def flags(folder, **overrides):
    """A short training as flags alone, its text `folder/words.txt`."""
    config = runs.run_config(folder)
    values = {
        **FLAGS,
        **{key: getattr(config, key) for key in ("dataset", "cache_dir", "out_dir", "runs_file")},
        **overrides,
    }
    return [word for key, value in values.items() for word in (f"--{key}", value)]


def test_the_headline_config_without_a_gpu_points_to_small_ones(tmp_path):
    """In a process of its own: nothing else may stand on standard error either."""
    done = runs.finished("--device", "auto", "--out_dir", tmp_path / "logs", "--max_steps", 1)
    line = done.stderr
    assert (done.returncode, done.stdout, line.count("\n")) == (2, "", 1)
    if "no CUDA GPU" not in line:
        pytest.skip("there is a GPU here")
    assert "configs/quickstart.json" in line
    assert "configs/shakespeare_char.json" in line
    assert list(tmp_path.iterdir()) == []


def write_nothing(file):
    file.write_bytes(b"")


def write_little(file):
    file.write_text("abc " * 4, encoding="utf-8")


def write_latin1(file):
    file.write_bytes(b"fine so far\n" * 50 + "né".encode("latin-1") + b"more\n" * 50)


def write_tiny_splits(file):
    file.write_text("abcdefghij" * 2, encoding="utf-8")


@pytest.mark.parametrize(
    ("write", "overrides", "message"),
    [
        (None, {}, "does not exist"),
        (write_nothing, {}, "has no text"),
        (write_little, {}, "the training split has 14 tokens but a batch needs at least 17"),
        (write_tiny_splits, {"block_size": 4}, "the validation split has 1 token"),
        (write_tiny_splits, {"block_size": 4, "split": ".8,.15,.05"}, "the test split has 1 token"),
        (write_latin1, {}, "not valid UTF-8 at byte 601, line 51"),
        (None, {"dataset": "python-stdlb"}, "did you mean python-stdlib?"),
    ],
    ids=["missing", "empty", "short", "short valid", "short test", "latin-1", "misspelt"],
)
def test_texts_that_cannot_be_trained_on(tmp_path, write, overrides, message):
    arguments = flags(tmp_path, **overrides)
    (tmp_path / "words.txt").unlink()
    if write is not None:
        write(tmp_path / "words.txt")
    assert message in runs.error_line(*arguments)
    assert not (tmp_path / "runs.md").exists()
    assert not list(tmp_path.glob("logs/*"))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"amp_dtype": "fp16"}, "amp_dtype fp16 needs a CUDA GPU"),
        ({"device": "tpu"}, "it must be auto, cpu, cuda or cuda:N"),
        ({"lr": "fast"}, "--lr is 'fast'; it must be a number"),
        ({"embedding_std": -1}, "--embedding_std is -1; it must be > 0"),
        ({"levels": 60}, "--levels is 60; it must be >= 1 and <= 24"),
        ({"lerning_rate": 1}, "unknown option --lerning_rate"),
        ({"init_from": "/nowhere"}, "/nowhere: "),
        ({"C": 2**20, "layers": 9}, "this config needs about"),
        ({"C": 2**20, "layers": 9}, "layers (9) or levels (5)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be(tmp_path, overrides, message):
    assert message in runs.error_line(*flags(tmp_path, **overrides))
    assert not list(tmp_path.glob("logs/*"))


def test_configs_that_cannot_be(tmp_path):
    file = tmp_path / "config.json"
    for text, message in [
        ('{"layer": 2}', "unknown key 'layer'; did you mean layers?"),
        ('{"layers": 2,}', "line 1 is not JSON"),
        ("[1]", "an object is needed"),
        ('{"layers": "two"}', "layers is 'two'; it must be a whole number"),
    ]:
        file.write_text(text, encoding="utf-8")
        assert message in runs.error_line("--config", file)
    assert "cannot be read" in runs.error_line("--config", tmp_path / "missing.json")


def test_what_cannot_be_resumed(finished, tmp_path):
    _, run = finished
    assert "this run is finished" in runs.error_line("--resume", run)
    assert "not a run folder" in runs.error_line("--resume", tmp_path)
    assert "--max_steps N with N above" in runs.error_line("--resume", run, "--lr", 0.1)
    assert "does not take --config" in runs.error_line("--resume", run, "--config", "config.json")
    assert f"--init_from {run}" in runs.error_line("--resume", run, "--C", 32)


def copied(run, folder, end=False):
    """A copy of a run; without `end` it looks as if it had been killed before its last line."""
    copy = folder / run.name
    copy.mkdir()
    for file in run.rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(run)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    if not end:
        rows = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    return copy


def test_checkpoints_that_are_cut_off_or_of_another_config(finished, tmp_path):
    _, run = finished
    copy = copied(run, tmp_path)
    for name in ("last", "best"):
        data = (run / f"{name}.safetensors").read_bytes()
        (copy / f"{name}.safetensors").write_bytes(data[: len(data) // 2])
    assert "last.safetensors: truncated" in runs.error_line("--resume", copy)
    line = runs.error_line("--checkpoint", copy, script="generate.py")
    assert "best.safetensors: truncated" in line
    assert "truncated" in runs.error_line("--init_from", copy)

    config = Config.from_json(run / "config.json").replace(C=8)
    (copy / "config.json").write_text(config.to_json(), encoding="utf-8")
    (copy / "last.safetensors").write_bytes((run / "last.safetensors").read_bytes())
    assert "config.json: C is 8 but last.safetensors is a" in runs.error_line("--resume", copy)


def test_a_finished_copy_resumes_to_the_same_evaluation(finished, tmp_path):
    _, run = finished
    copy = copied(run, tmp_path)
    done = runs.finished("--resume", copy)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (
        next(json.loads(line) for line in (r / "metrics.jsonl").open() if '"test"' in line)
        for r in (run, copy)
    )
    assert first["sliding"]["nll"] == second["sliding"]["nll"]
    runs.assert_same_run(run, copy)


def test_benchmark_only_prints_what_the_evaluation_command_prints(finished):
    folder, run = finished
    before = (folder / "runs.md").read_text(encoding="utf-8")
    a = runs.finished("--benchmark_only", "--benchmark_run_dir", run, "--device", "cpu")
    b = runs.finished(run, "--device", "cpu", script="wavelet_lm.evaluation")
    assert (a.returncode, b.returncode) == (0, 0)
    for done in (a, b):  # the last column is the time that it took
        done.table = [line.split()[:-1] for line in done.stdout.splitlines()]
    assert a.table == b.table
    assert len(a.table) == 4
    test = next(json.loads(line) for line in (run / "metrics.jsonl").open() if '"test"' in line)
    assert f"{test['sliding']['bits_per_byte']:.4f}" in a.stdout
    assert (folder / "runs.md").read_text(encoding="utf-8") == before
    assert [path.name for path in (folder / "logs").iterdir()] == [run.name]


def test_benchmark_only_of_no_run(tmp_path):
    line = runs.error_line("--benchmark_only", "--benchmark_run_dir", tmp_path / "none")
    assert "none" in line
    assert "needs benchmark_run_dir" in runs.error_line("--benchmark_only")
    done = runs.finished(tmp_path / "none", script="wavelet_lm.evaluation")
    assert done.returncode == 2
    assert done.stderr.startswith("wavelet_lm.evaluation: error: ")
    assert done.stderr.count("\n") == 1


def test_a_run_by_flags_alone_and_its_folder(tmp_path):
    done = runs.finished(*flags(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    run = runs.only_run(tmp_path)
    # beside the picture, which needs matplotlib
    assert {path.name for path in run.iterdir()} - {"loss.png"} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "log.txt",
        "tokenizer",
        "best.safetensors",
        "last.safetensors",
        "generations.txt",
    }
    config = Config.from_json(run / "config.json")
    assert (config.C, config.layers, config.max_steps) == (16, 1, 3)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert environment["command"].startswith("python train.py --device cpu")
    assert environment["threads"] == 1
    assert done.stdout.splitlines()[-1].startswith(
        f"more of it: python generate.py --checkpoint {run}"
    )
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert "3 steps of 128 tokens, Adagrad" in log
