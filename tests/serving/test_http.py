"""The server over HTTP, by the interface's own client, against texts that are written alone."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest

from tests.inference.fakes import HistoryModel
from tests.inference.writers import Letters, small_model, small_writer, tokens
from tests.serving.servers import make_service, post, served, wait_for
from wavelet_lm import Engine
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.serving.chat import ChatTemplate
from wavelet_lm.serving.options import ServeOptions

LIMITS = ServeOptions(max_streams=16, max_tokens=60, max_prompt=200, max_body=20_000)
HOT = {"temperature": 1.2, "top_p": 0.95}
END = 6  # the letter g


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def url(model):
    with served(make_service(model, Letters(end_of_text=END), LIMITS)) as url:
        yield url


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, Letters(end_of_text=END), context="stream")


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_client_finds_the_model(client):
    assert [model.id for model in client.models.list()] == ["RUN"]
    assert client.models.retrieve("RUN").owned_by == "wavelet-lm"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="a")


@pytest.mark.parametrize("stop", [None, "e", ["a.", "f"]])
def test_texts_are_those_of_the_engine(client, engine, stop):
    for seed in range(2):
        done = client.completions.create(
            model="RUN", prompt="bad cab", max_tokens=20, seed=seed, stop=stop, **HOT
        )
        (expected,) = engine.completions(["bad cab"], 20, seed=seed, stop=stop or (), **HOT)
        (choice,) = done.choices
        assert choice.text == expected.text
        reason = "length" if expected.reason == "length" else "stop"
        assert choice.finish_reason == reason
        n = len(expected.tokens) + (expected.reason == "end_of_text")
        assert done.usage.prompt_tokens == 7
        assert done.usage.completion_tokens == n
        assert done.usage.total_tokens == 7 + n


def test_a_stream_is_the_text_in_pieces(client, engine):
    stream = client.completions.create(
        model="RUN",
        prompt="bad",
        max_tokens=20,
        seed=1,
        stream=True,
        n=2,
        stream_options={"include_usage": True},
        extra_body={"ignore_eot": True},
        **HOT,
    )
    texts, usage, n_events = ["", ""], None, 0
    for event in stream:
        n_events += 1
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
    expected = engine.completions(["bad"] * 2, 20, seed=[1, 2], ignore_eot=True, **HOT)
    assert texts == [one.text for one in expected]
    assert usage.completion_tokens == 40
    assert n_events > 4


def test_choices_take_the_seeds_that_follow_and_the_best_is_the_likeliest(client, engine):
    alone = engine.completions(["bad"] * 6, 9, seed=[*range(5, 11)], ignore_eot=True, **HOT)
    ask = {"model": "RUN", "max_tokens": 9, "seed": 5, "extra_body": {"ignore_eot": True}, **HOT}
    done = client.completions.create(prompt="bad", n=3, **ask)
    assert [choice.text for choice in done.choices] == [one.text for one in alone[:3]]
    assert [choice.seed for choice in done.choices] == [5, 6, 7]
    (best,) = client.completions.create(prompt="bad", best_of=6, **ask).choices
    assert best.text == max(alone, key=lambda one: one.mean_log_prob).text
    done = client.completions.create(prompt=["bad", "bad", "cab"], n=2, **ask)
    assert [choice.text for choice in done.choices[:4]] == [one.text for one in alone[:4]]
    assert [choice.index for choice in done.choices] == [*range(6)]


def test_strategies_are_those_of_the_engine(client, engine):
    options = {"strategies": True, "top_k": 5, "ignore_eot": True}
    done = client.completions.create(
        model="RUN", prompt="bad", max_tokens=9, seed=5, extra_body=options
    )
    assert done.choices[0].text == engine.generate("bad", 9, seed=5, **options)


def test_figures_of_tokens_are_the_models_own(client, url, model):
    done = client.completions.create(
        model="RUN",
        prompt="bad",
        max_tokens=6,
        seed=3,
        logprobs=4,
        extra_body={"ignore_eot": True, "return_token_ids": True},
        **HOT,
    )
    (choice,) = done.choices
    figures, decoder = choice.logprobs, Decoder(model, adapt=False)
    assert choice.prompt_token_ids == tokens("bad")
    assert choice.token_ids == figures.token_ids
    assert "".join(figures.tokens) == choice.text
    assert figures.text_offset == [len("".join(figures.tokens[:i])) for i in range(6)]
    text = tokens("bad")
    for i, token in enumerate(figures.token_ids):
        log_probs = decoder.prefill([text])[0][0].log_softmax(-1)
        assert figures.token_logprobs[i] == pytest.approx(float(log_probs[token]))
        entropy = -float((log_probs.exp() * log_probs).sum())
        assert figures.entropy[i] == pytest.approx(entropy, rel=1e-4)
        best = log_probs.topk(4)
        assert [one["id"] for one in figures.top[i]] == best.indices.tolist()
        assert [one["logprob"] for one in figures.top[i]] == pytest.approx(best.values.tolist())
        assert figures.top_logprobs[i] == {one["token"]: one["logprob"] for one in figures.top[i]}
        text.append(token)
    body = {"prompt": "bad", "seed": 3, "max_tokens": 6, "logprobs": 4, "ignore_eot": True, **HOT}
    found = {"tokens": [], "entropy": [], "text_offset": []}
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])["choices"][0]["logprobs"]
                for name, values in found.items():
                    values.extend(event[name])
    assert found == {name: getattr(figures, name) for name in found}


def test_a_prompt_is_not_read_twice(client, engine):
    prompt = "fed a bead. " * 9
    ask = {"model": "RUN", "max_tokens": 8, "extra_body": {"ignore_eot": True}, **HOT}
    first = client.completions.create(prompt=prompt, seed=1, **ask)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    for seed in (1, 2):
        again = client.completions.create(prompt=prompt, seed=seed, **ask)
        assert again.usage.prompt_tokens_details.cached_tokens == len(prompt)
        expected = engine.generate(prompt, 8, seed=seed, ignore_eot=True, **HOT)
        assert again.choices[0].text == expected
    more = prompt + first.choices[0].text + "bead"
    third = client.completions.create(prompt=tokens(more), seed=5, **ask)
    assert third.usage.prompt_tokens_details.cached_tokens == len(prompt) + 7
    assert third.choices[0].text == engine.generate(more, 8, seed=5, ignore_eot=True, **HOT)


def test_what_cannot_be_is_named(client, url):
    with pytest.raises(openai.BadRequestError, match="there is no field 'temprature'"):
        client.completions.create(model="RUN", prompt="a", extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="top_p is 2") as refused:
        client.completions.create(model="RUN", prompt="a", top_p=2)
    assert refused.value.param == "top_p"
    for body, line in (
        ({"prompt": "xyz"}, "not in the vocabulary"),
        ({"prompt": [10]}, "none of 0 … 9"),
        ({"prompt": [-1]}, "none of 0 … 9"),
        ({"prompt": "a" * 201}, "up to 200"),
        ({"state": "nobody"}, "there is no state"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
    ):
        response = post(url, "/v1/completions", body)
        assert response.status_code in (400, 404)
        assert line in response.json()["error"]["message"]
    response = post(url, "/v1/chat/completions", {})
    assert response.status_code == 404
    assert "no chat template" in response.json()["error"]["message"]


def test_states_are_made_forked_downloaded_and_uploaded(client, url, engine, tmp_path, model):
    made = post(url, "/v1/states", {"text": "bad cab", "name": "one"}).json()
    assert (made["id"], made["tokens"], made["tail"]) == ("one", 7, "bad cab")
    assert httpx.get(f"{url}/v1/states/one").json() == made
    fork = post(url, "/v1/states", {"state": "one", "text": " fed"}).json()
    assert (fork["tokens"], fork["bytes"]) == (11, made["bytes"])
    cut = post(url, "/v1/states", {"text": "bad cab fed", "at": 3, "name": "cut"}).json()
    assert (cut["tokens"], cut["tail"]) == (3, "bad")
    names = [one["id"] for one in httpx.get(f"{url}/v1/states").json()["data"]]
    assert {"one", "cut", fork["id"]} <= set(names)

    ask = {"model": "RUN", "max_tokens": 8, "seed": 3, **HOT}
    body = {"ignore_eot": True}
    expected = engine.generate("bad cab fed", 8, seed=3, ignore_eot=True, **HOT)
    for state, prompt in (("one", " fed"), (fork["id"], ""), ("cut", " cab fed")):
        done = client.completions.create(
            prompt=prompt, extra_body={**body, "state": state, "save_state": "after"}, **ask
        )
        assert done.choices[0].text == expected
        assert done.usage.prompt_tokens == 11
        assert done.usage.prompt_tokens_details.cached_tokens >= 11 - len(prompt)
        assert httpx.get(f"{url}/v1/states/after").json()["tail"] == "bad cab fed" + expected

    # The file is that of generate.py, both ways.
    content = httpx.get(f"{url}/v1/states/after/file").content
    (tmp_path / "after.state").write_bytes(content)
    writer = small_writer(model=model)
    reading = writer.load(tmp_path / "after.state")
    assert reading.texts == [tokens("bad cab fed" + expected)]
    writer.save(tmp_path / "back.state", writer.read([tokens(" a")], reading))
    sent = httpx.put(f"{url}/v1/states/sent/file", content=(tmp_path / "back.state").read_bytes())
    assert (sent.status_code, sent.json()["tokens"]) == (201, 11 + 8 + 2)
    done = client.completions.create(prompt="", extra_body={**body, "state": "sent"}, **ask)
    whole = "bad cab fed" + expected + " a"
    assert done.choices[0].text == engine.generate(whole, 8, seed=3, ignore_eot=True, **HOT)

    assert httpx.delete(f"{url}/v1/states/sent").json()["deleted"]
    assert httpx.get(f"{url}/v1/states/sent").status_code == 404
    assert httpx.delete(f"{url}/v1/states/sent").status_code == 404


def test_states_of_others_are_refused(url, tmp_path):
    other = small_writer(model=small_model(5))
    other.save(tmp_path / "other", other.read([tokens("bad")]))
    for content, line in (
        ((tmp_path / "other").read_bytes(), "another model"),
        (b"nothing", "truncated or not a safetensors file"),
        (b"", "truncated or not a safetensors file"),
    ):
        response = httpx.put(f"{url}/v1/states/other/file", content=content)
        assert response.status_code == 400
        assert line in response.json()["error"]["message"]
        assert "tmp" not in response.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/states/other").status_code == 404


def test_states_in_a_folder_survive(tmp_path, model):
    folder = tmp_path / "states"
    with served(make_service(model, folder=folder)) as url:
        post(url, "/v1/states", {"text": "bad cab", "name": "one"})
    assert [file.name for file in folder.iterdir()] == ["one.state"]
    (folder / "broken.state").write_bytes(b"nothing")
    with served(make_service(model, folder=folder)) as url:
        assert httpx.get(f"{url}/v1/states").json()["data"][0]["tokens"] == 7
        assert httpx.get(f"{url}/v1/states/one").json()["tail"] == "bad cab"
        assert httpx.delete(f"{url}/v1/states/one").status_code == 200
    assert [file.name for file in folder.iterdir()] == ["broken.state"]


class Slow(HistoryModel):
    """Waits at every step until it may go on."""

    def __init__(self):
        super().__init__(10)
        self.double()
        self.may_go_on = threading.Event()

    def forward(self, idx, state=None, **options):
        if state is not None:
            self.may_go_on.wait(0.05)
        return super().forward(idx, state, **options)


@pytest.fixture
def slow(request):
    options = getattr(request, "param", {})
    model = Slow()
    limits = ServeOptions(max_streams=2, max_tokens=100_000, **options)
    service = make_service_of_any(model, limits)
    with served(service) as url:
        yield service, url, model
        model.may_go_on.set()


def make_service_of_any(model, limits):
    from tests.conftest import tiny_config
    from wavelet_lm.inference.state_file import ModelRecord
    from wavelet_lm.serving.service import Service

    record = ModelRecord(tiny_config(), 10, "none")
    return Service(Decoder(model), record, Letters(), limits, "RUN")


ENDLESS = {"prompt": "bad", "max_tokens": 100_000, "stream": True}


def test_a_full_server_says_so_and_a_client_that_leaves_frees_its_row(slow):
    service, url, _ = slow
    with httpx.stream("POST", f"{url}/v1/completions", json={**ENDLESS, "n": 2}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        full = post(url, "/v1/completions", {"prompt": "a"})
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) > 0
        assert "full" in full.json()["error"]["message"]
        assert httpx.get(f"{url}/health").json()["streams"] == 2
    wait_for(lambda: service.n_streams == service.scheduler.n_writing == 0)
    assert post(url, "/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
    # So does one that waits for a whole answer.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={**ENDLESS, "stream": False}, timeout=0.3)
    wait_for(lambda: service.n_streams == service.scheduler.n_writing == 0)


def test_long_prompts_that_come_at_once_do_not_overfill_a_server(slow):
    service, url, model = slow
    encode, together = service._encode, threading.Barrier(4)

    def encode_together(text):
        together.wait(20)
        return encode(text)

    service._encode = encode_together
    threading.Timer(0.5, model.may_go_on.set).start()
    body = {"prompt": "a" * 20_000, "max_tokens": 1}
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: post(url, "/v1/completions", body), range(4))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503]


@pytest.mark.parametrize("slow", [{"timeout": 0.3}], indirect=True)
def test_a_text_ends_after_the_longest_time(slow):
    service, url, _ = slow
    done = post(url, "/v1/completions", {**ENDLESS, "stream": False}).json()
    assert done["choices"][0]["finish_reason"] == "timeout"
    assert done["usage"]["completion_tokens"] > 1
    assert service.scheduler.n_writing == 0


def test_streams_end_with_a_reason_when_the_server_ends():
    model, last = Slow(), []
    with served(make_service_of_any(model, ServeOptions(max_tokens=100_000))) as url:
        begun = threading.Event()

        def stream():
            with httpx.stream("POST", f"{url}/v1/completions", json=ENDLESS) as response:
                for line in response.iter_lines():
                    begun.set()
                    last.append(line)

        thread = threading.Thread(target=stream)
        thread.start()
        assert begun.wait(20)
    thread.join(20)
    assert last[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line[6:]) for line in last if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "shutdown"


def test_a_key_is_asked_for(model):
    with served(make_service(model), key="open sesame") as url:
        for headers in ({}, {"authorization": "Bearer open"}, {"authorization": "open sesame"}):
            for path in ("/v1/models", "/metrics", "/v1/states"):
                response = httpx.get(url + path, headers=headers)
                assert response.status_code == 401
                assert "sesame" not in response.text
        assert httpx.get(f"{url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="open sesame")
        assert client.completions.create(model="RUN", prompt="a", max_tokens=1).choices
        assert (
            httpx.get(f"{url}/metrics", headers={"authorization": "Bearer open sesame"}).status_code
            == 200
        )


def test_other_sites_are_let_in_by_name_alone(model):
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with served(make_service(model)) as url:
        response = httpx.get(f"{url}/health", headers=headers)
        assert "access-control-allow-origin" not in response.headers
        assert httpx.options(f"{url}/v1/completions", headers=headers).status_code == 405
    with served(make_service(model), origins=["https://a.example"]) as url:
        response = httpx.options(f"{url}/v1/completions", headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.get(f"{url}/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


CHAT = """\
{%- set stop = ["\\n"] -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ raise_exception("no system") }}{%- endif -%}
{{ message.role[0] }} {{ message.content }}.
{% endfor -%}
{%- if add_generation_prompt -%}a {% endif -%}
"""


def test_messages_are_answered_where_there_is_a_template(model, engine):
    with served(make_service(model), template=ChatTemplate(CHAT)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        messages = [{"role": "add", "content": "bad cab"}, {"role": "bead", "content": "fed"}]
        prompt = "a bad cab.\nb fed.\na "
        ask = {"model": "RUN", "messages": messages, "seed": 4, **HOT}
        plain = Engine(model, Letters(), context="stream")
        expected = plain.generate(prompt, 30, seed=4, stop="\n", **HOT)
        done = client.chat.completions.create(max_completion_tokens=30, **ask)
        assert done.choices[0].message.content == expected
        assert done.usage.prompt_tokens == len(prompt)
        stream = client.chat.completions.create(
            max_tokens=30, stream=True, logprobs=True, top_logprobs=2, **ask
        )
        text, figures = "", []
        for event in stream:
            text += event.choices[0].delta.content
            figures += event.choices[0].logprobs.content
        assert text == expected
        assert [len(one.top_logprobs) for one in figures] == [2] * len(figures)
        assert "".join(one.token for one in figures).startswith(expected)
        with pytest.raises(openai.BadRequestError, match="no system"):
            client.chat.completions.create(
                model="RUN", messages=[{"role": "system", "content": "a"}]
            )


def test_health_and_figures_say_what_goes_on(client, url):
    before = httpx.get(f"{url}/health").json()
    assert (before["status"], before["model"], before["vocab_size"]) == ("ok", "RUN", 10)
    assert before["state_bytes"] > 0
    client.completions.create(model="RUN", prompt="abc", max_tokens=5)
    after = httpx.get(f"{url}/health").json()
    assert after["cache"]["states"] > 0
    figures = httpx.get(f"{url}/metrics").text
    for name in (
        'wavelet_lm_requests_total{path="/v1/completions",status="200"}',
        'wavelet_lm_tokens_total{kind="written"}',
        "wavelet_lm_first_token_seconds_bucket",
        "wavelet_lm_cache_bytes",
    ):
        assert name in figures


def test_lines_are_told_of_requests_and_prompts_only_where_asked(model):
    for options, expected in (
        ({}, []),
        ({"log_requests": True}, ["POST /v1/completions 200"]),
        ({"log_prompts": True}, ['prompts: ["bad cab"]']),
    ):
        lines = []
        service = make_service(model, limits=ServeOptions(**options), log=lines.append)
        with served(service) as url:
            post(url, "/v1/completions?secret=1", {"prompt": "bad cab", "max_tokens": 2})
        assert lines == expected


def test_many_streams_at_once_are_what_they_are_alone(model):
    """Of different lengths, prompts and options, over HTTP."""
    plain = Engine(model, Letters(), context="stream")
    asks = [
        {
            "prompt": "bad cab fed. " * (i % 5) + "a",
            "max_tokens": 1 + 4 * (i % 7),
            "seed": i,
            "temperature": (0, 1.0, 1.3)[i % 3],
            "stream": i % 2 == 0,
        }
        for i in range(20)
    ]
    found = [None] * len(asks)
    limits = ServeOptions(max_streams=64)
    with served(make_service(model, limits=limits)) as url:

        def ask(i):
            body = asks[i]
            if not body["stream"]:
                found[i] = post(url, "/v1/completions", body).json()["choices"][0]["text"]
                return
            text = ""
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
            found[i] = text

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for body, text in zip(asks, found, strict=True):
        n, seed, temperature = body["max_tokens"], body["seed"], body["temperature"]
        assert text == plain.generate(body["prompt"], n, seed=seed, temperature=temperature)
