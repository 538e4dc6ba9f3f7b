"""ListOps, the Long Range Arena's task of nested list operations, generated and read.

    [MAX 4 [MIN 2 3 ] [SM 9 5 ] ]   ->   4

Source: Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", 2018, in the
longer form of Tay et al., "Long Range Arena", 2020. The arena's files also hold the parentheses of
a binary tree; its models never see them, and so the reader here drops them and the writer has none.

`python -m wavelet_lm.data.tasks.listops FOLDER --seed 1` writes the three files alone.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wavelet_lm.atomic_files import as_user_error, atomic_path
from wavelet_lm.data.tasks.examples import PADDING, Task, TokenExamples
from wavelet_lm.data.tasks.tables import read_table
from wavelet_lm.errors import UserError

N_CLASSES = 10
OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: median(values),
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
# With the padding 16 tokens, as the papers count them.
NAMES = tuple(OPERATORS)
SYMBOLS = (*"0123456789", *NAMES, END)
TOKENS = {symbol: token for token, symbol in enumerate(SYMBOLS, start=PADDING + 1)}
VOCAB_SIZE = len(SYMBOLS) + 1

OPERATOR_SHARE = 0.25
PARTS = ("train", "val", "test")  # as the published files are named
SIZES = (96_000, 2_000, 2_000)
# The published shape accepts one draw in twelve; one that accepts none in this many has no more.
MAX_REJECTED = 100_000


@dataclass(frozen=True)
class Shape:
    """Which expressions are drawn; the defaults are the published task's.

    An expression has more than `min_length` and fewer than `max_length` symbols. At `max_depth`
    stand digits alone, the outermost operator being at depth 1; an operator has 2 … `max_args`
    arguments.

    Raises:
        UserError: no expression has this shape.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        for name, least in (("min_length", 0), ("max_depth", 2), ("max_args", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.max_length < self.min_length + 2:
            raise UserError(
                f"max_length is {self.max_length}; lengths lie between min_length"
                f" ({self.min_length}) and max_length, both excluded: give {self.min_length + 2}"
                " or more"
            )


class _TooLong(Exception):
    pass


def expressions(shape: Shape, seed: int) -> Iterator[tuple[bytes, int]]:
    """Distinct random expressions without end: (tokens, value).

    The same on every machine: `random()` is the one method of Python's generator whose sequence
    does not change between versions. An expression that grows too long is given up at once, which
    leaves the distribution of the others as it is.

    Raises:
        UserError: the shape has no further expressions.
    """
    draw = random.Random(seed).random
    seen: set[bytes] = set()
    rejected = 0
    while True:
        tokens = bytearray()
        try:
            value = _draw(draw, shape, 1, tokens)
        except _TooLong:
            continue
        found = bytes(tokens)
        if len(found) > shape.min_length and found not in seen:
            seen.add(found)
            rejected = 0
            yield found, value
        else:
            rejected += 1
        if rejected == MAX_REJECTED:
            raise UserError(
                f"only {len(seen)} expressions of {shape} were found; ask for fewer, or for other"
                " lengths, more arguments or more depth"
            )


def _draw(draw: Callable[[], float], shape: Shape, depth: int, tokens: bytearray) -> int:
    """Append a random expression to `tokens`; its value."""
    if depth == shape.max_depth or draw() > OPERATOR_SHARE:
        digit = int(10 * draw())
        tokens.append(TOKENS[str(digit)])
        return digit
    operator = NAMES[int(len(NAMES) * draw())]
    n_args = 2 + int((shape.max_args - 1) * draw())
    tokens.append(TOKENS[operator])
    values = [_draw(draw, shape, depth + 1, tokens) for _ in range(n_args)]
    tokens.append(TOKENS[END])
    if len(tokens) >= shape.max_length:
        raise _TooLong
    return OPERATORS[operator](values)


def median(values: list[int]) -> int:
    """The middle value, or the mean of the two middle ones without its fraction."""
    ordered = sorted(values)
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) // 2


def spell(tokens: bytes) -> str:
    """The symbols of tokens, apart by spaces."""
    return " ".join(SYMBOLS[token - 1] for token in tokens)


def generate(folder: Path, sizes: tuple[int, int, int], shape: Shape, seed: int) -> None:
    """Write `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv`, with a progress bar.

    No expression comes twice, in one file or in two.

    Raises:
        UserError: the shape has too few expressions, or the folder cannot be written.
    """
    from tqdm import tqdm

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise as_user_error(error, folder) from error
    source = expressions(shape, seed)
    with tqdm(total=sum(sizes), desc="ListOps", disable=None, leave=False) as bar:
        for part, n in zip(PARTS, sizes, strict=True):
            with (
                atomic_path(folder / f"basic_{part}.tsv") as temporary,
                temporary.open("w", encoding="utf-8", newline="\n") as file,
            ):
                file.write("Source\tTarget\n")
                for _ in range(n):
                    tokens, value = next(source)
                    file.write(f"{spell(tokens)}\t{value}\n")
                    bar.update()


def read_file(path: Path) -> TokenExamples:
    """The examples of one published or generated file.

    Raises:
        UserError: names the file and the line that is not as it should be.
    """
    examples = TokenExamples.of(_rows(path))
    if not len(examples):
        raise UserError(f"{path}: holds no examples; get or generate the file again")
    return examples


def _rows(path: Path) -> Iterator[tuple[bytes, int]]:
    for place, (source, target) in read_table(path, ("Source", "Target")):
        symbols = source.replace("(", " ").replace(")", " ").split()
        unknown = next((symbol for symbol in symbols if symbol not in TOKENS), None)
        if unknown is not None:
            raise UserError(f"{place}: {unknown!r} is no symbol of ListOps ({' '.join(SYMBOLS)})")
        if not symbols:
            raise UserError(f"{place}: the expression is empty; mend or remove the line")
        if target not in tuple("0123456789"):
            raise UserError(f"{place}: Target is {target!r}; it must be a digit 0 … 9")
        yield bytes(TOKENS[symbol] for symbol in symbols), int(target)


def load(folder: Path) -> Task:
    """The task in a folder of `basic_{train,val,test}.tsv`."""
    missing = [part for part in PARTS if not (folder / f"basic_{part}.tsv").is_file()]
    if missing:
        raise UserError(
            f"{folder}: there is no basic_{missing[0]}.tsv; give the folder listops-1000 of"
            " lra_release.gz (the Long Range Arena's release, 7.7 GB), or leave --data away to"
            " have the task generated"
        )
    parts = (read_file(folder / f"basic_{part}.tsv") for part in PARTS)
    return Task("listops", VOCAB_SIZE, N_CLASSES, *parts)


if __name__ == "__main__":
    from wavelet_lm.cli.listops import main
    from wavelet_lm.errors import run_command

    run_command(main)
