"""Docstrings: all that is public has one, tensors have shapes, and examples are true."""

import doctest
import importlib
import importlib.util
import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import wavelet_lm

ROOT = Path(__file__).parents[1]
# What says how large a tensor is: [B, T, C], [...], "of any shape", "0-d".
SHAPE = re.compile(r"\[[^\]]+\]|\bshapes?\b|\b0-d\b")
TENSOR = re.compile(r"\bTensor\b")
NAMED_TENSORS = re.compile(r"(dict|Mapping)\[str, (torch\.)?Tensor\]")  # all of several shapes


def modules() -> Iterator[types.ModuleType]:
    """Every module of the package but those that are there to be run by name."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("wavelet_lm/**/*.py")]
    for name in sorted(".".join(path.parts).removesuffix(".__init__") for path in paths):
        needs_triton = ".triton_" in name and importlib.util.find_spec("triton") is None
        if not name.endswith("__main__") and not needs_triton:
            yield importlib.import_module(name)


def function_of(member: object) -> types.FunctionType | None:
    """The function behind a method of whatever kind, if it is one."""
    if isinstance(member, property):
        member = member.fget
    member = getattr(member, "__func__", getattr(member, "func", member))
    member = inspect.unwrap(member) if callable(member) else member
    return member if isinstance(member, types.FunctionType) else None


def docstring_of_method(cls: type, name: str) -> str | None:
    """Its own, or that of the class or protocol whose method it is.

    A protocol is named in the docstring of a class that follows it: "A `Signal` of tensors".
    """
    module = vars(importlib.import_module(cls.__module__))
    named = [module.get(word) for word in re.findall(r"`(\w+)`", cls.__doc__ or "")]
    protocols = [thing for thing in named if getattr(thing, "_is_protocol", False)]
    for base in (*cls.__mro__, *protocols):
        is_ours = base.__module__.startswith("wavelet_lm")
        # What another library calls is described there; a `forward` only we can describe.
        if name in vars(base) and (is_ours or name != "forward"):
            function = function_of(vars(base)[name])
            if (function is not None and function.__doc__) or not is_ours:
                return getattr(function, "__doc__", None) or f"of {base.__qualname__}"
    return None


def public_members() -> Iterator[tuple[str, object, str | None]]:
    """Every public class, function and method of the package, by name, with its docstring."""
    for module in modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            place = f"{module.__name__}.{name}"
            if not inspect.isclass(thing):
                if function_of(thing) is not None:
                    yield place, function_of(thing), thing.__doc__
                continue
            made_up = (thing.__doc__ or "").startswith(f"{name}(")  # by dataclasses and tuples
            yield place, thing, None if made_up else thing.__doc__
            for member, value in vars(thing).items():
                function = function_of(value)
                is_own = getattr(function, "__qualname__", "") == f"{thing.__qualname__}.{member}"
                if is_own and not member.startswith("_"):
                    yield f"{place}.{member}", function, docstring_of_method(thing, member)


PUBLIC = list(public_members())


def test_the_walk_finds_what_there_is():
    names = {name for name, _, _ in PUBLIC}
    assert len(names) > 700
    assert {
        "wavelet_lm.config.config.Config.from_json",
        "wavelet_lm.inference.engine.generate",
        "wavelet_lm.transforms.haar.HaarWavelet.split",
        "wavelet_lm.transforms.hadamard.HadamardTransform.forward",
        "wavelet_lm.transforms.means.running_mean",
        "wavelet_lm.transforms.wavelet.Wavelet.reach",
    } <= names


def test_every_module_says_what_it_is():
    assert not [module.__name__ for module in modules() if not module.__doc__]


def test_everything_public_has_a_docstring():
    # A command's `main` is described by its module, and that is its help.
    missing = [n for n, _, doc in PUBLIC if not doc and not re.search(r"cli\.\w+\.main$", n)]
    assert not missing, "\n".join(missing)


def with_tensors() -> Iterator[tuple[str, str]]:
    """Every function that takes or returns a tensor, with its docstring."""
    for name, thing, doc in PUBLIC:
        if isinstance(thing, types.FunctionType):
            written = [str(annotation) for annotation in thing.__annotations__.values()]
            if any(TENSOR.search(NAMED_TENSORS.sub("", text)) for text in written):
                yield name, doc or ""


def test_tensors_have_shapes():
    tensors = list(with_tensors())
    assert len(tensors) > 200
    missing = [name for name, doc in tensors if not SHAPE.search(doc)]
    assert not missing, "\n".join(missing)


def test_every_forward_says_what_comes_in_and_what_goes_out():
    forwards = [(name, doc or "") for name, _, doc in PUBLIC if name.endswith(".forward")]
    assert len(forwards) > 20
    bare = [name for name, doc in forwards if not re.search(r"\[[^\]]+\]", doc)]
    assert not bare, "\n".join(bare)


# What is no floating-point tensor wherever it comes in.
WHOLE_NUMBERS = {"idx", "tokens", "targets", "rows", "index", "at", "codes", "seen"}
WITH_DTYPES = re.compile(r"wavelet_lm\.(models|transforms|kernels|fusion|inference|quantization)\.")


def test_tensors_that_are_not_of_floating_point_have_dtypes():
    missing = [
        name
        for name, thing, doc in PUBLIC
        if WITH_DTYPES.match(name) and isinstance(thing, types.FunctionType)
        if any(TENSOR.search(str(thing.__annotations__.get(word, ""))) for word in WHOLE_NUMBERS)
        if not re.search(r"\bu?int(8|32|64)\b|\bbool\b", doc or "")
    ]
    assert not missing, "\n".join(missing)


def examples() -> Iterator[doctest.DocTest]:
    """The `>>>` examples of every docstring; each sees its module, torch and the package."""
    for module in modules():
        names = {**vars(module), "torch": torch, "wavelet_lm": wavelet_lm}
        found = doctest.DocTestFinder(exclude_empty=True).find(module, globs=names)
        yield from (example for example in found if example.examples)


EXAMPLES = {example.name: example for example in examples()}


def test_there_are_examples_where_a_newcomer_looks():
    assert {
        "wavelet_lm.config.config.Config.from_json",
        "wavelet_lm.data.tokenizers.ByteTokenizer",
        "wavelet_lm.data.tokenizers.CharTokenizer",
        "wavelet_lm.evaluation.likelihood.evaluate",
        "wavelet_lm.inference.engine.Engine",
        "wavelet_lm.inference.engine.generate",
        "wavelet_lm.models.registry.build_model",
        "wavelet_lm.transforms.haar.HaarWavelet",
        "wavelet_lm.transforms.hadamard.HadamardTransform",
        "wavelet_lm.transforms.lifting.LiftingWavelet",
        "wavelet_lm.transforms.means.running_mean",
    } <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_true(name, checkout):
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(EXAMPLES[name], out=said.append, clear_globs=False)
    assert not said, "".join(said)
