"""Rows of a rolling batch are their texts alone, whoever else joins and leaves."""

import random

import pytest
import torch

from tests.inference.fakes import HistoryModel
from tests.inference.writers import small_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import sampled_tokens
from wavelet_lm.inference.rolling import RollingSampler, rolling_batch
from wavelet_lm.inference.sampling.logits import SamplingOptions

OPTIONS = [
    SamplingOptions(temperature=1.2, top_p=0.9, repetition_penalty=1.3),
    SamplingOptions(temperature=0, repetition_penalty=1.1),
    SamplingOptions(top_k=4),
    SamplingOptions(entropy_adaptive=True),
]
PROMPT = [3, 1, 4]
MODELS = {
    "wavelet_lm": ({}, "stream"),
    "window": ({}, "window:5"),
    "delta": ({"delta_memory": True, "decompose_bypass_ema": True}, "stream"),
    "ensemble": ({"multinodal_enabled": True}, "stream"),
    "recompute": ({}, "recompute:6"),
    "gpt": ({"model": "gpt", "C": 16, "heads": 2, "block_size": 64}, "stream"),
    "wavelet_gpt": ({"model": "wavelet_gpt", "C": 16, "heads": 2, "block_size": 64}, "stream"),
}


def decoder_of(name):
    if name == "other":
        return Decoder(HistoryModel(10).double())
    options, context = MODELS[name]
    return Decoder(small_model(**options), context=context, adapt=False)


def alone(decoder, prompt, options, seed, n):
    """The tokens, and the state after all but the last."""
    logits, state = decoder.prefill([prompt])
    steps = sampled_tokens(decoder, logits, state, [prompt], options, [seed])
    return [next(steps)[0].token for _ in range(n)]


@pytest.mark.parametrize("name", [*MODELS, "other"])
def test_texts_that_come_and_go_are_what_they_are_alone(name):
    decoder, choose = decoder_of(name), random.Random(5)
    batch, sampler = rolling_batch(decoder), RollingSampler(10, decoder.device)
    logits = torch.zeros(0, 10, dtype=torch.float64)
    waiting = [
        ([*PROMPT, i % 7][: 1 + i % 4], OPTIONS[i % 4], i, 1 + choose.randrange(12))
        for i in range(24)
    ]
    rows, done = [], 0
    with torch.inference_mode():
        while waiting or rows:
            while waiting and choose.random() < 0.6:
                prompt, options, seed, n = waiting.pop()
                first, state = decoder.prefill([prompt])
                batch.join(state)
                seen = torch.zeros(10, dtype=torch.bool)
                seen[prompt] = True
                sampler.join(options, seed, seen)
                logits = torch.cat((logits, first))
                rows.append(((prompt, options, seed, n), []))
            if not rows:
                continue
            for (_, tokens), record in zip(rows, sampler.draw(logits).tolist(), strict=True):
                tokens.append(int(record[0]))
            for row in reversed(range(len(rows))):
                (prompt, options, seed, n), tokens = rows[row]
                if len(tokens) < n:
                    continue
                assert tokens == alone(decoder, prompt, options, seed, n)
                assert set(sampler.seen(row).nonzero()[:, 0].tolist()) == {*prompt, *tokens}
                whole, _ = decoder.prefill([prompt + tokens])
                again, _ = decoder.prefill([tokens[-1:]], batch.state(row))
                torch.testing.assert_close(again, whole)
                batch.leave(row)
                sampler.leave(row)
                rows[row] = rows[-1]
                rows.pop()
                done += 1
            if rows:
                logits = batch.decode(torch.tensor([tokens[-1] for _, tokens in rows]))
            assert batch.n == sampler.n == len(rows)
    assert done == 24


def test_the_state_of_a_row_is_not_changed_by_later_steps():
    decoder = decoder_of("delta")
    batch = rolling_batch(decoder)
    batch.join(decoder.prefill([PROMPT])[1])
    batch.decode(torch.tensor([2]))
    state = batch.state(0)
    before, _ = decoder.prefill([[5, 6]], state)
    batch.decode(torch.tensor([7]))
    batch.leave(0)
    batch.join(decoder.prefill([[1]])[1])
    assert torch.equal(decoder.prefill([[5, 6]], state)[0], before)
