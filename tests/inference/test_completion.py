import dataclasses
import math
import signal
from itertools import islice

import pytest
import torch

from tests.inference.writers import (
    GREEDY,
    LETTERS,
    SAMPLED,
    Letters,
    small_model,
    small_writer,
    tokens,
)
from wavelet_lm import UserError
from wavelet_lm.compiler import MERGED_KERNELS
from wavelet_lm.inference import interrupts
from wavelet_lm.inference.completion import CoherenceOptions, Strategy
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import sampled_tokens
from wavelet_lm.inference.rows import Request
from wavelet_lm.inference.sampling.coherence import WaveletCoherence
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.strategies.lookahead import lookahead_tokens
from wavelet_lm.inference.strategies.speculative import speculative_tokens
from wavelet_lm.inference.text.spacing import clean_spacing

N = 24


def write(writer, prompts, *requests, **options):
    reading = writer.read([tokens(prompt) for prompt in prompts])
    return writer.write(reading, requests, **options)


def figures(completions):
    return [(c.text, c.tokens, c.reason, c.seed) for c in completions]


def replaced(strategy, **changes):
    return dataclasses.replace(strategy, **changes)


def expected_tokens(steps, n=N):
    return [drawn.token for drawn in islice(steps, n)]


def test_a_batch_is_its_rows_alone():
    writer = small_writer(tokenizer=Letters(end_of_text=3))
    prompts = ["a", "bad cab", "a.\nb c", "bad cab"]
    free = write(writer, ["a"], Request(1, N))[0].text
    requests = [Request(1, N), Request(5, 7), Request(2, N, ("e",)), Request(1, N, (free[2:4],))]
    together = write(writer, prompts, *requests)
    alone = [write(writer, [p], r)[0] for p, r in zip(prompts, requests, strict=True)]
    assert figures(together) == figures(alone)
    assert len(set(map(len, (c.tokens for c in together)))) > 1
    for a, b in zip(together, alone, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs)
        assert a.metrics == pytest.approx(b.metrics)


def test_sample_i_is_the_run_with_seed_plus_i():
    writer = small_writer()
    reading = writer.read([tokens("bad")])
    rows = writer.fork(reading, [0] * 4)
    samples = writer.write(rows, [Request(3 + i, N) for i in range(4)])
    alone = [writer.write(reading, [Request(3 + i, N)])[0] for i in range(4)]
    assert figures(samples) == figures(alone)
    assert len({c.text for c in samples}) == 4


def test_figures_are_those_of_the_model_reading_the_whole_text():
    writer = small_writer()
    (done,) = write(writer, ["bad"], Request(1, N))
    with torch.no_grad():
        logits = writer.model(torch.tensor([tokens("bad") + done.tokens]))[0][0, 2:-1]
    log_p = logits.log_softmax(-1)
    chosen = log_p[torch.arange(N), torch.tensor(done.tokens)]
    assert done.log_probs == pytest.approx(chosen.tolist())
    assert done.entropies == pytest.approx((-(log_p.exp() * log_p).sum(-1)).tolist())
    assert done.metrics["mean_log_prob"] == pytest.approx(float(chosen.mean()))
    topic = WaveletCoherence(writer.model.embedding.weight, [tokens("bad")], 1.0)
    assert done.metrics["drift"] == pytest.approx(float(topic.drift([tokens("bad") + done.tokens])))


def test_text_is_shown_as_it_comes():
    shown = {0: [], 1: []}
    writer = small_writer()
    show = lambda row, piece: shown[row].append(piece)  # noqa: E731
    done = write(writer, ["a", "bad"], Request(1, 6), Request(2, 9), show=show)
    assert [["".join(shown[0])], ["".join(shown[1])]] == [[c.text] for c in done]
    assert [len(piece) for piece in shown[1]] == [1] * 9


def test_reading_on_is_reading_the_whole_text():
    writer = small_writer(draft=small_model(1))
    whole = writer.read([tokens("bad cab"), tokens("a.\nb")])
    parts = writer.read([tokens(" cab"), tokens("b")], writer.read([tokens("bad"), tokens("a.\n")]))
    assert parts.texts == whole.texts
    assert (whole.n_tokens, parts.n_tokens) == (11, 5)
    torch.testing.assert_close(parts.logits, whole.logits)
    torch.testing.assert_close(parts.draft[0], whole.draft[0])


def test_what_was_written_is_known_afterwards():
    writer = small_writer()
    before = writer.read([tokens("bad")])
    (done,) = writer.write(before, [Request(1, N)])
    after = writer.read_written(before, done.tokens)
    whole = writer.read([tokens("bad") + done.tokens])
    assert after.texts == whole.texts
    torch.testing.assert_close(after.logits, whole.logits)


def test_fast_weights_learn_from_what_is_written_and_not_from_what_is_read():
    model = small_model(fwpkm_update_lr=0.5, fwpkm_chunk_size=4)
    plain, learning = small_writer(model=model), small_writer(model=model, adapt=True)
    before = learning.read([tokens("bad cab bad cab")])
    torch.testing.assert_close(before.logits, plain.read(before.texts).logits)
    (done,) = learning.write(before, [Request(1, N)])
    steps = sampled_tokens(
        learning.decoder, before.logits, before.state, before.texts, SAMPLED.sampling, [1]
    )
    assert done.tokens == [drawn.token for (drawn,) in islice(steps, N)]
    assert done.tokens != plain.write(plain.read(before.texts), [Request(1, N)])[0].tokens
    after = learning.read_written(before, done.tokens)
    session = learning.decoder.start(before.state)
    for token in done.tokens:
        logits = session.decode(torch.tensor([[token]]))
    assert torch.equal(after.logits, logits[:, -1])
    assert not torch.allclose(after.logits, plain.read(after.texts).logits)


def test_the_best_of_n_has_the_highest_mean_log_probability():
    best = small_writer(replaced(SAMPLED, best_of_n=5))
    lines, shown = [], []
    best._log = lines.append
    done = write(
        best,
        ["bad", "a"],
        Request(3, N),
        Request(9, 5, ("e",)),
        show=lambda row, piece: shown.append((row, piece)),
    )
    plain = small_writer()
    for prompt, request, found in (("bad", Request(3, N), done[0]), ("a", Request(9, 5), done[1])):
        stop = ("e",) if prompt == "a" else ()
        tries = [
            write(plain, [prompt], Request(request.seed + i, request.num_tokens, stop))[0]
            for i in range(5)
        ]
        means = [sum(t.log_probs) / len(t.log_probs) if t.log_probs else -math.inf for t in tries]
        assert figures([found]) == figures([tries[means.index(max(means))]])
    assert shown == [(0, done[0].text), (1, done[1].text)]
    assert [line.count(": -") for line in lines] == [5, 5]


LOOKING = replaced(SAMPLED, lookahead_k=3, lookahead_depth=2)


def test_lookahead_draws_with_the_seed_of_its_row():
    writer = small_writer(LOOKING)
    prompts, seeds = ["bad", "a. b", "bad"], [1, 1, 2]
    done = write(writer, prompts, Request(1, N), Request(1, 5), Request(2, N))
    for prompt, seed, found in zip(prompts, seeds, done, strict=True):
        text = tokens(prompt)
        start = *writer.decoder.prefill([text]), [text]
        steps = lookahead_tokens(writer.decoder, *start, LOOKING.sampling, [seed], 3, 2)
        drawn = [one.token for (one,) in islice(steps, len(found.tokens))]
        assert found.tokens == drawn
    assert done[0].tokens != done[2].tokens


@pytest.mark.parametrize("changes", [{}, {"lookahead_k": 2, "lookahead_depth": 2}])
def test_tries_are_the_same_in_batches_of_any_size(changes):
    strategy = replaced(SAMPLED, best_of_n=5, coherence=CoherenceOptions(2, 5, 1), **changes)
    whole, parts = (small_writer(replaced(strategy, batch_size=size)) for size in (16, 2))
    rows = [], []
    for writer, lines in zip((whole, parts), rows, strict=True):
        writer._log = lines.append
    done = [figures(write(writer, ["bad"], Request(3, 20))) for writer in (whole, parts)]
    assert done[0] == done[1]
    assert rows[0] == rows[1]
    assert [f"{seed}: -" in rows[0][0] for seed in range(2, 9)] == [False, *[True] * 5, False]


def test_a_draft_leaves_the_greedy_text_and_is_counted():
    for draft in (small_model(0), small_model(1)):
        writer = small_writer(replaced(GREEDY, draft_tokens=3), draft=draft)
        done = write(writer, ["bad", "a"], Request(1, N), Request(1, 9))
        plain = write(small_writer(GREEDY), ["bad", "a"], Request(1, N), Request(1, 9))
        assert figures(done) == figures(plain)
        assert all(c.counts.proposed > 0 for c in done)
        assert plain[0].counts is None
    same = write(small_writer(GREEDY, draft=small_model(0)), ["bad"], Request(1, N))[0].counts
    assert same.accepted == same.proposed


def test_a_draft_draws_with_the_seed_of_its_row():
    writer = small_writer(SAMPLED, draft=small_model(1))
    reading = writer.read([tokens("bad")])
    done = writer.write(writer.fork(reading, [0, 0]), [Request(3, N), Request(4, N)])
    for seed, found in zip((3, 4), done, strict=True):
        steps = speculative_tokens(
            writer.decoder,
            writer.draft,
            tokens("bad"),
            (reading.logits, reading.state),
            reading.draft,
            SAMPLED.sampling,
            seed,
            4,
        )
        assert found.tokens == expected_tokens(steps)


def test_coherence_lowers_top_p_row_by_row():
    options = CoherenceOptions(weight=2, window=5, levels=1)
    sampling = SamplingOptions(temperature=1.5)
    writer = small_writer(Strategy(sampling, coherence=options))
    prompts = [tokens("bad"), tokens("a. b")]
    done = write(writer, ["bad", "a. b"], Request(1, 40), Request(2, 40))
    logits, state = writer.decoder.prefill(prompts)
    source = WaveletCoherence(writer.model.embedding.weight, prompts, 1.0, 2, 5, 1)
    steps = sampled_tokens(writer.decoder, logits, state, prompts, sampling, [1, 2], source)
    rows = zip(*islice(steps, 40), strict=True)
    assert [c.tokens for c in done] == [[drawn.token for drawn in row] for row in rows]
    plain = write(small_writer(Strategy(sampling)), ["bad"], Request(1, 40))
    assert plain[0].tokens != done[0].tokens


def test_clean_text_goes_on_with_the_prompts_line():
    tokenizer, before = Letters(letters='ab .,()"\n-'), 'b\n( "a'
    anything = SamplingOptions(temperature=50)
    raw, clean = (
        small_writer(Strategy(anything, clean_spacing=on), tokenizer=tokenizer)
        for on in (False, True)
    )
    reading = raw.read([tokenizer.encode(before)])
    raw, clean = (writer.write(reading, [Request(4, 60)])[0].text for writer in (raw, clean))
    start = clean_spacing(before)
    assert raw != clean == clean_spacing(before + raw).removeprefix(start)


def test_an_end_of_text_ends_it_or_not():
    free = write(small_writer(), ["bad"], Request(1, N))[0]
    end = free.tokens[6]
    n = free.tokens.index(end)
    tokenizer = Letters(end_of_text=end)
    (ended,) = write(small_writer(tokenizer=tokenizer), ["bad"], Request(1, N))
    assert (ended.tokens, ended.reason) == (free.tokens[:n], "end_of_text")
    ignoring = small_writer(replaced(SAMPLED, ignore_eot=True), tokenizer=tokenizer)
    (whole,) = write(ignoring, ["bad"], Request(1, N))
    assert (whole.tokens, whole.reason) == (free.tokens, "length")
    assert whole.text == free.text.replace(LETTERS[end], "")


def test_requests_of_no_tokens_read_only():
    (nothing,) = write(small_writer(), ["bad"], Request(1, 0))
    assert (nothing.text, nothing.tokens, nothing.reason) == ("", [], "length")


@pytest.mark.parametrize("strategy", [SAMPLED, LOOKING])
@pytest.mark.parametrize("draft", [False, True])
def test_ctrl_c_keeps_what_there_is(strategy, draft):
    if draft and strategy is LOOKING:
        pytest.skip("these contradict each other")
    shown = []

    def show(row, piece):
        shown.append(piece)
        if len(shown) == 6:
            signal.raise_signal(signal.SIGINT)

    writer = small_writer(strategy, draft=small_model(1) if draft else None)
    done = write(writer, ["bad", "a"], Request(1, 4), Request(1, 9), show=show)
    free = write(writer, ["bad", "a"], Request(1, 4), Request(1, 9))
    reasons = [c.reason for c in done]
    if not draft:  # side by side
        assert reasons == ["interrupted", "interrupted"]
        assert [len(c.tokens) for c in done] == [3, 3]
    else:  # one after the other
        assert reasons == ["length", "interrupted"]
        assert [len(c.tokens) for c in done] == [4, 2]
    assert all(b.text.startswith(a.text) for a, b in zip(done, free, strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_later_ctrl_c_ends_all_and_one_that_came_twice_the_text(seconds, monkeypatch):
    def show(row, piece):
        signal.raise_signal(signal.SIGINT)
        then = interrupts.time.monotonic() + seconds
        monkeypatch.setattr(interrupts.time, "monotonic", lambda: then)
        signal.raise_signal(signal.SIGINT)

    if seconds:
        with pytest.raises(KeyboardInterrupt):
            write(small_writer(), ["bad"], Request(1, 4), show=show)
    else:
        (done,) = write(small_writer(), ["bad"], Request(1, 4), show=show)
        assert done.reason == "interrupted"


@pytest.mark.parametrize("adapt", [False, True])
def test_a_saved_text_goes_on_as_if_it_had_just_been_read(tmp_path, adapt):
    model = small_model(fwpkm_update_lr=0.5, fwpkm_chunk_size=4)
    draft = None if adapt else small_model(1)
    writer = small_writer(GREEDY, model=model, adapt=adapt, draft=draft)
    reading = writer.read([tokens("bad cab")])
    (done,) = writer.write(reading, [Request(1, 8)])
    later = writer.read_written(reading, done.tokens)
    for at, known in enumerate((reading, later)):
        writer.save(tmp_path / f"{at}.state", known)
        loaded = writer.load(tmp_path / f"{at}.state")
        assert loaded.texts == known.texts
        for follow in (lambda start: start, lambda start: writer.read([tokens("a.")], start)):
            a, b = (writer.write(follow(start), [Request(1, 8)]) for start in (loaded, known))
            assert figures(a) == figures(b)
    other = small_writer(GREEDY, model=small_model(2))
    with pytest.raises(UserError, match="belongs to another model"):
        other.load(tmp_path / "0.state")


def test_a_text_that_is_known_by_its_end_goes_on_as_the_whole(tmp_path):
    """Also by what the repetition penalty has seen, long ago."""
    strategy = Strategy(SamplingOptions(temperature=0, repetition_penalty=3.0))
    text = tokens("." + "bad cab\n" * 50)  # a stop that was seen once, 400 tokens ago
    for options in ({}, {"lookahead_k": 2, "lookahead_depth": 1}):
        writer = small_writer(replaced(strategy, **options))
        reading = writer.read([text])
        writer.save(tmp_path / "state", reading)
        loaded = writer.load(tmp_path / "state")
        assert (loaded.texts, loaded.lengths) == ([text[-256:]], [len(text)])
        a, b = (
            writer.write(writer.fork(r, [0, 0]), [Request(1, 8)] * 2) for r in (loaded, reading)
        )
        assert [c.tokens for c in a] == [c.tokens for c in b]
        again = writer.read([tokens("e.")], loaded)
        assert again.lengths == [len(text) + 2]
        writer.save(tmp_path / "more", again)
        assert writer.load(tmp_path / "more").lengths == again.lengths
    drafted = small_writer(strategy, draft=small_model(1))
    found = drafted.write(drafted.load(tmp_path / "state"), [Request(1, 8)])
    plain = small_writer(strategy)
    assert found[0].tokens == plain.write(plain.read([text]), [Request(1, 8)])[0].tokens


class Uncompilable(Decoder):
    """Compiles nothing, and says so when the first step runs."""

    def accelerate(self, step, owners):
        def fail():
            raise RuntimeError("no compiler\nat all")

        return fail if self.compile else step


@pytest.mark.parametrize("auto", [True, False])
def test_a_compiler_that_fails_is_done_without_or_named(auto):
    lines, shown = [], []
    writer = small_writer(auto_compile=auto, log=lines.append)
    expected = write(writer, ["bad"], Request(1, N))
    writer.decoder = Uncompilable(writer.model, compile=True)
    if not auto:
        with pytest.raises(UserError, match=r"torch\.compile failed \(no compiler at all\); use"):
            write(writer, ["bad"], Request(1, N))
        return
    done = write(writer, ["bad"], Request(1, N), show=lambda row, piece: shown.append(piece))
    assert figures(done) == figures(expected)
    assert "".join(shown) == done[0].text
    assert lines[0].startswith("compiling a step")
    assert lines[1:] == ["going on without torch.compile, which failed: no compiler at all"]
    assert figures(write(writer, ["bad"], Request(1, N))) == figures(expected)
    assert len(lines) == 2


class Unmerging(Decoder):
    """Compiles whole steps, but none with merged kernels."""

    def accelerate(self, step, owners):
        def fail():
            raise RuntimeError("no such merge")

        return fail if self.merging else step


def test_a_compiler_that_fails_to_merge_kernels_is_asked_once_more_without():
    lines = []
    writer = small_writer(log=lines.append)
    expected = write(writer, ["bad"], Request(1, N))
    writer.decoder = Unmerging(writer.model, compile=True)
    writer.decoder.merging = MERGED_KERNELS  # as on a GPU
    for _ in range(2):  # the second text is not tried with them
        assert figures(write(writer, ["bad"], Request(1, N))) == figures(expected)
    assert lines[1:] == ["compiling once more with no options: no such merge"]
    assert writer.decoder.compile


def test_output_that_is_not_finite_is_no_fault_of_the_compiler():
    writer = small_writer(auto_compile=True)
    writer.decoder = Decoder(writer.model)
    writer.decoder.compile, writer.decoder.accelerate = True, lambda step, owners: step
    reading = writer.read([tokens("bad")])
    with pytest.raises(UserError, match="not finite"):
        writer.write(reading._replace(logits=reading.logits * math.nan), [Request(1, N)])


def test_embeddings_of_cells_stand_side_by_side():
    model = small_model(multinodal_enabled=True, multinodal_num_cells=3, multinodal_cell_dim=16)
    table = Decoder(model).vectors[torch.arange(model.vocab_size)]
    assert table.shape == (len(LETTERS), 48)
    assert torch.equal(table[:, 16:32], model.cells[1].embedding.weight)
    (done,) = write(small_writer(model=model), ["bad"], Request(1, 5))
    assert len(done.tokens) == 5


def test_a_tokenizer_of_another_model_is_one_line():
    with pytest.raises(UserError, match="has 3 tokens and the model 10"):
        small_writer(tokenizer=Letters(letters="abc"))
