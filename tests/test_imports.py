"""What an import loads: the top level nothing, a part itself and what lies below it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import wavelet_lm
from tests.test_house import PACKAGES

ROOT = Path(__file__).parents[1]
LOW = ("models", "transforms", "kernels", "data")

# Imports the named modules of the package, each in a fork of one process that has loaded the
# libraries already, and prints the modules that came with each.
IN_FORKS = """
import importlib, json, os, sys
import numpy, torch
before = set(sys.modules)
found = {}
for name in sys.argv[1:]:
    read, write = os.pipe()
    if os.fork() == 0:
        importlib.import_module(name)
        os.write(write, "\\n".join(set(sys.modules) - before).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found[name] = pipe.read().split()
    assert os.wait()[1] == 0, name
print(json.dumps(found))
"""


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_top_level_loads_nothing_until_a_name_is_asked_for():
    out = python(
        "import sys, wavelet_lm\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(*[name for name in sys.modules if name.startswith('wavelet_lm')])\n"
        "assert set(wavelet_lm.__all__) <= set(dir(wavelet_lm))\n"
        "assert issubclass(wavelet_lm.ConfigError, wavelet_lm.UserError)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert out.split() == ["wavelet_lm"]


def test_every_public_name_is_there_and_no_other():
    for name in wavelet_lm.__all__:
        assert getattr(wavelet_lm, name).__name__ == name
        assert getattr(wavelet_lm, name) is vars(wavelet_lm)[name]
    with pytest.raises(AttributeError, match="has no attribute 'Confg'"):
        _ = wavelet_lm.Confg


def test_models_need_torch_and_numpy_alone():
    """No tokenizer, data set or file format is loaded before one is used."""
    out = python(
        "import sys, numpy, torch\n"
        "before = set(sys.modules)\n"
        "import wavelet_lm\n"
        "config = wavelet_lm.Config(C=16, layers=1, per_scale_mixer_widths=None)\n"
        "model = wavelet_lm.build_model(config, 11)\n"
        "model(torch.zeros(1, 3, dtype=torch.int64))\n"
        "wavelet_lm.load_model, wavelet_lm.load_tokenizer, wavelet_lm.generate\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*names - sys.stdlib_module_names - {'torch', 'numpy'})\n"
    )
    assert out.split() == ["wavelet_lm"]


def test_a_part_loads_nothing_above_it():
    packages = PACKAGES
    files = [path.relative_to(ROOT) for path in (ROOT / "wavelet_lm").rglob("*.py")]
    names = [".".join(f.with_suffix("").parts) for f in files if f.parts[1] in LOW]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    names = [name for name in names if "triton" not in name]
    assert {"wavelet_lm.transforms.haar", "wavelet_lm.transforms"} <= set(names)
    loaded = json.loads(python(IN_FORKS, *names))
    assert loaded.keys() == set(names)
    for name, others in loaded.items():
        own = [other for other in others if other.startswith("wavelet_lm")]
        allowed = {"wavelet_lm", *packages[packages.index(name.split(".")[1]) :]}
        above = [o for o in own if o.count(".") and o.split(".")[1] in set(packages) - allowed]
        assert not above, f"{name} loads {above}"
    haar = {name for name in loaded["wavelet_lm.transforms.haar"] if name.startswith("wavelet_lm")}
    assert all(name.startswith("wavelet_lm.transforms") for name in haar - {"wavelet_lm"}), haar
