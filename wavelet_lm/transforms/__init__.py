"""Causal signal transforms; they know nothing of language models.

Signals are `[B, T, C]`: batch, time, channels. What moves information along time is called as

    y, state = layer(x, state)      x a whole signal, or its next chunk, or one position

and any way of cutting a signal gives the same output. `history.py` says what a state is made of;
`wavelet.py` what a wavelet is; `haar.py`, `lifting.py` and `packets.py` are wavelets, `delays.py`
their delays; `means.py` and `moving_averages.py` average; `hadamard.py` rotates channels.
"""
