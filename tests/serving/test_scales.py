"""`POST /v1/scope`: the picture that `look` makes, of texts, tokens and saved states."""

import json
import threading

import pytest

from tests.serving.servers import byte_model, make_service, post, served
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.scope.scope import look, picture
from wavelet_lm.serving.options import ServeOptions

TEXT = "def f(x): return x"


@pytest.fixture(scope="module")
def service():
    return make_service(byte_model(delta_memory=True), ByteTokenizer())


@pytest.fixture(scope="module")
def url(service):
    with served(service) as url:
        yield url


def expected(service, tokens, **options):
    made = picture(look(service.decoder.model, tokens, **options), ByteTokenizer(), "RUN")
    return json.loads(json.dumps(made))


def test_a_text_and_its_tokens_give_the_picture(service, url):
    tokens = list(TEXT.encode())
    whole = post(url, "/v1/scope", {"text": TEXT})
    assert whole.status_code == 200
    assert whole.json() == expected(service, tokens)
    end = post(url, "/v1/scope", {"tokens": tokens, "last": 5, "ablate": True}).json()
    assert end == expected(service, tokens, last=5, ablate=True)
    assert end["n_before"] == len(tokens) - 5
    assert isinstance(end["blocks"][0]["scales"][0]["change"], float)


def test_of_a_saved_state_the_end_of_its_text_comes_first(service, url):
    post(url, "/v1/states", {"text": TEXT, "name": "kept"})
    found = post(url, "/v1/scope", {"state": "kept", "text": "+1"}).json()
    assert found == expected(service, list((TEXT + "+1").encode()))
    assert post(url, "/v1/scope", {"state": "kept"}).json()["ids"] == list(TEXT.encode())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "a picture is made of a text, tokens, or a saved state; give one"),
        ({"text": "a"}, "the text has 1 tokens; give 2 or more"),
        ({"text": 3}, "text is 3; it must be a text"),
        ({"text": "ab", "tokens": [1]}, "text and tokens both give the text; use one"),
        ({"tokens": [1, 2.5]}, "it must be a list of whole numbers"),
        ({"tokens": [1, 256]}, "a token that is none of 0 … 255"),
        ({"text": "ab", "last": 0}, "last is 0; it must be between 1 and 2048"),
        ({"text": "ab", "ablate": 1}, "ablate is 1; it must be true or false"),
        ({"text": "ab", "state": "../a"}, "state is '../a'; it must be"),
        ({"text": "a" * 8193}, "the text has 8,193 tokens; pictures are of up to 8,192"),
        ({"text": "ab", "lasst": 3}, "there is no field 'lasst'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(url, body, words):
    answer = post(url, "/v1/scope", body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_an_unknown_state_is_not_found(url):
    assert post(url, "/v1/scope", {"state": "nobody"}).status_code == 404


def test_a_model_without_scales_says_so():
    gpt = byte_model(model="gpt", heads=2, head_hidden=0)
    with served(make_service(gpt, ByteTokenizer())) as url:
        answer = post(url, "/v1/scope", {"text": "ab"})
    assert answer.status_code == 400
    assert "a gpt has no scales to look at" in answer.json()["error"]["message"]


def test_who_looks_changes_nothing_that_is_written_meanwhile(url):
    """Texts are what they are alone, though pictures of the same model are made beside them."""
    asked = {"prompt": TEXT, "max_tokens": 60, "seed": 1, "return_token_ids": True}
    alone = post(url, "/v1/completions", asked).json()["choices"][0]["token_ids"]
    pictures = []
    threads = [
        threading.Thread(
            target=lambda: pictures.append(
                post(url, "/v1/scope", {"text": TEXT, "ablate": True}).json()
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    beside = post(url, "/v1/completions", asked).json()["choices"][0]["token_ids"]
    for thread in threads:
        thread.join()
    assert beside == alone
    assert all(one == pictures[0] for one in pictures)


def test_pictures_are_locked_by_the_key_too():
    service = make_service(byte_model(), ByteTokenizer(), ServeOptions(max_tokens=20))
    with served(service, key="sesame") as url:
        assert post(url, "/v1/scope", {"text": "ab"}).status_code == 401
        headers = {"authorization": "Bearer sesame"}
        assert post(url, "/v1/scope", {"text": "ab"}, headers=headers).status_code == 200
