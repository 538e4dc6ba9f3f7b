"""Hub data sets through the real `datasets` library, with local files in place of repositories."""

import dataclasses
import json
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from wavelet_lm.config import DataConfig
from wavelet_lm.data import hub
from wavelet_lm.data.dataset import prepare_data
from wavelet_lm.data.hub import KNOWN, HubSet, hub_corpus
from wavelet_lm.errors import UserError

SPLIT = (0.8, 0.1, 0.1)


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def repository(folder, **splits):
    """A folder of Parquet files; a split is a list of texts, or a dict of columns."""
    folder.mkdir(exist_ok=True)
    for split, columns in splits.items():
        columns = columns if isinstance(columns, dict) else {"text": columns}
        path = folder / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(folder)


def local(monkeypatch, name, spec):
    monkeypatch.setitem(KNOWN, name, spec)


def texts(corpus):
    return {s: ["".join(doc) for doc in documents()] for s, documents in corpus.splits.items()}


def prepare(name, tmp_path, **options):
    config = DataConfig(dataset=name, split=SPLIT, cache_dir=str(tmp_path / "cache"), **options)
    return prepare_data(config, log=lambda line: None)


ROWS = ["", " = Title = \n", "", " Some text . \n", ""]


def wikitext(folder, test_rows=ROWS):
    expected = "\n\n".join(test_rows)
    return expected, dataclasses.replace(
        KNOWN["wikitext-2"],
        repository=repository(folder, train=ROWS * 3, validation=ROWS, test=test_rows),
        config=None,
        n_bytes={"test": len(expected.encode())},
        n_tokens={},
    )


def test_wikitext_is_one_joined_document(tmp_path, monkeypatch, gpt2):
    expected, spec = wikitext(tmp_path / "wikitext", [*ROWS, "é \n"])
    local(monkeypatch, "wikitext-2", spec)
    data = prepare("wikitext-2", tmp_path)  # auto is gpt2
    assert data.name == "wikitext-2"
    assert data.test.tokens.tolist() == gpt2.encode(expected)
    assert data.tokenizer.decode(data.train.tokens) == "\n\n".join(ROWS * 3)
    assert (data.test.n_bytes, data.test.n_words) == (len(expected.encode()), 245_569)
    assert data.train.n_words is None


@pytest.mark.parametrize("what", ["bytes", "tokens"])
def test_published_counts_are_checked(what, tmp_path, monkeypatch):
    expected, spec = wikitext(tmp_path / "wikitext")
    wrong = {"test": len(expected) + 1}
    if what == "bytes":
        spec = dataclasses.replace(spec, n_bytes=wrong)
    else:
        spec = dataclasses.replace(spec, n_tokens={("bytes", "test"): wrong["test"]})
    local(monkeypatch, "wikitext-2", spec)
    for _ in range(2):  # also when it comes from the cache
        with pytest.raises(UserError, match=f"has {len(expected)} .*expected {len(expected) + 1}"):
            prepare("wikitext-2", tmp_path, tokenizer="bytes")


def test_rows_are_documents_and_missing_splits_are_cut_off(tmp_path, monkeypatch):
    rows = [f"row {i}" for i in range(100)]
    folder = tmp_path / "repo"
    local(monkeypatch, "tinystories", HubSet(repository(folder, train=rows)))
    assert texts(hub_corpus("tinystories", SPLIT)) == {
        "train": rows[:80],
        "valid": rows[80:90],
        "test": rows[90:],
    }
    repository(folder, validation=["v"])
    assert texts(hub_corpus("tinystories", SPLIT)) == {
        "train": rows[:90],
        "valid": ["v"],
        "test": rows[90:],
    }
    repository(folder, test=["t", None])
    found = hub_corpus("tinystories", SPLIT)
    assert texts(found) == {"train": rows, "valid": ["v"], "test": ["t", ""]}
    assert texts(hub_corpus("tinystories", (0.5, 0.25, 0.25))) == texts(found)


def test_end_of_text_between_rows(tmp_path, monkeypatch, gpt2):
    rows = ["Once upon a time.", "", "The end."] * 10
    local(monkeypatch, "tinystories", HubSet(repository(tmp_path / "repo", train=rows)))
    data = prepare("tinystories", tmp_path)
    n_texts = sum(bool(row) for row in rows[:24])
    assert (data.train.tokens == gpt2.end_of_text).sum() == n_texts - 1
    assert data.tokenizer.decode(data.train.tokens) == "".join(rows[:24])


def test_a_set_of_one_text_is_cut_by_position(tmp_path, monkeypatch):
    text = "".join(chr(97 + i * i % 26) for i in range(3_000_000))  # longer than a piece
    local(monkeypatch, "text8", HubSet(repository(tmp_path / "repo", train=[text])))
    data = prepare("text8", tmp_path, tokenizer="bytes")
    assert bytes(data.train.tokens).decode() == text[:2_400_000]
    assert bytes(data.valid.tokens).decode() == text[2_400_000:2_700_000]
    assert bytes(data.test.tokens).decode() == text[2_700_000:]


def test_enwik8_is_cut_at_its_standard_places(tmp_path, monkeypatch):
    text = "<page>é\r\n</page>" * 20
    address = tmp_path / "served.zip"
    with zipfile.ZipFile(address, "w") as archive:
        archive.writestr("enwik8", text)
    spec = dataclasses.replace(KNOWN["enwik8"], archive=address.as_uri(), edges=(90, 200))
    local(monkeypatch, "enwik8", spec)
    with pytest.raises(UserError, match=r"enwik8 could not be loaded .* offline"):
        prepare("enwik8", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    data = prepare("enwik8", tmp_path)
    assert data.tokenizer.name == "bytes"
    parts = [bytes(split.tokens) for split in (data.train, data.valid, data.test)]
    assert b"".join(parts) == text.encode()
    assert [len(part) for part in parts[:2]] == [90, 110]
    address.unlink()  # the second time it comes from the cache
    assert bytes(prepare("enwik8", tmp_path, tokenizer="bytes").train.tokens) == parts[0]


def test_columns(tmp_path, monkeypatch):
    def corpus(name, **columns):
        folder = repository(tmp_path / name, train=columns, validation=columns, test=columns)
        local(monkeypatch, "tinystories", HubSet(folder))
        return texts(hub_corpus("tinystories", SPLIT))["train"]

    assert corpus("a", title=["no", "no"], text=["x", "y"]) == ["x", "y"]
    assert corpus("b", id=[1, 2], story=["x", "y"]) == ["x", "y"]
    with pytest.raises(UserError, match=r"columns are id, title, story$"):
        corpus("c", id=[1], title=["no"], story=["x"])
    with pytest.raises(UserError, match=r"columns are id$"):
        corpus("d", id=[1])


def test_other_names_and_configs(tmp_path, monkeypatch):
    calls = []
    real = datasets.load_dataset
    folder = repository(tmp_path / "repo", train=["a", "b"], dev=["c"], test=["d"])

    def load_dataset(name, config):
        calls.append((name, config))
        return real(folder)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert hub_corpus("owner/stories:small", SPLIT).name == "stories"
    assert texts(hub_corpus("owner/stories", SPLIT))["valid"] == ["c"]
    assert calls == [("owner/stories", "small"), ("owner/stories", None)]


def test_no_train_split(tmp_path, monkeypatch):
    folder = repository(tmp_path / "repo", test=["a"])
    local(monkeypatch, "tinystories", HubSet(folder))
    with pytest.raises(UserError, match="no train split; it has test"):
        hub_corpus("tinystories", SPLIT)


def test_two_names_of_one_split_are_asked_about(monkeypatch):
    rows = dict.fromkeys(("train", "valid", "dev"))  # as a loading script may name them
    monkeypatch.setattr(hub, "_load", lambda spec: rows)
    with pytest.raises(UserError, match="valid and dev both name the valid split; which is it"):
        hub_corpus("tinystories", SPLIT)


def test_key_follows_the_content(tmp_path, monkeypatch):
    keys = set()
    for rows in (["a"], ["b"]):
        folder = repository(tmp_path / rows[0], train=rows)
        local(monkeypatch, "tinystories", HubSet(folder))
        keys |= {hub_corpus("tinystories", SPLIT).key for _ in range(2)}
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["wikitext-103", "owner/no-such-set", "imdb:plain"])
def test_offline_is_one_helpful_line(name, tmp_path):
    with pytest.raises(UserError, match="HF_HOME") as error:
        prepare(name, tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_jsonl_repository(tmp_path, monkeypatch):
    folder = tmp_path / "repo"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    local(monkeypatch, "tinystories", HubSet(str(folder)))
    assert texts(hub_corpus("tinystories", SPLIT)) == {
        "train": ["train"],
        "valid": ["validation"],
        "test": ["test"],
    }


def test_what_auto_means():
    defaults = {name: spec.default_tokenizer for name, spec in hub.KNOWN.items()}
    assert defaults == {
        "wikitext-103": "gpt2",
        "wikitext-2": "gpt2",
        "pg19": "sentencepiece:32000",
        "text8": "char",
        "enwik8": "bytes",
        "tinystories": "gpt2",
        "openwebtext": "gpt2",
    }
