import math
from itertools import islice

import pytest
import torch

from tests.conftest import perturb, tiny_config
from tests.inference.fakes import HistoryModel, LastTokenModel
from wavelet_lm import UserError, build_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import NonFiniteOutput, sampled_tokens
from wavelet_lm.inference.lookahead import lookahead_tokens
from wavelet_lm.inference.sampling import SamplingOptions, adjusted

V = 11
OPTIONS = {
    "greedy": SamplingOptions(temperature=0),
    "penalty": SamplingOptions(temperature=0, repetition_penalty=1.7),
    "cuts": SamplingOptions(temperature=0.7, top_k=4, top_p=0.8, repetition_penalty=1.2),
    "adaptive": SamplingOptions(entropy_adaptive=True, entropy_temp_max=2.5),
}


def look(model, prompt, n, options=OPTIONS["greedy"], k=3, depth=2, **decoder_options):
    """The first n `Drawn` after a prompt."""
    decoder = Decoder(model, **decoder_options)
    start = decoder.prefill([prompt])
    return list(islice(lookahead_tokens(decoder, *start, prompt, options, k, depth), n))


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


def slow_lookahead(logits_after, text, n, options, k, depth):
    """One candidate at a time, the whole text read again for every token of its rollout."""

    def log_probs(text):
        seen = torch.tensor([[token in text for token in range(V)]])
        return adjusted(logits_after(text), seen, options).log_softmax(-1)[0].tolist()

    text, chosen = list(text), []
    for _ in range(n):
        first = log_probs(text)
        candidates = sorted(range(V), key=lambda token: -first[token])[:k]
        best = None
        for candidate in candidates:
            if first[candidate] == -math.inf:
                continue
            rollout, score = [*text, candidate], first[candidate]
            for _ in range(depth):
                following = log_probs(rollout)
                score += max(following)
                rollout.append(following.index(max(following)))
            if best is None or score > best[0]:
                best = (score, candidate)
        raw = logits_after(text).log_softmax(-1)[0]
        entropy = -(raw.exp() * raw).sum().item()
        chosen.append((best[1], raw[best[1]].item(), entropy))
        text.append(best[1])
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


@pytest.mark.parametrize(("k", "depth"), [(1, 4), (5, 0)])
def test_without_a_choice_or_without_a_view_it_is_greedy(k, depth):
    model, options = HistoryModel(V), OPTIONS["penalty"]
    decoder = Decoder(model)
    start = decoder.prefill([[4]])
    greedy = [row for (row,) in islice(sampled_tokens(decoder, *start, [[4]], options, [1]), 20)]
    assert look(model, [4], 20, options, k, depth) == greedy


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
    # Only the sums are equal: ¼ and then ½ after token 1, ½ and then ¼ after token 2.
    uneven = [-1000.0, -math.log(2), 0.0, -math.log(2)]
    model = LastTokenModel([uneven, uneven, [0.0] * 4, [0.0] * 4])
    assert [d.token for d in look(model, [0], 1, k=3, depth=1)] == [2]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_output_that_is_not_finite_is_one_line(poison):
    model = HistoryModel(V)
    decoder = Decoder(model)
    stream = lookahead_tokens(decoder, *decoder.prefill([[0]]), [0], OPTIONS["cuts"], 2, 0)
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
