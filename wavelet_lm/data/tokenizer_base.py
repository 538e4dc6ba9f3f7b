"""What all tokenizers offer, whether their tokens are text or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from wavelet_lm.atomic_files import write_text

Tokens = Sequence[int] | np.ndarray


class Tokenizer:
    """What all tokenizers offer.

    name: as the config writes it; vocab_size: tokens are 0 … vocab_size - 1; end_of_text: the
    token that stands between documents, or None where there is none.
    """

    name: str
    vocab_size: int
    end_of_text: int | None = None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; strings such as `<|endoftext|>` inside it are plain text."""
        return np.asarray(self.encode_batch([text])[0]).tolist()

    def encode_batch(self, texts: Sequence[str], start: int = 0) -> list[Tokens]:
        """Tokens of each of several texts.

        start: position of the first text's first character in the whole, for error messages.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token (possibly part of a character); empty for end_of_text."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode equally."""
        return self.name

    def save(self, folder: str | Path) -> None:
        """Write what `load_tokenizer` needs into `folder`, which is made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Escapes keep odd characters (separators, line ends) out of the file.
        write_text(folder / "tokenizer.json", json.dumps({"name": self.name, **self._details()}))

    def _details(self) -> dict[str, object]:
        return {}
