"""The configs that come with the project, by name, wherever it is installed.

In the repository `presets/` is a link to `configs/`, and `headline.json` one to `config.json`; a
wheel holds the files themselves.
"""

from pathlib import Path

HOME = Path(__file__).parent
HEADLINE = "headline"


def presets() -> dict[str, Path]:
    """The files of the presets by name, the headline model's last."""
    found = {file.stem: file for file in sorted((HOME / "presets").glob("*.json"))}
    return {**found, HEADLINE: HOME / f"{HEADLINE}.json"}


def find_config(name: str | Path) -> Path:
    """The file that a config's name means: a path that is there, else a preset of that name.

    `configs/NAME.json`, as the documents type it, is the preset in folders without one.

    Examples:
        >>> find_config("quickstart").name
        'quickstart.json'
    """
    path = Path(name)
    if path.is_file() or path.is_absolute():
        return path
    stem = path.stem if path.parent == Path("configs") and path.suffix == ".json" else str(name)
    return presets().get(stem, path)
