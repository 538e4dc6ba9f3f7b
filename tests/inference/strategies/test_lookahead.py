import math
from itertools import islice

import pytest
import torch

from tests.conftest import perturb, tiny_config
from tests.inference.fakes import HistoryModel, LastTokenModel
from wavelet_lm import UserError, build_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import NUMBERS_PER_TOKEN, NonFiniteOutput, sampled_tokens
from wavelet_lm.inference.sampling.logits import (
    SamplingOptions,
    adaptive_temperature,
    adjusted,
    draw_from,
    penalize,
)
from wavelet_lm.inference.sampling.random import uniforms
from wavelet_lm.inference.strategies.lookahead import lookahead_tokens

V = 11
OPTIONS = {
    "greedy": SamplingOptions(temperature=0),
    "penalty": SamplingOptions(temperature=0, repetition_penalty=1.7),
    "greedy cuts": SamplingOptions(temperature=0, top_k=4, top_p=0.8),
    "hot": SamplingOptions(temperature=1.6),
    "cuts": SamplingOptions(temperature=0.7, top_k=4, top_p=0.8, repetition_penalty=1.2),
    "adaptive": SamplingOptions(entropy_adaptive=True, entropy_temp_max=2.5),
}


def look(model, prompt, n, options=OPTIONS["greedy"], k=3, depth=2, seed=1, **decoder_options):
    """The first n `Drawn` after a prompt."""
    decoder = Decoder(model, **decoder_options)
    start = *decoder.prefill([prompt]), [prompt]
    steps = lookahead_tokens(decoder, *start, options, [seed], k, depth)
    return [drawn for (drawn,) in islice(steps, n)]


def real_model(**config):
    model = perturb(build_model(tiny_config(**config), V)).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # an untrained model's logits are too flat to tell texts apart
    return model


def read_again(model):
    """A function from a text to the logits after it, which reads it from its beginning."""

    def logits_after(text):
        with torch.no_grad():
            return model(torch.tensor([text]))[0][:, -1]

    return logits_after


def slow_lookahead(logits_after, text, n, options, k, depth, seed=1, top_p=lambda n, text: None):
    """One candidate at a time, the whole text read again for every token of its roll-out."""

    def seen(text):
        return torch.tensor([[token in text for token in range(V)]])

    def log_q(text):
        logits = penalize(logits_after(text), seen(text), options.repetition_penalty)
        return logits.log_softmax(-1)[0].tolist()

    text, chosen = list(text), []
    for number in range(n):
        logits, own = logits_after(text), log_q(text)
        allowed = adjusted(logits, seen(text), options, top_p(number, text))[0].tolist()
        scores = {}
        for candidate in sorted(range(V), key=lambda token: -allowed[token])[:k]:
            if allowed[candidate] == -math.inf:
                continue
            rollout, way = [*text, candidate], []
            for _ in range(depth):
                following = log_q(rollout)
                way.append(max(following))
                rollout.append(following.index(max(following)))
            mean = sum(way) / depth if depth else 0
            scores[candidate] = own[candidate] + depth / (depth + 1) * mean
        if options.greedy:
            token = max(scores, key=scores.get)
        else:
            temperature = options.temperature
            if options.entropy_adaptive:
                temperature = float(adaptive_temperature(logits, options))
            tempered = [scores.get(token, -math.inf) / temperature for token in range(V)]
            p = torch.tensor([tempered], dtype=torch.float64).softmax(-1)
            u = uniforms(torch.tensor([seed]), torch.tensor([NUMBERS_PER_TOKEN * number]))
            token = int(draw_from(p, u))
        raw = logits.log_softmax(-1)[0]
        chosen.append((token, raw[token].item(), -(raw.exp() * raw).sum().item()))
        text.append(token)
    return chosen


def assert_same(drawn, expected):
    assert [d.token for d in drawn] == [token for token, _, _ in expected]
    figures = torch.tensor([d[1:] for d in drawn], dtype=torch.float64)
    slow = torch.tensor([figures for _, *figures in expected], dtype=torch.float64)
    torch.testing.assert_close(figures, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("k", "depth"), [(1, 3), (2, 1), (4, 0), (4, 3), (V + 5, 2)])
def test_it_is_the_same_as_rolling_out_one_candidate_after_the_other(options, k, depth):
    model = HistoryModel(V).double()
    expected = slow_lookahead(read_again(model), [3, 1], 12, options, k, depth)
    assert_same(look(model, [3, 1], 12, options, k, depth), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_real_model_is_rolled_out_as_it_reads(options):
    model = real_model()
    expected = slow_lookahead(read_again(model), [7, 2, 5], 10, options, 3, 2)
    drawn = look(model, [7, 2, 5], 10, options, 3, 2)
    assert_same(drawn, expected)
    assert len({d.token for d in drawn}) > 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_batch_is_its_rows_alone(options):
    model = real_model()
    decoder, texts, seeds = Decoder(model), [[7, 2, 5], [1], [7, 2, 5], [3] * 8], [1, 2, 3, 4]
    start = *decoder.prefill(texts), texts
    rows = zip(*islice(lookahead_tokens(decoder, *start, options, seeds, 3, 2), 12), strict=True)
    together = [[d.token for d in row] for row in rows]
    for text, seed, row in zip(texts, seeds, together, strict=True):
        assert row == [d.token for d in look(model, text, 12, options, 3, 2, seed)]
    assert (together[0] == together[2]) == options.greedy  # of seeds 1 and 3


class Falling:
    """A top_p that falls as the text grows."""

    every = 4

    def top_p(self, texts):
        return torch.tensor([1 - 0.04 * len(text) for text in texts], dtype=torch.float64)


def test_candidates_are_what_a_moving_top_p_leaves():
    model, text, options = HistoryModel(V, scale=2).double(), [3, 1], OPTIONS["hot"]
    source, decoder = Falling(), Decoder(model)
    expected = slow_lookahead(
        read_again(model),
        *(text, 18, options, 5, 2),
        top_p=lambda n, now: source.top_p([now[: len(now) - n % source.every]]),
    )
    start = *decoder.prefill([text]), [text]
    steps = lookahead_tokens(decoder, *start, options, [1], 5, 2, source)
    assert_same([drawn for (drawn,) in islice(steps, 18)], expected)
    assert [d.token for d in look(model, text, 18, options, 5, 2)] != [t for t, _, _ in expected]


@pytest.mark.parametrize("context", ["window:5", "recompute:6"])
def test_every_context_is_rolled_out_as_it_reads(context):
    model = real_model()
    expected = slow_lookahead(
        lambda text: Decoder(model, context=context).prefill([text])[0],
        *([1, 2, 3], 10, OPTIONS["penalty"], 2, 2),
    )
    assert_same(look(model, [1, 2, 3], 10, OPTIONS["penalty"], 2, 2, context=context), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captured_steps_on_a_gpu_give_the_same_text(options):
    model = real_model()
    expected = look(model, [1, 2, 3], 20, options, 4, 3)
    drawn = look(model.cuda(), [1, 2, 3], 20, options, 4, 3)
    assert [d.token for d in drawn] == [d.token for d in expected]


@pytest.mark.slow
def test_compiled_steps_give_the_same_text():
    model = real_model()
    expected = look(model, [1, 2, 3], 12)
    drawn = look(model, [1, 2, 3], 12, compile=True)
    assert [d.token for d in drawn] == [d.token for d in expected]


def test_fast_weights_learn_from_the_text_and_not_from_rollouts():
    model = real_model(fwpkm_inference_updates=True, fwpkm_chunk_size=3)
    prompt = [1, 2, 3]

    def replayed(text):
        decoder = Decoder(model)
        logits, state = decoder.prefill([prompt])
        session = decoder.start(state)
        for token in text[len(prompt) :]:
            logits = session.decode(torch.tensor([[token]]))[:, -1]
        return logits

    expected = slow_lookahead(replayed, prompt, 7, OPTIONS["penalty"], 2, 3)
    assert_same(look(model, prompt, 7, OPTIONS["penalty"], 2, 3), expected)


def plain(model, prompt, n, options, seed=1):
    decoder = Decoder(model)
    start = *decoder.prefill([prompt]), [prompt]
    return [row for (row,) in islice(sampled_tokens(decoder, *start, options, [seed]), n)]


@pytest.mark.parametrize(("k", "depth"), [(1, 4), (5, 0)])
def test_without_a_choice_or_without_a_view_it_is_greedy(k, depth):
    model, options = HistoryModel(V), OPTIONS["penalty"]
    assert look(model, [4], 20, options, k, depth) == plain(model, [4], 20, options)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_view_it_is_sampling_among_the_k_likeliest(seed):
    model = HistoryModel(V).double()
    for k, limited in ((3, {"top_k": 3}), (V, {})):
        options = SamplingOptions(temperature=1.4, repetition_penalty=1.2)
        likeliest = SamplingOptions(temperature=1.4, repetition_penalty=1.2, **limited)
        expected = plain(model, [4], 20, likeliest, seed)
        assert look(model, [4], 20, options, k, 0, seed) == expected


def test_seeds_differ_and_candidates_are_drawn_by_the_softmax_of_their_scores():
    # After 0: token 1 (0.6) or 2 (0.4). After 1 anything; after 2 surely 3.
    probabilities = [[1e-9, 0.6, 0.4, 1e-9], [0.25] * 4, [1e-9] * 3 + [1], [0.25] * 4]
    model = LastTokenModel(torch.tensor(probabilities, dtype=torch.float64).log())
    options, n = SamplingOptions(temperature=0.8), 4000
    decoder, texts = Decoder(model), [[0]] * n
    start = *decoder.prefill(texts), texts
    first = next(lookahead_tokens(decoder, *start, options, range(n), 2, 1))
    scores = torch.tensor([math.log(0.6) + math.log(0.25) / 2, math.log(0.4)])
    expected = (scores / 0.8).softmax(-1)[1].item()
    share = sum(d.token == 2 for d in first) / n
    assert {d.token for d in first} == {1, 2}
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))


def test_a_less_likely_token_wins_where_it_leads_to_certainty():
    # After 0: token 1 (0.6) or 2 (0.4). After 1 anything; after 2 surely 3.
    probabilities = [[1e-9, 0.6, 0.4, 1e-9], [0.25] * 4, [1e-9] * 3 + [1], [0.25] * 4]
    model = LastTokenModel(torch.tensor(probabilities).log())
    assert [d.token for d in look(model, [0], 2, k=1, depth=1)] == [1, 0]
    assert [d.token for d in look(model, [0], 2, k=2, depth=1)] == [2, 3]
    assert look(model, [0], 1, k=2, depth=1)[0].log_prob == pytest.approx(math.log(0.4), rel=1e-6)


def test_among_equal_scores_the_likelier_candidate_wins():
    # By symmetry: 3 and 1 are equally likely and lead to the same; the first of them ranks higher.
    table = torch.zeros(4, 4)
    table[0, [1, 3]] = 2
    model = LastTokenModel(table)
    assert [d.token for d in look(model, [0], 1, k=4, depth=3)] == [1]
    # Only the sums are equal: ¼ and then ½ after token 1, ½ and then ⅛ after token 2.
    uneven = [-1000.0, -math.log(4), -math.log(2), -math.log(4)]
    flat = [[-math.log(8)] * 8, [*uneven, *[-1000.0] * 4]]
    model = LastTokenModel([[*uneven, *[-1000.0] * 4], flat[1], *[flat[0]] * 6])
    assert [d.token for d in look(model, [0], 1, k=3, depth=1)] == [2]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_output_that_is_not_finite_is_one_line(poison):
    model = HistoryModel(V)
    decoder = Decoder(model)
    start = *decoder.prefill([[0]]), [[0]]
    stream = lookahead_tokens(decoder, *start, OPTIONS["cuts"], [1], 2, 0)
    next(stream)
    with torch.no_grad():
        model.table[:, 3] = poison
    with pytest.raises(NonFiniteOutput, match=r"not finite[^\n]* at token 2;[^\n]*$"):
        next(stream)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_rollout_that_is_not_finite_counts_unless_the_options_exclude_it(poison):
    # From 2 to 1 and back, and never to 0, the second choice, where the model fails.
    table = torch.tensor([[poison] * 3, [0.0, -9.0, 5.0], [1.0, 2.0, 0.0]])
    with pytest.raises(NonFiniteOutput, match="at token 1;"):
        look(LastTokenModel(table), [2], 1, k=2, depth=1)
    only_the_best = SamplingOptions(temperature=0, top_k=1)
    drawn = look(LastTokenModel(table), [2], 5, only_the_best, k=2, depth=1)
    assert [d.token for d in drawn] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("k", "depth", "message"), [(0, 1, "lookahead_k is 0"), (2, -1, "lookahead_depth is -1")]
)
def test_counts_out_of_range(k, depth, message):
    with pytest.raises(UserError, match=message):
        look(HistoryModel(V), [0], 1, k=k, depth=depth)
