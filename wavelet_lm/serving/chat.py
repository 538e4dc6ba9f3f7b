"""Messages as a text: a run's chat template, in Jinja as the hub's models have theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.errors import UserError
from wavelet_lm.serving.refused import Refused

TEMPLATE = "chat_template.jinja"


class ChatTemplate:
    """Gets `messages` and `add_generation_prompt`, and may set `stop`, texts that end an answer.

    Args:
        source: the template.
        name: of its file, for messages.

    Raises:
        UserError: it is no template.
    """

    def __init__(self, source: str, name: str = TEMPLATE):
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{name}: no chat template ({error})") from None

    @classmethod
    def of_run(cls, run: Path, file: str | None = None) -> ChatTemplate | None:
        """That of a file, or the one in a run folder or its tokenizer's; None: there is none.

        Raises:
            UserError: it cannot be read, or is none.
        """
        folder = run if run.is_dir() else run.parent
        places = [Path(file)] if file else [folder / TEMPLATE, folder / "tokenizer" / TEMPLATE]
        for place in places:
            if file or place.is_file():
                try:
                    return cls(place.read_text(encoding="utf-8"), str(place))
                except OSError as error:
                    raise unreadable(error, place) from None
                except UnicodeDecodeError:
                    raise UserError(f"{place}: not UTF-8") from None
        return None

    def render(self, messages: Sequence[dict[str, Any]]) -> tuple[str, tuple[str, ...]]:
        """The text that an answer follows, and what ends it.

        Raises:
            Refused: the template refuses these messages.
        """
        from jinja2.exceptions import TemplateError

        try:
            values = {"messages": list(messages), "add_generation_prompt": True}
            module = self._template.make_module(values)
            stop = getattr(module, "stop", ())
        except TemplateError as error:
            raise Refused(400, f"the chat template refuses this: {error}", "messages") from None
        stop = (stop,) if isinstance(stop, str) else stop
        return str(module), tuple(str(text) for text in stop if str(text))


def _refuse(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
