"""ListOps: the generator against an independent evaluator, the files, their faults."""

import collections
import itertools
import re
import statistics
import sys

import pytest

from wavelet_lm.cli import listops as listops_command
from wavelet_lm.data.tasks import listops
from wavelet_lm.data.tasks.listops import Shape, expressions, spell
from wavelet_lm.errors import UserError

SHORT = Shape(min_length=5, max_length=60, max_depth=4, max_args=5)
INNERMOST = re.compile(r"\[(MAX|MIN|MED|SM) ((?:\d )+)\]")


def evaluate(source: str) -> int:
    """Rewrite innermost brackets as their value until a digit is left."""

    def value(match: re.Match) -> str:
        numbers = [int(digit) for digit in match[2].split()]
        functions = {"MAX": max, "MIN": min, "MED": statistics.median, "SM": sum}
        return str(int(functions[match[1]](numbers)) % 10)

    while not source.isdigit():
        source, n = INNERMOST.subn(value, source)
        assert n, source
    return int(source)


def measure(source: str) -> tuple[int, set[int]]:
    """How deep the operators nest, and the numbers of arguments of operators."""
    depth, open_args, n_args = 0, [0], set()
    for symbol in source.split():
        if symbol == "]":
            n_args.add(open_args.pop())
            continue
        open_args[-1] += 1
        if symbol[0] == "[":
            open_args.append(0)
            depth = max(depth, len(open_args) - 1)
    assert open_args == [1]
    return depth, n_args


def test_answers_agree_with_an_independent_evaluator():
    samples = list(itertools.islice(expressions(SHORT, seed=1), 9_700))
    samples += itertools.islice(expressions(Shape(), seed=1), 300)
    wrong = [tokens for tokens, value in samples if evaluate(spell(tokens)) != value]
    assert not wrong
    assert set(collections.Counter(value for _, value in samples)) == set(range(10))


@pytest.mark.parametrize(("shape", "n"), [(SHORT, 3000), (Shape(), 300)])
def test_expressions_have_the_shape(shape, n):
    found = [spell(tokens) for tokens, _ in itertools.islice(expressions(shape, seed=2), n)]
    lengths = [len(source.split()) for source in found]
    assert shape.min_length < min(lengths) < 1.1 * shape.min_length + 2
    assert 0.9 * shape.max_length - 2 < max(lengths) < shape.max_length
    depths, n_args = zip(*map(measure, found), strict=True)
    assert max(depths) == shape.max_depth - 1  # digits alone stand at the last depth
    assert set().union(*n_args) == set(range(2, shape.max_args + 1))
    assert len(set(found)) == n


def test_the_seed_alone_says_what_comes():
    first, again, other = (list(itertools.islice(expressions(SHORT, s), 50)) for s in (3, 3, 4))
    assert first == again != other
    # The same on every machine and with every version of Python.
    assert [spell(tokens) for tokens, _ in first[:2]] == [
        "[MED 6 [MAX 2 4 4 1 8 ] 7 ]",
        "[MAX 6 5 3 5 6 ]",
    ]


@pytest.mark.parametrize(
    ("values", "expected"), [([3, 1], 2), ([0, 9], 4), ([5, 1, 9], 5), ([1, 2, 3, 9], 2)]
)
def test_median_without_its_fraction(values, expected):
    assert listops.median(values) == expected


def test_files_hold_what_was_drawn(tmp_path):
    listops.generate(tmp_path, (30, 20, 10), SHORT, seed=5)
    task = listops.load(tmp_path)
    assert (task.vocab_size, task.n_classes) == (16, 10)
    drawn = list(itertools.islice(expressions(SHORT, seed=5), 60))
    parts = (task.train, task.valid, task.test)
    read = [
        (part.sequence(i).tobytes(), part.labels[i]) for part in parts for i in range(len(part))
    ]
    assert [len(part) for part in parts] == [30, 20, 10]
    assert read == drawn


def test_published_files_have_parentheses_and_line_ends_of_their_own(tmp_path):
    file = tmp_path / "basic_test.tsv"
    rows = "Source\tTarget\r\n( ( ( [MAX 4 ) ( ( ( [SM 9 ) 5 ) ] ) ) ] )\t4\r\n7\t7\r\n"
    file.write_bytes(rows.encode())
    examples = listops.read_file(file)
    assert [spell(examples.sequence(i)) for i in (0, 1)] == ["[MAX 4 [SM 9 5 ] ]", "7"]
    inputs, lengths, labels = examples.batch([1, 0])
    assert inputs[0].tolist() == [8] + [0] * 6
    assert (lengths.tolist(), labels.tolist()) == ([1, 7], [7, 4])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("Source\tAnswer\n7\t7\n", ["line 1", "no column 'Target'"]),
        ("", ["line 1", "no column 'Source'"]),
        ("Source\tTarget\n7\t7\n7\n", ["line 3", "1 columns"]),
        ("Source\tTarget\n[MUL 1 2 ]\t2\n", ["line 2", "'[MUL'"]),
        ("Source\tTarget\n7\t10\n", ["line 2", "Target is '10'"]),
        ("Source\tTarget\n7\t\n", ["line 2", "Target is ''"]),
        ("Source\tTarget\n( )\t7\n", ["line 2", "empty"]),
        ("Source\tTarget\n", ["no examples"]),
        (None, ["cannot be read"]),
    ],
)
def test_faults_are_one_line_with_file_and_line(content, words, tmp_path):
    file = tmp_path / "basic_val.tsv"
    file.mkdir() if content is None else file.write_text(content)
    with pytest.raises(UserError) as error:
        listops.read_file(file)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(file), *words]), message


def test_impossible_shapes_are_refused(tmp_path):
    for options in ({"max_length": 501}, {"max_args": 1}, {"max_depth": 1}, {"min_length": -1}):
        with pytest.raises(UserError):
            Shape(**options)
    # Of two arguments and no nesting there are 400 expressions.
    flat = Shape(min_length=3, max_length=5, max_depth=2, max_args=2)
    assert len(set(itertools.islice(expressions(flat, seed=1), 400))) == 400
    with pytest.raises(UserError, match="only 400 expressions"):
        listops.generate(tmp_path, (300, 100, 1), flat, seed=1)
    assert not (tmp_path / "basic_test.tsv").exists()


def test_the_command_writes_the_files(tmp_path, monkeypatch, capsys):
    options = ["--train", "3", "--val", "2", "--test", "1", "--min_length", "5"]
    command = ["listops", str(tmp_path / "new"), "--max_length", "40", "--seed", "3", *options]
    monkeypatch.setattr(sys, "argv", command)
    listops_command.main()
    assert "3 + 2 + 1 expressions" in capsys.readouterr().out
    task = listops.load(tmp_path / "new")
    assert [len(task.train), len(task.valid), len(task.test)] == [3, 2, 1]
    with pytest.raises(UserError, match=r"basic_train\.tsv"):
        listops.load(tmp_path)
