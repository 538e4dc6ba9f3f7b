"""Quantized checkpoints: every bit comes back, nothing more is read than there is."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import perturb, tiny_config
from tests.fusion.test_fuse import sharpened
from tests.models.test_properties import V, configs
from tests.quantization.test_quantize import SCHEMES, quantized, scheme, tokens, whole
from wavelet_lm import Config, UserError, build_model
from wavelet_lm.fusion.fuse import is_fused, n_bytes
from wavelet_lm.inference.loading import load_model
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint
from wavelet_lm.quantization.checkpoint import load_quantized, save_quantized
from wavelet_lm.quantization.quantize import quantize

RANDOM = {"max_examples": 15, "suppress_health_check": list(HealthCheck), "derandomize": True}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def saved(folder, quantized_model, scheme):
    path = Path(folder) / "model.safetensors"
    save_quantized(path, quantized_model, scheme, {"step": 7})
    return path


@settings(**RANDOM)
@given(configs(), st.sampled_from(sorted(SCHEMES)), st.sampled_from(DTYPES))
def test_what_is_saved_is_what_is_loaded(config, name, dtype):
    scheme = SCHEMES[name]
    adapt = config.fwpkm_inference_updates
    quantized_model = quantized(sharpened(config), scheme, dtype=dtype, adapt=adapt)
    with TemporaryDirectory() as folder:
        path = saved(folder, quantized_model, scheme)
        loaded = load_model(path)
        assert Checkpoint(path).metadata == {"step": 7}
    assert is_fused(loaded)
    assert not loaded.training
    assert loaded.config == quantized_model.config
    assert torch.equal(whole(loaded, tokens()), whole(quantized_model, tokens()))
    tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (quantized_model, loaded)]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[0].items():
        assert tensor.dtype == tensors[1][key].dtype, key
        assert torch.equal(tensor, tensors[1][key]), key
    assert n_bytes(loaded) == n_bytes(quantized_model)


@pytest.mark.parametrize("model", ["gpt", "wavelet_gpt"])
def test_a_gpt_is_saved_and_loaded(model, tmp_path):
    config = Config(model=model, C=16, layers=2, heads=2, block_size=32, head_hidden=8)
    quantized_model = quantize(perturb(build_model(config, V)).eval(), scheme(mlp=4))
    loaded = load_model(saved(tmp_path, quantized_model, scheme(mlp=4)))
    assert torch.equal(whole(loaded, tokens()), whole(quantized_model, tokens()))


class Creations(TorchDispatchMode):
    """The sizes in bytes of all float tensors that operators return where data is."""

    def __init__(self):
        super().__init__()
        self.sizes = [0]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.is_floating_point():
                self.sizes.append(leaf.numel() * leaf.element_size())
        return out


@pytest.mark.parametrize("bits", [8, 4])
def test_the_model_in_full_precision_never_exists(bits, tmp_path):
    config = tiny_config(C=256, layers=1)
    quantized_model = quantize(perturb(build_model(config, 500)).eval(), scheme(bits))
    path = saved(tmp_path, quantized_model, scheme(bits))
    floats = [
        t
        for t in [*quantized_model.parameters(), *quantized_model.buffers()]
        if t.is_floating_point()
    ]
    largest = max(t.numel() * t.element_size() for t in floats)
    with Creations() as creations:
        loaded = load_model(path)
    assert max(creations.sizes) == largest < 4 * 256 * 256
    with Creations() as creations:  # which would see it
        load_model_in_full(config)
    assert max(creations.sizes) >= 4 * 256 * 500
    # Nor is it a view of the file.
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(whole(loaded, tokens()), whole(quantized_model, tokens()))


def load_model_in_full(config):
    return quantize(build_model(config, 500), scheme())


@pytest.mark.parametrize(("bits", "share"), [(8, 0.55), (4, 0.32), (2, 0.20)])
def test_files_are_as_small_as_their_bits(bits, share, tmp_path):
    config = tiny_config(C=256, layers=1, pkm_num_keys=256, fwpkm_num_keys=256)
    model = build_model(config, 2000).bfloat16().eval()
    save_checkpoint(tmp_path / "bf16.safetensors", model, {})
    full = (tmp_path / "bf16.safetensors").stat().st_size
    path = saved(tmp_path, quantize(model, scheme(bits)), scheme(bits))
    assert path.stat().st_size <= share * full


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    quantized_model = quantize(perturb(build_model(tiny_config(), V)).eval(), scheme())
    return saved(tmp_path, quantized_model, scheme())


def change(path, tensors=lambda tensors: None, **header):
    """Write the file anew with another header or tensors."""
    with safe_open(str(path), framework="pt") as opened:
        new = {**opened.metadata(), **header}
        values = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  (no mapping)
    tensors(values)
    save_file(values, path, metadata=new)


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"backend": "torchao"},
        {"group_size": 24},
        {"group_size": "64"},
        {"group_size": 0},
        {"bits": {"mlp": 8}},
        {"bits": dict.fromkeys(json.loads(scheme().to_json())["bits"], 3)},
        {"bits": None},
        {"bits": list(range(7))},
        {"rotated": True},
    ],
)
def test_an_unknown_scheme_is_refused(file, changes):
    change(file, quantization=json.dumps({**json.loads(scheme().to_json()), **changes}))
    assert "quantized by a scheme that this version does not know" in refusal(file)


@pytest.mark.parametrize("text", ["", "8-bit", "[]", "{}", "null", "8"])
def test_a_scheme_that_is_none_is_refused(file, text):
    change(file, quantization=text)
    assert "quantized by a scheme that this version does not know" in refusal(file)


def test_another_format_and_a_truncated_file_are_refused(file):
    whole_file = file.read_bytes()
    change(file, format="wavelet_lm.quantized.9")
    assert "(its format is 'wavelet_lm.quantized.9'); this version reads" in refusal(file)
    change(file, format="x" * 5000)
    assert len(refusal(file)) < 1000
    for n in (0, 5, 1000, len(whole_file) - 1):
        file.write_bytes(whole_file[:n])
        assert "truncated or not a safetensors file" in refusal(file)


def test_tensors_of_another_config_or_scheme_are_refused(file):
    def drop(tensors):
        del tensors["head.weight.codes"]

    def add(tensors):
        tensors["extra.weight"] = torch.zeros(3)

    for act, words in ((drop, "no head.weight.codes"), (add, "unknown extra.weight")):
        before = file.read_bytes()
        change(file, act)
        assert f"a checkpoint of another config: {words}" in refusal(file)
        file.write_bytes(before)
    change(file, config=json.dumps(tiny_config(C=32).to_dict()))
    assert "a checkpoint of another config: " in refusal(file)
    file.write_bytes(before)
    change(file, quantization=scheme(4).to_json())
    assert "a checkpoint of another config: " in refusal(file)


def test_training_refuses_quantized_weights(file):
    checkpoint = Checkpoint(file)
    with pytest.raises(UserError, match="its weights are quantized, for generation and evaluation"):
        checkpoint.load_into(build_model(checkpoint.config, V))
    assert is_fused(load_quantized(checkpoint))
