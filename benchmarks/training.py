"""What a training step of a config costs, on synthetic tokens, beside a GPT and the matrix rate.

    python benchmarks/training.py --config config.json --steps 300
    python benchmarks/training.py --config configs/mini.json --modes eager,compiled \\
        --step_tokens 2048,8192 --gpt --json FILE
    python benchmarks/training.py --config configs/quickstart.json --steps 30 --device cpu --gpt

Runs the project's own training loop on tokens of a noisy arithmetic progression, which a model
learns at once, so that a falling loss shows that training works. A row for each model, mode and
number of tokens an optimizer step:

- models: that of the config and, with `--gpt`, the project's GPT with as many parameters and the
  one whose token takes as many FLOPs of matrix products (± 5% each);
- modes: eager, compiled, or as the config says;
- step tokens: micro-batches of the config are accumulated up to them; the config's own by default.

`of rate` is what the step's products would take at the rate of large products of the same dtype,
measured in the same run, over what the step takes: model FLOPs, nothing that is recomputed. Where
the time goes is read off a profile of the last steps: products, the delta rule, the code that the
compiler wrote, the optimizer's own kernels and the rest (on a GPU of kernels, on a CPU of
operators; the products of Muon are products).
Results go to `--json FILE`, by convention `benchmarks/results/training_<machine>.json`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds
    import os

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler says when it starts and stops

import re
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from equal_gpt import gpt_config, gpt_shape, gpt_shape_of_flops
from products import flops_per_token, matrix_rate
from report import check_targets, median, positives, resident_bytes, table, write_results
from torch import nn
from torch.profiler import ProfilerActivity, profile

from wavelet_lm.cli.flags import OneLineParser, add_config_flags, parse_flags
from wavelet_lm.config import Config, read_json_object
from wavelet_lm.data.dataset import TokenizedText, TokenSplit
from wavelet_lm.data.tokenizers import named_tokenizer
from wavelet_lm.devices import amp_dtype, resolve_device
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.language import LanguageModelling
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.memory_estimate import GiB, estimate, peak_bytes, reset_peak
from wavelet_lm.training.run_folder import RunFolder

MODES = {"eager": False, "compiled": True, "config": None}
PROFILED = 2  # steps at the end of a run, outside of its timing
LEAST_STEPS = 10
# Rows and columns of the products whose rate counts as the machine's.
LARGE = {"cpu": 1024, "cuda": 8192}
# Names of kernels and operators, the first that fits counts.
KINDS = {
    "delta rule": r"delta_rule|chunk_gated|chunk_local|chunk_fwd|chunk_bwd|recompute_w_u",
    "products": r"^aten::(addmm_?|baddbmm_?|bmm|mm|_scaled_mm)$|gemm|cutlass|cublas|nvjet|xmma",
    "compiled": r"^triton_|CompiledFunction|Torch-Compiled Region",
    "optimizer": r"adagrad|adam|multi_tensor|_foreach_|aten::_fused_",
}


class SyntheticTokenizer(type(named_tokenizer("bytes"))):
    """Stands in for a tokenizer of any size; the text is never decoded."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def synthetic_tokens(vocab_size: int, n: int, seed: int) -> np.ndarray:
    """x_{t+1} = x_t + 1 modulo the vocabulary, replaced by a uniform token one time in ten."""
    generator = np.random.default_rng(seed)
    jumps = np.where(generator.random(n) < 0.1, generator.integers(vocab_size, size=n), 1)
    return (np.cumsum(jumps) % vocab_size).astype(np.uint32)


class ProfiledTrainer(Trainer):
    """Trains as always, and looks closely at its last `PROFILED` steps.

    Attributes:
        shares: of the time of these steps, by `KINDS` and `rest`.
        peak: the most bytes that the process held before them.
    """

    peak = 0

    def _update(self) -> None:
        if self.progress.step < self.progress.total_steps - PROFILED:
            super()._update()
            return
        self.peak = self.peak or peak_bytes(self.task.device)
        on_gpu = self.task.device.type == "cuda"
        activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        with profile(activities=activities) as profiler:
            super()._update()
            if on_gpu:
                torch.cuda.synchronize(self.task.device)
        times = {
            event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
            for event in profiler.key_averages()
        }
        self.shares = shares_of(times)


def shares_of(times: dict[str, float]) -> dict[str, float]:
    """Parts of the whole by `KINDS`, from the times of names; `rest` is of none of them."""
    sums = dict.fromkeys((*KINDS, "rest"), 0.0)
    for name, time in times.items():
        kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, name))
        sums[next(kinds, "rest")] += time
    whole = sum(sums.values()) or 1.0
    return {kind: round(time / whole, 4) for kind, time in sums.items()}


# --- rows ----------------------------------------------------------------------------------------


def rows(
    config: Config, vocab_size: int, modes: list[str], step_tokens: list[int], with_gpt: bool
) -> list[dict[str, Any]]:
    """All rows, each printed as a line when it is there."""
    configs = {config.model: config}
    if with_gpt:
        configs |= equal_gpts(config, vocab_size)
    found = []
    for mode in modes:
        for n in step_tokens:
            for name, each in configs.items():
                sized = of_step(each, n)
                if MODES[mode] is not None:
                    sized = sized.replace(compile=MODES[mode])
                row = {"model": name, "mode": mode, **measure(sized, vocab_size)}
                print(f"… {name}, {mode}, {n:,} tokens", file=sys.stderr, flush=True)
                found.append(row)
    return found


def equal_gpts(config: Config, vocab_size: int) -> dict[str, Config]:
    """The GPT of as many parameters, and that of as many FLOPs, trained as the config is."""
    with torch.device("meta"):
        size = n_params(build_model(config, vocab_size))
    with torch.device(resolve_device(config.device)):
        flops = flops_per_token(build_model(config, vocab_size), config.block_size)
    shapes = {
        "gpt, parameters": gpt_shape(size, vocab_size),
        "gpt, FLOPs": gpt_shape_of_flops(flops, vocab_size, config.block_size),
    }
    return {
        name: config.replace(**differing(gpt_config(shape, config.block_size)))
        for name, shape in shapes.items()
    }


def differing(config: Config) -> dict[str, Any]:
    """The keys that are not at their defaults."""
    default = Config().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != default[key]}


def of_step(config: Config, n: int) -> Config:
    """The config with steps of n tokens: micro-batches of its size, or one of n tokens.

    Raises:
        UserError: n tokens are no whole number of micro-batches.
    """
    windows, left = divmod(n, config.block_size)
    micro = min(config.micro_batch_size, windows)
    if left or not windows or windows % micro:
        raise UserError(
            f"--step_tokens has {n:,}; it must be a multiple of block_size ({config.block_size:,})"
            f" and, from there on, of {config.micro_batch_size} windows"
        )
    return config.replace(micro_batch_size=micro, grad_accum=windows // micro)


@dataclass
class Trained:
    """A run that is over: its trainer, its metrics, and the bytes that it took."""

    trainer: Trainer
    metrics: list[dict[str, Any]]
    taken: int

    @property
    def model(self) -> nn.Module:
        return self.trainer.task.model

    def memory(self) -> dict[str, float]:
        """GiB: what the estimate says, and the most that were taken."""
        said = estimate(self.model, self.trainer.task.device).peak
        return {"estimated_GiB": round(said / GiB, 4), "peak_GiB": round(self.taken / GiB, 4)}


def trained(config: Config, vocab_size: int, trainer_of: type[Trainer] = Trainer) -> Trained:
    """Train for `max_steps` on synthetic tokens in a temporary run folder."""
    use_threads(config.threads)
    device = resolve_device(config.device)
    tokens = synthetic_tokens(vocab_size, 1_000_000, config.seed)
    split = TokenSplit(tokens, 4 * len(tokens))
    data = TokenizedText("synthetic", SyntheticTokenizer(vocab_size), split, split, None)
    torch.manual_seed(config.seed)
    before = resident_bytes(device) or 0
    reset_peak()
    with device:
        model = build_model(config, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(config.replace(out_dir=folder), data.name)
        task = LanguageModelling(config, model, data, device)
        task.loss_function = compiled(model, config, device, run.log)
        trainer = trainer_of(config, task, run, config.max_steps)
        trainer.train()
        metrics = run.metrics()
    peak = trainer.peak if isinstance(trainer, ProfiledTrainer) else peak_bytes(device)
    return Trained(trainer, metrics, peak - before)


def measure(config: Config, vocab_size: int) -> dict[str, Any]:
    """A row of a model."""
    run = trained(config, vocab_size, ProfiledTrainer)
    device = run.trainer.task.device
    train, valid = (
        [row for row in run.metrics if row["event"] == kind] for kind in ("train", "eval")
    )
    seconds = np.diff([row["seconds"] for row in train])[len(train) // 5 : -PROFILED]
    per_step = config.micro_batch_size * config.grad_accum * config.block_size
    flops = flops_per_token(run.model, config.block_size)
    rate = matrix_rate(device, amp_dtype(config, device), LARGE[device.type])
    step = median(seconds.tolist())
    return {
        "parameters": n_params(run.model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(run.trainer.precision.dtype).removeprefix("torch."),
        "steps": config.max_steps,
        "tokens_per_step": per_step,
        "first_loss": round(train[0]["loss"], 4),
        "last_loss": round(train[-1]["loss"], 4),
        "valid_loss": round(valid[-1]["val_loss"], 4),
        "step_milliseconds": round(step * 1000, 2),
        "tokens_per_second": round(per_step / step, 1),
        "flops_per_token": flops,
        "matrix_rate": round(rate / 1e9, 1),  # GFLOP/s
        "of_matrix_rate": round(flops * per_step / step / rate, 4),
        "shares": run.trainer.shares,
        **run.memory(),
    }


# --- the command ---------------------------------------------------------------------------------


def report(found: list[dict[str, Any]]) -> str:
    """A table for people, and below it where the time goes."""
    head = ["", "mode", "tokens/step", "parameters", "ms/step", "tokens/s", "of rate", "peak GiB"]
    kinds = [*KINDS, "rest"]
    return table(
        [*head, *kinds],
        [
            [row["model"], row["mode"], f"{row['tokens_per_step']:,}", f"{row['parameters']:,}"]
            + [f"{row['step_milliseconds']:,.1f}", f"{row['tokens_per_second']:,.0f}"]
            + [f"{row['of_matrix_rate']:.3f}", f"{row['peak_GiB']:.2f}"]
            + [f"{row['shares'][kind]:.0%}" for kind in kinds]
            for row in found
        ],
    )


def mode_list(text: str) -> list[str]:
    modes = text.split(",")
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"--modes has {mode!r}; known are {', '.join(MODES)}")
    return modes


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="config.json", metavar="FILE", help="[config.json]")
    add("--steps", type=int, default=300, metavar="N", help="of every row [300]")
    add("--vocab_size", type=int, default=50257, metavar="N", help="[50257]")
    add("--modes", default="config", metavar="LIST", help=f"of {', '.join(MODES)} [config]")
    add(
        "--step_tokens",
        type=positives,
        metavar="LIST",
        help="tokens of an optimizer step [as the config has it]",
    )
    add("--gpt", action="store_true", help="rows of GPTs of equal size and of equal FLOPs")
    add("--json", metavar="FILE", help="write the results there")
    add_config_flags(parser)
    return parser


def main() -> None:
    flags = parse_flags(parser(), sys.argv[1:])
    names = ("config", "steps", "vocab_size", "modes", "step_tokens", "gpt", "json")
    file, steps, vocab_size, modes, step_tokens, gpt, target = (flags.pop(name) for name in names)
    if steps < LEAST_STEPS:
        raise UserError(f"--steps is {steps}; it must be {LEAST_STEPS} or more")
    values = {"eval_interval": steps, "save_interval": steps + 1, "eval_batches": 4}
    values |= {"max_steps": steps, "log_interval": 1}
    config = Config.from_dict({**read_json_object(file), **values, **flags}, source=file)
    check_targets([target])
    own = config.micro_batch_size * config.grad_accum * config.block_size
    found = rows(config, vocab_size, mode_list(modes), list(step_tokens or [own]), gpt)
    print(report(found))
    if target:
        write_results(target, [{"config": file, **row} for row in found])


if __name__ == "__main__":
    run_command(main)
