"""What a request may ask for: all else is refused by a line that names it."""

import pytest

from tests.conftest import tiny_config
from wavelet_lm.errors import UserError
from wavelet_lm.serving import fields
from wavelet_lm.serving.options import ServeOptions, parse_bytes
from wavelet_lm.serving.refused import Refused

CONFIG = tiny_config(temperature=0.7, top_k=5)
LIMITS = ServeOptions(max_streams=8, max_tokens=100)


def asked(**body):
    return fields.completion(body, CONFIG, LIMITS)


def test_what_is_left_out_comes_from_the_run():
    found = asked(prompt="a")
    assert found.strategy.sampling.temperature == 0.7
    assert found.strategy.sampling.top_k == 5
    assert (found.n, found.best_of, found.stop, found.max_tokens) == (1, 1, (), None)
    assert found.prompts == ("a",)
    assert not found.stream
    assert found.alternatives is None
    assert asked().prompts == ("",)
    assert asked(temperature=None, n=None, stop=None, logprobs=None).n == 1
    assert {asked().seed for _ in range(9)} != {asked().seed}


def test_fields_have_the_meaning_of_the_command():
    found = asked(strategies=True, repetition_penalty=1, stop=["x", "y"], logprobs=0, seed=3)
    assert found.strategy.sampling.entropy_adaptive
    assert found.strategy.sampling.top_p == 0.85
    assert found.strategy.sampling.repetition_penalty == 1
    assert (found.stop, found.alternatives, found.seed) == (("x", "y"), 0, 3)
    assert asked(prompt=[1, 2]).prompts == ([1, 2],)
    assert asked(prompt=["a", "b"], n=2).prompts == ("a", "b")
    assert asked(prompt=[[1], [2]]).prompts == ([1], [2])
    assert asked(stream=True, stream_options={"include_usage": True}).usage


NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "echo": False}


def test_fields_of_the_interface_may_say_nothing():
    assert asked(**NEUTRAL, suffix=None, user="someone", model="RUN").n == 1


@pytest.mark.parametrize(
    ("body", "param", "line"),
    [
        ({"temprature": 1}, "temprature", "there is no field 'temprature'; did you mean temp"),
        ({"nothing_like_it": 1}, "nothing_like_it", "known are prompt"),
        ({"presence_penalty": 0.5}, "presence_penalty", "use repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not served"),
        ({"echo": True}, "echo", "not served"),
        ({"lookahead_k": 2}, "lookahead_k", "not served"),
        ({"best_of_n": 2}, "best_of_n", "best_of"),
        ({"temperature": -1}, "temperature", "temperature is -1; it must be"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"temperature": float("nan")}, "temperature", "must be a number"),
        ({"temperature": float("inf")}, "temperature", "temperature is inf; it must be"),
        ({"top_p": 2}, "top_p", "top_p is 2; it must be between"),
        ({"top_p": [1]}, "top_p", "must be a number"),
        ({"top_k": 1.5}, "top_k", "whole number"),
        ({"strategies": 1}, "strategies", "true or false"),
        ({"strategies": True, "temperature": 1, "entropy_adaptive": True}, "temperature", "both"),
        ({"entropy_temp_min": 1}, "entropy_temp_min", "part of entropy_adaptive"),
        ({"n": 0}, "n", "between 1 and 8"),
        ({"n": 9}, "n", "between 1 and 8"),
        ({"n": True}, "n", "whole number"),
        ({"n": 3, "best_of": 2}, "best_of", "must be n"),
        ({"n": 2, "best_of": 3}, "best_of", "multiple"),
        ({"best_of": 2, "temperature": 0}, "temperature", "all samples are one"),
        ({"prompt": ["a"] * 9}, "n", "9 texts at once"),
        ({"best_of": 2, "stream": True}, None, "contradict"),
        ({"max_tokens": 0}, "max_tokens", "between 1 and 100"),
        ({"max_tokens": 101}, "max_tokens", "between 1 and 100"),
        ({"max_tokens": "5"}, "max_tokens", "whole number"),
        ({"max_tokens": 10**400}, "max_tokens", "between 1 and 100"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "seed is"),
        ({"stop": ""}, "stop", "stop is empty"),
        ({"stop": 5}, "stop", "must be texts"),
        ({"stop": {"a": 1}}, "stop", "must be texts"),
        ({"stop": ["a"] * 17}, "stop", "16 are allowed"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "part of stream"),
        ({"stream": True, "stream_options": {"what": 1}}, "what", "there is no field"),
        ({"stream": True, "stream_options": 1}, None, "must be an object"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"logprobs": True}, "logprobs", "whole number"),
        ({"prompt": 5}, "prompt", "must be a text"),
        ({"prompt": {}}, "prompt", "must be a text"),
        ({"prompt": ["a", 5]}, "prompt", "must be a text"),
        ({"prompt": [1, True]}, "prompt", "must be a text"),
        ({"prompt": [[1, "a"]]}, "prompt", "must be a text"),
        ({"model": 5}, "model", "must be a text"),
        ({"user": 5}, "user", "must be a text"),
        ({"state": "../x"}, "state", "up to 64 letters"),
        ({"state": ""}, "state", "up to 64 letters"),
        ({"state": 5}, "state", "up to 64 letters"),
        ({"save_state": "x", "n": 2}, "save_state", "one choice"),
        ([], None, "must be an object"),
        ("text", None, "must be an object"),
        (None, None, "must be an object"),
    ],
    ids=str,
)
def test_all_else_is_named(body, param, line):
    with pytest.raises(Refused, match=line) as refused:
        fields.completion(body, CONFIG, LIMITS)
    assert refused.value.status == 400
    assert refused.value.body()["error"]["param"] == param
    assert "--" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "a\\b", "-a", "a\0", "é", "a b", "a" * 65, "a\n", "~", "%2e%2e", ""]
)
def test_names_of_states_are_names_of_files_and_nothing_else(name):
    assert not fields.is_name(name)
    with pytest.raises(Refused):
        fields.state({"text": "a", "name": name})


@pytest.mark.parametrize("name", ["a", "A-1_b.state", "0" * 64, "a..b"])
def test_plain_names_are_names(name):
    assert fields.checked_name(name) == name


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": 5},
        {"text": "a", "tokens": [1]},
        {"tokens": "a"},
        {"tokens": []},
        {"text": "a", "at": 0},
        {"text": "a", "at": "1"},
        {"text": "a", "what": 1},
    ],
)
def test_states_are_made_of_something(body):
    with pytest.raises(Refused):
        fields.state(body)
    assert fields.state({"state": "a"}).text == ""
    assert fields.state({"tokens": [1, 2], "at": 1}) == fields.AskedState([1, 2], 1, None, None)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": ["hi"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"messages": [{"role": 1, "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2},
        {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json"}},
    ],
)
def test_messages_are_checked(body):
    with pytest.raises(Refused):
        fields.chat(body, CONFIG, LIMITS)


def test_numbers_of_bytes():
    assert parse_bytes("256MiB") == 256 * 2**20
    assert [parse_bytes(text) for text in ("1", "2kb", "0.5GiB", "3B")] == [1, 2000, 2**29, 3]
    for text in ("", "MiB", "many", "1TB", "nanMiB", "infGB", "1e999"):
        with pytest.raises(UserError, match="no number of bytes"):
            parse_bytes(text)
    with pytest.raises(UserError, match="state_cache"):
        ServeOptions(state_cache=-1)
