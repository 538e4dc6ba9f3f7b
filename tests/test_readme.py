"""The README and the figures of the documents: what is typed, counted and drawn is the code's."""

import re
import xml.etree.ElementTree

import pytest
import torch

from tests.test_documents import PAGES, ROOT, blocks
from tests.test_documents import prose as prose_of
from wavelet_lm.config import Config
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.training.memory_estimate import GiB, estimate

QUICK_START = (
    "python -m pip install -c constraints.txt -e ."
    " && python train.py --config configs/quickstart.json"
)
TESTS = 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest -n auto'
SITE = "mkdocs build --strict"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize(
    ("page", "typed"),
    [
        ("README.md", [QUICK_START, TESTS]),
        ("docs/getting-started.md", [QUICK_START]),
        ("CONTRIBUTING.md", [TESTS, SITE]),
    ],
)
def test_the_set_up_commands_are_the_ones_that_ci_types(page, typed):
    shell = [line for text in blocks(page, "bash") for line in text.splitlines()]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    # Quiet or not, pip installs the same.
    lines = [line.strip().replace(" --quiet", "") for line in ci.splitlines()]
    for command in typed:
        assert command in shell
        assert any(line.endswith(command) for line in lines)


def test_every_page_is_in_the_menu_and_in_the_readme():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/index.md":
            assert f": {page.removeprefix('docs/')}\n" in menu, page
            assert f"]({page})" in PAGES["README.md"], page


def test_the_presets_have_these_data_tokenizers_and_parameters():
    row = re.compile(
        r"^\| `(config\S*\.json)` \| `(\S+)` \| `(\S+)` \| ([\d,]+) \| ([\d,]+) \|", re.M
    )
    rows = row.findall(PAGES["docs/getting-started.md"])
    assert len(rows) == 1 + len(list((ROOT / "configs").glob("*.json")))
    for file, dataset, tokenizer, *numbers in rows:
        config = Config.from_json(ROOT / file)
        vocab_size, parameters = (int(number.replace(",", "")) for number in numbers)
        assert config.dataset == dataset
        assert config.tokenizer in (tokenizer, "auto")
        with torch.device("meta"):
            assert n_params(build_model(config, vocab_size)) == parameters, file


def test_the_headline_figures_are_those_of_the_code():
    prose = " ".join(" ".join(map(prose_of, PAGES)).split())
    config = Config.from_json(ROOT / "config.json")
    with torch.device("meta"):
        model = build_model(config, 50257)
    needed = estimate(model, torch.device("cuda")).peak
    assert f"about {needed / GiB:.0f} GiB" in prose
    reach = sum(delay.max_lag for delay in model.wavelets[0].delays)
    assert f"back {reach} positions" in prose
    state = config.layers * (reach * config.padded_channels + config.C)
    assert f"{state:,} numbers" in prose
    tokens, words = 287_644, 245_569
    assert f"{tokens:,} GPT-2 tokens, {tokens / words:.2f} a word" in prose
    assert f"20 per token is one of {20 ** ((tokens - 1) / words):.1f} per word" in prose


def test_the_figure_needs_nothing_from_outside_and_knows_the_dark():
    text = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    root = xml.etree.ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"@import|url\((?!#)|@font-face|<image|<script", text)
    assert [e for e in root.iter() if e.tag.endswith(("}title", "}desc"))]
