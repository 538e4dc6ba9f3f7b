"""`python -m wavelet_lm.evaluation.compare` is `wavelet-lm compare`."""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds
    from wavelet_lm.cli.compare import main
    from wavelet_lm.errors import run_command

    run_command(main)
