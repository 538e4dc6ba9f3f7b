"""docs/python.md: its examples run in their order, and it names every option."""

import contextlib
import io
import re
from pathlib import Path

from tests.conftest import tiny_config
from wavelet_lm import build_model
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.inference.engine import OPTIONS
from wavelet_lm.models.checkpoint import save_checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_examples_run_as_they_stand(tmp_path, monkeypatch):
    run = tmp_path / "logs" / "RUN"
    ByteTokenizer().save(run / "tokenizer")
    save_checkpoint(run / "best.safetensors", build_model(tiny_config(), 256), {})
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == 5
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(examples), {})
    assert "num_tokens is -1; it must be 0 or more" in printed.getvalue()


def test_every_option_is_named():
    assert set(OPTIONS) <= set(re.findall(r"`(\w+)`", PAGE))
