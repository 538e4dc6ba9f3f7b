"""Runs on audio, music, codes and images: train, resume, evaluate, and generate files that open."""

import json
import wave

import mido
import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.cli.test_generate import error_line, generate, text_of
from tests.training import runs
from tests.training.test_resume import killed_run
from wavelet_lm.data.modalities import find_modality
from wavelet_lm.data.modalities.midi import Note, write_notes
from wavelet_lm.evaluation.likelihood import evaluate_run
from wavelet_lm.training.run import resume, train

RNG = np.random.default_rng(0)


def write_clips(folder):
    for i in range(2):
        tone = np.sin(2 * np.pi * (200 + 100 * i) * np.arange(4000) / 22050)
        soundfile.write(folder / f"{i}.wav", tone / 2, 22050, subtype="PCM_24")


def write_pieces(folder):
    for i in range(2):
        pitches = RNG.integers(50, 70, 100).tolist()
        notes = [Note(9 * k, 9 * k + 9, pitch, 16) for k, pitch in enumerate(pitches)]
        write_notes(folder / f"{i}.mid", notes)


def write_codes(folder):
    np.save(folder / "0.npy", RNG.integers(0, 1024, (2, 500)))


def write_images(folder):
    for i in range(8):
        Image.fromarray(RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)).save(folder / f"{i}.png")


KINDS = {
    "mulaw": write_clips,
    "midi": write_pieces,
    "encodec": write_codes,
    "pixels_rgb": write_images,
}


def config_of(name, folder, **overrides):
    data = folder / "files"
    data.mkdir(exist_ok=True)
    KINDS[name](data)
    return {"dataset": str(data), "tokenizer": name, "max_steps": 10, **overrides}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """A finished run on files of each kind, and a file of the kind."""
    folder = tmp_path_factory.mktemp(request.param)
    options = config_of(request.param, folder)
    path = train(runs.run_config(folder, **options)).path
    return path, next(iter(sorted((folder / "files").iterdir())))


def test_training_and_evaluation_report_nats_and_no_bits_per_byte(run):
    path, _ = run
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["event"] == "eval"]
    assert all(row["bits_per_byte"] is None and row["val_loss"] > 0 for row in evaluations)
    result = evaluate_run(path, device="cpu", log=lambda line: None)["sliding"]
    assert (result["bits_per_byte"], result["bytes"]) == (None, None)
    assert result["nll"] > 0
    (sample,) = path.glob("sample.*")
    assert sample.stat().st_size > 0
    assert "nats/token" in (path.parents[1] / "runs.md").read_text(encoding="utf-8")
    assert f"--out more{sample.suffix}" in (path / "log.txt").read_text(encoding="utf-8")


def test_a_prompt_is_continued_in_a_file(run, tmp_path):
    path, prompt = run
    modality = find_modality(**json.loads((path / "tokenizer" / "tokenizer.json").read_text()))
    out = tmp_path / f"new{modality.output}"
    base = ("--checkpoint", path, "--device", "cpu", "--num_tokens", 40)
    shown = text_of(*base, "--prompt_file", prompt, "--out", out, "--n", 2)
    assert shown == ""
    before = modality.read_prompt(prompt)
    for number in (1, 2):
        found = modality.read_prompt(tmp_path / f"new_{number}{modality.output}")
        same = before[:-50] if modality.name == "midi" else before  # its last notes still sound
        assert found[: len(same)] == same
    # Without a prompt; the tokens that are reported are those of the file.
    told = json.loads(text_of(*base, "--out", out, "--json"))
    assert told["text"] == str(out)
    tokens = modality.read_prompt(out) if modality.name != "midi" else None
    if tokens is not None:
        assert tokens[:40] == told["tokens"]
    assert len(told["tokens"]) == 40
    # State by file, and all of what was read in the file.
    state = tmp_path / "state"
    only = ("--checkpoint", path, "--device", "cpu", "--num_tokens", 0)
    text_of(*only, "--prompt_file", prompt, "--save_state", state)
    text_of(*base, "--load_state", state, "--out", out, "--seed", 2)
    again = out.read_bytes()
    assert again == (tmp_path / f"new_2{modality.output}").read_bytes()


def test_players_open_what_was_generated(run):
    path, _ = run
    (sample,) = path.glob("sample.*")
    if sample.suffix == ".wav":
        with wave.open(str(sample)) as clip:
            assert (clip.getframerate(), clip.getnchannels(), clip.getsampwidth()) == (16000, 1, 2)
            assert clip.getnframes() == 5
    elif sample.suffix == ".mid":
        assert mido.MidiFile(sample).length >= 0
    elif sample.suffix == ".png":
        with Image.open(sample) as image:
            assert (image.width, image.mode) == (4, "RGB")
    else:
        assert np.load(sample).shape == (1, 5)


def test_resumed_runs_are_the_runs_that_never_stopped(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    paths = []
    for folder in (whole, killed):
        folder.mkdir()
    options = config_of("mulaw", whole, max_steps=30)
    paths.append(train(runs.run_config(whole, **options)).path)
    paths.append(resume(killed_run(killed, monkeypatch, 17, **options)).path)
    runs.assert_same_run(*paths)


def test_contradictions_are_one_line(run, tmp_path):
    path, prompt = run
    modality = find_modality(**json.loads((path / "tokenizer" / "tokenizer.json").read_text()))
    base = ("--checkpoint", path, "--device", "cpu")
    out = ("--out", tmp_path / f"x{modality.output}")
    for flags, message in (
        (("--stop", "x"), "--stop is for text"),
        (("--prompt", "x"), "--prompt is for text"),
        (("--prompts", "x"), "--prompts is for text"),
        (("--interactive",), "--interactive is for text"),
        (("--clean_spacing",), "--clean_spacing is for text"),
        (("--prompt_file", "x.txt"), f"reads {modality.kind} files"),
        (("--prompt_file", tmp_path / f"no{prompt.suffix}"), "there is no such file"),
        (("--out", tmp_path / "x.txt"), f"is written as {modality.output}"),
        (("--out", tmp_path / "no" / f"x{modality.output}"), "there is no folder"),
    ):
        assert message in error_line(*base, *out, *flags), flags
    assert f"say where: --out FILE{modality.output}" in error_line(*base)
    # Presets for text do no harm.
    assert generate(*base, *out, "--strategies", "--num_tokens", 3).returncode == 0


def test_text_is_not_written_to_such_files(tmp_path):
    path = train(runs.run_config(tmp_path, max_steps=1)).path
    assert "this run writes text" in error_line("--checkpoint", path, "--out", tmp_path / "x.wav")
