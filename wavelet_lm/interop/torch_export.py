"""A run's step as a program of torch.export, which PyTorch runs without this project."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.interop.exported_step import Step, check_step, write_description


def export_torch(model: nn.Module, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """Write `out` for `torch.export.load`, and its JSON of names beside it; returns both.

    Raises:
        UserError: the model cannot be exported, or the files cannot be written.
    """
    step = Step(model).eval()
    program = exported(step)
    check_step(step, lambda inputs: program.module()(*inputs))
    with atomic_path(out) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)
    return [out, write_description(out, step, tokenizer)]


def exported(step: Step) -> torch.export.ExportedProgram:
    """The graph of a step: token [1] and leaves -> logits [1, V] and leaves."""
    with torch.no_grad():
        return torch.export.export(step, (torch.zeros(1, dtype=torch.int64), *step.start))
