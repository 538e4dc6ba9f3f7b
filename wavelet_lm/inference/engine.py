"""Text from Python: a model and a tokenizer put together once, for as many texts as are wanted.

    engine = Engine(model, tokenizer)
    engine.generate("Once upon", num_tokens=64, seed=1)

Options have the names, the ranges and the meaning that they have in `generate.py`, and the same
seed gives the same text there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wavelet_lm.allocator import returning_memory
from wavelet_lm.config import Config
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError
from wavelet_lm.inference.build_engine import open_checkpoint
from wavelet_lm.inference.checks import check_seed, check_whole
from wavelet_lm.inference.completion import Strategy, Writer
from wavelet_lm.inference.declarations import DTYPES, FLAGS
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import check_vocabulary, encode_prompt
from wavelet_lm.inference.generation_options import GenerationOptions
from wavelet_lm.inference.live_decoder import LiveDecoder, live_decoder_of
from wavelet_lm.inference.reading import Reading
from wavelet_lm.inference.rows import Completion, Request
from wavelet_lm.json_files import brief
from wavelet_lm.models.base import LanguageModel

if TYPE_CHECKING:
    from wavelet_lm.data.tokenizers import Tokenizer

# Options of `generate.py` that say how a text is continued.
OPTIONS = tuple(name for name, flag in FLAGS.items() if flag.per_text)


class Engine:
    """Writes texts with a model.

    The model is fused once (`fuse.py`). Where its weights have changed since the last text, by
    training or `load_state_dict`, that is done again. The model is not kept: an engine lives on
    when it is gone, in about the memory of its weights.

    Args:
        model: of `load_model` or `build_model`; it is left as it is.
        tokenizer: the one that it was trained with.
        dtype: of weights and computation: float32, bfloat16 or float16; None keeps the model's.
        context: what a token sees of the past: auto, stream, window:N or recompute:N.
        compile: compile steps with torch.compile.
        fwpkm_inference_updates: the fast weights learn from what is written; None asks the config.
        draft: a smaller model with the same tokenizer that proposes tokens.

    Raises:
        UserError: the tokenizer is not the model's; an option that the model cannot follow.

    Examples:
        >>> engine = wavelet_lm.Engine.open("logs/RUN")
        >>> text = engine.generate("def ", num_tokens=10, seed=1)
        >>> "".join(engine.stream("def ", num_tokens=10, seed=1)) == text
        True
        >>> engine.generate_batch(["class ", "def "], num_tokens=10, seed=[3, 1])[1] == text
        True
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        dtype: str | torch.dtype | None = None,
        context: str = "auto",
        compile: bool = False,
        fwpkm_inference_updates: bool | None = None,
        draft: nn.Module | None = None,
    ):
        for each in filter(None, (model, draft)):
            check_vocabulary(each, tokenizer)
        self._begin(
            *(model, tokenizer, _config(model)),
            dtype=dtype,
            context=context,
            compile=compile,
            adapt=fwpkm_inference_updates,
            draft=draft,
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = "auto",
        *,
        dtype: str | torch.dtype | None = None,
        context: str = "auto",
        compile: bool = False,
        fwpkm_inference_updates: bool | None = None,
        log: Callable[[str], object] = lambda line: None,
    ) -> Engine:
        """The engine of a run folder or a checkpoint, which never has its model in memory as well.

        Raises:
            UserError: it is missing, damaged, has no tokenizer or weights that are not finite.
        """
        engine = cls.__new__(cls)
        with returning_memory():
            opened = open_checkpoint(str(path), resolve_device(device), log)
            engine._begin(
                *(opened.model, opened.tokenizer, opened.empty.config),
                dtype=dtype,
                context=context,
                compile=compile,
                adapt=fwpkm_inference_updates,
            )
        return engine

    @classmethod
    def of(cls, decoder: LiveDecoder, model: nn.Module, tokenizer: Tokenizer) -> Engine:
        """An engine on a decoder that is there already, of this model."""
        check_vocabulary(model, tokenizer)
        engine = cls.__new__(cls)
        engine._begin(decoder, tokenizer, _config(model))
        return engine

    def _begin(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: Config,
        *,
        dtype: str | torch.dtype | None = None,
        context: str = "auto",
        compile: bool = False,
        adapt: bool | None = None,
        draft: nn.Module | None = None,
    ) -> None:
        """Check what holds for all texts, and only then fuse the model.

        model: or its decoder, where there is one already.
        """
        self.tokenizer, self.config = tokenizer, config
        self._fixed = {
            "context": context,
            "compile": "true" if compile else "false",
            "fwpkm_inference_updates": adapt,
            "draft": None if draft is None else "draft",
        }
        self._options({}).strategy(config)
        how = {"dtype": _dtype(dtype), "context": context, "compile": bool(compile)}
        is_there = isinstance(model, LiveDecoder)
        self._decoder = model if is_there else LiveDecoder(model, **how, adapt=adapt)
        self._draft = None if draft is None else LiveDecoder(draft, **how, adapt=False)

    @property
    def decoder(self) -> Decoder:
        """The decoder of the model's weights as they are now."""
        return self._decoder.current()[1]

    # --- writing ---------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        num_tokens: int | None = None,
        *,
        seed: int = 1,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> str:
        """Continue `prompt`; returns the new text only.

        It ends after `num_tokens` tokens (None: the config's `num_new_tokens`), in front of one of
        the texts of `stop`, or where the model ends the text. The same seed gives the same text.

        Args:
            options: `OPTIONS`, as in `generate.py`; where one is not given the config decides.

        Raises:
            UserError: a prompt that cannot be encoded or is too long for the model, an option out
                of range or unknown, or that contradicts another; output that is not finite.
        """
        return self.completions([prompt], num_tokens, seed=seed, stop=stop, **options)[0].text

    def stream(
        self,
        prompt: str,
        num_tokens: int | None = None,
        *,
        seed: int = 1,
        stop: str | Sequence[str] = (),
        **options: Any,
    ) -> Iterator[str]:
        """As `generate`, piece by piece as the text comes; what it raises, it raises at once.

        The pieces put together are what `generate` returns. No piece is empty; a character that is
        split over several tokens comes whole.
        """
        writer = self._writer(options)
        requests = self._requests([prompt], num_tokens, seed, stop, writer)
        if not requests[0].num_tokens:
            return iter(())
        reading = self._read(writer, [prompt], requests)
        return (piece for _, piece in writer.pieces(reading, requests) if piece)

    def generate_batch(
        self,
        prompts: Sequence[str],
        num_tokens: int | None = None,
        *,
        seed: int | Sequence[int] = 1,
        stop: str | Sequence[str] = (),
        batch_size: int = Strategy.batch_size,
        **options: Any,
    ) -> list[str]:
        """As `generate`, for many prompts, `batch_size` at once; each is what it would be alone.

        seed: one for all of them, or one each.
        """
        many = self.completions(
            prompts, num_tokens, seed=seed, stop=stop, batch_size=batch_size, **options
        )
        return [completion.text for completion in many]

    def completions(
        self,
        prompts: Sequence[str],
        num_tokens: int | None = None,
        *,
        seed: int | Sequence[int] = 1,
        stop: str | Sequence[str] = (),
        batch_size: int = Strategy.batch_size,
        **options: Any,
    ) -> list[Completion]:
        """As `generate_batch`, with all that is known of each text (`Completion`)."""
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of them, or call generate")
        check_whole("batch_size", batch_size, 1)
        writer = self._writer(options, batch_size)
        requests = self._requests(prompts, num_tokens, seed, stop, writer)
        found: list[Completion] = []
        for first in range(0, len(prompts), batch_size):
            group = requests[first : first + batch_size]
            reading = self._read(writer, prompts[first : first + batch_size], group)
            found += _last(writer.pieces(reading, group))
        return found

    def _writer(self, options: dict[str, Any], batch_size: int = Strategy.batch_size) -> Writer:
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], OPTIONS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(OPTIONS)}"
            raise UserError(f"there is no option {unknown[0]}; {hint}")
        strategy = self._options({**options, "batch_size": batch_size}).strategy(self.config)
        model, decoder = self._decoder.current()
        draft = None if self._draft is None else self._draft.current()[1]
        return Writer(decoder, model, self.tokenizer, strategy, draft)

    def _options(self, given: dict[str, Any]) -> GenerationOptions:
        return GenerationOptions(checkpoint="", **self._fixed, **given)

    def _requests(
        self,
        prompts: Sequence[str],
        num_tokens: int | None,
        seed: int | Sequence[int],
        stop: str | Sequence[str],
        writer: Writer,
    ) -> list[Request]:
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"prompt is {brief(prompt)}; it must be a text")
        if num_tokens is None:
            num_tokens = self.config.num_new_tokens
        seeds = [seed] * len(prompts)
        if isinstance(seed, Sequence) and not isinstance(seed, str):
            seeds = list(seed)
        if len(seeds) != len(prompts):
            raise UserError(f"seed has {len(seeds)} numbers for {len(prompts)} prompts; give one")
        for each in seeds:  # the last try of several has the highest
            check_seed(check_seed(each) + writer.strategy.best_of_n - 1)
        texts = (stop,) if isinstance(stop, str) else stop
        texts = tuple(texts) if isinstance(texts, Sequence) else texts
        return [Request(each, num_tokens, texts) for each in seeds]

    def _read(self, writer: Writer, prompts: Sequence[str], requests: Sequence[Request]) -> Reading:
        texts = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        writer.check_lengths([len(text) for text in texts], requests)
        return writer.read(texts)


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int = 64,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 1,
    ignore_eot: bool = False,
) -> str:
    """Continue `prompt`; returns the new text only, without the prompt.

    It ends after `num_tokens` tokens, or where the model ends the text (end-of-text token) unless
    `ignore_eot`. The same seed gives the same text. The fused model is kept
    while the model is there, and made again where its weights have changed.

    Raises:
        UserError: options out of range, a tokenizer of another model, a prompt that it cannot
            encode or that is too long for the model, and output that is not finite.

    Examples:
        >>> model = wavelet_lm.load_model("logs/RUN")
        >>> tokenizer = wavelet_lm.load_tokenizer("logs/RUN")
        >>> text = wavelet_lm.generate(model, tokenizer, "def ", num_tokens=10, seed=1)
        >>> text == wavelet_lm.generate(model, tokenizer, "def ", num_tokens=10, seed=1)
        True
        >>> wavelet_lm.generate(model, tokenizer, "def ", top_p=2)
        Traceback (most recent call last):
        wavelet_lm.errors.UserError: top_p is 2; it must be between 1e-30 and 1
    """
    engine = Engine.of(live_decoder_of(model), model, tokenizer)
    return engine.generate(
        prompt,
        num_tokens,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        ignore_eot=ignore_eot,
    )


def _config(model: nn.Module) -> Config:
    return model.config if isinstance(model, LanguageModel) else Config()


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype is {brief(dtype)}; it must be {', '.join(DTYPES)} or None")
    return DTYPES[dtype]


def _last(pieces: Iterator[tuple[int, str]]) -> list[Completion]:
    """What a generator returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value
