"""Products with quantized weights, each beside the plain PyTorch twin that defines it."""
