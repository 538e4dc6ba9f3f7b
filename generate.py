"""Continue a prompt with a trained WaveletLM: `python generate.py --checkpoint logs/RUN`."""

import functools
import sys

from wavelet_lm.config import OneLineParser
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import run_command
from wavelet_lm.inference.sampling import SamplingOptions
from wavelet_lm.inference.terminal import write_samples
from wavelet_lm.interop.loading import load_model, load_tokenizer
from wavelet_lm.models.checkpoint import find_checkpoint


def main() -> None:
    parser = OneLineParser(description=__doc__, epilog="Unset options come from the run's config.")
    parser.add_argument("--checkpoint", required=True, help="run folder, or checkpoint file")
    parser.add_argument("--prompt", help="text to continue; may be empty")
    parser.add_argument("--num_tokens", type=int, help="most tokens to generate")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token")
    parser.add_argument("--top_p", type=float, help="fewest tokens that hold this probability")
    parser.add_argument("--top_k", type=int, help="among the k likeliest tokens, 0 = all")
    parser.add_argument("--repetition_penalty", type=float, help="1 = none")
    parser.add_argument("--seed", type=int, default=1, help="of the first sample [1]")
    parser.add_argument("--n", type=int, default=1, help="samples; each adds 1 to the seed [1]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--ignore_eot", action="store_true", help="go on after an end of text")
    args = parser.parse_args()

    checkpoint = find_checkpoint(args.checkpoint)
    log = functools.partial(print, file=sys.stderr)
    model = load_model(checkpoint, resolve_device(args.device), log)
    tokenizer = load_tokenizer(args.checkpoint)
    # An option that was not given is None; 0 and "" are values.
    given = {key: value for key, value in vars(args).items() if value is not None}
    defaults = model.config.to_dict()
    keys = ("temperature", "top_k", "top_p", "repetition_penalty")
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    write_samples(
        model,
        tokenizer,
        given.get("prompt", defaults["generation_prompt"]),
        given.get("num_tokens", defaults["num_new_tokens"]),
        SamplingOptions(**{key: given.get(key, defaults[key]) for key in keys}),
        seed=args.seed,
        n=args.n,
        ignore_eot=args.ignore_eot,
        checkpoint=checkpoint,
        write=lambda text: print(text, end="", flush=True),
        log=log,
    )


if __name__ == "__main__":
    run_command(main)
