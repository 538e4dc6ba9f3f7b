import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import perturb, tiny_config
from wavelet_lm import UserError, build_model
from wavelet_lm.inference import generation
from wavelet_lm.inference.generation import (
    NonFiniteOutput,
    TextStream,
    check_vocabulary,
    encode_prompt,
    generate,
    start_token,
    stream_tokens,
)
from wavelet_lm.inference.sampling import SamplingOptions, draw

V = 11
GREEDY = SamplingOptions(temperature=0)
SAMPLED = SamplingOptions(temperature=1.3, top_k=7, top_p=0.9, repetition_penalty=1.2)


class HistoryModel(nn.Module):
    """Logits that depend on every token so far and on their order, through a hash as the state."""

    vocab_size = V
    N = 997

    def adapting(self, state):
        return state

    def __init__(self):
        super().__init__()
        table = torch.randn(self.N, V, generator=torch.Generator().manual_seed(5))
        self.table = nn.Parameter(table)
        self.calls = []

    def forward(self, idx, state=None, *, carry=None, last_only=False):
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


def slow_stream(model, prompt, n, options, seed):
    """The whole text through the model again for every token."""
    text, random = list(prompt), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(n):
            logits = model(torch.tensor([text]))[0][:, -1]
            seen = torch.tensor([[token in text for token in range(logits.shape[1])]])
            text.append(int(draw(logits, seen, options, random)))
    return text[len(prompt) :]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5, 6, 7]])
def test_streaming_is_the_same_as_reading_the_text_again_for_every_token(options, prompt):
    model = HistoryModel()
    assert list(stream_tokens(model, prompt, 40, options, 9)) == slow_stream(
        model, prompt, 40, options, 9
    )


def test_tokens_of_the_prompt_count_as_seen():
    model = HistoryModel()
    nn.init.zeros_(model.table)
    with torch.no_grad():
        model.table += torch.tensor([5.0, 8, 7, 6, 1, 1, 1, 1, 1, 1, 1])
    once_each = SamplingOptions(temperature=0, repetition_penalty=100)
    assert list(stream_tokens(model, [1, 4, 3, 3], 3, once_each, 1)) == [2, 0, 5]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
def test_the_real_model_streams_as_it_reads(options):
    model = perturb(build_model(tiny_config(), V)).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # an untrained model's logits are too flat to tell texts apart
    fast = list(stream_tokens(model, [1, 2, 3], 60, options, 4))
    assert fast == slow_stream(model, [1, 2, 3], 60, options, 4)
    assert len(set(fast)) > 1


def test_seeds_repeat_and_differ_and_leave_the_global_generator_alone():
    model = HistoryModel()
    before = torch.get_rng_state()
    one, again, two = (list(stream_tokens(model, [0], 30, SAMPLED, s)) for s in (1, 1, 2))
    assert one == again != two
    assert torch.equal(torch.get_rng_state(), before)


def test_a_long_prompt_is_read_in_bounded_chunks(monkeypatch):
    whole = list(stream_tokens(HistoryModel(), range(V), 5, GREEDY, 1))
    monkeypatch.setattr(generation, "PREFILL_POSITIONS", 4)
    model = HistoryModel()
    assert list(stream_tokens(model, range(V), 5, GREEDY, 1)) == whole
    assert model.calls == [4, 4, 3, 1, 1, 1, 1]  # and nothing is computed after the last token


def test_tokens_come_as_soon_as_they_are_drawn_and_the_caller_keeps_its_modes():
    model = HistoryModel().train()
    stream = stream_tokens(model, [1, 2], 100, GREEDY, 1)
    next(stream)
    assert model.calls == [2]
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_dropout_is_off_even_for_a_model_in_training():
    model = perturb(build_model(tiny_config(), V))
    a = list(stream_tokens(model.train(), [1], 20, SAMPLED, 1))
    assert model.training
    assert a == list(stream_tokens(model.eval(), [1], 20, SAMPLED, 1))


def test_the_stop_token_ends_the_text_and_is_not_part_of_it():
    model = HistoryModel()
    free = list(stream_tokens(model, [0], 40, SAMPLED, 1))
    stop = free[12]
    stopped = list(stream_tokens(model, [0], 40, SAMPLED, 1, stop))
    assert stopped == free[: free.index(stop)]


def test_generate_returns_the_new_text_only():
    model, letters = HistoryModel(), "abcdefghijk"
    tokenizer = ByteTokens(letters)
    tokens = list(stream_tokens(model, [2, 0, 1], 64, SamplingOptions(), 1))
    assert generate(model, tokenizer, "cab") == "".join(letters[t] for t in tokens)
    with_end = ByteTokens(letters, end_of_text=tokens[9])
    head = list(itertools.takewhile(lambda t: t != tokens[9], tokens))
    assert generate(model, with_end, "cab") == "".join(letters[t] for t in head)
    rest = generate(model, with_end, "cab", ignore_eot=True)
    assert rest == "".join(letters[t] for t in tokens if t != tokens[9])
    assert generate(model, tokenizer, "cab", num_tokens=0) == ""


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_output_that_is_not_finite_is_one_line(poison):
    model = HistoryModel()
    stream = stream_tokens(model, [0], 9, SAMPLED, 1)
    next(stream)
    with torch.no_grad():
        model.table[:, 3] = poison
    with pytest.raises(NonFiniteOutput, match=r"not finite[^\n]* at token 2;[^\n]*$"):
        next(stream)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(UserError, match="seed is"):
        next(stream_tokens(HistoryModel(), [0], 1, GREEDY, seed))


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
