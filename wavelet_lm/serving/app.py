"""The HTTP interface: what is asked at which path, and what is answered."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from wavelet_lm.errors import UserError
from wavelet_lm.serving import fields
from wavelet_lm.serving.answers import DONE, Answer, mean_log_prob, sse, token_ids, usage_of
from wavelet_lm.serving.bodies import read_body, read_json, refusal
from wavelet_lm.serving.chat import ChatTemplate
from wavelet_lm.serving.figures import Figures
from wavelet_lm.serving.job import Written
from wavelet_lm.serving.page import page
from wavelet_lm.serving.refused import Refused
from wavelet_lm.serving.scales import Scales
from wavelet_lm.serving.service import Service, Work
from wavelet_lm.serving.streaming import EventStream, unless_left

# The page is all of itself: nothing comes from elsewhere, and no other page frames it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
# Seconds between two events of a stream, for every text that is being written: so that many
# streams together leave the model most of a core, and one is shown token by token.
PACE = 0.0008
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(
    service: Service,
    *,
    key: str | None = None,
    origins: Sequence[str] = (),
    template: ChatTemplate | None = None,
) -> Starlette:
    """The application of a service.

    Args:
        key: what has to be in the Authorization of whoever asks at /v1 or /metrics; None: nothing.
        origins: of other pages that may use the interface.
        template: of messages, where the run has one.
    """
    web = Web(service, key, template)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: service.log(f"{context['message']}: {context.get('exception')!r}")
        )
        try:
            yield
        finally:
            service.stop()
            await asyncio.to_thread(service.close)

    routes = [
        ("/", "GET", web.page, False),
        ("/health", "GET", web.health, False),
        ("/metrics", "GET", web.metrics, True),
        ("/v1/models", "GET", web.models, True),
        ("/v1/models/{name:path}", "GET", web.model, True),
        ("/v1/completions", "POST", web.completions, True),
        ("/v1/chat/completions", "POST", web.chat, True),
        ("/v1/scope", "POST", web.scope, True),
        ("/v1/states", "GET", web.list_states, True),
        ("/v1/states", "POST", web.make_state, True),
        ("/v1/states/{name}", "GET", web.show_state, True),
        ("/v1/states/{name}", "DELETE", web.delete_state, True),
        ("/v1/states/{name}/file", "GET", web.download, True),
        ("/v1/states/{name}/file", "PUT", web.upload, True),
    ]
    cors = [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    ]
    return Starlette(
        routes=[
            Route(path, web.guarded(path, endpoint, locked), methods=[method])
            for path, method, endpoint, locked in routes
        ],
        middleware=cors if origins else [],
        exception_handlers={404: _no_such_path, 405: _no_such_path},
        lifespan=lifespan,
    )


class Web:
    """The endpoints of a service."""

    def __init__(self, service: Service, key: str | None, template: ChatTemplate | None):
        self.service, self.template = service, template
        self._key = None if key is None else key.encode()
        self.figures, self.scales = Figures(service), Scales(service)
        self._created = int(time.time())

    def guarded(self, path: str, endpoint: Endpoint, locked: bool) -> Endpoint:
        """An endpoint whose complaints are answers, and whose requests are counted."""

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            try:
                if locked:
                    self._check_key(request)
                response = await endpoint(request)
            except Refused as refused:
                response = refusal(refused)
            except ClientDisconnect:
                response = Response(status_code=400)
            except Exception as error:  # a defect: it ends this request, and is told
                self.service.log(f"{request.method} {path} failed: {error!r}")
                response = refusal(Refused(500, "the server failed at this; its log says how"))
            self.figures.request(path, response.status_code, time.perf_counter() - started)
            if self.service.limits.log_requests:
                self.service.log(f"{request.method} {path} {response.status_code}")
            return response

        return answer

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        said = request.headers.get("authorization", "")
        scheme, _, key = said.partition(" ")
        matches = hmac.compare_digest(key.strip().encode(), self._key)
        if scheme.lower() != "bearer" or not matches:
            raise Refused(401, "the API key is missing or another; send Authorization: Bearer KEY")

    # --- about the server ------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The page."""
        text = await asyncio.to_thread(page)
        headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
        return HTMLResponse(text, headers=headers)

    async def health(self, request: Request) -> Response:
        """Whether it serves, how fast, and what states take."""
        service, scheduler = self.service, self.service.scheduler
        said = {
            "status": "stopping" if service.stopping else "ok",
            "model": service.name,
            "streams": service.n_streams,
            "max_streams": service.limits.max_streams,
            "reading": scheduler.n_reading,
            "tokens_per_second": round(service.speed(), 2),
            "state_bytes": scheduler.layout.n_bytes,
            "cache": {
                "states": len(scheduler.cache),
                "bytes": scheduler.cache.n_bytes,
                "limit": scheduler.cache.limit,
            },
            "saved_states": len(service.states),
            "vocab_size": service.decoder.vocab_size,
            "end_of_text": service.tokenizer.end_of_text,
            "chat": self.template is not None,
            "limits": {
                "max_prompt": service.limits.max_prompt,
                "max_tokens": service.limits.max_tokens,
                "max_body": service.limits.max_body,
            },
        }
        return JSONResponse(said, 503 if service.stopping else 200)

    async def metrics(self, request: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self.figures.text(), media_type=self.figures.media_type)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The one model, by its name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        name, created = self.service.name, self._created
        return {"id": name, "object": "model", "created": created, "owned_by": "wavelet-lm"}

    def _check_model(self, name: Any) -> None:
        if name is not None and name != self.service.name:
            raise Refused(404, f"there is no model {name!r}; here is {self.service.name}", "model")

    # --- texts -----------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """Texts that follow a prompt."""
        body = await self._json(request)
        asked = fields.completion(body, self.service.config, self.service.limits)
        self._check_model(body.get("model"))
        answer = self._answer("text_completion", asked)
        return await self._texts(request, asked, asked.prompts, (), answer)

    async def chat(self, request: Request) -> Response:
        """Answers to messages."""
        if self.template is None:
            raise Refused(
                404,
                f"{self.service.name} has no chat template, so that nothing says what messages are"
                " to it; use /v1/completions, or serve it with --chat_template FILE",
            )
        body = await self._json(request)
        messages, asked = fields.chat(body, self.service.config, self.service.limits)
        self._check_model(body.get("model"))
        prompt, stop = self.template.render(messages)
        return await self._texts(
            request, asked, [prompt], stop, self._answer("chat.completion", asked)
        )

    def _answer(self, kind: str, asked: fields.Asked) -> Answer:
        tokenizer, figures = self.service.tokenizer, asked.alternatives is not None
        return Answer(kind, self.service.name, tokenizer, figures)

    async def _texts(
        self,
        request: Request,
        asked: fields.Asked,
        prompts: Sequence[str | list[int]],
        stop: Sequence[str],
        answer: Answer,
    ) -> Response:
        if self.service.limits.log_prompts:
            self.service.log(f"prompts: {json.dumps(list(prompts))}")
        context = self.service.writing(asked, prompts, stop)
        work = await context.__aenter__()  # which refuses before anything is answered
        leave = contextlib.AsyncExitStack()
        leave.push_async_exit(context)
        if asked.stream:
            return EventStream(self._events(asked, work, answer), leave)
        async with leave:
            return await unless_left(request, self._whole(asked, work, answer))

    async def _whole(self, asked: fields.Asked, work: Work, answer: Answer) -> Response:
        started, first = time.perf_counter(), True
        async for _, written in work.updates():
            if first and written:
                self.figures.first_token(time.perf_counter() - started)
                first = False
        await self._save(asked, work)
        choices = []
        for number, texts in enumerate(work.written):
            best = sorted(range(len(texts)), key=lambda i: -mean_log_prob(texts[i]))
            kept = best[: asked.n] if asked.best_of > asked.n else range(asked.n)
            for i in kept:
                text = "".join(one.piece for one in texts[i])
                extra = {"seed": work.jobs[number].choices[i].seed}
                if asked.token_ids:
                    extra |= answer.prompt(work.prompts[number])
                    extra["token_ids"] = token_ids(texts[i])
                choices.append(answer.choice(len(choices), text, texts[i], **extra))
        return JSONResponse(answer.body(choices, self._usage(work)))

    async def _events(
        self, asked: fields.Asked, work: Work, answer: Answer
    ) -> AsyncIterator[tuple[bytes, bool]]:
        """What is sent at once, and whether it is the last: sending costs more than an event."""
        started, begun = time.perf_counter(), set()
        parts: list[bytes] = []
        try:
            async for number, written in work.updates(self._pace):
                by_choice: dict[int, list[Written]] = {}
                for one in written:
                    by_choice.setdefault(one.choice, []).append(one)
                for choice, part in by_choice.items():
                    index, extra = number * asked.n + choice, {}
                    if index not in begun:
                        extra["seed"] = work.jobs[number].choices[choice].seed
                    if asked.token_ids:
                        if index not in begun:
                            extra |= answer.prompt(work.prompts[number])
                        extra["token_ids"] = token_ids(part)
                    if not begun:
                        self.figures.first_token(time.perf_counter() - started)
                    if part[-1].reason is not None:
                        await self._save(asked, work)
                    begun.add(index)
                    parts.append(answer.event(index, part, **extra))
                if work.open_jobs and parts:
                    yield b"".join(parts), False
                    parts.clear()
            if asked.usage:
                parts.append(answer.usage_event(self._usage(work)))
            parts.append(DONE)
        except Refused as refused:
            parts.append(sse(refused.body()))
        except Exception as error:  # a defect: it ends this stream, and is told
            self.service.log(f"a stream failed: {error!r}")
            refused = Refused(500, "the server failed at this; its log says how")
            parts.append(sse(refused.body()))
        yield b"".join(parts), True

    def _pace(self) -> float:
        return PACE * self.service.scheduler.n_writing

    async def _save(self, asked: fields.Asked, work: Work) -> None:
        if asked.save_as is not None:
            await self._keep(asked.save_as, work.known())

    async def _keep(self, name: str, known: Any) -> None:
        try:
            await asyncio.to_thread(self.service.states.keep, name, known)
        except UserError as error:
            raise Refused(507, str(error)) from None

    def _usage(self, work: Work) -> dict[str, Any]:
        return usage_of(work.n_prompt, work.n_cached, work.n_written)

    async def scope(self, request: Request) -> Response:
        """What each scale sees in a text."""
        asked = fields.scope(await self._json(request))
        return JSONResponse(await self.scales.picture(asked))

    # --- states ----------------------------------------------------------------------------------

    async def list_states(self, request: Request) -> Response:
        """All saved states."""
        data = [self.service.said(*state) for state in self.service.states.all()]
        return JSONResponse({"object": "list", "data": data})

    async def make_state(self, request: Request) -> Response:
        """A state of a text, or of another state and what follows it."""
        service = self.service
        asked = fields.state(await self._json(request))
        name = asked.name or service.states.new_name()
        service.states.check_room(name)
        start = await service.state(asked.state)
        tokens = await service.tokens(asked.text, start)
        if asked.at is not None:
            if asked.at > len(tokens):
                raise Refused(400, f"at is {asked.at}; the text has {len(tokens)} tokens", "at")
            tokens = tokens[: asked.at]
        known = await service.read(tokens, start) if tokens else start
        await self._keep(name, known)
        return JSONResponse(service.summary(name, known), 201)

    async def show_state(self, request: Request) -> Response:
        """What is known of a state."""
        name = fields.checked_name(request.path_params["name"])
        return JSONResponse(self.service.summary(name, await self.service.state(name)))

    async def delete_state(self, request: Request) -> Response:
        """Forget a state."""
        name = fields.checked_name(request.path_params["name"])
        await asyncio.to_thread(self.service.states.forget, name)
        return JSONResponse({"id": name, "object": "state", "deleted": True})

    async def download(self, request: Request) -> Response:
        """A state as a file."""
        name = fields.checked_name(request.path_params["name"])
        try:
            content = await asyncio.to_thread(self.service.states.file, name)
        except UserError as error:
            raise Refused(409, str(error), "state") from None
        headers = {"content-disposition": f'attachment; filename="{name}.state"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def upload(self, request: Request) -> Response:
        """Keep a file as a state."""
        name = fields.checked_name(request.path_params["name"])
        room = 2 * self.service.scheduler.layout.n_bytes
        content = await read_body(request, max(room, self.service.limits.max_body))
        try:
            await asyncio.to_thread(self.service.states.keep_file, name, content)
        except UserError as error:
            raise Refused(400, str(error), "file") from None
        return JSONResponse(self.service.summary(name, await self.service.state(name)), 201)

    async def _json(self, request: Request) -> Any:
        return await read_json(request, self.service.limits.max_body)


async def _no_such_path(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = f"{request.method} {request.url.path[:200]}"
    return JSONResponse(Refused(status, f"there is no {what}").body(), status)
