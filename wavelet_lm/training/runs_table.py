"""`runs.md`: one row per finished run."""

from pathlib import Path

from wavelet_lm.files import as_user_error, write_text

COLUMNS = (
    "date",
    "name",
    "data",
    "parameters",
    "key settings",
    "split",
    "bits/byte",
    "perplexity/word",
    "tokens/s",
    "peak memory",
    "hours",
    "command",
)
HEADER = f"""# Runs

One row per finished run, written by `train.py`. Bits per byte and word perplexity are those of
sliding windows (stride block_size / 2) over the whole split; word perplexity only where a
canonical word count exists. Tokens/s is training alone, without evaluation.

| {" | ".join(COLUMNS)} |
|{" --- |" * len(COLUMNS)}
"""


def append_run(path: str | Path, row: dict[str, str]) -> None:
    """Add a row (a value per column, missing ones are left empty); creates the table.

    Safe when several runs end together: a lock file beside the table orders them.
    """
    from filelock import FileLock

    path = Path(path).expanduser()
    cells = [row.get(column, "").replace("|", "\\|").replace("\n", " ") for column in COLUMNS]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            text = path.read_text(encoding="utf-8") if path.is_file() else HEADER
            write_text(path, text.rstrip("\n") + "\n| " + " | ".join(cells) + " |\n")
    except OSError as error:
        raise as_user_error(error, path) from error
