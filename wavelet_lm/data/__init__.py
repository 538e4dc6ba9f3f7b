"""Texts, tokenizers, and the order in which training reads them."""

from wavelet_lm.data.dataset import TokenizedText, TokenSplit, prepare_data

__all__ = ["TokenSplit", "TokenizedText", "prepare_data"]
