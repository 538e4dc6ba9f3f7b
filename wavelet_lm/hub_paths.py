"""A run by its path: a folder or a file, or `hf://user/name[@revision]` in the hub of models.

Whatever accepts a run looks it up by `local_path`, so that a name of the hub goes everywhere.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from wavelet_lm.errors import UserError, missing_extra

SCHEME = "hf://"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What of a run is sent and fetched: what loads it, and what says how it went.
FILES = (
    "config.json",
    "best.safetensors",
    "metrics.jsonl",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer/*",
)


def is_in_hub(path: str | Path) -> bool:
    """Whether a path is one of the hub."""
    return str(path).startswith(SCHEME)


def hub_name(path: str | Path) -> str | None:
    """`user/name` of a path of the hub; None of any other."""
    return _parts(str(path))[0] if is_in_hub(path) else None


def local_path(path: str | Path) -> Path:
    """Where a run is on this machine; one of the hub is fetched first, unless it is here already.

    Raises:
        UserError: there is no such model or revision, it holds no run, or it cannot be reached.
    """
    return _fetched(str(path)) if is_in_hub(path) else Path(path).expanduser()


def _parts(path: str) -> tuple[str, str | None]:
    name, at, revision = path.removeprefix(SCHEME).rstrip("/").partition("@")
    if not NAME.fullmatch(name) or (at and not revision):
        raise UserError(f"{path}: a model of the hub is written hf://user/name or …@revision")
    return name, revision or None


@cache  # one revision for all of a process, and one look
def _fetched(path: str) -> Path:
    name, revision = _parts(path)
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise missing_extra(path, "huggingface_hub", "hub") from None
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(FILES))
    except errors.RevisionNotFoundError:
        raise UserError(f"{path}: the model has no revision {revision}") from None
    except errors.GatedRepoError:
        raise UserError(f"{path}: its owner must grant access to it first") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{path}: there is no such model, or it is private; {LOG_IN}") from None
    except errors.LocalEntryNotFoundError as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{path}: cannot be fetched, and is not here yet ({reason})") from None
    except Exception as error:  # of its HTTP client too, which is another in other versions
        raise UserError(f"{path}: cannot be fetched ({first_line(error)})") from None
    if not (Path(folder) / "best.safetensors").is_file():
        raise UserError(
            f"{path}: holds no run of this project (no best.safetensors); wavelet-lm push sends one"
        )
    return Path(folder)


LOG_IN = "to see it or write to it, log in with hf auth login, or set HF_TOKEN"


def first_line(error: Exception) -> str:
    """What an error of the library says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
