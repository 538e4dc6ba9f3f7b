"""The benchmark of optimizers: exact memory, the same batches for all, files that can be read."""

import json
import sys

import numpy as np
import optimizers
import pytest

from tests.conftest import tiny_config
from wavelet_lm import UserError, build_model
from wavelet_lm.data.dataset import TokenizedText, TokenSplit
from wavelet_lm.data.tokenizers import ByteTokenizer

SMALL = {"C": 64, "layers": 1, "levels": 1, "block_size": 8, "per_scale_mixer_widths": None}
SMALL |= {"pkm_enabled": False, "fwpkm_enabled": False}


def state_bytes(name, sizes):
    """By the formats: 4 bytes a number; 8 bits with a float32 for 256 numbers from 4096 on."""
    n = {"Adagrad": 1, "AdamW": 2}[name.removesuffix("8bit")]
    if not name.endswith("8bit"):
        return sum(n * 4 * size + 4 for size in sizes)  # torch counts steps in a tensor
    levels = n * 256 * 4  # of what the 8 bits stand for, once
    return levels + sum(
        n * (size + 4 * -(-size // 256)) if size >= 4096 else n * 4 * size for size in sizes
    )


@pytest.mark.parametrize("name", ["Adagrad", "Adagrad8bit", "AdamW", "AdamW8bit"])
def test_memory_is_that_of_the_formats(name, tmp_path):
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    config = tiny_config(
        **SMALL, optimizer=name, max_steps=3, eval_batches=1, log_interval=1, device="cpu"
    )
    split = TokenSplit(np.arange(400, dtype=np.uint32) % 256, 400)
    data = TokenizedText("count", ByteTokenizer(), split, split, None)
    row = optimizers.measure(config, data)
    sizes = [p.numel() for p in build_model(config, 256).parameters() if p.requires_grad]
    assert row["state_bytes"] == state_bytes(name, sizes)
    expected = sum(size for size in sizes if size >= 4096) if name.endswith("8bit") else 0
    assert row["parameters_in_8_bits"] == expected
    assert [step for step, _ in row["train_curve"]] == [1, 2, 3]
    if name.endswith("8bit"):  # three steps leave the moments those of 32 bits, but for rounding
        exact = optimizers.measure(config.replace(optimizer=name.removesuffix("8bit")), data)
        key = "mean_root_second_moment"
        assert row[key] == pytest.approx(exact[key], rel=0.02)


@pytest.fixture
def command(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("pack my box with five dozen jugs " * 20, encoding="utf-8")
    config = tmp_path / "config.json"
    values = {**SMALL, "tokenizer": "bytes", "split": [0.8, 0.2, 0], "dataset": str(text)}
    values |= {"cache_dir": str(tmp_path / "cache"), "eval_batches": 2, "eval_interval": 2}
    config.write_text(json.dumps(values))

    def run(*more):
        arguments = ["--config", config, "--device", "cpu", "--max_steps", 4, *more]
        monkeypatch.setattr(sys, "argv", ["optimizers.py", *map(str, arguments)])
        optimizers.main()

    return run


def test_runs_of_a_seed_start_alike(command, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results, image = tmp_path / "results.json", tmp_path / "curves.png"
    command("--optimizers", "AdamW,Adagrad", "--seeds", "1,2", "--json", results, "--plot", image)
    rows = json.loads(results.read_text())["rows"]
    assert [(r["seed"], r["optimizer"]) for r in rows] == [
        (1, "AdamW"),
        (1, "Adagrad"),
        (2, "AdamW"),
        (2, "Adagrad"),
    ]
    first_losses = [(r["train_curve"][0][1], r["valid_curve"][0][1]) for r in rows]
    assert first_losses[0] == first_losses[1] != first_losses[2] == first_losses[3]
    assert all(r["valid_loss"] == r["valid_curve"][-1][1] for r in rows)
    assert rows[0]["valid_loss"] != rows[1]["valid_loss"]
    out = capsys.readouterr().out
    assert f"{rows[1]['valid_loss'] - rows[0]['valid_loss']:+.4f}" in out
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optimizers", "AdamW,SGD"), "'SGD' is none of Adagrad, AdamW"),
        (("--seeds", "1,a"), "--seeds 1,a: give whole numbers"),
        (("--json", "nowhere/results.json"), "there is no folder nowhere"),
        (("--plot", "curves.txt"), "must end in .png"),
    ],
)
def test_bad_flags_are_refused_before_training(command, flags, message):
    with pytest.raises(UserError, match=message):
        command(*flags)
