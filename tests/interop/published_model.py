"""A published checkpoint of random numbers, and its function written down once more.

Both work on the dictionary of published names alone and know nothing of the package.
"""

import json
import math
from itertools import pairwise

import torch
from torch.nn.functional import gelu, layer_norm, pad, relu, silu, softmax

VOCAB = 11

# The headline model, and the smaller recipe of the family, at a size for tests.
HEADLINE = {
    "C": 8,
    "layers": 2,
    "levels": 3,
    "low_rank": 2,
    "mlp_expansion": 2,
    "mlp_layers": 2,
    "pkm_enabled": True,
    "pkm_num_keys": 16,
    "pkm_top_k": 3,
    "pkm_heads": 1,
    "fwpkm_enabled": True,
    "fwpkm_num_keys": 25,
    "fwpkm_top_k": 7,
    "fwpkm_heads": 2,
    "wavelet_mode": "lifting",
    "shared_lifting_weights": True,
    "wavelet_crawl": True,
    "wavelet_crawl_k": 3,
    "lifting_hidden_mult": 1,
    "cross_scale_gating": True,
    "per_scale_mixer_widths": [1.0, 1.0, 0.5, 0.3],
    "use_mixer_gate": True,
    "mixer_gate_activation": "silu",
    "mixer_transform": "fwht",
    "mixer_depth": 1,
    "decompose_bypass": True,
    "learned_residual": True,
    "per_layer_embedding": True,
    "skip_proj_out": False,
    "tie_embedding_to_lm_head": False,
}
MINI = {
    **HEADLINE,
    "C": 6,
    "layers": 3,
    "mlp_expansion": 0,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    "wavelet_crawl_k": 33,
    "wavelet_decomp_norm": True,
    "wavelet_recon_norm": True,
    "mixer_transform": "identity",
    "skip_proj_out": True,
    "tie_embedding_to_lm_head": True,
}


def padded(c):
    return 2 ** math.ceil(math.log2(c["C"])) if c["mixer_transform"] == "fwht" else c["C"]


def on(c, key):
    return c.get(key, False)


def write(folder, config, tensors, training_keys=None):
    """`best_model.pt` and `config.json` in a folder; the path of the first."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "best_model.pt")
    (folder / "config.json").write_text(json.dumps({**config, **(training_keys or {})}))
    return folder / "best_model.pt"


# --- the file ------------------------------------------------------------------------------------


def random_checkpoint(c, seed=0, dtype=torch.float64):
    """The state_dict that the published program would save for the config."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return (0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    if on(c, "multinodal_enabled"):
        cell = {**c, "C": c["multinodal_cell_dim"], "multinodal_enabled": False}
        tensors = {}
        for i in range(c["multinodal_num_cells"]):
            for name, value in random_checkpoint(cell, seed + 1 + i, dtype).items():
                tensors[f"cells.{i}.{name}"] = value
        if on(c, "multinodal_cross_cell_gating"):
            every = c.get("multinodal_cross_cell_gate_interval", 1)
            for g in range(math.ceil(c["layers"] / every)):
                tensors[f"cross_cell_gates.{g}.proj.weight"] = tensor(cell["C"], cell["C"])
        return tensors

    C, Cp, L, S = c["C"], padded(c), c["levels"], c["levels"] + 1
    t = {"token_embedding.weight": tensor(VOCAB, C)}
    tied = on(c, "tie_embedding_to_lm_head")
    t["lm_head.weight"] = t["token_embedding.weight"] if tied else tensor(VOCAB, C)

    def put(prefix, **shapes):
        t.update({prefix + name: tensor(*shape) for name, shape in shapes.items()})

    def wavelet(crawl):
        hidden, w = Cp * c["lifting_hidden_mult"], {}
        for net in ("predict_nets", "update_nets"):
            for k in range(L):
                shapes = {f"{k}.0": (hidden, Cp), f"{k}.3": (Cp, hidden)}
                for name, shape in ({f"{k}": (Cp, Cp)} if linear else shapes).items():
                    w[f"{net}.{name}.weight"] = tensor(*shape)
                    w[f"{net}.{name}.bias"] = tensor(shape[0])
        if crawl:
            w["dilation_logits"] = tensor(L, c["wavelet_crawl_k"])
        return w

    def multi_basis():
        w = {"basis_weights": tensor(2, S)}
        for b in range(2):
            w |= {f"wavelets.{b}.{name}": value for name, value in wavelet(crawl).items()}
        return w

    def mixer(prefix, width, bias=False):
        put(prefix, **{"mixer.weight": (width, width)})
        if c["use_mixer_gate"]:
            put(prefix, **{"gate.weight": (width, width)})
        if c["low_rank"]:
            put(prefix, U=(width, c["low_rank"]), V=(width, c["low_rank"]))
        if bias:
            put(prefix, bias=(width,))

    linear, crawl = on(c, "lifting_linear_only"), on(c, "wavelet_crawl")
    shared = None
    for i in range(c["layers"]):
        p = f"layers.{i}."
        put(p, scale_weights=(S,))
        put(p, **{f"ln{j}.{name}": (C,) for j in (1, 2) for name in ("weight", "bias")})
        if c["decompose_bypass"]:
            put(p, history_gains=(S, C), **{"cross_layer_mix.weight": (C, C)})
        if on(c, "cross_scale_gating"):
            put(p, scale_routing=(S, S))
        if c["learned_residual"]:
            put(p, residual_alpha_spectral=(), residual_alpha_mlp=())
        if on(c, "per_layer_embedding"):
            put(p, embedding_residual_gamma=(C,))
        if not (on(c, "skip_proj_out") and C == Cp):
            put(p + "proj_out.", weight=(C, Cp), bias=(C,))
        for norm in ("decomp", "recon"):
            if on(c, f"wavelet_{norm}_norm"):
                for s in range(S):
                    put(f"{p}{norm}_norms.{s}.", weight=(Cp,), bias=(Cp,))
        if c["wavelet_mode"] == "lifting":
            multi = on(c, "multi_basis_lifting")
            w = multi_basis() if multi else wavelet(crawl)
            if on(c, "shared_lifting_weights"):
                w = shared = shared or w
            again = {f"lifting_wavelet.{name}": value for name, value in w.items()}
            if on(c, "untied_reconstruction"):
                w = wavelet(crawl)
                again |= {f"lifting_reconstruct_wavelet.{name}": v for name, v in w.items()}
            if multi:
                again |= {f"lifting_reconstruct.multi_basis.{name}": v for name, v in w.items()}
                for name, value in w.items():
                    if name.startswith("wavelets."):
                        _, b, rest = name.split(".", 2)
                        again[f"lifting_reconstruct.reconstructs.{b}.decompose.{rest}"] = value
            else:
                again |= {f"lifting_reconstruct.decompose.{name}": v for name, v in w.items()}
            t.update({p + name: value for name, value in again.items()})
        D, widths = c["mixer_depth"], c.get("per_scale_mixer_widths")
        for s in range(S):
            if D > 1:
                for d in range(D):
                    mixer(f"{p}scale_mixers_by_depth.{d}.{s}.", Cp, bias=d < D - 1)
                    if d < D - 1:
                        put(f"{p}mixer_depth_norms.{d}.{s}.", weight=(Cp,), bias=(Cp,))
                continue
            width = max(1, int(Cp * widths[s])) if widths else Cp
            mixer(f"{p}scale_mixers.{s}." + ("mixer." if widths else ""), width)
            if width != Cp:
                put(f"{p}scale_mixers.{s}.proj_in.", weight=(width, Cp))
                put(f"{p}scale_mixers.{s}.proj_out.", weight=(Cp, width))
        if on(c, "mixer_depth_stabilizers"):
            for d in range(D - 1):
                put(p, **{f"mixer_depth_betas.{d}": (), f"mixer_depth_alphas.{d}": ()})
        if c["mlp_expansion"]:
            sizes = [C] + [C * c["mlp_expansion"]] * (c["mlp_layers"] - 1) + [C]
            for j, (a, b) in enumerate(pairwise(sizes)):
                put(f"{p}ffwd.net.{2 * j}.", weight=(b, a), bias=(b,))
            put(p, alpha_mlp=())
        for m in ("pkm", "fwpkm"):
            if on(c, f"{m}_enabled"):
                heads, keys = c[f"{m}_heads"], c[f"{m}_num_keys"]
                half = (heads, math.isqrt(keys), C // (2 * heads))
                put(f"{p}{m}.", keys_a=half, keys_b=half, **{"query_proj.weight": (C, C)})
                put(f"{p}{m}.", **{"values.weight": (heads * keys, C)})
                put(p, **{f"alpha_{m}": ()})
                if m == "fwpkm":
                    put(f"{p}{m}.", value_deltas=(heads * keys, C))
    put("final_ln.", weight=(C,), bias=(C,))
    return t


# --- its function --------------------------------------------------------------------------------


def reference_logits(c, t, idx):
    """Logits [T, vocab] of tokens idx [T], by the formulas, on the published names, float64."""
    t = {name.removeprefix("_orig_mod."): value.double() for name, value in t.items()}
    if on(c, "multinodal_enabled"):
        return ensemble_logits(c, t, idx)
    x = e = embed(c, t, idx)
    mean = None
    for i in range(c["layers"]):
        x, mean = block(c, below(t, f"layers.{i}."), x, e, mean)
    return head(t, x)


def below(t, prefix):
    return {name.removeprefix(prefix): v for name, v in t.items() if name.startswith(prefix)}


def embed(c, t, idx):
    scaled = on(c, "stab_embed_scaling") or on(c, "stable_parametrization")
    return t["token_embedding.weight"][idx] * (math.sqrt(c["C"]) if scaled else 1)


def norm(t, name, x):
    return layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)


def affine(t, name, x):
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def head(t, x):
    return norm(t, "final_ln", x) @ t["lm_head.weight"].T


def ensemble_logits(c, t, idx):
    c = {**c, "C": c["multinodal_cell_dim"]}
    n, every = c["multinodal_num_cells"], c.get("multinodal_cross_cell_gate_interval", 1)
    cells = [below(t, f"cells.{i}.") for i in range(n)]
    xs = es = [embed(c, cell, idx) for cell in cells]
    means = [None] * n
    for i in range(c["layers"]):
        done = [block(c, below(cells[k], f"layers.{i}."), xs[k], es[k], means[k]) for k in range(n)]
        xs, means = [x for x, _ in done], [mean for _, mean in done]
        if on(c, "multinodal_cross_cell_gating") and (i + 1) % every == 0:
            G = t[f"cross_cell_gates.{i // every}.proj.weight"]
            others = [sum(xs[j] for j in range(n) if j != k) / (n - 1) for k in range(n)]
            xs = [x * (1 + torch.tanh(o @ G.T)) for x, o in zip(xs, others, strict=True)]
    logits = [head(cell, x) for cell, x in zip(cells, xs, strict=True)]
    return sum(logits) / (1 if c.get("multinodal_combination") == "sum" else n)


def block(c, t, x, e, mean_prev):
    """x, e, μ_prev [T, C] -> x, μ."""
    C, Cp, S = c["C"], padded(c), c["levels"] + 1
    mean = torch.stack([x[: n + 1].mean(0) for n in range(len(x))])
    if on(c, "per_layer_embedding"):
        x = x + t["embedding_residual_gamma"] * e
    bands = decompose(c, t, pad(norm(t, "ln1", x), (0, Cp - C)))
    if on(c, "wavelet_decomp_norm"):
        bands = [norm(t, f"decomp_norms.{s}", bands[s]) for s in range(S)]
    if c["decompose_bypass"]:
        g = mean if mean_prev is None else mean + mean_prev @ t["cross_layer_mix.weight"].T
        bands = [bands[s] + pad(t["history_gains"][s] * g, (0, Cp - C)) for s in range(S)]
    H = hadamard(Cp) if c["mixer_transform"] == "fwht" else torch.eye(Cp, dtype=x.dtype)
    bands = [y @ H for y in mix(c, t, [band @ H for band in bands])]
    if on(c, "wavelet_recon_norm"):
        bands = [norm(t, f"recon_norms.{s}", bands[s]) for s in range(S)]
    signal = reconstruct(c, t, [bands[s] * t["scale_weights"][s] for s in range(S)])
    if "proj_out.weight" in t:
        signal = affine(t, "proj_out", signal)
    x = t.get("residual_alpha_spectral", 1) * x + signal
    h = norm(t, "ln2", x)
    x = t.get("residual_alpha_mlp", 1) * x
    if c["mlp_expansion"]:
        y = affine(t, "ffwd.net.0", h)
        for j in range(1, c["mlp_layers"]):
            y = affine(t, f"ffwd.net.{2 * j}", gelu(y))
        x = x + t["alpha_mlp"] * y
    for m in ("pkm", "fwpkm"):
        if on(c, f"{m}_enabled"):
            read = [memory(below(t, f"{m}."), row, c[f"{m}_heads"], c[f"{m}_top_k"]) for row in h]
            x = x + t[f"alpha_{m}"] * torch.stack(read)
    return x, mean


def hadamard(n):
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(n)


def shift(x, lag):
    return pad(x, (0, 0, lag, 0))[: len(x)]


def net(c, t, name, x):
    if on(c, "lifting_linear_only"):
        return affine(t, name, x)
    return affine(t, f"{name}.3", gelu(affine(t, f"{name}.0", x)))


def decompose(c, t, x):
    if c["wavelet_mode"] == "haar":
        details = []
        for k in range(c["levels"]):
            past = shift(x, 2**k)
            x, detail = (x + past) / math.sqrt(2), (x - past) / math.sqrt(2)
            details.insert(0, detail)
        return [x, *details]
    t = below(t, "lifting_wavelet.")
    if not on(c, "multi_basis_lifting"):
        return lifting(c, t, x)
    bases = [lifting(c, below(t, f"wavelets.{b}."), x) for b in range(2)]
    w = softmax(t["basis_weights"], 0)
    return [sum(w[b, s] * bases[b][s] for b in range(2)) for s in range(c["levels"] + 1)]


def lifting(c, t, x):
    details = []
    for k in range(c["levels"]):
        past = shift(x, 2**k)
        if "dilation_logits" in t:
            K = c["wavelet_crawl_k"]
            first = max(1, 2**k - K // 2)
            w = softmax(t["dilation_logits"][k], 0)
            past = sum(w[j] * shift(x, first + j) for j in range(K))
        detail = (past - net(c, t, f"predict_nets.{k}", x)) / math.sqrt(2)
        x = (x + net(c, t, f"update_nets.{k}", detail)) / math.sqrt(2)
        details.insert(0, detail)
    return [x, *details]


def reconstruct(c, t, bands):
    def back(t):
        x = bands[0]
        for k, detail in zip(reversed(range(c["levels"])), bands[1:], strict=True):
            x = math.sqrt(2) * x - net(c, t, f"update_nets.{k}", detail)
        return x

    if c["wavelet_mode"] == "haar":
        x = bands[0]
        for detail in bands[1:]:
            x = (x + detail) / math.sqrt(2)
        return x
    if on(c, "multi_basis_lifting"):
        t = below(t, "lifting_wavelet.")
        w = softmax(t["basis_weights"], 0)[:, 0]
        return sum(w[b] * back(below(t, f"wavelets.{b}.")) for b in range(2))
    untied = on(c, "untied_reconstruction")
    return back(below(t, "lifting_reconstruct_wavelet." if untied else "lifting_wavelet."))


def mix(c, t, X):
    S, D = len(X), c["mixer_depth"]

    def routed(X):
        if not on(c, "cross_scale_gating"):
            return X
        return [sum(t["scale_routing"][r, s] * X[s] for s in range(S)) for r in range(S)]

    def gated(place, x, gate):
        y = x @ t[f"{place}mixer.weight"].T
        if c["use_mixer_gate"]:
            phi = {"silu": silu, "sigmoid": torch.sigmoid, "gelu": gelu, "relu": relu}
            y = y * phi[c["mixer_gate_activation"]](gate @ t[f"{place}gate.weight"].T)
        if c["low_rank"]:
            y = y + x @ t[f"{place}V"] @ t[f"{place}U"].T
        return y

    for d in range(D - 1):
        normed = [norm(t, f"mixer_depth_norms.{d}.{s}", X[s]) for s in range(S)]
        normed = [t.get(f"mixer_depth_betas.{d}", 1) * x for x in normed]
        G, Y = routed(normed), []
        for s in range(S):
            place = f"scale_mixers_by_depth.{d}.{s}."
            y = gated(place, normed[s], G[s]) + t[f"{place}bias"]
            y = t.get(f"mixer_depth_alphas.{d}", 1) * y
            Y.append(X[s] + y if on(c, "mixer_depth_residuals") else y)
        X = Y
    G, Y = routed(X), []
    for s in range(S):
        if D > 1:
            y = gated(f"scale_mixers_by_depth.{D - 1}.{s}.", X[s], G[s])
            Y.append(X[s] + y if on(c, "mixer_depth_residuals") else y)
            continue
        place = f"scale_mixers.{s}."
        inner = place + ("mixer." if c.get("per_scale_mixer_widths") else "")
        A, B = t.get(f"{place}proj_in.weight"), t.get(f"{place}proj_out.weight")
        if A is None:
            Y.append(gated(inner, X[s], G[s]))
        else:
            Y.append(gated(inner, X[s] @ A.T, G[s] @ A.T) @ B.T)
    return Y


def memory(t, h, heads, top_k):
    """One vector through a product-key memory, all pairs of the best sub-keys compared."""
    values = t["values.weight"] + t.get("value_deltas", 0)
    y = 0
    for head, q in enumerate((t["query_proj.weight"] @ h).view(heads, 2, -1)):
        n = t["keys_a"].shape[1]
        best = [
            sorted(((float(k @ half), j) for j, k in enumerate(keys[head])), reverse=True)[:top_k]
            for keys, half in ((t["keys_a"], q[0]), (t["keys_b"], q[1]))
        ]
        pairs = sorted(((a + b, i * n + j) for a, i in best[0] for b, j in best[1]), reverse=True)
        scores, rows = zip(*pairs[:top_k], strict=True)
        rows = torch.tensor(rows) + head * n * n
        y = y + softmax(torch.tensor(scores, dtype=h.dtype), 0) @ values[rows]
    return y
