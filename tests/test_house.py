"""The plan of the house: what stands where, which way imports run, and what each part may load."""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
LAYOUT = re.search(r"```text\n(.*?\nwavelet_lm/\n.*?)```", PAGE, re.DOTALL)[1]
PACKAGES = re.findall(r"^  (\w+)/", LAYOUT, re.MULTILINE)
READ_BY_ALL = "config"  # a package that stands beside the others, and below them
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for pattern in ("*.py", "benchmarks/*.py", "wavelet_lm/**/*.py")
    for path in ROOT.glob(pattern)
}
PACKAGE = [file for file in SOURCES if file.startswith("wavelet_lm/")]

# The libraries of others that a package may import, besides PyTorch and numpy.
LIBRARIES = {
    None: {"huggingface_hub"},  # of the modules beside the packages
    "cli": {"matplotlib", "shtab", "tqdm"},
    "serving": {"jinja2", "prometheus_client", "starlette", "uvicorn"},
    "experiments": {"matplotlib"},
    "report": set(),
    "training": {
        "bitsandbytes",
        "filelock",
        "matplotlib",
        "torchao",
        "tqdm",
        "trackio",
        "wandb",
    },
    "evaluation": set(),
    "scope": set(),
    "inference": {"safetensors"},
    "quantization": {"bitsandbytes", "torchao"},
    "fusion": set(),
    "interop": {
        "datasets",
        "huggingface_hub",
        "jinja2",  # of which the templates of lm-eval are
        "lm_eval",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "safetensors",
        "tokenizers",
        "transformers",
        "yaml",  # in which tasks of lm-eval are written
    },
    "models": {"safetensors"},
    "transforms": {"pywt"},
    "kernels": {"fla", "triton"},
    "data": {
        "datasets",
        "filelock",
        "mido",
        "PIL",
        "sentencepiece",
        "soundfile",
        "soxr",
        "tiktoken",
        "tiktoken_ext",
        "tqdm",
    },
}
LONG = 400  # lines of a file; a longer one says at its top why it is one room


def is_door(source: ast.Module) -> bool:
    """Whether a file, besides a docstring, does nothing but start a command when it is run."""
    body = [node for node in source.body if not isinstance(node, ast.Expr)]
    return len(body) == 1 and ast.unparse(getattr(body[0], "test", body[0])) == MAIN


MAIN = "__name__ == '__main__'"


def imported_by(source: ast.Module) -> set[str]:
    """The modules that a file imports when it is imported or used, and names from them."""
    found = set()
    tests = (MAIN, "TYPE_CHECKING")
    doors = [n for n in source.body if isinstance(n, ast.If) and ast.unparse(n.test) in tests]
    hidden = {inner for door in doors for inner in ast.walk(door)}
    for node in ast.walk(source):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def package_of(file: str) -> str | None:
    """The package that a file is in, None for the modules beside the packages."""
    parts = Path(file).parts
    return parts[1] if len(parts) > 2 else None


def named_in_layout() -> set[str]:
    """Every path on the left, and every module of the package on either side."""
    names: set[str] = set()
    folder = package = ""
    for line in LAYOUT.splitlines():
        left = line[:32].split()
        if line == "wavelet_lm/" or (folder and left and left[0].endswith(".py")):
            folder = "wavelet_lm/"
        elif folder and left and line.startswith("    "):  # a folder in a package
            folder = package + left[0]
        elif folder and left:
            folder = package = "wavelet_lm/" + left[0]
        names |= {folder + name for name in re.findall(r"\w+\.py", line)} if folder else set(left)
    return names


def test_the_page_names_every_module_and_nothing_else():
    named = named_in_layout()
    assert not [name for name in named if not (ROOT / name).exists()]
    modules = {file for file in PACKAGE if not Path(file).name.startswith("__")}
    assert {name for name in named if name.startswith("wavelet_lm/")} == modules


def test_imports_run_downwards():
    """A module imports its own package, those below it, and the modules beside the packages."""
    assert set(PACKAGES) == {p.parent.name for p in (ROOT / "wavelet_lm").glob("*/__init__.py")}
    for file in PACKAGE:
        package = package_of(file)
        rank = PACKAGES.index(package) if package else len(PACKAGES)
        if package == READ_BY_ALL:
            rank = len(PACKAGES)
        if Path(file).name in ("__init__.py", "config_reference.py") and not package:
            continue  # the public names, fetched when asked for; the writer of a page
        above = {f"wavelet_lm.{name}" for name in PACKAGES[:rank]} - {f"wavelet_lm.{READ_BY_ALL}"}
        for name in imported_by(SOURCES[file]):
            assert ".".join(name.split(".")[:2]) not in above, f"{file} imports {name}"


def test_modules_do_not_import_each_other_in_a_circle():
    modules = {".".join(Path(file).with_suffix("").parts): file for file in PACKAGE}
    arrows = {
        name: {other for other in imported_by(SOURCES[file]) if other in modules} - {name}
        for name, file in modules.items()
    }
    while arrows:
        free = {name for name, others in arrows.items() if not others & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: others for name, others in arrows.items() if name not in free}


def test_each_package_imports_the_libraries_it_may():
    used = defaultdict(set)
    for file in PACKAGE:
        tops = {name.partition(".")[0] for name in imported_by(SOURCES[file])}
        used[package_of(file)] |= tops - sys.stdlib_module_names - {"wavelet_lm"}
    for package, libraries in used.items():
        allowed = {"torch", "numpy"} | LIBRARIES.get(package, set())
        assert libraries <= allowed, f"{package} imports {libraries - allowed}"


def test_commands_are_parsed_in_one_place():
    for file in PACKAGE:
        # The example is copied out, to where nothing of the project is.
        if package_of(file) != "cli" and not str(file).endswith("onnx_example.py"):
            assert "argparse" not in imported_by(SOURCES[file]), file


# Of the standard library after Python 3.10, which the README says is enough.
NEWER = {
    "tomllib",
    *(f"typing.{name}" for name in ("Self", "Never", "LiteralString", "assert_never", "override")),
    *(f"typing.{name}" for name in ("reveal_type", "Required", "NotRequired", "Unpack")),
    *(
        "enum.StrEnum",
        "datetime.UTC",
        "contextlib.chdir",
        "itertools.batched",
        "hashlib.file_digest",
    ),
}


def test_the_oldest_python_has_what_is_imported():
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = {f"{node.value.id}.{node.attr}"}
            else:
                continue
            assert not names & NEWER, (file, node.lineno)


def test_doors_are_thin():
    doors = [
        "train.py",
        "generate.py",
        "wavelet_lm/evaluation/__main__.py",
        "wavelet_lm/evaluation/compare.py",
        "wavelet_lm/evaluation/lra.py",
        "wavelet_lm/evaluation/fsd50k.py",
        "wavelet_lm/evaluation/recall.py",
        "wavelet_lm/models/__main__.py",
        "wavelet_lm/serving/__main__.py",
        "wavelet_lm/scope/__main__.py",
        "wavelet_lm/inference/quantization/__main__.py",
    ]
    assert all(is_door(SOURCES[file]) for file in doors)
    names = {file.removesuffix(".py").replace("/", ".") for file in doors}
    for file, source in SOURCES.items():
        assert not names & imported_by(source), file


def lines_of(file: str) -> int:
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("file", [file for file in PACKAGE if lines_of(file) > LONG])
def test_a_long_file_says_why(file):
    assert "one room" in ast.get_docstring(SOURCES[file]).lower()


def test_no_package_is_most_of_the_house():
    sizes = defaultdict(int)
    for file in PACKAGE:
        sizes[package_of(file)] += lines_of(file)
    total = sum(sizes.values())
    assert all(size <= 0.2 * total for size in sizes.values()), dict(sizes)
