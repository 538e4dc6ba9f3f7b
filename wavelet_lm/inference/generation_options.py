"""The options of `generate.py`: what contradicts what, and what they come to with a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.inference.checks import MAX_SEED, check_fields, check_stop, check_whole
from wavelet_lm.inference.completion import Strategy
from wavelet_lm.inference.context import parse_context
from wavelet_lm.inference.declarations import (
    COMPILED_FROM,
    DTYPES,
    FLAGS,
    STRATEGIES,
    DeclaredOptions,
)
from wavelet_lm.inference.rows import Request
from wavelet_lm.inference.sampling.coherence import CoherenceOptions
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.text.prompts import Prompt, read_piped, read_prompts
from wavelet_lm.inference.text.spacing import is_spaced_apart
from wavelet_lm.text_files import read_text

SAMPLING_KEYS = SamplingOptions.__dataclass_fields__.keys()


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(DeclaredOptions):
    """The options that were typed, checked.

    Raises:
        UserError: a value out of range, or flags that contradict each other.
    """

    def __post_init__(self) -> None:
        if self.strategies:
            for key, value in self._strategy_defaults().items():
                if getattr(self, key) is None:
                    object.__setattr__(self, key, value)
        self._check_ranges()
        self._check_contradictions()

    def _strategy_defaults(self) -> dict[str, Any]:
        """What `--strategies` sets: a temperature that is given takes the adaptive one's place."""
        fixed = self.temperature is not None or self.entropy_adaptive is False
        return {
            key: value
            for key, value in STRATEGIES.items()
            if not (fixed and "entropy_adaptive" in (key, FLAGS[key].part_of))
        }

    def _check_ranges(self) -> None:
        only_reads = self.save_state is not None and not self.interactive
        if self.num_tokens is not None and not only_reads:
            check_whole("num_tokens", self.num_tokens, 1)
        check_fields(self)
        parse_context(self.context)
        check_stop(self.stop)
        self._check_seeds(self.seed)
        self._sampling({})  # checks its values together

    def _check_seeds(self, seed: int) -> None:
        """Refuse a first seed of a prompt whose last one no generator takes."""
        if seed + self.n * self.best_of_n - 1 > MAX_SEED:
            raise UserError(f"seed is {seed}; with so many samples it passes {MAX_SEED}")

    def _check_contradictions(self) -> None:
        given = self._given()
        sources = [flag for flag in ("prompt", "prompt_file", "prompts") if flag in given]
        if len(sources) > 1:
            raise UserError(f"--{sources[0]} and --{sources[1]} both give the prompt; use one")
        for flag, declared in FLAGS.items():
            needed = declared.part_of
            if needed is not None and flag in given and needed not in given:
                raise UserError(f"--{flag} is a part of --{needed}; give that too")
        for flag, other, why in (
            ("temperature", "entropy_adaptive", "both set the temperature"),
            (
                "lookahead_k",
                "draft",
                "the model checks a draft's tokens against its distribution, lookahead draws from"
                " scores",
            ),
            ("interactive", "prompts", "one asks the keyboard, the other a file"),
            ("interactive", "n", "a conversation has one answer"),
            ("interactive", "json", "a conversation is text"),
            ("save_state", "prompts", "a state is of one text"),
        ):
            if flag in given and other in given:
                raise UserError(f"--{flag} and --{other} contradict each other: {why}")
        if self.interactive and self.prompt_file == "-":
            raise UserError(
                "--interactive and --prompt_file - both read standard input; use a file"
            )

    def _given(self) -> set[str]:
        """The flags that ask for something."""
        values = vars(self)
        unset = {
            k
            for k, v in values.items()
            if v is None or v is False or (isinstance(v, tuple) and not v)
        }
        return values.keys() - unset - {key for key in ("n", "best_of_n") if values[key] == 1}

    # --- what they come to, with the config of the run -------------------------------------------

    def _sampling(self, defaults: dict[str, Any]) -> SamplingOptions:
        given = {k: v for k in SAMPLING_KEYS if (v := getattr(self, k)) is not None}
        return SamplingOptions(**{**defaults, **given})

    def strategy(self, config: Config) -> Strategy:
        """How texts are continued.

        Raises:
            UserError: the options contradict each other or the model.
        """
        shared = SAMPLING_KEYS & vars(config).keys()
        sampling = self._sampling({key: getattr(config, key) for key in shared})
        if sampling.greedy and self.best_of_n > 1:
            raise UserError(
                "--best_of_n and temperature 0 contradict each other: all samples are one; give a"
                " --temperature"
            )
        learns = config.model == "wavelet_lm" and config.fwpkm_enabled
        if self.fwpkm_inference_updates and not learns:
            raise UserError(
                "--fwpkm_inference_updates adapts a memory that this model lacks (fwpkm_enabled is"
                " false); leave it out"
            )
        for clashes, flag, why in (
            (self.draft is not None, "--draft", "what was learned cannot be taken back"),
            (self.compile == "true", "--compile true", "memory that learns has no fixed size"),
            (
                parse_context(self.context).kind == "recompute",
                f"--context {self.context}",
                "a text that is read anew for every token has nothing to learn from",
            ),
        ):
            if clashes and self.adapts(config):
                raise UserError(
                    f"{flag} and fwpkm_inference_updates contradict each other: {why}; add"
                    " --no_fwpkm_inference_updates"
                )
        coherence = {
            name: value
            for name in CoherenceOptions.__dataclass_fields__
            if (value := getattr(self, f"coherence_{name}")) is not None
        }
        clean = self.clean_spacing
        if clean is None:
            clean = self.strategies and is_spaced_apart(config.dataset)
        return Strategy(
            sampling=sampling,
            lookahead_k=self.lookahead_k or 0,
            lookahead_depth=self._or_otherwise("lookahead_depth") if self.lookahead_k else 0,
            best_of_n=self.best_of_n,
            batch_size=self.batch_size,
            coherence=CoherenceOptions(**coherence) if self.wavelet_coherence else None,
            draft_tokens=self._or_otherwise("draft_tokens"),
            clean_spacing=clean,
            ignore_eot=self.ignore_eot,
        )

    def _or_otherwise(self, name: str) -> Any:
        value = getattr(self, name)
        return FLAGS[name].otherwise if value is None else value

    def adapts(self, config: Config) -> bool:
        """Whether fast weights learn while text is generated."""
        if self.fwpkm_inference_updates is None:
            return config.fwpkm_inference_updates
        return self.fwpkm_inference_updates

    def requests(self, config: Config, prompt: Prompt | None = None) -> list[Request]:
        """The `n` texts asked for of a prompt; its own values win over the command's.

        With `best_of_n` each takes that many seeds, from its own on, so that no two share a try.
        """
        prompt = prompt or Prompt("")
        seed = self.seed if prompt.seed is None else prompt.seed
        self._check_seeds(seed)
        given = self.num_tokens if prompt.num_tokens is None else prompt.num_tokens
        num_tokens = config.num_new_tokens if given is None else given
        stop = self.stop if prompt.stop is None else prompt.stop
        seeds = range(seed, seed + self.n * self.best_of_n, self.best_of_n)
        return [Request(seed, num_tokens, stop) for seed in seeds]

    def read_prompts(self) -> list[Prompt]:
        """The prompts that were given, from wherever they come; none if none was.

        Raises:
            UserError: a file that cannot be read, is not UTF-8, or holds no prompts.
        """
        if self.prompts is not None:
            return read_prompts(self.prompts)
        if self.prompt_file is not None:
            return [Prompt(read_text(self.prompt_file))]
        if self.prompt is not None:
            return [Prompt(self.prompt)]
        piped = "" if self.interactive else read_piped()
        return [Prompt(piped)] if piped else []

    def decoding(self, config: Config, device: torch.device) -> dict[str, Any]:
        """Arguments of a `Decoder`: context, dtype (None = the model's) and compile."""
        dtype, on_gpu = DTYPES.get(self.dtype), device.type == "cuda"
        if self.dtype == "auto" and on_gpu and torch.cuda.is_bf16_supported(False):
            dtype = torch.bfloat16
        compiles = self.compile == "true"
        if self.compile == "auto":
            n_tokens = config.num_new_tokens if self.num_tokens is None else self.num_tokens
            long = self.interactive or n_tokens >= COMPILED_FROM
            compiles = on_gpu and long and not self.adapts(config)
        return {"context": self.context, "dtype": dtype, "compile": compiles}
