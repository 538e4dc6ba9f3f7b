"""A read text on disk: what a model remembers of it, so that it need not be read again.

One safetensors file, of one size for texts of any length. Its tensors are the next-token logits,
what is known of the text (its last tokens, which tokens it holds, how many they were), and the
leaves of the state, each under its place in it (`state[0].mean.total`); its header names the format
and has the fingerprint of the model, since a state means nothing to another one. Files of the older
format, which have all tokens of the text, are read as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from wavelet_lm.config import Config, ModelConfig
from wavelet_lm.errors import UserError
from wavelet_lm.json_files import said_format
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.checkpoint import write_tensors
from wavelet_lm.models.wavelet_lm.memory import FastWeights

FORMAT = "wavelet_lm.state.2"
WITH_ALL_TOKENS = "wavelet_lm.state.1"
# Tokens of the end of a text that are kept.
LAST = 256
STATE = "state"
# Values of every parameter that go into a model's fingerprint.
N_SAMPLES = 4096
# The one network option that is of how a text is read and not of the weights; it can change.
READING = "fwpkm_inference_updates"


class Past(NamedTuple):
    """What is left of the beginning of a text: how many tokens it had, and which."""

    n: int = 0
    seen: frozenset[int] = frozenset()


def save_state(
    path: str | Path,
    state: Any,
    logits: Tensor,
    tokens: Sequence[int],
    model: nn.Module | ModelRecord,
    past: Past = Past(),  # noqa: B008  (nothing changes it)
    whole: bool = False,
) -> None:
    """Write the state of one text, atomically.

    Args:
        state: of a batch of 1, a pytree whose leaves are tensors or None.
        logits: [1, V], of the token that comes next.
        tokens: the text so far, one or more.
        model: what read it, as its checkpoint gives it (not a decoder's fused model).
        past: of the text before these tokens.
        whole: keep all of these tokens, for a text that is to be written out from its beginning.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older file is kept.
    """
    leaves, _ = tree_flatten_with_path(state)
    tensors = {STATE + keystr(place): leaf for place, leaf in leaves if leaf is not None}
    seen = torch.zeros(model.vocab_size, dtype=torch.bool)
    seen[torch.tensor([*past.seen, *tokens])] = True
    tensors |= {
        "logits": logits,
        "last": torch.tensor(tokens if whole else tokens[-LAST:]),
        "seen": packed_bits(seen),
        "count": torch.tensor([past.n + len(tokens)]),
    }
    # Cloned, since safetensors refuses tensors that share memory.
    tensors = {
        name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    write_tensors(path, tensors, {"format": FORMAT, "model": fingerprint(model)})


def packed_bits(flags: Tensor) -> Tensor:
    """Flags [n] bool as bits, [⌈n / 8⌉] uint8."""
    return torch.from_numpy(np.packbits(flags.numpy()))


def unpacked_bits(bits: Tensor, n: int) -> Tensor:
    """What `packed_bits` was given, [n] bool, of its bits [⌈n / 8⌉] uint8."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=n)).bool()


def load_state(
    path: str | Path, model: nn.Module | ModelRecord, template: Any, device: str | torch.device
) -> tuple[Tensor, Any, list[int], Past]:
    """Read what `save_state` wrote.

    Args:
        model: the one that `save_state` was given.
        template: what the state of one text looks like there, where it is to go on:
            `decoder.start(decoder.prefill([[0]])[1]).state()`. It decides on context, precision and
            whether fast weights are learned; where they are, the file need not have any yet.
        device: where logits and state go.

    Returns:
        Logits [1, V], the state, the last tokens of the text (one or more), and what is left of
        those before.

    Raises:
        UserError: there is no such file, it is truncated or no state, or it belongs to another
            model or another way of reading.
    """
    from safetensors import safe_open

    formats = (FORMAT, WITH_ALL_TOKENS)
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such state")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            # Copied, since what safetensors returns is a view of the mapped file.
            tensors = {
                name: file.get_tensor(name).clone()
                for name in (file.keys() if header.get("format") in formats else ())
            }
    except Exception as error:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({error}); save the state again"
        ) from None
    if header.get("format") not in formats:
        raise UserError(
            f"{path}: no saved state ({said_format(header)}, not {FORMAT!r}); give a file that"
            " --save_state wrote"
        )
    if header.get("model") != fingerprint(model):
        raise UserError(
            f"{path}: belongs to another model; use the checkpoint that it was saved with"
        )
    whole = header["format"] == WITH_ALL_TOKENS
    logits, tokens, past = _text(path, tensors, model.vocab_size, "tokens" if whole else "last")
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return logits.to(device), _restored(path, tensors, template), tokens, past


def text_length(path: str | Path) -> int:
    """How many tokens the text of a saved state has, without reading the state.

    Raises:
        UserError: the file cannot be opened, or is none.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if "tokens" in file.keys():  # noqa: SIM118  (no mapping)
                return file.get_slice("tokens").get_shape()[0]
            return int(file.get_tensor("count"))
    except Exception as error:
        raise UserError(f"{path}: no saved state ({error})") from None


def _text(
    path: str | Path, tensors: dict[str, Tensor], vocab_size: int, name_of_tokens: str
) -> tuple[Tensor, list[int], Past]:
    """Logits [1, V], tokens and what came before them, taken out of what a file holds.

    Raises:
        UserError: they are missing or cannot be what they should.
    """
    logits, tokens = tensors.pop("logits", None), tensors.pop(name_of_tokens, None)
    seen, count = tensors.pop("seen", None), tensors.pop("count", None)
    has_logits = (
        logits is not None
        and logits.shape == (1, vocab_size)
        and logits.is_floating_point()
        and bool(logits.isfinite().all())
    )
    has_tokens = (
        tokens is not None
        and tokens.dtype == torch.int64
        and tokens.dim() == 1
        and len(tokens) > 0
        and 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size
    )
    n = len(tokens) if has_tokens else 0
    whole = name_of_tokens == "tokens"
    n_bytes = -(-vocab_size // 8)
    has_seen = whole or (
        seen is not None and seen.dtype == torch.uint8 and seen.shape == (n_bytes,)
    )
    has_count = whole or (
        count is not None
        and count.dtype == torch.int64
        and count.shape == (1,)
        and min(LAST, int(count)) <= n <= int(count)
    )
    for name, found in (
        ("logits", has_logits),
        (name_of_tokens, has_tokens),
        ("seen", has_seen),
        ("count", has_count),
    ):
        if not found:
            raise UserError(f"{path}: its {name} are missing or damaged; save the state again")
    if whole or n == int(count):
        return logits, tokens.tolist(), Past()
    known = unpacked_bits(seen, vocab_size).nonzero()[:, 0].tolist()
    return logits, tokens.tolist(), Past(int(count) - n, frozenset(known))


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """What is known of a model that is in memory no more.

    fingerprint: what the function of this name gave.
    """

    config: Config
    vocab_size: int
    fingerprint: str

    @classmethod
    def of(cls, model: LanguageModel) -> ModelRecord:
        """The record of a model that is there."""
        return cls(model.config, model.vocab_size, fingerprint(model))


class Fingerprint:
    """Takes the parameters of a model one by one, in any order.

    Of every parameter up to `N_SAMPLES` values count, evenly spread, so that a large model need not
    be read whole; training moves all of them. Options at their defaults do not count, so that a
    state outlives the day on which a new option comes up, and nor does the one of `READING`.
    """

    def __init__(self) -> None:
        self._samples: dict[str, tuple[str, Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Take in a weight of any shape, by a sample of its values."""
        flat = values.detach().flatten()
        step = max(1, -(-flat.numel() // N_SAMPLES))
        self._samples[name] = f"{name} {values.dtype} {list(values.shape)}", flat[::step].clone()

    def of(self, model: nn.Module) -> str:
        """The hash for this model, all of whose parameters have been added."""
        options = {
            field.name: getattr(model.config, field.name)
            for field in dataclasses.fields(ModelConfig)
            if getattr(model.config, field.name) != field.default and field.name != READING
        }
        digest = hashlib.sha256()
        digest.update(json.dumps([options, model.vocab_size], sort_keys=True).encode())
        for name, _ in model.named_parameters():
            kind, samples = self._samples[name]
            digest.update(kind.encode())
            digest.update(samples.double().cpu().numpy().tobytes())
        return digest.hexdigest()


def fingerprint(model: nn.Module | ModelRecord) -> str:
    """A hash of what a state depends on: the network's options, its vocabulary, its weights."""
    if isinstance(model, ModelRecord):
        return model.fingerprint
    parts = Fingerprint()
    for name, parameter in model.named_parameters():
        parts.add(name, parameter)
    return parts.of(model)


def _restored(path: str | Path, tensors: dict[str, Tensor], template: Any) -> Any:
    """The tensors in the structure of `template`, which they must fit."""
    left = dict(tensors)

    def take(name: str, like: Tensor | None, learned: bool = False) -> Tensor | None:
        """The tensor of this name; what was learned may be absent and is as long as it is."""
        tensor = left.pop(name, None)
        may_be_absent = learned and tensor is None
        if not may_be_absent and _kind(tensor, learned) != _kind(like, learned):
            raise UserError(
                f"{path}: saved with another context, precision, or other fast weights than asked"
                f" for now ({name} is {_kind(tensor)}, here {_kind(like)}); give the same options"
            )
        return tensor

    def restore(name: str, node: Tensor | FastWeights | None) -> Tensor | FastWeights | None:
        if not isinstance(node, FastWeights):
            return take(name, node)
        memory = FastWeights(*(take(f"{name}.{f}", getattr(node, f), True) for f in node._fields))
        return node if memory.rows is None else memory

    nodes, structure = tree_flatten_with_path(
        template, is_leaf=lambda node: isinstance(node, FastWeights)
    )
    restored = [restore(STATE + keystr(place), node) for place, node in nodes]
    for name in sorted(left):
        take(name, None)
    return tree_unflatten(restored, structure)


def _kind(tensor: Tensor | None, growing: bool = False) -> str:
    """What a leaf is, in words; with `growing`, whatever the length of its dimension 1."""
    if tensor is None:
        return "absent"
    shape = [*tensor.shape]
    if growing:
        shape[1:2] = ["any"]
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}"
