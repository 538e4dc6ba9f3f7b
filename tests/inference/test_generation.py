import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import perturb, tiny_config
from tests.models.test_properties import configs
from wavelet_lm import UserError, build_model, generate
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import (
    NonFiniteOutput,
    TextStream,
    check_vocabulary,
    encode_prompt,
    sampled_tokens,
    start_token,
)
from wavelet_lm.inference.sampling.logits import SamplingOptions, draw
from wavelet_lm.inference.sampling.random import uniforms

V = 11
GREEDY = SamplingOptions(temperature=0)
SAMPLED = SamplingOptions(temperature=1.3, top_k=7, top_p=0.9, repetition_penalty=1.2)


class HistoryModel(nn.Module):
    """Logits that depend on every token so far and on their order, through a hash as the state."""

    vocab_size = V
    N = 997

    def __init__(self):
        super().__init__()
        table = torch.randn(self.N, V, generator=torch.Generator().manual_seed(5))
        self.table = nn.Parameter(table)
        self.calls = []

    def forward(self, idx, state=None, *, last_only=False):
        assert not torch.is_grad_enabled()
        self.calls.append(idx.shape[1])
        code = torch.ones(len(idx), dtype=torch.long) if state is None else state
        logits = []
        for column in idx.unbind(1):
            code = (code * 31 + column + 1) % self.N
            logits.append(self.table[code])
        return torch.stack(logits[-1:] if last_only else logits, 1), code


class ByteTokens:
    """A vocabulary of bytes, or of the characters given, and an end of text if asked for."""

    name = "fake"

    def __init__(self, characters=None, end_of_text=None):
        self.characters, self.end_of_text = characters, end_of_text
        self.vocab_size = 256 if characters is None else len(characters)

    def encode(self, text):
        if self.characters is None:
            return list(text.encode())
        if not set(text) <= set(self.characters):
            raise UserError("not in the vocabulary")
        return [self.characters.index(c) for c in text]

    def token_bytes(self, token):
        if token == self.end_of_text:
            return b""
        return bytes([token]) if self.characters is None else self.characters[token].encode()

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


def stream(model, prompts, n, options, seeds, **more):
    """The first n tokens of each row, each with what came with it."""
    decoder = Decoder(model)
    logits, state = decoder.prefill(prompts)
    steps = sampled_tokens(decoder, logits, state, prompts, options, seeds, **more)
    return [list(row) for row in zip(*itertools.islice(steps, n), strict=True)]


def tokens(model, prompt, n, options, seed):
    (row,) = stream(model, [prompt], n, options, [seed])
    return [drawn.token for drawn in row]


def slow_stream(model, prompt, n, options, seed):
    """The whole text through the model again for every token."""
    text = list(prompt)
    with torch.no_grad():
        for i in range(n):
            logits = model(torch.tensor([text]))[0][:, -1]
            seen = torch.tensor([[token in text for token in range(logits.shape[1])]])
            number = uniforms(torch.tensor([seed]), torch.tensor([4 * i]))
            text.append(int(draw(logits, seen, options, number)))
    return text[len(prompt) :]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5, 6, 7]])
def test_streaming_is_the_same_as_reading_the_text_again_for_every_token(options, prompt):
    model = HistoryModel()
    assert tokens(model, prompt, 40, options, 9) == slow_stream(model, prompt, 40, options, 9)


def test_tokens_of_the_prompt_count_as_seen():
    model = HistoryModel()
    nn.init.zeros_(model.table)
    with torch.no_grad():
        model.table += torch.tensor([5.0, 8, 7, 6, 1, 1, 1, 1, 1, 1, 1])
    once_each = SamplingOptions(temperature=0, repetition_penalty=100)
    assert tokens(model, [1, 4, 3, 3], 3, once_each, 1) == [2, 0, 5]


def peaked(config, dtype=torch.float64):
    """A model whose distributions are not flat, as an untrained one's are."""
    torch.manual_seed(0)
    model = perturb(build_model(config, V)).to(dtype).eval()
    with torch.no_grad():
        for head in {m.head for m in model.modules() if hasattr(m, "head")}:
            head.weight.mul_(20)
    return model


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_the_real_model_streams_as_it_reads(options):
    model = peaked(tiny_config())
    fast = tokens(model, [7, 2, 5], 60, options, 4)
    assert fast == slow_stream(model, [7, 2, 5], 60, options, 4)
    assert len(set(fast)) > 1


@settings(max_examples=25, suppress_health_check=list(HealthCheck), derandomize=True)
@given(configs())
def test_greedy_text_in_float32_is_that_of_reading_again_for_every_config(config):
    model = peaked(config.replace(fwpkm_inference_updates=False), torch.float32)
    assert tokens(model, [1, 2], 20, GREEDY, 1) == slow_stream(model, [1, 2], 20, GREEDY, 1)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_a_row_of_a_batch_is_the_text_alone(options):
    model = peaked(tiny_config(), torch.float32)
    prompts, seeds = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3]], [3, 8, 0, 3]
    rows = stream(model, prompts, 30, options, seeds)
    for row, prompt, seed in zip(rows, prompts, seeds, strict=True):
        assert [drawn.token for drawn in row] == tokens(model, prompt, 30, options, seed)
    assert rows[0] == rows[3]


def test_what_comes_with_a_token_is_of_the_raw_distribution():
    model = peaked(tiny_config())
    (row,) = stream(model, [[1, 2]], 10, SAMPLED, [5])
    text = [1, 2]
    for drawn in row:
        with torch.no_grad():
            p = model(torch.tensor([text]))[0][0, -1].softmax(-1)
        assert drawn.log_prob == pytest.approx(float(p[drawn.token].log()), rel=1e-9)
        assert drawn.entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-9)
        text.append(drawn.token)


def test_a_top_p_that_moves_is_asked_for_with_the_texts_so_far():
    class Source:
        every = 16

        def __init__(self):
            self.asked = []

        def top_p(self, texts):
            self.asked.append([len(text) for text in texts])
            return torch.tensor([1e-6 if len(self.asked) == 2 else 1.0] * len(texts))

    model, source = peaked(tiny_config()), Source()
    rows = stream(model, [[1, 2], [3]], 40, SamplingOptions(), [5, 6], top_p_source=source)
    assert source.asked == [[2, 1], [18, 17], [34, 33]]
    free = stream(model, [[1, 2], [3]], 16, SamplingOptions(), [5, 6])
    assert [row[:16] for row in rows] == free
    for row, prompt in zip(rows, ([1, 2], [3]), strict=True):
        text = prompt + [drawn.token for drawn in row[:16]]
        greedy = tokens(model, text, 16, GREEDY, 0)
        assert [drawn.token for drawn in row[16:32]] == greedy


def test_seeds_repeat_and_differ_and_leave_the_global_generator_alone():
    model = HistoryModel()
    before = torch.get_rng_state()
    one, again, two = (tokens(model, [0], 30, SAMPLED, seed) for seed in (1, 1, 2))
    assert one == again != two
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_come_as_soon_as_they_are_drawn_and_the_caller_keeps_its_modes():
    model = HistoryModel().train()
    decoder = Decoder(model)
    logits, state = decoder.prefill([[1, 2]])
    steps = sampled_tokens(decoder, logits, state, [[1, 2]], GREEDY, [1])
    next(steps)
    assert model.calls == [2]
    next(steps)
    assert model.calls == [2, 1]
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_dropout_is_off_even_for_a_model_in_training_which_stays_in_training():
    model = perturb(build_model(tiny_config(), V))
    a = tokens(model.train(), [1], 20, SAMPLED, 1)
    assert all(module.training for module in model.modules())
    assert a == tokens(model.eval(), [1], 20, SAMPLED, 1)


def test_generate_returns_the_new_text_only():
    model, letters = HistoryModel(), "abcdefghijk"
    tokenizer = ByteTokens(letters)
    drawn = tokens(model, [2, 0, 1], 64, SamplingOptions(), 1)
    assert generate(model, tokenizer, "cab") == "".join(letters[t] for t in drawn)
    with_end = ByteTokens(letters, end_of_text=drawn[9])
    head = list(itertools.takewhile(lambda t: t != drawn[9], drawn))
    assert generate(model, with_end, "cab") == "".join(letters[t] for t in head)
    rest = generate(model, with_end, "cab", ignore_eot=True)
    assert rest == "".join(letters[t] for t in drawn if t != drawn[9])
    assert generate(model, tokenizer, "cab", num_tokens=0) == ""


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_output_that_is_not_finite_is_one_line(poison):
    model = HistoryModel()
    decoder = Decoder(model)
    logits, state = decoder.prefill([[0], [1]])
    steps = sampled_tokens(decoder, logits, state, [[0], [1]], SAMPLED, [1, 2])
    next(steps)
    with torch.no_grad():
        model.table[:, 3] = poison
    with pytest.raises(NonFiniteOutput, match=r"not finite[^\n]* at token 2;[^\n]*$"):
        next(steps)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(UserError, match="seed is"):
        generate(HistoryModel(), ByteTokens("abcdefghijk"), "a", seed=seed)


def test_where_a_text_without_a_prompt_starts():
    assert start_token(ByteTokens(end_of_text=255)) == (255, "the end-of-text token")
    assert start_token(ByteTokens()) == (10, "a line break")
    assert start_token(ByteTokens("a\nb")) == (1, "a line break")
    assert start_token(ByteTokens("xyz")) == (0, "the first entry of the vocabulary, 'x'")
    assert encode_prompt(ByteTokens("xyz"), "") == [0]
    assert encode_prompt(ByteTokens("xyz"), "zy") == [2, 1]


def test_a_prompt_of_bytes_that_are_no_text_is_one_line():
    with pytest.raises(UserError, match="not valid Unicode"):
        encode_prompt(ByteTokens(), "caf\udce9")


def test_a_tokenizer_of_another_model_is_one_line():
    check_vocabulary(HistoryModel(), ByteTokens("abcdefghijk"))
    with pytest.raises(UserError, match="has 256 tokens and the model 11"):
        check_vocabulary(HistoryModel(), ByteTokens())


@settings(deadline=None)
@given(st.text())
def test_every_character_appears_once_and_whole(text):
    stream = TextStream(ByteTokens())
    pieces = [stream.feed(byte) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.finish() == ""


@settings(deadline=None)
@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_are_replaced_as_in_a_whole_decode(data):
    stream = TextStream(ByteTokens())
    assert "".join(map(stream.feed, data)) + stream.finish() == data.decode(errors="replace")
