"""The cache against a slow, obvious one; states as bytes and back."""

import random

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.inference.writers import small_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.serving.known import Known, Layout
from wavelet_lm.serving.state_cache import Prefix, StateCache


def known(n, size=100):
    return Known(torch.zeros(size, dtype=torch.uint8), n, (1,), torch.zeros(2, dtype=torch.uint8))


def prefix_of(tokens, root=b""):
    prefix = Prefix(root)
    for token in tokens:
        prefix.add([token])
    return prefix


def test_the_longest_beginning_is_found_and_the_oldest_leaves():
    choose, size = random.Random(0), known(1).n_bytes
    cache, kept = StateCache(20 * size + 5), {}  # text -> Known, the newest last
    for _ in range(3000):
        root = choose.choice([b"", b"state"])
        text = tuple(choose.choices([0, 1], k=choose.randrange(1, 9)))
        if choose.random() < 0.5:
            one = known(len(text))
            cache.keep(prefix_of(text, root), one)
            kept[root, text] = kept.pop((root, text), one)
            while len(kept) > 20:
                del kept[next(iter(kept))]
        else:
            beginnings = [text[:n] for n in range(len(text), 0, -1) if (root, text[:n]) in kept]
            found = cache.longest(text, root)
            assert (found is None) == (not beginnings)
            if found is not None:
                best = root, beginnings[0]
                assert found == (kept[best], len(beginnings[0]))
                kept[best] = kept.pop(best)
        assert len(cache) == len(kept)
        assert cache.n_bytes == size * len(kept) <= cache.limit


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = StateCache(0)
    cache.keep(prefix_of([1]), known(1))
    assert len(cache) == cache.n_bytes == 0
    assert cache.longest([1]) is None


@pytest.mark.parametrize("context", ["stream", "window:5", "recompute:4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_state_is_bytes_and_back(context, dtype):
    decoder = Decoder(small_model(delta_memory=True), context=context, adapt=False, dtype=dtype)
    layout = Layout(decoder)
    text = [3, 1, 4, 1, 5]
    logits, state = decoder.prefill([text])
    kept = layout.pack(state, logits, 5, text, layout.seen(text))
    again, same = layout.unpack(kept)
    assert torch.equal(same, logits)
    for a, b in zip(tree_leaves(again), tree_leaves(state), strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
    assert kept.packed.nbytes == layout.n_bytes
    assert kept.seen_tokens(10).nonzero()[:, 0].tolist() == [1, 3, 4, 5]
