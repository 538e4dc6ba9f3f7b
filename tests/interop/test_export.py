"""Steps for other programs: onnxruntime and torch.export write what the project writes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, perturb
from wavelet_lm.cli import export
from wavelet_lm.config import Config
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.interop import torch_export
from wavelet_lm.interop.exported_step import Step, check_step
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.registry import build_model

TOKENS = 200
PROMPT = list(b"def ")
SMALL = {"C": 32, "layers": 1, "mlp_expansion": 2}
KEYS = {"pkm_num_keys": 16, "fwpkm_num_keys": 16, "pkm_top_k": 3, "fwpkm_top_k": 3}
CONFIGS = {
    "delta memory": ("configs/quickstart.json", {**SMALL}),
    "product keys": ("config.json", {**SMALL, **KEYS, "levels": 3, "per_scale_mixer_widths": None}),
    "gpt": ("configs/wavelet_gpt_char.json", {"C": 32, "layers": 1, "block_size": 256}),
}


def model_of(name, vocab_size=256):
    file, keys = CONFIGS[name]
    model = "gpt" if name == "gpt" else "wavelet_lm"
    config = Config.from_json(ROOT / file, model=model, **keys)
    torch.manual_seed(0)
    return perturb(build_model(config, vocab_size)).eval()


def run_of(folder, name):
    run = folder / "RUN"
    ByteTokenizer().save(run / "tokenizer")
    save_checkpoint(run / "best.safetensors", model_of(name), {})
    return run


@torch.no_grad()
def greedy(model, tokens, n):
    """The n likeliest next tokens one after the other, read as a whole text and then one by one."""
    logits, state = model(torch.tensor([tokens]), None)
    written = []
    for _ in range(n):
        written.append(int(logits[0, -1].argmax()))
        logits, state = model(torch.tensor([written[-1:]]), state)
    return written


def typed(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["wavelet-lm export", *map(str, arguments)])
    export.main()


@pytest.mark.parametrize("name", CONFIGS)
def test_onnxruntime_writes_our_tokens(name, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run, out = run_of(tmp_path, name), tmp_path / "step.onnx"
    typed(monkeypatch, "onnx", run, "--out", out)
    names = json.loads(out.with_suffix(".json").read_text())
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == [
        names["token"]["input"],
        *(leaf["input"] for leaf in names["state"]),
    ]
    state = {leaf["input"]: np.zeros(leaf["shape"], leaf["dtype"]) for leaf in names["state"]}
    written = list(PROMPT)
    for n in range(len(PROMPT) + TOKENS - 1):
        feed = {"token": np.array([written[n]]), **state}
        logits, *after = session.run(None, feed)
        state = dict(zip(state, after, strict=True))
        if n + 1 == len(written):
            written.append(int(logits.argmax()))
    assert written[len(PROMPT) :] == greedy(model_of(name), PROMPT, TOKENS)
    assert names["longest"] == (256 if name == "gpt" else None)
    if name == "delta memory":
        check_example(tmp_path / "step_generate.py", written[: len(PROMPT) + 20])


def check_example(example, tokens):
    """The program beside the file writes the same, with nothing of the project."""
    assert len(example.read_text().splitlines()) <= 36
    assert "wavelet_lm" not in example.read_text()
    command = [sys.executable, "-I", str(example), "def ", "20"]
    done = subprocess.run(command, cwd=example.parent, capture_output=True, text=True, check=True)
    assert done.stdout == bytes(tokens).decode(errors="replace") + "\n"


@pytest.mark.parametrize("beside", ["config.json", "config_generate.py"])
def test_what_is_something_else_is_not_replaced(beside, tmp_path, monkeypatch):
    run = run_of(tmp_path, "delta memory")
    (run / beside).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=f"{beside}: is there already"):
        typed(monkeypatch, "onnx", run, "--out", run / "config.onnx")
    assert (run / beside).read_text() == "{}"
    assert not (run / "config.onnx").exists()


def test_torch_export_writes_our_tokens(tmp_path, monkeypatch, capsys):
    run, out = run_of(tmp_path, "delta memory"), tmp_path / "step.pt2"
    typed(monkeypatch, "torch", run, "--out", out)
    assert capsys.readouterr().out.split() == [str(out), str(tmp_path / "step.json")]
    names = json.loads((tmp_path / "step.json").read_text())
    step = torch.export.load(out).module()
    state = [
        torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"])) for leaf in names["state"]
    ]
    written = list(PROMPT)
    for n in range(len(PROMPT) + TOKENS - 1):
        logits, *state = step(torch.tensor([written[n]]), *state)
        if n + 1 == len(written):
            written.append(int(logits.argmax()))
    assert written[len(PROMPT) :] == greedy(model_of("delta memory"), PROMPT, TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_starts_from_zeros(name):
    model = model_of(name)
    step, idx = Step(model), torch.randint(256, (1, 40))
    assert len(set(step.names)) == len(step.names) == len(step.start)
    whole, leaves = model(idx)[0], step.start
    for t in range(idx.shape[1]):
        with torch.no_grad():
            logits, *leaves = step(idx[:, t], *leaves)
        assert torch.allclose(logits, whole[:, t], atol=1e-4)


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch):
    """What is to be written is compared with the model first."""
    step = Step(model_of("delta memory"))
    check_step(step, lambda inputs: step(*inputs))
    with pytest.raises(UserError, match="after 1 tokens a logit is off by"):
        check_step(step, lambda inputs: [x + 1 for x in step(*inputs)])
    with pytest.raises(UserError, match="after 2 tokens a logit is off by"):  # of a lost state
        check_step(step, lambda inputs: [step(*inputs)[0], *step.start])

    class Wrong:
        def module(self):
            return lambda *inputs: [x + 1 for x in step(*inputs)]

    monkeypatch.setattr(torch_export, "exported", lambda step: Wrong())
    with pytest.raises(UserError, match="not the model's"):
        typed(monkeypatch, "torch", run_of(tmp_path, "delta memory"), "--out", tmp_path / "a.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_help_says_of_every_format_what_it_is_and_how_it_is_made(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        typed(monkeypatch, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    for name, form in export.FORMATS.items():
        assert f"wavelet-lm export {name} logs/RUN --out " in shown
        assert f"{name} {form.words}" in shown


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch):
    run = run_of(tmp_path, "delta memory")
    with pytest.raises(UserError, match=r"--out .*model\.bin: the name must end in \.onnx"):
        typed(monkeypatch, "onnx", run, "--out", tmp_path / "model.bin")
    with pytest.raises(UserError, match="invalid choice: 'tflite'"):
        typed(monkeypatch, "tflite", run, "--out", tmp_path / "model.tflite")
    with pytest.raises(UserError, match="nowhere"):
        typed(monkeypatch, "torch", tmp_path / "nowhere", "--out", tmp_path / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'pip install "wavelet-lm\[onnx\]"'):
        typed(monkeypatch, "onnx", run, "--out", tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]
