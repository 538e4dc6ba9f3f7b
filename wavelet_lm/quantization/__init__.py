"""Trained models with weights of 8, 4 or 2 bits."""
