"""Run folders to folders of transformers, and back.

What goes out has the model, its config, a tokenizer, the run's generation options and a card; what
comes back may have been trained there and needs no transformers to be read.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from wavelet_lm.atomic_files import as_user_error, check_new_folder, write_text
from wavelet_lm.config import Config
from wavelet_lm.data.tokenizers import Tokenizer, load_tokenizer
from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.interop.local_paths import without_local_paths
from wavelet_lm.interop.published import named_or_stored_tokenizer, new_run, write_run
from wavelet_lm.json_files import read_json
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.checkpoint import check_finite, check_shapes
from wavelet_lm.models.registry import n_params
from wavelet_lm.models.stored_model import StoredModel, TensorReader

PREFIX = "network."  # of a weight's name there
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def export_hf(model: LanguageModel, tokenizer: Tokenizer, out: str | Path) -> list[Path]:
    """Make the folder `out`, which `AutoModelForCausalLM.from_pretrained` loads; returns it.

    Args:
        model: of the project, with weights as they are trained.
        tokenizer: the model's; files that are no text get no tokenizer of transformers.

    Raises:
        UserError: transformers is missing; `out` exists or cannot be written; weights that are not
            finite.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out}: already there; give --out a new folder")
    check_new_folder(out)
    check_finite(model, out)
    try:
        from wavelet_lm.interop.transformers import WaveletLMConfig, WaveletLMForCausalLM
        from wavelet_lm.interop.transformers_tokenizer import fast_tokenizer, pad_token_id
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tokenizers"):
            raise
        raise missing_extra("a folder for transformers", error.name, "transformers") from None
    config = WaveletLMConfig(
        network=without_local_paths(model.config.to_dict()),
        vocab_size=model.vocab_size,
        tokenizer=tokenizer.name,
        pads_past_vocabulary=tokenizer.end_of_text is None,
        pad_token_id=pad_token_id(tokenizer),
        bos_token_id=tokenizer.end_of_text,
        eos_token_id=tokenizer.end_of_text,
    )
    there = WaveletLMForCausalLM.around(model, config)
    there.generation_config = generation_config(model.config, tokenizer)
    fast = fast_tokenizer(tokenizer)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise as_user_error(error, out) from error
    try:
        there.save_pretrained(out)
        if fast is not None:
            fast.save_pretrained(out)
        tokenizer.save(out / "tokenizer")
        write_text(out / "README.md", card(model, tokenizer, out.name, fast is not None))
    except OSError as error:
        shutil.rmtree(out, ignore_errors=True)
        raise as_user_error(error, out) from error
    except BaseException:  # a folder without weights is no model
        shutil.rmtree(out, ignore_errors=True)
        raise
    return [out]


def generation_config(config: Config, tokenizer: Tokenizer) -> Any:
    """The run's own options of generation, as transformers names them."""
    from transformers import GenerationConfig

    from wavelet_lm.interop.transformers_tokenizer import pad_token_id

    sampled: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampled = {
            "do_sample": True,
            "temperature": float(config.temperature),
            "top_k": config.top_k,
            "top_p": float(config.top_p),
        }
    return GenerationConfig(
        **sampled,
        repetition_penalty=float(config.repetition_penalty),
        max_new_tokens=config.num_new_tokens,
        pad_token_id=pad_token_id(tokenizer),
        bos_token_id=tokenizer.end_of_text,
        eos_token_id=tokenizer.end_of_text,
    )


def card(
    model: LanguageModel,
    tokenizer: Tokenizer,
    name: str,
    is_text: bool,
) -> str:
    """The model card, README.md of the folder."""
    config = model.config
    kind = {"wavelet_lm": "attention-free wavelet language model"}.get(config.model, config.model)
    rows = {
        "parameters": f"{n_params(model):,}",
        "kind": kind,
        "width, layers": f"{config.C}, {config.layers}",
        "trained on": f"{Path(config.dataset).name}, windows of {config.block_size} tokens",
        "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    use = f"""\
from transformers import AutoModelForCausalLM{", AutoTokenizer" if is_text else ""}

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
"""
    if is_text:
        use += f"""\
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer({config.generation_prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- wavelet-lm
- {config.model.replace("_", "-")}
---

# {name}

A model of WaveletLM, in the format of transformers.

| | |
| --- | --- |
{table}

Where WaveletLM is installed, with its extra `transformers`:

```python
{use}```

A run folder of it, to train on or to serve: `wavelet-lm convert FOLDER --out RUN`.
"""


# --- and back -------------------------------------------------------------------------------------


def run_of_folder(path: str | Path, out: str | Path, tokenizer: str | None = None) -> Path:
    """Make a run folder of a folder of transformers: config.json, tokenizer/, best.safetensors.

    Args:
        tokenizer: a name (`gpt2`, `bytes`) or a folder that holds one; None is the one in the
            folder, or that of the name in its config.

    Raises:
        UserError: `out` exists; weights are missing, of other shapes, or not finite; no tokenizer.
    """
    path, out = Path(path).expanduser(), new_run(out)
    described = read_json(path / "config.json")
    config = Config.from_dict(described.get("network") or {}, source=str(path / "config.json"))
    vocab_size = described.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(f"{path / 'config.json'}: its vocab_size is {vocab_size!r}, no number")
    model = _model(path, config, vocab_size)
    check_finite(model, path)
    chosen = _tokenizer(path, described.get("tokenizer"), tokenizer, vocab_size)
    return write_run(out, model, chosen, path)


def _model(path: Path, config: Config, vocab_size: int) -> LanguageModel:
    """The model with the folder's weights."""
    readers: dict[str, TensorReader] = {}
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for file in _weight_files(path):
        reader = TensorReader(file)
        for name, entry in _entries(file).items():
            own = name.removeprefix(PREFIX)
            readers[own], shapes[own], dtypes[own] = reader, entry["shape"], entry["dtype"]
    names = {}

    def read(name: str) -> Tensor:
        return readers[names[name]](PREFIX + names[name])

    stored = StoredModel(config, vocab_size, read)
    groups: dict[int, list[str]] = {}
    for name, parameter in stored.model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for same in groups.values():  # tied ones are there once, under either name
        there = [name for name in same if name in readers]
        for name in there[1:]:
            shapes.pop(name)
        if there:
            shapes[same[0]], dtypes[same[0]] = shapes.pop(there[0]), dtypes[there[0]]
            names[same[0]] = there[0]
    check_shapes(shapes, stored.model, path, dtypes)
    return stored.loaded()


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        return [path / file for file in sorted(set(read_json(path / INDEX)["weight_map"].values()))]
    hint = ""
    if (path / "adapter_config.json").is_file():
        hint = "; it has an adapter alone: merge it first (merge_and_unload, save_pretrained)"
    raise UserError(f"{path}: no {WEIGHTS} in this folder{hint}")


def _entries(file: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors."""
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: {"shape": part.get_shape(), "dtype": part.get_dtype()}
                for name, part in slices.items()
            }
    except Exception as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error})") from None


def _tokenizer(path: Path, known: str | None, given: str | None, vocab_size: int) -> Tokenizer:
    if given is not None:
        chosen = named_or_stored_tokenizer(given)
    elif (path / "tokenizer" / "tokenizer.json").is_file():  # beside it lies that of transformers
        chosen = load_tokenizer(path / "tokenizer")
    elif known in ("gpt2", "bytes"):
        chosen = named_or_stored_tokenizer(known)
    else:
        raise UserError(
            f"{path}: it has no folder tokenizer/; give --tokenizer the folder that was exported"
            f" before, or the run's (the model was trained with {known or 'an unknown one'})"
        )
    if chosen.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer {chosen.name} has {chosen.vocab_size} tokens and {path} {vocab_size};"
            " give --tokenizer the one of its training"
        )
    return chosen
