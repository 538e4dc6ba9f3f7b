"""`python -m wavelet_lm.inference.quantization` lives on here; the package is `wavelet_lm.quantization`."""
