"""What a request asks for: every field checked, unknown and impossible ones named."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from wavelet_lm.config import Config, nearest
from wavelet_lm.errors import UserError
from wavelet_lm.inference.checks import MAX_SEED, check_integral, check_seed, check_stop
from wavelet_lm.inference.completion import Strategy
from wavelet_lm.inference.declarations import FLAGS, DeclaredOptions
from wavelet_lm.inference.generation_options import GenerationOptions
from wavelet_lm.json_files import brief
from wavelet_lm.scope.scope import MOST_TOKENS, TOKENS
from wavelet_lm.serving.options import ServeOptions
from wavelet_lm.serving.refused import Refused

MAX_STOPS, MAX_ALTERNATIVES = 16, 20
# Options of generation that are fields of a request.
STRATEGY = (
    *("temperature", "top_p", "top_k", "repetition_penalty", "strategies", "entropy_adaptive"),
    *("entropy_temp_min", "entropy_temp_max", "clean_spacing", "ignore_eot"),
)
COMMON = (
    *("model", "max_tokens", "seed", "n", "stop", "stream", "stream_options", "logprobs", "user"),
    *("return_token_ids", "state", "save_state"),
    *STRATEGY,
)
COMPLETION = ("prompt", "best_of", *COMMON)
CHAT = ("messages", "max_completion_tokens", "top_logprobs", *COMMON)
STATE = ("text", "tokens", "at", "state", "name")
SCOPE = ("text", "tokens", "state", "last", "ablate")
# Fields of the interface that say nothing where they have this value, and what to do instead of
# giving them another.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((0,), "use repetition_penalty"),
    "frequency_penalty": ((0,), "use repetition_penalty"),
    "logit_bias": (({},), "leave it out"),
    "echo": ((False,), "leave it out"),
    "suffix": (("",), "leave it out"),
    "response_format": (({"type": "text"},), "answers are text"),
    "tools": (([],), "leave it out"),
    "store": ((False,), "nothing is stored"),
}
# Strategies that need more than a row of a batch.
IMPOSSIBLE = {
    "lookahead_k": "a search forks the batch at every token",
    "lookahead_depth": "a search forks the batch at every token",
    "wavelet_coherence": "it needs the whole prompt at hand, and a state has its end",
    "draft": "a draft writes one text at a time",
    "best_of_n": "the name here is best_of",
    "fwpkm_inference_updates": "memory that learns has no fixed size",
}


@dataclass(frozen=True)
class Asked:
    """What a request for texts asks for, checked.

    Attributes:
        prompts: each a text or tokens; empty for messages.
        strategy: how texts are continued.
        max_tokens: None: as many as the run's config says.
        seed: of the first text; the i-th one takes seed + i.
        n: choices of each prompt; best_of: texts that are written for them.
        alternatives: how many are told with every token; None: not even the token's own figures.
        state, save_as: names of saved states.
    """

    prompts: tuple[str | list[int], ...]
    strategy: Strategy
    max_tokens: int | None
    seed: int
    n: int
    best_of: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    alternatives: int | None
    token_ids: bool
    state: str | None
    save_as: str | None


def checked_fields(body: Any, known: Collection[str]) -> dict[str, Any]:
    """The fields of a request that say something.

    Raises:
        Refused: it is no object, or has a field that is unknown or not served.
    """
    if not isinstance(body, dict):
        raise Refused(400, f"the request is {brief(body)}; it must be an object")
    found = {}
    for name, value in body.items():
        if value is None:
            continue
        if name in known:
            found[name] = value
        elif name in NEUTRAL:
            values, hint = NEUTRAL[name]
            if value not in values:
                raise Refused(400, f"{name} is {brief(value)}, which is not served; {hint}", name)
        elif name in IMPOSSIBLE:
            raise Refused(400, f"{name} is not served: {IMPOSSIBLE[name]}", name)
        else:
            hint = nearest(name, known) or f"; known are {', '.join(known)}"
            raise Refused(400, f"there is no field {brief(name)}{hint}", brief(name).strip("'\""))
    return found


def completion(body: Any, config: Config, limits: ServeOptions) -> Asked:
    """A body of `/v1/completions`.

    Raises:
        Refused: a field cannot be what it is.
    """
    given = checked_fields(body, COMPLETION)
    prompt = given.get("prompt", "")
    if isinstance(prompt, list) and prompt and not all(map(_is_whole, prompt)):
        prompts = tuple(prompt)
    else:
        prompts = (prompt,)
    for one in prompts:
        if not isinstance(one, str) and not (isinstance(one, list) and all(map(_is_whole, one))):
            raise Refused(
                400, f"prompt is {brief(prompt)}; it must be a text, or a list of tokens", "prompt"
            )
    alternatives = None
    if "logprobs" in given:
        alternatives = _whole(given, "logprobs", 0, MAX_ALTERNATIVES, 0)
    n = _whole(given, "n", 1, limits.max_streams, 1)
    best_of = _whole(given, "best_of", 1, limits.max_streams, n)
    return _asked(given, config, limits, prompts, n, best_of, alternatives)


def chat(body: Any, config: Config, limits: ServeOptions) -> tuple[list[dict[str, Any]], Asked]:
    """A body of `/v1/chat/completions`: its messages, and the rest.

    Raises:
        Refused: a field cannot be what it is.
    """
    given = checked_fields(body, CHAT)
    messages = given.get("messages")
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(map(_is_message, messages)):
        raise Refused(
            400,
            f"messages is {brief(messages)}; it must be a list of objects with role and content,"
            " both texts",
            "messages",
        )
    if "max_completion_tokens" in given:
        given.setdefault("max_tokens", given["max_completion_tokens"])
    wants = _flag(given, "logprobs")
    alternatives = _whole(given, "top_logprobs", 0, MAX_ALTERNATIVES, 0)
    if "top_logprobs" in given and not wants:
        raise Refused(400, "top_logprobs is a part of logprobs; give that too", "top_logprobs")
    n = _whole(given, "n", 1, limits.max_streams, 1)
    asked = _asked(given, config, limits, (), n, n, alternatives if wants else None)
    return messages, asked


@dataclass(frozen=True)
class AskedState:
    """What a state is to be made of: a text or tokens, the first `at` of them, after `state`."""

    text: str | list[int]
    at: int | None
    state: str | None
    name: str | None


def state(body: Any) -> AskedState:
    """A body of `POST /v1/states`.

    Raises:
        Refused: a field cannot be what it is.
    """
    given = checked_fields(body, STATE)
    text = _text_or_tokens(given, "a state is made")
    at = _whole(given, "at", 1, MAX_SEED, 1) if "at" in given else None
    return AskedState(text, at, _name(given, "state"), _name(given, "name"))


@dataclass(frozen=True)
class AskedScope:
    """What to look at: the last tokens of a text or of tokens, after the end of `state`'s text.

    Attributes:
        last: how many of them; ablate: whether to silence every scale in turn.
    """

    text: str | list[int]
    state: str | None
    last: int
    ablate: bool


def scope(body: Any) -> AskedScope:
    """A body of `POST /v1/scope`.

    Raises:
        Refused: a field cannot be what it is.
    """
    given = checked_fields(body, SCOPE)
    text = _text_or_tokens(given, "a picture is made")
    last = _whole(given, "last", 1, MOST_TOKENS, TOKENS)
    return AskedScope(text, _name(given, "state"), last, _flag(given, "ablate"))


def _text_or_tokens(given: Mapping[str, Any], what: str) -> str | list[int]:
    text, tokens = given.get("text"), given.get("tokens")
    if text is not None and tokens is not None:
        raise Refused(400, "text and tokens both give the text; use one", "tokens")
    if text is not None and not isinstance(text, str):
        raise Refused(400, f"text is {brief(text)}; it must be a text", "text")
    if tokens is not None and not (isinstance(tokens, list) and all(map(_is_whole, tokens))):
        raise Refused(
            400, f"tokens is {brief(tokens)}; it must be a list of whole numbers", "tokens"
        )
    if text is None and not tokens and "state" not in given:
        raise Refused(400, f"{what} of a text, tokens, or a saved state; give one", "text")
    return text if text is not None else tokens or ""


def _asked(
    given: dict[str, Any],
    config: Config,
    limits: ServeOptions,
    prompts: tuple[str | list[int], ...],
    n: int,
    best_of: int,
    alternatives: int | None,
) -> Asked:
    stream = _flag(given, "stream")
    if best_of < n:
        raise Refused(400, f"best_of is {best_of}; it must be n ({n}) or more", "best_of")
    if best_of % n:
        raise Refused(400, f"best_of is {best_of}; it must be a multiple of n ({n})", "best_of")
    if best_of > n and stream:
        raise Refused(400, "best_of and stream contradict each other: the best is known last")
    n_texts = max(1, len(prompts)) * best_of
    if n_texts > limits.max_streams:
        raise Refused(
            400, f"{n_texts} texts at once are asked for; this server has {limits.max_streams}", "n"
        )
    save_as = _name(given, "save_state")
    if save_as is not None and n_texts > 1:
        raise Refused(400, "save_state is of one text; ask for one choice", "save_state")
    for name in ("model", "user"):
        if not isinstance(given.get(name, ""), str):
            raise Refused(400, f"{name} is {brief(given[name])}; it must be a text", name)
    seed = given.get("seed")
    if seed is None:
        seed = secrets.randbelow(MAX_SEED - n_texts)
    _by_checks("seed", lambda: check_seed(seed))
    _by_checks("seed", lambda: check_seed(seed + n_texts - 1))
    max_tokens = None
    if "max_tokens" in given:
        max_tokens = _whole(given, "max_tokens", 1, limits.max_tokens, 1)
    return Asked(
        prompts=prompts,
        strategy=_strategy(given, config, best_of > n),
        max_tokens=max_tokens,
        seed=seed,
        n=n,
        best_of=best_of,
        stop=_stop(given.get("stop", ())),
        stream=stream,
        usage=_wants_usage(given, stream),
        alternatives=alternatives,
        token_ids=_flag(given, "return_token_ids"),
        state=_name(given, "state"),
        save_as=save_as,
    )


def _strategy(given: Mapping[str, Any], config: Config, several: bool) -> Strategy:
    """How texts are continued, by the checks of the command line."""
    options = {name: given[name] for name in STRATEGY if name in given}
    for name in options:
        if DeclaredOptions.__dataclass_fields__[name].type.startswith("bool"):
            _flag(given, name)
        elif FLAGS[name].choices is None and isinstance(options[name], (str, list, dict)):
            raise Refused(400, f"{name} is {brief(options[name])}; it must be a number", name)
    tries = {"best_of_n": 2} if several else {}
    try:
        return GenerationOptions(checkpoint="", **options, **tries).strategy(config)
    except UserError as error:
        message = str(error).replace("--", "").replace("best_of_n", "best_of")
        named = [name for name in (*options, "best_of") if name in message]
        raise Refused(400, message, named[0] if named else None) from None


def _stop(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    _by_checks("stop", lambda: check_stop(texts))
    if len(texts) > MAX_STOPS:
        raise Refused(400, f"stop has {len(texts)} texts; {MAX_STOPS} are allowed", "stop")
    return texts


def _wants_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise Refused(400, "stream_options is a part of stream; give that too", "stream_options")
    return _flag(checked_fields(options, ("include_usage",)), "include_usage")


def _name(given: Mapping[str, Any], field: str) -> str | None:
    name = given.get(field)
    return None if name is None else checked_name(name, field)


def checked_name(name: Any, field: str = "name") -> str:
    """The name of a saved state, which can be that of a file and nothing else.

    Raises:
        Refused: it is none.
    """
    if not isinstance(name, str) or not is_name(name):
        raise Refused(
            400,
            f"{field} is {brief(name)}; it must be up to 64 letters a-z, digits, '_', '-' or '.',"
            " and begin with a letter or digit",
            field,
        )
    return name


def is_name(name: str) -> bool:
    """Whether a saved state can be called so."""
    plain = name.replace("_", "").replace("-", "").replace(".", "")
    return 0 < len(name) <= 64 and name[0].isalnum() and plain.isalnum() and name.isascii()


def _by_checks(field: str, check: Callable[[], object]) -> None:
    try:
        check()
    except UserError as error:
        raise Refused(400, str(error), field) from None


def _whole(given: Mapping[str, Any], name: str, least: int, most: int, otherwise: int) -> int:
    value = given.get(name, otherwise)
    _by_checks(name, lambda: check_integral(name, value))
    if not least <= value <= most:
        raise Refused(400, f"{name} is {brief(value)}; it must be between {least} and {most}", name)
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refused(400, f"{name} is {brief(value)}; it must be true or false", name)
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
