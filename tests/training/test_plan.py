"""Plans on paper: 64 ranks that are not there, against closed forms; the command shows them."""

import json
import sys
from collections import Counter

import pytest
import torch

from tests.conftest import ROOT, tiny_config
from wavelet_lm.cli.count import main
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.registry import model_without_weights
from wavelet_lm.training import plan
from wavelet_lm.training.gpus import GPUS
from wavelet_lm.training.rehearsal import GATHERED, GRADIENTS, STATE, WEIGHTS, rehearse

V, N = 1000, 64
WIDE = {"C": 64, "layers": 3, "micro_batch_size": 1, "grad_accum": N, "use_amp": False}


@pytest.fixture(scope="module")
def simulated():
    from wavelet_lm.training.simulated_ranks import rehearse_fsdp

    own = tiny_config(**{**WIDE, "grad_accum": 1})
    return own, rehearse_fsdp(own, V, N, "cuda", torch.float32)


def test_64_ranks_hold_a_share_each(simulated):
    config, found = simulated
    whole = rehearse(config, V, "cuda", torch.float32)
    model = model_without_weights(config, V)
    one = 4 * sum(p.numel() for p in model.blocks[0].parameters())
    # Rows are shared out whole, and a number is whole everywhere.
    rows = 4 * sum(p[0].numel() if p.dim() else 1 for p in model.parameters())
    most = whole.held[WEIGHTS] / N + rows + sum(b.nbytes for b in model.buffers())
    assert whole.held[WEIGHTS] / N < found.held[WEIGHTS] <= most < whole.held[WEIGHTS] / 10
    assert found.held[STATE] <= most
    assert found.held[GRADIENTS] <= most
    assert found.held[GATHERED] < whole.held[WEIGHTS] - one  # never all blocks at a time
    assert not torch.distributed.is_initialized()


def test_64_ranks_gather_twice_and_scatter_once(simulated):
    """Blocks for forward and backward; what backward begins with, and what is shared, once."""
    config, found = simulated
    kinds = Counter(kind for kind, _ in found.collectives)
    sums = Counter()
    for kind, n_bytes in found.collectives:
        sums[kind] += n_bytes
    model = model_without_weights(config, V)
    shared = [p for p in model.parameters() if p.dim()]
    blocks = 4 * sum(p.numel() for b in model.blocks for p in b.parameters() if p.dim())
    rest = 4 * sum(p.numel() for p in shared) - blocks
    gathered, scattered = sums["allgather_base"], sums["reduce_scatter_base"]
    # Of a block its mixer, two linear layers, two tables of values, and what is left.
    n_parts = 6 * len(model.blocks)
    outside = 3  # the lifting nets, the embedding, norm and head
    assert kinds["reduce_scatter_base"] == n_parts + outside
    assert kinds["allgather_base"] >= 2 * n_parts + 2
    padding = 4 * N * sum(p[0].numel() for p in shared)  # at most a row a rank of each
    assert blocks + rest <= scattered <= blocks + rest + padding
    assert 2 * blocks + rest <= gathered <= 2 * (blocks + rest + padding)


def test_a_ring_sends_gradients_twice_and_ddp_keeps_them():
    config = tiny_config(**WIDE, parallel="ddp")
    (found,) = plan.plans(config, V, N, "H100")
    alone = rehearse(config.replace(grad_accum=1, parallel="auto"), V, "cuda", torch.float32)
    assert found.sent == pytest.approx(2 * (N - 1) / N * alone.held[WEIGHTS], rel=1e-6)
    assert found.held[GRADIENTS] == found.held[WEIGHTS] == alone.held[WEIGHTS]
    assert found.seconds["link"] == pytest.approx(found.sent / GPUS["H100"].network)


def test_time_is_that_of_the_slower_of_products_and_bytes():
    config = Config.from_json(ROOT / "configs/quickstart.json")
    (h100,) = plan.plans(config, 256, 1, "H100")
    (h200,) = plan.plans(config, 256, 1, "H200")
    gpu = GPUS["H100"]
    assert h100.parallel == "none"
    assert h100.seconds["products"] == pytest.approx(h100.flops / gpu.bf16)
    assert h100.seconds["memory"] == pytest.approx(h100.moved / gpu.bandwidth)
    least, most = sorted((h100.seconds["products"], h100.seconds["memory"]))
    assert most <= h100.seconds["computing"] == h100.step <= least + most
    # A model this small moves bytes: another card with the same rate is faster by its bandwidth.
    assert h100.limit == "memory"
    assert h200.seconds["products"] == h100.seconds["products"]
    ratio = h100.seconds["memory"] / h200.seconds["memory"]
    assert ratio == pytest.approx(GPUS["H200"].bandwidth / gpu.bandwidth)


def test_float8_and_recomputing_are_in_the_plan():
    config = tiny_config(**WIDE).replace(use_amp=True, mlp_expansion=16)
    (half,) = plan.plans(config.replace(grad_accum=1), V, 1, "H100")
    (eight,) = plan.plans(config.replace(grad_accum=1, amp_dtype="fp8"), V, 1, "H100")
    again = config.replace(grad_accum=1, gradient_checkpointing=True)
    (recomputed,) = plan.plans(again, V, 1, "H100")
    assert half.seconds["products"] / 2 < eight.seconds["products"] < half.seconds["products"]
    assert 1.1 < recomputed.flops / half.flops < 4 / 3
    with pytest.raises(UserError, match="A100 has no float8 products; use --amp_dtype bf16"):
        plan.plans(config.replace(amp_dtype="fp8"), V, 1, "A100")


def typed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["wavelet_lm.models", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    main()


def test_the_command_shows_every_way(tmp_path, monkeypatch, capsys):
    file = tmp_path / "plan.json"
    typed(
        *(monkeypatch, "configs/quickstart.json", "--world_size", 4, "--gpu", "RTX 4090"),
        *("--json", file),
    )
    out = capsys.readouterr().out
    assert "4 × RTX 4090, a step of 2,048 tokens, Muon, by data sheets:" in out
    head = next(line for line in out.splitlines() if line.startswith("a rank of 4"))
    assert head.split()[-2:] == ["ddp", "fsdp"]
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["plans"].keys() == {"ddp", "fsdp"}
    ddp, fsdp = figures["plans"].values()
    assert fsdp["bytes_held"][WEIGHTS] < ddp["bytes_held"][WEIGHTS] / 3
    assert ddp["limit"] in ("link", "products", "memory")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world_size", 0], "world_size is 0; it must be 1 to 65,536"),
        (["--world_size", 7], "7 processes cannot share evenly"),
        (["--gpu", "H1000"], "invalid choice: 'H1000'"),
    ],
)
def test_the_command_refuses(flags, message, monkeypatch):
    with pytest.raises(UserError, match=message) as caught:
        typed(monkeypatch, "configs/quickstart.json", *flags)
    assert "\n" not in str(caught.value)
