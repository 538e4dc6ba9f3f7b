"""What a memory by the delta rule can hold, where it is known."""

import json
import sys

import memory_capacity
import pytest
import torch


def test_apart_from_each_other_all_pairs_are_held():
    n, dv = 8, 5
    keys = torch.eye(n).expand(2, n, n)[:, :, None].contiguous()
    values = torch.randn(2, n, dv)
    memory = memory_capacity.written(keys, values, 1.0)
    torch.testing.assert_close(memory[:, 0], values)  # row i of the matrix is what key i has


def test_keys_of_one_number_hold_the_last_pair_alone():
    torch.manual_seed(0)
    found = memory_capacity.shares(1, (1, 40), 1, 32, 64, 1.0)
    assert found[40] < 0.1
    keys = torch.ones(1, 3, 1, 1)
    values = torch.randn(1, 3, 4)
    memory = memory_capacity.written(keys, values, 1.0)
    torch.testing.assert_close(memory[0, 0, 0], values[0, -1])


def test_what_is_left_after_n_others():
    """E[S^T k] = β (1 − β / dk)^n v: each later pair takes β / dk of it away, on average."""
    torch.manual_seed(0)
    B, dk, n, beta = 4000, 8, 12, 0.5
    keys = torch.nn.functional.normalize(torch.randn(B, n + 1, 1, dk), dim=-1)
    values = torch.zeros(B, n + 1, 1)
    values[:, 0] = 1
    memory = memory_capacity.written(keys, values, beta)
    left = torch.einsum("bk,bk->b", keys[:, 0, 0], memory[:, 0, :, 0]).mean()
    assert left.item() == pytest.approx(beta * (1 - beta / dk) ** n, rel=0.03)


def test_keys_of_silu_hold_less():
    torch.manual_seed(0)
    apart, alike = (
        memory_capacity.shares(64, (64,), 4, 16, 64, 0.5, activation)[64]
        for activation in ("identity", "silu")
    )
    assert apart > alike + 0.1


def test_the_table(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    arguments = ["--key_dims", "4,64", "--lags", "2,64", "--json", results]
    monkeypatch.setattr(sys, "argv", ["memory_capacity.py", *map(str, arguments)])
    memory_capacity.main()
    small, large = json.loads(results.read_text())["rows"]
    assert large["share"]["2"] == 1 and large["share"]["64"] > 0.9 > 0.5 > small["share"]["64"]
    assert "chance is 1.6%" in capsys.readouterr().out
