"""Which published tensor holds which parameter of ours.

The published layout keeps a module under every name by which it is reached: the lifting nets also
appear inside the reconstruction, and again in every block that shares them. Such repeats are one
tensor here, with several names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from wavelet_lm.config import Config, cell_config

GATED_MIXER = {"W": "mixer.weight", "G": "gate.weight", "U": "U", "V": "V"}
NETS = {"predict": "predict_nets", "update": "update_nets"}
AFFINE = ("weight", "bias")


@dataclass(frozen=True)
class Source:
    """Where the values of a parameter lie.

    parts: names in the published file. Those of one part hold the same tensor; several parts are
        stacked.
    row: the row of that tensor to take and how many it has, None for all of it.
    """

    parts: tuple[tuple[str, ...], ...]
    row: tuple[int, int] | None = None


@dataclass
class Layout:
    """Sources by our parameter names, and the published names that no forward pass reads."""

    sources: dict[str, Source] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)

    def one(self, ours: str, *theirs: str, row: tuple[int, int] | None = None) -> None:
        """A tensor of ours is theirs, or the row `row` of it, by any of its names."""
        self.sources[ours] = Source((theirs,), row)

    def affine(self, ours: str, theirs: str) -> None:
        """A weight and a bias of ours are theirs."""
        for name in AFFINE:
            self.one(f"{ours}.{name}", f"{theirs}.{name}")

    def stack(self, ours: str, theirs: Iterable[str]) -> None:
        """A tensor of ours is several of theirs, stacked."""
        self.sources[ours] = Source(tuple((name,) for name in theirs))

    def include(self, other: Layout, prefix: str) -> None:
        """Take over another layout, every name of both sides behind `prefix`."""
        for ours, source in other.sources.items():
            parts = tuple(tuple(prefix + name for name in part) for part in source.parts)
            self.sources[prefix + ours] = Source(parts, source.row)
        self.unread |= {prefix + name for name in other.unread}


def published_layout(config: Config) -> Layout:
    """The layout of the model that the config describes, an ensemble or a single one."""
    if not config.multinodal_enabled:
        return _network(config)
    layout, cell = Layout(), _network(cell_config(config))
    for i in range(config.multinodal_num_cells):
        layout.include(cell, f"cells.{i}.")
    if config.multinodal_cross_cell_gating:
        depth = config.looped_blocks_count if config.looped_blocks else config.layers
        n_gates, rest = divmod(depth, config.multinodal_cross_cell_gate_interval)
        for i in range(n_gates):
            layout.one(f"gates.{i}.proj.weight", f"cross_cell_gates.{i}.proj.weight")
        if rest:  # made for the blocks after the last full interval, and never called
            layout.unread.add(f"cross_cell_gates.{n_gates}.proj.weight")
    return layout


def _network(config: Config) -> Layout:
    layout = Layout()
    if config.tie_embedding_to_lm_head:
        layout.one("embedding.weight", "token_embedding.weight", "lm_head.weight")
    else:
        layout.one("embedding.weight", "token_embedding.weight")
        layout.one("head.weight", "lm_head.weight")
    layout.affine("final_norm", "final_ln")
    n_blocks = 1 if config.looped_blocks else config.layers
    homes = [f"layers.{i}." for i in range(n_blocks)]
    for i, home in enumerate(homes):
        _block(layout, f"blocks.{i}.", home, config)
    if config.wavelet_mode == "lifting":
        for i, owners in enumerate([homes] if config.shared_lifting_weights else zip(homes)):
            _wavelet(layout, f"wavelets.{i}.", list(owners), config)
    return layout


def _block(layout: Layout, ours: str, theirs: str, config: Config) -> None:
    scales = range(config.n_scales)
    layout.affine(f"{ours}norm1", f"{theirs}ln1")
    layout.one(f"{ours}scale_weights", f"{theirs}scale_weights")
    if config.per_layer_embedding:
        layout.one(f"{ours}embedding_gain", f"{theirs}embedding_residual_gamma")
    if config.decompose_bypass:
        layout.one(f"{ours}bypass.gains", f"{theirs}history_gains")
        mix = "cross_layer_mix.weight"
        layout.one(f"{ours}bypass.{mix}", theirs + mix)
    if config.learned_residual:
        layout.one(f"{ours}spectral_gain.gain", f"{theirs}residual_alpha_spectral")
        layout.one(f"{ours}feedforward_gain.gain", f"{theirs}residual_alpha_mlp")
    if not config.skip_proj_out:
        layout.affine(f"{ours}projection", f"{theirs}proj_out")
    norms = {
        "decomposed_norm": ("decomp_norms", config.wavelet_decomp_norm),
        "mixed_norm": ("recon_norms", config.wavelet_recon_norm),
    }
    for norm, (published, used) in norms.items():
        for name in AFFINE if used else ():
            layout.stack(
                f"{ours}{norm}.{name}", [f"{theirs}{published}.{s}.{name}" for s in scales]
            )
    _mixer(layout, f"{ours}mixer.", theirs, config)
    _feedforward(layout, f"{ours}feedforward.", theirs, config)


def _mixer(layout: Layout, ours: str, theirs: str, config: Config) -> None:
    scales, last = range(config.n_scales), config.mixer_depth - 1
    if config.cross_scale_gating:
        layout.one(f"{ours}routing", f"{theirs}scale_routing")
    elif not config.use_mixer_gate:
        layout.unread.add(f"{theirs}scale_routing")
    for s in scales:
        if last:
            place = f"{theirs}scale_mixers_by_depth.{last}.{s}."
        else:
            place = f"{theirs}scale_mixers.{s}."
        _scale_mixer(layout, f"{ours}scales.{s}.", place, config, s)
    for d in range(last):
        stacked, places = f"{ours}stacked.{d}.", f"{theirs}scale_mixers_by_depth.{d}."
        for s in scales:
            _scale_mixer(layout, f"{stacked}scales.{s}.", f"{places}{s}.", config, s)
        layout.stack(f"{stacked}bias", [f"{places}{s}.bias" for s in scales])
        for name in AFFINE:
            norms = [f"{theirs}mixer_depth_norms.{d}.{s}.{name}" for s in scales]
            layout.stack(f"{stacked}norm.{name}", norms)
        if config.mixer_depth_stabilizers:
            layout.one(f"{stacked}input_gain.gain", f"{theirs}mixer_depth_betas.{d}")
            layout.one(f"{stacked}output_gain.gain", f"{theirs}mixer_depth_alphas.{d}")


def _scale_mixer(layout: Layout, ours: str, theirs: str, config: Config, s: int) -> None:
    if config.mixer_widths[s] != config.padded_channels:
        layout.one(f"{ours}A", f"{theirs}proj_in.weight")
        layout.one(f"{ours}B", f"{theirs}proj_out.weight")
        ours += "mixer."
    if config.per_scale_mixer_widths is not None:
        theirs += "mixer."
    names = "W" + "G" * config.use_mixer_gate + "UV" * (config.low_rank > 0)
    for name in names:
        layout.one(ours + name, theirs + GATED_MIXER[name])


def _feedforward(layout: Layout, ours: str, theirs: str, config: Config) -> None:
    branches = []
    if config.mlp_expansion:
        branches.append("mlp")
        for j in range(config.mlp_layers):  # activations take the odd numbers
            layout.affine(f"{ours}branches.mlp.linears.{j}", f"{theirs}ffwd.net.{2 * j}")
    for memory in ("pkm", "fwpkm"):
        if getattr(config, f"{memory}_enabled"):
            branches.append(memory)
            branch = f"{ours}branches.{memory}."
            layout.one(f"{branch}query.weight", f"{theirs}{memory}.query_proj.weight")
            layout.one(f"{branch}keys_a.weight", f"{theirs}{memory}.keys_a")
            layout.one(f"{branch}keys_b.weight", f"{theirs}{memory}.keys_b")
            layout.one(f"{branch}values.weight", f"{theirs}{memory}.values.weight")
    for branch in branches:
        layout.one(f"{ours}gains.{branch}.gain", f"{theirs}alpha_{branch}")
    if branches:
        layout.affine(f"{ours}norm", f"{theirs}ln2")
    else:
        layout.unread |= {f"{theirs}ln2.{name}" for name in AFFINE}


def _wavelet(layout: Layout, ours: str, owners: list[str], config: Config) -> None:
    def everywhere(*places: str) -> list[str]:
        return [owner + place for owner in owners for place in places]

    reconstruct = "lifting_reconstruct."
    if config.multi_basis_lifting:
        for b in range(len(config.multi_basis_inits)):
            places = everywhere(
                f"lifting_wavelet.wavelets.{b}.",
                f"{reconstruct}multi_basis.wavelets.{b}.",
                f"{reconstruct}reconstructs.{b}.decompose.",
            )
            _lifting(layout, f"{ours}bases.{b}.", places, config)
        places = everywhere("lifting_wavelet.", f"{reconstruct}multi_basis.")
        layout.one(f"{ours}weights", *(f"{place}basis_weights" for place in places))
    elif config.untied_reconstruction:
        _lifting(layout, ours, everywhere("lifting_wavelet."), config)
        own = everywhere("lifting_reconstruct_wavelet.", f"{reconstruct}decompose.")
        _nets(layout, f"{ours}own_update", own, "update_nets", config)
        # The second wavelet is whole, but only its update nets are called.
        spare = Layout()
        _lifting(spare, "", own, config)
        used = {name for part in layout.sources.values() for names in part.parts for name in names}
        names = (name for part in spare.sources.values() for name in part.parts[0])
        layout.unread |= {name for name in names if name not in used}
    else:
        places = everywhere("lifting_wavelet.", f"{reconstruct}decompose.")
        _lifting(layout, ours, places, config)


def _lifting(layout: Layout, ours: str, places: list[str], config: Config) -> None:
    for net, published in NETS.items():
        _nets(layout, ours + net, places, published, config)
    if config.wavelet_crawl:
        logits = [f"{place}dilation_logits" for place in places]
        for k in range(config.levels):
            layout.one(f"{ours}delays.{k}.logits", *logits, row=(k, config.levels))


def _nets(layout: Layout, ours: str, places: list[str], published: str, config: Config) -> None:
    inner = [""] if config.lifting_linear_only else ["0.", "3."]
    for k in range(config.levels):
        for name in (i + a for i in inner for a in AFFINE):
            layout.one(f"{ours}.{k}.{name}", *(f"{p}{published}.{k}.{name}" for p in places))
