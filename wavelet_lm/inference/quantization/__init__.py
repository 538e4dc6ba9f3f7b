"""Post-training quantization: weights in few bits, read as they are."""
