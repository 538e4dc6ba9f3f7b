"""Models whose weights stay in their file: fused alike, never more than a part in memory."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from tests.conftest import perturb, tiny_config
from tests.models.test_properties import configs
from wavelet_lm import UserError, build_model
from wavelet_lm.fusion.fuse import fuse, n_bytes
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint, stored_model
from wavelet_lm.models.stored_model import StoredModel, TensorReader

V = 11


def stored(model: nn.Module) -> StoredModel:
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return StoredModel(model.config, V, values.__getitem__, dtype=next(model.parameters()).dtype)


@settings(max_examples=15, suppress_health_check=list(HealthCheck), derandomize=True)
@given(configs())
def test_a_stored_model_is_fused_as_the_model_is(config):
    model, idx = perturb(build_model(config, V)), torch.randint(V, (2, 9))
    for dtype in (torch.float32, torch.bfloat16):
        whole = fuse(model, dtype, adapt=config.fwpkm_inference_updates)
        parts = fuse(stored(model), dtype, adapt=config.fwpkm_inference_updates)
        assert n_bytes(parts) == n_bytes(whole)
        with torch.no_grad():
            assert torch.equal(parts(idx)[0], whole(idx)[0])


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"model": "gpt", "tie_embedding_to_lm_head": True, "head_hidden": 0},
        {"shared_lifting_weights": False},
    ],
)
def test_no_more_than_a_part_is_in_memory_beside_the_fused_model(model):
    original = build_model(tiny_config(**model, layers=6), V)
    n_all = sum(p.numel() for p in original.parameters())
    values, alive, most = {n: p.detach() for n, p in original.named_parameters()}, {}, 0

    def read(name):
        nonlocal most
        tensor = values[name].clone()
        storage = tensor.untyped_storage()
        alive[name] = weakref.ref(storage), tensor.numel()
        weakref.finalize(storage, alive.pop, name)
        most = max(most, sum(n for _, n in alive.values()))
        return tensor

    fused = fuse(StoredModel(original.config, V, read), torch.bfloat16)
    gc.collect()
    assert most < n_all / 2
    assert not [p for p in fused.parameters() if p.is_meta or (p.dtype == torch.float32 and p.ndim)]


def test_weights_are_seen_once_and_in_full():
    model, seen = build_model(tiny_config(tie_embedding_to_lm_head=True), V), {}
    source = stored(model)
    source.see = lambda name, values: seen.update({name: values.clone()})
    fuse(source)
    assert seen.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(seen[name], p) for name, p in model.named_parameters())


def test_another_thread_builds_its_models_with_weights():
    built = []

    def read(name):
        raise AssertionError

    thread = threading.Thread(target=lambda: built.append(build_model(tiny_config(), V)))
    source = StoredModel(tiny_config(), V, read)
    thread.start()
    thread.join()
    assert all(p.is_meta for p in source.model.parameters())
    assert not any(b.is_meta for b in source.model.buffers())
    assert not any(p.is_meta for p in built[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_reader_reads_what_was_written(tmp_path, dtype):
    model = perturb(build_model(tiny_config(), V)).to(dtype)
    save_checkpoint(tmp_path / "x.safetensors", model, {}, {"more": torch.arange(3)})
    read = TensorReader(tmp_path / "x.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(read(name), p)


def test_sizes_that_are_not_the_files_are_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    model = build_model(tiny_config(), V)
    for size in (20_000_000, 16_384):
        model.config = tiny_config(C=size)
        save_checkpoint(path, model, {})
        with pytest.raises(UserError, match="no model of these sizes can be built"):
            stored_model(Checkpoint(path))
