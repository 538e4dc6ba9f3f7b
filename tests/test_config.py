"""Options: JSON and flags in, one-line errors out, presets and reference in step with the code."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import tiny_config
from wavelet_lm.cli.flags import OneLineParser, add_config_flags, parse_flags
from wavelet_lm.config import FIELDS, GROUPS, Config, ConfigError, ModelConfig, keys_read_by
from wavelet_lm.config_reference import reference
from wavelet_lm.errors import UserError
from wavelet_lm.models.registry import build_model, n_params

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
        ({"top_p": 0}, ["top_p", ">= 1e-30"]),
        ({"split": [0.9, 0.2, 0.1]}, ["split", "sum to 1"]),
        ({"split": [1.0, 0.0, 0.0]}, ["split"]),
        ({"split": "0.9"}, ["split", "list"]),
        ({"repeated_passages": 1.5}, ["repeated_passages", "<= 1"]),
        ({"carry_state": True}, ["carry_state", "data_order is random", "sequential"]),
        (
            {"carry_state": True, "data_order": "sequential", "model": "gpt"},
            ["carry_state", "model gpt", "grows"],
        ),
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
        ({"quantize_mlp_bits": 3}, ["quantize_mlp_bits", "2 | 4 | 8 | 16"]),
        ({"mixer_depth_residuals": True}, ["mixer_depth_residuals", "mixer_depth"]),
        ({"multi_basis_lifting": True}, ["multi_basis_lifting", "shared_lifting_weights"]),
        ({"multinodal_cross_cell_gating": True}, ["gating", "multinodal_enabled"]),
        (
            {"multinodal_enabled": True, "multinodal_cell_dim": 9, "pkm_heads": 4},
            ["multinodal_cell_dim", "pkm_heads"],
        ),
        ({"wavelet_packets": True}, ["6 entries", "with wavelet_packets makes 32 scales", "none"]),
        ({"wavelet_packets": True, "levels": 7}, ["wavelet_packets", "levels is 7", "6 or less"]),
        (
            {"delta_memory": True, "delta_activation": "square", "delta_key_dim": 513},
            ["delta_activation square", "delta_key_dim is 513", "512 or less"],
        ),
        (
            {"wavelet_mode": "haar", "wavelet_crawl": False, "lifting_data_dependent": 4},
            ["haar", "set lifting_data_dependent to 0"],
        ),
        ({"hadamard_top_k": 65, "C": 33}, ["hadamard_top_k", "64 coefficients"]),
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
    add_config_flags(parser, ["--help-all"])
    text = parser.format_help()
    for key in FIELDS:
        assert f"--{key} " in text or f"--{key}\n" in text


def shown(*arguments: str) -> set[str]:
    """The keys that `--help` shows beside these arguments."""
    parser = OneLineParser()
    add_config_flags(parser, ["--help", *arguments])
    text = parser.format_help()
    assert text.index("--dataset") < text.index("--data_order"), "common options come first"
    return {key for key in FIELDS if re.search(rf"--{key}\b", text)}


def test_help_shows_what_the_model_and_the_command_read(tmp_path):
    file = tmp_path / "gpt.json"
    file.write_text('{"model": "gpt"}')
    wavelets = shown("--model", "wavelet_lm")
    assert {"levels", "pkm_num_keys", "lr"} <= wavelets
    assert not {"heads", "wavelet_fraction", "quantize_bits", "num_new_tokens"} & wavelets
    for chosen in (["--model=gpt"], ["--config", str(file)]):
        gpt = shown(*chosen)
        assert {"heads", "C", "lr"} <= gpt
        assert not {"levels", "wavelet_fraction"} & gpt
    assert "wavelet_fraction" in shown("--model", "wavelet_gpt:haar")


@pytest.mark.parametrize("model", ["gpt", "wavelet_gpt"])
def test_the_keys_that_a_model_reads_are_those_that_it_asks_for(model):
    asked = set()

    class Watched(Config):
        def __getattribute__(self, name):
            asked.add(name)
            return super().__getattribute__(name)

    values = {"C": 16, "layers": 2, "heads": 2, "head_hidden": 8, "block_size": 8}
    config = Watched(**values, model=model, wavelet_module="learnable" if "w" in model else "haar")
    asked.clear()  # of the checks
    network = build_model(config, 11)
    network.loss(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))
    keys = asked & {field.name for field in dataclasses.fields(ModelConfig)}
    assert keys - {"multinodal_enabled"} == keys_read_by(model)


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


# --- what keys cost -------------------------------------------------------------------------------

MODEL_KEYS = [spec.name for spec in dataclasses.fields(GROUPS["model"])]
COSTS = {key: spec.metadata["option"].cost for key, spec in FIELDS.items()}
# Costs in words: these keys change how often everything else is there.
IN_WORDS = {
    "model",
    "gpt_mlp_expansion",
    "head_hidden",
    "wavelet_module",
    "wavelet_shared_kernels",
    "C",
    "layers",
    "levels",
    "mixer_transform",
    "wavelet_packets",
    "looped_blocks",
    "multinodal_enabled",
    "multinodal_num_cells",
    "multinodal_cell_dim",
}
OTHER_VALUES = {
    "lifting_hidden_mult": [2, 3],
    "wavelet_crawl_k": [5, 9],
    "multi_basis_inits": [("zero",), ("haar", "zero", "random")],
    "per_scale_mixer_widths": [None, (0.5, 1, 0.25, 0.1)],
    "low_rank": [0, 2],
    "mixer_depth": [1, 3],
    "gradient_checkpointing": [1, True],
    "mlp_expansion": [1, 3],
    "mlp_layers": [3, 4],
    "delta_bands": [0, 2, 3],
    "delta_horizons": [(2, 500)],
    "embedding_std": [0.02],
    "multinodal_cross_cell_gate_interval": [1, 2],
    **{f"{memory}_num_keys": [9, 64] for memory in ("pkm", "fwpkm")},
    **{f"{memory}_heads": [1, 2, 3] for memory in ("pkm", "fwpkm")},
    **{f"{memory}_top_k": [1, 2] for memory in ("pkm", "fwpkm")},
}
# Every key is tried in each of these surroundings that allow it.
SURROUNDINGS = [
    {},
    {"wavelet_packets": True, "per_scale_mixer_widths": None, "lifting_data_dependent": 3},
    {"wavelet_crawl": False},
    {"C": 12, "shared_lifting_weights": False},
    {"C": 12, "delta_memory": True, "delta_key_dim": 5, "mixer_transform": "fwht"},
    {"layers": 3, "untied_reconstruction": True, "lifting_hidden_mult": 2},
    {"multi_basis_lifting": True, "shared_lifting_weights": False, "wavelet_crawl": False},
    {"mixer_depth": 3, "mixer_depth_stabilizers": True, "cross_scale_gating": False},
    {"mixer_exp_parametrization": True, "looped_blocks": True, "mlp_layers": 3},
    {"lifting_linear_only": True, "mixer_transform": "identity", "C": 12, "mixer_depth": 2},
    {"multinodal_enabled": True, "multinodal_cell_dim": 12, "multinodal_num_cells": 1},
    {
        "multinodal_enabled": True,
        "multinodal_cell_dim": 12,
        "multinodal_num_cells": 2,
        "multinodal_cross_cell_gating": True,
        "layers": 4,
    },
]
V = 13
# Numbers that formulas call by their keys.
NUMBERS = ("layers", "low_rank", "mlp_layers", "lifting_data_dependent", "delta_bands")


def symbols(c: Config, key: str) -> dict:
    """The formulas' symbols as docs/config.md defines them."""
    C = c.multinodal_cell_dim if c.multinodal_enabled else c.C
    Cp = c.replace(C=C).padded_channels
    N = 1 if c.looped_blocks else c.layers
    h = c.lifting_hidden_mult
    B = len(c.multi_basis_inits)
    w = c.replace(C=C).mixer_widths
    M = sum(
        (2 if c.use_mixer_gate else 1) * x * x
        + 2 * c.low_rank * x
        + (2 * Cp * x if x < Cp else 0)
        + (x if c.mixer_exp_parametrization else 0)
        for x in w
    )
    memory = key.split("_")[0]
    return {
        **{name: getattr(c, name) for name in NUMBERS},
        "C": C,
        "Cp": Cp,
        "N": N,
        "h": h,
        "B": B,
        "M": M,
        "V": V,
        "L": c.levels,
        "S": 2**c.levels if c.wavelet_packets else c.levels + 1,
        "D": c.mixer_depth,
        "E": c.mlp_expansion,
        "P": (Cp * Cp + Cp if c.lifting_linear_only else 2 * h * Cp * Cp + (h + 1) * Cp)
        + 3 * c.lifting_data_dependent * Cp,
        "n": 3 if c.untied_reconstruction else 2,
        "K": c.wavelet_crawl_k if c.wavelet_crawl else 0,
        "W": 1 if c.shared_lifting_weights else N * B if c.multi_basis_lifting else N,
        "Σw": sum(w),
        "Σww": sum(x * x for x in w),
        "k": getattr(c, f"{memory}_num_keys", 0),
        "heads": getattr(c, f"{memory}_heads", 0),
        "Hd": c.delta_heads,
        "dk": c.delta_key_dim,
        "dv": c.delta_value_dim,
        "interval": c.multinodal_cross_cell_gate_interval,
        "sqrt": math.isqrt,
    }


def formula_value(c: Config, key: str) -> int:
    formula = COSTS[key].removeprefix("lifting: ").removeprefix("with gating ")
    formula = re.sub(r"√(\w+)", r"sqrt(\1)", formula.replace("Σ(w²)", "Σww"))
    formula = re.sub(r"⌊(.*?) / (.*?)⌋", r"(\1 // \2)", formula)
    for sign, python in {"·": "*", "²": "**2", "−": "-"}.items():
        formula = formula.replace(sign, python)
    return eval(formula, {"__builtins__": {}}, symbols(c, key))


@functools.cache
def size(c: Config) -> int:
    return n_params(build_model(c, V))  # so small that the meta device would only cost time


def cost_in(c: Config, key: str) -> int:
    """What the reference says: a switch costs when it is on, a number by its value."""
    unread = {
        "lifting_hidden_mult": c.lifting_linear_only,
        "multi_basis_inits": not c.multi_basis_lifting,
        **dict.fromkeys(("delta_heads", "delta_key_dim", "delta_value_dim"), not c.delta_memory),
        **dict.fromkeys(("delta_bands", "delta_after_mixing"), not c.delta_memory),
        "multinodal_cross_cell_gate_interval": not c.multinodal_cross_cell_gating,
    }
    if not COSTS[key] or unread.get(key) or getattr(c, key) in (False, "haar"):
        return 0
    cells = c.multinodal_num_cells if c.multinodal_enabled and "multinodal" not in key else 1
    return cells * formula_value(c, key)


def values_to_try(key: str) -> list:
    spec = FIELDS[key]
    choices = spec.metadata["option"].choices
    if spec.type == "bool":
        return [False, True]
    if key in OTHER_VALUES:
        return [getattr(tiny_config(), key), *OTHER_VALUES[key]]
    if choices:
        return list(choices)
    return [spec.default, 2 if spec.type == "int" else 0.5]


@pytest.mark.parametrize("key", [k for k in MODEL_KEYS if k not in IN_WORDS])
def test_what_a_key_costs(key):
    """The difference that the formula makes is the difference of two models."""
    n_compared = 0
    for surroundings in SURROUNDINGS if COSTS[key] else SURROUNDINGS[::-4]:
        allowed = []
        for value in values_to_try(key):
            with contextlib.suppress(ConfigError):
                allowed.append(tiny_config(**{**surroundings, key: value}))
        for a, b in itertools.pairwise(allowed):
            assert size(b) - size(a) == cost_in(b, key) - cost_in(a, key), surroundings
            n_compared += 1
    assert n_compared or key == "model"


def test_only_what_changes_the_model_has_a_cost():
    assert {key for key, cost in COSTS.items() if cost} <= set(MODEL_KEYS)
    assert all(COSTS[key] for key in IN_WORDS)
