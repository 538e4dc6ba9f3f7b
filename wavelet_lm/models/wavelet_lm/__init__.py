"""The wavelet language model and its parts."""
