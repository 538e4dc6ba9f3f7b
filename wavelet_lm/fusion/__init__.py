"""Weights put together for reading: the same function in fewer and larger products."""
