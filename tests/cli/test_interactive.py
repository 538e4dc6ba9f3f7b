import contextlib
import io
import signal
import sys

import pytest

from tests.cli.test_terminal import Terminal
from tests.inference.writers import GREEDY, SAMPLED, Letters, small_model, small_writer, tokens
from wavelet_lm import UserError
from wavelet_lm.cli.interactive import ask_terminal, converse, line_tokens
from wavelet_lm.errors import Interrupted
from wavelet_lm.inference.generation import NonFiniteOutput
from wavelet_lm.inference.rows import Request
from wavelet_lm.streams import OutputFailed

N = 9


def talk(terminal, writer, *lines, before=None, num_tokens=N, stop=(), **options):
    """`lines` are typed one after another; an exception among them is raised in its place."""
    waiting = iter(lines)

    def ask():
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    request = Request(5, num_tokens, stop)
    return converse(writer, request, terminal.output, before, ask, **options)


def answer(writer, text, seed=5, num_tokens=N):
    return writer.write(writer.read([tokens(text)]), [Request(seed, num_tokens)])[0].text


def test_all_that_was_said_stays_known(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer(draft=small_model(1))
    reading = talk(terminal, writer, "bad", "a cab", "b")
    whole, said = "", []
    for n, line in enumerate(("bad", "a cab", "b")):
        whole += line if whole == "" or whole.endswith("\n") else "\n" + line
        said.append(answer(writer, whole, 5 + n))
        whole += said[-1]
    assert terminal.text == "".join(text + "\n" for text in said)
    assert reading.texts == [tokens(whole)]
    assert len(terminal.lines) == 3
    for line, text in zip(("bad", "a cab", "b"), said, strict=True):
        assert f"--- prompt\n{line}\n--- text\n{text}\n" in terminal.recorded()


@pytest.mark.parametrize("end", ["", EOFError()])
def test_an_empty_line_or_the_end_of_input_ends_it(tmp_path, end):
    terminal, writer = Terminal(tmp_path), small_writer()
    assert talk(terminal, writer, end, "bad") is None
    assert talk(terminal, writer, "bad", end, "a").texts == [
        tokens("bad" + terminal.text.removesuffix("\n"))
    ]


def test_it_may_follow_a_text(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer()
    talk(terminal, writer, "bad", before=writer.read([tokens("a cab")]))
    assert terminal.text == answer(writer, "a cab\nbad") + "\n"
    terminal = Terminal(tmp_path)
    talk(terminal, writer, "bad", before=writer.read([tokens("a cab\n")]))
    assert terminal.text == answer(writer, "a cab\nbad") + "\n"


def test_a_line_stands_by_itself():
    writer = small_writer(tokenizer=Letters(end_of_text=2))
    known = lambda text: writer.read([tokens(text)])  # noqa: E731
    assert line_tokens(writer, "bad", None) == tokens("bad")
    assert line_tokens(writer, "bad", known("a")) == tokens("\nbad")
    assert line_tokens(writer, "bad", known("a\n")) == tokens("bad")
    assert line_tokens(writer, "bad", known("ac")) == tokens("bad")  # c ends a text
    writer.tokenizer = Letters(letters="abcd")
    assert line_tokens(writer, "bad", known("a")) == tokens("bad")


def test_an_end_of_text_is_part_of_what_was_said(tmp_path):
    free = answer(small_writer(), "bad")
    end = tokens(free[4])[0]
    n = free.index(free[4])
    writer = small_writer(tokenizer=Letters(end_of_text=end))
    reading = talk(Terminal(tmp_path), writer, "bad")
    assert reading.texts == [[*tokens("bad" + free[:n]), end]]


def test_ctrl_c_ends_the_answer_only(tmp_path):
    writer = small_writer()
    terminal = Terminal(tmp_path, interrupt_at=3)
    reading = talk(terminal, writer, "bad", "a")
    first = answer(writer, "bad", num_tokens=3)
    second = answer(writer, f"bad{first}\na", 6)
    assert terminal.text == f"{first}\n{second}\n"
    assert reading.texts == [tokens(f"bad{first}\na{second}")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_prompt_line_drops_the_line(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer()
    talk(terminal, writer, KeyboardInterrupt(), "bad")
    assert terminal.text == "\n" + answer(writer, "bad") + "\n"


def test_ctrl_c_while_a_line_is_read_drops_the_line(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer()
    read, hits = writer.read, []

    def interrupted_once(*arguments):
        if not hits:
            hits.append(1)
            signal.raise_signal(signal.SIGINT)
        return read(*arguments)

    writer.read = interrupted_once
    talk(terminal, writer, "a", "bad")
    assert terminal.text == "\n" + answer(writer, "bad") + "\n"


def test_a_line_that_cannot_be_encoded_is_a_notice(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer()
    talk(terminal, writer, "xyz", "caf\udce9", "bad")
    assert terminal.lines[0] == "not in the vocabulary; nothing was read"
    assert terminal.lines[1] == "the prompt is not valid Unicode text (UTF-8); nothing was read"
    assert terminal.text == answer(writer, "bad") + "\n"


def test_fast_weights_keep_what_they_learned(tmp_path):
    writer = small_writer(
        SAMPLED, model=small_model(fwpkm_update_lr=0.5, fwpkm_chunk_size=4), adapt=True
    )
    terminal = Terminal(tmp_path)
    reading = talk(terminal, writer, "bad", "a")
    first = writer.read([tokens("bad")])
    (one,) = writer.write(first, [Request(5, N)])
    second = writer.read([line_tokens(writer, "a", None)], writer.read_written(first, one.tokens))
    if not one.text.endswith("\n"):
        second = writer.read([tokens("\na")], writer.read_written(first, one.tokens))
    (two,) = writer.write(second, [Request(6, N)])
    assert terminal.text == f"{one.text}\n{two.text}\n"
    forgetful = writer.read(second.texts)
    assert not (forgetful.logits - second.logits).abs().max() < 1e-6
    assert len(reading.texts[0]) == len(second.texts[0]) + N


def test_a_stop_text_ends_an_answer(tmp_path):
    free = answer(small_writer(GREEDY), "bad")
    terminal = Terminal(tmp_path)
    talk(terminal, small_writer(GREEDY), "bad", stop=(free[3],))
    assert terminal.text == free[: free.index(free[3])] + "\n"


# --- standard input ------------------------------------------------------------------------------


def test_lines_of_standard_input_are_read_without_a_prompt_line(monkeypatch, capsys):
    data = io.TextIOWrapper(io.BytesIO("né \r\nb".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", data)
    assert [ask_terminal(), ask_terminal()] == ["né ", "b"]
    with pytest.raises(EOFError):
        ask_terminal()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_line_that_is_not_utf8_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\n")))
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        ask_terminal()


class Keyboard(io.TextIOWrapper):
    def isatty(self):
        return True


def test_the_prompt_line_stays_out_of_redirected_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Keyboard(io.BytesIO(b"bad\n")))
    assert ask_terminal() == "bad"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "> ")


@pytest.mark.parametrize("end", ["", EOFError(), Interrupted(signal.SIGTERM, "terminated")])
def test_however_it_ends_it_is_saved(tmp_path, end):
    terminal, writer, saved = Terminal(tmp_path), small_writer(), []
    with pytest.raises(Interrupted) if isinstance(end, Interrupted) else contextlib.nullcontext():
        talk(terminal, writer, "bad", end, save=saved.append)
    (reading,) = saved
    assert reading.texts == [tokens("bad" + terminal.text.removesuffix("\n"))]


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (Interrupted(signal.SIGHUP, "hung up"), "bad\ncab"),
        (OutputFailed("full"), "bad\ncab"),
        (NonFiniteOutput("not finite"), "bad"),
    ],
)
def test_a_conversation_cut_off_in_an_answer_is_saved(tmp_path, monkeypatch, error, known):
    terminal, writer, saved = Terminal(tmp_path), small_writer(), []
    first = answer(writer, "bad")
    write, n = writer.write, []

    def fail(*arguments):
        n.append(1)
        if len(n) == 2:
            raise error
        return write(*arguments)

    monkeypatch.setattr(writer, "write", fail)
    with pytest.raises((Interrupted, OutputFailed, UserError)):
        talk(terminal, writer, "bad", "cab", save=saved.append)
    (reading,) = saved
    whole = "bad" + first + ("" if first.endswith("\n") else "\n") + "cab"
    assert reading.texts == [tokens(whole if known == "bad\ncab" else "bad" + first)]


def test_a_line_too_long_for_the_context_is_not_read_and_the_talk_goes_on(tmp_path, monkeypatch):
    terminal, writer, saved = Terminal(tmp_path), small_writer(), []

    def check(n_tokens):
        if n_tokens > 3 + N:
            raise UserError("the context is full")

    monkeypatch.setattr(writer.decoder, "check_length", check)
    reading = talk(terminal, writer, "bad cab", "bad", "a", save=saved.append)
    assert [line for line in terminal.lines if "full" in line] == [
        "the context is full; nothing was read"
    ] * 2
    assert reading.texts == [tokens("bad" + terminal.text.removesuffix("\n"))]
    assert saved == [reading]
