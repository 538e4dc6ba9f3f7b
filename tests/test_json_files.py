"""JSON that others wrote: values, or one line that says what is wrong and where."""

import json

import pytest

from tests.training.runs import error_line
from wavelet_lm import Config, UserError
from wavelet_lm.data.tokenizers import ByteTokenizer, CharTokenizer, load_modality, load_tokenizer
from wavelet_lm.inference.text.prompts import Prompt, read_prompts
from wavelet_lm.interop.published_config import read_published_config
from wavelet_lm.json_files import MAX_DEPTH, brief, parse_json, read_json
from wavelet_lm.text_files import read_text
from wavelet_lm.training.run_folder import RunFolder

HOSTILE = {
    "deep lists": "[" * 100_000,
    "deep lists that end": "[" * 200 + "]" * 200,
    "deep objects": '{"a": ' * 100_000,
    "digits": '{"lr": ' + "9" * 5000 + "}",
    "digits that are read": '{"lr": ' + "9" * 4000 + "}",
    "cut": '{"layers": 2,',
    "empty": "",
    "list": "[1]",
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.fixture(params=HOSTILE, ids=str)
def hostile(request):
    text = HOSTILE[request.param]
    return text if isinstance(text, bytes) else text.encode()


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 5000
    return str(caught.value)


def test_values(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1, None, "é"]}).encode())
    assert read_json(file) == {"a": [1, None, "é"]}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    assert brief([1, "a"]) == "[1, 'a']"
    assert len(brief("a" * 5000)) < 300


def test_lines_are_counted(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{\n "a": 1,\n}', encoding="utf-8")
    assert f"{file}: line 3 is not JSON" in refusal(read_json, file)
    assert "x: line 7 is not JSON" in refusal(parse_json, "{", "x", 7)
    assert "cannot be read" in refusal(read_json, tmp_path)


def test_config(tmp_path, hostile):
    file = tmp_path / "a.json"
    file.write_bytes(hostile)
    assert str(file) in refusal(Config.from_json, file)
    assert str(file) in refusal(read_published_config, file, [])


def test_the_command(tmp_path):
    for name in ("deep lists", "digits"):
        file = tmp_path / "a.json"
        file.write_text(HOSTILE[name], encoding="utf-8")
        assert str(file) in error_line("--config", file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL"])
def test_prompts(tmp_path, hostile, name):
    file = tmp_path / name
    file.write_bytes(b'{"prompt": "a"}\n' + (hostile or b"{"))
    words = "not UTF-8" if b"\xff" in hostile else "line 2"
    assert f"{file}: {words}" in refusal(read_prompts, str(file))


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.Jsonl"])
def test_prompts_with_a_byte_order_mark(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a\xef\xbb\xbf"}')
    assert read_prompts(str(file)) == [Prompt("a\ufeff")]
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfa\n")
    assert read_prompts(str(file)) == [Prompt("a")]
    assert read_text(str(file)) == "a\n"


def test_tokenizer(tmp_path, hostile):
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.parent.mkdir()
    file.write_bytes(hostile)
    assert str(file) in refusal(load_tokenizer, tmp_path)
    assert load_modality(tmp_path) is None


@pytest.mark.parametrize(
    "details",
    [
        {},
        {"name": 5},
        {"name": None},
        {"name": ["char"]},
        {"name": "char"},
        {"name": "char", "characters": 5},
        {"name": "char", "characters": ["a", "b"]},
        {"name": "char", "characters": "ba"},
        {"name": "char", "characters": "aab"},
        {"name": "char", "characters": "\ud800"},
        {"name": "sentencepiece:100"},
        {"name": "mulaw", "what": 3},
    ],
    ids=str,
)
def test_what_is_in_a_tokenizer_is_checked(tmp_path, details):
    (tmp_path / "tokenizer.json").write_text(json.dumps(details), encoding="utf-8")
    refusal(load_tokenizer, tmp_path)
    load_modality(tmp_path)


def test_tokenizers_come_back(tmp_path):
    for tokenizer in (CharTokenizer.of(["hello"]), ByteTokenizer()):
        tokenizer.save(tmp_path / tokenizer.name)
        assert load_tokenizer(tmp_path / tokenizer.name).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": ' + "9" * 5000 + "}", '{"step": 2'])
def test_a_torn_line_of_metrics_ends_what_is_read(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n', encoding="utf-8")
    assert RunFolder(tmp_path).metrics() == [{"step": 1}]
