"""Model weights on disk: one safetensors file that says itself what it holds.

The header's metadata carries the config, the vocabulary size and the step, so that a file can be
loaded without anything beside it. A training checkpoint (`last.safetensors`) is the same file with
more tensors, whose names start with a prefix that no parameter has (`training/saved_state.py`).
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.hub_paths import local_path
from wavelet_lm.json_files import brief, parse_json, said_format
from wavelet_lm.models.registry import model_without_weights
from wavelet_lm.models.stored_model import StoredModel, TensorReader

FORMAT = "wavelet_lm.1"
QUANTIZED_FORMAT = "wavelet_lm.quantized.1"
EXTRA = "training/"
CHECKED_AT_ONCE = 2**20
# A tensor of a model that is no weight has fewer values than this and the bytes of its file.
BUFFER_VALUES = 2**27
# What a model is trained in; whole numbers would be copied into its weights without a word.
WEIGHT_DTYPES = ("F64", "F32", "BF16", "F16")


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    metadata: dict[str, Any],
    extra: dict[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, JSON-ready `metadata`, and `extra` tensors, atomically.

    Args:
        weights: whole ones by name, where the model has shares of them; None = the model's.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older file is kept.
    """
    weights = dict(model.named_parameters()) if weights is None else weights
    tensors = {name: p.detach().contiguous() for name, p in weights.items()}
    # safetensors refuses tensors that share memory, as some optimizer states do. The copies are on
    # the CPU, for a GPU in training has no room for them.
    tensors |= {EXTRA + name: t.detach().to("cpu", copy=True) for name, t in (extra or {}).items()}
    header = {
        "format": FORMAT,
        "config": json.dumps(model.config.to_dict()),
        "vocab_size": str(model.vocab_size),
        "metadata": json.dumps(metadata),
    }
    write_tensors(path, tensors, header)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file with `header` as its metadata, atomically.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older file is kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # its own error type for a full disk and the like
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        temporary.chmod(mode)  # safetensors makes files that only their owner may read


def copy_with_config(checkpoint: "Checkpoint", path: Path, config: Mapping[str, Any]) -> Path:
    """Write a checkpoint to `path` with another config in its header; returns it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    with checkpoint.path.open("rb") as source, atomic_path(path) as temporary:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"]["config"] = json.dumps(config)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
        with temporary.open("wb") as copy:
            copy.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, copy)
    return path


class Checkpoint:
    """A checkpoint file, opened: `config`, `vocab_size` and `metadata` are read, tensors on demand.

    `quantization` is the scheme of a quantized one (`inference/quantization`), else None.

    Raises:
        UserError: the file is missing, truncated, or not a checkpoint of this project.
    """

    def __init__(self, path: str | Path):
        from safetensors import safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: there is no such checkpoint")
        try:
            self._file = safe_open(str(path), framework="pt")
            header = self._file.metadata() or {}
            self.names = frozenset(self._file.keys())
        except Exception as error:
            raise UserError(
                f"{path}: truncated or not a safetensors file ({error}); use another checkpoint"
            ) from None
        if header.get("format") not in (FORMAT, QUANTIZED_FORMAT):
            raise UserError(
                f"{path}: no checkpoint of this project ({said_format(header)}); this version"
                f" reads {FORMAT!r} and {QUANTIZED_FORMAT!r}"
            )
        self.quantization: str | None = header.get("quantization")
        self.config = Config.from_dict(self._object(header, "config"), source=str(path))
        self.metadata: dict[str, Any] = self._object(header, "metadata")
        size = header.get("vocab_size", "")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", size):
            raise self.damaged(f"its vocab_size is {brief(size)}, no whole number from 1")
        self.vocab_size = int(size)
        if (self.quantization is not None) != (header["format"] == QUANTIZED_FORMAT):
            raise self.damaged(f"it is {header['format']}, and that does not fit its scheme")

    def _object(self, header: dict[str, str], key: str) -> dict[str, Any]:
        """What the header has as JSON under this key."""
        if key not in header:
            raise self.damaged(f"it has no {key}")
        value = parse_json(header[key], f"{self.path}: the {key} in its header")
        if not isinstance(value, dict):
            raise self.damaged(f"its {key} is {brief(value)}, not an object")
        return value

    def damaged(self, problem: str) -> UserError:
        """The error of a header that says what cannot be."""
        return UserError(f"{self.path}: its header is damaged ({problem}); use another checkpoint")

    def require(self, kinds: Mapping[str, tuple[type, ...]]) -> None:
        """Raise `UserError` unless the metadata has these keys, each of one of its types."""
        check_kinds(self.metadata, kinds, self.damaged)

    def without_weights(self) -> nn.Module:
        """The model that the header describes, on the meta device: shapes alone.

        Raises:
            UserError: no such model can be built, or it has far more tensors than the file.
        """
        return model_without_weights(self.config, self.vocab_size, str(self.path), len(self.names))

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its full name, in the shape and dtype of the file."""
        return self._file.get_tensor(name)

    def extra(self) -> dict[str, Tensor]:
        """The tensors beyond the weights, by name without their prefix."""
        # Cloned, since what safetensors returns is a view of the mapped file.
        names = (name for name in self.names if name.startswith(EXTRA))
        return {name.removeprefix(EXTRA): self.tensor(name).clone() for name in names}

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model of the same shape.

        Raises:
            UserError: as `check_fits`.
        """
        self.check_fits(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.tensor(name))

    def check_fits(self, model: nn.Module) -> None:
        """Raise unless the file has the weights of a model of this shape, which needs none itself.

        Raises:
            UserError: the weights are quantized, or names, shapes or types differ; the line lists
                the first ones.
        """
        if self.quantization is not None:
            raise UserError(
                f"{self.path}: its weights are quantized, for generation and evaluation alone; use"
                " the checkpoint that it was made from"
            )
        names = {name for name in self.names if not name.startswith(EXTRA)}
        if self._is_classifier(names) and not self._is_classifier(dict(model.named_parameters())):
            raise UserError(
                f"{self.path}: the weights of a classifier, which neither writes nor scores texts;"
                " give a checkpoint of a language model"
            )
        stored = {name: self._file.get_slice(name) for name in names}
        shapes = {name: values.get_shape() for name, values in stored.items()}
        check_shapes(shapes, model, self.path, {n: v.get_dtype() for n, v in stored.items()})

    @staticmethod
    def _is_classifier(names: Iterable[str]) -> bool:
        return any(name.startswith("backbone.") for name in names)


def check_kinds(
    metadata: Mapping[str, Any],
    kinds: Mapping[str, tuple[type, ...]],
    damaged: Callable[[str], UserError],
) -> None:
    """Raise what `damaged` makes of it unless the metadata has these keys, each of one type."""
    for key, types in kinds.items():
        value = metadata.get(key)
        # To Python, True is a whole number.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise damaged(f"the {key} in its metadata is {brief(value)}")


def check_shapes(
    stored: Mapping[str, list[int]],
    model: nn.Module,
    path: Path,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Raise `UserError` unless stored weights, by name, are those of a model of this shape.

    Args:
        dtypes: of the stored weights, as safetensors names them.
    """
    parameters = dict(model.named_parameters())
    problems = [f"no {name}" for name in sorted(parameters.keys() - stored.keys())]
    problems += [f"unknown {name}" for name in sorted(stored.keys() - parameters.keys())]
    for name in sorted(parameters.keys() & stored.keys()):
        needed = list(parameters[name].shape)
        if stored[name] != needed:
            problems.append(f"{name} is {stored[name]}, the model's is {needed}")
        elif dtypes is not None and dtypes[name] not in WEIGHT_DTYPES:
            problems.append(f"{name} is {dtypes[name]}, weights are floating point")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: a checkpoint of another config: {'; '.join(problems[:3])}{more}")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, or a run folder's best, else its last.

    Raises:
        UserError: the folder has none, or a run of the hub cannot be fetched.
    """
    path = local_path(path)
    if path.is_dir():
        for name in ("best.safetensors", "last.safetensors"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no best.safetensors or last.safetensors in this folder")
    return path


def check_finite(model: nn.Module, checkpoint: str | Path) -> None:
    """Raise `UserError` for weights that are NaN or infinite, with the name of the first ones."""
    for name, parameter in model.named_parameters():
        check_values(name, parameter.detach(), checkpoint)


def check_values(name: str, values: Tensor, checkpoint: str | Path) -> None:
    """As `check_finite` for a tensor of any shape; in parts, since summing faults takes memory."""
    n_bad = sum(int((~part.isfinite()).sum()) for part in values.flatten().split(CHECKED_AT_ONCE))
    if n_bad:
        raise UserError(
            f"{checkpoint}: {n_bad:,} of the {values.numel():,} values of {name} are not"
            " finite (NaN or infinite); its training diverged or the file is damaged: use"
            " another checkpoint"
        )


def stored_model(checkpoint: Checkpoint, device: str | torch.device = "cpu") -> StoredModel:
    """The model of a checkpoint, whose weights stay in the file until a part is at work on them.

    Raises:
        UserError: the file does not fit its config.
    """
    path, read = checkpoint.path, TensorReader(checkpoint.path)
    config, vocab_size, most = checkpoint.config, checkpoint.vocab_size, path.stat().st_size
    try:
        n = len(checkpoint.names)
        stored = StoredModel(
            config, vocab_size, read, device, most=most + BUFFER_VALUES, n_tensors=n
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    checkpoint.check_fits(stored.model)
    return stored


def load_own_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a run folder or a checkpoint file of this project, in eval mode on `device`.

    `inference.loading.load_model` takes published and quantized checkpoints as well.

    Raises:
        UserError: there is none, it is truncated, or it does not fit its config.
    """
    return stored_model(Checkpoint(find_checkpoint(path)), device).loaded()
