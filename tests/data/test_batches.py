"""Which tokens training and validation read, against the text itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import tiny_config
from wavelet_lm.data.batches import (
    RandomCrops,
    SequentialStreams,
    own_validation_batches,
    passes_per_step,
    training_batches,
    validation_batches,
)
from wavelet_lm.errors import UserError


def text(n):
    """Tokens that say their own position."""
    return np.arange(n, dtype=np.uint16)


def config(**overrides):
    return tiny_config(**{"block_size": 8, "micro_batch_size": 3, "eval_batches": 4, **overrides})


def assert_windows(inputs, targets, n):
    """Each row is a stretch of the text, its targets the token after each input."""
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(inputs.shape[1]))
    assert int(inputs.min()) >= 0
    assert int(targets.max()) < n


@given(
    n=st.integers(10, 60), B=st.integers(1, 5), seed=st.integers(0, 2**32 - 1), i=st.integers(0, 99)
)
def test_random_crops_are_a_pure_function_of_seed_and_micro_step(n, B, seed, i):
    crops = RandomCrops(text(n), B, 9, seed)
    inputs, targets = crops[i]
    assert inputs.shape == targets.shape == (B, 9)
    assert_windows(inputs, targets, n)
    again = RandomCrops(text(n), B, 9, seed)
    again[i + 1]
    assert torch.equal(again[i][0], inputs)
    assert crops.starts_text(i)


def test_random_crops_reach_every_window_of_the_text_equally_often():
    n, T = 20, 8
    crops = RandomCrops(text(n), 50, T, seed=3)
    starts = torch.cat([crops[i][0][:, 0] for i in range(240)])
    counts = torch.bincount(starts, minlength=n - T)
    assert len(counts) == n - T  # 0 … 11, the last window ends with the text's last token
    assert counts.min() > 0.85 * 1000
    assert counts.max() < 1.15 * 1000


def test_other_seeds_and_other_steps_draw_other_crops():
    a, b = RandomCrops(text(500), 4, 8, seed=1), RandomCrops(text(500), 4, 8, seed=2)
    drawn = [tuple(crops[i][0][:, 0].tolist()) for crops in (a, b) for i in range(20)]
    assert len(set(drawn)) == 40


@given(T=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_passage_comes_again_in_the_share_of_windows_that_was_asked_for(T, seed):
    """Tokens say their own position, so that what was written over is seen."""
    inputs, targets = RandomCrops(text(500), 60, T, seed, repeated=0.5)[3]
    plain = RandomCrops(text(500), 60, T, seed)[3]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    windows, before = (torch.cat([x[:, :1], y], 1) for x, y in ((inputs, targets), plain))
    n_changed = 0
    for window, old in zip(windows, before, strict=True):
        at = (window != old).nonzero().flatten().tolist()
        if not at:
            continue
        n_changed += 1
        length, distance = len(at), int(old[at[0]] - window[at[0]])
        assert at == list(range(at[0], at[0] + length))
        assert (T + 1) // 8 <= length <= min(distance, (T + 1) // 2)
        assert at[0] >= distance
        again = window[at[0] - distance : at[0] - distance + length]
        assert torch.equal(window[at], again)
    assert n_changed <= 48
    if T > 14:  # a passage of a shorter window may be empty
        assert n_changed >= 12


def test_passages_come_again_at_every_distance():
    T = 31
    inputs, _ = RandomCrops(text(500), 4000, T, seed=1, repeated=1.0)[0]
    jumps = inputs.diff(dim=1)
    back = {1 - int(jump) for jump in jumps[jumps < 0]}
    assert {4, 10, 20, 27} <= back
    assert max(back) <= T + 1 - 4


@given(n=st.integers(25, 200), B=st.integers(1, 3), T=st.integers(1, 8))
def test_streams_continue_row_by_row_and_wrap_at_the_end(n, B, T):
    streams = SequentialStreams(text(n), B, T, seed=1)
    n_windows = (n - 1) // B // T
    for i in range(2 * n_windows + 1):
        inputs, targets = streams[i]
        assert_windows(inputs, targets, n)
        assert streams.starts_text(i) == (i % n_windows == 0)
        if i % n_windows == 0:
            assert inputs[:, 0].tolist() == [row * ((n - 1) // B) for row in range(B)]
        else:  # the windows before ended where these begin
            assert torch.equal(inputs[:, 0], streams[i - 1][1][:, -1])


def test_streams_leave_out_less_than_a_window_per_row():
    n, B, T = 1000, 3, 8
    streams = SequentialStreams(text(n), B, T, seed=1)
    seen = {int(x) for i in range(streams.n_windows) for x in streams[i][1].flatten()}
    assert n - len(seen) <= B * T + B


@pytest.mark.parametrize(("T", "windows_back"), [(16, 0), (16, 5), (9, 2), (1, 3)])
def test_passages_of_streams_come_from_the_first_half_of_a_window_before(T, windows_back):
    """The text counts, so that every token says where it comes from."""
    B, n_windows = 3, 40
    tokens = text(B * n_windows * T + 1)
    plain = SequentialStreams(tokens, B, T, seed=1)
    streams = SequentialStreams(tokens, B, T, 1, repeated=0.75, windows_back=windows_back)
    found, n_changed = set(), 0
    for step in range(2 * n_windows):
        windows, old = (torch.cat([b[0], b[1][:, -1:]], 1) for b in (streams[step], plain[step]))
        assert torch.equal(windows[:, : T // 2], old[:, : T // 2])
        assert torch.equal(windows[:, -1], old[:, -1])  # where the next window begins
        for window, was in zip(windows, old, strict=True):
            places = (window != was).nonzero().flatten().tolist()
            if not places:
                continue
            n_changed += 1
            assert places == list(range(places[0], places[-1] + 1))
            assert T // 8 <= len(places) <= T // 2
            passage = window[places]
            assert (passage.diff() == 1).all()
            back = int(was[0] - passage[0] + T - 1) // T
            assert 0 <= back <= min(windows_back, step % n_windows)
            first = int(passage[0] - (was[0] - back * T))
            assert 0 <= first <= first + len(places) <= T // 2
            found.add(back)
    assert found == (set(range(windows_back + 1)) if T > 1 else set())
    assert T == 1 or 0.65 < n_changed / (2 * n_windows * B) < 0.85


@pytest.mark.parametrize(("order", "fits"), [("random", 9), ("sequential", 25)])
def test_a_text_shorter_than_a_batch_needs_is_refused(order, fits):
    inputs, targets = training_batches(config(data_order=order), text(fits))[0]
    assert_windows(inputs, targets, fits)
    with pytest.raises(UserError, match=f"has {fits - 1} tokens but a batch needs at least {fits}"):
        training_batches(config(data_order=order), text(fits - 1))


@given(n=st.integers(2, 400))
def test_validation_windows_are_spread_from_the_first_to_the_last_token(n):
    batches = validation_batches(config(), text(n))
    inputs = torch.cat([batch for batch, _ in batches])
    for batch, targets in batches:
        assert 1 <= len(batch) <= 3
        assert_windows(batch, targets, n)
    windows, T = inputs.shape
    assert min(8, n - 1) == T
    assert windows == min(12, (n - 1) // T)
    starts = inputs[:, 0]
    assert starts[0] == 0
    assert windows == 1 or starts[-1] == n - 1 - T
    gaps = starts.diff()
    assert windows == 1 or (gaps.max() - gaps.min() <= 1 and gaps.min() >= T)


def test_validation_is_the_same_each_time():
    a, b = (validation_batches(config(), text(300)) for _ in range(2))
    assert all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))


def test_a_validation_split_of_one_token_is_refused():
    with pytest.raises(UserError, match="validation split has 1 token"):
        validation_batches(config(), text(1))


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"repeated_passages": 0.5},
        {"data_order": "sequential"},
        {"data_order": "sequential", "carry_state": True, "repeated_passages": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 4])
def test_processes_read_their_parts_of_the_batch_of_one(order, size):
    ours = config(**order, micro_batch_size=4, grad_accum=2)
    tokens = text(400)
    whole = training_batches(ours, tokens)
    n = 8 // size
    parts = [training_batches(ours, tokens, slice(n * r, n * r + n)) for r in range(size)]
    for step in (0, 1, 5):
        for k in range(2):
            assert torch.equal(torch.cat([part[step][k] for part in parts]), whole[step][k])


def test_processes_do_as_few_passes_as_fit_and_all_as_large():
    def passes(micro, accum, size):
        return passes_per_step(config(micro_batch_size=micro, grad_accum=accum), size)

    assert [passes(8, 4, size) for size in (1, 2, 4, 8, 32)] == [4, 2, 1, 1, 1]
    assert [passes(8, 12, size) for size in (1, 4, 8)] == [12, 3, 2]
    assert passes(4, 7, 2) == 7  # 14 windows: 4 at once would leave 2
    with pytest.raises(UserError, match=r"= 6 windows, which 4 processes cannot share evenly"):
        passes(2, 3, 4)


@pytest.mark.parametrize("n", [40, 100, 300])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_validate_on_the_windows_of_one(n, size):
    ours = config(micro_batch_size=2)
    whole = torch.cat([inputs for inputs, _ in validation_batches(ours, text(n))])
    counted, n_passes = [], set()
    for rank in range(size):
        passes, left = own_validation_batches(ours, text(n), rank, size)
        counted.append(torch.cat([inputs for inputs, _ in passes])[:left])
        n_passes.add(len(passes))
        assert max(len(inputs) for inputs, _ in passes) <= 2
    assert len(n_passes) == 1
    assert torch.equal(torch.cat(counted), whole)
