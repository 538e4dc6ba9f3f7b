"""A run's step as an ONNX file, with an example that needs numpy and onnxruntime alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wavelet_lm.atomic_files import atomic_path, write_text
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.interop.exported_step import (
    LOGITS,
    NEXT,
    TOKEN,
    Step,
    check_step,
    write_description,
)
from wavelet_lm.interop.torch_export import exported

if TYPE_CHECKING:
    import onnx
    import onnxruntime

EXAMPLE = Path(__file__).with_name("onnx_example.py")
LARGEST = 2**31  # bytes of a protocol buffer


def export_onnx(model: nn.Module, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """Write `out`, its JSON of names and a program that writes text with both; returns the three.

    Raises:
        UserError: the model cannot be exported, or the files cannot be written.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_extra("export onnx", str(error.name), "onnx") from None
    step = Step(model).eval()
    n_bytes = sum(p.numel() * p.element_size() for p in step.parameters())
    if n_bytes >= LARGEST:
        raise UserError(f"there are {n_bytes / 2**30:.1f} GiB of weights; an ONNX file holds 2")
    graph = onnx_model(step)
    with atomic_path(out) as temporary:
        onnx.save(graph, temporary)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(temporary), options, providers=["CPUExecutionProvider"]
        )
        check_step(step, lambda inputs: run_once(session, inputs))
    beside = out.with_name(f"{out.stem}_generate.py")
    text = EXAMPLE.read_text(encoding="utf-8").replace("model.onnx", out.name)
    write_text(beside, text.replace("model.json", out.with_suffix(".json").name))
    return [out, write_description(out, step, tokenizer), beside]


def onnx_model(step: Step) -> onnx.ModelProto:
    """The graph of a step as an `onnx.ModelProto`, inputs and outputs by the names of its JSON."""
    names = [TOKEN, *step.names], [LOGITS, *(NEXT + name for name in step.names)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries about one another
        program = torch.onnx.export(
            exported(step), dynamo=True, verbose=False, input_names=names[0], output_names=names[1]
        )
    return program.model_proto


def run_once(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]) -> list[Tensor]:
    """[token [1], *leaves] -> [logits [1, V], *leaves], by onnxruntime."""
    names = [given.name for given in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return [torch.from_numpy(value) for value in session.run(None, feed)]
