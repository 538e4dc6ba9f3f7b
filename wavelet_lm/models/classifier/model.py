"""Classification of whole sequences by any model of the family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.registry import build_model


def last_position(x: Tensor, lengths: Tensor) -> Tensor:
    """The vector of the last real position: [B, T, H], lengths [B] -> [B, H]."""
    return x[torch.arange(len(x), device=x.device), lengths - 1]


def mean_position(x: Tensor, lengths: Tensor) -> Tensor:
    """The mean of the real positions: [B, T, H], lengths [B] -> [B, H]."""
    real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return (x * real[..., None]).sum(dim=1) / lengths[:, None]


POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last": last_position,
    "mean": mean_position,
}


class SequenceClassifier(nn.Module):
    """Hidden vectors of a language model → pooling → Linear, GELU → Linear → a logit per class.

    The head is that of Verma, "Wavelet GPT", 2024. Sequences of a batch may differ in length, with
    any padding on their right: the models are causal, so that it reaches no real position, and
    pooling reads real positions alone.

    A `front_end` takes the place of the token embedding. It reads what `forward` is given, say a
    waveform [B, N], and returns what an embedding returns, [B, T, C]; `lengths` count positions of
    T. The model's own head, over the vocabulary, is dropped.

    Args:
        backbone: a new or a trained model; it becomes a part of the classifier.
        n_classes: classes, of which a sequence has one, or with `multi_label` any number.
        head_hidden: width of the dense layer with GELU; 0 = none.
        pooling: `last` or `mean`.

    Raises:
        UserError: a front end for a model that has more than one embedding.
    """

    def __init__(
        self,
        backbone: LanguageModel,
        n_classes: int,
        *,
        head_hidden: int = 2048,
        pooling: str = "last",
        multi_label: bool = False,
        front_end: nn.Module | None = None,
    ):
        super().__init__()
        H = backbone.output_weight().shape[1]
        for part in list(backbone.modules()):
            if isinstance(part, LanguageModel):
                part.head = None
        if front_end is not None:
            if not hasattr(backbone, "embedding"):
                raise UserError(
                    "multinodal_enabled makes models with an embedding each, and a front end can"
                    " replace only one; set multinodal_enabled to false"
                )
            backbone.embedding = front_end
        self.config, self.vocab_size = backbone.config, backbone.vocab_size
        self.backbone, self.n_classes = backbone, n_classes
        self.pool = POOLING[pooling]
        dense = (nn.Linear(H, head_hidden), nn.GELU()) if head_hidden else ()
        self.classify = nn.Sequential(*dense, nn.Linear(head_hidden or H, n_classes))
        self.criterion = nn.BCEWithLogitsLoss() if multi_label else nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Logits [B, n_classes].

        Args:
            inputs: [B, T] int64 tokens, or what the front end reads.
            lengths: [B] int64, real positions of each sequence, 1 or more.
        """
        x, _ = self.backbone.hidden(inputs)
        return self.classify(self.pool(x, lengths))

    def loss(self, inputs: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats, 0-d.

        Args:
            labels: [B] int64 classes; with `multi_label` [B, n_classes] of 0 and 1, each class an
                outcome of its own.
        """
        return self.criterion(self(inputs, lengths).float(), labels)


def build_classifier(
    config: Config, vocab_size: int, n_classes: int, **options: Any
) -> SequenceClassifier:
    """A classifier with random weights, whose dense layer has the config's `head_hidden`.

    Args:
        options: `pooling`, `multi_label` and `front_end` of `SequenceClassifier`.
    """
    backbone = build_model(config.replace(head_hidden=0), vocab_size)
    model = SequenceClassifier(backbone, n_classes, head_hidden=config.head_hidden, **options)
    model.config = config
    return model
