"""The options of `generate.py`, once: type, default, range, meaning and where they belong.

The parser and its help, the checks and their error lines, and the options of an `Engine` all come
from here; what they come to is `generation_options.py`'s.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from wavelet_lm.config import GenerationConfig, Option, TrainingConfig
from wavelet_lm.inference.checks import MAX_SEED
from wavelet_lm.inference.completion import Strategy
from wavelet_lm.inference.sampling.coherence import CoherenceOptions
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.quantization.options import QuantizationOptions

# What --strategies stands for; every flag that is given as well wins over it. Spacing is cleaned
# only for a run that was trained on text which has it (`is_spaced_apart`).
STRATEGIES = {
    "entropy_adaptive": True,
    "entropy_temp_max": 0.9,
    "top_p": 0.85,
    "repetition_penalty": 1.2,
    "metrics": True,
}
PRESET = ", ".join(f"{key} {value}".removesuffix(" True") for key, value in STRATEGIES.items())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# On a GPU, `auto` compiles from this many tokens on: it takes about as long as they do.
COMPILED_FROM = 1024

# The groups of the help.
PROMPT = (
    "the prompt (one of these; without any, what is piped in, else the run's generation_prompt)"
)
LENGTH = "how much"
SAMPLING = "sampling, in this order"
STRATEGY = "strategies"
COMPUTED = "how it is computed"
OUTPUT = "output"

THE_RUNS = "the run's"


@dataclass(frozen=True)
class Flag(Option):
    """An `Option` that is typed, with what a command line and an engine know of it besides.

    Attributes:
        group: the heading of the help that it stands under.
        metavar: what the help says for its value, where that is no number.
        part_of: the flag without which it means nothing.
        otherwise: what it is where it is not given, if that is not the default of the field.
        per_text: an `Engine` takes it with each text.
    """

    group: str = ""
    metavar: str | None = None
    part_of: str | None = None
    otherwise: Any = None
    per_text: bool = False


def flag(default: Any, meaning: str, **declaration: Any) -> Any:
    """A field with its `Flag`."""
    return field(default=default, metadata={"option": Flag(meaning, **declaration)})


def flag_for(owner: type, name: str, default: Any = None, **declaration: Any) -> Any:
    """A field with a flag for an option that `owner` declares, whose default it is otherwise."""
    spec = owner.__dataclass_fields__[name]
    known = {f.name: getattr(spec.metadata["option"], f.name) for f in dataclasses.fields(Option)}
    return flag(default, **{**known, "otherwise": spec.default, **declaration})


@dataclass(frozen=True, kw_only=True)
class DeclaredOptions:
    """What was typed. None: not given, and the default (or the run's config) decides."""

    checkpoint: str

    prompt: str | None = flag(None, "text to continue; may be empty", group=PROMPT, metavar="TEXT")
    prompt_file: str | None = flag(
        None, "a UTF-8 file; - = standard input", group=PROMPT, metavar="FILE"
    )
    prompts: str | None = flag(
        None,
        "a batch: one prompt a line, or in a .jsonl file one object a line, with prompt and,"
        " if you like, seed, num_tokens and stop; writes JSON lines in the same order",
        group=PROMPT,
        metavar="FILE",
    )
    interactive: bool = flag(
        False,
        "ask for line after line and continue each; what was said stays known. An empty line"
        " or Ctrl-D ends, Ctrl-C stops an answer. A prompt that is given is read first",
        group=PROMPT,
    )
    save_state: str | None = flag(
        None,
        "keep what the model remembers of the prompt (of the conversation, with"
        " --interactive); --num_tokens 0 only reads",
        group=PROMPT,
        metavar="FILE",
    )
    load_state: str | None = flag(
        None,
        "go on from there: a prompt follows the text that was read; needs the same model,"
        " context and dtype",
        group=PROMPT,
        metavar="FILE",
    )

    num_tokens: int | None = flag(
        None,
        "most tokens of a text, any number",
        group=LENGTH,
        minimum=0,
        otherwise=THE_RUNS,
    )
    stop: tuple[str, ...] = flag(
        (), "end before this text, as it is shown; can be repeated", group=LENGTH, metavar="TEXT"
    )
    ignore_eot: bool = flag(False, "go on after an end of text", group=LENGTH, per_text=True)
    n: int = flag(1, "samples of a prompt", group=LENGTH, minimum=1)
    seed: int = flag(
        1,
        "of the first sample; sample i is the run with seed + i, with --best_of_n B that with"
        " seed + i * B",
        group=LENGTH,
        minimum=0,
        maximum=MAX_SEED,
    )
    batch_size: int = flag(
        Strategy.batch_size, "texts that are written side by side", group=LENGTH, minimum=1
    )

    repetition_penalty: float | None = flag_for(
        GenerationConfig, "repetition_penalty", group=SAMPLING, otherwise=THE_RUNS, per_text=True
    )
    temperature: float | None = flag_for(
        GenerationConfig, "temperature", group=SAMPLING, otherwise=THE_RUNS, per_text=True
    )
    top_k: int | None = flag_for(
        GenerationConfig, "top_k", group=SAMPLING, otherwise=THE_RUNS, per_text=True
    )
    top_p: float | None = flag_for(
        GenerationConfig, "top_p", group=SAMPLING, otherwise=THE_RUNS, per_text=True
    )

    strategies: bool = flag(
        False,
        f"a good set at once: {PRESET}, and clean_spacing for a run trained on WikiText; any"
        " flag that is given as well wins",
        group=STRATEGY,
        per_text=True,
    )
    entropy_adaptive: bool | None = flag_for(
        SamplingOptions, "entropy_adaptive", group=STRATEGY, per_text=True
    )
    entropy_temp_min: float | None = flag_for(
        *(SamplingOptions, "entropy_temp_min"),
        group=STRATEGY,
        part_of="entropy_adaptive",
        per_text=True,
    )
    entropy_temp_max: float | None = flag_for(
        *(SamplingOptions, "entropy_temp_max"),
        group=STRATEGY,
        part_of="entropy_adaptive",
        per_text=True,
    )
    lookahead_k: int | None = flag(
        None,
        "roll out each of the N likeliest next tokens and draw among them: the likelier its"
        " way, the more often",
        group=STRATEGY,
        minimum=1,
        per_text=True,
    )
    lookahead_depth: int | None = flag(
        None,
        "tokens that each is rolled out for, greedily",
        group=STRATEGY,
        part_of="lookahead_k",
        minimum=0,
        otherwise=4,
        per_text=True,
    )
    best_of_n: int = flag(
        1,
        "for each text write N, with seeds of their own, and keep the one of the highest mean"
        " log-probability",
        group=STRATEGY,
        minimum=1,
        per_text=True,
    )
    wavelet_coherence: bool = flag(
        False,
        "lower top_p, to 0.3 at least, as the text drifts from the topic of its prompt",
        group=STRATEGY,
        per_text=True,
    )
    coherence_weight: float | None = flag_for(
        CoherenceOptions, "weight", group=STRATEGY, part_of="wavelet_coherence", per_text=True
    )
    coherence_window: int | None = flag_for(
        CoherenceOptions, "window", group=STRATEGY, part_of="wavelet_coherence", per_text=True
    )
    coherence_levels: int | None = flag_for(
        CoherenceOptions, "levels", group=STRATEGY, part_of="wavelet_coherence", per_text=True
    )
    fwpkm_inference_updates: bool | None = flag(
        None,
        "let the fast weights of the second memory learn from what is written",
        group=STRATEGY,
        otherwise=THE_RUNS,
    )

    draft: str | None = flag(
        None,
        "a much smaller model with the same tokenizer that proposes tokens, several of which"
        " the model then reads at once; the distribution of the text is the same",
        group=COMPUTED,
        metavar="CHECKPOINT",
    )
    draft_tokens: int | None = flag(
        None,
        "tokens that it proposes at once",
        group=COMPUTED,
        part_of="draft",
        minimum=1,
        otherwise=Strategy.draft_tokens,
        per_text=True,
    )
    context: str = flag(
        "auto",
        "what a token sees of the past: stream, all; window:N, with a running mean of the last"
        " N positions; recompute:N, the last N tokens read anew each time (slow); auto, a window of"
        " the run's block_size",
        group=COMPUTED,
        metavar="WHAT",
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N", group=COMPUTED)
    threads: int | str = flag_for(TrainingConfig, "threads", "auto", group=COMPUTED)
    dtype: str = flag(
        "auto",
        "float32, bfloat16, float16 or auto: bfloat16 on a GPU that has it, else the"
        " checkpoint's, float32",
        group=COMPUTED,
        choices=("auto", *DTYPES),
    )
    compile: str = flag(
        "auto",
        "torch.compile: true, false or auto: on a GPU, for conversations and from"
        f" {COMPILED_FROM} tokens on",
        group=COMPUTED,
        choices=("auto", "true", "false"),
    )
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)

    out: str | None = flag(
        None,
        "where a run on audio, music, codes or images writes: the prompt (--prompt_file, a"
        " file of its kind) and what follows it; with --n several files FILE_1, FILE_2, …",
        group=OUTPUT,
        metavar="FILE",
    )
    no_record: bool = flag(
        False,
        "leave the run's generations.txt alone, to which every text is appended otherwise",
        group=OUTPUT,
    )
    json: bool = flag(
        False,
        "one JSON object per sample: prompt, text (or the name of the file), tokens, seed,"
        " reason, metrics, timings",
        group=OUTPUT,
    )
    metrics: bool | None = flag(
        None,
        "show the mean log-probability, entropy, distinct-1/2/3, rep-4 and drift of every text",
        group=OUTPUT,
    )
    clean_spacing: bool | None = flag(
        None,
        "undo the spacing of WikiText: ' @-@ ', spaces before punctuation, inside brackets, …",
        group=OUTPUT,
        per_text=True,
    )


FLAGS: dict[str, Flag] = {
    spec.name: spec.metadata["option"]
    for spec in dataclasses.fields(DeclaredOptions)
    if "option" in spec.metadata
}
