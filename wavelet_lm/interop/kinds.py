"""What lies at a path, in words, for commands that were given something else than they take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from wavelet_lm.data.files import some
from wavelet_lm.errors import UserError
from wavelet_lm.hub_paths import is_in_hub
from wavelet_lm.interop.published import SUFFIXES
from wavelet_lm.json_files import brief, read_json

MODEL_TYPE = "wavelet_lm"  # that a folder of transformers says it holds
BEST, LAST = "best.safetensors", "last.safetensors"
ADAPTER = "adapter_config.json"


def check_convertible(path: str | Path) -> None:
    """Raise `UserError` for what is neither a published file nor a folder of transformers.

    A published file may still turn out to be none when it is read.
    """
    given = _of_this_machine(path, "a file or folder")
    if given.is_dir():
        if not is_transformers_folder(given):
            advice = _instead_of_folder(given)
            raise UserError(
                f"{given}: {_folder_in_words(given)}; convert takes a published .pt, or a folder as"
                f" wavelet-lm export hf or save_pretrained makes it{advice}"
            )
    elif given.suffix not in SUFFIXES:
        raise UserError(
            f"{given}: no published checkpoint ({' or '.join(SUFFIXES)}); convert takes one, or a"
            " folder as wavelet-lm export hf or save_pretrained makes it"
        )


def check_run_folder(path: str | Path) -> Path:
    """The run folder `path` with its best weights, as they are sent to others.

    Raises:
        UserError: it is something else; the line says what, and what to give instead.
    """
    given = _of_this_machine(path, "a run folder")
    if given.is_dir() and (given / BEST).is_file():
        return given
    if not given.is_dir():
        what, instead = "a file", ""
        if (given.parent / BEST).is_file():
            instead = f"; give {given.parent}"
        elif given.suffix in SUFFIXES:
            instead = f"; make one of it: wavelet-lm convert {given} --out RUN"
    else:
        what, instead = _folder_in_words(given), ""
        if is_transformers_folder(given):
            instead = f"; make one of it: wavelet-lm convert {given} --out RUN"
        elif runs := sorted(file.parent for file in given.glob(f"*/{BEST}")):
            instead = f"; give one of those in it: {some(runs, given)}"
    raise UserError(f"{given}: {what}; push takes a run folder with its {BEST}{instead}")


def is_transformers_folder(path: str | Path) -> bool:
    """Whether this is a folder as `export_hf` or `save_pretrained` makes it."""
    return _config_of(Path(path).expanduser()).get("model_type") == MODEL_TYPE


def _of_this_machine(path: str | Path, wanted: str) -> Path:
    if is_in_hub(path):
        raise UserError(f"{path}: is in the hub; give {wanted} of this machine")
    given = Path(path).expanduser()
    if not given.exists():
        raise UserError(f"{path}: there is no such file or folder")
    return given


def _folder_in_words(folder: Path) -> str:
    kind = _config_of(folder).get("model_type")
    if (folder / BEST).is_file():
        return "a run folder"
    if (folder / LAST).is_file():
        return f"a run folder without {BEST}, which training writes when it validates after warm-up"
    if kind == MODEL_TYPE:
        return "a folder of transformers"
    if kind is not None:
        return f"a folder of transformers, of another model (model_type {brief(kind)})"
    if (folder / ADAPTER).is_file():
        return "an adapter alone, without its model"
    return "neither a run folder nor one of transformers"


def _instead_of_folder(folder: Path) -> str:
    """What to do with a folder that `convert` does not take."""
    if (folder / BEST).is_file() or (folder / LAST).is_file():
        return "; a run folder is used as it is"
    if (folder / ADAPTER).is_file():
        return "; merge the adapter first (merge_and_unload, save_pretrained)"
    inside = sorted(folder.iterdir())
    found = [path for path in inside if path.suffix in SUFFIXES or is_transformers_folder(path)]
    return f"; give one of those in it: {some(found, folder)}" if found else ""


def _config_of(folder: Path) -> dict[str, Any]:
    """Its config.json, empty where there is none that can be read."""
    with suppress(UserError):
        config = read_json(folder / "config.json")
        if isinstance(config, dict):
            return config
    return {}
