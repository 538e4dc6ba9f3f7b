"""Texts, tokenizers, and the order in which training reads them."""
