"""What product-key memories read for a query: the best pairs of sub-keys, and their value rows.

`product_key_plan` says which rows, `product_key_read` reads them for one position of one text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Lookup(NamedTuple):
    """The sizes of a memory's lookup.

    n_best: sub-keys of a half among which the best pairs are; top_k: pairs that are read for a
    head; num_keys: value rows of a head, the square of the number of sub-keys.
    """

    n_best: int
    top_k: int
    num_keys: int


def product_key_plan(
    scores: Tensor, ranks_a: Tensor, ranks_b: Tensor, lookup: Lookup
) -> tuple[Tensor, Tensor]:
    """Which value rows are read, and with which weights.

    Args:
        scores: of the sub-keys, [..., heads, 2, √num_keys].
        ranks_a, ranks_b: the pairs of ranks, [n] int64, among which the best top_k are.

    Returns:
        Rows [..., heads, top_k] int64 and weights of this shape, a softmax over top_k per head, in
        float32 at least.
    """
    best, index = scores.topk(lookup.n_best)
    (best_a, best_b), (index_a, index_b) = best.unbind(-2), index.unbind(-2)
    candidates = best_a[..., ranks_a] + best_b[..., ranks_b]
    n_subkeys, n_rows = scores.shape[-1], scores.shape[-3] * lookup.num_keys
    scores, chosen = candidates.topk(lookup.top_k)
    pairs = torch.add(index_b[..., ranks_b], index_a[..., ranks_a], alpha=n_subkeys)
    first = torch.arange(0, n_rows, lookup.num_keys, device=pairs.device)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return pairs.gather(-1, chosen) + first[:, None], wide.softmax(-1)


def product_key_read(
    scores: Sequence[Tensor],
    values: Sequence[Tensor],
    ranks_a: Tensor,
    ranks_b: Tensor,
    lookup: Lookup,
) -> Tensor:
    """What M memories of one shape answer at one position, [M, C] in the dtype of the values.

    It defines the kernel, and stands in for it. Between pairs of equal scores the kernel may choose
    others.

    Args:
        scores: M of [heads, 2, √num_keys].
        values: M of [heads · num_keys, C].
        ranks_a, ranks_b: [n] int64 (`product_key_plan`).
    """
    answers = []
    for own, table in zip(scores, values, strict=True):
        rows, weights = product_key_plan(own, ranks_a, ranks_b, lookup)
        weights = weights.to(table.dtype).view(1, -1)
        answers.append(
            embedding_bag(rows.view(1, -1), table, mode="sum", per_sample_weights=weights)
        )
    return torch.cat(answers)


@torch.library.custom_op("wavelet_lm::product_key_read", mutates_args=())
def product_key_read_in_one(
    scores: list[Tensor],
    values: list[Tensor],
    ranks_a: Tensor,
    ranks_b: Tensor,
    n_best: int,
    top_k: int,
    num_keys: int,
) -> Tensor:
    """`product_key_read` of one or two memories in one launch on a GPU: shapes as there."""
    if not values[0].is_cuda:
        lookup = Lookup(n_best, top_k, num_keys)
        return product_key_read(scores, values, ranks_a, ranks_b, lookup)
    from wavelet_lm.kernels.triton_product_keys import launch  # a compiled step on a GPU has triton

    return launch(scores, values, ranks_a, ranks_b, n_best, top_k, num_keys)


@product_key_read_in_one.register_fake
def _(
    scores: list[Tensor],
    values: list[Tensor],
    ranks_a: Tensor,
    ranks_b: Tensor,
    n_best: int,
    top_k: int,
    num_keys: int,
) -> Tensor:
    return values[0].new_empty(len(values), values[0].shape[1])
