"""One step of decoding as a function of tensors alone, for programs that know nothing of this one.

A state has a fixed size, so a step is a fixed graph: a token and the leaves of the state go in, the
logits of the next token and the leaves after it come out. A text starts from leaves of zeros.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from wavelet_lm.atomic_files import write_text
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.models.wavelet_lm.memory import FastWeightMemory

FORMAT = "wavelet_lm.step.1"
TOKEN, LOGITS, NEXT = "token", "logits", "next_"


class Step(nn.Module):
    """(token [1] int64, *leaves) -> (logits [1, V] float32, *leaves after it).

    Args:
        model: in eval mode. Fast weights rest: memory that learns has no fixed size.

    Attributes:
        names: of the leaves, as the state has them, such as `state.0.mean.total`.
        start: the leaves at the start of a text, all zeros.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.float()
        for module in model.modules():
            if isinstance(module, FastWeightMemory):
                module.learns = False
        with torch.no_grad():
            _, state = model(torch.zeros(1, 1, dtype=torch.int64), None)
        leaves, self._tree = tree_flatten_with_path(state)
        self._here = [isinstance(leaf, Tensor) for _, leaf in leaves]  # None is a leaf too
        kept = [(path, leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
        self.names = [".".join(("state", *map(_part, path))) for path, _ in kept]
        self.start = [torch.zeros_like(leaf) for _, leaf in kept]

    def forward(self, token: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        """token [1] int64 and the leaves before it; logits [1, V] and the leaves after it."""
        given = iter(leaves)
        state = tree_unflatten([next(given) if here else None for here in self._here], self._tree)
        logits, state = self.model(token[:, None], state)
        after = [leaf for _, leaf in tree_flatten_with_path(state)[0] if isinstance(leaf, Tensor)]
        # A graph may not hand on what it was given as it is.
        return logits[:, -1], *(leaf.clone() for leaf in after)


def _part(key: Any) -> str:
    """A step of a path into the state: the name of a field, or the number of a part."""
    return str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key))))


def describe(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the inputs and outputs of a step are, JSON-ready.

    `state` has a row for each leaf: the names of its input and output, its shape and dtype; `start`
    is what its leaves are at the start of a text; `longest` is None where any text can be read.
    """
    return {
        "format": FORMAT,
        "token": {"input": TOKEN, "shape": [1], "dtype": "int64"},
        "logits": {"output": LOGITS, "shape": [1, step.model.vocab_size], "dtype": "float32"},
        "state": [
            {
                "input": name,
                "output": NEXT + name,
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype).removeprefix("torch."),
            }
            for name, leaf in zip(step.names, step.start, strict=True)
        ],
        "start": "zeros",
        "longest": getattr(step.model, "longest", None),
        "tokenizer": tokenizer.name,
    }


def write_description(file: Path, step: Step, tokenizer: Tokenizer) -> Path:
    """`describe` as JSON beside an exported file, under its name; returns where."""
    beside = file.with_suffix(".json")
    write_text(beside, json.dumps(describe(step, tokenizer), indent=1) + "\n")
    return beside


def check_step(step: Step, run_one: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
    """Compare what an exported file computes with the step, over a few tokens from the start.

    Args:
        run_one: [token [1], *leaves] -> [logits, *leaves], by the file.

    Raises:
        UserError: the logits differ by more than rounding does.
    """
    ours, theirs = step.start, step.start
    for n in range(CHECKED_TOKENS):
        token = torch.tensor([n * 7 % step.model.vocab_size])
        with torch.no_grad():
            logits, *ours = step(token, *ours)
        found, *theirs = run_one([token, *theirs])
        worst = (found - logits).abs().max().item()
        if not worst <= TOLERANCE * max(1.0, logits.abs().max().item()):
            raise UserError(
                f"the exported step is not the model's: after {n + 1} tokens a logit is off by"
                f" {worst:.2g}; these versions of the libraries cannot be used"
            )


CHECKED_TOKENS, TOLERANCE = 4, 1e-3
