"""What is measured is what the trained model computes: against its own parts, one by one."""

import json
import math
from itertools import groupby

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from tests.conftest import perturb, tiny_config
from tests.models.test_properties import V, configs
from wavelet_lm import Config, UserError, build_model
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.fusion.fuse import fuse
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.models.wavelet_lm.layers import ScaleNorm
from wavelet_lm.models.wavelet_lm.mixer import ACTIVATIONS, NarrowMixer
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme
from wavelet_lm.scope.scope import look, picture, shade
from wavelet_lm.scope.watching import SHARE_LET_THROUGH

T = 20
RANDOM = {
    "max_examples": 12,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "phases": [Phase.explicit, Phase.generate],  # shrinking takes minutes
}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def made(config: Config, n_vocab: int = V) -> nn.Module:
    torch.manual_seed(0)
    return perturb(build_model(config, n_vocab)).double().eval()


def some_tokens(n: int = T, n_vocab: int = V) -> list[int]:
    return torch.randint(n_vocab, (n,), generator=torch.Generator().manual_seed(1)).tolist()


class Seen:
    """The trained model's own tensors, in the order in which its blocks run."""

    def __init__(self, model: nn.Module, tokens: list[int]):
        self.mixed, self.openness, self.plans = [], [], []
        hooks = []
        for network in model.networks():
            for block in network.blocks:
                dropout, mixer = block.mixer_dropout, block.mixer
                hooks.append(dropout.register_forward_hook(self._see_mixed(block, network)))
                hooks.append(mixer.register_forward_pre_hook(self._see_gates(network)))
                branches = {} if block.feedforward is None else block.feedforward.branches
                for name in ("pkm", "fwpkm"):
                    if name in branches:
                        query = branches[name].query
                        see = self._see_plan(network, branches[name])
                        hooks.append(query.register_forward_pre_hook(see))
        with torch.no_grad():
            logits, _ = model(torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        targets = torch.tensor(tokens[1:])
        log_probs = logits[0, :-1].log_softmax(-1)
        self.bits = -log_probs.gather(-1, targets[:, None])[:, 0] / math.log(2)

    def _see_mixed(self, block, network):
        is_weighted = isinstance(block.mixed_norm, ScaleNorm)  # which has the factors in it

        def see(_, __, mixed: Tensor) -> None:
            factors = 1 if is_weighted else block.scale_weights[:, None, None]
            self.mixed.append((network, mixed[:, 0] * factors))

        return see

    def _see_gates(self, network):
        def see(mixer, inputs) -> None:
            X = mixer.select(mixer.rotate(inputs[0]))[:, 0]
            for stacked in mixer.stacked:
                X = stacked(X, mixer.routing)
            gates = X
            if mixer.routing is not None:
                gates = torch.stack(
                    [sum(r * x for r, x in zip(row, X, strict=True)) for row in mixer.routing]
                )
            shares = []
            for x, one in zip(gates, mixer.scales, strict=True):
                core = one
                if isinstance(one, NarrowMixer):
                    x, core = x @ one.A.T, one.mixer
                if core.G is not None:
                    name = network.config.mixer_gate_activation
                    shares.append(SHARE_LET_THROUGH[name](x @ core.G.T).mean(-1))
            self.openness.append((network, torch.stack(shares) if shares else None))

        return see

    def _see_plan(self, network, memory):
        def see(_, inputs) -> None:
            with torch.no_grad():
                q = nn.functional.linear(inputs[0], memory.query.weight)
                self.plans.append((network, memory.plan(memory.scores(q))))

        return see

    def of(self, seen: list, network: nn.Module) -> list:
        return [value for owner, value in seen if owner is network]


@settings(**RANDOM)
@given(configs())
def test_everything_is_that_of_the_trained_model(config):
    """The whole family: energies, gates, bits and slots, in every run of every block."""
    model, tokens = made(config), some_tokens()
    scope, seen = look(model, tokens), Seen(model, tokens)
    torch.testing.assert_close(scope.bits[1:], seen.bits, **EXACT)
    assert scope.bits[0].isnan()
    blocks = iter(scope.blocks)
    for network in model.networks():
        plans = iter(seen.of(seen.plans, network))
        gates = seen.of(seen.openness, network)
        for mixed, openness in zip(seen.of(seen.mixed, network), gates, strict=True):
            run = (block := next(blocks)).run
            energies = torch.stack([(band * band).sum(-1) for band in mixed])
            torch.testing.assert_close(run.energy, energies, **EXACT)
            torch.testing.assert_close(run.energy.sum(0), mixed.square().sum((0, 2)), **EXACT)
            assert len(block.bands) == network.config.n_scales == len(run.energy)
            assert (run.openness is None) == (openness is None)
            if openness is not None:
                torch.testing.assert_close(run.openness, openness, **EXACT)
            assert (run.recall is None) == (not network.config.delta_memory)
            if run.recall is not None:
                whole = run.recall.shares.sum(-1)
                assert ((whole - 1).abs().lt(1e-9) | whole.eq(0)).all()
            for slots in run.slots:
                rows, weights = next(plans)
                rows, weights = rows[0].flatten(1), weights[0].flatten(1) / rows.shape[2]
                assert sorted_rows(slots.rows, slots.shares) == sorted_rows(rows, weights)
        assert next(plans, None) is None
    assert next(blocks, None) is None
    assert json.dumps(picture(scope, ByteTokenizer()), allow_nan=False)


def sorted_rows(rows: Tensor, shares: Tensor) -> list[list[tuple[int, float]]]:
    """Where two rows score alike, either may come first."""
    pairs = zip(rows.tolist(), shares.tolist(), strict=True)
    return [
        sorted((row, round(share, 6)) for row, share in zip(*one, strict=True)) for one in pairs
    ]


def test_the_share_let_through_is_what_the_activation_makes_of_its_input():
    z = torch.randn(1000, dtype=torch.float64)
    for name, activation in ACTIVATIONS.items():
        factor = 1 if name == "sigmoid" else z
        torch.testing.assert_close(activation(z), factor * SHARE_LET_THROUGH[name](z))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_scale_of_weight_zero_is_flat_and_silencing_it_changes_nothing(norm, is_fused):
    model = made(tiny_config(wavelet_recon_norm=norm, mixer_depth=2), 256)
    with torch.no_grad():
        model.blocks[1].scale_weights[2] = 0
    model = model.float()
    scope = look(fuse(model) if is_fused else model, some_tokens(n_vocab=256), ablate=True)
    run, change = scope.blocks[1].run, scope.blocks[1].change
    assert not run.energy[2].any()
    assert change[2] == 0
    assert all(other != 0 for s, other in enumerate(change) if s != 2)
    drawn = picture(scope, ByteTokenizer())["blocks"][1]["scales"]
    assert set(drawn[2]["shade"]) == {0}
    assert drawn[2]["change"] == 0
    for s in (0, 1, 3):
        assert (min(drawn[s]["shade"]), max(drawn[s]["shade"])) == (0, 1)


@settings(**{**RANDOM, "max_examples": 4})
@given(configs())
def test_a_silenced_scale_is_one_of_weight_zero(config):
    config = config.replace(looped_blocks=False, loop_iterations=1)
    model, tokens = made(config), some_tokens()
    scope = look(model, tokens, ablate=True)
    bits = Seen(model, tokens).bits
    blocks = [(network, block) for network in model.networks() for block in network.blocks]
    for (_, block), found in zip(blocks, scope.blocks, strict=True):
        s = len(found.bands) - 1
        weight = block.scale_weights[s].item()
        with torch.no_grad():
            block.scale_weights[s] = 0
            expected = (Seen(model, tokens).bits - bits).sum()
            block.scale_weights[s] = weight
        assert found.change[s] == pytest.approx(expected.item(), abs=1e-9)


@settings(**{**RANDOM, "max_examples": 5})
@given(configs())
def test_the_end_of_a_text_is_the_same_where_only_it_is_looked_at(config):
    model, tokens = made(config), some_tokens()
    whole, end = look(model, tokens), look(model, tokens, last=7)
    assert (end.n_before, end.tokens) == (T - 7, tokens[-7:])
    torch.testing.assert_close(end.bits, whole.bits[-7:], **EXACT)
    for a, b in zip(whole.blocks, end.blocks, strict=True):
        torch.testing.assert_close(b.run.energy, a.run.energy[:, -7:], **EXACT)
        if a.run.recall is not None:
            # Single shares have another whole: what is known of before adds up as one vector.
            found = b.run.recall.shares.sum(-1) + b.run.recall.before
            assert ((found - 1).abs().lt(1e-9) | found.eq(0)).all()
            torch.testing.assert_close(b.run.recall.kept, a.run.recall.kept[:, -7:], **EXACT)


def test_a_quantized_model_is_looked_at_as_it_is():
    model = perturb(build_model(tiny_config(delta_memory=True), 256)).eval()
    quantized = quantize(model, Scheme.uniform(8))
    tokens = some_tokens(n_vocab=256)
    scope, plain = look(quantized, tokens), look(model, tokens)
    with torch.no_grad():
        idx = torch.tensor([tokens])
        losses = quantized.token_losses(idx[:, :-1], idx[:, 1:])[0] / math.log(2)
    torch.testing.assert_close(scope.bits[1:].float(), losses, rtol=1e-5, atol=1e-5)
    assert not torch.equal(scope.bits[1:], plain.bits[1:])
    assert len(scope.blocks[0].run.slots) == 2
    torch.testing.assert_close(
        scope.blocks[0].run.openness, plain.blocks[0].run.openness, atol=0.05, rtol=0.05
    )


def test_who_watches_leaves_the_model_to_others():
    model = made(tiny_config(delta_memory=True), 256)
    decoder = Decoder(model)
    tokens = some_tokens(n_vocab=256)
    before, _ = decoder.prefill([tokens])
    look(decoder.model, tokens, ablate=True)
    after, _ = decoder.prefill([tokens])
    assert torch.equal(before, after)
    parts = [*model.modules(), *decoder.model.modules()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def test_shades_are_of_the_logarithms_of_a_row():
    energy = torch.tensor([[1.0, 10.0, 100.0], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0], [0.0, 1.0, 4.0]])
    expected = torch.tensor([[0, 0.5, 1], [0, 0, 0], [0, 0, 0], [0, 0, 1.0]])
    torch.testing.assert_close(shade(energy), expected.double())


def test_bits_per_byte_are_of_the_scored_tokens():
    model = build_model(tiny_config(), 256).eval()
    nn.init.zeros_(model.head.weight)  # every byte is as likely
    tokenizer = ByteTokenizer()
    scope = look(model, tokenizer.encode("añb"))
    drawn = picture(scope, tokenizer, run="logs/RUN")
    assert drawn["bits"] == [None, 8.0, 8.0, 8.0]
    assert drawn["bits_per_byte"] == 8.0
    assert drawn["tokens"] == ["a", "⟨c3⟩", "⟨b1⟩", "b"]
    assert [next(group) for _, group in groupby(drawn["blocks"], lambda b: b["name"])]
    for block in drawn["blocks"]:
        assert sum(scale["share"] for scale in block["scales"]) == pytest.approx(1, abs=1e-4)


def test_what_cannot_be_looked_at_is_refused_in_one_line():
    model = build_model(tiny_config(), 256).eval()
    with pytest.raises(UserError, match="the text has 1 tokens; give 2 or more"):
        look(model, [3])
    with pytest.raises(UserError, match="tokens is 0; it must be between 1 and 2,048"):
        look(model, [3, 4], last=0)
    gpt = build_model(tiny_config(model="gpt", heads=2), 256).eval()
    with pytest.raises(UserError, match="a gpt has no scales"):
        look(gpt, [3, 4])
    with torch.no_grad():
        model.head.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        look(model, [3, 4])
