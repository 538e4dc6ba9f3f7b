"""Runs in the hub: sent and fetched by its own client, from a hub on this machine."""

import importlib
import json
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.interop.fake_hub import TOKEN, running_hub
from wavelet_lm import hub_paths
from wavelet_lm.cli import push as command
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.inference.loading import find_own_checkpoint, load_model, load_tokenizer
from wavelet_lm.interop.hub import push
from wavelet_lm.training.run_folder import RunFolder

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "ann/small-waves"
PATH = f"hf://{NAME}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, and an account in it; a cache of its own."""
    constants = importlib.import_module("huggingface_hub.constants")
    with running_hub() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_URL_HOSTS", frozenset({"127.0.0.1"}), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub_paths._fetched.cache_clear()
        yield hub
    hub_paths._fetched.cache_clear()


@pytest.fixture
def run(checkout):
    """A run folder with what is to be sent, and what is not."""
    run = checkout / "logs" / "RUN"
    config = Config.from_json(ROOT / "configs/quickstart.json", C=16, layers=1)
    (run / "config.json").write_text(config.to_json())
    (run / "last.safetensors").write_bytes(b"the optimizer's")
    (run / "environment.json").write_text('{"command": "somebody\'s"}')
    return run


def typed(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["wavelet-lm push", *map(str, arguments)])
    command.main()


def test_a_run_goes_there_and_comes_back(hub, run, monkeypatch, capsys):
    typed(monkeypatch, run, NAME)
    out = capsys.readouterr().out
    assert f"/{NAME}\n" in out and f"wavelet-lm generate {PATH}" in out
    sent = hub.commits[NAME][-1][1]
    ours = {"config.json", "best.safetensors", "metrics.jsonl", "tokenizer/tokenizer.json"}
    assert sent.keys() == {".gitattributes", "README.md", *ours}
    assert all(sent[file] == (run / file).read_bytes() for file in ours)
    assert NAME not in hub.private

    here, there = load_model(run), load_model(PATH)
    idx = torch.randint(256, (2, 20))
    assert torch.equal(here(idx)[0], there(idx)[0])
    assert load_tokenizer(PATH).name == "bytes"
    assert find_own_checkpoint(PATH).name == "best.safetensors"
    asked = [request for request in hub.requests if "/revision/" in request]
    assert len(asked) == 1, "one look at the hub serves a process"


def test_the_card_says_what_it_is_and_is_never_written_over(hub, run):
    row = {"event": "test", "split": "test", "sliding": {"bits_per_byte": 1.8971}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + '\n{"event": "te')
    push(run, NAME)
    card = hub.commits[NAME][-1][1]["README.md"].decode()
    front = huggingface_hub.ModelCard(card).data
    assert (front.library_name, front.pipeline_tag) == ("wavelet-lm", "text-generation")
    assert "1.8971 bits per byte on the test split" in card
    assert "1 blocks of 16 channels, trained on `python-stdlib`" in card
    assert f"wavelet-lm generate {PATH}" in card
    hub.commit(NAME, {"README.md": b"mine"})
    push(run, NAME)
    assert hub.commits[NAME][-1][1]["README.md"] == b"mine"


def test_a_private_model_is_for_those_who_log_in(hub, run, tmp_path, monkeypatch):
    typed(monkeypatch, run, NAME, "--private")
    assert NAME in hub.private
    assert load_tokenizer(PATH).name == "bytes"
    hub_paths._fetched.cache_clear()
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "of_a_stranger"))
    with pytest.raises(UserError, match=r"no such model, or it is private; .* HF_TOKEN"):
        load_model(f"{PATH}@main")
    with pytest.raises(UserError, match=r"not allowed; .* HF_TOKEN"):
        push(run, NAME)


def test_a_revision_stays_what_it_was(hub, run):
    push(run, NAME)
    first = hub.commits[NAME][-1][0]
    changed = load_model(run)
    with torch.no_grad():
        changed.final_norm.weight.mul_(2)
    from wavelet_lm.models.checkpoint import save_checkpoint

    save_checkpoint(run / "best.safetensors", changed, {})
    push(run, NAME)
    idx = torch.randint(256, (1, 8))
    assert torch.equal(load_model(PATH)(idx)[0], changed(idx)[0])
    assert not torch.equal(load_model(f"{PATH}@{first}")(idx)[0], changed(idx)[0])
    with pytest.raises(UserError, match="the model has no revision elsewhere"):
        load_model(f"{PATH}@elsewhere")


def test_what_was_fetched_is_there_without_the_hub(hub, run, monkeypatch):
    push(run, NAME)
    load_tokenizer(PATH)
    hub_paths._fetched.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_tokenizer(PATH).name == "bytes"
    with pytest.raises(UserError, match=r"^hf://ann/other: cannot be fetched, and is not here"):
        load_tokenizer("hf://ann/other")


def test_texts_are_not_recorded_in_the_cache(hub, run, monkeypatch, capsys):
    from wavelet_lm.cli import generate

    push(run, NAME)
    words = ["--prompt", "def ", "--num_tokens", "3", "--device", "cpu", "--compile", "false"]
    monkeypatch.setattr("sys.argv", ["wavelet-lm generate", PATH, *words])
    generate.main()
    assert not list(hub_paths.local_path(PATH).glob("generations*"))


@pytest.mark.parametrize("path", ["hf://ann", "hf://ann/", "hf://ann/b/c", f"{PATH}@", "hf://../x"])
def test_names_that_cannot_be(path):
    with pytest.raises(UserError, match="is written hf://user/name"):
        load_model(path)


def test_a_run_of_the_hub_is_not_gone_on_with():
    with pytest.raises(UserError, match=f"start a new run .* --init_from {PATH}$"):
        RunFolder.open(PATH)


def test_what_is_no_run_is_refused(hub, run, tmp_path):
    hub.commit("ann/else", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(UserError, match="holds no run of this project"):
        load_model("hf://ann/else")
    with pytest.raises(UserError, match="there is no such run folder"):
        push(tmp_path / "nowhere", NAME)
    with pytest.raises(UserError, match="named user/name"):
        push(run, "just-a-name")
    (run / "best.safetensors").unlink()
    with pytest.raises(UserError, match="there is no such checkpoint"):
        push(run, NAME)
    assert NAME not in hub.commits


def test_without_the_library_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub_paths._fetched.cache_clear()
    with pytest.raises(UserError, match=r'pip install "wavelet-lm\[hub\]"'):
        load_model(PATH)
    with pytest.raises(UserError, match=r'pip install "wavelet-lm\[hub\]"'):
        push(run, NAME)
