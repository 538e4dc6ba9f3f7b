"""The old name of the command `wavelet-lm quantize`; the package is `wavelet_lm.quantization`."""
