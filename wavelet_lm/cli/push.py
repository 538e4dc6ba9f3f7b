"""Send a run to the hub of models: `wavelet-lm push logs/RUN user/name`.

Config, best weights, tokenizer, metrics, and a card; hf://user/name then stands wherever a run
does. Where data and files lie on this machine is left out of what is sent.
"""

import sys
from functools import partial

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.hub_paths import SCHEME
from wavelet_lm.interop.hub import push


def main() -> None:
    parser = OneLineParser(run="run folder to send", description=__doc__)
    parser.add_argument("name", metavar="USER/NAME", help="model of the hub; made if need be")
    parser.add_argument(
        "--private", action="store_true", help="where it is made, for its owner's eyes alone"
    )
    args = parser.parse_args()
    address = push(args.checkpoint, args.name, args.private, partial(print, file=sys.stderr))
    print(address)
    print(f"try it: wavelet-lm generate {SCHEME}{args.name}")
