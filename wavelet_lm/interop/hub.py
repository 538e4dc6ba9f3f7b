"""Sends a run to the hub of models; `hub_paths.py` fetches what was sent.

What goes there is the run's own files: its config, the best weights, the tokenizer and the metrics,
and a card that says what the model is and how to use it; not where data lies on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wavelet_lm.atomic_files import write_text
from wavelet_lm.config import FIELDS, read_json_object
from wavelet_lm.data.tokenizers import load_tokenizer
from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.hub_paths import FILES, LOG_IN, NAME, SCHEME, first_line
from wavelet_lm.interop.kinds import BEST, check_run_folder
from wavelet_lm.interop.local_paths import without_local_paths
from wavelet_lm.models.checkpoint import Checkpoint, copy_with_config
from wavelet_lm.models.registry import n_params

CARD, CONFIG = "README.md", "config.json"


def push(
    run: str | Path,
    name: str,
    private: bool = False,
    log: Callable[[str], object] = lambda line: None,
) -> str:
    """Send a run folder to `user/name`, which is made where there is none; the address of it there.

    A card that is there already is kept, for it may say more than ours.

    Args:
        run: a run folder with best.safetensors and its tokenizer.
        name: `user/name`.
        private: where the model is made, only for its owner to see.
        log: gets a line for each path of this machine that is another in what is sent.

    Raises:
        UserError: the run or the name cannot be read, or the hub does not take it.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{name}: a model of the hub is named user/name")
    folder = check_run_folder(run)
    checkpoint = Checkpoint(folder / BEST)
    load_tokenizer(folder)
    card = model_card(name, checkpoint, _metrics(folder / "metrics.jsonl"))
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, errors
    except ImportError:
        raise missing_extra("push", "huggingface_hub", "hub") from None
    hub = HfApi(library_name="wavelet-lm")
    with TemporaryDirectory() as copies:
        files = _files(folder, checkpoint, Path(copies), log)
        try:
            hub.create_repo(name, private=private, exist_ok=True)
            added = [CommitOperationAdd(there, file) for there, file in files.items()]
            if not hub.file_exists(name, CARD):
                added.append(CommitOperationAdd(CARD, card.encode()))
            hub.create_commit(name, added, commit_message=f"Run {folder.resolve().name}")
        except errors.HfHubHTTPError as error:
            status = None if error.response is None else error.response.status_code
            words = f"not allowed; {LOG_IN}" if status in (401, 403, 404) else first_line(error)
            raise UserError(f"{SCHEME}{name}: {words}") from None
        except Exception as error:  # of its HTTP client too, which is another in other versions
            raise UserError(f"{SCHEME}{name}: could not be sent ({first_line(error)})") from None
    return f"{hub.endpoint}/{name}"


def _files(
    folder: Path, checkpoint: Checkpoint, copies: Path, log: Callable[[str], object]
) -> dict[str, Path]:
    """What is sent, by its name there; of what names a path of this machine a copy without it."""
    found = sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})
    files = {file.relative_to(folder).as_posix(): file for file in found}
    said: dict[str, Any] = {}
    config = checkpoint.config.to_dict()
    if changed := _changed_by_sharing(config):
        files[BEST] = copy_with_config(checkpoint, copies / BEST, {**config, **changed})
        said |= changed
    if CONFIG in files:
        config = read_json_object(files[CONFIG])
        if changed := _changed_by_sharing(config):
            files[CONFIG] = copies / CONFIG
            write_text(files[CONFIG], json.dumps({**config, **changed}, indent=1) + "\n")
            said |= changed
    for key in sorted(said.keys() & FIELDS.keys()):
        log(f"paths of this machine are not sent: there {key} is {said[key]!r}")
    return files


def _changed_by_sharing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that name paths of this machine, as they are sent."""
    shared = without_local_paths(config)
    return {key: shared[key] for key in config if shared[key] != config[key]}


def model_card(name: str, checkpoint: Checkpoint, rows: list[Mapping[str, Any]]) -> str:
    """The page that a model of the hub begins with.

    Args:
        rows: the run's metrics, of which the last test, else the last validation, is said.
    """
    config = checkpoint.config
    data = Path(config.dataset).name  # of a file on somebody's disk the name alone
    lines = [
        "---",
        "library_name: wavelet-lm",
        "pipeline_tag: text-generation",
        f"tags: [{config.model}]",
        "---",
        "",
        f"# {name.partition('/')[2]}",
        "",
        f"A `{config.model}` of {n_params(checkpoint.without_weights()):,} parameters:"
        f" {config.layers} block{'s' * (config.layers > 1)} of {config.C} channels, trained on"
        f" `{data}` with windows of {config.block_size:,} tokens.",
    ]
    if checkpoint.quantization is not None:
        lines += ["", "Its weights are quantized: it writes and is evaluated, and does not train."]
    if scored := _score(rows):
        lines += ["", scored]
    lines += [
        "",
        "Where WaveletLM is installed, with its extra `hub`:",
        "",
        "```bash",
        f'wavelet-lm generate {SCHEME}{name} --prompt "The "',
        "```",
        "",
    ]
    return "\n".join(lines)


def _score(rows: list[Mapping[str, Any]]) -> str | None:
    """What the last test says, else the last validation; None where nothing was scored in bytes."""
    for row in reversed([row for row in rows if row.get("event") == "test"]):
        found = row.get("sliding", {}).get("bits_per_byte")
        if found is not None:
            return f"{found:.4f} bits per byte on the {row.get('split')} split, sliding windows."
    for row in reversed([row for row in rows if row.get("event") == "eval"]):
        if row.get("bits_per_byte") is not None:
            return f"{row['bits_per_byte']:.4f} bits per byte on the validation split."
    return None


def _metrics(file: Path) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl that can be read."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # torn by a crash
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows
