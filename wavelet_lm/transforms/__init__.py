"""Causal signal transforms; they know nothing of language models.

Signals are `[B, T, C]`: batch, time, channels. Everything here that moves information along time
has the two faces described in `wavelet_lm.models.wavelet_lm`: called on a whole signal or on its
next chunk with the state of the chunks before, it gives the same output.
"""
