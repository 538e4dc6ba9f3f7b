"""`wavelet-lm completion`: bash completes commands, options, choices and files by the script."""

import shlex
import shutil
import subprocess

import pytest

from wavelet_lm.cli.completion import SHELLS, main, script
from wavelet_lm.cli.flags import parser_of
from wavelet_lm.cli.main import COMMANDS
from wavelet_lm.config import FIELDS
from wavelet_lm.errors import UserError

pytest.importorskip("shtab")
SOME = {
    "tr": ["train"],
    "train --optimizer_e": ["--optimizer_eps"],
    "train --dataset x --warmup": ["--warmup_fraction"],
    "train --model w": ["wavelet_lm", "wavelet_gpt"],
    "train --compile t": ["true"],
    "train --config con": ["config.json", "configs"],
    "evaluate --split v": ["valid"],
    "generate con": ["config.json", "configs"],
    "generate --prompt": ["--prompt", "--prompt_file", "--prompts"],
    "lra --pooling ": None,
    "completion ": [*SHELLS],
    "count --json con": ["config.json", "configs"],
}


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """What bash offers for the last word of each line of `SOME`, in one bash for all."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "configs").mkdir()
    (folder / "config.json").touch()
    lines = [script("bash"), "shopt -u nullglob"]
    for line in SOME:
        words = ["wavelet-lm", *line.split(" ")]
        lines.append(f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}")
        lines.append('_shtab_wavelet_lm; echo "${COMPREPLY[*]}"')
    done = subprocess.run(
        ["bash", "--norc"], input="\n".join(lines), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return dict(zip(SOME, (line.split() for line in done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", [line for line, expected in SOME.items() if expected])
def test_bash_completes(line, completed):
    assert sorted(completed[line]) == sorted(SOME[line])


def test_the_choices_are_those_of_the_parser(completed):
    from wavelet_lm.models.classifier.model import POOLING

    assert sorted(completed["lra --pooling "]) == sorted(POOLING)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_command_and_key(shell):
    text = script(shell)
    assert not [name for name in COMMANDS if name not in text]
    # fish writes `-l key`, the others `--key`.
    assert not [key for key in FIELDS if f"-l {key}" not in text and f"--{key}" not in text]
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_another_shell_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["wavelet-lm completion", "tcsh"])
    with pytest.raises(UserError, match="invalid choice: 'tcsh'"):
        main()


def test_a_parser_is_had_without_running_its_command():
    parser = parser_of(main)
    assert parser.parse_args(["zsh"]).shell == "zsh"
