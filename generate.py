"""Continue a prompt with a trained model: `python generate.py logs/RUN --prompt TEXT`."""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds
    from wavelet_lm.cli.generate import main
    from wavelet_lm.errors import run_command

    run_command(main)
