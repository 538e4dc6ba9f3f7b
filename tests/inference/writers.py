"""A small writer for the tests: a perturbed model over a few letters, exact in float64."""

import torch

from tests.conftest import perturb, tiny_config
from wavelet_lm import UserError, build_model
from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.inference.completion import Strategy, Writer
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.sampling.logits import SamplingOptions

LETTERS = "abcdefg .\n"
GREEDY = Strategy(SamplingOptions(temperature=0))
SAMPLED = Strategy(SamplingOptions(temperature=1.2, top_p=0.95, repetition_penalty=1.1))


class Letters(Tokenizer):
    """One token per letter; token `end_of_text`, if there is one, is the letter's no more."""

    name = "letters"

    def __init__(self, end_of_text=None, letters=LETTERS):
        self.letters, self.end_of_text = letters, end_of_text
        self.vocab_size = len(letters)

    def encode_batch(self, texts, start=0):
        for text in texts:
            if not set(text) <= set(self.letters):
                raise UserError("not in the vocabulary")
        return [[self.letters.index(letter) for letter in text] for text in texts]

    def token_bytes(self, token):
        return b"" if token == self.end_of_text else self.letters[token].encode()


def small_model(seed=0, **config):
    """Untrained models' logits are too flat to tell texts apart, so they are scaled."""
    torch.manual_seed(seed)
    model = perturb(build_model(tiny_config(**config), len(LETTERS)), seed=seed).double().eval()
    with torch.no_grad():
        for cell in model.cells if model.config.multinodal_enabled else [model]:
            cell.head.weight.mul_(20)
    return model


def small_writer(strategy=SAMPLED, tokenizer=None, model=None, draft=None, **options):
    """`adapt` goes to the decoder, all else to the writer."""
    model = small_model() if model is None else model
    decoder = Decoder(model, adapt=options.pop("adapt", False))
    draft = None if draft is None else Decoder(draft)
    return Writer(decoder, model, tokenizer or Letters(), strategy, draft, **options)


def tokens(text):
    return Letters().encode(text)
