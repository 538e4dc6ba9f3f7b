import argparse
import dataclasses
import itertools
import shlex

import pytest
import torch

from tests.conftest import tiny_config
from wavelet_lm import UserError
from wavelet_lm.cli.generation_flags import build_parser, parse_options
from wavelet_lm.config import FIELDS
from wavelet_lm.inference.checks import MAX_SEED
from wavelet_lm.inference.completion import Strategy
from wavelet_lm.inference.declarations import FLAGS
from wavelet_lm.inference.generation_options import GenerationOptions
from wavelet_lm.inference.rows import Request
from wavelet_lm.inference.sampling.coherence import CoherenceOptions
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.text.prompts import Prompt
from wavelet_lm.quantization.options import QuantizationOptions

CONFIG = tiny_config(
    temperature=0.6, top_k=9, top_p=0.7, repetition_penalty=1.05, num_new_tokens=33
)
CONFIG_KEYS = ("temperature", "top_k", "top_p", "repetition_penalty", "threads")
ENDS = ("minimum", "maximum", "above", "choices")
CPU = torch.device("cpu")


def parse(line):
    return parse_options("", ["--checkpoint", "RUN", *shlex.split(line)])


def refused(line, config=CONFIG):
    with pytest.raises(UserError) as error:
        parse(line).strategy(config)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_unset_options_come_from_the_run():
    options = parse("")
    assert options.strategy(CONFIG) == Strategy(SamplingOptions(0.6, 9, 0.7, 1.05))
    assert options.requests(CONFIG) == [Request(1, 33)]
    assert options.read_prompts() == []
    assert options.decoding(CONFIG, CPU) == {"context": "auto", "dtype": None, "compile": False}


def test_given_options_win():
    options = parse(
        "--temperature 0 --top_k 0 --top_p 1 --repetition_penalty 2 --num_tokens 5 --seed 0 --n 2"
        " --stop a --stop 'b c' --ignore_eot --dtype bfloat16 --compile true --context window:7"
    )
    strategy = options.strategy(CONFIG)
    assert strategy == Strategy(SamplingOptions(0, 0, 1, 2), ignore_eot=True)
    assert options.requests(CONFIG) == [Request(s, 5, ("a", "b c")) for s in (0, 1)]
    how = {"context": "window:7", "dtype": torch.bfloat16, "compile": True}
    assert options.decoding(CONFIG, CPU) == how


def test_a_prompt_brings_its_own_options():
    options = parse("--n 2 --seed 4 --stop a")
    own = Prompt("x", seed=8, num_tokens=2, stop=())
    assert options.requests(CONFIG, own) == [Request(8, 2), Request(9, 2)]
    assert options.requests(CONFIG, Prompt("x")) == [Request(s, 33, ("a",)) for s in (4, 5)]


def test_no_two_texts_share_a_try():
    options = parse("--n 3 --best_of_n 4 --seed 2")
    assert options.requests(CONFIG) == [Request(seed, 33) for seed in (2, 6, 10)]


def test_every_strategy():
    strategy = parse(
        "--entropy_adaptive --entropy_temp_min 0.1 --entropy_temp_max 2 --best_of_n 3"
        " --wavelet_coherence --coherence_weight 0 --coherence_levels 2 --clean_spacing"
    ).strategy(CONFIG)
    sampling = SamplingOptions(0.6, 9, 0.7, 1.05, True, 0.1, 2)
    coherence = CoherenceOptions(0, 64, 2)
    assert strategy == Strategy(sampling, best_of_n=3, coherence=coherence, clean_spacing=True)
    lookahead = parse("--lookahead_k 3").strategy(CONFIG)
    assert (lookahead.lookahead_k, lookahead.lookahead_depth) == (3, 4)
    assert parse("--lookahead_k 3 --lookahead_depth 0").strategy(CONFIG).lookahead_depth == 0
    assert parse("--batch_size 3").strategy(CONFIG).batch_size == 3
    assert parse("--draft d").strategy(CONFIG).draft_tokens == 4
    assert parse("--draft d --draft_tokens 7").strategy(CONFIG).draft_tokens == 7


def test_the_preset_and_what_wins_over_it():
    preset = parse("--strategies")
    adaptive = SamplingOptions(0.6, 9, 0.85, 1.2, True, 0.3, 0.9)
    assert preset.strategy(CONFIG) == Strategy(adaptive, clean_spacing=True)
    code = CONFIG.replace(dataset="python-stdlib")
    assert preset.strategy(code) == Strategy(adaptive)
    assert parse("--strategies --clean_spacing").strategy(code).clean_spacing
    assert preset.metrics
    changed = parse("--strategies --top_p 0.5 --entropy_temp_max 1.1 --no_metrics")
    sampling = dataclasses.replace(adaptive, top_p=0.5, entropy_temp_max=1.1)
    assert changed.strategy(CONFIG).sampling == sampling
    assert not changed.metrics
    fixed = SamplingOptions(0.8, 9, 0.85, 1.2)
    assert parse("--strategies --temperature 0.8").strategy(CONFIG).sampling == fixed
    plain = parse("--strategies --no_entropy_adaptive --no_clean_spacing").strategy(CONFIG)
    assert plain == Strategy(dataclasses.replace(fixed, temperature=0.6))


def test_fast_weights_learn_where_the_flag_or_else_the_run_says_so():
    learning = CONFIG.replace(fwpkm_inference_updates=True)
    assert [parse("").adapts(config) for config in (CONFIG, learning)] == [False, True]
    assert parse("--fwpkm_inference_updates").adapts(CONFIG)
    assert not parse("--no_fwpkm_inference_updates").adapts(learning)
    without = tiny_config(fwpkm_enabled=False)
    assert "this model lacks" in refused("--fwpkm_inference_updates", without)
    for flags in ("--draft d", "--compile true", "--context recompute:9"):
        message = f"{flags.removesuffix(' d')} and fwpkm_inference_updates contradict each other"
        assert message in refused(flags, learning)
        assert message in refused(f"--fwpkm_inference_updates {flags}")
        parse(f"{flags} --no_fwpkm_inference_updates").strategy(learning)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("--temperature 1", "--entropy_adaptive"),
        ("--temperature 0", "--entropy_adaptive"),
        ("--lookahead_k 2", "--draft d"),
        ("--interactive", "--prompts f"),
        ("--interactive", "--n 2"),
        ("--interactive", "--json"),
        ("--save_state s", "--prompts f"),
    ],
)
def test_contradictions_name_both_flags(one, other):
    for line in (f"{one} {other}", f"{other} {one}"):
        flags = one.split()[0], other.split()[0]
        assert refused(line).startswith(f"{flags[0]} and {flags[1]} contradict each other: ")
    parse(one)
    parse(other)


def test_greedy_samples_are_all_one():
    for line, config in (("--temperature 0", CONFIG), ("", CONFIG.replace(temperature=0))):
        assert "--best_of_n and temperature 0" in refused(f"--best_of_n 2 {line}", config)
    adaptive = parse("--best_of_n 2 --entropy_adaptive").strategy(CONFIG.replace(temperature=0))
    assert not adaptive.sampling.greedy


@pytest.mark.parametrize(
    ("flag", "needed"),
    [
        ("entropy_temp_min 0.5", "entropy_adaptive"),
        ("entropy_temp_max 0.5", "entropy_adaptive"),
        ("lookahead_depth 0", "lookahead_k"),
        ("coherence_weight 0", "wavelet_coherence"),
        ("coherence_window 5", "wavelet_coherence"),
        ("coherence_levels 0", "wavelet_coherence"),
        ("draft_tokens 2", "draft"),
    ],
)
def test_a_part_needs_its_whole(flag, needed):
    assert f"is a part of --{needed}" in refused(f"--{flag}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--top_p 0", "top_p is 0.0; it must be between 1e-30 and 1"),
        ("--temperature -1", "temperature is -1.0; it must be between 0 and 1e+30"),
        ("--temperature hot", "--temperature"),
        ("--num_tokens 0", "num_tokens is 0; it must be 1 or more"),
        ("--num_tokens -1 --save_state f", "num_tokens is -1; it must be 0 or more"),
        ("--num_tokens 0 --save_state f --interactive", "it must be 1 or more"),
        ("--n 0", "n is 0"),
        ("--batch_size 0", "batch_size is 0"),
        ("--best_of_n 0", "best_of_n is 0"),
        ("--lookahead_k 0", "lookahead_k is 0"),
        ("--lookahead_k 2 --lookahead_depth -1", "lookahead_depth is -1"),
        ("--draft d --draft_tokens 0", "draft_tokens is 0"),
        (
            "--wavelet_coherence --coherence_levels 31",
            "coherence_levels is 31; it must be between",
        ),
        (
            "--wavelet_coherence --coherence_weight nan",
            "coherence_weight is nan; it must be a",
        ),
        (
            "--wavelet_coherence --coherence_weight 1e39",
            "coherence_weight is 1e+39; it must be",
        ),
        ("--top_p 1e-46", "top_p is 1e-46; it must be between 1e-30 and 1"),
        ("--repetition_penalty 1e-46", "repetition_penalty is 1e-46; it must be between 1e-30 and"),
        ("--entropy_adaptive --entropy_temp_min 0", "entropy_temp_min is 0.0"),
        ("--entropy_adaptive --entropy_temp_min 2", "entropy_temp_max is 1.5"),
        ("--seed -1", "seed is -1"),
        (f"--seed {MAX_SEED} --n 2", "with so many samples"),
        (f"--seed {MAX_SEED} --best_of_n 2", "with so many samples"),
        (f"--seed {MAX_SEED - 4} --best_of_n 2 --n 3", "with so many samples"),
        ("--stop ''", "stop is empty"),
        ("--context window:0", "context is 'window:0'"),
        ("--dtype int8", "dtype is 'int8'; it must be auto, float32, bfloat16 or float16"),
        ("--compile maybe", "compile is 'maybe'; it must be auto, true or false"),
        ("--prompt a --prompt_file b", "--prompt and --prompt_file both give the prompt"),
        ("--prompt '' --prompts b", "--prompt and --prompts both give the prompt"),
        ("--interactive --prompt_file -", "both read standard input"),
        ("--best_of 3", "unknown option --best_of; did you mean --best_of_n?"),
        ("--seed 3 words", "'words' and --checkpoint 'RUN' both name the run; give one"),
    ],
)
def test_mistakes_are_one_line(line, words):
    assert words in refused(line)


def test_a_prompts_own_seed_leaves_room_for_all_samples():
    prompt = Prompt("x", seed=MAX_SEED)
    assert parse("").requests(tiny_config(), prompt)[0].seed == MAX_SEED
    with pytest.raises(UserError, match="with so many samples it passes"):
        parse("--n 2").requests(tiny_config(), prompt)


def test_reading_alone_and_the_largest_seed_are_allowed():
    assert parse("--num_tokens 0 --save_state f").requests(CONFIG) == [Request(1, 0)]
    assert parse(f"--seed {MAX_SEED}").seed == MAX_SEED


def test_prompts_come_from_a_flag_or_a_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    assert parse("--prompt ''").read_prompts() == [Prompt("")]
    assert parse(f"--prompt_file {file}").read_prompts() == [Prompt("a\nb\n")]
    assert parse(f"--prompts {file}").read_prompts() == [Prompt("a"), Prompt("b")]


def test_help_names_every_flag_with_its_meaning():
    parser = build_parser("")
    options = dataclasses.fields(GenerationOptions), dataclasses.fields(QuantizationOptions)
    fields = {field.name for field in itertools.chain(*options)} - {"quantization"}
    hidden = ("help", "first", argparse.SUPPRESS)
    actions = [action for action in parser._actions if action.dest not in hidden]
    assert {action.dest for action in actions} == fields
    shown = {action.dest for action in actions if action.help and action.help != "==SUPPRESS=="}
    assert shown == fields
    assert parser.format_help()


def test_a_flag_has_the_range_of_what_it_sets():
    sampling = {spec.name: spec for spec in dataclasses.fields(SamplingOptions)}
    for name, flag in FLAGS.items():
        assert flag.group
        assert flag.part_of is None or flag.part_of in FLAGS
        if name in sampling:
            limits = sampling[name].metadata["option"]
            assert all(getattr(flag, end) == getattr(limits, end) for end in ENDS)
    for name in CONFIG_KEYS:
        limits = FIELDS[name].metadata["option"]
        assert FLAGS[name].meaning == limits.meaning
        assert all(getattr(FLAGS[name], end) == getattr(limits, end) for end in ENDS)


def test_auto_compiles_long_texts_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: True)
    gpu = torch.device("cuda")
    for line, compiles in (
        ("--num_tokens 100", False),
        ("--num_tokens 5000", True),
        ("--interactive", True),
        ("--num_tokens 5000 --fwpkm_inference_updates", False),
        ("--num_tokens 5000 --compile false", False),
        ("--num_tokens 5 --compile true", True),
    ):
        assert parse(line).decoding(CONFIG, gpu)["compile"] is compiles
        assert parse(line).decoding(CONFIG, gpu)["dtype"] == torch.bfloat16
    assert parse("--dtype float32").decoding(CONFIG, gpu)["dtype"] == torch.float32
