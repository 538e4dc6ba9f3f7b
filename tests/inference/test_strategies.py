"""Every pair of the table in docs/generation.md, typed; and the published command line."""

import itertools
import json
import re
from pathlib import Path

import pytest

from tests.cli.test_generate import error_line, generate, make_run, text_of
from wavelet_lm.inference.text.spacing import clean_spacing

PAGE = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
# What each row of the table stands for, as it is typed.
TYPED = {
    "temperature 0": "--temperature 0",
    "cuts": "--top_k 5 --top_p 0.9 --repetition_penalty 1.2",
    "entropy_adaptive": "--entropy_adaptive",
    "lookahead_k": "--lookahead_k 2 --lookahead_depth 2",
    "best_of_n": "--best_of_n 2",
    "wavelet_coherence": "--wavelet_coherence",
    "fwpkm_inference_updates": "--fwpkm_inference_updates",
    "clean_spacing": "--clean_spacing",
    "strategies": "--strategies",
    "draft": "--draft DRAFT",
    "n": "--n 2",
    "prompts": "--prompts PROMPTS",
    "interactive": "--interactive",
    "context recompute": "--context recompute:8",
    "ptq8": "--ptq8",
}


def read_table():
    """{(row, column): "yes" or the reason why not}, as the page says."""
    rows = re.findall(r"^\| (\d+) `?(?:--)?([^`|]+)`? \|(.+)\|$", PAGE, re.MULTILINE)
    names = {number: name.strip() for number, name, _ in rows}
    reasons = dict(re.findall(r"^- \((\w)\) (.+?)(?=\n- \(|\n\n)", PAGE, re.MULTILINE | re.DOTALL))
    table = {}
    for (_, name, cells), column in itertools.product(rows, names):
        cell = cells.split("|")[int(column) - 1].strip()
        reason = re.fullmatch(r"no \((\w)\)", cell)
        table[name.strip(), names[column]] = reasons[reason[1]] if reason else cell
    return table


TABLE = read_table()
PAIRS = list(itertools.combinations(TYPED, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, a draft for it and a file of prompts."""
    place = tmp_path_factory.mktemp("strategies")
    make_run(place / "run")
    make_run(place / "draft", seed=1)
    (place / "prompts.txt").write_text("bad\nhé\n", encoding="utf-8")
    return place


def typed(place, *parts):
    words = " ".join(("--checkpoint RUN", *parts)).split()
    named = {"RUN": "run", "DRAFT": "draft", "PROMPTS": "prompts.txt"}
    return [str(place / named[word]) if word in named else word for word in words]


def test_the_table_has_every_pair():
    assert {name for pair in TABLE for name in pair} == TYPED.keys()
    for one, other in PAIRS:
        assert TABLE[one, other] == TABLE[other, one]
    assert all(TABLE[name, name] == "" for name in TYPED)


@pytest.mark.parametrize("first", list(TYPED)[:-1])
def test_every_pair_of_the_table_is_as_it_says(place, first):
    for other in list(TYPED)[list(TYPED).index(first) + 1 :]:
        arguments = typed(place, TYPED[first], TYPED[other], "--num_tokens 4")
        expected = TABLE[first, other]
        if expected == "yes":
            done = generate(*arguments, stdin=b"bad\n\n")
            assert done.returncode == 0, (other, done.stderr)
            assert done.stdout.strip(), other
        else:
            line = error_line(*arguments, stdin=b"bad\n\n")
            assert " ".join(expected.split()) in line, other


PUBLISHED = (
    "--entropy_adaptive --lookahead_k 3 --lookahead_depth 5 --best_of_n 5 --clean_spacing"
    " --wavelet_coherence --num_tokens 20"
)


@pytest.mark.parametrize("extra", ["", "--strategies", "--ptq8", "--strategies --ptq8"])
def test_the_published_command_line_writes_text(place, extra):
    line = f"{PUBLISHED} {extra}"
    done = generate(*typed(place, line))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bad")
    assert "best of 5: seed" in done.stderr
    assert ("distinct-1" in done.stderr) == ("--strategies" in extra)
    assert text_of(*typed(place, line, "--batch_size 2")) == done.stdout
    assert text_of(*typed(place, line, "--seed 2 --n 1")).startswith("bad")

    samples = text_of(*typed(place, line, "--n 3 --json --seed 1")).splitlines()
    texts = [json.loads(sample)["text"] for sample in samples]
    assert f"bad{texts[0]}\n" == done.stdout
    assert len(set(texts)) == 3
    for i, text in enumerate(texts):  # each has five seeds of its own
        assert text_of(*typed(place, line, f"--seed {1 + 5 * i}")) == f"bad{text}\n"
    found = [json.loads(sample)["seed"] for sample in samples]
    assert [(seed - 1) // 5 for seed in found] == [0, 1, 2]


def test_the_seed_that_is_reported_writes_the_text_that_was_kept(place):
    line = PUBLISHED.replace("--best_of_n 5 ", "") + " --json"
    kept = json.loads(text_of(*typed(place, PUBLISHED, "--json --seed 3")))
    again = json.loads(text_of(*typed(place, line, f"--seed {kept['seed']}")))
    assert (again["text"], again["tokens"]) == (kept["text"], kept["tokens"])


def test_spacing_is_cleaned_unasked_only_for_text_that_is_spaced_apart(tmp_path):
    flags = ("--num_tokens", 60, "--temperature", 5, "--strategies", "--json")
    texts = {}
    for dataset in ("wikitext-103", "python-stdlib"):
        run = make_run(tmp_path / dataset, letters="\n (,.abd", dataset=dataset)
        for asked in ("", "--clean_spacing", "--no_clean_spacing"):
            done = json.loads(text_of("--checkpoint", run, *flags, *asked.split()))
            texts[dataset, asked] = done["text"]
    raw, clean = texts["python-stdlib", ""], texts["wikitext-103", ""]
    assert raw != clean == clean_spacing("bad" + raw).removeprefix("bad")
    for dataset in ("wikitext-103", "python-stdlib"):
        assert texts[dataset, "--clean_spacing"] == clean
        assert texts[dataset, "--no_clean_spacing"] == raw
