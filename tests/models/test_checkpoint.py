"""Checkpoints: what is written is what is read, and anything else is one clear line."""

import json
import os
import random
import re
import resource
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import perturb, tiny_config
from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_own_model,
    save_checkpoint,
)
from wavelet_lm.models.registry import build_model, n_params

VOCAB = 20


def make(seed=0, **overrides):
    torch.manual_seed(seed)
    return perturb(build_model(tiny_config(**overrides), VOCAB), seed=seed)


def assert_same_weights(a, b):
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_embedding_to_lm_head": True},
        {"shared_lifting_weights": False},
        {"wavelet_mode": "haar", "wavelet_crawl": False, "mixer_transform": "identity"},
    ],
    ids=str,
)
def test_round_trip(tmp_path, overrides):
    model = make(**overrides)
    save_checkpoint(tmp_path / "x.safetensors", model, {"step": 7})
    loaded = load_own_model(tmp_path / "x.safetensors")
    assert_same_weights(model, loaded)
    assert n_params(loaded) == n_params(model)
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.vocab_size == VOCAB
    assert (loaded.head.weight is loaded.embedding.weight) == bool(
        overrides.get("tie_embedding_to_lm_head")
    )
    assert len(loaded.wavelets) == (1 if model.config.shared_lifting_weights else 2)
    tokens = torch.randint(VOCAB, (2, 40))
    assert torch.equal(loaded(tokens)[0], model.eval()(tokens)[0])


def test_a_loaded_model_does_not_write_through_to_its_file(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", make(), {}, {"state": torch.ones(3)})
    loaded, extra = (
        load_own_model(tmp_path / "x.safetensors"),
        Checkpoint(tmp_path / "x.safetensors"),
    )
    perturb(loaded)
    extra.extra()["state"].zero_()
    assert_same_weights(load_own_model(tmp_path / "x.safetensors"), make())
    assert extra.extra()["state"].tolist() == [1, 1, 1]


def test_metadata_and_extra_tensors_come_back_and_do_not_disturb_loading(tmp_path):
    model, path = make(), tmp_path / "x.safetensors"
    extra = {"a/b": torch.arange(5, dtype=torch.uint8), "c": torch.randn(2, 3).double()}
    metadata = {"step": 3, "loss": 0.1 + 0.2, "none": None, "nested": {"x": [1]}}
    save_checkpoint(path, model, metadata, {**extra, "shares memory": extra["c"]})
    checkpoint = Checkpoint(path)
    assert checkpoint.metadata == metadata
    found = checkpoint.extra()
    assert found.keys() == {"a/b", "c", "shares memory"}
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert_same_weights(load_own_model(path), model)


class OnAGpu:
    """A tensor of an optimizer, in a memory that has no room for a second one."""

    def detach(self):
        return self

    def to(self, device, copy):
        assert (device, copy) == ("cpu", True)
        return torch.arange(3)


def test_what_is_saved_is_copied_on_the_cpu(tmp_path):
    save_checkpoint(tmp_path / "x.safetensors", build_model(tiny_config(), 7), {}, {"a": OnAGpu()})
    assert Checkpoint(tmp_path / "x.safetensors").extra()["a"].tolist() == [0, 1, 2]


def test_a_folder_means_its_best_else_its_last(tmp_path):
    with pytest.raises(UserError, match=r"no best\.safetensors or last\.safetensors"):
        load_own_model(tmp_path)
    save_checkpoint(tmp_path / "last.safetensors", make(seed=1), {})
    assert_same_weights(load_own_model(tmp_path), make(seed=1))
    save_checkpoint(tmp_path / "best.safetensors", make(seed=2), {})
    assert_same_weights(load_own_model(tmp_path), make(seed=2))
    assert find_checkpoint(tmp_path / "last.safetensors") == tmp_path / "last.safetensors"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    umask = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "x.safetensors", make(), {})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640


# --- files that are something else ---------------------------------------------------------------


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_own_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing(tmp_path):
    assert "there is no such checkpoint" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, make(), {})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
    assert "truncated or not a safetensors file" in refusal(path)


def test_not_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("once upon a time there was a file\n" * 100, encoding="utf-8")
    assert "truncated or not a safetensors file" in refusal(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "wavelet_lm.99"}])
def test_safetensors_of_somebody_else(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    save_file({"embedding.weight": torch.ones(2, 2)}, path, metadata=metadata)
    assert "this version reads 'wavelet_lm.1'" in refusal(path)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"C": 32}, r"is \[.*\], the model's is \["),
        (
            {"pkm_enabled": False},
            r"no blocks\.0\.feedforward\.branches\.pkm\.keys_a\.weight;.*and \d+ more",
        ),
        ({"layers": 3}, r"unknown blocks\.2\."),
        ({"tie_embedding_to_lm_head": True}, r"no head\.weight$"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_config_lists_what_differs(tmp_path, other, problem):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, make(**other), {})
    model = make(seed=3)
    with pytest.raises(UserError, match=f"a checkpoint of another config: .*{problem}"):
        Checkpoint(path).load_into(model)
    assert_same_weights(model, make(seed=3))


# --- files whose header is damaged ---------------------------------------------------------------


def rewrite(path, tensors=lambda tensors: None, **header):
    """Write the file anew with other values in the header (None = without), or other tensors."""
    with safe_open(str(path), framework="pt") as opened:
        values = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  (no mapping)
        metadata = {**opened.metadata(), **header}
    tensors(values)
    save_file(values, path, metadata={k: v for k, v in metadata.items() if v is not None})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, make(), {"step": 7})
    return path


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "null", "7", '"a"', "[" * 100_000, '{"step": ' + "9" * 5000 + "}"],
    ids=lambda text: str(text)[:9],
)
@pytest.mark.parametrize("key", ["config", "metadata"])
def test_a_header_without_config_or_metadata_is_named(file, key, text):
    rewrite(file, **{key: text})
    assert re.search(rf"(its header is damaged|the {key} in its header)", refusal(file))


@pytest.mark.parametrize("text", [None, "", "0", "-1", "20.0", "2e1", " 20", "twenty", "9" * 5000])
def test_a_vocabulary_that_is_no_number_is_named(file, text):
    rewrite(file, vocab_size=text)
    assert "its header is damaged (its vocab_size is " in refusal(file)


def config_with(**changes):
    return json.dumps({**tiny_config().to_dict(), **changes})


@pytest.mark.parametrize(
    "header",
    [
        {"vocab_size": "999999999"},
        {"config": config_with(C=1 << 40)},
        {"config": config_with(C=1 << 62)},
        {"config": config_with(C=1 << 70)},
        {"config": config_with(layers=1 << 60)},
        {"config": config_with(levels=1 << 20, per_scale_mixer_widths=None)},
        {"config": config_with(mlp_layers=1 << 60)},
        {"config": config_with(mixer_depth=1 << 60, per_scale_mixer_widths=None)},
        {"config": config_with(multinodal_enabled=True, multinodal_num_cells=1 << 60)},
        {"config": config_with(mlp_expansion=1 << 60)},
        {"config": config_with(pkm_num_keys=1 << 60)},
    ],
    ids=range(11),
)
def test_absurd_sizes_are_refused_before_memory_is_taken(file, header):
    rewrite(file, **header)
    refusal(file)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_whole_numbers_are_refused(file, dtype):
    def change(tensors):
        tensors["head.weight"] = tensors["head.weight"].to(dtype)

    rewrite(file, change)
    assert re.search(r"head\.weight is \w+, weights are floating point", refusal(file))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_precision_are_read(file, dtype):
    def change(tensors):
        tensors["head.weight"] = tensors["head.weight"].to(dtype)

    rewrite(file, change)
    expected = make().head.weight.to(dtype).float()
    assert torch.equal(load_own_model(file).head.weight, expected)


def test_a_format_that_does_not_fit_the_weights_is_refused(file):
    rewrite(file, format="wavelet_lm.quantized.1")
    assert "that does not fit its scheme" in refusal(file)


def test_whatever_is_changed_in_a_header_ends_in_one_line(file):
    """Bytes of the header replaced, dropped and doubled: the file loads, or says what is wrong."""
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + n], data[8 + n :]
    generator = random.Random(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(header)
        at, length = generator.randrange(n), generator.choice((1, 1, 2, 30))
        noise = bytes(generator.choices(b'0123456789"{}[]:,-.e\\antrufls', k=length))
        changed[at : at + length] = generator.choice((noise, b"", 2 * changed[at : at + length]))
        file.write_bytes(len(changed).to_bytes(8, "little") + bytes(changed) + rest)
        try:
            load_own_model(file)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), error
    assert refused > 20


# --- disks that are full -------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [10, 2000, 20_000])
def test_a_write_that_fails_midway_keeps_the_old_checkpoint(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, make(seed=1), {"step": 1})
    assert path.stat().st_size > kept
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept, hard))
    try:
        with pytest.raises(UserError, match=r"x\.safetensors: cannot be written \(File too large"):
            save_checkpoint(path, make(seed=2), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    assert Checkpoint(path).metadata == {"step": 1}
    assert_same_weights(load_own_model(path), make(seed=1))


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    path = tmp_path / "x.safetensors"
    save_checkpoint(path, make(seed=1), {})
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"x\.safetensors: the disk is full; free some space"):
        save_checkpoint(path, make(seed=2), {})
    assert list(tmp_path.iterdir()) == [path]
    assert_same_weights(load_own_model(path), make(seed=1))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        save_checkpoint(tmp_path / "missing" / "x.safetensors", make(), {})
