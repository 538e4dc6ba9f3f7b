import signal

import pytest
import torch
from torch import nn

from wavelet_lm import UserError
from wavelet_lm.inference.sampling import SamplingOptions
from wavelet_lm.inference.terminal import Sample, write_samples

TEXT = "né 漢!"
BYTES = TEXT.encode()


class Parrot(nn.Module):
    """Says TEXT over and over, one byte a token; the state is the place in it."""

    vocab_size = 256

    def adapting(self, state):
        return state

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(9.0))

    def forward(self, idx, state=None, *, carry=None, last_only=False):
        place = 0 if state is None else state
        logits = torch.zeros(1, 1, 256)
        logits[..., BYTES[place % len(BYTES)]] = self.gain
        return logits, place + 1


class Bytes:
    name, vocab_size, end_of_text = "bytes", 256, None

    def encode(self, text):
        if "x" in text:
            raise UserError("'x' is not in the vocabulary")
        return list(text.encode())

    def token_bytes(self, token):
        return bytes([token])


class Terminal:
    """Collects what is written; pretends that Ctrl-C is hit during the piece `interrupt_at`."""

    def __init__(self, interrupt_at=None):
        self.pieces, self.lines, self.interrupt_at = [], [], interrupt_at

    def write(self, piece):
        self.pieces.append(piece)
        if len(self.pieces) == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)


def run(tmp_path, terminal, model=None, prompt="ab", num_tokens=None, n=1):
    write_samples(
        model or Parrot(),
        Bytes(),
        prompt,
        len(BYTES) if num_tokens is None else num_tokens,
        SamplingOptions(temperature=0),
        seed=7,
        n=n,
        ignore_eot=False,
        checkpoint=tmp_path / "best.safetensors",
        write=terminal.write,
        log=terminal.lines.append,
    )


def test_text_comes_character_by_character_and_is_recorded(tmp_path):
    terminal = Terminal()
    run(tmp_path, terminal)
    assert [p for p in terminal.pieces if p] == ["ab", *TEXT, "\n"]
    (speed,) = terminal.lines
    assert speed.startswith("prompt: 2 tokens in ")
    assert f"generated: {len(BYTES) - 1} tokens in " in speed
    assert speed.count("tokens/s") == 2
    head, *rest = (tmp_path / "generations.txt").read_text(encoding="utf-8").splitlines()
    assert head.startswith("=== 2")
    assert '"temperature": 0' in head
    assert '"seed": 7' in head
    assert f'"tokens": {len(BYTES)}' in head
    assert rest == ["--- prompt", "ab", "--- text", TEXT]


def test_every_sample_has_its_line_and_its_record(tmp_path):
    terminal = Terminal()
    run(tmp_path, terminal, n=2)
    assert "".join(terminal.pieces) == (
        f"=== sample 1 of 2, seed 7 ===\nab{TEXT}\n=== sample 2 of 2, seed 8 ===\nab{TEXT}\n"
    )
    record = (tmp_path / "generations.txt").read_text(encoding="utf-8")
    assert record.count("=== 2") == record.count(TEXT) == 2


def test_ctrl_c_keeps_the_text_its_speed_and_its_record(tmp_path):
    terminal = Terminal(interrupt_at=5)  # the heading, the prompt, "n", half of "é", "é"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, terminal, n=3)
    assert "".join(terminal.pieces).endswith("abné\n")
    assert len(terminal.lines) == 1
    assert "generated: 2 tokens in " in terminal.lines[0]
    assert (tmp_path / "generations.txt").read_text(encoding="utf-8").endswith("--- text\nné\n")


def test_a_cut_character_ends_as_a_replacement_mark(tmp_path):
    terminal = Terminal()
    run(tmp_path, terminal, num_tokens=2)
    assert "".join(terminal.pieces) == "abn\ufffd\n"


def test_mistakes_are_one_line_before_anything_is_written(tmp_path):
    for changes, message in (
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"n": 0}, "n is 0"),
        ({"prompt": "x"}, "'x' is not in the vocabulary"),
    ):
        terminal = Terminal()
        with pytest.raises(UserError, match=message):
            run(tmp_path, terminal, **changes)
        assert terminal.pieces == []


def test_output_that_is_not_finite_names_the_checkpoint(tmp_path):
    model = Parrot()
    nn.init.constant_(model.gain, float("nan"))
    with pytest.raises(UserError, match=r"best\.safetensors: the model's output is not finite"):
        run(tmp_path, Terminal(), model=model)


def test_an_empty_prompt_says_where_it_starts(tmp_path):
    terminal = Terminal()
    run(tmp_path, terminal, prompt="")
    assert terminal.lines[0] == "empty prompt: starting from a line break"


def test_a_record_that_cannot_be_written_is_a_notice(tmp_path):
    (tmp_path / "generations.txt").mkdir()
    terminal = Terminal()
    run(tmp_path, terminal)
    assert terminal.lines[1].startswith("not recorded: ")
    assert TEXT in "".join(terminal.pieces)


def test_speed_without_tokens_divides_by_nothing():
    assert (
        Sample(n_prompt_tokens=3).speed() == "prompt: 3 tokens; generated: 0 tokens after the first"
    )
