"""Shared helpers: tiny configs, perturbed models, and the skip of GPU tests."""

import json
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from wavelet_lm.config import Config

ROOT = Path(__file__).parents[1]

# Models this small only lose by threads, and a test's time says nothing about its subject.
torch.set_num_threads(1)
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process
# that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = {
    "C": 16,
    "layers": 2,
    "levels": 3,
    "block_size": 32,
    "mlp_expansion": 2,
    "pkm_num_keys": 16,
    "pkm_top_k": 3,
    "fwpkm_num_keys": 16,
    "fwpkm_top_k": 3,
    "fwpkm_heads": 2,
    "per_scale_mixer_widths": (1, 1, 0.5, 0.5),
}


def tiny_config(**overrides) -> Config:
    """A config with every part of the headline model, at a size for tests."""
    return Config(**{**TINY, **overrides})


def perturb(model: torch.nn.Module, scale: float = 0.1, seed: int = 0) -> torch.nn.Module:
    """Move every parameter, so that none sits at a special value such as a zero gain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the configs and a run of an untrained model, as the examples expect."""
    from wavelet_lm.data.tokenizers import ByteTokenizer
    from wavelet_lm.models.checkpoint import save_checkpoint
    from wavelet_lm.models.registry import build_model

    run = tmp_path / "logs" / "RUN"
    config = Config.from_json(ROOT / "configs/quickstart.json", C=16, layers=1)
    ByteTokenizer().save(run / "tokenizer")
    save_checkpoint(run / "best.safetensors", build_model(config, 256), {})
    rows = [{"event": "eval", "step": 0, "val_loss": 5.5, "bits_per_byte": 8.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("config.json", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
