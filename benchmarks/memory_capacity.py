"""What a memory by the delta rule can hold: how much of a pair is left after n others.

    python benchmarks/memory_capacity.py --key_dims 32,128,512 --lags 64,256,1024,2048

Pairs of a random key (normal numbers or, with `--activation silu`, their silu or, with square, the
products of all pairs of `--key_dims` of them, made of length 1; one in each head) and one of
`--values` random values are written one after the other without decay, and at the end the value of
the pair that was written n pairs ago is asked for by its keys: right where it is the nearest to the
sum of what the heads read. A row for each size of a key has the share of right answers at each n,
for the writing strength β, the same for all pairs, that is best there.

That is what a memory can do that writes at every position, all pairs alike, with random keys: a
trained one may write more seldom, and its keys may be nearer to each other than random ones.
Results go to `--json FILE`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

from typing import Any

import torch
from report import check_targets, natural, positive, positives, table, write_results
from torch import Tensor
from torch.nn.functional import normalize, silu

from wavelet_lm.cli.flags import OneLineParser, add_threads_flag
from wavelet_lm.errors import run_command
from wavelet_lm.kernels.delta_rule import delta_rule
from wavelet_lm.models.wavelet_lm.delta_memory import PairProducts
from wavelet_lm.threads import use_threads

STRENGTHS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
ASKED = 16  # pairs on end that are asked for at each lag, of each text
TEXTS = 8
ACTIVATIONS = {"identity": lambda x: x, "silu": silu, "square": PairProducts()}


def written(keys: Tensor, values: Tensor, beta: float) -> Tensor:
    """The memories [B, H, dk, dv] after keys [B, T, H, dk] and values [B, T, dv], with one β."""
    B, T, H, dk = keys.shape
    v = values[:, :, None].expand(B, T, H, values.shape[-1]).contiguous()
    none, strength = keys.new_zeros(B, T, H), keys.new_full((B, T, H), beta)
    state = keys.new_zeros(B, H, dk, v.shape[-1])
    return delta_rule(keys, keys, v, none, strength, state)[1][:, -1]


def shares(
    key_dim: int,
    lags: tuple[int, ...],
    heads: int,
    value_dim: int,
    n_values: int,
    beta: float,
    activation: str = "identity",
) -> dict[int, float]:
    """By lag, of what was written so many pairs before the last one, the part that is right."""
    T = max(lags) + ASKED
    table = normalize(torch.randn(n_values, value_dim), dim=-1)
    which = torch.randint(n_values, (TEXTS, T))
    keys = normalize(ACTIVATIONS[activation](torch.randn(TEXTS, T, heads, key_dim)), dim=-1)
    memory = written(keys, table[which], beta)
    found = {}
    for lag in lags:
        asked = slice(T - 1 - lag - ASKED + 1, T - lag)
        read = torch.einsum("bthk,bhkv->btv", keys[:, asked], memory)
        right = (read @ table.T).argmax(-1) == which[:, asked]
        found[lag] = right.double().mean().item()
    return found


def measure(
    key_dims: tuple[int, ...],
    lags: tuple[int, ...],
    heads: int,
    value_dim: int,
    n_values: int,
    activation: str = "identity",
) -> list[dict[str, Any]]:
    """A row for each size of a key: `key_dim`, and by lag `share` and the best `beta`."""
    rows = []
    for key_dim in key_dims:
        by_beta = {
            beta: shares(key_dim, lags, heads, value_dim, n_values, beta, activation)
            for beta in STRENGTHS
        }
        best = {lag: max(STRENGTHS, key=lambda beta: by_beta[beta][lag]) for lag in lags}
        share = {lag: round(by_beta[beta][lag], 4) for lag, beta in best.items()}
        rows.append({"key_dim": key_dim, "share": share, "beta": best})
    return rows


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--key_dims", type=positives, default=(32, 128, 512), metavar="LIST", help="[32,128,512]")
    add("--lags", type=positives, default=(64, 256, 1024, 2048), metavar="LIST", help="pairs ago")
    add("--heads", type=positive, default=4, metavar="N", help="that add up what they read [4]")
    add("--value_dim", type=positive, default=32, metavar="N", help="[32]")
    add("--values", type=positive, default=64, metavar="N", help="different ones [64]")
    text = "of the keys before they have length 1 [%(default)s]"
    add("--activation", choices=tuple(ACTIVATIONS), default="identity", help=text)
    add("--seed", type=natural, default=0, metavar="N", help="[0]")
    add_threads_flag(parser)
    add("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args()
    check_targets([args.json])
    use_threads(args.threads)
    torch.manual_seed(args.seed)
    sizes = args.heads, args.value_dim, args.values
    rows = measure(args.key_dims, args.lags, *sizes, args.activation)
    head = ["numbers of a key", *(f"{lag:,} ago" for lag in args.lags)]
    cells = [[row["key_dim"], *(f"{row['share'][lag]:.0%}" for lag in args.lags)] for row in rows]
    print(f"chance is {1 / args.values:.1%}\n{table(head, cells)}")
    if args.json:
        told = ("heads", "value_dim", "values", "activation", "seed")
        about = {key: getattr(args, key) for key in told}
        write_results(args.json, rows, **about)


if __name__ == "__main__":
    run_command(main)
