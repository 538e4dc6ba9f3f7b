"""`python -m wavelet_lm.inference.quantization` is `wavelet-lm quantize`."""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds
    from wavelet_lm.cli.quantize import main
    from wavelet_lm.errors import run_command

    run_command(main)
