"""`python -m wavelet_lm.scope` is `wavelet-lm scope`."""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds
    from wavelet_lm.cli.scope import main
    from wavelet_lm.errors import run_command

    run_command(main)
