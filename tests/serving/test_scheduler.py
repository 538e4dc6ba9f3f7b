"""The scheduler, turn by turn: whoever joins and leaves, a text is what it would be alone."""

import random

import pytest
import torch

from tests.inference.fakes import HistoryModel
from tests.inference.writers import GREEDY, Letters, small_model, tokens
from wavelet_lm.inference.completion import Strategy, Writer
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.rows import Request, Row
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.serving import scheduler as scheduling
from wavelet_lm.serving.job import Choice, Job
from wavelet_lm.serving.scheduler import Scheduler
from wavelet_lm.serving.state_cache import StateCache

OPTIONS = [
    SamplingOptions(temperature=1.2, top_p=0.9, repetition_penalty=1.3),
    SamplingOptions(temperature=0, repetition_penalty=1.1),
    SamplingOptions(top_k=4),
]
LONG = "bad cab. fed\na bead, ".replace(",", "") * 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(scheduling, "CHUNK", 16)
    monkeypatch.setattr(scheduling, "KEPT_EVERY", 64)


def scheduler_of(decoder, limit=2**20):
    return Scheduler(decoder, StateCache(limit))


def job_of(text, *choices, **options):
    """choices: (seed, num_tokens, options, stop…)."""
    made = [
        Choice(Row(Request(seed, n, stop), Letters(), None), seed, how)
        for seed, n, how, *stop in [(*c[:3], *c[3:]) for c in choices]
        for stop in [tuple(stop)]
    ]
    return Job(tokens(text), made, **options)


def run(scheduler, *jobs):
    for job in jobs:
        scheduler.submit(job)
    while not all(job.done for job in jobs):
        scheduler.turn()
    return [[choice.row.tokens for choice in job.choices] for job in jobs]


def alone(decoder, model, text, choice):
    seed, n, options, *stop = choice
    writer = Writer(decoder, model, Letters(), Strategy(options))
    (done,) = writer.write(writer.read([tokens(text)]), [Request(seed, n, tuple(stop))])
    return done.tokens, done.text


@pytest.mark.parametrize("limit", [0, 2**20])
def test_texts_are_what_they_are_alone(limit):
    model, choose = small_model(), random.Random(3)
    decoder = Decoder(model, adapt=False)
    scheduler, made = scheduler_of(decoder, limit), []
    for i in range(14):
        text = LONG[: choose.choice([1, 5, 16, 63, 64, 65, 300])] + "abc"[: i % 3]
        choices = [
            (choose.randrange(99), choose.randrange(1, 15), OPTIONS[(i + k) % 3], *["e"][: i % 2])
            for k in range(1 + i % 3)
        ]
        job = job_of(text, *choices)
        scheduler.submit(job)
        made.append((text, choices, job))
        for _ in range(choose.randrange(4)):
            scheduler.turn()
    while not all(job.done for _, _, job in made):
        scheduler.turn()
    for text, choices, job in made:
        assert job.error is None
        for choice, written in zip(choices, job.choices, strict=True):
            expected = alone(decoder, model, text, choice)
            assert (written.row.tokens, written.row.completion(0).text) == expected
    assert scheduler.n_writing == scheduler.n_reading == 0
    assert scheduler._batch.n == scheduler._sampler.n == len(scheduler._logits) == 0
    assert (scheduler.figures["cached"] > 0) == (limit > 0)


def test_what_was_read_or_written_is_not_read_again():
    decoder = Decoder(small_model(), adapt=False)
    scheduler = scheduler_of(decoder)
    choice = (5, 6, OPTIONS[0])
    ((first,),) = run(scheduler, job_of(LONG, choice))
    assert scheduler.figures["read"] == len(LONG)
    again = job_of(LONG, choice)
    assert run(scheduler, again) == [[first]]
    assert again.n_cached == len(LONG)
    # An answer is known but for its last token, which was never read.
    more = LONG + Letters().decode(first) + "fed"
    job = job_of(more, choice)
    run(scheduler, job)
    assert job.n_cached == len(LONG) + 5
    # Another text shares the first 130 tokens: known at every 64th.
    job = job_of(LONG[:130] + "e", choice)
    run(scheduler, job)
    assert job.n_cached == 128
    # Nothing is known of a text in whose place another began.
    job = job_of("e" + LONG[1:], choice)
    run(scheduler, job)
    assert job.n_cached == 0


def test_no_text_stalls_and_no_prompt_waits_for_a_longer_one():
    decoder = Decoder(small_model(), adapt=False)
    scheduler = scheduler_of(decoder, 0)
    writing = job_of("bad", (1, 200, OPTIONS[0]))
    scheduler.submit(writing)
    scheduler.turn()
    scheduler._step_seconds = 0.0
    long, short = job_of(LONG, (1, 1, OPTIONS[0])), job_of("cab", (1, 1, OPTIONS[0]))
    scheduler.submit(long)
    scheduler.submit(short)
    turns = 0
    while not long.done:
        before = len(writing.choices[0].row.drawn)
        scheduler._step_seconds = 0.0  # a chunk a turn, however long a step took
        scheduler.turn()
        turns += 1
        assert len(writing.choices[0].row.drawn) == before + 1
        if turns == 3:
            assert short.done
    assert turns >= len(LONG) // 16


def test_a_job_that_ends_frees_its_rows_at_once():
    decoder = Decoder(small_model(), adapt=False)
    scheduler, told = scheduler_of(decoder), []
    tell = lambda job, written: told.extend(written)  # noqa: E731
    gone = job_of("bad", (1, 50, OPTIONS[0]), (2, 50, OPTIONS[0]), tell=tell)
    stays, unread = job_of("cab", (3, 20, OPTIONS[0])), job_of(LONG, (1, 9, OPTIONS[0]), tell=tell)
    for job in (gone, stays):
        scheduler.submit(job)
    for _ in range(3):
        scheduler.turn()
    scheduler.submit(unread)
    scheduler.end(unread, "timeout")
    scheduler.end(gone, "shutdown")
    scheduler.turn()
    assert (scheduler.n_writing, scheduler.n_reading) == (1, 0)
    assert [one.reason for one in told if one.reason] == ["timeout", "shutdown", "shutdown"]
    assert gone.done and unread.done
    scheduler.end(gone, "left")  # once more does nothing
    (expected,) = run(scheduler_of(decoder), job_of("cab", (3, 20, OPTIONS[0])))
    while not stays.done:
        scheduler.turn()
    assert stays.choices[0].row.tokens == expected[0]


@pytest.mark.parametrize("n", [1, 5])
def test_a_state_that_is_kept_goes_on_as_the_whole_text(n):
    """After the answer's end, and where a job was ended in the middle."""
    model = small_model()
    decoder = Decoder(model, adapt=False)
    scheduler = scheduler_of(decoder)
    job = job_of("bad cab", (1, n, OPTIONS[0]), keeps=True)
    run(scheduler, job)
    cut = job_of("bad cab", (1, 50, OPTIONS[0]), keeps=True)
    scheduler.submit(cut)
    for _ in range(n):
        scheduler.turn()
    scheduler.end(cut, "shutdown")
    scheduler.turn()
    text = "bad cab" + Letters().decode(job.choices[0].row.tokens)
    for kept in (job.known, cut.known):
        assert (kept.n, list(kept.last)) == (len(text), tokens(text))
        choice = (7, 12, OPTIONS[0])
        (found,) = run(scheduler, job_of(" fed", choice, start=kept))
        (whole,) = run(scheduler_of(decoder), job_of(text + " fed", choice))
        assert found == whole
        (found,) = run(scheduler, job_of("", choice, start=kept))
        (whole,) = run(scheduler_of(decoder), job_of(text, choice))
        assert found == whole


def test_alternatives_are_the_likeliest_of_the_raw_distribution():
    decoder, told = Decoder(small_model(), adapt=False), []
    job = job_of("bad", (1, 4, OPTIONS[0]), (2, 4, OPTIONS[1]), tell=lambda j, w: told.extend(w))
    job.choices[0].n_alternatives = 3
    run(scheduler_of(decoder), job)
    text = tokens("bad")
    for one in told:
        if one.choice == 0:
            log_probs = decoder.prefill([text])[0][0].log_softmax(-1)
            best = log_probs.topk(3)
            assert [token for token, _ in one.alternatives] == best.indices.tolist()
            assert [p for _, p in one.alternatives] == pytest.approx(best.values.tolist())
            assert one.drawn.log_prob == pytest.approx(float(log_probs[one.drawn.token]))
            text.append(one.drawn.token)
        else:
            assert one.alternatives == []


class Diverging(HistoryModel):
    """NaN after some token."""

    def forward(self, idx, state=None, **options):
        logits, state = super().forward(idx, state, **options)
        logits[(idx == 7).any(1)] = torch.nan
        return logits, state


def test_output_that_is_not_finite_ends_its_job_alone():
    decoder = Decoder(Diverging(10).double())
    lines = []
    scheduler = Scheduler(decoder, StateCache(0), lines.append)
    greedy = GREEDY.sampling
    fine = [job_of("ab", (i, 30, OPTIONS[2])) for i in range(4)]
    run(scheduler, *fine, job_of(Letters().decode([7, 7]), (1, 3, greedy)))
    ended = [job for job in fine if job.error is not None]
    assert all("not finite" in str(job.error) for job in ended)
    assert all(7 in job.choices[0].row.tokens for job in ended)
    assert scheduler.n_writing == 0
