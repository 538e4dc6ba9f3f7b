"""Every option of the project, once: name, type, default, range and meaning.

`Config` is flat, like the JSON files and the command-line flags, and is put together from one
frozen dataclass per part of the program, so that a module can say which part it reads (a block
takes a `ModelConfig`). The same declarations drive JSON reading and writing, `train.py`'s flags,
`--help`, every error message and the reference in `docs/config.md` (`config_reference.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavelet_lm.errors import UserError
from wavelet_lm.json_files import brief, read_json


class ConfigError(UserError):
    """A key that is unknown, of the wrong type, out of range, or at odds with another key."""


@dataclass(frozen=True)
class Option:
    """What is known of one key besides its name, type and default.

    cost: the parameters that come with it, in the symbols of `config_reference.py`; for a switch
    those of its being on, for a number those of its value; empty = none.
    word: a text that is allowed in place of a number.
    """

    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] | None = None
    cost: str = ""
    word: str | None = None

    def range(self) -> str:
        """The allowed values in words, empty when every value of the type is allowed."""
        if self.choices is not None:
            return " | ".join(show(choice) for choice in self.choices)
        bounds = [("> ", self.above), (">= ", self.minimum), ("<= ", self.maximum)]
        words = " and ".join(f"{sign}{show(bound)}" for sign, bound in bounds if bound is not None)
        return words if self.word is None else f"{self.word} or {words}"

    def allows(self, value: Any) -> bool:
        if self.choices is not None:
            # `True in (1,)` holds in Python; a choice must also agree in type.
            return any(value == c and type(value) is type(c) for c in self.choices)
        if isinstance(value, str) and self.word is not None:
            return value == self.word
        return (
            (self.above is None or value > self.above)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
        )


def option(default: Any, meaning: str, **limits: Any) -> Any:
    return field(default=default, metadata={"option": Option(meaning, **limits)})


BITS = (2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. The keys and their meaning are described in the README, "How it works"."""

    model: str = option(
        "wavelet_lm",
        "network to build: the wavelet model, or a baseline with attention, which reads C, layers,"
        " block_size, dropout_*, tie_embedding_to_lm_head, gradient_checkpointing and the keys that"
        " name it",
        choices=("wavelet_lm", "gpt", "wavelet_gpt"),
        cost="another network",
    )
    C: int = option(2048, "channels of the residual stream", minimum=1, cost="every width")
    layers: int = option(2, "number of blocks", minimum=1, cost="a block each")
    levels: int = option(
        5,
        "wavelet levels of a block; it has levels + 1 scales, or 2^levels with wavelet_packets",
        minimum=1,
        cost="lifting nets and mixers each",
    )
    wavelet_mode: str = option(
        "lifting",
        "learned lifting or fixed Haar filters",
        choices=("lifting", "haar"),
        cost="lifting: n·W·L·P",
    )
    shared_lifting_weights: bool = option(
        True, "one set of lifting nets for all blocks", cost="−(N − 1)·L·(n·P + K)"
    )
    lifting_linear_only: bool = option(
        False,
        "predict and update nets are one matrix, not two layers",
        cost="−n·W·L·((2·h − 1)·Cp² + h·Cp)",
    )
    lifting_hidden_mult: int = option(
        1, "hidden width of a lifting net, times C", minimum=1, cost="n·W·L·h·(2·Cp² + Cp)"
    )
    lifting_init: str = option(
        "haar", "initial predict and update nets", choices=("haar", "zero", "random")
    )
    lifting_dropout: float = option(0.0, "dropout inside the lifting nets", minimum=0, maximum=0.99)
    wavelet_crawl: bool = option(
        True, "learn a mixture of lags around 2^k at level k", cost="W·L·K"
    )
    wavelet_crawl_k: int = option(3, "lags in that mixture, an odd number", minimum=3, cost="W·L·K")
    wavelet_decomp_norm: bool = option(
        False, "LayerNorm per scale after the decomposition", cost="2·N·S·Cp"
    )
    wavelet_recon_norm: bool = option(
        False, "LayerNorm per scale before the reconstruction", cost="2·N·S·Cp"
    )
    untied_reconstruction: bool = option(
        False, "own update nets for the reconstruction", cost="W·L·P"
    )
    lifting_data_dependent: int = option(
        0,
        "rank of an input-dependent term in every lifting net, 0 = none",
        minimum=0,
        cost="3·n·W·L·lifting_data_dependent·Cp",
    )
    wavelet_packets: bool = option(
        False,
        "split the details too: 2^levels scales; up to 6 levels",
        cost="2^levels scales in place of levels + 1",
    )
    multi_basis_lifting: bool = option(
        False,
        "several wavelets side by side; needs shared_lifting_weights false",
        cost="N·((B − 1)·L·(n·P + K) + B·S)",
    )
    multi_basis_inits: tuple[str, ...] = option(
        ("haar", "random"),
        "initial nets of each wavelet of multi_basis_lifting",
        choices=("haar", "zero", "random"),
        cost="N·B·(L·(n·P + K) + S)",
    )
    mixer_transform: str = option(
        "fwht",
        "rotation of the channels before mixing",
        choices=("fwht", "identity"),
        cost="fwht: Cp in place of C",
    )
    hadamard_top_k: int = option(
        0,
        "largest coefficients per position and scale that the mixers read after the"
        " mixer_transform, 0 = all",
        minimum=0,
    )
    per_scale_mixer_widths: tuple[float, ...] | None = option(
        (1.0, 1.0, 1.0, 0.5, 0.5, 0.5),
        "mixer width of each scale as a fraction of C, coarse to fine; none = all full",
        above=0,
        maximum=1,
        cost="N·D·M",
    )
    low_rank: int = option(
        4,
        "rank of the mixer's additive low-rank term, 0 = none",
        minimum=0,
        cost="2·N·D·low_rank·Σw",
    )
    use_mixer_gate: bool = option(True, "gate the mixer (SwiGLU)", cost="N·D·Σ(w²)")
    mixer_gate_activation: str = option(
        "silu", "activation of that gate", choices=("silu", "sigmoid", "gelu", "relu")
    )
    cross_scale_gating: bool = option(
        True, "gates read a learned mixture of all scales", cost="N·S²"
    )
    mixer_depth: int = option(1, "mixers in a row per scale", minimum=1, cost="N·D·(M + 3·S·Cp)")
    mixer_depth_stabilizers: bool = option(
        False, "learned factors around stacked mixers", cost="2·N·(D − 1)"
    )
    mixer_depth_residuals: bool = option(False, "residuals around stacked mixers")
    mixer_exp_parametrization: bool = option(
        False, "mixer matrix as I + diag(exp theta) N with fixed noise N", cost="N·D·Σw"
    )
    decompose_bypass: bool = option(
        True, "feed the running mean of the past to every scale", cost="N·(C² + S·C)"
    )
    decompose_bypass_cross_window: bool = option(
        True,
        "with data_order sequential, hand the last running mean to the next window;"
        " inert with random crops",
    )
    decompose_bypass_ema: bool = option(
        False, "learned exponential mean in place of the running mean", cost="N·(C² + C)"
    )
    phase_gating: bool = option(
        False, "the approximation gates the other scales", cost="N·(Cp² + (S − 1)·Cp)"
    )
    learned_residual: bool = option(True, "learned gains of the two residual branches", cost="2·N")
    skip_proj_out: bool = option(
        False, "no output projection after the reconstruction", cost="−N·(Cp + 1)·C"
    )
    per_layer_embedding: bool = option(
        True, "add the gained token embedding in every block", cost="N·C"
    )
    mlp_expansion: int = option(
        20,
        "hidden width of the MLP, times C; 0 = no MLP",
        minimum=0,
        cost="N·(2·E·C² + E·C + (mlp_layers − 2)·(E·C + 1)·E·C)",
    )
    mlp_layers: int = option(
        2, "linear layers of the MLP", minimum=2, cost="N·(mlp_layers − 2)·(E·C + 1)·E·C"
    )
    pkm_enabled: bool = option(True, "product-key memory", cost="N·(C² + √k·C + heads·k·C + 1)")
    pkm_num_keys: int = option(
        16384, "its value rows per head, a square number", minimum=1, cost="N·(√k + heads·k)·C"
    )
    pkm_top_k: int = option(32, "rows read per position and head", minimum=1)
    pkm_heads: int = option(1, "its heads", minimum=1, cost="N·heads·k·C")
    fwpkm_enabled: bool = option(
        True,
        "second product-key memory, the one with fast weights",
        cost="N·(C² + √k·C + heads·k·C + 1)",
    )
    fwpkm_num_keys: int = option(
        16384, "its value rows per head, a square number", minimum=1, cost="N·(√k + heads·k)·C"
    )
    fwpkm_top_k: int = option(32, "rows read per position and head", minimum=1)
    fwpkm_heads: int = option(1, "its heads", minimum=1, cost="N·heads·k·C")
    fwpkm_inference_updates: bool = option(False, "adapt the fast weights while generating")
    fwpkm_update_lr: float = option(0.01, "step size of fwpkm_inference_updates", minimum=0)
    fwpkm_chunk_size: int = option(64, "tokens between those updates", minimum=2)
    tie_embedding_to_lm_head: bool = option(False, "one matrix for embedding and head", cost="−V·C")
    dropout_embedding: float = option(0.2, "dropout of the embedding", minimum=0, maximum=0.99)
    dropout_mixer: float = option(0.1, "dropout of the mixed scales", minimum=0, maximum=0.99)
    dropout_projection: float = option(
        0.1, "dropout of the reconstructed signal", minimum=0, maximum=0.99
    )
    dropout_mlp: float = option(0.1, "dropout of the MLP's output", minimum=0, maximum=0.99)
    dropout_lm_head: float = option(0.24, "dropout before the head", minimum=0, maximum=0.99)
    looped_blocks: bool = option(
        False, "one block, applied looped_blocks_count times", cost="−(layers − 1) blocks"
    )
    looped_blocks_count: int = option(8, "how often, with looped_blocks", minimum=1)
    loop_iterations: int = option(
        1, "passes through the whole stack, their losses averaged in training", minimum=1
    )
    stochastic_depth_rate: float = option(
        0.0,
        "block i of n is skipped in training with this probability times i / n",
        minimum=0,
        maximum=0.99,
    )
    gradient_checkpointing: bool = option(
        False, "recompute a block's activations in the backward pass to save memory"
    )
    stable_parametrization: bool = option(False, "all stab_* switches at once")
    stab_embed_scaling: bool = option(False, "embedding times sqrt(C)")
    stab_ff_scaling: bool = option(
        False, "last MLP matrix starts over sqrt(its inputs), not at 0.02"
    )
    stab_proj_out_scaling: bool = option(
        False, "output projection starts over sqrt(C layers), not at 0.001"
    )
    stab_mixer_eps_scaling: bool = option(False, "noise of the mixer's identity over sqrt(C)")
    stab_spectral_norm: bool = option(False, "mixer matrices start with spectral norm 1")
    stab_lifting_level_scaling: bool = option(
        False, "last matrix of a lifting net over 1 + 0.1 level"
    )
    multinodal_enabled: bool = option(
        False, "an ensemble of small models; C is then unused", cost="whole models in place of one"
    )
    multinodal_num_cells: int = option(4, "its models", minimum=1, cost="a whole model each")
    multinodal_cell_dim: int = option(128, "channels of each", minimum=1, cost="every width")
    multinodal_combination: str = option(
        "mean", "how their logits combine", choices=("mean", "sum")
    )
    multinodal_features_per_cell: int = option(
        0, "embedding channels that each may use, 0 = all", minimum=0
    )
    multinodal_bagged_eps: float = option(0.0, "value of the other channels")
    multinodal_cross_cell_gating: bool = option(
        False, "let the models gate each other", cost="⌊layers / interval⌋·C²"
    )
    multinodal_cross_cell_gate_interval: int = option(
        1, "blocks between gates", minimum=1, cost="with gating ⌊layers / interval⌋·C²"
    )

    heads: int = option(8, "attention heads of a GPT", minimum=1)
    gpt_mlp_expansion: int = option(
        4,
        "hidden width of a GPT's MLP, times C",
        minimum=1,
        cost="of a GPT N·gpt_mlp_expansion·(2·C² + C)",
    )
    head_hidden: int = option(
        2048,
        "units of the dense layer before the vocabulary of a GPT, 0 = none",
        minimum=0,
        cost="of a GPT (C + 1)·head_hidden + (head_hidden − C)·V",
    )
    wavelet_module: str = option(
        "haar",
        "moving averages of wavelet_gpt: haar, learnable, ema, or a discrete wavelet of PyWavelets"
        " such as db2",
        cost="learnable: every window of every averaged channel, N − 1 times",
    )
    wavelet_fraction: float = option(
        0.5, "share of the channels of wavelet_gpt that they average", above=0, maximum=1
    )
    wavelet_shared_kernels: bool = option(
        False,
        "one learnable kernel per level in place of one per channel",
        cost="learnable: every level's window, N − 1 times",
    )

    def stabilized(self, name: str) -> bool:
        """Whether the switch `stab_<name>` is on, itself or through stable_parametrization."""
        return self.stable_parametrization or getattr(self, f"stab_{name}")

    @property
    def n_scales(self) -> int:
        return 2**self.levels if self.wavelet_packets else self.levels + 1

    @property
    def padded_channels(self) -> int:
        """Channels inside a block's wavelet branch: a power of two where the Hadamard needs it."""
        return 1 << (self.C - 1).bit_length() if self.mixer_transform == "fwht" else self.C

    @property
    def mixer_widths(self) -> tuple[int, ...]:
        """Width of each scale's mixer in channels, coarse to fine."""
        fractions = self.per_scale_mixer_widths or (1.0,) * self.n_scales
        return tuple(max(1, int(self.padded_channels * fraction)) for fraction in fractions)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it becomes batches of tokens."""

    dataset: str = option(
        "wikitext-103",
        "built-in name (python-stdlib, wikitext-103, wikitext-2, pg19, text8, enwik8, tinystories,"
        " openwebtext), a file or folder of text (of what the tokenizer reads), or a hub data set"
        " NAME[:CONFIG]",
    )
    tokenizer: str = option(
        "auto",
        "gpt2, sentencepiece:VOCAB, bytes, char, or auto: what suits the data set; for files of"
        " audio mulaw or pcm8, of music midi, of EnCodec's codes encodec[:CODEBOOK], of images"
        " pixels or pixels_rgb",
    )
    split: tuple[float, ...] = option(
        (0.9, 0.05, 0.05),
        "train, valid, test fractions of data that has no splits of its own",
        minimum=0,
        maximum=1,
    )
    data_order: str = option(
        "random", "random crops, or sequential streams", choices=("random", "sequential")
    )
    block_size: int = option(256, "positions of a training window", minimum=1)
    cache_dir: str = option(
        "~/.cache/wavelet_lm", "folder of the encoded texts; they are rebuilt when missing"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation, its schedule, and what a run writes."""

    epochs: float = option(5, "passes over the training tokens", above=0)
    max_steps: int | None = option(None, "optimizer steps, in place of epochs", minimum=1)
    micro_batch_size: int = option(8, "windows per forward pass", minimum=1)
    grad_accum: int = option(1, "forward passes per optimizer step", minimum=1)
    optimizer: str = option(
        "Adagrad",
        "optimizer; Muon takes the matrices and leaves the rest to AdamW",
        choices=("Adagrad", "AdamW", "Muon", "Adagrad8bit", "AdamW8bit"),
    )
    optimizer_eps: float = option(2e-13, "its epsilon", above=0)
    adam_betas: tuple[float, ...] = option(
        (0.9, 0.95), "moment decays of AdamW", minimum=0, maximum=0.99999
    )
    lr: float = option(0.01, "peak learning rate", above=0)
    min_lr: float = option(2e-4, "learning rate at the end of the cosine", minimum=0)
    weight_decay: float = option(
        1e-6, "weight decay: Adagrad's on all parameters, the others' on matrices", minimum=0
    )
    warmup_fraction: float = option(
        0.3, "share of the steps with a linear warm-up", minimum=0, maximum=1
    )
    grad_clip: float = option(1.0, "largest gradient norm, 0 = no clipping", minimum=0)
    use_amp: bool = option(True, "mixed precision (autocast)")
    amp_dtype: str = option(
        "auto",
        "its type; auto = bf16 where the GPU has it, else fp16, and fp32 on a CPU",
        choices=("auto", "fp16", "bf16", "fp32"),
    )
    allow_tf32: bool = option(True, "TensorFloat-32 for float32 products on CUDA")
    compile: bool | str = option(
        "auto",
        "torch.compile: true stops where it cannot, auto compiles on CUDA where it can",
        choices=("auto", True, False),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU if there is one")
    threads: int | str = option(
        "auto",
        "threads that compute on the CPU; auto = as many as it has cores for this process and its"
        " quota allows, or OMP_NUM_THREADS",
        minimum=1,
        maximum=1024,
        word="auto",
    )
    seed: int = option(1337, "seed of every random generator", minimum=0, maximum=2**32 - 1)
    eval_interval: int = option(250, "steps between validations", minimum=1)
    eval_batches: int = option(
        50,
        "batches of a validation, of micro_batch_size · grad_accum windows each, evenly spaced, the"
        " same each time",
        minimum=1,
    )
    log_interval: int = option(10, "steps between lines of metrics.jsonl", minimum=1)
    save_interval: int = option(1000, "steps between saves of the last checkpoint", minimum=1)
    skip_warmup_saves: bool = option(True, "write no best checkpoint during warm-up")
    init_from: str = option("", "run or checkpoint file whose weights to start from")
    out_dir: str = option("logs", "folder in which the run folder is made")
    runs_file: str | None = option("runs.md", "table to which a finished run adds its row")
    benchmark_only: bool = option(False, "evaluate benchmark_run_dir and do not train")
    benchmark_run_dir: str = option("", "run folder for benchmark_only")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The sample at the end of training, and the defaults of generate.py for the run."""

    generation_prompt: str = option("The history of", "text to continue")
    num_new_tokens: int = option(512, "tokens to generate", minimum=1)
    temperature: float = option(1.0, "softmax temperature, 0 = greedy", minimum=0, maximum=1e30)
    top_k: int = option(0, "sample among the k likeliest tokens, 0 = all", minimum=0)
    top_p: float = option(
        0.95, "sample among the fewest tokens that hold this probability", minimum=1e-30, maximum=1
    )
    repetition_penalty: float = option(
        1.1,
        "divides the positive logits of tokens seen before, multiplies the others",
        minimum=1e-30,
        maximum=1e30,
    )


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How generate.py and evaluation quantize the weights of the run, unless told otherwise."""

    quantize_enabled: bool = option(False, "read the run with quantized weights (--ptq8)")
    quantize_backend: str = option(
        "native",
        "whose products read them; bitsandbytes has 8 and 4 bits (LLM.int8, NF4), torchao 8",
        choices=("native", "torchao", "bitsandbytes"),
    )
    quantize_bits: int = option(8, "bits of a weight, 16 = not quantized", choices=BITS)
    quantize_mixer_coarse_bits: int | None = option(
        None, "those of the mixers of scales 0 to 2; none = quantize_bits", choices=BITS
    )
    quantize_mixer_mid_bits: int | None = option(
        None, "of the mixers of scales 3 to 5", choices=BITS
    )
    quantize_mixer_fine_bits: int | None = option(
        None, "of the mixers of the other scales", choices=BITS
    )
    quantize_mlp_bits: int | None = option(None, "of the MLPs", choices=BITS)
    quantize_lifting_bits: int | None = option(None, "of the lifting nets", choices=BITS)
    quantize_embedding_bits: int | None = option(
        None, "of the embedding, and of a head that is tied to it", choices=BITS
    )
    quantize_group_size: int = option(
        64, "weights of a row that share a scale, below 8 bits", choices=(32, 64, 128, 256)
    )


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig, DataConfig, TrainingConfig, GenerationConfig, QuantizationConfig):
    """All options. Construction validates: `ConfigError` names the key at fault."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        _check_contradictions(self)

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
        """Read a flat JSON file; keyword overrides win over its values."""
        return cls.from_dict({**read_json_object(path), **overrides}, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_json(self) -> str:
        """One key a line, lists kept on theirs, in the order of declaration."""
        lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in self.to_dict().items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def replace(self, **changes: Any) -> Config:
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


# --- one value -----------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ",".join(show(item) for item in value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    return str(value) if value != "" else '""'


def type_words(spec: dataclasses.Field) -> str:
    """The type of a key as people say it."""
    return {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "bool | str": "auto, true or false",
        "int | str": "auto or a whole number",
        "str": "a text",
        "str | None": "a text or none",
        "int | None": "a whole number or none",
        "tuple[float, ...]": "a list of numbers",
        "tuple[float, ...] | None": "a list of numbers or none",
        "tuple[str, ...]": "a list of texts",
    }[spec.type]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _converted(spec: dataclasses.Field, value: Any) -> Any:
    """`value` in the field's Python type; raises ValueError where it does not fit."""
    kind = spec.type
    if value is None and kind.endswith("| None"):
        return None
    if kind == "int | str" and value == spec.metadata["option"].word:
        return value
    if kind.startswith("int"):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        return value
    if kind == "float":
        if not _is_number(value):
            raise ValueError
        return float(value)
    if kind.startswith("tuple"):
        is_item = _is_number if "float" in kind else lambda item: isinstance(item, str)
        if not isinstance(value, (list, tuple)) or not value or not all(map(is_item, value)):
            raise ValueError
        return tuple(float(item) if "float" in kind else item for item in value)
    allowed = {"bool": bool, "bool | str": (bool, str)}.get(kind, str)
    if not isinstance(value, allowed):
        raise ValueError
    return value


def checked_value(key: str, value: Any) -> Any:
    """A value of `key` by itself, in its type, or a `ConfigError` that says what is allowed."""
    return _checked(FIELDS[key], value)


def _checked(spec: dataclasses.Field, value: Any) -> Any:
    """The converted value within its range, or a `ConfigError` that says what is allowed."""
    limits: Option = spec.metadata["option"]
    try:
        value = _converted(spec, value)
    except ValueError:
        raise ConfigError(f"{spec.name} is {brief(value)}; it must be {type_words(spec)}") from None
    items = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(limits.allows(item) for item in items):
        raise ConfigError(f"{spec.name} is {show(value)}; it must be {limits.range()}")
    return value


def check_values(values: Mapping[str, Any], source: str) -> None:
    """Every key is known and every value allowed by itself, whatever the other keys say."""
    for key, value in values.items():
        if key == CHANGES:
            continue
        if key not in FIELDS:
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(key, FIELDS)}")
        try:
            _checked(FIELDS[key], value)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


def parse_value(key: str, text: str) -> Any:
    """The value of `key` from its command-line form (`none`, `true`, `1,1,.5`, `0.02`, …)."""
    spec = FIELDS[key]
    kind = spec.type
    word = text.strip().lower()
    try:
        if word == "none" and kind.endswith("| None"):
            return None
        if kind.startswith("bool"):
            return {"true": True, "1": True, "false": False, "0": False, "auto": "auto"}[word]
        if kind == "int | str" and word == spec.metadata["option"].word:
            return word
        if kind.startswith("int"):
            return int(text)
        if kind == "float":
            return float(text)
        if kind.startswith("tuple"):
            items = text.strip("[]() ").split(",")
            return tuple(float(item) if "float" in kind else item.strip() for item in items)
    except (ValueError, KeyError):
        raise ConfigError(f"--{key} is {text!r}; it must be {type_words(spec)}") from None
    return text


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint with the most similar known key, or nothing when none is similar."""
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


# --- keys that contradict each other -------------------------------------------------------------

MAX_PACKET_LEVELS = 6


def _check_contradictions(c: Config) -> None:
    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise ConfigError(message)

    refuse(
        c.wavelet_packets and c.levels > MAX_PACKET_LEVELS,
        f"wavelet_packets doubles the scales with every level and levels is {c.levels};"
        f" use levels {MAX_PACKET_LEVELS} or less",
    )
    _check_baseline(c, refuse)
    widths = c.per_scale_mixer_widths
    packets = " with wavelet_packets" if c.wavelet_packets else ""
    refuse(
        widths is not None and len(widths) != c.n_scales,
        f"per_scale_mixer_widths has {len(widths or ())} entries but levels {c.levels}{packets}"
        f" makes {c.n_scales} scales; give {c.n_scales} or none",
    )
    refuse(
        c.wavelet_crawl and c.wavelet_crawl_k % 2 == 0,
        f"wavelet_crawl_k is {c.wavelet_crawl_k}; it must be odd",
    )
    refuse(
        c.cross_scale_gating and not c.use_mixer_gate,
        "cross_scale_gating routes what the gates read and use_mixer_gate is false;"
        " set cross_scale_gating to false",
    )
    refuse(
        c.wavelet_mode == "haar" and c.wavelet_crawl,
        "wavelet_mode haar has fixed filters and cannot crawl; set wavelet_crawl to false",
    )
    refuse(
        c.multi_basis_lifting and c.shared_lifting_weights,
        "multi_basis_lifting needs wavelets of its own in every block;"
        " set shared_lifting_weights to false",
    )
    refuse(
        c.fwpkm_inference_updates and not c.fwpkm_enabled,
        "fwpkm_inference_updates adapts the second memory, which is off; set fwpkm_enabled to true",
    )
    refuse(
        c.decompose_bypass_ema and not c.decompose_bypass,
        "decompose_bypass_ema is a form of decompose_bypass, which is off; set it to true",
    )
    for key in ("mixer_depth_stabilizers", "mixer_depth_residuals"):
        refuse(
            getattr(c, key) and c.mixer_depth == 1,
            f"{key} acts on stacked mixers and mixer_depth is 1; raise mixer_depth or drop {key}",
        )
    refuse(
        c.mixer_exp_parametrization and c.stab_spectral_norm,
        "mixer_exp_parametrization starts near the identity by itself; drop stab_spectral_norm",
    )
    for key in ("multi_basis_lifting", "untied_reconstruction", "lifting_data_dependent"):
        refuse(
            c.wavelet_mode == "haar" and bool(getattr(c, key)),
            f"wavelet_mode haar has fixed filters and no {key}; set {key} to"
            f" {show(FIELDS[key].default)}",
        )
    refuse(
        c.hadamard_top_k > c.padded_channels and not c.multinodal_enabled,
        f"hadamard_top_k is {c.hadamard_top_k} and a scale has {c.padded_channels} coefficients;"
        " give less, or 0 for all",
    )
    refuse(
        c.skip_proj_out and c.padded_channels != c.C,
        f"skip_proj_out needs C to be a power of two with mixer_transform fwht, and C is {c.C};"
        f" use C {c.padded_channels}, mixer_transform identity, or keep the projection",
    )
    for memory in ("pkm", "fwpkm"):
        keys, heads = getattr(c, f"{memory}_num_keys"), getattr(c, f"{memory}_heads")
        enabled = c.model == "wavelet_lm" and getattr(c, f"{memory}_enabled")
        refuse(
            enabled and math.isqrt(keys) ** 2 != keys,
            f"{memory}_num_keys is {keys}; it must be a square number such as"
            f" {math.isqrt(keys) ** 2 or 1}",
        )
        refuse(
            enabled and c.C % (2 * heads) != 0,
            f"{memory}_heads is {heads}; C ({c.C}) must be divisible by twice the heads",
        )
    for key in ("multinodal_features_per_cell", "multinodal_cross_cell_gating"):
        refuse(
            bool(getattr(c, key)) and not c.multinodal_enabled,
            f"{key} is a part of multinodal_enabled, which is off; set it to true",
        )
    if c.multinodal_enabled:
        refuse(
            c.multinodal_features_per_cell > c.multinodal_cell_dim,
            f"multinodal_features_per_cell is {c.multinodal_features_per_cell}, more than"
            f" multinodal_cell_dim {c.multinodal_cell_dim}",
        )
        refuse(
            c.multinodal_cross_cell_gating and c.multinodal_num_cells == 1,
            "multinodal_cross_cell_gating needs other cells and multinodal_num_cells is 1",
        )
        try:
            cell_config(c)
        except ConfigError as error:
            raise ConfigError(f"multinodal_cell_dim is the C of a cell, and {error}") from None
    refuse(
        len(c.split) != 3 or abs(sum(c.split) - 1) > 1e-6 or min(c.split[:2]) <= 0,
        f"split is {show(c.split)}; it must be three fractions that sum to 1"
        " (train and valid above 0)",
    )
    refuse(len(c.adam_betas) != 2, f"adam_betas is {show(c.adam_betas)}; it must be two numbers")
    refuse(c.min_lr > c.lr, f"min_lr ({show(c.min_lr)}) is above lr ({show(c.lr)})")
    refuse(
        c.benchmark_only and not c.benchmark_run_dir,
        "benchmark_only needs benchmark_run_dir, the run folder to evaluate",
    )


# Switches of the wavelet model that would change what a GPT is, and it has none of.
WAVELET_LM_ALONE = (
    "looped_blocks",
    "loop_iterations",
    "stochastic_depth_rate",
    "stable_parametrization",
    "fwpkm_inference_updates",
    "multinodal_enabled",
)
WAVELET_GPT_ALONE = ("wavelet_module", "wavelet_fraction", "wavelet_shared_kernels")


def _check_baseline(c: Config, refuse: Callable[[bool, str], None]) -> None:
    """Keys at odds with model gpt or wavelet_gpt, and those that only wavelet_gpt reads."""

    def is_set(key: str) -> bool:
        return getattr(c, key) != FIELDS[key].default

    if c.model != "wavelet_gpt":
        for key in WAVELET_GPT_ALONE:
            refuse(
                is_set(key),
                f"{key} is {show(getattr(c, key))} and model {c.model} has no moving averages;"
                f" set it to {show(FIELDS[key].default)} or use model wavelet_gpt",
            )
    refuse(
        c.wavelet_shared_kernels and c.wavelet_module != "learnable",
        f"wavelet_shared_kernels is for learnable kernels and wavelet_module is {c.wavelet_module};"
        " use wavelet_module learnable",
    )
    if c.model == "wavelet_lm":
        return
    for key in WAVELET_LM_ALONE:
        refuse(
            is_set(key),
            f"{key} belongs to model wavelet_lm and model is {c.model}; set it to"
            f" {show(FIELDS[key].default)}",
        )
    refuse(
        c.C % c.heads != 0,
        f"heads is {c.heads}; C ({c.C}) must be divisible by it",
    )
    refuse(
        c.tie_embedding_to_lm_head and c.head_hidden not in (0, c.C),
        f"tie_embedding_to_lm_head needs a head of C ({c.C}) inputs and head_hidden is"
        f" {c.head_hidden}; set head_hidden to 0",
    )


def cell_config(config: Config) -> Config:
    """The config of one cell of a multinodal model."""
    return config.replace(
        C=config.multinodal_cell_dim,
        multinodal_enabled=False,
        multinodal_features_per_cell=0,
        multinodal_cross_cell_gating=False,
    )
