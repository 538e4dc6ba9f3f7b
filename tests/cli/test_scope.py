"""`wavelet-lm scope RUN` as it is typed."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.cli.test_evaluate import make_run
from wavelet_lm import UserError
from wavelet_lm.cli import scope
from wavelet_lm.scope.page import page_of

ROOT = Path(__file__).parents[2]
EVERYTHING = {
    "delta_memory": True,
    "pkm_enabled": True,
    "pkm_num_keys": 16,
    "pkm_top_k": 2,
    "layers": 2,
}


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process, and gives what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scope", *map(str, arguments)])
        scope.main()
        return capsys.readouterr().out

    return run


def test_the_table_and_the_numbers_are_of_one_reading(command, tmp_path):
    run, file = make_run(tmp_path, **EVERYTHING), tmp_path / "scope.json"
    out = command(run, "--prompt", "pack my box", "--ablate", "--json", file)
    picture = json.loads(file.read_text(encoding="utf-8"))
    assert picture["format"] == "wavelet-lm scope 1"
    assert picture["tokens"] == list("pack my box")
    assert picture["bits"] == [None] + [8.0] * 10
    assert "11 tokens, 8.0000 bits/byte" in out
    head, *rows = out.splitlines()[1:]
    assert head.split("  ")[-1] == "silenced, bits/byte"
    scales = [scale for block in picture["blocks"] for scale in block["scales"]]
    assert len(rows) == len(scales) == 6
    for row, scale in zip(rows, scales, strict=True):
        assert scale["change"] == 0  # whatever it reads, the head makes nothing of it
        name, _, reach, share, openness, change = row.split()[2:]
        assert (name, int(reach), float(change)) == (scale["name"], scale["reach"], 0)
        assert float(share) == pytest.approx(100 * scale["share"], abs=0.051)
        assert float(openness) == pytest.approx(100 * sum(scale["openness"]) / 11, abs=0.1)
    for block in picture["blocks"]:
        assert [len(head["reads"]) for head in block["recall"]["heads"]] == [11] * 4
        assert block["recall"]["heads"][0]["reads"][0] == [[0, 1.0]]  # the first finds itself
        assert [slots["name"] for slots in block["slots"]] == ["PKM"]


def test_the_end_of_a_file_is_drawn(command, tmp_path):
    run, text = make_run(tmp_path), tmp_path / "text.txt"
    file = tmp_path / "scope.json"
    out = command(run, "--text", text, "--tokens", 7, "--json", file)
    whole = text.read_bytes()
    assert f"7 tokens after {len(whole) - 7:,} others" in out
    assert "silenced" not in out
    picture = json.loads(file.read_text(encoding="utf-8"))
    assert (picture["n_before"], picture["ids"]) == (len(whole) - 7, list(whole[-7:]))
    assert picture["bits"] == [8.0] * 7


@pytest.mark.parametrize("ablate", [[], ["--ablate"]])
def test_an_image_is_drawn(command, tmp_path, ablate):
    pytest.importorskip("matplotlib")
    run, image = make_run(tmp_path, **EVERYTHING), tmp_path / "scope.png"
    command(run, "--prompt", "five $dozen$ jugs\n — été", "--out", image, *ablate)
    assert image.read_bytes().startswith(b"\x89PNG")


class Elements(HTMLParser):
    """What a document consists of, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.fetched, self._kind = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "script":
            self._kind = dict(attrs).get("type", "")
            self.scripts.append((self._kind, ""))

    def handle_endtag(self, tag):
        self._kind = None if tag == "script" else self._kind

    def handle_data(self, data):
        if self._kind is not None:
            self.scripts[-1] = (self._kind, self.scripts[-1][1] + data)


def test_the_page_is_one_file_and_holds_the_picture(command, tmp_path):
    run, page, file = make_run(tmp_path, **EVERYTHING), tmp_path / "a.html", tmp_path / "a.json"
    nasty = "</script><b>&amp;<!-- \u2028 ]]>"
    command(run, "--prompt", nasty, "--out", page, "--json", file)
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert elements.fetched == []
    assert not re.search(r"@import|url\(|@font-face|fetch\(|import\(", text)
    urls = set(re.findall(r"https?://[^\s\"']+", text))
    assert urls == {"http://www.w3.org/2000/svg"}  # the name of a namespace
    (kind, data), (_, script) = elements.scripts
    assert kind == "application/json"
    assert json.loads(data) == json.loads(file.read_text(encoding="utf-8"))
    assert "drawScope(" in script
    assert "prefers-color-scheme: dark" in text


def test_a_title_is_no_markup():
    assert "<title>Scales of a&lt;b</title>" in page_of({"run": "a<b", "blocks": []})


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], r"which text\? give --prompt TEXT or --text FILE"),
        (["--prompt", "a b", "--text", "x"], "one of the two"),
        (["--prompt", "a"], "the text has 1 tokens; give 2 or more"),
        (["--text", "missing.txt"], "missing.txt: cannot be read"),
        (["--prompt", "a b", "--out", "scope.gif"], r"--out scope.gif: the name must end in .html"),
        (["--prompt", "a b", "--tokens", "0"], "'0' is not 1 or more"),
        (["--prompt", "a b", "--tokens", "9999"], "tokens is 9999; it must be between 1 and 2,048"),
        (["--prompt", "a b", "--json", "none/a.json"], "there is no folder none"),
    ],
)
def test_what_is_wrong_is_one_line(command, tmp_path, arguments, line):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=line):
        command(run, *arguments)


def test_an_image_needs_matplotlib(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=r"--out needs matplotlib; install it with .*\[bench\]"):
        command(run, "--prompt", "a b", "--out", tmp_path / "scope.png")
    command(run, "--prompt", "a b", "--out", tmp_path / "scope.html")  # a page does not


def test_a_baseline_has_no_scales(command, tmp_path):
    (tmp_path / "averages").mkdir()
    run = make_run(tmp_path / "averages", model="wavelet_gpt", heads=2, head_hidden=0)
    with pytest.raises(UserError, match="a wavelet_gpt has no scales to look at"):
        command(run, "--prompt", "a b")
    run = make_run(tmp_path, model="gpt", heads=2, head_hidden=0)
    words = [sys.executable, "-m", "wavelet_lm.scope", str(run), "--prompt", "a b"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"wavelet_lm.scope: error: {run}: a gpt has no scales to look at; give a language model"
        " wavelet_lm"
    ]


def test_a_diverged_model_is_refused(command, tmp_path):
    from wavelet_lm.models.checkpoint import load_own_model, save_checkpoint

    run = make_run(tmp_path)
    model = load_own_model(run)
    with torch.no_grad():
        model.final_norm.weight[0] = torch.inf
    save_checkpoint(run / "best.safetensors", model, {})
    with pytest.raises(UserError, match="not finite"):
        command(run, "--prompt", "a b", "--json", tmp_path / "scope.json")
    assert not (tmp_path / "scope.json").exists()
