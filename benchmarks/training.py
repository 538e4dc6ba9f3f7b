"""Training speed and memory of a config on synthetic tokens.

    python benchmarks/training.py --config config.json --steps 300
    python benchmarks/training.py --config configs/quickstart.json --steps 100 --device cpu

Runs the project's own training loop on tokens of a noisy arithmetic progression, which a model
learns at once, so that a falling loss shows that training works, and prints what a step costs.
Results go to `--json FILE`, by convention `benchmarks/results/training_<machine>.json`.
"""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from report import check_targets, write_results

from wavelet_lm.cli.flags import OneLineParser, add_config_flags, parse_flags
from wavelet_lm.config import Config, read_json_object
from wavelet_lm.data.dataset import TokenizedText, TokenSplit
from wavelet_lm.data.tokenizers import named_tokenizer
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import run_command
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.language import LanguageModelling
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.memory_estimate import GiB, estimate, peak_bytes, reset_peak
from wavelet_lm.training.run_folder import RunFolder


class SyntheticTokenizer(type(named_tokenizer("bytes"))):
    """Stands in for a tokenizer of any size; the text is never decoded."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def synthetic_tokens(vocab_size: int, n: int, seed: int) -> np.ndarray:
    """x_{t+1} = x_t + 1 modulo the vocabulary, replaced by a uniform token one time in ten."""
    generator = np.random.default_rng(seed)
    jumps = np.where(generator.random(n) < 0.1, generator.integers(vocab_size, size=n), 1)
    return (np.cumsum(jumps) % vocab_size).astype(np.uint32)


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config.json", metavar="FILE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vocab_size", type=int, default=50257)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    add_config_flags(parser)
    flags = parse_flags(parser, sys.argv[1:])
    file, steps, vocab_size, target = (
        flags.pop(key) for key in ("config", "steps", "vocab_size", "json")
    )
    values = {"eval_interval": steps, "save_interval": steps + 1, "eval_batches": 4}
    values |= {"max_steps": steps, "log_interval": 1}
    config = Config.from_dict({**read_json_object(file), **values, **flags}, source=file)
    check_targets([target])
    row = measure(config, vocab_size)
    for key, value in row.items():
        print(f"{key:>24}  {value}")
    if target:
        write_results(target, [{"config": file, **row}])


def measure(config: Config, vocab_size: int) -> dict[str, object]:
    """Train for `max_steps` in a temporary run folder."""
    use_threads(config.threads)
    device = resolve_device(config.device)
    tokens = synthetic_tokens(vocab_size, 1_000_000, config.seed)
    split = TokenSplit(tokens, 4 * len(tokens))
    data = TokenizedText("synthetic", SyntheticTokenizer(vocab_size), split, split, None)
    torch.manual_seed(config.seed)
    before = resident_bytes(device)
    reset_peak()
    with device:
        model = build_model(config, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(config.replace(out_dir=folder), data.name)
        task = LanguageModelling(config, model, data, device)
        task.loss_function = compiled(model, config, device, run.log)
        trainer = Trainer(config, task, run, config.max_steps)
        trainer.train()
        rows = run.metrics()
    train = [row for row in rows if row["event"] == "train"]
    step_seconds = np.diff([row["seconds"] for row in train])[len(train) // 5 :]
    per_step = config.micro_batch_size * config.grad_accum * config.block_size
    return {
        "parameters": n_params(model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(trainer.precision.dtype).removeprefix("torch."),
        "steps": config.max_steps,
        "tokens_per_step": per_step,
        "first_loss": round(train[0]["loss"], 4),
        "last_loss": round(train[-1]["loss"], 4),
        "valid_loss": round(rows[-1]["val_loss"], 4),
        "step_milliseconds": round(float(np.median(step_seconds)) * 1000, 2),
        "tokens_per_second": round(per_step / float(np.median(step_seconds)), 1),
        "estimated_GiB": round(estimate(model, device).peak / GiB, 4),
        "peak_GiB": round((peak_bytes(device) - before) / GiB, 4),
    }


def resident_bytes(device: torch.device) -> int:
    """What is held now: by PyTorch on a GPU, or by this process, 0 where no system says it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    run_command(main)
