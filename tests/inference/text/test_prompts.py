import io
import os
import sys
from pathlib import Path

import pytest

from wavelet_lm import UserError
from wavelet_lm.cli.generation_flags import parse_options
from wavelet_lm.inference.text import prompts
from wavelet_lm.inference.text.prompts import Prompt, read_prompts
from wavelet_lm.text_files import read_text


def test_a_file_is_read_exactly_as_it_is(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("é\r\n\n x\n".encode())
    assert read_text(str(file)) == "é\r\n\n x\n"


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né\n".encode())))
    assert read_text("-") == "né\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(UserError, match=r"^standard input: not UTF-8 at byte 2 \(0xff\)[^\n]*$"):
        read_text("-")


def test_bytes_that_are_no_text_are_named_with_their_place(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc\xe9 d")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 3 \(0xe9\)"):
        read_text(str(file))
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        read_text(str(tmp_path / "nowhere"))


def test_one_prompt_a_line_and_empty_ones_too(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("a b\r\n\nc\x85d".encode())
    assert read_prompts(str(file)) == [Prompt("a b"), Prompt(""), Prompt("c\x85d")]
    file.write_text("a\n", encoding="utf-8")
    assert read_prompts(str(file)) == [Prompt("a")]


def test_objects_carry_their_own_options(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"prompt": "a", "seed": 0, "num_tokens": 5, "stop": "x"}\n\n'
        '{"prompt": "", "stop": ["x", "y"]}\n{"prompt": "c"}',
        encoding="utf-8",
    )
    assert read_prompts(str(file)) == [
        Prompt("a", 0, 5, ("x",)),
        Prompt("", None, None, ("x", "y")),
        Prompt("c"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", 'line 2 must be an object with a "prompt"'),
        ("{}", 'line 2 must be an object with a "prompt"'),
        ('{"prompt": 3}', "line 2: prompt is 3; it must be a text"),
        ('{"prompt": "a", "seeds": 3}', "line 2 has an unknown key 'seeds'"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed is -1; it must be between 0 and"),
        ('{"prompt": "a", "seed": true}', "line 2: seed is True"),
        ('{"prompt": "a", "num_tokens": 0}', "line 2: num_tokens is 0; it must be 1 or more"),
        ('{"prompt": "a", "num_tokens": 2.5}', "line 2: num_tokens is 2.5"),
        ('{"prompt": "a", "stop": ""}', "line 2: stop is ''"),
        ('{"prompt": "a", "stop": ["b", 1]}', "line 2: stop is"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n' + line, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompts(str(file))
    assert f"a.jsonl: {message}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_without_prompts(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(str(tmp_path / name))


@pytest.fixture
def pipe(monkeypatch):
    """A pipe as standard input; the end to write to, as a file."""
    reading, writing = os.pipe()
    with (
        os.fdopen(reading, encoding="utf-8") as stdin,
        os.fdopen(writing, "wb", buffering=0) as end,
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        yield end


def prompts_of(*arguments):
    return [prompt.text for prompt in parse_options("", ["RUN", *arguments]).read_prompts()]


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [(b"a\n\n", ["a\n"]), ("\ufeffé".encode(), ["é"]), (b"", []), (b"\n", [])],
)
@pytest.mark.parametrize("others", [[], ["--load_state", "s"], ["--save_state", "s"], ["--json"]])
def test_what_is_piped_in_is_the_prompt(pipe, piped, prompt, others):
    pipe.write(piped)
    pipe.close()
    assert prompts_of(*others) == prompt


@pytest.mark.parametrize("given", [["--prompt", "b"], ["--prompt", ""], ["--interactive"]])
def test_a_pipe_that_stays_open_is_left_alone(pipe, given):
    pipe.write(b"a")
    assert prompts_of(*given) == given[1:]
    assert os.read(sys.stdin.fileno(), 9) == b"a"


def test_a_silent_pipe_is_said_to_be_waited_for(pipe, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "PATIENCE", 0)
    waits = prompts.select.select

    def silent_at_first(*arguments):
        ready = waits(*arguments)
        pipe.write(b"late")
        pipe.close()
        return ready

    monkeypatch.setattr(prompts.select, "select", silent_at_first)
    assert prompts_of() == ["late"]
    assert capsys.readouterr().err == "reading the prompt from standard input, up to its end\n"


def test_no_pipe_is_no_prompt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # closed
    assert prompts_of() == []
    with Path(os.devnull).open(encoding="utf-8") as device:
        monkeypatch.setattr(sys, "stdin", device)
        assert prompts_of() == []
    controller, terminal = os.openpty()
    with (
        os.fdopen(controller, "wb", buffering=0),
        os.fdopen(terminal, encoding="utf-8") as keyboard,
    ):
        monkeypatch.setattr(sys, "stdin", keyboard)
        assert prompts_of() == []


def test_piped_bytes_that_are_no_text_are_refused(pipe):
    pipe.write(b"ab\xff")
    pipe.close()
    with pytest.raises(UserError, match="standard input: not UTF-8 at byte 2"):
        prompts_of()
