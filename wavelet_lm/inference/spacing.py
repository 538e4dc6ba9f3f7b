"""Taking the artefacts of WikiText's tokenisation out of a text that a model wrote.

WikiText sets every punctuation mark apart: `The " role @-@ playing " game ( 10 @,@ 000 copies )
did n't sell .` Here it becomes `The "role-playing" game (10,000 copies) didn't sell.` Text that is
spaced the ordinary way stays as it is. Lines are independent of one another.
"""

import re

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

    def finish(self) -> str:
        """The clean text of the last line."""
        rest, self._line = "".join(self._line), []
        return clean_spacing(rest)


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
