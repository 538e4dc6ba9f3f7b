"""What each scale of the served model sees, beside what it writes."""

from __future__ import annotations

import asyncio
from typing import Any

from wavelet_lm.errors import UserError
from wavelet_lm.scope.scope import look, picture
from wavelet_lm.serving.fields import AskedScope
from wavelet_lm.serving.refused import Refused
from wavelet_lm.serving.service import RETRY_AFTER, Service

# Tokens of the longest text that is read for a picture, and pictures that may wait for one another.
LONGEST, MOST_WAITING = 8192, 8


class Scales:
    """Pictures of one service's model, one at a time, so that little is taken from who writes."""

    def __init__(self, service: Service):
        self._service, self._one, self._n_waiting = service, asyncio.Lock(), 0

    async def picture(self, asked: AskedScope) -> dict[str, Any]:
        """`picture` of a text.

        Of a saved state, whose text is not kept, the tokens at its end are read anew.

        Raises:
            Refused: a text that is too long or too short, a model that has no scales, or too many
                who wait.
        """
        service = self._service
        start = await service.state(asked.state)
        tokens = [*(() if start is None else start.last), *await service.tokens(asked.text, start)]
        if len(tokens) > LONGEST:
            raise Refused(
                400,
                f"the text has {len(tokens):,} tokens; pictures are of up to {LONGEST:,}",
                "text",
            )
        if service.stopping or self._n_waiting >= MOST_WAITING:
            raise Refused(503, "too many pictures are waited for", retry_after=RETRY_AFTER)
        self._n_waiting += 1
        try:
            async with self._one:
                return await asyncio.to_thread(self._look, tokens, asked)
        except UserError as error:
            raise Refused(400, str(error)) from None
        finally:
            self._n_waiting -= 1

    def _look(self, tokens: list[int], asked: AskedScope) -> dict[str, Any]:
        service = self._service
        seen = look(service.decoder.model, tokens, last=asked.last, ablate=asked.ablate)
        return picture(seen, service.tokenizer, service.name)
