"""C++ kernels, compiled at first use on the machine that runs them, and kept.

The compiler is the one that `torch.compile` needs on a CPU too: `CXX`, or `c++`, `g++`, `clang++`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from wavelet_lm.user_cache import user_cache

# Sums may be taken in any order, as in a matrix product; infinities and NaN stay what they are.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-funroll-loops",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
)
# For this very processor; a compiler that does not know one of them is asked without.
PROCESSOR_FLAGS = ("-march=native", "-mprefer-vector-width=512")
SECONDS = 120  # that a compiler may take


class CompilationError(Exception):
    """What the compiler said."""


@cache
def library(source: Path, **macros: str | int) -> ctypes.CDLL | None:
    """The shared library of a C++ file, compiled with these macros defined.

    None, with a warning, where there is no compiler or it fails: then the kernel's plain twin has
    to do. What is compiled is kept in the user's cache, under a name that changes with the source,
    the compiler and the processor.
    """
    try:
        return ctypes.CDLL(str(_compiled(source, macros)))
    except (CompilationError, OSError) as error:
        warnings.warn(
            f"{source.name} runs as plain PyTorch, several times slower: {error}", stacklevel=2
        )
        return None


def _compiled(source: Path, macros: dict[str, str | int]) -> Path:
    compiler = _compiler()
    command = [compiler, *FLAGS, *(f"-D{name}={value}" for name, value in macros.items())]
    recipe = "\n".join([source.read_text(encoding="utf-8"), *command, _version(compiler), _cpu()])
    name = f"{source.stem}-{hashlib.sha256(recipe.encode()).hexdigest()[:20]}.so"
    folder = _writable_folder()
    if not (folder / name).is_file():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / name
            _run(command, source, made)
            ctypes.CDLL(str(made))  # what cannot be loaded is not kept
            made.replace(folder / name)  # whole, however many processes do the same
    return folder / name


def _run(command: list[str], source: Path, target: Path) -> None:
    for flags in (PROCESSOR_FLAGS, PROCESSOR_FLAGS[:1], ()):
        try:
            done = subprocess.run(
                [*command, *flags, str(source), "-o", str(target)],
                capture_output=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise CompilationError(f"{command[0]} took over {SECONDS} s") from None
        if done.returncode == 0:
            return
    said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
    raise CompilationError(f"{command[0]} failed with status {done.returncode} ({said[0]})")


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        path = shutil.which(name)
        if path:
            return path
    raise CompilationError("there is no C++ compiler (CXX, c++, g++ or clang++)")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS)
    return done.stdout.decode(errors="replace")


def _cpu() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    parts = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return f"{platform.machine()} {platform.processor()} {sorted(set(parts))}"


@cache
def _writable_folder() -> Path:
    """The cache, or a folder for this process alone where that cannot be written."""
    folder = user_cache() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_temporary().name)


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="wavelet_lm-")
