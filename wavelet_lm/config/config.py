"""All options together, flat like the JSON files and the command-line flags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavelet_lm.config.model import ModelConfig
from wavelet_lm.config.option import ConfigError, checked, nearest, parsed
from wavelet_lm.config.presets import find_config, presets
from wavelet_lm.config.rules import check_contradictions
from wavelet_lm.config.run import DataConfig, GenerationConfig, QuantizationConfig, TrainingConfig
from wavelet_lm.errors import UserError
from wavelet_lm.json_files import read_json


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig, DataConfig, TrainingConfig, GenerationConfig, QuantizationConfig):
    """All options. Construction validates: `ConfigError` names the key at fault."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, checked(spec, getattr(self, spec.name)))
        check_contradictions(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """Build from a flat mapping; unknown keys raise with the nearest known one."""
        check_values(values, source)
        try:
            return cls(**{key: value for key, value in values.items() if key != CHANGES})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, path: str | Path, **overrides: Any) -> Config:
        """Read a flat JSON file or a preset by name; keyword overrides win over its values.

        Examples:
            >>> config = wavelet_lm.Config.from_json("configs/quickstart.json", layers=2)
            >>> config.layers, config.dataset
            (2, 'python-stdlib')
            >>> wavelet_lm.Config.from_json("config.json", layers=0)
            Traceback (most recent call last):
            wavelet_lm.config.option.ConfigError: config.json: layers is 0; it must be >= 1
        """
        return cls.from_dict({**read_config(path), **overrides}, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, JSON-ready: tuples are lists."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_json(self) -> str:
        """One key a line, lists kept on theirs, in the order of declaration."""
        lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in self.to_dict().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def replace(self, **changes: Any) -> Config:
        """A config with these keys changed; raises ConfigError as `from_dict` does."""
        return Config.from_dict({**self.to_dict(), **changes})


FIELDS = {spec.name: spec for spec in dataclasses.fields(Config)}
# No option: in the config.json of a run, what changed when it was resumed (`training/changes.py`).
CHANGES = "changes"
GROUPS = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "generation": GenerationConfig,
    "quantization": QuantizationConfig,
}


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, or a `UserError` that names the file (and line) at fault."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, an object is needed")
    return values


def read_config(name: str | Path) -> dict[str, Any]:
    """The keys in the config file at a path, or in the preset of that name.

    Raises:
        UserError: there is neither, or it is no JSON object.
    """
    file = find_config(name)
    if not file.exists() and not Path(name).is_absolute():
        raise UserError(
            f"{name}: there is no such file{nearest(str(name), presets())}; presets are"
            f" {', '.join(presets())}"
        )
    return read_json_object(file)


def checked_value(key: str, value: Any) -> Any:
    """A value of `key` by itself, in its type, or a `ConfigError` that says what is allowed."""
    return checked(FIELDS[key], value)


def check_values(values: Mapping[str, Any], source: str) -> None:
    """Every key is known and every value allowed by itself, whatever the other keys say."""
    for key, value in values.items():
        if key == CHANGES:
            continue
        if key not in FIELDS:
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(key, FIELDS)}")
        try:
            checked(FIELDS[key], value)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


def parse_value(key: str, text: str) -> Any:
    """The value of `key` from its command-line form (`none`, `true`, `1,1,.5`, `0.02`, …)."""
    return parsed(FIELDS[key], text)
