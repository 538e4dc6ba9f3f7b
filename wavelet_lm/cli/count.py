"""Count a config before training it: `python -m wavelet_lm.models config.json --layers 3`.

By component: parameters, training FLOPs per token, weights read per generated token; and the size
of a text's state, and how far back the model sees. With --world_size or --gpu also what each of so
many GPUs would hold, move and send, and how long a step would take at least.
"""

import json

from wavelet_lm.atomic_files import check_writable, write_text
from wavelet_lm.cli.flags import OneLineParser, add_config_flags, parse_flags
from wavelet_lm.config import Config
from wavelet_lm.data.hub import KNOWN
from wavelet_lm.data.tokenizers import GPT2_VOCAB, check_tokenizer_name, sentencepiece_vocab
from wavelet_lm.errors import UserError
from wavelet_lm.models.cost import as_dict, breakdown, table
from wavelet_lm.training import plan
from wavelet_lm.training.gpus import GPUS

MOST_RANKS = 65_536


def main() -> None:
    parser = OneLineParser(
        usage="%(prog)s CONFIG [--vocab_size N] [--json FILE] [--key value ...]",
        description=__doc__,
    )
    parser.add_argument("config", metavar="CONFIG", help="config file")
    parser.add_argument("--vocab_size", type=int, metavar="N", help="[that of the tokenizer]")
    parser.add_argument("--world_size", type=int, metavar="N", help="GPUs to plan for [1]")
    parser.add_argument("--gpu", choices=GPUS, help="which, by its data sheet [H100]")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    add_config_flags(parser)
    flags = parse_flags(parser)
    file, vocab_size, json_file = (flags.pop(key) for key in ("config", "vocab_size", "json"))
    world_size, gpu = flags.pop("world_size"), flags.pop("gpu")
    planned = world_size is not None or gpu is not None
    world_size, gpu = 1 if world_size is None else world_size, gpu or "H100"
    if not 1 <= world_size <= MOST_RANKS:
        raise UserError(f"world_size is {world_size}; it must be 1 to {MOST_RANKS:,}")
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"vocab_size is {vocab_size}; it must be 1 or more")
    if json_file:
        check_writable(json_file)
    config = Config.from_json(file, **flags)
    if vocab_size is None:
        vocab_size = known_vocabulary(config)

    result = breakdown(config, vocab_size)
    found = plan.plans(config, vocab_size, world_size, gpu) if planned else []
    if json_file:
        figures = {"config": file, "vocab_size": vocab_size, **as_dict(result)}
        figures |= plan.as_dict(found, world_size, gpu) if planned else {}
        write_text(json_file, json.dumps(figures, indent=1) + "\n")
    print(f"{file}, vocabulary {vocab_size:,}\n\n{table(result)}")
    if planned:
        print(f"\n{plan.table(found, config, world_size, gpu)}")


def known_vocabulary(config: Config) -> int:
    """The vocabulary size of a tokenizer that can be named without reading the data."""
    name = config.tokenizer
    if name == "auto":
        name = "bytes" if config.dataset == "python-stdlib" else "gpt2"
        if config.dataset in KNOWN:
            name = KNOWN[config.dataset].default_tokenizer
    check_tokenizer_name(name)
    if name == "char":
        raise UserError(
            "the vocabulary of tokenizer char is known only from its text; give --vocab_size N"
        )
    return {"gpt2": GPT2_VOCAB, "bytes": 256}.get(name) or sentencepiece_vocab(name)
