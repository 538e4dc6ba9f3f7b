"""The engine: the texts of the command, from Python, with a model that is fused once."""

import gc
import weakref

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tests.inference.fakes import HistoryModel
from tests.inference.writers import LETTERS, Letters, small_model
from wavelet_lm import Engine, UserError, build_model, generate
from wavelet_lm.inference import live_decoder
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.engine import OPTIONS
from wavelet_lm.inference.generation_options import GenerationOptions
from wavelet_lm.models.checkpoint import save_checkpoint

GREEDY = {"temperature": 0, "repetition_penalty": 1}
PROMPTS = ["abc", "a", "fed cab"]
SEEDS = [3, 4, 3]


@pytest.fixture
def fusions(monkeypatch):
    """How many times a model was fused, as a list that grows."""
    made = []

    class Counted(Decoder):
        def __init__(self, *args, **kwargs):
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(live_decoder, "Decoder", Counted)
    return made


def test_the_four_ways_write_the_same_texts():
    engine = Engine(small_model(), Letters())
    alone = [
        engine.generate(p, 20, seed=s, top_p=0.9) for p, s in zip(PROMPTS, (3, 4, 3), strict=True)
    ]
    assert engine.generate_batch(PROMPTS, 20, seed=SEEDS, top_p=0.9, batch_size=2) == alone
    pieces = list(engine.stream(PROMPTS[1], 20, seed=4, top_p=0.9))
    assert "".join(pieces) == alone[1]
    assert len(pieces) == 20
    found = engine.completions(PROMPTS, 20, seed=SEEDS, top_p=0.9)
    assert [c.text for c in found] == alone
    assert all(len(c.tokens) == 20 and c.reason == "length" for c in found)
    assert generate(small_model(), Letters(), "a", 20, top_p=0.9, seed=4) == alone[1]
    assert engine.generate_batch([]) == []


@pytest.mark.parametrize(
    "options",
    [
        {"lookahead_k": 2, "lookahead_depth": 2, "best_of_n": 2, "wavelet_coherence": True},
        {"strategies": True, "clean_spacing": True},
        {"best_of_n": 3, "stop": [" ", "."]},
        {"temperature": 0, "repetition_penalty": 1.3, "stop": "a"},
    ],
)
def test_strategies_stream_what_they_write(options):
    engine = Engine(small_model(), Letters())
    text = engine.generate("abc", 12, **options)
    assert "".join(engine.stream("abc", 12, **options)) == text


def test_a_draft_changes_no_greedy_text():
    model = small_model()
    plain = Engine(model, Letters()).generate_batch(PROMPTS, 15, temperature=0)
    drafted = Engine(model, Letters(), draft=small_model(1))
    assert drafted.generate_batch(PROMPTS, 15, temperature=0, draft_tokens=2) == plain
    with pytest.raises(UserError, match="contradict"):
        drafted.generate("a", lookahead_k=2)


def test_the_config_decides_what_is_not_given():
    model = small_model(num_new_tokens=7, temperature=0.5, top_k=3)
    asked = {"temperature": 0.5, "top_k": 3}
    assert Engine(model, Letters()).generate("ab") == generate(model, Letters(), "ab", 7, **asked)


def test_a_model_is_fused_once(fusions):
    model, other = small_model(), small_model(1)
    first = generate(model, Letters(), "abc", 20)
    assert generate(model, Letters(), "abc", 20) == first
    generate(other, Letters(), "abc", 20)
    assert generate(model, Letters(), "abc", 20) == first
    assert len(fusions) == 2
    engine = Engine(model, Letters())
    assert [engine.generate("abc", 20, temperature=1.0) for _ in range(3)] == [first] * 3
    assert len(fusions) == 3


def train(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[0].backward()
    optimizer.step()
    model.eval()


def load(model):
    model.load_state_dict(small_model(5).state_dict())


def load_assigned(model):
    model.load_state_dict(small_model(5).state_dict(), assign=True)


def write_behind_the_counters(model):
    for p in model.parameters():
        p.data.mul_(-1.5)


def one_matrix(model):
    with torch.no_grad():
        model.blocks[1].mixer.scales[0].W.add_(1.0)


@pytest.mark.parametrize(
    "change", [train, load, load_assigned, write_behind_the_counters, one_matrix]
)
def test_changed_weights_are_fused_again(change, fusions):
    model = small_model()
    engine = Engine(model, Letters())
    before = generate(model, Letters(), "abc", 40, temperature=0)
    change(model)
    after = generate(model, Letters(), "abc", 40, temperature=0)
    assert len(fusions) == 3
    again = Engine(model, Letters()).generate("abc", 40, **GREEDY)
    assert after == again == engine.generate("abc", 40, **GREEDY)
    logits = Decoder(model).prefill([[1, 2]])[0]
    assert torch.equal(engine._decoder.current()[1].prefill([[1, 2]])[0], logits)
    if change is not one_matrix:
        assert after != before


def test_an_engine_does_not_keep_its_model_and_generate_keeps_nothing():
    model = small_model()
    text = generate(model, Letters(), "abc", 10)
    engine, there = Engine(model, Letters()), weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
    assert not len(live_decoder._DECODERS) or all(m is not None for m in live_decoder._DECODERS)
    assert engine.generate("abc", 10, temperature=1.0) == text


def test_an_engine_of_a_checkpoint_is_that_of_its_model(tmp_path):
    model = small_model().float()
    save_checkpoint(tmp_path / "best.safetensors", model, {})

    from wavelet_lm.data.tokenizers import ByteTokenizer

    ByteTokenizer().save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="256 tokens and the model 10"):
        Engine.open(tmp_path)
    model = build_model(tiny_config(), 256)
    save_checkpoint(tmp_path / "best.safetensors", model, {})
    engine = Engine.open(tmp_path, "cpu", dtype="bfloat16")
    text = Engine(model, ByteTokenizer(), dtype=torch.bfloat16).generate("ab", 9)
    assert engine.generate("ab", 9) == text


@pytest.mark.parametrize(
    "given",
    [
        {"num_tokens": -1},
        {"num_tokens": 2.5},
        {"num_tokens": True},
        {"seed": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": "1"},
        {"top_k": 2.5},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": "all"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": None},
        {"repetition_penalty": 0},
    ],
)
def test_generate_checks_what_the_command_checks(given):
    name = next(iter(given))
    if given[name] is None:
        return
    for model in (small_model(), HistoryModel(len(LETTERS))):
        with pytest.raises(UserError, match=rf"^{name} is [^\n]*; it must be [^\n]*$"):
            generate(model, Letters(), "ab", **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"best_of_n": 0}, "best_of_n is 0; it must be 1 or more"),
        ({"best_of_n": 1.5}, "best_of_n is 1.5; it must be a whole number"),
        ({"best_of_n": 2, "temperature": 0}, "contradict"),
        ({"best_of_n": 2, "seed": 2**63 - 1}, "seed is"),
        ({"lookahead_depth": 2}, "lookahead_k; give that too"),
        ({"wavelet_coherence": True, "coherence_window": 1.5}, "must be a whole number"),
        ({"temprature": 1}, "no option temprature; did you mean temperature?"),
        ({"device": "cpu"}, "no option device"),
        ({"stop": ["a", ""]}, "stop is empty"),
        ({"stop": 3}, "stop is 3"),
    ],
)
def test_an_engine_checks_what_the_command_checks(given, words):
    engine = Engine(small_model(), Letters())
    for call in (engine.generate, engine.stream):
        with pytest.raises(UserError) as caught:
            call("ab", 5, **given)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_arguments_of_an_engine_and_of_a_batch_are_checked():
    model, engine = small_model(), Engine(small_model(), Letters())
    for call, words in (
        (lambda: Engine(model, Letters(letters="ab")), "has 2 tokens and the model 10"),
        (lambda: Engine(model, Letters(), draft=build_model(tiny_config(), 9)), "the model 9"),
        (lambda: Engine(model, Letters(), dtype="int8"), "dtype is 'int8'"),
        (lambda: Engine(model, Letters(), context="all"), "context is 'all'"),
        (lambda: generate(model, Letters(letters="ab"), "a"), "has 2 tokens and the model 10"),
        (lambda: generate(model, Letters(), b"ab"), "it must be a text"),
        (lambda: generate(model, Letters(), "xyz"), "not in the vocabulary"),
        (lambda: engine.generate_batch("abc"), "prompts is one text"),
        (lambda: engine.generate_batch(["a", None]), "prompt is None"),
        (lambda: engine.generate_batch(["a", "b"], seed=[1]), "1 numbers for 2 prompts"),
        (lambda: engine.generate_batch(["a"], batch_size=0), "batch_size is 0"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert words in str(caught.value)


def test_whole_numbers_of_other_libraries_are_numbers():
    engine = Engine(small_model(), Letters())
    text = engine.generate("ab", np.int64(5), seed=np.int64(3), top_p=np.float32(0.5))
    assert text == engine.generate("ab", 5, seed=3, top_p=0.5)
    assert engine.generate("ab", 0) == "" == "".join(engine.stream("ab", 0))


def test_a_gpt_names_the_length_of_the_prompt_and_not_of_a_part_of_it(monkeypatch):
    monkeypatch.setattr("wavelet_lm.inference.decoder.PREFILL_POSITIONS", 8)
    engine = Engine(small_model(model="gpt", head_hidden=8), Letters())
    with pytest.raises(UserError, match="a text of 100 tokens is too long for this GPT"):
        engine.generate("a" * 96, 5)
    writer = engine._writer({})
    with pytest.raises(UserError, match="a text of 96 tokens is too long for this GPT"):
        writer.read([Letters().encode("a" * 96)])
    with pytest.raises(UserError, match="a text of 96 tokens is too long for this GPT"):
        writer.decoder.prefill([[1] * 96, [2]])


def test_options_are_those_of_the_command():
    assert set(OPTIONS) <= set(GenerationOptions.__dataclass_fields__)
