"""Optimizers on one run: loss curves, the memory of their state, what a step costs.

    python benchmarks/optimizers.py --config configs/shakespeare_char.json \\
        --optimizers AdamW,AdamW8bit --seeds 1337,1 --max_steps 300 --json FILE --plot FILE.png

Trains the config with each optimizer, by the project's own training loop, once for every seed. A
seed decides the first weights and the order of the batches, so the runs of one seed read the same
batches from the same weights, and the difference of their losses is that of the optimizers. Any key
of the config can be given as a flag. Bytes of state are exact: every tensor that the optimizer
keeps, each once. The mean root of the second moments tells whether 8 bits bias what steps are
divided by. Peak memory is that of a GPU's allocator; on a CPU it is left out. Step times mean
something only on a machine that does nothing else. The plot needs
`python -m pip install -c constraints.txt -e ".[bench]"`.
Results go to `--json FILE`, by convention `benchmarks/results/optimizers_<name>_<machine>.json`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from report import check_plot, check_targets, table, write_results

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.cli.flags import OneLineParser, add_config_flags, parse_flags
from wavelet_lm.config import Config, read_json_object
from wavelet_lm.data.dataset import TokenizedText, prepare_data
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.language import LanguageModelling, total_steps
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.memory_estimate import peak_bytes, reset_peak
from wavelet_lm.training.optimizers import STATE_NUMBERS
from wavelet_lm.training.run_folder import RunFolder

# Numbers of a state that share a scale in bitsandbytes.
BLOCK = 256
# Steps that a point of the plot is a mean over.
SMOOTHED_STEPS = 20


def measure(config: Config, data: TokenizedText) -> dict[str, Any]:
    """Train in a temporary run folder; the curves are lists of [step, nats per token]."""
    use_threads(config.threads)
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    with device:
        model = build_model(config, data.tokenizer.vocab_size)
    reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(config.replace(out_dir=folder), data.name)
        task = LanguageModelling(config, model, data, device)
        task.loss_function = compiled(model, config, device, run.log)
        trainer = Trainer(config, task, run, total_steps(config, data))
        trainer.train()
        rows = run.metrics()
    train = [row for row in rows if row["event"] == "train"]
    valid = [row for row in rows if row["event"] == "eval"]
    # The first steps set up what later ones reuse.
    step_seconds = np.diff([row["seconds"] for row in train])[len(train) // 5 :]
    return {
        "optimizer": config.optimizer,
        "seed": config.seed,
        "steps": trainer.progress.total_steps,
        "parameters": n_params(model),
        **state_memory(trainer),
        "mean_root_second_moment": float(f"{mean_root_second_moment(trainer):.4g}"),
        "valid_loss": round(valid[-1]["val_loss"], 5),
        "peak_bytes": peak_bytes(device) if device.type == "cuda" else None,
        "step_milliseconds": round(float(np.median(step_seconds)) * 1000, 2),
        "train_curve": [[row["step"], round(row["loss"], 5)] for row in train],
        "valid_curve": [[row["step"], round(row["val_loss"], 5)] for row in valid],
    }


def state_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes of the optimizer's tensors, and how many parameters have their state in 8 bits."""
    tensors, _ = trainer.optimizer.state()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()
    }
    quantized = {n.split("/")[1] for n, t in tensors.items() if t.dtype == torch.uint8}
    sizes = {name: p.numel() for name, p in trainer.task.model.named_parameters()}
    return {
        "state_bytes": sum(storages.values()),
        "parameters_in_8_bits": sum(sizes[name] for name in quantized),
    }


def mean_root_second_moment(trainer: Trainer) -> float:
    """Mean over the parameters of what their steps are divided by (before Adam's correction).

    The root of Adagrad's sum of squared gradients, or of Adam's moving average of them.
    """
    tensors, _ = trainer.optimizer.state()
    total, n = 0.0, 0
    for name, tensor in tensors.items():
        start, key = name.rsplit("/", 1)
        second = "state2" if f"{start}/state2" in tensors else "state1"
        if key not in ("sum", "exp_avg_sq", second):
            continue
        if tensor.dtype == torch.uint8:
            number = second[-1]
            scales = tensors[f"{start}/absmax{number}"].repeat_interleave(BLOCK)[: tensor.numel()]
            tensor = tensors[f"{start}/qmap{number}"][tensor.flatten().long()] * scales
        total += float(tensor.sqrt().sum(dtype=torch.float64))
        n += tensor.numel()
    return total / n


# --- results -------------------------------------------------------------------------------------


def report(rows: Sequence[dict[str, Any]]) -> str:
    """One line for a run; `difference` is that of the losses from the first optimizer's."""
    head = ["optimizer", "seed", "valid nats", "difference", "√second moment"]
    head += ["state bytes", "per parameter"]
    first = {row["seed"]: row for row in reversed(rows)}
    return table(
        [*head, "in 8 bits", "ms/step", "peak GiB"],
        [
            [
                row["optimizer"],
                row["seed"],
                f"{row['valid_loss']:.4f}",
                f"{row['valid_loss'] - first[row['seed']]['valid_loss']:+.4f}",
                f"{row['mean_root_second_moment']:.4g}",
                f"{row['state_bytes']:,}",
                f"{row['state_bytes'] / row['parameters']:.3f}",
                f"{row['parameters_in_8_bits'] / row['parameters']:.1%}",
                row["step_milliseconds"],
                None if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
            ]
            for row in rows
        ],
    )


def plot(path: str, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Training losses, and what they differ from the first optimizer's on the same batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    width = min(SMOOTHED_STEPS, len(rows[0]["train_curve"]))
    first = {row["seed"]: _smooth(row, width) for row in reversed(rows)}
    for row in rows:
        steps, losses = _smooth(row, width)
        style = {
            "color": f"C{names.index(row['optimizer'])}",
            "linestyle": ("-", "--", ":", "-.")[seeds.index(row["seed"]) % 4],
            "label": f"{row['optimizer']}, seed {row['seed']}",
        }
        left.plot(steps, losses, **style)
        if row["optimizer"] != names[0]:
            right.plot(steps, losses - first[row["seed"]][1], **style)
    left.set(xlabel="step", ylabel=f"training loss (nats per token), mean of {width} steps")
    right.set(xlabel="step", ylabel=f"the same − {names[0]}'s")
    right.axhline(0, color="gray", linewidth=0.8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.rsplit(".", 1)[-1].lower(), dpi=150)


def _smooth(row: dict[str, Any], width: int) -> tuple[np.ndarray, np.ndarray]:
    steps, losses = np.array(row["train_curve"]).T
    return steps[width - 1 :], np.convolve(losses, np.full(width, 1 / width), "valid")


# --- the command ---------------------------------------------------------------------------------


def _optimizers(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in STATE_NUMBERS:
            raise UserError(
                f"--optimizers: {name!r} is none of {', '.join(STATE_NUMBERS)}; separate the names"
                " by commas"
            )
    return names


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise UserError(f"--seeds {text}: give whole numbers from 0, separated by commas")
    return list(dict.fromkeys(map(int, text.split(","))))


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shakespeare_char.json", metavar="FILE")
    parser.add_argument("--optimizers", default="AdamW,AdamW8bit", metavar="LIST")
    parser.add_argument("--seeds", default="1337,1", metavar="LIST")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there (.png, .svg or .pdf)")
    add_config_flags(parser)
    flags = parse_flags(parser, sys.argv[1:])
    file, names, seeds, json_file, plot_file = (
        flags.pop(key) for key in ("config", "optimizers", "seeds", "json", "plot")
    )
    names, seeds = _optimizers(names), _seeds(seeds)
    config = Config.from_dict({**read_json_object(file), "log_interval": 1, **flags}, source=file)
    check_targets((json_file, plot_file))
    if plot_file:
        check_plot(plot_file)
    data = prepare_data(config)
    rows = []
    for seed in seeds:
        for name in names:
            print(f"\n{name}, seed {seed}")
            rows.append(measure(config.replace(optimizer=name, seed=seed), data))
    print(f"\n{report(rows)}")
    if json_file:
        keys = ("lr", "min_lr", "weight_decay", "optimizer_eps", "adam_betas", "warmup_fraction")
        settings = {key: getattr(config, key) for key in (*keys, "micro_batch_size", "grad_accum")}
        write_results(json_file, rows, config=file, **settings)
    if plot_file:
        about = f"{file}, {rows[0]['parameters'] / 1e6:.1f}M parameters, lr {config.lr:g}"
        plot(plot_file, rows, about)


if __name__ == "__main__":
    run_command(main)
