"""A step of decoding neither waits for its device nor copies from the host: it can be captured.

The steps run on the meta device, whose tensors have shapes and no values: what would look at a
value fails there of itself. What Python hands to a device (lists as indices, tensors of numbers)
is told apart where it is asked for, and tensors of two devices in one operator are refused.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import tiny_config
from tests.models.test_properties import V, configs
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import Sampler
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.strategies.lookahead import Search
from wavelet_lm.inference.strategies.speculative import Numbers, Proposals, TextSoFar, Verdict
from wavelet_lm.models.registry import model_without_weights
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme

# Operators whose results have a shape or a number that only the values know.
LOOKS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor)
TO_PYTHON = (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__)


class Waits(AssertionError):
    """What a captured step must not do."""


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FROM_PYTHON or function in TO_PYTHON:
            raise Waits(f"{function.__name__}: between the host and the device")
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            for part in index:
                if not (part is None or part is ... or isinstance(part, (int, slice, Tensor))):
                    raise Waits(f"an index {part!r}, which is copied to the device")
                if isinstance(part, bool) or (
                    isinstance(part, Tensor) and part.dtype == torch.bool
                ):
                    raise Waits("a mask as an index, whose count is waited for")
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if any(word in name for word in LOOKS):
            raise Waits(f"{name} looks at values")
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if any(x.device.type != self.device for x in tensors):
            raise Waits(f"{name} of {[(x.device.type, list(x.shape)) for x in tensors]}")
        return result


class no_waiting:  # noqa: N801
    """Refuses what a step on this device must not do when it is captured."""

    def __init__(self, device: str = "meta"):
        self.device = device

    def __enter__(self) -> None:
        self.modes = [_Functions(), _Operators(self.device)]
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


def decoder_of(config, scheme=None, context="auto") -> Decoder:
    model = model_without_weights(config, V).eval()
    return Decoder(model if scheme is None else quantize(model, scheme), context=context)


OPTIONS = [
    SamplingOptions(temperature=0, repetition_penalty=1.3),
    SamplingOptions(temperature=0.8, top_k=3, top_p=0.9, repetition_penalty=1.2),
    SamplingOptions(entropy_adaptive=True, top_p=0.5),
]
SCHEMES = {
    "none": None,
    "8 bits": Scheme.uniform(8),
    "bands apart": Scheme(
        bits={
            **dict.fromkeys(("mixer_coarse", "mixer_fine", "mlp"), 8),
            "mixer_mid": 4,
            "lifting": 4,
            "embedding": 8,
            "rest": 16,
        },
        group_size=16,
    ),
}


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(configs(), st.sampled_from(sorted(SCHEMES)), st.integers(1, 3), st.sampled_from(OPTIONS))
def test_no_step_waits(config, scheme, T, options):
    """Of any config, whatever it is quantized to, one token or several at once, with sampling."""
    check(config.replace(fwpkm_inference_updates=False), SCHEMES[scheme], T, options)


def check(config, scheme=None, T=1, options=OPTIONS[1], context="auto") -> None:
    decoder = decoder_of(config, scheme, context)
    _, state = decoder.prefill([[1, 2, 3, 4], [5, 6, 7, 8]])
    session = decoder.start(state, max_step=T)
    sampler = Sampler(decoder, [[1], [2]], options, [1, 2], moving_top_p=True)
    tokens = torch.zeros(2, T, dtype=torch.int64, device="meta")
    with torch.no_grad(), no_waiting():
        for _ in range(2):  # the first may make what the others find
            sampler.draw(session.decode(tokens)[:, -1])
            session.rollback(T - 1)


@pytest.mark.parametrize(
    "switches",
    [
        {"levels": 7, "per_scale_mixer_widths": None},  # eight scales of one width, in three groups
        {"levels": 5, "per_scale_mixer_widths": (1, 0.5, 1, 0.5, 1, 0.5)},
        {"wavelet_crawl": True, "wavelet_crawl_k": 5, "decompose_bypass": True},
    ],
)
def test_mixers_of_several_precisions_are_not_indexed_by_lists(switches):
    check(tiny_config(**switches), SCHEMES["bands apart"])


@pytest.mark.parametrize("context", ["stream", "window:5"])
@pytest.mark.parametrize("model", ["wavelet_lm", "gpt", "wavelet_gpt"])
def test_no_context_waits(model, context):
    config = tiny_config(model=model, decompose_bypass=True, decompose_bypass_ema=False)
    if model == "wavelet_lm" or context == "stream":
        check(config, context=context)


@pytest.mark.parametrize("module", ["haar", "learnable", "ema", "db2"])
def test_no_moving_average_waits(module):
    pytest.importorskip("pywt")
    check(tiny_config(model="wavelet_gpt", wavelet_module=module), T=2)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("moving", [False, True])
def test_no_round_of_speculation_waits(options, moving):
    target = decoder_of(tiny_config(model="gpt", block_size=64))
    draft = decoder_of(tiny_config())
    numbers, gamma = Numbers(3, target.device), 3
    proposals = Proposals(draft, options, numbers, gamma, moving)
    text = TextSoFar([1, 2], target, moving)
    verdict = Verdict(target, options, numbers, gamma)
    reader = target.start(target.prefill([[1, 2]])[1], max_step=gamma + 1)
    writer = draft.start(draft.prefill([[1, 2]])[1], max_step=gamma)
    with torch.no_grad(), no_waiting():
        proposals.begin(text)
        for _ in range(gamma):
            proposals.add(writer.decode(proposals.newest)[:, -1])
        unread = torch.cat((text.newest, proposals.tokens[:, :gamma]), 1)
        text.grow(verdict.on(reader.decode(unread)[0], text, proposals))


@pytest.mark.parametrize("options", OPTIONS)
def test_no_step_of_a_search_waits(options):
    decoder = decoder_of(tiny_config())
    logits, state = decoder.prefill([[1, 2], [3, 4]])
    search = Search(decoder, [[1, 2], [3, 4]], options, [1, 2], 3, 2)
    forks = decoder.start(decoder.rows(state, [0, 0, 0, 1, 1, 1]))
    search.begin(logits)
    with torch.no_grad(), no_waiting():
        search.extend(forks.decode(search.tokens)[:, -1])
        search.choose(logits)


def offences() -> Iterator:
    x = torch.zeros(4, 3, device="meta")
    yield lambda: x[[0, 2]]
    yield lambda: x[x[:, 0] > 0]
    yield lambda: x.new_tensor([1.0])
    yield lambda: x[torch.zeros(2, dtype=torch.int64)]
    yield lambda: x.copy_(torch.zeros(4, 3))
    yield lambda: torch.zeros(2).to("meta")
    yield lambda: x.sum().item()
    yield lambda: bool(x.sum())
    yield lambda: x.to("cpu")
    yield lambda: (x > 0).nonzero()


@pytest.mark.parametrize("offence", list(offences()))
def test_what_waits_is_seen(offence):
    with pytest.raises((Waits, NotImplementedError)), no_waiting():
        offence()
