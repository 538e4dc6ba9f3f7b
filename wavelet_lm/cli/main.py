"""`wavelet-lm COMMAND …`: every command of the project behind one name."""

from __future__ import annotations

from wavelet_lm.environment import start

COMMANDS = {
    "train": "train a model, or a grid of them; go on with a run",
    "generate": "continue a prompt, answer, write in batches",
    "serve": "answer many at once over HTTP, as the OpenAI interface has it",
    "evaluate": "bits per byte and perplexity of a run on its own data",
    "eval": "scores of a run on tasks of lm-evaluation-harness",
    "compare": "train models on the same batches and compare them",
    "lra": "train and judge models on a task of the Long Range Arena",
    "fsd50k": "train and judge models on the sounds of FSD-50K",
    "recall": "what models look up in the text before, and how far back",
    "scope": "draw what each scale sees in a text",
    "runs": "a table of the runs in a folder",
    "report": "one page about runs: curves, configs, samples, scales",
    "quantize": "make a checkpoint with weights of 8, 4 or 2 bits",
    "convert": "make a run folder of a published checkpoint, or of a folder of transformers",
    "push": "send a run to the hub of models",
    "export": "make of a run what other programs read: transformers, ONNX, torch.export",
    "count": "what a config costs, by component",
    "listops": "generate ListOps",
    "completion": "print what makes bash, zsh or fish complete all this",
}


def main() -> None:
    """Run the command that the first argument names, and exit."""
    start()  # before anything that loads PyTorch
    import sys
    from importlib import import_module

    from wavelet_lm.errors import run_command

    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"wavelet-lm {name}", *arguments]
        run_command(import_module(f"wavelet_lm.cli.{name}").main)
    else:
        run_command(lambda: _other(name))


def _other(name: str) -> None:
    from wavelet_lm.cli.flags import version_line
    from wavelet_lm.config import nearest
    from wavelet_lm.errors import UserError

    if name in ("--version", "version"):
        print(version_line())
    elif name in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {words}" for name, words in COMMANDS.items()]
        print("usage: wavelet-lm COMMAND [--help] …", "", *lines, sep="\n")
    else:
        raise UserError(
            f"unknown command {name!r}{nearest(name, COMMANDS)}; wavelet-lm --help lists them"
        )
