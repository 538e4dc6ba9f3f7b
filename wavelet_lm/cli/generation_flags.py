"""The command line of `generate.py`."""

from __future__ import annotations

import argparse

from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.cli.quantization_flags import add_quantization_flags, quantization_options
from wavelet_lm.inference.completion import CoherenceOptions
from wavelet_lm.inference.generation_options import (
    BATCH_SIZE,
    COMPILED_FROM,
    DRAFT_TOKENS,
    LOOKAHEAD_DEPTH,
    STRATEGIES,
    GenerationOptions,
)
from wavelet_lm.inference.sampling.logits import SamplingOptions

EPILOG = """\
Text goes to standard output, all else to standard error. Options of which "the run's" is said come
from the config of the run when they are not given. --no_metrics turns off what --strategies or the
run turns on, and so for entropy_adaptive, clean_spacing and fwpkm_inference_updates."""


def parse_options(description: str, arguments: list[str] | None = None) -> GenerationOptions:
    """The options of a command line, sys.argv's if none is given.

    Raises:
        UserError: one line for anything that is wrong with them.
    """
    given = vars(build_parser(description).parse_args(arguments))
    quantization = quantization_options(given)
    given = {k: v for k, v in given.items() if not hasattr(quantization, k)}
    given["stop"] = tuple(given["stop"] or ())
    return GenerationOptions(**given, quantization=quantization)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The parser of `generate`; `description` heads its help."""
    parser = OneLineParser(
        run="run folder, or checkpoint file", description=description, epilog=EPILOG
    )

    flags = parser.add_argument_group(
        "the prompt (one of these; without any, what is piped in, else the run's generation_prompt)"
    )
    flags.add_argument("--prompt", metavar="TEXT", help="text to continue; may be empty")
    flags.add_argument("--prompt_file", metavar="FILE", help="a UTF-8 file; - = standard input")
    flags.add_argument(
        "--prompts",
        metavar="FILE",
        help="a batch: one prompt a line, or in a .jsonl file one object a line, with prompt and,"
        " if you like, seed, num_tokens and stop; writes JSON lines in the same order",
    )
    flags.add_argument(
        "--interactive",
        action="store_true",
        help="ask for line after line and continue each; what was said stays known. An empty line"
        " or Ctrl-D ends, Ctrl-C stops an answer. A prompt that is given is read first",
    )
    flags.add_argument(
        "--save_state",
        metavar="FILE",
        help="keep what the model remembers of the prompt (of the conversation, with"
        " --interactive); --num_tokens 0 only reads",
    )
    flags.add_argument(
        "--load_state",
        metavar="FILE",
        help="go on from there: a prompt follows the text that was read; needs the same model,"
        " context and dtype",
    )

    flags = parser.add_argument_group("how much")
    flags.add_argument(
        "--num_tokens", metavar="N", type=int, help="most tokens of a text, any number [the run's]"
    )
    flags.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        help="end before this text, as it is shown; can be repeated",
    )
    flags.add_argument("--ignore_eot", action="store_true", help="go on after an end of text")
    flags.add_argument("--n", metavar="N", type=int, default=1, help="samples of a prompt [1]")
    flags.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=1,
        help="of the first sample; sample i is the run with seed + i, with --best_of_n B that with"
        " seed + i * B [1]",
    )
    flags.add_argument(
        "--batch_size",
        metavar="N",
        type=int,
        default=BATCH_SIZE,
        help=f"texts that are written side by side [{BATCH_SIZE}]",
    )

    flags = parser.add_argument_group("sampling, in this order")
    flags.add_argument(
        "--repetition_penalty",
        metavar="X",
        type=float,
        help="divides the positive logits of tokens seen before, multiplies the others; 1 = none"
        " [the run's]",
    )
    flags.add_argument(
        "--temperature", metavar="X", type=float, help="0 = the likeliest token [the run's]"
    )
    flags.add_argument(
        "--top_k", metavar="N", type=int, help="among the N likeliest tokens, 0 = all [the run's]"
    )
    flags.add_argument(
        "--top_p",
        metavar="X",
        type=float,
        help="among the fewest tokens that hold this probability [the run's]",
    )

    flags = parser.add_argument_group("strategies")
    preset = ", ".join(f"{k} {v}".removesuffix(" True") for k, v in STRATEGIES.items())
    flags.add_argument(
        "--strategies",
        action="store_true",
        help=f"a good set at once: {preset}, and clean_spacing for a run trained on WikiText; any"
        " flag that is given as well wins",
    )
    _add_switch(
        flags,
        "entropy_adaptive",
        "a temperature for every token, in place of --temperature: max − (H / ln V)(max − min), H"
        " the entropy",
    )
    defaults = SamplingOptions()
    for end in ("min", "max"):
        default = getattr(defaults, f"entropy_temp_{end}")
        flags.add_argument(
            f"--entropy_temp_{end}", metavar="X", type=float, help=f"its {end} [{default}]"
        )
    flags.add_argument(
        "--lookahead_k",
        metavar="N",
        type=int,
        help="roll out each of the N likeliest next tokens and draw among them: the likelier its"
        " way, the more often",
    )
    flags.add_argument(
        "--lookahead_depth",
        metavar="N",
        type=int,
        help=f"tokens that each is rolled out for, greedily [{LOOKAHEAD_DEPTH}]",
    )
    flags.add_argument(
        "--best_of_n",
        metavar="N",
        type=int,
        default=1,
        help="for each text write N, with seeds of their own, and keep the one of the highest mean"
        " log-probability",
    )
    flags.add_argument(
        "--wavelet_coherence",
        action="store_true",
        help="lower top_p, to 0.3 at least, as the text drifts from the topic of its prompt",
    )
    topic = CoherenceOptions()
    for name, kind, words in (
        ("weight", float, "what a drift of 1 takes off top_p"),
        ("window", int, "last tokens that are compared with the prompt"),
        ("levels", int, "of the Haar approximation of the token embeddings"),
    ):
        flags.add_argument(
            f"--coherence_{name}",
            metavar="X" if kind is float else "N",
            type=kind,
            help=f"{words} [{getattr(topic, name)}]",
        )
    _add_switch(
        flags,
        "fwpkm_inference_updates",
        "let the fast weights of the second memory learn from what is written [the run's]",
    )

    flags = parser.add_argument_group("how it is computed")
    flags.add_argument(
        "--draft",
        metavar="CHECKPOINT",
        help="a much smaller model with the same tokenizer that proposes tokens, several of which"
        " the model then reads at once; the distribution of the text is the same",
    )
    flags.add_argument(
        "--draft_tokens",
        metavar="N",
        type=int,
        help=f"tokens that it proposes at once [{DRAFT_TOKENS}]",
    )
    flags.add_argument(
        "--context",
        metavar="WHAT",
        default="auto",
        help="what a token sees of the past: stream, all; window:N, with a running mean of the last"
        " N positions; recompute:N, the last N tokens read anew each time (slow); auto, a window of"
        " the run's block_size [auto]",
    )
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add_threads_flag(flags)
    flags.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16 or auto: bfloat16 on a GPU that has it, else the"
        " checkpoint's, float32 [auto]",
    )
    flags.add_argument(
        "--compile",
        default="auto",
        help="torch.compile: true, false or auto: on a GPU, for conversations and from"
        f" {COMPILED_FROM} tokens on [auto]",
    )

    add_quantization_flags(parser)

    flags = parser.add_argument_group("output")
    flags.add_argument(
        "--out",
        metavar="FILE",
        help="where a run on audio, music, codes or images writes: the prompt (--prompt_file, a"
        " file of its kind) and what follows it; with --n several files FILE_1, FILE_2, …",
    )
    flags.add_argument(
        "--no_record",
        action="store_true",
        help="leave the run's generations.txt alone, to which every text is appended otherwise",
    )
    flags.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per sample: prompt, text (or the name of the file), tokens, seed,"
        " reason, metrics, timings",
    )
    _add_switch(
        flags,
        "metrics",
        "show the mean log-probability, entropy, distinct-1/2/3, rep-4 and drift of every text",
    )
    _add_switch(
        flags,
        "clean_spacing",
        "undo the spacing of WikiText: ' @-@ ', spaces before punctuation, inside brackets, …",
    )
    return parser


def _add_switch(flags: argparse._ArgumentGroup, name: str, words: str) -> None:
    """`--name` and `--no_name`; None when neither is given."""
    flags.add_argument(f"--{name}", action="store_const", const=True, help=words)
    flags.add_argument(
        f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS
    )
