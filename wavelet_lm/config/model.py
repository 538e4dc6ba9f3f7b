"""The options of the network.

One room, though a long one: a list of declarations, in the order in which the network uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

from wavelet_lm.config.option import option

# The lags of the last level reach back 2^levels positions.
MAX_LEVELS = 24


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network; [How it works](how-it-works.md) says what the keys are about."""

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
        maximum=MAX_LEVELS,
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
    delta_memory: bool = option(
        False,
        "memory that recalls details: a matrix per head, written and read by the gated delta rule",
        cost="N·(Hd·(2·dk·(C + delta_bands·Cp) + 3·dv·C + 2·C + 2) + dv)",
    )
    delta_heads: int = option(
        4, "its heads", minimum=1, cost="N·Hd·(2·dk·(C + delta_bands·Cp) + 3·dv·C + 2·C + 2)"
    )
    delta_key_dim: int = option(
        32, "length of its keys", minimum=1, cost="N·Hd·2·dk·(C + delta_bands·Cp)"
    )
    delta_value_dim: int = option(32, "length of its values", minimum=1, cost="N·dv·(3·Hd·C + 1)")
    delta_bands: int = option(
        1,
        "finest details that its queries and keys are made of, beside the block's input",
        minimum=0,
        cost="N·Hd·2·dk·delta_bands·Cp",
    )
    delta_activation: str = option(
        "silu",
        "that of its queries and keys; square takes the products of all pairs of their numbers, so"
        " that few weights make long keys, and unlike ones are farther apart",
        choices=("silu", "identity", "square"),
    )
    delta_after_mixing: bool = option(
        False,
        "it reads the signal with the mixed scales added, after a norm of its own, in place of the"
        " block's input",
        cost="2·N·C",
    )
    delta_horizons: tuple[float, ...] = option(
        (4, 150),
        "positions after which its first and its last head have forgotten most, before training;"
        " the others lie between",
        above=1,
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
    embedding_std: float | None = option(
        None, "standard deviation of a new embedding; none = 1/sqrt(C)", above=0
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
    mlp_activation: str = option(
        "gelu", "its activation; relu2 is the square of relu", choices=("gelu", "relu2")
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
    gradient_checkpointing: bool | int = option(
        False,
        "recompute a block's activations in the backward pass to save memory: of all blocks, or of"
        " the first N of each pass",
        minimum=0,
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

    def recomputed(self, n_blocks: int) -> int:
        """How many of the n blocks of a pass, from the first on, backward runs again."""
        chosen = self.gradient_checkpointing
        return n_blocks * chosen if isinstance(chosen, bool) else chosen

    @property
    def n_scales(self) -> int:
        """S, the bands of the wavelet: L + 1, or 2^L of packets."""
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


# What the baselines read of these, as `--help` shows them; the wavelet model reads all others.
GPT_KEYS = (
    "model",
    "C",
    "layers",
    "heads",
    "gpt_mlp_expansion",
    "head_hidden",
    "tie_embedding_to_lm_head",
    "dropout_embedding",
    "dropout_projection",
    "dropout_mlp",
    "dropout_lm_head",
    "gradient_checkpointing",
)
WAVELET_GPT_KEYS = ("wavelet_module", "wavelet_fraction", "wavelet_shared_kernels")


def keys_read_by(model: str) -> set[str]:
    """The keys of `ModelConfig` that a model of this name reads."""
    if model == "gpt":
        return set(GPT_KEYS)
    if model == "wavelet_gpt":
        return {*GPT_KEYS, *WAVELET_GPT_KEYS}
    others = {"heads", "gpt_mlp_expansion", "head_hidden", *WAVELET_GPT_KEYS}
    return set(ModelConfig.__dataclass_fields__) - others
