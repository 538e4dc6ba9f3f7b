"""docs/commands.md is what the commands say of themselves."""

from pathlib import Path

from wavelet_lm.cli.main import COMMANDS
from wavelet_lm.cli.reference import OLDER, reference

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    """`python -m wavelet_lm.cli.reference > docs/commands.md` after a change of a command."""
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == reference()


def test_every_older_name_is_that_of_a_door():
    assert OLDER.keys() <= COMMANDS.keys()  # newer commands are of the console command alone
    for name, typed in OLDER.items():
        place = typed.split()[-1].removesuffix(".py").replace(".", "/")
        files = [ROOT / f"{place}.py", ROOT / place / "__main__.py"]
        (door,) = [file for file in files if file.is_file()]
        assert f"from wavelet_lm.cli.{name} import main" in door.read_text(encoding="utf-8")
