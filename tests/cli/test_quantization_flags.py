"""What the `--ptq…` flags, a run's config and its state make of each other."""

import argparse

import pytest
import torch

from tests.conftest import tiny_config
from wavelet_lm import Config, UserError, build_model
from wavelet_lm.cli.quantization_flags import add_quantization_flags, quantization_options
from wavelet_lm.data.tokenizers import CharTokenizer
from wavelet_lm.fusion.fuse import COMPONENTS
from wavelet_lm.quantization.options import CALIBRATION_WINDOWS, QuantizationOptions
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme

V = 11


def typed(*arguments):
    parser = argparse.ArgumentParser()
    add_quantization_flags(parser)
    return quantization_options(vars(parser.parse_args(arguments)))


def scheme_of(*arguments, **config):
    return typed(*arguments).scheme(build_model(tiny_config(**config), V), "RUN")


def refusal(*arguments, **config):
    with pytest.raises(UserError) as caught:
        scheme_of(*arguments, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_quantized_unless_it_is_asked_for():
    assert scheme_of() is None
    assert scheme_of("--no_ptq8") is None
    assert scheme_of(quantize_bits=4) is None  # of a run that may be quantized some day
    for flags in (("--ptq8",), ("--quantize",)):
        assert scheme_of(*flags) == Scheme(bits=dict.fromkeys(COMPONENTS, 8), group_size=64)


def test_a_run_may_ask_for_it_and_flags_win():
    asking = {"quantize_enabled": True, "quantize_bits": 4, "quantize_mlp_bits": 2}
    four = dict.fromkeys(COMPONENTS, 4) | {"mlp": 2}
    assert scheme_of(**asking).bits == four
    assert scheme_of("--no_ptq8", **asking) is None
    assert scheme_of("--ptq_lifting_bits", "16", **asking).bits == four | {"lifting": 16}
    given = scheme_of("--ptq_bits", "8", "--ptq_mlp_bits", "16", "--ptq_group_size", "32", **asking)
    assert given.bits == dict.fromkeys(COMPONENTS, 8) | {"mlp": 16}
    assert given.group_size == 32


@pytest.mark.parametrize("component", [c for c in COMPONENTS if c != "rest"])
def test_every_component_has_a_flag(component):
    assert scheme_of("--ptq8", f"--ptq_{component}_bits", "2").bits == {
        name: 2 if name == component else 8 for name in COMPONENTS
    }


def test_parts_of_ptq8_need_it():
    words = "--ptq_mlp_bits is a part of --ptq8; give that too"
    assert refusal("--ptq_mlp_bits", "4") == words
    assert refusal("--no_ptq8", "--ptq_mlp_bits", "4", quantize_enabled=True) == words
    assert "--ptq_calibrate is a part of --ptq8" in refusal("--ptq_calibrate", "a.txt")


def test_what_is_quantized_is_not_quantized_again():
    quantized_model = quantize(
        build_model(tiny_config(quantize_enabled=True), V).eval(), Scheme.uniform(8)
    )
    assert typed().scheme(quantized_model, "RUN8") is None
    assert typed("--no_ptq8").scheme(quantized_model, "RUN8") is None
    for flags, name in ((("--ptq8",), "ptq8"), (("--ptq8", "--ptq_bits", "4"), "ptq_bits")):
        with pytest.raises(UserError, match=f"RUN8 is quantized already; leave out --{name}"):
            typed(*flags).scheme(quantized_model, "RUN8")


def test_calibrating_needs_few_bits():
    flags = ("--ptq8", "--ptq_calibrate", "a.txt")
    assert "is for weights of 2 or 4 bits, and there are none" in refusal(*flags)
    assert scheme_of(*flags, "--ptq_mlp_bits", "4").calibrated
    words = "torchao rounds without a calibration text"
    low = ("--ptq_bits", "4", "--ptq_backend", "torchao")
    assert words in refusal(*flags, *low)


def test_values_that_there_are_none_of_are_refused(capsys):
    for flags in (("--ptq_bits", "3"), ("--ptq_group_size", "48"), ("--ptq_backend", "gguf")):
        with pytest.raises(SystemExit):
            typed("--ptq8", *flags)
        assert "invalid choice" in capsys.readouterr().err


def test_windows_of_a_calibration_text_are_spread_over_it(tmp_path):
    tokenizer, config = CharTokenizer("\nabcdefghij"), Config(block_size=4)
    file = tmp_path / "text.txt"

    def windows(text):
        file.write_text(text, encoding="utf-8")
        return QuantizationOptions(ptq_calibrate=str(file)).calibration(config, tokenizer)

    assert typed().calibration(config, tokenizer) is None
    texts = [tokenizer.decode(w) for w in windows("abcdefghij").tolist()]
    assert texts == ["abcd", "ghij"]
    assert windows("abcd").shape == (1, 4)
    many = windows("abcdefghij" * 1000)
    assert many.shape == (CALIBRATION_WINDOWS, 4)
    assert many.dtype == torch.int64
    with pytest.raises(UserError, match=r"text.txt has 3 tokens; calibrating needs 4 \(block_size"):
        windows("abc")
    with pytest.raises(UserError, match=r"text.txt has 0 tokens"):
        windows("")
    with pytest.raises(UserError, match=r"nowhere.txt"):
        typed("--ptq_calibrate", "nowhere.txt").calibration(config, tokenizer)


def test_schemes_describe_themselves():
    mixed = ("--ptq8", "--ptq_bits", "4", "--ptq_embedding_bits", "8", "--ptq_calibrate", "a.txt")
    assert scheme_of("--ptq8").describe() == "8-bit weights"
    assert scheme_of(*mixed).describe() == "4-bit weights (embedding 8), calibrated"
    for flags in (("--ptq8",), mixed):
        scheme = scheme_of(*flags)
        assert Scheme.from_json(scheme.to_json(), "file") == scheme
