"""Runs in the hub: sent and fetched by its own client, from a hub on this machine."""

import importlib
import json
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.interop.fake_hub import TOKEN, running_hub
from wavelet_lm import hub_paths
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.inference.loading import find_own_checkpoint, load_model, load_tokenizer
from wavelet_lm.interop.hub import push
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.training.run_folder import RunFolder

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "ann/small-waves"
PATH = f"hf://{NAME}"
WRITE = ("--prompt", "def ", "--num_tokens", "3", "--device", "cpu", "--compile", "false")


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


def typed(monkeypatch, command, *arguments):
    monkeypatch.setattr("sys.argv", [f"wavelet-lm {command}", *map(str, arguments)])
    importlib.import_module(f"wavelet_lm.cli.{command}").main()


def test_a_run_goes_there_and_comes_back(hub, run, monkeypatch, capsys):
    typed(monkeypatch, "push", run, NAME)
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


def test_where_things_lie_on_this_machine_is_not_sent(hub, run, tmp_path, monkeypatch, capsys):
    home, config = str(tmp_path), json.loads((run / "config.json").read_text())
    local = {"dataset": f"{home}/letters.txt", "out_dir": f"{home}/logs", "init_from": PATH}
    change = {"step": 3, "dataset": ["a.txt", local["dataset"]], "lr": [0.1, 0.2]}
    (run / "config.json").write_text(json.dumps({**config, **local, "changes": [change]}))
    model = load_model(run)
    model.config = Config.from_dict({**config, **local}, source="test")
    save_checkpoint(run / "best.safetensors", model, {"step": 3})
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    typed(monkeypatch, "push", run, NAME)
    said = capsys.readouterr().err
    assert "there dataset is 'letters.txt'" in said and "there out_dir is 'logs'" in said
    assert "init_from" not in said
    sent = hub.commits[NAME][-1][1]
    assert [name for name, content in sent.items() if home.encode() in content] == []
    there = json.loads(sent["config.json"])
    assert there["changes"] == [{**change, "dataset": ["a.txt", "letters.txt"]}]
    assert (there["init_from"], there["out_dir"]) == (PATH, "logs")
    fetched, idx = load_model(PATH), torch.randint(256, (1, 9))
    assert fetched.config.dataset == "letters.txt"
    assert torch.equal(fetched(idx)[0], model(idx)[0])
    typed(monkeypatch, "generate", PATH, *WRITE)
    assert before == {file: file.read_bytes() for file in before}


def test_the_card_says_what_it_is_and_is_never_written_over(hub, run):
    row = {"event": "test", "split": "test", "sliding": {"bits_per_byte": 1.8971}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + '\n{"event": "te')
    push(run, NAME)
    card = hub.commits[NAME][-1][1]["README.md"].decode()
    front = huggingface_hub.ModelCard(card).data
    assert (front.library_name, front.pipeline_tag) == ("wavelet-lm", "text-generation")
    assert "1.8971 bits per byte on the test split" in card
    assert "1 block of 16 channels, trained on `python-stdlib`" in card
    assert f"wavelet-lm generate {PATH}" in card
    hub.commit(NAME, {"README.md": b"mine"})
    push(run, NAME)
    assert hub.commits[NAME][-1][1]["README.md"] == b"mine"


def test_a_private_model_is_for_those_who_log_in(hub, run, tmp_path, monkeypatch):
    typed(monkeypatch, "push", run, NAME, "--private")
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
    push(run, NAME)
    typed(monkeypatch, "generate", PATH, *WRITE)
    assert not list(hub_paths.local_path(PATH).glob("generations*"))


@pytest.mark.parametrize("path", ["hf://ann", "hf://ann/", "hf://ann/b/c", f"{PATH}@", "hf://../x"])
def test_names_that_cannot_be(path):
    with pytest.raises(UserError, match="is written hf://user/name"):
        load_model(path)


def test_a_run_of_the_hub_is_not_gone_on_with():
    with pytest.raises(UserError, match=f"start a new run .* --init_from {PATH}$"):
        RunFolder.open(PATH)


def test_what_is_no_run_is_refused(hub, run):
    hub.commit("ann/else", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(UserError, match="holds no run of this project"):
        load_model("hf://ann/else")
    with pytest.raises(UserError, match="named user/name"):
        push(run, "just-a-name")
    (run / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"push takes a run folder with its best\.safetensors"):
        push(run, NAME)
    assert NAME not in hub.commits


def test_without_the_library_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub_paths._fetched.cache_clear()
    with pytest.raises(UserError, match=r'pip install "wavelet-lm\[hub\]"'):
        load_model(PATH)
    with pytest.raises(UserError, match=r'pip install "wavelet-lm\[hub\]"'):
        push(run, NAME)
