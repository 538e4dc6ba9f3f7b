"""Published WaveletLM checkpoints: a bare `state_dict` in a `.pt` beside its `config.json`.

    python -m wavelet_lm.interop.published best_model.pt --out logs/published

makes a run folder of one. Nothing that a pickle can execute is executed, and nothing is left out in
silence: every tensor of the file has a place in the model, and every parameter has its tensor.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from wavelet_lm.atomic_files import as_user_error, check_new_folder, write_text
from wavelet_lm.data.tokenizers import (
    GPT2_VOCAB,
    Tokenizer,
    check_tokenizer_name,
    load_tokenizer,
    named_tokenizer,
)
from wavelet_lm.errors import UserError
from wavelet_lm.hub_paths import is_in_hub
from wavelet_lm.interop.published_config import read_published_config
from wavelet_lm.interop.published_names import Source, published_layout
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.checkpoint import check_finite, save_checkpoint
from wavelet_lm.models.registry import build_model, model_without_weights
from wavelet_lm.models.stored_model import StoredModel

SUFFIXES = (".pt", ".pth")
# What torch.compile and DistributedDataParallel put before the names, in any order.
WRAPPERS = ("_orig_mod.", "module.")
EMBEDDINGS = ("token_embedding.weight", "cells.0.token_embedding.weight")
SHOWN = 3


def is_published(path: str | Path) -> bool:
    """Whether a path means a published checkpoint and not one of this project."""
    return not is_in_hub(path) and Path(path).suffix in SUFFIXES


def load_published(
    path: str | Path,
    device: str | torch.device = "cpu",
    log: Callable[[str], object] = lambda line: None,
) -> nn.Module:
    """The model of a published checkpoint, in eval mode on `device`; as `stored_published`."""
    stored = stored_published(path, device, log)
    with torch.device(device):
        model = build_model(stored.model.config, stored.model.vocab_size).to(stored.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.read(name))
    return model.eval()


def stored_published(
    path: str | Path,
    device: str | torch.device = "cpu",
    log: Callable[[str], object] = lambda line: None,
) -> StoredModel:
    """A published checkpoint, whose weights are read when a part of its model is at work on them.

    They are float32, or float64 where the file has such tensors.

    Args:
        log: gets a line each for the config's ignored keys and for the tensors that nothing reads.

    Raises:
        UserError: the file is missing, damaged or holds more than tensors; config.json is missing
            or cannot be imported; names or shapes do not fit it; repeated tensors differ.
    """
    path = Path(path).expanduser()
    tensors = read_tensors(path)
    config, ignored = read_published_config(path.with_name("config.json"), tensors.keys())
    vocab_size = published_vocab_size(path, tensors)
    empty = model_without_weights(
        config, vocab_size, str(path.with_name("config.json")), len(tensors)
    )
    shapes = {name: p.shape for name, p in empty.named_parameters()}
    layout = published_layout(config)
    problems = _fold_deltas(tensors)
    values, used = {}, set()
    for name, shape in shapes.items():
        source = layout.sources[name]
        used |= {published for part in source.parts for published in part}
        if all(tensors.keys() & part for part in source.parts):
            values[name] = _value(tensors, source, shape, problems)
        else:
            problems += [f"no {part[0]}" for part in source.parts if not tensors.keys() & {*part}]
    problems += [f"unknown {name}" for name in tensors if name not in used | layout.unread]
    if problems:
        # Every row of a tensor finds the same fault with it.
        raise UserError(
            f"{path}: does not fit its config.json: {_some([*dict.fromkeys(problems)])}"
        )
    if ignored:
        log(f"{path.with_name('config.json')}: ignored keys of training: {', '.join(ignored)}")
    if unread := sorted(layout.unread & tensors.keys()):
        log(f"{path}: dropped tensors that nothing reads: {_some(unread)}")
    is_double = any(value.dtype == torch.float64 for value in values.values())
    dtype = torch.float64 if is_double else torch.float32
    return StoredModel(config, vocab_size, values.__getitem__, device, dtype)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` by their names without what wrappers of a model put before them.

    They are mapped from the file where its format allows it, not read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    content = _load(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds no tensors by name; a bare state_dict is needed")
    others = [name for name, value in content.items() if not _is_weight(name, value)]
    if others:
        raise UserError(
            f"{path}: holds other things than plain tensors of floating point"
            f" ({_some([str(name) for name in others])}); a bare state_dict is needed"
        )
    tensors = {_unwrapped(name): value for name, value in content.items()}
    if len(tensors) < len(content):
        raise UserError(
            f"{path}: has some names both with and without the prefix {' or '.join(WRAPPERS)}"
        )
    return tensors


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _is_weight(name: object, value: object) -> bool:
    plain = isinstance(name, str) and isinstance(value, Tensor)
    return plain and value.layout == torch.strided and value.is_floating_point()


def _load(path: Path) -> object:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files from before torch 1.6 cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        first = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(
            f"{path}: truncated, or no checkpoint of tensors alone, and pickled code is not run"
            f" ({first})"
        ) from None


def published_vocab_size(path: Path, tensors: dict[str, Tensor]) -> int:
    """Rows of the embedding."""
    for name in EMBEDDINGS:
        if name in tensors and tensors[name].dim() == 2:
            return len(tensors[name])
    raise UserError(f"{path}: has no {EMBEDDINGS[0]}; it is no published checkpoint")


def _fold_deltas(tensors: dict[str, Tensor]) -> list[str]:
    """Add FwPKM's deltas to its values, which is what a read returns; problems, if any."""
    problems = []
    for name in [name for name in tensors if name.endswith("fwpkm.value_deltas")]:
        values = name.replace("value_deltas", "values.weight")
        if values not in tensors:
            continue  # then it is unknown, or its values are missed
        deltas = tensors.pop(name)
        if deltas.shape != tensors[values].shape:
            problems.append(f"{name} is {list(deltas.shape)}, the values {_shape(tensors[values])}")
        elif deltas.any():
            tensors[values] = tensors[values] + deltas
    return problems


def _value(
    tensors: dict[str, Tensor], source: Source, shape: torch.Size, problems: list[str]
) -> Tensor | None:
    """A parameter's values of the wanted shape; what is wrong with them is added to `problems`."""
    rows = []
    for names in source.parts:
        first, *others = (name for name in names if name in tensors)
        for other in others:
            if not _same(tensors[first], tensors[other]):
                problems.append(f"{other} differs from {first}, which it repeats")
        rows.append(tensors[first])
    wanted = tuple(shape if len(rows) == 1 else shape[1:])
    if source.row is not None:
        wanted = (source.row[1], *wanted)
    for names, row in zip(source.parts, rows, strict=True):
        # Factors are sometimes vectors of one.
        if row.shape != wanted and not (wanted == () and row.shape == (1,)):
            problems.append(f"{names[0]} is {_shape(row)}, the config makes it {list(wanted)}")
            return None
    if source.row is not None:
        return rows[0][source.row[0]]
    return rows[0].reshape(shape) if len(rows) == 1 else torch.stack(rows)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal values, and NaN (which is reported by itself) at the same places."""
    return torch.equal(a, b) or (
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    )


def _some(items: list[str]) -> str:
    """The first few, and how many more."""
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


# --- to a run folder -----------------------------------------------------------------------------


def convert(
    path: str | Path,
    out: str | Path,
    tokenizer: str | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> Path:
    """Make a run folder of a published checkpoint: config.json, tokenizer/, best.safetensors.

    Args:
        tokenizer: a name (`gpt2`, `bytes`) or a folder that holds one; None is GPT-2's, for models
            of its vocabulary.

    Raises:
        UserError: as `load_published`; `out` exists; the tokenizer is unknown or does not fit.
    """
    path, out = Path(path).expanduser(), new_run(out)
    model = load_published(path, "cpu", log)
    check_finite(model, path)
    return write_run(out, model, published_tokenizer(path, model.vocab_size, tokenizer), path)


def new_run(out: str | Path) -> Path:
    """The path of a run folder that is to be made.

    Raises:
        UserError: it is there already, or cannot be made.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out}: already there; give --out a new folder")
    check_new_folder(out)
    return out


def write_run(out: Path, model: LanguageModel, tokenizer: Tokenizer, source: Path) -> Path:
    """Make the run folder `out` of a model that was read from `source`, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise as_user_error(error, out) from error
    try:
        write_text(out / "config.json", model.config.to_json())
        tokenizer.save(out / "tokenizer")
        save_checkpoint(out / "best.safetensors", model, {"imported_from": source.name})
    except BaseException:  # a folder without weights is no run
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def published_tokenizer(path: Path, vocab_size: int, name: str | None = None) -> Tokenizer:
    """The tokenizer of a published checkpoint: the named one, or GPT-2's where that fits.

    Raises:
        UserError: there is none of that name, or its size is not the vocabulary's.
    """
    if name is None and vocab_size != GPT2_VOCAB:
        raise UserError(
            f"{path}: its vocabulary of {vocab_size} is not GPT-2's ({GPT2_VOCAB}); convert it with"
            " python -m wavelet_lm.interop.published FILE --out RUN --tokenizer NAME_OR_FOLDER"
        )
    tokenizer = named_or_stored_tokenizer(name or "gpt2")
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and {path}"
            f" {vocab_size}; give --tokenizer the one of its training"
        )
    return tokenizer


def _gpt2_by_name() -> Tokenizer:
    """All that a run keeps of GPT-2's tokenizer is its name; its merges need not be at hand."""
    tokenizer = Tokenizer()
    tokenizer.name, tokenizer.vocab_size = "gpt2", GPT2_VOCAB
    return tokenizer


def named_or_stored_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name, `gpt2` or `bytes`, or of a folder that holds one.

    Raises:
        UserError: there is none of that name or in that folder.
    """
    if name == "gpt2":
        return _gpt2_by_name()
    if Path(name).expanduser().exists():
        return load_tokenizer(name)
    check_tokenizer_name(name)
    if name != "bytes":
        raise UserError(f"a tokenizer {name} is trained with its data; give the folder that has it")
    return named_tokenizer(name)


if __name__ == "__main__":
    from wavelet_lm.cli.convert import main
    from wavelet_lm.errors import run_command

    run_command(main)
