"""What a run writes: a text of its config's prompt, or more of what is no text, as a file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from wavelet_lm.config import Config
from wavelet_lm.data.modalities import Modality
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.inference.completion import Strategy, Writer
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import encode_prompt
from wavelet_lm.inference.rows import Completion, Request
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.text.record import RECORD, record
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.training.run_folder import RunFolder

# Tokens of the sample at the end, and of those on the way there.
SAMPLE_TOKENS, TOKENS_ON_THE_WAY = 512, 128


class Sample(NamedTuple):
    """A completion of the prompt, which is empty for what is no text, and how it was drawn."""

    prompt: str
    completion: Completion
    options: SamplingOptions


def sample(
    model: nn.Module | StoredModel, tokenizer: Tokenizer, config: Config, most: int = SAMPLE_TOKENS
) -> Sample:
    """What a model writes as its run's config says; the model is left as it is.

    Args:
        most: tokens, where the config asks for more.

    Raises:
        UserError: the prompt cannot be encoded, or the model's output is not finite.
    """
    options = SamplingOptions(
        config.temperature, config.top_k, config.top_p, config.repetition_penalty
    )
    is_text = not isinstance(tokenizer, Modality)
    prompt = config.generation_prompt if is_text else ""
    built = model.model if isinstance(model, StoredModel) else model
    writer = Writer(Decoder(model, context="auto"), built, tokenizer, Strategy(options))
    first = encode_prompt(tokenizer, prompt) if is_text else [tokenizer.start]
    request = Request(config.seed, min(config.num_new_tokens, most))
    (completion,) = writer.write(writer.read([first]), [request])
    return Sample(prompt, completion, options)


def keep(run: RunFolder, tokenizer: Tokenizer, found: Sample, name: str = "sample") -> None:
    """Write a sample to the record of the run's texts.

    What is no text becomes a file `name` in the run folder, and its path the text.
    """
    prompt, completion, options = found
    if isinstance(tokenizer, Modality):
        file = Path(run.path / f"{name}{tokenizer.output}")
        file.parent.mkdir(exist_ok=True)
        completion.text = str(file)
        tokenizer.write(file, completion.tokens)
    record(run.path / RECORD, run.command, prompt, completion, options)
