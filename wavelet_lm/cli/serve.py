"""Serve a run over HTTP, as the OpenAI interface has it: `wavelet-lm serve RUN`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

from wavelet_lm.allocator import KEPT, keep_freed_memory
from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.cli.quantization_flags import add_quantization_flags, quantization_options
from wavelet_lm.config import show
from wavelet_lm.data.tokenizers import load_modality
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import Interrupted, UserError, missing_extra
from wavelet_lm.hub_paths import hub_name
from wavelet_lm.inference.build_engine import open_writer
from wavelet_lm.inference.declarations import FLAGS
from wavelet_lm.inference.generation_options import GenerationOptions
from wavelet_lm.models.checkpoint import find_checkpoint
from wavelet_lm.serving.options import ServeOptions, parse_bytes
from wavelet_lm.threads import use_threads

KEY_VARIABLE = "WAVELET_LM_API_KEY"
BYTES = ("state_cache", "max_body")
EPILOG = f"""\
The API key is read from a file or from the environment's {KEY_VARIABLE}, since a command line can
be seen by others. Without one everybody who reaches the address may write."""


def main() -> None:
    parser = OneLineParser(
        run="run folder, checkpoint file, or hf://user/name",
        description=__doc__,
        epilog=EPILOG,
    )
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    where.add_argument("--port", type=port, default=8000, help="its port; 0: any free one [8000]")
    where.add_argument("--name", help="what the model is called [the run's name]")
    where.add_argument("--api_key_file", metavar="FILE", help="holds what clients have to know")
    where.add_argument(
        "--allow_origin",
        metavar="URL",
        action="append",
        default=[],
        help="another site whose pages may use this; can be repeated [none]",
    )
    add_limit_flags(parser.add_argument_group("how much"))
    kept = parser.add_argument_group("what is kept, and told")
    kept.add_argument("--states", metavar="DIR", help="where saved states last [in memory]")
    kept.add_argument(
        "--chat_template",
        metavar="FILE",
        help="makes a prompt of messages, in Jinja [the run's chat_template.jinja]",
    )
    computed = parser.add_argument_group("how it is computed")
    computed.add_argument(
        "--context", metavar="WHAT", default="stream", help=f"{FLAGS['context'].meaning} [stream]"
    )
    computed.add_argument("--device", default="auto", help=f"{FLAGS['device'].meaning} [auto]")
    computed.add_argument(
        "--dtype",
        choices=FLAGS["dtype"].choices,
        default="auto",
        help=f"{FLAGS['dtype'].meaning} [auto]",
    )
    add_threads_flag(computed)
    add_quantization_flags(parser)
    args = parser.parse_args()
    serve(args)


def port(text: str) -> int:
    """A port's number, 0 for any."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 65535")
    return int(text)


def add_limit_flags(group: argparse._ArgumentGroup) -> None:
    """A flag for every field of `ServeOptions`."""
    for spec in dataclasses.fields(ServeOptions):
        meaning = spec.metadata["option"].meaning
        if spec.type == "bool":
            group.add_argument(f"--{spec.name}", action="store_true", help=meaning)
            continue
        is_bytes = spec.name in BYTES
        default = f"{spec.default // 2**20}MiB" if is_bytes else show(spec.default)
        kind = parse_bytes if is_bytes else {"int": int, "float": float}[spec.type]
        metavar = "BYTES" if is_bytes else {"int": "N", "float": "X"}[spec.type]
        group.add_argument(
            f"--{spec.name}",
            metavar=metavar,
            type=kind,
            default=spec.default,
            help=f"{meaning} [{default}]",
        )


def serve(args: argparse.Namespace) -> None:
    """Open the run and serve it until a signal ends that.

    Raises:
        UserError: the run cannot be read, an option is out of range, the address is taken.
    """
    try:
        from wavelet_lm.serving.app import build_app
        from wavelet_lm.serving.chat import ChatTemplate
        from wavelet_lm.serving.server import listen, run
        from wavelet_lm.serving.service import Service
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client", "httptools", "jinja2"):
            raise
        raise missing_extra("serve", error.name, "serve") from None
    log = functools.partial(print, file=sys.stderr, flush=True)
    names = [spec.name for spec in dataclasses.fields(ServeOptions)]
    limits = ServeOptions(**{name: getattr(args, name) for name in names})
    key = read_key(args.api_key_file)
    checkpoint = find_checkpoint(args.checkpoint)
    modality = load_modality(args.checkpoint)
    if modality is not None:
        raise UserError(
            f"{args.checkpoint}: this run writes {modality.kind} ({modality.name}); only text is"
            " served"
        )
    template = ChatTemplate.of_run(checkpoint, args.chat_template)
    listener = listen(args.host, args.port)
    with listener:
        use_threads(args.threads)
        service_options: dict[str, Any] = {
            "checkpoint": args.checkpoint,
            "context": args.context,
            "dtype": args.dtype,
            "compile": "false",
            "quantization": quantization_options(vars(args)),
            "fwpkm_inference_updates": False,
        }
        options = GenerationOptions(**service_options)
        keep_freed_memory(KEPT)
        writer = open_writer(options, resolve_device(args.device), log)
        name = args.name or hub_name(args.checkpoint) or run_name(checkpoint)
        if writer.model.config.fwpkm_inference_updates:
            log("fast weights rest: memory that learns has no fixed size")
        folder = None if args.states is None else Path(args.states).expanduser()
        service = Service(writer.decoder, writer.model, writer.tokenizer, limits, name, folder, log)
        app = build_app(service, key=key, origins=args.allow_origin, template=template)
        log(
            f"context {args.context}; a state takes {service.scheduler.layout.n_bytes:,} bytes;"
            f" {len(service.states)} saved states"
        )
        try:
            run(app, service, listener, log)
        except (KeyboardInterrupt, Interrupted):
            log("stopped")


def run_name(checkpoint: Path) -> str:
    """What a run is called: by its folder, or by a checkpoint that lies somewhere alone."""
    folder = checkpoint.resolve().parent
    return folder.name if (folder / "config.json").is_file() else checkpoint.stem


def read_key(file: str | None) -> str | None:
    """The API key; None: there is none.

    Raises:
        UserError: the file cannot be read, or the key is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file {file}: cannot be read ({error})") from None
    if not key or not key.isascii():
        raise UserError(f"--api_key_file {file}: its first line must be a key, of plain letters")
    return key
