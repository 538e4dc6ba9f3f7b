import dataclasses
import itertools
import math
from itertools import islice

import numpy as np
import pytest
import scipy.stats
import torch

from tests.conftest import perturb, tiny_config
from tests.inference.fakes import HistoryModel, LastTokenModel
from wavelet_lm import UserError, build_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import NonFiniteOutput, sampled_tokens
from wavelet_lm.inference.sampling.logits import SamplingOptions, probabilities
from wavelet_lm.inference.sampling.random import uniforms
from wavelet_lm.inference.strategies import speculative
from wavelet_lm.inference.strategies.speculative import Counts, NonFiniteDraft, speculative_tokens

V = 11
GREEDY = SamplingOptions(temperature=0)
OPTIONS = {
    "plain": SamplingOptions(),
    "cuts": SamplingOptions(temperature=1.3, top_k=6, top_p=0.9),
    "penalty": SamplingOptions(temperature=1.3, top_p=0.9, repetition_penalty=1.5),
    "adaptive": SamplingOptions(entropy_adaptive=True, entropy_temp_max=2.0),
}


def history_model(seed=5, vocab_size=V):
    return HistoryModel(vocab_size, seed, scale=1.5).double()


def real_model(perturbation=0.0, **config):
    torch.manual_seed(3)
    model = perturb(build_model(tiny_config(**config), V)).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # an untrained model's logits are too flat to tell texts apart
    return perturb(model, perturbation, seed=8) if perturbation else model


def disturbed(model, scale):
    """The same model with other parameters."""
    return perturb(HistoryModel(model.vocab_size, 5, 1.5).double(), scale, seed=1)


def continued(target, draft, text, options=GREEDY, seed=1, gamma=3, counts=None, top_p=None):
    """An endless iterator of `Drawn`."""
    target, draft = (m if isinstance(m, Decoder) else Decoder(m) for m in (target, draft))
    starts = target.prefill([text]), draft.prefill([text])
    return speculative_tokens(target, draft, text, *starts, options, seed, gamma, counts, top_p)


def plain(model, text, n, options=GREEDY, seed=1):
    decoder = Decoder(model)
    steps = sampled_tokens(decoder, *decoder.prefill([text]), [text], options, [seed])
    return [drawn for (drawn,) in islice(steps, n)]


def assert_same(drawn, expected):
    assert [d.token for d in drawn] == [d.token for d in expected]
    a, b = (torch.tensor([d[1:] for d in row], dtype=torch.float64) for row in (drawn, expected))
    torch.testing.assert_close(a, b)


# --- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 2, 5])
@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("draft", ["same", "near", "unrelated"])
def test_greedy_text_is_the_target_s_whatever_the_draft_is(draft, penalty, gamma):
    target = history_model()
    drafts = {"same": target, "near": disturbed(target, 0.7), "unrelated": history_model(6)}
    options, counts = SamplingOptions(temperature=0, repetition_penalty=penalty), Counts()
    drawn = islice(continued(target, drafts[draft], [2, 7], options, 1, gamma, counts), 60)
    assert_same(list(drawn), plain(target, [2, 7], 60, options))
    rate = counts.accepted / counts.proposed
    low, high = {"same": (1, 1), "near": (0.2, 0.9), "unrelated": (0, 0.4)}[draft]
    assert low <= rate <= high


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("draft", [0.0, 0.02, 1.0])
def test_the_real_model_goes_back_to_what_was_accepted(draft, gamma):
    target, counts = real_model(), Counts()
    drawn = islice(continued(target, real_model(draft), [7, 2, 5], GREEDY, 1, gamma, counts), 50)
    assert_same(list(drawn), plain(target, [7, 2, 5], 50))
    assert counts.accepted == counts.proposed if draft == 0 else counts.accepted < counts.proposed
    assert draft == 1 or counts.accepted > 0


@pytest.mark.parametrize("context", ["window:5", "recompute:6"])
def test_every_context_goes_back(context):
    model = real_model()
    target = Decoder(model, context=context)
    steps = sampled_tokens(target, *target.prefill([[1, 2]]), [[1, 2]], GREEDY, [1])
    expected = [drawn for (drawn,) in islice(steps, 25)]
    draft = Decoder(real_model(0.02), context=context)
    assert_same(list(islice(continued(target, draft, [1, 2]), 25)), expected)


# --- sampling ------------------------------------------------------------------------------------


def distribution(model, text, options):
    """What the next token is drawn from; the text is read from its beginning."""
    with torch.no_grad():
        logits = model(torch.tensor([text]))[0][:, -1]
    seen = torch.tensor([[token in text for token in range(model.vocab_size)]])
    return probabilities(logits, seen, options)[0].tolist()


class Moving:
    """A top_p that depends on the text so far, looked at every so many tokens."""

    def __init__(self, every):
        self.every = every

    def top_p(self, texts):
        return torch.tensor([0.5 + 0.45 * (sum(text) % 5 == 0) for text in texts])


def slow_speculative(target, draft, text, n, options, seed, gamma, source=None):
    """The same numbers, one token at a time, with both texts read again for every token."""

    def number(i, purpose):
        return uniforms(torch.tensor(seed), torch.tensor(4 * i + purpose)).item()

    def invert(weights, u):
        cumulative = list(itertools.accumulate(weights))
        return next(x for x, c in enumerate(cumulative) if c > u * cumulative[-1])

    text, start, left = list(text), len(text), 0
    while len(text) < start + n:
        i = len(text) - start
        if source is not None and i % source.every == 0:
            options = dataclasses.replace(options, top_p=float(source.top_p([text])))
            left = gamma if i else 0
        p, q = distribution(target, text, options), distribution(draft, text, options)
        if left == 0:  # before the first round, and after one whose proposals were all accepted
            text.append(invert(p, number(i, 0)))
            left = gamma
            continue
        token = invert(q, number(i, 1))
        if number(i, 2) < min(1, p[token] / q[token]):
            text.append(token)
            left -= 1
        else:
            rest = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
            text.append(invert(rest, number(i, 0)))
            left = gamma
    return text[start:]


@pytest.mark.parametrize("gamma", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_same_as_one_proposal_after_the_other(options, gamma):
    target, draft = history_model(), disturbed(history_model(), 0.7)
    drawn = list(islice(continued(target, draft, [2, 7], options, 5, gamma), 60))
    expected = slow_speculative(target, draft, [2, 7], 60, options, 5, gamma)
    assert [d.token for d in drawn] == expected


@pytest.mark.parametrize("every", [1, 4, 5])
@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("draft", [0.0, 0.4])
def test_a_round_ends_where_top_p_moves(draft, gamma, every):
    target, source, options = history_model(), Moving(every), OPTIONS["penalty"]
    draft = disturbed(target, draft)
    drawn = list(islice(continued(target, draft, [2, 7], options, 5, gamma, None, source), 40))
    expected = slow_speculative(target, draft, [2, 7], 40, options, 5, gamma, source)
    assert [d.token for d in drawn] == expected
    greedy = list(islice(continued(target, draft, [2, 7], GREEDY, 5, gamma, None, source), 40))
    assert_same(greedy, plain(target, [2, 7], 40))


def test_the_real_model_goes_back_to_where_top_p_moves():
    target, draft, source = real_model(), real_model(0.02), Moving(4)
    options = OPTIONS["penalty"]
    drawn = list(islice(continued(target, draft, [1, 2, 3], options, 7, 3, None, source), 40))
    expected = slow_speculative(target, draft, [1, 2, 3], 40, options, 7, 3, source)
    assert [d.token for d in drawn] == expected


def test_the_real_model_samples_as_it_reads():
    target, draft, options = real_model(), real_model(0.02), OPTIONS["penalty"]
    drawn = list(islice(continued(target, draft, [1, 2, 3], options, 7, 3), 40))
    assert [d.token for d in drawn] == slow_speculative(target, draft, [1, 2, 3], 40, options, 7, 3)
    text = [1, 2, 3]
    for token, log_prob, entropy in drawn:  # of the target's raw distribution
        p = torch.tensor(distribution(target, text, SamplingOptions()))
        assert log_prob == pytest.approx(p[token].log().item(), abs=1e-5)
        assert entropy == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)
        text.append(token)


@pytest.mark.cuda
@pytest.mark.parametrize("source", [None, Moving(4)], ids=["fixed top_p", "moving top_p"])
@pytest.mark.parametrize("options", [GREEDY, *OPTIONS.values()], ids=["greedy", *OPTIONS])
def test_captured_steps_on_a_gpu_give_the_same_text(options, source):
    texts = []
    for device in ("cpu", "cuda"):
        models = real_model().to(device), real_model(0.02).to(device)
        steps = continued(*models, [1, 2], options, 7, 3, None, source)
        texts.append([d.token for d in islice(steps, 40)])
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "source"),
    [(GREEDY, None), (OPTIONS["penalty"], None), (OPTIONS["penalty"], Moving(4))],
    ids=["greedy", "sampled", "moving top_p"],
)
def test_compiled_steps_give_the_same_text(options, source):
    texts = []
    for compile in (False, True):
        models = [Decoder(m, compile=compile) for m in (real_model(), real_model(0.02))]
        steps = continued(*models, [1, 2], options, 7, 3, None, source)
        texts.append([d.token for d in islice(steps, 20)])
    assert texts[0] == texts[1]


def exact_joint(model, text, options, n):
    """The probability of each of the V^n continuations, [V, …, V]."""
    joint = np.ones(())
    for i in range(n):
        texts = itertools.product(range(model.vocab_size), repeat=i)
        following = [distribution(model, [*text, *tokens], options) for tokens in texts]
        joint = joint[..., None] * np.reshape(following, (*joint.shape, -1))
    return joint / joint.sum()


def chi_square(observed, joint, n):
    """p-value of counts against probabilities; cells that expect fewer than 5 are one cell."""
    assert observed[joint == 0].sum() == 0, "a text that cannot be"
    expected = n * joint
    rare = expected < 5
    f_obs, f_exp = observed[~rare], expected[~rare]
    if expected[rare].sum() > 0:
        f_obs = np.append(f_obs, observed[rare].sum())
        f_exp = np.append(f_exp, expected[rare].sum())
    return scipy.stats.chisquare(f_obs, f_exp).pvalue


# Token 0 is plain; a round of two proposals and the token after them follows.
N_SEEDS, N_TOKENS, GAMMA = 1500, 4, 2


@pytest.mark.parametrize(
    "options",
    [SamplingOptions(), SamplingOptions(temperature=0.8, top_p=0.85, repetition_penalty=1.8)],
    ids=["plain", "cuts and penalty"],
)
def test_the_texts_are_distributed_as_the_target_s_own(options):
    target, draft = (Decoder(history_model(seed, 5)) for seed in (5, 12))
    prompt, counts = [1, 3], Counts()
    starts = target.prefill([prompt]), draft.prefill([prompt])
    observed = np.zeros((5,) * N_TOKENS)
    for seed in range(N_SEEDS):
        steps = speculative_tokens(target, draft, prompt, *starts, options, seed, GAMMA, counts)
        observed[tuple(drawn.token for drawn in islice(steps, N_TOKENS))] += 1
    assert 0.2 < counts.accepted / counts.proposed < 0.8  # they disagree, but not always
    joint = exact_joint(target.model, prompt, options, N_TOKENS)
    for axes in [(2, 3), (0, 3), (0, 1), (0,), (3,)]:  # what is summed over: pairs, then triples
        p_value = chi_square(observed.sum(axes), joint.sum(axes), N_SEEDS)
        assert p_value > 1e-3, (axes, p_value)
    # The test can tell: the draft's own texts are others.
    assert chi_square_or_zero(observed, exact_joint(draft.model, prompt, options, N_TOKENS)) < 1e-9


def chi_square_or_zero(observed, joint):
    """A text that cannot be is proof enough."""
    return 0.0 if observed[joint == 0].any() else chi_square(observed, joint, observed.sum())


def test_a_perfect_draft_is_always_accepted():
    target, counts = history_model(), Counts()
    list(islice(continued(target, target, [3], OPTIONS["cuts"], 2, 4, counts), 41))
    assert counts == Counts(proposed=32, accepted=32)


def test_a_draft_that_proposes_what_cannot_be_is_never_accepted():
    target = LastTokenModel([[0.0, 0.0, -99.0, -99.0]] * 4)
    draft = LastTokenModel([[-99.0, -99.0, 0.0, 0.0]] * 4)
    counts, options = Counts(), SamplingOptions(top_p=0.9)
    tokens = [d.token for d in islice(continued(target, draft, [0], options, 2, 3, counts), 30)]
    assert counts.accepted == 0
    assert set(tokens) == {0, 1}


def test_seeds_repeat_and_differ():
    models = history_model(), history_model(6)
    one, again, two = (
        [d.token for d in islice(continued(*models, [0], OPTIONS["cuts"], seed), 30)]
        for seed in (1, 1, 2)
    )
    assert one == again != two


def test_a_round_waits_for_the_device_once(monkeypatch):
    reads = []

    class Readout(speculative.Readout):
        def wait(self):
            reads.append(self)
            return super().wait()

    monkeypatch.setattr(speculative, "Readout", Readout)
    target = history_model()
    list(islice(continued(target, target, [3], GREEDY, 1, 4), 1 + 3 * 5))
    assert len(reads) == 1 + 3


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GREEDY, OPTIONS["plain"]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_output_that_is_not_finite_is_one_line_at_its_token(poison, options):
    # 0 1 2 3 4 …, nearly surely; the logits after 3 are bad, so that the fourth token fails. With a
    # gamma of 2 the draft is not asked for that one.
    table = torch.full((6, 6), -50.0)
    for i in range(6):
        table[i, (i + 1) % 6] = 0
    good, bad = LastTokenModel(table), LastTokenModel(table)
    with torch.no_grad():
        bad.table[3, 5] = poison
    for target, draft, error, words, gammas in (
        (bad, good, NonFiniteOutput, "the model's output", (1, 2, 3, 5)),
        (good, bad, NonFiniteDraft, "the draft model's output", (1, 3, 5)),
        (bad, bad, NonFiniteOutput, "the model's output", (1, 2, 3, 5)),
    ):
        for gamma in gammas:
            stream = continued(target, draft, [0], options, 1, gamma)
            assert [drawn.token for drawn in islice(stream, 3)] == [1, 2, 3]
            with pytest.raises(error, match=rf"{words} is not finite[^\n]* at token 4;[^\n]*$"):
                next(stream)


def test_arguments_out_of_range_are_one_line():
    target = history_model()
    with pytest.raises(UserError, match="gamma is 0; it must be 1 or more"):
        next(continued(target, target, [0], gamma=0))
    with pytest.raises(UserError, match="draft model has 7 tokens and the model 11"):
        next(continued(target, history_model(vocab_size=7), [0]))
    with pytest.raises(UserError, match="seed is -1"):
        next(continued(target, target, [0], seed=-1))
