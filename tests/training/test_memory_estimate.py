"""The estimate of memory against what autograd keeps."""

import pytest
import torch

from tests.conftest import tiny_config
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.memory_estimate import estimate_bytes

V = 256
NETWORK = {
    "C": 64,
    "levels": 2,
    "per_scale_mixer_widths": None,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    "block_size": 96,
    "micro_batch_size": 2,
    **{f"dropout_{place}": 0.0 for place in ("embedding", "mixer", "projection", "mlp")},
}


def bytes_kept(config) -> int:
    """Of all tensors that the backward pass of a step will read, weights aside."""
    model = build_model(config, V)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    tokens = torch.randint(V, (config.micro_batch_size, config.block_size))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(tokens, tokens)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"delta_bands": 0, "delta_heads": 2},
        {"delta_bands": 2, "delta_key_dim": 48},
        {"delta_value_dim": 64},
    ],
)
def test_a_delta_memory_keeps_what_is_said(sizes):
    without = tiny_config(**NETWORK)
    config = without.replace(delta_memory=True, **sizes)
    said = estimate_bytes(config, 0, V) - estimate_bytes(without, 0, V)
    assert bytes_kept(config) - bytes_kept(without) == pytest.approx(said, rel=0.15)
