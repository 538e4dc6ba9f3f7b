import json
import math
import signal

import pytest
import torch

from tests.inference.writers import GREEDY, SAMPLED, small_model, small_writer, tokens
from wavelet_lm import UserError
from wavelet_lm.cli.terminal import Output, read_prompt, speed, write_batch, write_samples
from wavelet_lm.inference.rows import Completion, Request, Timings
from wavelet_lm.inference.strategies.speculative import Counts
from wavelet_lm.inference.text.prompts import Prompt

N = 12


class Terminal:
    """Collects what is written; Ctrl-C is hit during the piece `interrupt_at`."""

    def __init__(self, tmp_path, interrupt_at=None, **options):
        self.pieces, self.lines, self.interrupt_at = [], [], interrupt_at
        self.file = tmp_path / "generations.txt"
        checkpoint = tmp_path / "best.safetensors"
        self.output = Output(self.write, self.lines.append, checkpoint, "python x.py", **options)

    def write(self, piece):
        self.pieces.append(piece)
        if len(self.pieces) == self.interrupt_at:
            signal.raise_signal(signal.SIGINT)

    @property
    def text(self):
        return "".join(self.pieces)

    def recorded(self):
        return self.file.read_text(encoding="utf-8")


def samples(terminal, writer, n=1, prompt="bad", batch_size=16, **options):
    reading = read_prompt(writer, prompt, None, terminal.output.log)
    requests = [Request(7 + i, options.pop("num_tokens", N)) for i in range(n)]
    write_samples(
        writer, reading, prompt, requests, terminal.output, batch_size=batch_size, **options
    )


def alone(writer, prompt, *request):
    return writer.write(writer.read([tokens(prompt)]), [Request(*request)])[0]


def test_text_comes_letter_by_letter_and_is_recorded(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer()
    samples(terminal, writer)
    expected = alone(writer, "bad", 7, N)
    assert [p for p in terminal.pieces if p] == ["bad", *expected.text, "\n"]
    (line,) = terminal.lines
    assert line.startswith("prompt: 3 tokens in ")
    assert f"; generated: {N - 2} tokens in " in line
    assert line.count("tokens/s") == 2
    head, *rest = terminal.recorded().split("\n", 5)
    assert head.startswith("=== 2")
    assert '"temperature": 1.2' in head
    assert '"seed": 7' in head
    assert f'"tokens": {N}' in head
    assert '"reason": "length"' in head
    assert rest[:3] == ["--- command", "python x.py", "--- metrics"]
    assert rest[3].startswith(f"{N} tokens, mean log-probability -")
    assert rest[4] == f"--- prompt\nbad\n--- text\n{expected.text}\n"


def test_samples_have_headings_and_come_in_order_from_batches(tmp_path):
    terminal, writer = Terminal(tmp_path, metrics=True), small_writer()
    samples(terminal, writer, n=3, batch_size=2)
    texts = [alone(writer, "bad", 7 + i, N).text for i in range(3)]
    assert terminal.text == "".join(
        f"=== sample {i + 1} of 3, seed {7 + i} ===\nbad{text}\n" for i, text in enumerate(texts)
    )
    first = terminal.text.index(texts[0])
    assert len([p for p in terminal.pieces if p]) == 1 + N + 1 + 2 * 2  # the first one streams
    assert first < terminal.text.index("sample 2")
    assert terminal.recorded().count("=== 2") == 3
    kinds = ["tokens, mean", "tokens, mean", "prompt: 3 tokens", "tokens, mean", "generated: 10"]
    assert all(kind in line for kind, line in zip(kinds, terminal.lines, strict=True))
    assert terminal.lines[2].endswith("after the first two in 2 texts")


def test_json_lines_are_all_that_is_written(tmp_path):
    terminal = Terminal(tmp_path, as_json=True)
    writer = small_writer(SAMPLED, draft=small_model(1))
    samples(terminal, writer, n=2)
    assert len(terminal.pieces) == 2
    for i, line in enumerate(terminal.text.splitlines()):
        values, expected = json.loads(line), alone(writer, "bad", 7 + i, N)
        assert values.pop("timings").keys() == {
            *("start_seconds", "decode_seconds", "proposed", "accepted")
        }
        assert values == {
            "prompt": "bad",
            "text": expected.text,
            "tokens": expected.tokens,
            "seed": 7 + i,
            "reason": "length",
            "metrics": pytest.approx(expected.metrics),
        }


def test_a_prompt_from_a_file_is_not_repeated(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer()
    samples(terminal, writer, echo=False)
    assert terminal.text == alone(writer, "bad", 7, N).text + "\n"


def test_the_record_keeps_the_end_of_a_long_prompt(tmp_path):
    terminal = Terminal(tmp_path)
    samples(terminal, small_writer(), prompt="b" * 3000 + "a" * 2000, num_tokens=1)
    kept = f"--- prompt\n[… the last of 5000 characters] {'a' * 2000}\n--- text"
    assert kept in terminal.recorded()


def test_reading_alone_writes_and_records_nothing(tmp_path):
    terminal = Terminal(tmp_path)
    samples(terminal, small_writer(), num_tokens=0)
    assert terminal.pieces == []
    assert terminal.lines[0].startswith("prompt: 3 tokens in ")
    assert not terminal.file.exists()


def test_ctrl_c_keeps_the_texts_their_speed_and_their_record(tmp_path):
    terminal, writer = Terminal(tmp_path, interrupt_at=4), small_writer()
    with pytest.raises(KeyboardInterrupt):
        samples(terminal, writer, n=5, batch_size=2)
    texts = [alone(writer, "bad", 7 + i, 3).text for i in range(2)]
    assert terminal.text == "".join(
        f"=== sample {i + 1} of 5, seed {7 + i} ===\nbad{text}\n" for i, text in enumerate(texts)
    )
    assert "generated: 2 tokens in" in terminal.lines[-1]
    assert terminal.recorded().count('"reason": "interrupted"') == 2


def test_an_empty_prompt_says_where_it_starts(tmp_path):
    terminal, writer = Terminal(tmp_path), small_writer()
    samples(terminal, writer, prompt="")
    assert terminal.lines[0] == "empty prompt: starting from a line break"
    assert terminal.text == alone(writer, "\n", 7, N).text + "\n"


def test_a_prompt_follows_a_text_that_was_read(tmp_path):
    lines, writer = [], small_writer()
    before = writer.read([tokens("a. ")])
    assert read_prompt(writer, "", before, lines.append) is before
    assert read_prompt(writer, "bad", before, lines.append).texts == [tokens("a. bad")]
    assert lines == []


@pytest.mark.parametrize("as_json", [False, True])
def test_output_that_is_not_finite_names_the_checkpoint(tmp_path, as_json):
    terminal, model = Terminal(tmp_path, as_json=as_json), small_model()
    torch.nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(UserError, match=r"best\.safetensors: the model's output is not finite"):
        samples(terminal, small_writer(model=model))
    assert terminal.text == ("" if as_json else "bad\n")


def test_a_record_that_cannot_be_written_is_a_notice(tmp_path):
    terminal = Terminal(tmp_path)
    terminal.file.mkdir()
    samples(terminal, small_writer())
    assert terminal.lines[0].startswith("not recorded: ")
    assert len(terminal.text) == len("bad") + N + 1


# --- many prompts --------------------------------------------------------------------------------


def test_a_batch_of_prompts_comes_out_in_order(tmp_path):
    terminal, writer = Terminal(tmp_path, as_json=True), small_writer()
    prompts = ["bad", "", "a. b", "bad"]
    requests = [Request(1, N), Request(2, 4), Request(3, N, ("e",)), Request(4, 1)]
    jobs = [(Prompt(p), r) for p, r in zip(prompts, requests, strict=True)]
    write_batch(writer, jobs, terminal.output, batch_size=3)
    for line, prompt, r in zip(terminal.text.splitlines(), prompts, requests, strict=True):
        values = json.loads(line)
        assert values["prompt"] == prompt
        expected = alone(writer, prompt or "\n", r.seed, r.num_tokens, r.stop)
        assert (values["text"], values["reason"]) == (expected.text, expected.reason)
    assert terminal.lines[0] == "prompt 2 is empty: starting from a line break"
    assert len(terminal.lines) == 1 + 2
    assert terminal.recorded().count("=== 2") == 4


def test_all_prompts_may_follow_one_text(tmp_path):
    terminal, writer = Terminal(tmp_path, as_json=True), small_writer(GREEDY)
    before = writer.read([tokens("a.\n")])
    jobs = [(Prompt(p), Request(1, N)) for p in ("bad", "a", "b.")]
    write_batch(writer, jobs, terminal.output, batch_size=2, before=before)
    texts = [json.loads(line)["text"] for line in terminal.text.splitlines()]
    assert texts == [alone(writer, "a.\n" + p.text, 1, N).text for p, _ in jobs]
    with pytest.raises(UserError, match="prompt 2 is empty; after a loaded state"):
        jobs[1] = Prompt(""), jobs[1][1]
        write_batch(writer, jobs, terminal.output, batch_size=2, before=before)


def test_a_prompt_that_cannot_be_encoded_is_named_before_anything_is_written(tmp_path):
    terminal = Terminal(tmp_path, as_json=True)
    jobs = [(Prompt(p), Request(1, N)) for p in ("bad", "xyz")]
    with pytest.raises(UserError, match="prompt 2: not in the vocabulary"):
        write_batch(small_writer(), jobs, terminal.output, batch_size=1)
    assert terminal.pieces == terminal.lines == []


def test_ctrl_c_ends_a_batch_after_its_group(tmp_path):
    terminal = Terminal(tmp_path, interrupt_at=1, as_json=True)
    jobs = [(Prompt("bad"), Request(1, N))] * 3
    with pytest.raises(KeyboardInterrupt):
        write_batch(small_writer(), jobs, terminal.output, batch_size=1)
    assert len(terminal.pieces) == 1


# --- speed ---------------------------------------------------------------------------------------


def finished(n, seconds, counts=None):
    timings = Timings(9.0, seconds)
    return Completion(1, "", [0] * n, [0.0] * n, [0.0] * n, "length", {}, timings, counts)


def test_speed_is_that_after_the_first_two_tokens_of_all_texts():
    reading = small_writer().read([[1], [1, 2]])._replace(seconds=0.5)
    one = speed(reading, [finished(12, 2.0)])
    assert one == (
        "prompt: 3 tokens in 0.50 s, 6.0 tokens/s;"
        " generated: 10 tokens in 2.00 s, 5.0 tokens/s after the first two"
    )
    several = speed(None, [finished(12, 2.0), finished(1, 0.0), finished(7, 0.25)])
    assert several == "generated: 15 tokens in 2.00 s, 7.5 tokens/s after the first two in 3 texts"
    drafted = speed(None, [finished(4, 1.0, Counts(8, 5))])
    assert drafted.endswith("; 5 of 8 drafted tokens kept")


def test_speed_without_tokens_divides_by_nothing():
    assert speed(None, [finished(1, 0.0)]) == "generated: 0 tokens after the first two"
    assert speed(None, []) == "generated: 0 tokens after the first two"
