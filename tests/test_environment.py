"""What a command settles before PyTorch is loaded: how threads wait, their number, Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wavelet_lm.environment import COUNT_VARIABLES, WAIT_POLICY, WAIT_VARIABLES, available_cpus

ROOT = Path(__file__).parents[1]
MAIN = 'if __name__ == "__main__":'
# Copied beside an exported model, where nothing of the project is; run by code of any version.
ELSEWHERE = {"onnx_example.py", "checkout_steps.py"}
DOORS = sorted(
    file.relative_to(ROOT)
    for place in (ROOT.glob("*.py"), ROOT.glob("wavelet_lm/**/*.py"), ROOT.glob("benchmarks/*.py"))
    for file in place
    if MAIN in file.read_text(encoding="utf-8") and file.name not in ELSEWHERE
)
# These load PyTorch later than at the top, or never.
LIGHT = {"train.py", "wavelet_lm/config_reference.py"}
HEAVY = [door for door in DOORS if str(door) not in LIGHT]


def start(door, folder, torch, *arguments, **variables):
    """Run a door where `import torch` runs this text instead, without the variables of threads."""
    for name in ("torch", "numpy"):
        (folder / f"{name}.py").write_text(torch, encoding="utf-8")
    names = (*WAIT_VARIABLES, *COUNT_VARIABLES)
    clean = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join([str(folder), str(ROOT), clean.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *how_to_start(door), *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**clean, "PYTHONPATH": path, **variables},
    )


def how_to_start(door):
    if door.parts[0] != "wavelet_lm":
        return [str(door)]
    return ["-m", ".".join(door.with_suffix("").parts).removesuffix(".__main__")]


def test_the_doors_are_found():
    assert {"train.py", "generate.py", "wavelet_lm/evaluation/__main__.py"} <= {*map(str, DOORS)}


@pytest.mark.parametrize("door", DOORS, ids=str)
def test_a_door_starts_before_its_other_imports(door):
    text = (ROOT / door).read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if line.startswith(("import", "from", MAIN)))
    if first.startswith("from __future__"):
        text = text[text.index(first) + len(first) :]
    block = f"{MAIN}\n    from wavelet_lm.environment import start\n\n    start()"
    assert text.index(block) < min(
        text.find(f"\n{word} ") % (len(text) + 1) for word in ("import", "from")
    )


INTERRUPTED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('went on')\n"


@pytest.mark.parametrize("door", HEAVY, ids=str)
def test_interrupted_while_it_imports(door, tmp_path):
    done = start(door, tmp_path, INTERRUPTED)
    name = door.name if len(how_to_start(door)) == 1 else how_to_start(door)[1]
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: interrupted\n")


def test_interrupted_while_training_imports(tmp_path):
    done = start(Path("train.py"), tmp_path, INTERRUPTED, "--config", "configs/quickstart.json")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "train.py: interrupted\n")


def test_ctrl_c_stays_ignored_where_it_was(tmp_path):
    """As under nohup, or in the background of a script."""
    ignore = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    program = f"{ignore}from wavelet_lm.environment import ready, start; start(); ready()\n"
    program += "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n"


SHOW = f"import os\nprint({{n: os.environ.get(n) for n in {WAIT_VARIABLES}}})\nos._exit(0)\n"


@pytest.mark.parametrize("door", HEAVY, ids=str)
def test_the_wait_policy_is_set_before_torch_loads(door, tmp_path):
    done = start(door, tmp_path, f"import sys; sys.stdout.reconfigure(line_buffering=True)\n{SHOW}")
    assert done.stdout == f"{dict.fromkeys(WAIT_VARIABLES) | WAIT_POLICY}\n"


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_the_users_wait_policy_wins(name, tmp_path):
    text = f"import sys; sys.stdout.reconfigure(line_buffering=True)\n{SHOW}"
    done = start(Path("generate.py"), tmp_path, text, **{name: "7"})
    assert done.stdout == f"{ {**dict.fromkeys(WAIT_VARIABLES), name: '7'} }\n"


# --- how many threads ----------------------------------------------------------------------------

COUNT = """
import os
os.sched_setaffinity(0, {affinity})
from wavelet_lm.environment import start
start()
import torch
from wavelet_lm import threads
threads.available_cpus = lambda: {limit}
counts = [torch.get_num_threads()]
for given in {given}:
    threads.use_threads(given)
    counts.append(torch.get_num_threads())
print(counts)
"""


def counted(given, affinity=None, limit=64, **variables):
    """PyTorch's own number of threads, and that after each `use_threads`."""
    affinity = affinity or os.sched_getaffinity(0)
    clean = {k: v for k, v in os.environ.items() if k not in (*WAIT_VARIABLES, *COUNT_VARIABLES)}
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(given=given, affinity=affinity, limit=limit)],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env={**clean, **variables},
        check=True,
    )
    first, *rest = map(int, done.stdout.strip("[]\n").split(","))
    return first, rest


linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")


@linux
def test_threads_follow_the_affinity():
    one = {min(os.sched_getaffinity(0))}
    assert counted(["auto", 3, "auto"], affinity=one) == (1, [1, 3, 1])


@linux
def test_auto_is_within_the_quota_and_comes_back():
    default, (auto, given, again) = counted(["auto", 3, "auto"], limit=1)
    assert (auto, given, again) == (1, 3, 1)
    assert default >= 1


@linux
def test_the_users_number_of_threads_wins_over_auto_alone():
    default, counts = counted(["auto", 3, "auto"], limit=1, OMP_NUM_THREADS="2")
    assert counts == [default, 3, default]


# --- how many CPUs -------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A function that makes control groups of files and says how many CPUs they leave of 8."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def cpus(membership, **files):
        (tmp_path / "membership").write_text(membership, encoding="utf-8")
        for name, text in files.items():
            file = tmp_path / "groups" / name.replace("__", "/").replace("cpu_", "cpu.")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return available_cpus(tmp_path / "groups", tmp_path / "membership")

    return cpus


@pytest.mark.parametrize(
    ("quota", "n"),
    [("max", 8), ("150000", 2), ("200000", 2), ("10000", 1), ("1600000", 8), ("nonsense", 8)],
)
def test_quota_of_version_2(groups, quota, n):
    assert groups("0::/\n", cpu_max=f"{quota} 100000\n") == n


def test_the_tightest_group_around_the_process_counts(groups):
    quotas = {"a__b__cpu_max": "max 100000", "a__cpu_max": "250000 100000"}
    assert groups("0::/a/b\n", **quotas) == 3


def test_a_container_that_sees_its_own_group_as_the_root(groups):
    assert groups("0::/docker/0123\n", cpu_max="100000 100000") == 1


@pytest.mark.parametrize(("quota", "n"), [("-1", 8), ("150000", 2), ("0", 8), ("", 8)])
def test_quota_of_version_1(groups, quota, n):
    files = {"cpu__cpu_cfs_quota_us": quota, "cpu__cpu_cfs_period_us": "100000"}
    assert groups("5:memory:/x\n2:cpuacct:/\n1:cpu:/\n0::/\n", **files) == n


def test_version_1_with_the_controllers_in_one_folder(groups):
    place = "cpu,cpuacct__docker__0123__cpu_cfs_"
    files = {f"{place}quota_us": "400000", f"{place}period_us": "100000"}
    assert groups("4:cpu,cpuacct:/docker/0123\n", **files) == 4


def test_no_control_groups_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert available_cpus(tmp_path, tmp_path / "absent") == 2
    (tmp_path / "odd").write_text("what is this\n", encoding="utf-8")
    assert available_cpus(tmp_path, tmp_path / "odd") == 2
