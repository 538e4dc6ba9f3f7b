"""The breakdown counts what the model does: FLOPs, gradients, states and reach measured on it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch.nn.functional import linear
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import perturb, tiny_config
from tests.models.test_properties import configs
from tests.training.runs import finished
from wavelet_lm.cli.count import known_vocabulary, main
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.cost import as_dict, breakdown, table
from wavelet_lm.models.registry import build_model, n_params

ROOT = Path(__file__).parents[2]
V = 11
thoroughly = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def headline():
    return breakdown(Config.from_json(ROOT / "config.json"), 50257)


def test_the_headline_config(headline):
    assert headline.n_params == headline.total.n_params == 882_511_981
    counts = {name: cost.n_params for name, cost in headline.components.items()}
    assert counts["wavelet nets"] == 83_927_055
    assert counts["embedding"] == counts["head"] == 102_926_336
    blocks = {name: cost.per_block for name, cost in headline.components.items()}
    assert blocks["mixers"] == 44_113_920
    assert blocks["MLP"] == 167_815_168
    assert blocks["PKM"] == blocks["FwPKM"] == 38_010_880


def test_what_the_headline_config_reads(headline):
    """All but the embedding and value tables; the lifting nets by both blocks, updates twice."""
    tables = 102_926_336 + 2 * 2 * 16384 * 2048
    rows = 2048 + 2 * 2 * 32 * 2048
    unread = 2048**2  # the first block has no previous mean to mix in
    assert headline.total.distinct == 882_511_981 - tables + rows - unread
    nets = 2 * 5 * (2 * 2048**2 + 2 * 2048)
    rereads = (nets + 5 * 3) + 2 * (nets // 2)
    assert headline.total.read == headline.total.distinct + rereads
    assert round((headline.total.read + unread - rows) / 1e6) == 813


@thoroughly
@given(configs())
def test_every_parameter_is_counted_once(config):
    result = breakdown(config, V)
    with torch.device("meta"):
        model = build_model(config, V)
    assert result.n_params == result.total.n_params == n_params(model)
    assert len({len(line) for line in table(result).splitlines()[: len(result.components)]}) == 1


@thoroughly
@given(configs())
def test_flops_are_those_that_pytorch_counts(config):
    """But for products that no one needs twice: recomputation, and a narrow scale's unread gate."""
    narrow = any(w != config.padded_channels for w in config.mixer_widths)
    assume(config.cross_scale_gating or not narrow)
    # More than 8 lags are summed by a banded product, which is a filter and no matrix to learn.
    assume(not config.wavelet_crawl or config.wavelet_crawl_k <= 8)
    config = config.replace(
        gradient_checkpointing=False,
        pkm_heads=1,  # keys of one number are no matrix product to PyTorch
        block_size=6,
        micro_batch_size=2,
    )
    model = perturb(build_model(config, V))
    idx = torch.randint(V, (2, 6))

    def of_the_state(q, k, v, *args, **options):
        """A delta memory's: what its state knows of k, what is written, what q reads."""
        B, T, H, dk = q
        return 3 * 2 * B * T * H * dk * v[-1]

    formulas = {
        torch.ops.wavelet_lm.delta_rule: of_the_state,
        torch.ops.wavelet_lm.delta_rule_backward: lambda *args, **o: 2 * of_the_state(*args),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        # The loss itself hides its in-place product from the counter.
        passes, _ = model.passes(idx, None)
        sum(linear(x, model.output_weight()).square().sum() for x in passes).backward()
    result = breakdown(config, V)
    expected = idx.numel() * (result.total.flops + result.hadamard_flops)
    cells = config.multinodal_num_cells if config.multinodal_enabled else 1
    assert 0 <= counter.get_total_flops() - expected < idx.numel() * cells  # whole FLOPs a token


@thoroughly
@given(configs())
def test_weights_read_are_those_with_a_gradient(config):
    assume(not config.looped_blocks and config.loop_iterations == 1)  # passes may share rows
    config = config.replace(stochastic_depth_rate=0.0, gradient_checkpointing=False)
    model = perturb(build_model(config, V).double()).eval().requires_grad_()
    idx = torch.tensor([[3]])
    model(idx)[0].square().sum().backward()
    read = 0
    for name, p in model.named_parameters():
        if p.grad is None:
            continue
        is_table = name.endswith(".values.weight")
        is_table |= name.endswith("embedding.weight") and not config.tie_embedding_to_lm_head
        read += int(p.grad.ne(0).any(-1).sum()) * p.shape[-1] if is_table else p.numel()
    assert breakdown(config, V).total.distinct == read


@thoroughly
@given(configs())
def test_the_state_is_that_of_a_text(config):
    model = build_model(config, V).eval()
    _, state = model(torch.randint(V, (1, 40)))
    leaves = [t for t in tree_leaves(state) if t is not None]
    result = breakdown(config, V)
    assert result.state_elements == sum(t.numel() for t in leaves)
    assert result.state_bytes == sum(t.numel() * t.element_size() for t in leaves)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"wavelet_crawl_k": 5},
        {"wavelet_mode": "haar", "wavelet_crawl": False},
        {"looped_blocks": True, "looped_blocks_count": 3},
        {"loop_iterations": 2},
        {"multi_basis_lifting": True, "shared_lifting_weights": False},
        {"wavelet_packets": True, "per_scale_mixer_widths": None},
    ],
    ids=str,
)
def test_the_reach_is_the_last_position_that_a_token_changes(switches):
    config = tiny_config(decompose_bypass=False, pkm_enabled=False, fwpkm_enabled=False, **switches)
    model = perturb(build_model(config, V).double()).eval()
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    result = breakdown(config, V)
    logits, _ = model(torch.randint(V, (1, result.reach + 2)))

    def first_token_matters_to(t: int) -> bool:
        (grad,) = torch.autograd.grad(logits[0, t, 0], embedded[-1], retain_graph=True)
        return bool(grad[0, 0].any())

    assert first_token_matters_to(result.reach)
    assert not first_token_matters_to(result.reach + 1)
    assert not result.sees_everything


def test_a_tied_gpt_reads_its_matrix_once():
    config = tiny_config(model="gpt", tie_embedding_to_lm_head=True, head_hidden=0, heads=2)
    result = breakdown(config, V)
    assert result.total.distinct == result.n_params - (config.block_size - 1) * config.C


def test_what_looks_back_without_end_is_named():
    none = {"decompose_bypass": False, "pkm_enabled": False, "fwpkm_enabled": False}
    result = breakdown(tiny_config(**none, delta_memory=True), V)
    assert "the delta memory sees everything" in table(result)
    assert as_dict(result)["delta_memory_sees_everything"] is True
    assert as_dict(result)["running_mean_sees_everything"] is False
    assert "everything" not in table(breakdown(tiny_config(**none), V))


def test_the_command(tmp_path):
    file = tmp_path / "figures.json"
    done = finished(
        *("configs/quickstart.json", "--layers", 3, "--json", file), script="wavelet_lm.models"
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = breakdown(Config.from_json(ROOT / "configs/quickstart.json", layers=3), 256)
    assert table(result) in done.stdout
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert figures["vocab_size"] == 256
    assert figures["n_params"] == result.n_params
    assert figures == {**figures, **as_dict(result)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/shakespeare_char.json"], "give --vocab_size N"),
        (["config.json", "--tokenizer", "gpt3"], "unknown tokenizer 'gpt3'"),
        (["config.json", "--vocab_size", "0"], "must be 1 or more"),
        (["config.json", "--layer", "2"], "did you mean --layers"),
        (["missing.json"], "there is no such file; presets are"),
    ],
)
def test_the_command_refuses(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["wavelet_lm.models", *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as caught:
        main()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"dataset": "python-stdlib"}, 256),
        ({"dataset": "pg19"}, 32000),
        ({"dataset": "my.txt"}, 50257),
        ({"dataset": "my.txt", "tokenizer": "sentencepiece:1024"}, 1024),
    ],
    ids=str,
)
def test_vocabularies_known_by_name(settings, size):
    assert known_vocabulary(tiny_config(**settings)) == size
