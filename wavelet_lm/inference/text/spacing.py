"""Taking the artefacts of WikiText's tokenisation out of a text that a model wrote.

WikiText sets every punctuation mark apart: `The " role @-@ playing " game ( 10 @,@ 000 copies )
did n't sell .` Here it becomes `The "role-playing" game (10,000 copies) didn't sell.` Text that is
spaced the ordinary way stays as it is. Lines are independent of one another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Text of this kind by the name of its data set: the hub's and ours, a folder's, WikiText's files.
SPACED_APART = re.compile(r"wikitext|^wiki\.(train|valid|test)\b", re.IGNORECASE)

NEGATED = (
    "ai|are|ca|could|dare|did|do|does|had|has|have|is|might|must|need|ought|sha|should|was|were|wo"
    "|would"
)
# Each takes single spaces away; more than one are no artefact, nor are those inside braces.
RULES = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        # Punctuation that stands alone; not .5, :) or an ellipsis, and not an indented line.
        (r'(?<=\S) ([.,;:!?%])(?=[\s"”]|$)', r"\1"),
        # Inside brackets and directed quotes; not :( and not an empty pair.
        (r'(?<![^\s(\[“"])([(\[“]) (?=[^\s)\]”])', r"\1"),
        (r"(?<=[^\s(\[“]) ([)\]”])(?!\w)", r"\1"),
        # it 's, do n't, don 't; not the 's' key, and not van 't Hoff.
        (r"""(?<=[\w.%)\]"”]) '(s|re|ve|ll|d|m)(?![\w'])""", r"'\1"),
        (r"(?<=\w) (n't)(?!\w)", r"\1"),
        (rf"\b((?:{NEGATED})n) ('t)(?!\w)", r"\1\2"),
    )
]


def is_spaced_apart(dataset: str) -> bool:
    """Whether the data set of a run's config is WikiText, whose marks all stand apart.

    Its name has to say so: `wikitext-103`, `Salesforce/wikitext:wikitext-2-v1`, a file or folder
    that is called so, or one of WikiText's own files. A published checkpoint whose config names no
    data set was trained on `wikitext-103`, which is what its config says then.
    """
    return SPACED_APART.search(dataset.rstrip("/").rpartition("/")[2]) is not None


def clean_spacing(text: str) -> str:
    """The text without the artefacts; cleaning again changes nothing.

    A text that goes on in the middle of a line is best cleaned together with that line.
    """
    return "\n".join(map(_clean_line, text.split("\n")))


class CleanStream:
    """`clean_spacing` of a text that comes in pieces, however it is cut."""

    def __init__(self) -> None:
        self._line: list[str] = []

    def feed(self, piece: str) -> str:
        """The clean text of the lines that this piece completes, which may be none."""
        lines, end, rest = piece.rpartition("\n")
        if not end:
            self._line.append(piece)
            return ""
        whole = "".join(self._line) + lines + end
        self._line = [rest]
        return clean_spacing(whole)

    @property
    def line(self) -> str:
        """The last line so far, as it came."""
        return "".join(self._line)

    def finish(self) -> str:
        """The clean text of the last line."""
        rest, self._line = "".join(self._line), []
        return clean_spacing(rest)


class CleanContinuation:
    """The clean form of a text that goes on after `before`, inside a line.

    What `before` says decides about its first line: whether a comma stands apart from a word, and
    whether a quotation is open. Text comes line by line.
    """

    def __init__(self, before: str):
        self._before = before
        self._first: str | None = ""  # of the first line, until it is complete
        self._rest = CleanStream()

    def feed(self, piece: str) -> str:
        """The clean text of the lines that this piece completes, which may be none."""
        if self._first is None:
            return self._rest.feed(piece)
        self._first += piece
        line, end, rest = self._first.partition("\n")
        if not end:
            return ""
        self._first = None
        return self._continued(line) + end + self._rest.feed(rest)

    def finish(self) -> str:
        """The clean text of the last line."""
        return self._rest.finish() if self._first is None else self._continued(self._first)

    def settled(self, wanted: Sequence[str]) -> str:
        """The clean beginning of the unfinished line, as far as what follows cannot change it.

        That is all but its last two words (of which what follows may join one to the other), or
        all of it where they are plain; or where the last word holds one of `wanted`: what is
        inside a word stays together. Empty where the line holds none of them.
        """
        if not wanted:
            return ""
        line = self._rest.line if self._first is None else self._first
        bare = _bare(line)
        if not any(_bare(text) in bare for text in wanted):  # by far the most frequent case
            return ""
        cleaned = clean_spacing if self._first is None else self._continued
        clean, (head, _, last) = cleaned(line), line.rstrip(" ").rpartition(" ")
        if any(text in last and "@" not in text for text in wanted):
            return clean
        head = head.rstrip(" ")
        if line.endswith(last) and last.isalnum() and last.lower() != "n" and head[-1:].isalnum():
            return clean
        start = cleaned(head.rpartition(" ")[0].rstrip(" "))
        return start if clean.startswith(start) else ""

    def _continued(self, line: str) -> str:
        whole, start = clean_spacing(self._before + line), clean_spacing(self._before)
        # Where the line changes what stands before it, which is on the screen already, it is
        # cleaned for itself.
        return whole[len(start) :] if whole.startswith(start) else clean_spacing(line)


def _bare(text: str) -> str:
    """The text without all that cleaning may take away."""
    return text.replace(" ", "").replace("@", "")


def _clean_line(line: str) -> str:
    # What one rule joins may be what another one waits for. It ends, since the line gets shorter.
    while True:
        before = line
        line = re.sub(" @([-,.])@ ", r"\1", line)
        line = _join_quotes(line)
        for pattern, replacement in RULES:
            line = pattern.sub(replacement, line)
        if line == before:
            return line


def _join_quotes(line: str) -> str:
    """Take the spaces away that part quotation marks from what they enclose.

    A mark that touches a word on one side shows whether it opens or closes. One that stands alone
    closes the quotation that is open, or else opens one.
    """
    parts, padded, is_open = line.split('"'), f" {line} ", False
    for i, mark in enumerate(re.finditer('"', padded)):
        left, right = padded[mark.start() - 1], padded[mark.end()]
        if left.isspace() and right.isspace():
            is_open = not is_open
            if is_open:
                parts[i + 1] = parts[i + 1].lstrip(" ")
            else:
                parts[i] = parts[i].rstrip(" ")
        elif left.isspace() or left in "([":
            is_open = True
        elif not right.isalnum():
            is_open = False
        elif not left.isalnum():
            is_open = True
    return '"'.join(parts)
