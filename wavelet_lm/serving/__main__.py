"""`python -m wavelet_lm.serving` is the command `wavelet-lm serve`."""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds
    from wavelet_lm.cli.serve import main
    from wavelet_lm.errors import run_command

    run_command(main)
