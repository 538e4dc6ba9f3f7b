"""Published checkpoints: the same logits after import, and one line for all that does not fit."""

import json
import math
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import wavelet_lm
from tests.interop.published_model import (
    HEADLINE,
    MINI,
    VOCAB,
    random_checkpoint,
    reference_logits,
    write,
)
from tests.training.runs import error_line
from wavelet_lm import UserError
from wavelet_lm.config import ModelConfig
from wavelet_lm.data.tokenizers import CharTokenizer
from wavelet_lm.inference.text.spacing import is_spaced_apart
from wavelet_lm.interop.published import convert
from wavelet_lm.interop.published_config import ABSENT, EXTENSIONS, NEEDED
from wavelet_lm.models.registry import n_params

ROOT = Path(__file__).parents[2]
LETTERS = "\n abcdefghi"
IDX = torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(5))
CELLS = {
    **HEADLINE,
    "C": 64,  # not read
    "multinodal_enabled": True,
    "multinodal_num_cells": 3,
    "multinodal_cell_dim": 8,
}

CASES = {
    "headline": HEADLINE,
    "mini": MINI,
    "mini padded, its projection kept": {**MINI, "mixer_transform": "fwht"},
    "C not a power of two": {**HEADLINE, "C": 12},
    "widths none": {**HEADLINE, "per_scale_mixer_widths": None},
    "widths all one": {**HEADLINE, "per_scale_mixer_widths": [1, 1, 1, 1]},
    "linear-only": {**HEADLINE, "lifting_linear_only": True},
    "wide lifting nets": {**HEADLINE, "lifting_hidden_mult": 3},
    "lifting of each block": {**HEADLINE, "shared_lifting_weights": False},
    "no crawl": {**HEADLINE, "wavelet_crawl": False},
    "untied": {**HEADLINE, "untied_reconstruction": True, "shared_lifting_weights": False},
    "untied, linear, no crawl": {
        **HEADLINE,
        "untied_reconstruction": True,
        "shared_lifting_weights": False,
        "lifting_linear_only": True,
        "wavelet_crawl": False,
    },
    "multi-basis": {**HEADLINE, "multi_basis_lifting": True, "shared_lifting_weights": False},
    "haar": {**HEADLINE, "wavelet_mode": "haar", "wavelet_crawl": False},
    "haar, crawl not read": {**HEADLINE, "wavelet_mode": "haar"},
    "depth 2": {**HEADLINE, "mixer_depth": 2},
    "depth 3, stabilizers": {**HEADLINE, "mixer_depth": 3, "mixer_depth_stabilizers": True},
    "depth 2, residuals": {**MINI, "mixer_depth": 2, "mixer_depth_residuals": True},
    "depth 2, all": {
        **HEADLINE,
        "per_scale_mixer_widths": None,
        "mixer_depth": 2,
        "mixer_depth_residuals": True,
        "mixer_depth_stabilizers": True,
    },
    "depth 1, its switches not read": {**HEADLINE, "mixer_depth_residuals": True},
    "no memory, its switches not read": {**MINI, "fwpkm_inference_updates": True},
    "no memory modules": {
        **HEADLINE,
        "mlp_expansion": 0,
        "pkm_enabled": False,
        "fwpkm_enabled": False,
    },
    "MLP alone": {**HEADLINE, "pkm_enabled": False, "fwpkm_enabled": False},
    "deep MLP": {**HEADLINE, "mlp_layers": 4},
    "no gate": {**HEADLINE, "use_mixer_gate": False},
    "sigmoid": {**HEADLINE, "mixer_gate_activation": "sigmoid"},
    "gelu": {**HEADLINE, "mixer_gate_activation": "gelu"},
    "relu": {**HEADLINE, "mixer_gate_activation": "relu"},
    "no low rank": {**HEADLINE, "low_rank": 0},
    "no routing": {**HEADLINE, "cross_scale_gating": False},
    "no bypass": {**HEADLINE, "decompose_bypass": False},
    "plain residual": {**HEADLINE, "learned_residual": False},
    "no embedding per layer": {**HEADLINE, "per_layer_embedding": False},
    "stable": {**HEADLINE, "stable_parametrization": True},
    "tied": {**HEADLINE, "tie_embedding_to_lm_head": True},
    "multinodal": CELLS,
    "multinodal, bagged at the start": {
        **CELLS,
        "multinodal_combination": "average",
        "multinodal_features_per_cell": 4,
        "multinodal_bagged_eps": 1e-6,
        "multinodal_seeds": [1, 2, 3],
    },
    "multinodal sum": {**CELLS, "multinodal_combination": "sum"},
    "multinodal mini": {**CELLS, **MINI, "multinodal_cell_dim": 6},
    "multinodal gates": {**CELLS, "multinodal_cross_cell_gating": True},
    "multinodal gates, every second of three": {
        **CELLS,
        "layers": 3,
        "multinodal_cross_cell_gating": True,
        "multinodal_cross_cell_gate_interval": 2,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_the_formulas(tmp_path, name):
    config = CASES[name]
    tensors = random_checkpoint(config)
    model = wavelet_lm.load_model(write(tmp_path, config, tensors))
    assert not model.training
    expected = torch.stack([reference_logits(config, tensors, idx) for idx in IDX])
    with torch.no_grad():
        torch.testing.assert_close(model(IDX)[0], expected, rtol=0, atol=1e-9)
    assert expected.std() > 0.1


def rounded_checkpoint(config):
    """One of float32; sums of values and deltas would be rounded again, so there are no deltas."""
    tensors = random_checkpoint(config, dtype=torch.float32)
    return {name: v * 0 if "value_deltas" in name else v for name, v in tensors.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_compiled_or_distributed_model_of_float32_is_the_same(tmp_path, prefix):
    tensors = rounded_checkpoint(HEADLINE)
    wrapped = {f"{prefix}{name}": value for name, value in tensors.items()}
    model = wavelet_lm.load_model(write(tmp_path, HEADLINE, wrapped))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = reference_logits(HEADLINE, tensors, IDX[0])
    with torch.no_grad():
        torch.testing.assert_close(model.double()(IDX[:1])[0][0], expected, rtol=0, atol=1e-9)


def test_files_from_before_the_zip_format_and_of_half_precision_load(tmp_path):
    tensors = random_checkpoint(HEADLINE, dtype=torch.bfloat16)
    path = write(tmp_path, HEADLINE, tensors)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    model = wavelet_lm.load_model(path)
    assert torch.equal(model.embedding.weight, tensors["token_embedding.weight"].float())


def test_an_absent_key_means_what_it_meant_to_the_published_program(tmp_path):
    meant = {
        "lifting_hidden_mult": 1,
        "mlp_layers": 2,
        "pkm_heads": 1,
        "use_mixer_gate": True,
        "mixer_gate_activation": "silu",
        "mixer_transform": "fwht",
        "mixer_depth": 1,
        "decompose_bypass": True,
        "learned_residual": True,
        "wavelet_mode": "lifting",
        "per_scale_mixer_widths": None,
        "cross_scale_gating": False,
        "per_layer_embedding": False,
        "tie_embedding_to_lm_head": False,
        "skip_proj_out": False,
        "fwpkm_enabled": False,
        "shared_lifting_weights": False,
        "wavelet_crawl": False,
    }
    config = {**HEADLINE, **meant}
    tensors = random_checkpoint(config)
    written = {key: value for key, value in config.items() if key not in meant}
    model = wavelet_lm.load_model(write(tmp_path, written, tensors))
    expected = reference_logits(config, tensors, IDX[0])
    with torch.no_grad():
        torch.testing.assert_close(model(IDX[:1])[0][0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("written", "expected"), [({}, True), ({"dataset": "text8"}, False)])
def test_a_published_model_was_trained_on_wikitext_unless_its_config_says_otherwise(
    tmp_path, written, expected
):
    model = wavelet_lm.load_model(write(tmp_path, {**MINI, **written}, random_checkpoint(MINI)))
    assert is_spaced_apart(model.config.dataset) is expected


def test_what_is_ignored_is_said_once(tmp_path):
    training = {"lr": 0.01, "compile": True, "compile_mode": "default", "quantize_mlp_bits": 4}
    off = {"fht_input_cap_enabled": False, "fht_input_cap_value": 1.0, "wavelet_basis": "real"}
    tensors = random_checkpoint(MINI)
    path = write(tmp_path, MINI, tensors, {**training, **off, "block_size": 77})
    lines = []
    model = wavelet_lm.load_model(path, log=lines.append)
    assert len(lines) == 2
    assert lines[0].endswith("ignored keys of training: " + ", ".join(training))
    assert lines[1].endswith(
        "layers.0.ln2.bias; layers.0.ln2.weight; layers.1.ln2.bias; and 3 more"
    )
    assert model.config.block_size == 77
    unread = sum(value.numel() for name, value in tensors.items() if ".ln2." in name)
    distinct = {value.data_ptr(): value.numel() for value in tensors.values()}
    assert n_params(model) == sum(distinct.values()) - unread


@pytest.mark.parametrize(
    ("base", "keys"),
    [
        (HEADLINE, [f"layers.{i}.lifting_wavelet.dilation_logits" for i in (0, 1)]),
        (MINI, ["layers.1.ln2.weight", "lm_head.weight"]),
    ],
)
def test_repeats_and_unread_tensors_may_lack(tmp_path, base, keys):
    whole = random_checkpoint(base)
    tensors = {name: value for name, value in whole.items() if name not in keys}
    model = wavelet_lm.load_model(write(tmp_path, base, tensors))
    expected = reference_logits(base, {**whole, **tensors}, IDX[0])
    with torch.no_grad():
        torch.testing.assert_close(model(IDX[:1])[0][0], expected, rtol=0, atol=1e-9)


# --- refusals ------------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(UserError) as caught:
        wavelet_lm.load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.0.proj_out.weight": None}, "no layers.0.proj_out.weight"),
        ({"ema.token_embedding.weight": (2, 2)}, "unknown ema.token_embedding.weight"),
        ({"layers.1.ln1.bias": (7,)}, "layers.1.ln1.bias is [7], the config makes it [8]"),
        (
            {"layers.0.lifting_wavelet.dilation_logits": (4, 3)},
            "layers.0.lifting_reconstruct.decompose.dilation_logits differs from"
            " layers.0.lifting_wavelet.dilation_logits, which it repeats",
        ),
        (
            {"layers.1.lifting_wavelet.update_nets.2.3.bias": (8,)},
            "layers.1.lifting_wavelet.update_nets.2.3.bias differs from"
            " layers.0.lifting_wavelet.update_nets.2.3.bias",
        ),
        ({"layers.0.fwpkm.value_deltas": (3, 8)}, "layers.0.fwpkm.value_deltas is [3, 8]"),
        ({"layers.0.pkm.keys_a": None, "layers.0.pkm.keys_b": None}, "no layers.0.pkm.keys_b"),
        ({f"extra.{i}": (1,) for i in range(9)}, "unknown extra.2; and 6 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, said):
    tensors = random_checkpoint(HEADLINE)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.full(shape, 0.3, dtype=torch.float64)
    assert said in refusal(write(tmp_path, HEADLINE, tensors))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decompose_bypass_ema": True}, "decompose_bypass_ema is on"),
        ({"mixer_exp_parametrization": True}, "mixer_exp_parametrization is on"),
        (
            {"untied_reconstruction": True, "multi_basis_lifting": True},
            "untied_reconstruction with multi_basis_lifting cannot be imported",
        ),
        ({"semantic_feedback": True}, "semantic_feedback is true, which this project does not"),
        ({"fht_input_cap_enabled": True, "fht_input_cap_value": 2}, "fht_input_cap_enabled is"),
        ({"mixer_recurrence_steps": 2}, "mixer_recurrence_steps is 2"),
        ({"low_ranc": 4}, "low_ranc is 4"),
        ({"C": None}, "C is None; it must be a whole number"),
        ({"wavelet_crawl_k": 4}, "wavelet_crawl_k is 4; it must be odd"),
        ({"wavelet_crawl": False}, "unknown layers.0.lifting_wavelet.dilation_logits"),
        ({"low_rank": 0}, "unknown layers.0.scale_mixers.0.mixer.U"),
        ({"wavelet_decomp_norm": True}, "no layers.0.decomp_norms.0.weight"),
        ({"skip_proj_out": True}, "unknown layers.0.proj_out.weight"),
        ({"lifting_linear_only": True}, "no layers.0.lifting_wavelet.predict_nets.0.weight"),
        ({"per_scale_mixer_widths": None}, "no layers.0.scale_mixers.0.mixer.weight"),
        ({"tie_embedding_to_lm_head": True}, "lm_head.weight differs from token_embedding.weight"),
        ({"levels": 2, "per_scale_mixer_widths": [1, 1, 0.5]}, "scale_weights is [4], the config"),
    ],
)
def test_the_switches_are_checked_against_the_tensors(tmp_path, change, said):
    path = write(tmp_path, {**HEADLINE, **change}, random_checkpoint(HEADLINE))
    assert said in refusal(path)


@pytest.mark.parametrize(
    ("key", "off", "on", "shown"),
    [
        ("wavelet_packets", False, True, "true"),
        ("phase_gating", False, True, "true"),
        ("lifting_data_dependent", 0, 2, "2"),
        ("hadamard_top_k", 0, 5, "5"),
    ],
)
def test_no_published_checkpoint_has_an_extension(tmp_path, key, off, on, shown):
    tensors = random_checkpoint(HEADLINE)
    wavelet_lm.load_model(write(tmp_path, {**HEADLINE, key: off}, tensors))
    assert refusal(write(tmp_path, {**HEADLINE, key: on}, tensors)) == (
        f"{tmp_path / 'config.json'}: {key} is {shown}, an extension of this project that no"
        " published checkpoint has; put the config.json of its training beside it"
    )


def test_every_key_of_the_model_is_published_or_an_extension():
    needed = {key for keys in NEEDED.values() for key in keys}
    parts = [{"model"}, set(ABSENT), needed, EXTENSIONS]
    assert set().union(*parts) == {spec.name for spec in fields(ModelConfig)}
    assert sum(map(len, parts)) == len(fields(ModelConfig))
    published = {key for key in HEADLINE if key in ModelConfig.__dataclass_fields__}
    assert not published & EXTENSIONS
    assert {"phase_gating", "wavelet_packets", "heads", "wavelet_module"} <= EXTENSIONS


@pytest.mark.parametrize("key", ["C", "layers", "levels", "pkm_top_k", "wavelet_crawl_k"])
def test_keys_that_cannot_be_guessed_are_needed(tmp_path, key):
    config = {k: v for k, v in HEADLINE.items() if k != key}
    path = write(tmp_path, config, random_checkpoint(HEADLINE))
    assert f"config.json: has no {key}" in refusal(path)


class Evil:
    """Its pickle runs code when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path(__file__).parent / "was_executed",))


def test_files_that_are_no_checkpoint_are_one_line(tmp_path):
    tensors = random_checkpoint(MINI)
    path = write(tmp_path, MINI, tensors)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b"", b"hello"):
        path.write_bytes(damaged)
        assert "truncated" in refusal(path)
    for content, said in [
        ([1, 2], "a bare state_dict"),
        ({}, "a bare state_dict"),
        ({"model": tensors, "step": 3}, "plain tensors of floating point (model; step)"),
        ({**tensors, "seen": torch.tensor(7)}, "point (seen); a bare"),
        ({**tensors, "_orig_mod.lm_head.weight": tensors["lm_head.weight"]}, "both with and"),
        ({**tensors, "module.lm_head.weight": tensors["lm_head.weight"]}, "both with and"),
        ({"layers.0.scale_weights": torch.ones(3)}, "has no token_embedding.weight"),
    ]:
        torch.save(content, path)
        assert said in refusal(path)
    torch.save({"lm_head.weight": Evil()}, path)
    assert "pickled code is not run" in refusal(path)
    assert not (Path(__file__).parent / "was_executed").exists()
    path.unlink()
    assert "there is no such checkpoint" in refusal(path)


def test_the_config_must_be_beside_it(tmp_path):
    path = write(tmp_path, MINI, random_checkpoint(MINI))
    (tmp_path / "config.json").write_text("{")
    assert "config.json: line 1 is not JSON" in refusal(path)
    (tmp_path / "config.json").unlink()
    assert "config.json: missing" in refusal(path)


# --- run folders and commands --------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)


@pytest.fixture
def letters(tmp_path):
    CharTokenizer(LETTERS).save(tmp_path / "letters")
    return tmp_path / "letters"


def test_from_a_file_to_a_generated_text(tmp_path, letters):
    tensors = rounded_checkpoint(HEADLINE)
    path = write(tmp_path / "published", HEADLINE, tensors, {"generation_prompt": "bad", "lr": 1})
    out = tmp_path / "runs" / "imported"
    program = ("-m", "wavelet_lm.interop.published", path, "--out", out)
    without = run(*program)
    assert without.returncode == 2
    assert without.stderr.count("\n") == 1
    assert "its vocabulary of 11 is not GPT-2's" in without.stderr

    done = run(*program, "--tokenizer", letters)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "ignored keys of training: lr\n" in done.stdout
    assert {f.name for f in out.iterdir()} == {"config.json", "best.safetensors", "tokenizer"}
    model = wavelet_lm.load_model(out)
    expected = reference_logits(HEADLINE, tensors, IDX[0])
    with torch.no_grad():
        torch.testing.assert_close(model.double()(IDX[:1])[0][0], expected, rtol=0, atol=1e-9)
    again = run(*program, "--tokenizer", letters)
    assert again.returncode == 2
    assert "already there" in again.stderr

    text = run("generate.py", "--checkpoint", out, "--num_tokens", 9, "--device", "cpu")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("bad")
    assert len(text.stdout) == len("bad") + 9 + 1

    letters.rename(path.parent / "tokenizer")
    direct = run("generate.py", "--checkpoint", path, "--num_tokens", 9, "--device", "cpu")
    assert direct.returncode == 0, direct.stderr
    assert direct.stdout == text.stdout


def test_training_starts_from_the_run_that_its_message_makes(tmp_path, letters):
    """Whether the config is that of the run to start from, or another."""
    path = write(tmp_path / "a file", HEADLINE, rounded_checkpoint(HEADLINE), {"max_steps": 9})
    out, text = tmp_path / "imported", tmp_path / "text.txt"
    text.write_text("bad cab fed a big hag\n" * 40, encoding="utf-8")
    flags = ("--dataset", text, "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "logs")
    flags += ("--runs_file", "", "--device", "cpu", "--max_steps", 2, "--block_size", 16)
    (tmp_path / "other.json").write_text(json.dumps({"dropout_mlp": 0.2}), encoding="utf-8")
    for config in ((), ("--config", tmp_path / "other.json")):
        line = error_line(*config, "--init_from", path, *flags)
        assert f"{path}: a published checkpoint; " in line
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "cache").exists()

    command = shlex.split(line.split("makes of it: ")[1].replace("RUN", shlex.quote(str(out))))
    assert run(*command[1:], "--tokenizer", letters).returncode == 0
    done = run("train.py", "--init_from", out, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    (trained,) = (tmp_path / "logs").iterdir()
    assert json.loads((trained / "config.json").read_text())["init_from"] == str(out)


def test_a_published_file_that_is_not_there_is_no_published_one(tmp_path):
    assert "nothing.pt: there is no such checkpoint" in error_line(
        "--init_from", tmp_path / "nothing.pt"
    )


def test_a_published_file_without_a_tokenizer_is_one_line(tmp_path):
    path = write(tmp_path, MINI, random_checkpoint(MINI))
    done = run("generate.py", "--checkpoint", path, "--num_tokens", 2)
    assert done.returncode == 2
    assert "--tokenizer NAME_OR_FOLDER" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_converted(tmp_path, value):
    tensors = random_checkpoint(MINI)
    for name in ("lm_head.weight", "token_embedding.weight"):  # which are tied
        tensors[name][1, 2] = value
    path = write(tmp_path / "published", MINI, tensors)
    with pytest.raises(UserError, match=r"1 of the [0-9,]+ values of \S+ are not finite"):
        convert(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["C", "layers", "mlp_expansion"])
def test_sizes_that_no_model_can_have_are_one_line(tmp_path, key):
    path = write(tmp_path, {**MINI, key: 1 << 60}, random_checkpoint(MINI))
    assert "config.json: no model of these sizes can be built" in refusal(path)


def test_gpt2_is_what_models_of_its_vocabulary_get(tmp_path):
    config = {**MINI, "C": 2, "layers": 1}
    tensors = random_checkpoint(config)
    tensors["lm_head.weight"] = tensors["token_embedding.weight"] = torch.zeros(50257, 2)
    path = write(tmp_path / "published", config, tensors)
    out = convert(path, tmp_path / "run")
    written = json.loads((out / "tokenizer" / "tokenizer.json").read_text())
    assert written == {"name": "gpt2"}
    assert wavelet_lm.load_model(out).vocab_size == 50257


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ("bytes", "the tokenizer bytes has 256 tokens"),
        ("gpt2", "the tokenizer gpt2 has 50257 tokens"),
        ("char", "give the folder that has it"),
        ("sentencepiece:99", "give the folder that has it"),
        ("bites", "unknown tokenizer 'bites'"),
    ],
)
def test_tokenizers_that_do_not_fit_leave_no_folder(tmp_path, tokenizer, said):
    path = write(tmp_path / "published", MINI, random_checkpoint(MINI))
    with pytest.raises(UserError, match=said):
        convert(path, tmp_path / "run", tokenizer)
    assert not (tmp_path / "run").exists()
