"""The rows of the leaderboard: one table, what it takes to build a model of each, and their sizes.

A row's parameters are counted without the tables that a token looks one line up in: the embedding,
a head (tied to it in every row), and learned positions. What is left is the same for every
vocabulary and context, and within 5% of the GPT's in every row.

Rows of libraries compute by plain PyTorch where the kernels that they are meant for (CUDA alone)
are missing: correct, and slower than their authors would have it. RWKV-7 is not among them:
transformers has RWKV-4 alone, which is no stand-in for it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.config import FIELDS, Config, check_values, nearest, parse_value
from wavelet_lm.errors import UserError
from wavelet_lm.experiments.model_names import NETWORK_KEYS
from wavelet_lm.models.base import picked
from wavelet_lm.models.losses import mean_cross_entropy, token_cross_entropy
from wavelet_lm.models.registry import build_model

# Of the row `gpt`: 4 layers of 128 channels.
SIZE = 793_344
BAND = 0.05
TABLES = ("embedding.", "position_embedding.", "head.")

# What all rows of the project share.
COMMON: dict[str, Any] = {
    "tie_embedding_to_lm_head": True,
    **{f"dropout_{part}": 0.0 for part in ("embedding", "mixer", "projection", "mlp", "lm_head")},
}
GPT = {"C": 128, "layers": 4, "heads": 4, "head_hidden": 0}
NO_MEMORIES = {"pkm_enabled": False, "fwpkm_enabled": False}


@dataclass(frozen=True)
class Row:
    """about: a line for people; keys: of the project's config, or of the library's.

    library: the model's name in transformers, empty for the project's own; longest: whether it
    reads no more than the context that it was trained with.
    """

    about: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    library: str = ""
    bounded: bool = False

    @property
    def digest(self) -> str:
        """Changes with what the row is, so that figures of another model are never taken for it."""
        text = json.dumps([self.library, dict(self.keys)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


ROWS = {
    # --- the project's baselines
    "gpt": Row("GPT-2's decoder", {"model": "gpt", **GPT}, bounded=True),
    "wavelet_gpt:haar": Row(
        "the same with Haar averages between its blocks",
        {"model": "wavelet_gpt", **GPT, "wavelet_module": "haar"},
        bounded=True,
    ),
    "wavelet_gpt:learnable": Row(
        "the same with learned averages",
        {"model": "wavelet_gpt", **GPT, "wavelet_module": "learnable"},
        bounded=True,
    ),
    # --- WaveletLM
    "quickstart": Row(
        "two-layer lifting nets, the Hadamard transform and product keys, 4 levels",
        {
            "C": 128,
            "layers": 2,
            "levels": 4,
            "mlp_expansion": 1,
            "per_scale_mixer_widths": (1, 1, 1, 0.5, 0.5),
            "pkm_num_keys": 256,
            "pkm_top_k": 8,
            "fwpkm_enabled": False,
        },
    ),
    "mini": Row(
        "configs/mini.json with 64 channels",
        {
            "C": 64,
            "layers": 10,
            "levels": 7,
            "wavelet_crawl_k": 33,
            "wavelet_decomp_norm": True,
            "wavelet_recon_norm": True,
            "mixer_transform": "identity",
            "per_scale_mixer_widths": (1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5),
            "skip_proj_out": True,
            "mlp_expansion": 0,
            **NO_MEMORIES,
        },
    ),
    "linear": Row(
        "2 blocks, 5 levels of one-matrix nets, no transform, no memory: efficient's other half",
        {
            "C": 128,
            "layers": 2,
            "levels": 5,
            "lifting_linear_only": True,
            "mixer_transform": "identity",
            "per_scale_mixer_widths": (1, 1, 1, 0.5, 0.5, 0.5),
            "mlp_expansion": 3,
            **NO_MEMORIES,
        },
    ),
    "efficient": Row(
        "configs/efficient_cpu.json: 2 levels of one-matrix nets, then a delta memory, then an MLP",
        {
            "C": 128,
            "layers": 2,
            "levels": 2,
            "lifting_linear_only": True,
            "mixer_transform": "identity",
            "per_scale_mixer_widths": None,
            "low_rank": 0,
            "cross_scale_gating": False,
            "decompose_bypass": False,
            "mlp_expansion": 4,
            "mlp_activation": "relu2",
            **NO_MEMORIES,
            "delta_memory": True,
            "delta_heads": 4,
            "delta_key_dim": 32,
            "delta_value_dim": 32,
            "delta_bands": 1,
            "delta_after_mixing": True,
            "embedding_std": 0.02,
        },
    ),
    # --- of transformers
    "transformer": Row(
        "Qwen3: rotary positions, RMSNorm, normed queries and keys, SwiGLU",
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "intermediate_size": 344,
        },
        library="Qwen3",
        bounded=True,
    ),
    "mamba2": Row(
        "Mamba-2: seven mixers",
        {
            "hidden_size": 128,
            "num_hidden_layers": 7,
            "num_heads": 8,
            "head_dim": 32,
            "state_size": 32,
            "n_groups": 1,
            "chunk_size": 64,
        },
        library="Mamba2",
    ),
    "gated_deltanet": Row(
        "Gated DeltaNet: Qwen3-Next without its layers of attention and its experts",
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "intermediate_size": 256,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 24,
            "linear_value_head_dim": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "num_experts": 0,
        },
        library="Qwen3Next",
    ),
}


def find_row(name: str) -> Row:
    """A row as it is typed: NAME, or NAME+KEY=VALUE… with other keys than the table's.

    Raises:
        UserError: there is no such row or key.
    """
    base, *assignments = name.split("+")
    if base not in ROWS:
        if base.startswith("rwkv"):
            raise UserError(
                f"there is no row {base}: transformers has RWKV-4 alone, which is no stand-in for"
                " RWKV-7"
            )
        raise UserError(f"there is no row {base!r}; the rows are {', '.join(ROWS)}")
    row = ROWS[base]
    keys = dict(row.keys)
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise UserError(f"{name}: {assignment!r} sets nothing; write +KEY=VALUE")
        keys[key] = _library_value(row, name, key, text) if row.library else _value(name, key, text)
    if not row.library:
        check_values(keys, name)
    return Row(row.about, keys, row.library, row.bounded)


def _value(name: str, key: str, text: str) -> Any:
    if key not in FIELDS:
        check_values({key: None}, name)  # names the nearest one
    if key not in NETWORK_KEYS:
        raise UserError(
            f"{name}: {key} is no key of the network; all else is the same for all rows"
        )
    return parse_value(key, text)


def _library_value(row: Row, name: str, key: str, text: str) -> Any:
    if key not in row.keys:
        raise UserError(f"{name}: {key} is no key of the row{nearest(key, row.keys)}")
    try:
        return type(row.keys[key])(text)
    except ValueError:
        raise UserError(f"{name}: {key} is {text!r}; it must be like {row.keys[key]!r}") from None


def build_row(name: str, vocab_size: int, context: int) -> nn.Module:
    """A model of the row with random weights: `loss`, `token_losses`, and logits with a state.

    Raises:
        UserError: there is no such row, or it cannot be built here.
    """
    row = find_row(name)
    if row.library:
        return LibraryModel(row, vocab_size, context)
    return build_model(
        Config.from_dict({**COMMON, **row.keys, "block_size": context}, name), vocab_size
    )


def body_params(model: nn.Module) -> int:
    """Parameters without the tables that a token looks one line up in."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not name.startswith(TABLES))


def check_size(name: str, model: nn.Module, size: int, band: float) -> None:
    """Raise `UserError` for a row that is not as large as the others."""
    n = body_params(model)
    if abs(n - size) > band * size:
        raise UserError(
            f"{name} has {n:,} parameters beside its embedding, {n / size - 1:+.1%} of {size:,};"
            f" the rows must be within {band:.0%} of it; change its sizes, or compare unequal ones"
            " with --band"
        )


class LibraryModel(nn.Module):
    """A network of transformers, as the project's models are called.

    Its embedding and head go by the project's names, which say what Muon and weight decay leave
    out, and its loss is the project's own.
    """

    def __init__(self, row: Row, vocab_size: int, context: int):
        super().__init__()
        network = _network(row, vocab_size, context)
        self.embedding = network.get_input_embeddings()
        self.head = network.get_output_embeddings()
        self.network = network.base_model
        self.calls = CALLS[row.library]
        self.vocab_size = vocab_size
        self.longest = context if row.bounded else None

    def loss(
        self, idx: Tensor, targets: Tensor, state: Any = None, at: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Mean cross-entropy in nats per token over `targets` [B, T], or those at [B, Q]."""
        x, _ = self._hidden(idx)
        x = x if at is None else picked(x, at)
        return mean_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten()), None

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every target [B, T] in nats, float32."""
        x, _ = self._hidden(idx)
        losses = token_cross_entropy(x.flatten(0, 1), self.head, self.vocab_size, targets.flatten())
        return losses.view_as(targets)

    def forward(self, idx: Tensor, state: Any = None, *, last_only: bool = False) -> Any:
        """Logits, and a state; unlike one of the project's it changes in place."""
        x, state = self.hidden(idx, state)
        return self.project(x[:, -1:] if last_only else x), state

    def hidden(self, idx: Tensor, state: Any = None) -> Any:
        """Vectors [B, T, C] that are ready for the head, and the state."""
        cache, start = state or (None, 0)
        x, cache = self._hidden(idx, cache, start, use_cache=True)
        return x, (cache, start + idx.shape[1])

    def project(self, x: Tensor) -> Tensor:
        """Their logits [B, T, vocab]."""
        return self.head(x)

    def _hidden(
        self, idx: Tensor, cache: Any = None, start: int = 0, use_cache: bool = False
    ) -> tuple[Tensor, Any]:
        """Normalised vectors [B, T, C], and the library's cache where it is asked for."""
        calls = self.calls
        options: dict[str, Any] = {calls.cache: cache, "use_cache": use_cache}
        if calls.positions:
            positions = torch.arange(start, start + idx.shape[1], device=idx.device)
            options["position_ids"] = positions[None]
        if calls.masks:
            options["attention_mask"] = dict.fromkeys(calls.masks)  # all None: causal, not padded
        out = self.network(input_ids=idx, **options)
        return out.last_hidden_state, out[calls.cache] if use_cache else None


@dataclass(frozen=True)
class Calls:
    """How a network of a library is called.

    cache: the name of its state; positions: whether it is told them; masks: kinds of layers that
    are told that there is no padding, which the network would else ask a cache that it has not.
    """

    cache: str
    positions: bool
    masks: tuple[str, ...] = ()


CALLS = {
    "Qwen3": Calls("past_key_values", positions=True),
    "Mamba2": Calls("cache_params", positions=False),
    "Qwen3Next": Calls(
        "past_key_values", positions=True, masks=("full_attention", "linear_attention")
    ),
}


def _network(row: Row, vocab_size: int, context: int) -> nn.Module:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else it may ask the hub for faster kernels
    try:
        transformers = importlib.import_module("transformers")
        config_class = getattr(transformers, f"{row.library}Config")
        model_class = getattr(transformers, f"{row.library}ForCausalLM")
    except (ImportError, AttributeError):
        raise UserError(
            f"rows of {row.library} need transformers 5.23 or newer; install it with"
            ' python -m pip install -c constraints.txt -e ".[bench]", or leave them out of --rows'
        ) from None
    transformers.logging.set_verbosity_error()  # it says at length which kernels are missing
    keys = dict(row.keys)
    if row.library == "Qwen3Next":
        keys["layer_types"] = ["linear_attention"] * keys["num_hidden_layers"]
    if row.bounded:
        keys["max_position_embeddings"] = context
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    try:
        config = config_class(vocab_size=vocab_size, tie_word_embeddings=True, **tokens, **keys)
        return model_class(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.library}: {str(error).splitlines()[0]}") from None
