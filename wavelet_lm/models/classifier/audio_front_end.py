"""From a waveform to the vectors that a model reads in place of an embedding of tokens."""

import torch
from torch import Tensor, nn

from wavelet_lm.roles import FACTOR, declared

PATCH = 400  # samples of a vector: 25 ms at 16 kHz


class AudioFrontEnd(nn.Module):
    """A learned filter bank: patches → Conv1d → maximum over the patch → Linear.

    A patch never reads another one, so that the model behind it stays causal. It is the front end
    for FSD-50K of Verma, "Wavelet GPT", 2024, after Verma and Berger, "Audio Transformers", 2021.

    Args:
        C: channels of the model.
        n_filters, length: of the filter bank, in samples.
        patch: samples of a patch, at least `length`; what is left of an incomplete one is dropped.
    """

    def __init__(self, C: int, n_filters: int = 128, length: int = 200, patch: int = PATCH):
        super().__init__()
        self.patch = patch
        self.filters = nn.Conv1d(1, n_filters, length)
        project = nn.Linear(n_filters, C)
        self.project = declared(project, "embedding", weight=FACTOR)

    def forward(self, waveform: Tensor) -> Tensor:
        """[B, N] samples in [−1, 1] -> [B, N // patch, C]."""
        B, N = waveform.shape
        patches = waveform[:, : N // self.patch * self.patch].reshape(-1, 1, self.patch)
        features = torch.amax(self.filters(patches), dim=-1)
        return self.project(features).view(B, N // self.patch, -1)
