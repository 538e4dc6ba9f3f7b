"""Fused models, which only read: the same function in fewer and larger products."""
