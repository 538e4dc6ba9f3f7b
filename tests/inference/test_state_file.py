import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure

from tests.conftest import perturb, tiny_config
from wavelet_lm import UserError, build_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.state_file import LAST, Past, fingerprint, load_state, save_state
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.wavelet_lm.memory import learning, resting

V = 11
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
LEARNING = {"fwpkm_inference_updates": True, "fwpkm_chunk_size": 4}


def tiny_model(seed=0, **options):
    torch.manual_seed(0)
    return perturb(build_model(tiny_config(**options), V), seed=seed).eval()


def same(a, b):
    """Whether two states are equal in structure, dtypes and values."""
    return tree_structure(a) == tree_structure(b) and all(
        x is y is None or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


@torch.no_grad()
def read(model, text, state=None):
    """Next-token logits [1, V] and the state; fast weights learn from the text."""
    if state is None:
        _, state = model(torch.tensor([text[:1]]))
    logits, state = model(torch.tensor([text]), learning(state), last_only=True)
    return logits[:, -1], state


def template(model):
    """The state before anything is learned."""
    with torch.no_grad():
        return learning(model(torch.tensor([[0]]))[1])


def save(path, model, text=TEXT):
    logits, state = read(model, text)
    save_state(path, state, logits, text, model)
    return logits, state


def load(path, model):
    return load_state(path, model, template(model), "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        LEARNING,
        {"decompose_bypass": False},
        {"decompose_bypass_ema": True},
        {"delta_memory": True},
        {"multi_basis_lifting": True, "shared_lifting_weights": False},
        {"looped_blocks": True, "looped_blocks_count": 2},
        {"multinodal_enabled": True},
    ],
)
def test_a_text_goes_on_from_the_file_as_from_memory(tmp_path, options):
    model = tiny_model(**options)
    logits, state = save(tmp_path / "book", model)
    again, restored, tokens, past = load(tmp_path / "book", model)
    assert (tokens, past) == (TEXT, Past())
    assert torch.equal(again, logits)
    assert same(restored, state)
    expected, _ = read(model, [2, 7, 1], state)
    assert torch.equal(read(model, [2, 7, 1], restored)[0], expected)


CONTEXTS = ["stream", "window:5", "window:6", "recompute:6"]


def reading_of_one(decoder):
    return decoder.start(decoder.prefill([[0]])[1]).state()


@pytest.mark.parametrize("options", [{"context": c} for c in CONTEXTS] + [{"adapt": True}])
def test_a_decoder_goes_on_after_a_prompt_and_after_what_it_wrote(tmp_path, options):
    model = tiny_model(**LEARNING)
    decoder = Decoder(model, **{"adapt": False, **options})
    logits, prompted = decoder.prefill([TEXT])
    session = decoder.start(prompted)
    for token in TEXT:
        session.decode(torch.tensor([[token]]))
    for state in (prompted, session.state()):
        save_state(tmp_path / "book", state, logits, TEXT, model)
        restored = load_state(tmp_path / "book", model, reading_of_one(decoder), "cpu")[1]
        for read_on in (
            lambda state: decoder.prefill([[2, 7, 1]], state)[0],
            lambda state: decoder.start(state).decode(torch.tensor([[2]])),
        ):
            assert torch.equal(read_on(restored), read_on(state))


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_state_of_another_context_is_refused(tmp_path, context):
    model = tiny_model()
    logits, state = Decoder(model, context=context).prefill([TEXT])
    save_state(tmp_path / "book", state, logits, TEXT, model)
    for other in set(CONTEXTS) - {context}:
        with pytest.raises(UserError, match="book: saved with another context"):
            load_state(
                tmp_path / "book", model, reading_of_one(Decoder(model, context=other)), "cpu"
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_precision_is_kept(tmp_path, dtype):
    model = tiny_model()
    logits, state = read(model, TEXT)
    state = tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, state
    )
    save_state(tmp_path / "book", state, logits, TEXT, model)
    restored = load_state(tmp_path / "book", model, state, "cpu")[1]
    assert same(restored, state)


def test_fast_weights_may_hold_any_number_of_positions(tmp_path):
    model = tiny_model(**LEARNING)
    for n in (1, 2, 4, 7):
        _, state = save(tmp_path / "book", model, TEXT[:n])
        restored = load(tmp_path / "book", model)[1]
        assert same(restored, state)


def test_fast_weights_may_not_have_begun_to_learn_or_rest(tmp_path):
    model = tiny_model(**LEARNING)
    logits, learned = read(model, TEXT)
    at_rest = resting(learned)
    without = tuple(block._replace(memory=None) for block in learned)
    nothing = learning(model(torch.tensor([TEXT]))[1])
    for state, expected in ((at_rest, at_rest), (without, nothing)):
        save_state(tmp_path / "book", state, logits, TEXT, model)
        restored = load(tmp_path / "book", model)[1]
        assert same([block.memory for block in restored], [block.memory for block in expected])
        assert same([block.mean for block in restored], [block.mean for block in state])


def test_the_fingerprint_is_of_what_a_state_depends_on():
    model = tiny_model()
    unread = [{}, {"max_steps": 5}, {"generation_prompt": "x"}, {"fwpkm_inference_updates": True}]
    assert {fingerprint(tiny_model(**keys)) for keys in unread} == {fingerprint(model)}
    others = [
        tiny_model(seed=1),
        tiny_model(wavelet_crawl_k=5),
        tiny_model(mixer_gate_activation="relu"),
    ]
    assert len({fingerprint(m) for m in (model, *others)}) == 4


def test_the_fingerprint_sees_a_step_of_training_in_any_parameter():
    model = tiny_model()
    before = fingerprint(model)
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += 1e-3
            assert fingerprint(model) != before
            parameter.copy_(kept)
    assert fingerprint(model) == before


def test_a_state_of_another_model_is_refused(tmp_path):
    save(tmp_path / "book", tiny_model())
    with pytest.raises(UserError, match=r"^[^\n]*book: belongs to another model;[^\n]*$"):
        load(tmp_path / "book", tiny_model(seed=1))


@pytest.mark.parametrize("change", ["learned", "precision", "window", "no mean"])
def test_another_way_of_reading_is_refused(tmp_path, change):
    model = tiny_model(**LEARNING)
    save(tmp_path / "book", model)
    like = template(model)
    first = like[0]
    if change == "learned":
        first = first._replace(memory=None)
    elif change == "precision":
        first = tree_map_only(torch.Tensor, torch.Tensor.double, first)
    elif change == "window":
        first = first._replace(wavelet=(first.wavelet[0].repeat(1, 2, 1), *first.wavelet[1:]))
    else:
        first = first._replace(mean=None)
    with pytest.raises(UserError, match=r"^[^\n]*book: saved with another context[^\n]*$"):
        load_state(tmp_path / "book", model, (first, *like[1:]), "cpu")


def test_what_is_no_state_is_one_line(tmp_path):
    model = tiny_model()
    save(tmp_path / "book", model)
    whole = (tmp_path / "book").read_bytes()
    save_checkpoint(tmp_path / "checkpoint", model, {})
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Call me Ishmael.")
    for n in (4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"cut{n}").write_bytes(whole[:n])
    for path in [*tmp_path.iterdir(), tmp_path / "missing", tmp_path]:
        if path.name == "book":
            continue
        with pytest.raises(UserError, match=rf"^{path}: [^\n]*(no such|not)[^\n]*$"):
            load(path, model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last", None),
        ("logits", None),
        ("seen", None),
        ("count", None),
        ("last", torch.tensor([])),
        ("last", torch.tensor([1.0, 2.0])),
        ("last", torch.tensor([[1, 2]])),
        ("last", torch.tensor(1)),
        ("last", torch.tensor([1, V])),
        ("last", torch.tensor([-1])),
        ("seen", torch.zeros(1, dtype=torch.uint8)),
        ("seen", torch.zeros(2)),
        ("seen", torch.tensor(0, dtype=torch.uint8)),
        ("count", torch.tensor(15)),
        ("count", torch.tensor([14])),
        ("count", torch.tensor([16])),
        ("count", torch.tensor([-1])),
        ("logits", torch.zeros(V)),
        ("logits", torch.zeros(1, V + 1)),
        ("logits", torch.zeros(1, V, dtype=torch.int32)),
        ("logits", torch.full((1, V), torch.nan)),
    ],
    ids=range(21),
)
def test_text_and_logits_of_a_damaged_file_are_one_line(tmp_path, name, value):
    path, model = tmp_path / "s.safetensors", tiny_model()
    save(path, model)
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        header = file.metadata()
    tensors = {k: v for k, v in {**tensors, name: value}.items() if v is not None}
    save_file(tensors, path, metadata=header)
    with pytest.raises(UserError, match=f"its {name} are missing or damaged"):
        load(path, model)


LONG = [(i * i) % 7 for i in range(5000)] + [9, 8] * 200  # first some tokens, then others


def test_a_file_has_one_size_for_texts_of_any_length(tmp_path):
    model = tiny_model()
    for n in (LAST, 1000, 5000, len(LONG)):
        save(tmp_path / str(n), model, LONG[:n])
    assert len({path.stat().st_size for path in tmp_path.iterdir()}) == 1
    tokens, past = load(tmp_path / str(len(LONG)), model)[2:]
    assert tokens == LONG[-LAST:]
    assert past.n + len(tokens) == len(LONG)
    assert past.seen | set(tokens) == set(LONG)
    # What was loaded grows and is saved again.
    _, state, tokens, past = load(tmp_path / "1000", model)
    logits, state = read(model, [10], state)
    save_state(tmp_path / "on", state, logits, [*tokens, 10], model, past)
    tokens, past = load(tmp_path / "on", model)[2:]
    assert tokens == [*LONG[1001 - LAST : 1000], 10]
    assert past.n + LAST == 1001
    save_state(tmp_path / "whole", state, logits, LONG, model, whole=True)
    assert load(tmp_path / "whole", model)[2:] == (LONG, Past())


def test_files_of_before_are_read(tmp_path):
    """They held all tokens of the text, and neither their set nor their number."""
    path, model = tmp_path / "book", tiny_model()
    logits, state = save(path, model, LONG[:400])
    with safe_open(str(path), framework="pt") as file:
        header = {**file.metadata(), "format": "wavelet_lm.state.1"}
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    for name in ("last", "seen", "count"):
        del tensors[name]
    save_file({**tensors, "tokens": torch.tensor(LONG[:400])}, path, metadata=header)
    again, restored, tokens, past = load(path, model)
    assert torch.equal(again, logits)
    assert same(restored, state)
    assert (tokens, past) == (LONG[:400], Past())


def test_a_failure_keeps_the_older_file_and_is_one_line(tmp_path, monkeypatch):
    model = tiny_model()
    save(tmp_path / "book", model)
    whole = (tmp_path / "book").read_bytes()

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=r"book: the disk is full[^\n]*$"):
        save(tmp_path / "book", model, TEXT[:3])
    assert [path.name for path in tmp_path.iterdir()] == ["book"]
    assert (tmp_path / "book").read_bytes() == whole


def test_a_folder_that_does_not_exist_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"book: cannot be written[^\n]*$"):
        save(tmp_path / "nowhere" / "book", tiny_model())
