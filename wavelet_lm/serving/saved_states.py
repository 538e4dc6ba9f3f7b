"""States with names, which last: in a folder, or as long as the server does."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_leaves

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.errors import UserError
from wavelet_lm.inference.context import RecentTokens
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.state_file import ModelRecord, Past, load_state, save_state, text_length
from wavelet_lm.serving.fields import is_name
from wavelet_lm.serving.known import Known, Layout
from wavelet_lm.serving.refused import Refused

SUFFIX = ".state"


@dataclass(frozen=True)
class Summary:
    """What is said of a state: its tokens, and when it was made (seconds of the epoch)."""

    n: int
    created: int


class SavedStates:
    """Named states of one model; any thread may ask for them.

    Args:
        folder: where they are kept, one file each as `generate.py --save_state` writes it; None:
            in memory.
        limit: the most there may be.

    Raises:
        UserError: the folder cannot be read or made.
    """

    def __init__(
        self,
        decoder: Decoder,
        layout: Layout,
        model: ModelRecord,
        folder: Path | None = None,
        limit: int = 4096,
    ):
        self._layout, self._model, self._folder, self._limit = layout, model, folder, limit
        self._template = decoder.prefill([[0]])[1]
        self._device = decoder.device
        self._in_memory: dict[str, Known] = {}
        self._summaries: dict[str, Summary] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                found = sorted(folder.glob(f"*{SUFFIX}"))
            except OSError as error:
                raise unreadable(error, folder) from error
            for file in found:
                if is_name(file.stem):
                    with contextlib.suppress(UserError, OSError):  # no state; it stays as it is
                        summary = Summary(text_length(file), int(file.stat().st_mtime))
                        self._summaries[file.stem] = summary

    def __len__(self) -> int:
        return len(self._summaries)

    def all(self) -> list[tuple[str, Summary]]:
        """What is said of all states, the oldest first, as they are at one moment."""
        return sorted(self._summaries.items(), key=lambda state: (state[1].created, state[0]))

    def summary(self, name: str) -> Summary:
        """What is said of a state.

        Raises:
            Refused: there is none of this name.
        """
        found = self._summaries.get(name)
        if found is None:
            raise _unknown(name)
        return found

    def new_name(self) -> str:
        """A name that no state has."""
        return f"state-{secrets.token_hex(8)}"

    def check_room(self, name: str) -> None:
        """Raise `Refused` where one more state of this name would be too many."""
        if name not in self._summaries and len(self) >= self._limit:
            raise Refused(
                507, f"there are {len(self)} saved states, as many as may be; delete some", "name"
            )

    def keep(self, name: str, known: Known) -> None:
        """Keep a state under a name, in place of one that has it.

        Raises:
            Refused: there are too many.
            UserError: the disk is full.
        """
        self.check_room(name)
        if self._folder is None:
            self._in_memory[name] = known
        else:
            self._write(self._folder / f"{name}{SUFFIX}", known)
        self._summaries[name] = Summary(known.n, int(time.time()))

    def get(self, name: str) -> Known:
        """A state.

        Raises:
            Refused: there is none of this name.
            UserError: its file is no state of this model.
        """
        self.summary(name)
        if self._folder is None:
            known = self._in_memory.get(name)
            if known is None:  # deleted in this moment
                raise _unknown(name)
            return known
        return self._read(self._folder / f"{name}{SUFFIX}")

    def forget(self, name: str) -> None:
        """Delete a state.

        Raises:
            Refused: there is none of this name.
        """
        if self._summaries.pop(name, None) is None:
            raise _unknown(name)
        self._in_memory.pop(name, None)
        if self._folder is not None:
            (self._folder / f"{name}{SUFFIX}").unlink(missing_ok=True)

    # --- files -----------------------------------------------------------------------------------

    def file(self, name: str) -> bytes:
        """A state as a file.

        Raises:
            Refused, UserError: as `get`.
        """
        known = self.get(name)
        return self._by_file(lambda path: (self._write(path, known), path.read_bytes())[1])

    def keep_file(self, name: str, content: bytes) -> None:
        """Keep a state that comes as a file.

        Raises:
            Refused: there are too many.
            UserError: it is no state of this model.
        """
        self.check_room(name)

        def read(path: Path) -> Known:
            path.write_bytes(content)
            return self._read(path)

        try:
            known = self._by_file(read)
        except UserError as error:  # whose file nobody knows
            raise UserError(str(error).partition(": ")[2]) from None
        self.keep(name, known)

    def _by_file(self, use: Callable[[Path], Any]) -> Any:
        with tempfile.TemporaryDirectory(prefix="wavelet_lm_") as folder:
            return use(Path(folder) / "state")

    def _write(self, path: Path, known: Known) -> None:
        state, logits = self._layout.unpack(known)
        past = Past()
        if known.n > len(known.last):
            seen = known.seen_tokens(self._model.vocab_size).nonzero()[:, 0].tolist()
            past = Past(known.n - len(known.last), frozenset(seen))
        save_state(path, state, logits, list(known.last), self._model, past)

    def _read(self, path: Path) -> Known:
        read = load_state(path, self._model, self._template, self._device)
        logits, state, tokens, past = read
        n, seen = past.n + len(tokens), self._layout.seen(tokens, past.seen)
        if not is_plausible(state, n, self._model.vocab_size):
            raise UserError(f"{path}: its state is damaged; save the state again")
        return self._layout.pack(state, logits, n, tokens, seen)


def _unknown(name: str) -> Refused:
    return Refused(404, f"there is no state {name!r}", "state")


def is_plausible(state: Any, n: int, vocab_size: int) -> bool:
    """Whether a state that came from elsewhere can be that of a text of n tokens.

    A number that is none, or a position that cannot be, would end the step of every other text.
    """
    if isinstance(state, RecentTokens):
        tokens, count = state.tokens, min(n, state.tokens.shape[1])
        return bool((tokens >= 0).all() and (tokens < vocab_size).all() and state.count == count)
    leaves = [leaf for leaf in tree_leaves(state) if leaf is not None]
    return all(
        bool(leaf.isfinite().all() if leaf.is_floating_point() else (leaf == n).all())
        for leaf in leaves
    )
