"""Networks as they are typed on a command line, many of them beside one config."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from wavelet_lm.config import (
    FIELDS,
    WAVELET_GPT_KEYS,
    Config,
    ConfigError,
    ModelConfig,
    check_values,
    parse_value,
)

SYNTAX = "MODEL[:MODULE][@FRACTION][+KEY=VALUE…]"
NETWORK_KEYS = {spec.name for spec in fields(ModelConfig)}


def split_names(text: str) -> list[str]:
    """The names of a list; a comma before anything but a letter is one inside a list of numbers.

    Raises:
        ConfigError: a name is empty or given twice.
    """
    names = [name.strip() for name in re.split(r",(?=\s*[A-Za-z]|\s*$)", text)]
    for name in names:
        if not name:
            raise ConfigError(f"{text!r} has an empty name; give {SYNTAX}, separated by commas")
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given twice; name each model once")
    return names


def model_configs(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Config]:
    """The config of each name, by name: the shared values, changed by what the name says.

    `wavelet_gpt:haar@0.25` sets `wavelet_module` and `wavelet_fraction`, `gpt+layers=3+heads=2` any
    other key of the network. Beside a wavelet_gpt the others do not get the keys that are its own.

    Raises:
        ConfigError: a name or its config is not allowed.
    """
    own = {name: _own_values(name) for name in names}
    has_averages = any(keys["model"] == "wavelet_gpt" for keys in own.values())
    configs = {}
    for name, keys in own.items():
        shared = dict(values)
        if has_averages and keys["model"] != "wavelet_gpt":
            shared = {k: v for k, v in values.items() if k not in WAVELET_GPT_KEYS}
        configs[name] = Config.from_dict({**shared, **keys}, source=name)
    return configs


def _own_values(name: str) -> dict[str, Any]:
    """What a name sets."""
    network, *assignments = name.split("+")
    match = re.fullmatch(r"([^:@]*)(?::([^:@]+))?(?:@([^:@]+))?", network)
    if match is None:
        raise ConfigError(f"{name!r} is no model; write {SYNTAX}, such as wavelet_gpt:haar@0.25")
    model, module, fraction = match.groups()
    keys: dict[str, Any] = {"model": model}
    check_values(keys, name)
    if model != "wavelet_gpt" and (module or fraction):
        part = f":{module}" if module else f"@{fraction}"
        raise ConfigError(f"{name}: {model} has no moving averages; drop {part} or use wavelet_gpt")
    if module:
        keys["wavelet_module"] = module
    if fraction:
        keys["wavelet_fraction"] = parse_value("wavelet_fraction", fraction)
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise ConfigError(f"{name}: {assignment!r} sets nothing; write +KEY=VALUE")
        if key not in FIELDS:
            check_values({key: None}, name)  # names the nearest one
        if key in keys:
            raise ConfigError(f"{name}: {key} is given twice; write it once")
        if key not in NETWORK_KEYS:
            raise ConfigError(
                f"{name}: {key} is no key of the network; data and training are the same for all"
                f" models, give --{key}"
            )
        keys[key] = parse_value(key, text)
    check_values(keys, name)
    return keys
