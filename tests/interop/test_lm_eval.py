"""lm-evaluation-harness on local tasks: its scores are the model's own log-probabilities."""

import json
import math
import os
import random

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval")

from tests.cli.commands import typed
from tests.conftest import perturb, tiny_config
from wavelet_lm import UserError, build_model, load_model
from wavelet_lm.cli.eval import harness_model
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.inference.engine import Engine
from wavelet_lm.models.checkpoint import save_checkpoint

COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
"""
CHOICE = """\
task: here_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """\
task: here_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""
UNTIL = """\
task: here_until
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""
N, N_CHOICES = 2, 200


def documents():
    rng = random.Random(0)
    words = ["fox", "dog", "a", "né", "runs", "over", "lazy"]
    for _ in range(N):
        yield {
            "question": " ".join(rng.choices(words, k=8)),
            "choices": [
                " ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(N_CHOICES)
            ],
            "answer": rng.randrange(N_CHOICES),
        }


@pytest.fixture(scope="module", params=["wavelet_lm", "gpt"])
def folder(request, tmp_path_factory):
    """A run, and a folder of tasks with their data."""
    path = tmp_path_factory.mktemp(request.param)
    config = tiny_config(model=request.param, block_size=64)
    torch.manual_seed(0)
    model = perturb(build_model(config, 256)).eval()
    ByteTokenizer().save(path / "run" / "tokenizer")
    save_checkpoint(path / "run" / "best.safetensors", model, {})
    data = path / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents()), encoding="utf-8")
    (path / "tasks").mkdir()
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        file = path / "tasks" / f"{name}.yaml"
        file.write_text(text + COMMON.format(data=data), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    """What `datasets` makes of the documents is not left in the home of whoever tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


def evaluated(folder, tasks, *more):
    out = folder / "scores.json"
    flags = ("--include_path", folder / "tasks", "--device", "cpu", "--json", out, *more)
    shown = typed("eval", folder / "run", "--tasks", tasks, *flags)
    rows = json.loads(out.read_text())["rows"]
    assert all(row["task"] in shown for row in rows)
    return {(row["task"], row["metric"]): row for row in rows}


def log_prob(model, text, continuation):
    """Σ log p of a continuation's bytes after a text's, read whole by the model itself."""
    tokens = list((text + continuation).encode())[-65:]
    n = len(continuation.encode())
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0][0, -n:].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(tokens[-n:])[:, None]).sum())


def test_scores_are_direct_log_probabilities(folder):
    model, docs = load_model(folder / "run"), list(documents())
    harness = harness_model(Engine.open(folder / "run", "cpu", context="stream"))

    class Request:
        def __init__(self, *args):
            self.args = args

    asked = [Request(doc["question"], " " + c) for doc in docs for c in doc["choices"][:20]]
    found = harness.loglikelihood(asked, disable_tqdm=True)
    for request, (score, greedy) in zip(asked, found, strict=True):
        assert math.isclose(score, log_prob(model, *request.args), abs_tol=1e-4)
        assert not greedy
    likeliest = model(torch.tensor([list(b"fox")]))[0][0, -1].argmax()
    if likeliest < 128:
        (one,) = harness.loglikelihood([Request("fox", chr(likeliest))], disable_tqdm=True)
        assert one[1]


def test_a_context_of_200_choices_is_read_once(folder, monkeypatch):
    engine = Engine.open(folder / "run", "cpu", context="stream")
    decoder, read = engine.decoder, []
    monkeypatch.setattr(Engine, "decoder", decoder)
    prefill = decoder.prefill

    def counted(texts, state=None):
        read.extend(bytes(text).decode() for text in texts)
        return prefill(texts, state)

    monkeypatch.setattr(decoder, "prefill", counted)
    monkeypatch.setattr(Engine, "open", lambda *_, **__: engine)
    rows = evaluated(folder, "here_choice", "--context", "stream")
    if decoder.longest is None:
        assert sorted(read) == sorted(doc["question"] for doc in documents())
    else:  # long answers leave less room for the question, which is read once for each end of it
        assert len(read) < 0.2 * N * N_CHOICES
    row = rows["here_choice", "acc"]
    assert (row["chance"], row["n"]) == (1 / N_CHOICES, N)
    model = load_model(folder / "run")
    right = [
        max(
            range(N_CHOICES),
            key=lambda k, d=doc: log_prob(model, d["question"], f" {d['choices'][k]}"),
        )
        == doc["answer"]
        for doc in documents()
    ]
    assert row["score"] == sum(right) / N
    assert ("here_choice", "acc_norm") in rows


def test_whole_texts_and_written_ones(folder):
    rows = evaluated(folder, "here_rolling,here_until", "--limit", 2, "--context", "stream")
    model, docs = load_model(folder / "run"), list(documents())
    nats = sum(log_prob(model, "\n", doc["question"]) for doc in docs)
    n_bytes = sum(len(doc["question"].encode()) for doc in docs)
    bits = rows["here_rolling", "bits_per_byte"]
    assert math.isclose(bits["score"], -nats / math.log(2) / n_bytes, abs_tol=1e-4)
    assert (bits["chance"], bits["n"]) == (None, 2)
    assert rows["here_until", "exact_match"]["score"] == 0


def test_mistakes_are_one_line(folder):
    def fails(*flags):
        with pytest.raises(UserError) as error:
            typed("eval", folder / "run", "--device", "cpu", *flags)
        return str(error.value)

    tasks = ("--tasks", "here_choice", "--include_path", folder / "tasks")
    assert "there is no such folder" in fails("--tasks", "x", "--include_path", folder / "none")
    assert "limit is 0" in fails(*tasks, "--limit", 0)
    assert "batch_size is 0" in fails(*tasks, "--batch_size", 0)
    assert "names none" in fails("--tasks", ",")
    (folder / "documents.jsonl").rename(folder / "moved.jsonl")
    try:
        assert "cannot be had" in fails(*tasks)
    finally:
        (folder / "moved.jsonl").rename(folder / "documents.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: here_broken\noutput_type: [a\nx: 1\n", "line 3: expected ',' or ']'"),
        ("task: here_broken\ndoc_to_text: {{question}}\n", "line 2: found unhashable key"),
        ("task: here_broken\n\tx: 1\n", "line 2: found character '\\t'"),
    ],
)
def test_a_task_that_does_not_parse_is_not_called_unknown(folder, tmp_path, text, said):
    file = tmp_path / "of_mine.yaml"
    file.write_text(f"process_docs: !function utils.each\n{text}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        typed("eval", folder / "run", "--tasks", "here_broken", "--include_path", tmp_path)
    line = int(said[5]) + 1
    expected = f"{file}, of task 'here_broken', does not parse: line {line}{said[6:]}"
    assert str(error.value).startswith(expected)


def test_nothing_is_said_of_git_outside_a_repository(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    evaluated(folder, "here_rolling")
    assert "fatal" not in capfd.readouterr().err


@pytest.mark.slow
def test_an_unknown_task_is_one_line(folder):
    """Slow, for the harness's own tasks are thousands of files."""
    with pytest.raises(UserError, match="no task 'nothing'"):
        typed("eval", folder / "run", "--device", "cpu", "--tasks", "nothing")
