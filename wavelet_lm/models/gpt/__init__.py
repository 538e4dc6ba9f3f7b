"""The baselines: GPT and WaveletGPT."""
