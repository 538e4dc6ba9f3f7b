"""Options: JSON and flags in, one-line errors out, presets and reference in step with the code."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.config import (
    FIELDS,
    Config,
    ConfigError,
    OneLineParser,
    add_config_flags,
    parse_flags,
)
from wavelet_lm.config_reference import reference
from wavelet_lm.errors import UserError

ROOT = Path(__file__).parents[1]


def flags(*arguments: str) -> dict:
    parser = OneLineParser()
    add_config_flags(parser)
    return parse_flags(parser, list(arguments))


@pytest.mark.parametrize("path", [ROOT / "config.json", *sorted((ROOT / "configs").glob("*.json"))])
def test_presets_are_valid_and_survive_a_round_trip(path, tmp_path):
    config = Config.from_json(path)
    copy = tmp_path / "copy.json"
    copy.write_text(config.to_json())
    assert Config.from_json(copy) == config


def test_every_key_has_a_meaning_and_an_allowed_default():
    Config()
    for spec in FIELDS.values():
        assert len(spec.metadata["option"].meaning) > 5, spec.name


@pytest.mark.parametrize(
    "values, words",
    [
        ({"layer": 3}, ["unknown key 'layer'", "layers"]),
        ({"dropout_mpl": 0}, ["dropout_mlp"]),
        ({"zzzzz": 0}, ["unknown key 'zzzzz'"]),
        ({"lr": "fast"}, ["lr", "'fast'", "number"]),
        ({"lr": True}, ["lr", "number"]),
        ({"lr": float("nan")}, ["lr", "number"]),
        ({"lr": 0}, ["lr", "> 0"]),
        ({"layers": 2.5}, ["layers", "whole number"]),
        ({"layers": 0}, ["layers", ">= 1"]),
        ({"wavelet_crawl": 1}, ["wavelet_crawl", "true or false"]),
        ({"optimizer": "SGD"}, ["optimizer", "Adagrad | AdamW"]),
        ({"compile": 1}, ["compile"]),
        ({"compile": "maybe"}, ["compile", "auto | true | false"]),
        ({"top_p": 0}, ["top_p", "> 0"]),
        ({"split": [0.9, 0.2, 0.1]}, ["split", "sum to 1"]),
        ({"split": [1.0, 0.0, 0.0]}, ["split"]),
        ({"split": "0.9"}, ["split", "list"]),
        ({"per_scale_mixer_widths": []}, ["per_scale_mixer_widths", "list"]),
        ({"per_scale_mixer_widths": [1, 1]}, ["per_scale_mixer_widths", "levels"]),
        ({"per_scale_mixer_widths": [0] * 6}, ["per_scale_mixer_widths", "> 0"]),
        ({"wavelet_crawl_k": 4}, ["wavelet_crawl_k", "odd"]),
        ({"wavelet_crawl_k": 1}, ["wavelet_crawl_k", ">= 3"]),
        ({"use_mixer_gate": False}, ["use_mixer_gate", "cross_scale_gating"]),
        ({"wavelet_mode": "haar"}, ["wavelet_mode", "wavelet_crawl"]),
        ({"skip_proj_out": True, "C": 48}, ["skip_proj_out", "mixer_transform"]),
        ({"pkm_num_keys": 1000}, ["pkm_num_keys", "square"]),
        ({"C": 30, "pkm_heads": 4}, ["pkm_heads", "divisible"]),
        ({"min_lr": 1}, ["min_lr", "lr"]),
        ({"benchmark_only": True}, ["benchmark_only", "benchmark_run_dir"]),
        ({"quantize_enabled": True}, ["quantize_enabled", "false"]),
        ({"mixer_depth_residuals": True}, ["mixer_depth_residuals", "mixer_depth"]),
        ({"multi_basis_lifting": True}, ["multi_basis_lifting", "shared_lifting_weights"]),
        ({"multinodal_cross_cell_gating": True}, ["gating", "multinodal_enabled"]),
        (
            {"multinodal_enabled": True, "multinodal_cell_dim": 9, "pkm_heads": 4},
            ["multinodal_cell_dim", "pkm_heads"],
        ),
        ({"seed": -1}, ["seed"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(values, words):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_disabled_parts_are_not_checked():
    Config(pkm_enabled=False, pkm_num_keys=1000)
    Config(wavelet_crawl=False, wavelet_crawl_k=4)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--lr", "0.02", "--layers", "3"], {"lr": 0.02, "layers": 3}),
        (["--dropout_mlp=0"], {"dropout_mlp": 0.0}),
        (["--wavelet_crawl"], {"wavelet_crawl": True}),
        (["--wavelet_crawl", "false"], {"wavelet_crawl": False}),
        (["--no_wavelet_crawl"], {"wavelet_crawl": False}),
        (["--compile", "auto"], {"compile": "auto"}),
        (["--compile"], {"compile": True}),
        (["--per_scale_mixer_widths", "1,1,.5"], {"per_scale_mixer_widths": (1, 1, 0.5)}),
        (["--per_scale_mixer_widths", "none"], {"per_scale_mixer_widths": None}),
        (["--max_steps", "none"], {"max_steps": None}),
        (["--multi_basis_inits", "haar, zero"], {"multi_basis_inits": ("haar", "zero")}),
        (["--weight_decay", "1e-6"], {"weight_decay": 1e-6}),
        (["--dataset", "none"], {"dataset": "none"}),
        ([], {}),
    ],
)
def test_flags(arguments, expected):
    assert flags(*arguments) == expected


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lrr", "1"], ["--lrr", "--lr"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--lr", "fast"], ["--lr", "'fast'", "number"]),
        (["--layers", "3.5"], ["--layers", "whole number"]),
        (["--use_amp", "perhaps"], ["--use_amp", "true or false"]),
        (["stray"], ["stray", "--key value"]),
    ],
)
def test_mistaken_flags(arguments, words):
    with pytest.raises(UserError) as caught:
        flags(*arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_every_key_is_a_flag_and_in_help(capsys):
    parser = OneLineParser()
    add_config_flags(parser)
    text = parser.format_help()
    for key in FIELDS:
        assert f"--{key} " in text or f"--{key}\n" in text


@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=6))
def test_no_text_makes_a_flag_crash(key, text):
    try:
        Config.from_dict(flags(f"--{key}={text}"))
    except UserError as error:
        assert "\n" not in str(error).replace(repr(text), "").replace(text, "")


@given(
    st.dictionaries(
        st.sampled_from(sorted(FIELDS)),
        st.none()
        | st.booleans()
        | st.floats()
        | st.integers()
        | st.text(max_size=4)
        | st.lists(st.floats(0, 1) | st.text(max_size=2), max_size=4),
        max_size=3,
    )
)
def test_no_json_makes_a_config_crash(values):
    try:
        config = Config.from_dict(values)
    except ConfigError:
        return
    assert Config.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", ["line 1"]),
        (b"[1]", ["list"]),
        (b'{"lr": 1}\xff', ["UTF-8", "byte 9"]),
        (b'{"lr": "x"}', ["lr"]),
    ],
)
def test_broken_files_are_named(tmp_path, content, words):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Config.from_json(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json"):
        Config.from_json(tmp_path / "nowhere.json")


def test_overrides_win():
    config = Config.from_json(ROOT / "config.json", lr=0.5, layers=7)
    assert (config.lr, config.layers, config.C) == (0.5, 7, 2048)


def test_the_reference_is_current():
    """`python -m wavelet_lm.config_reference > docs/config.md` after a change of the options."""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == reference()
