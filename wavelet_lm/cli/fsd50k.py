"""Train and judge models on FSD-50K: which of 200 classes of sound is heard in a clip?

    python -m wavelet_lm.evaluation.fsd50k --data DIR --model gpt,wavelet_gpt:haar --steps 50000

A convolutional front end turns 25 ms of sound into a vector (`models/audio_front_end.py`), the
model reads 1 s of them, and a head gives each class a logit. A clip's score for a class is the mean
probability of its pieces of 1 s. Reported are

    top-5    the share of clips of which at least one class is among the five of the highest score
    mAP      the average precision of each class over all clips, its mean over the classes

beside those of always giving the classes their frequency in the training split. The weights with
the best mAP on the validation split are tested. Without --config the models have the size of the
WaveletGPT paper: 6 layers of width 64.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wavelet_lm.cli.task_flags import add_shared_flags, command_parser, configs_of, given, positive
from wavelet_lm.config import Config
from wavelet_lm.data.tasks.fsd50k import DOWNLOAD, ClipExamples, SoundTask, load
from wavelet_lm.errors import UserError
from wavelet_lm.experiments.comparison_folder import ComparisonFolder
from wavelet_lm.experiments.results import check_targets
from wavelet_lm.experiments.tasks import DEFAULTS, compare, table
from wavelet_lm.models.classifier.audio_front_end import PATCH, AudioFrontEnd
from wavelet_lm.models.classifier.model import SequenceClassifier, build_classifier
from wavelet_lm.training.classification import predict
from wavelet_lm.training.processes import one_process_only
from wavelet_lm.training.run_folder import check_folder

STEPS = 50_000
TOP = 5
SHARES = {"top-5 %": "top5", "mAP %": "mAP"}


def main() -> None:
    one_process_only("fsd50k")
    parser = command_parser(__doc__, "--data DIR")
    parser.add_argument("--data", metavar="DIR", help="folder of FSD50K, as it is published")
    parser.add_argument(
        "--clips", type=positive, metavar="N", help="read the first N clips of each split [all]"
    )
    add_shared_flags(parser, f"{STEPS:,}")
    flags, folder = given(parser, "fsd50k")
    own = {key: flags.pop(key) for key in ("data", "clips", "pooling", "json", "config")}
    if own["data"] is None:
        raise UserError(f"--data is missing; {DOWNLOAD}")
    check_targets([own["json"]])
    defaults = {**DEFAULTS, "C": 64, "levels": 5, "max_steps": STEPS}
    configs = configs_of(defaults, own["config"], flags)
    out_dir = next(iter(configs.values())).out_dir
    check_folder(out_dir)
    task = load(Path(own["data"]).expanduser(), PATCH, own["clips"])
    print(describe(task), flush=True)
    prior = {part: judge_prior(task.train, getattr(task, part)) for part in ("valid", "test")}
    rows = compare(
        configs,
        task,
        folder or ComparisonFolder.create(out_dir, "fsd50k", sys.argv[1:]),
        build=partial(build, n_classes=len(task.classes), pooling=own["pooling"]),
        judge=judge,
        score=lambda logits, _: figures(clip_scores(logits, task.valid), task.valid)["mAP"],
        file=own["json"],
        about={
            "task": "fsd50k",
            **{key: own[key] for key in ("data", "clips", "pooling")},
            "prior": prior,
        },
    )
    print(table([*rows, {"model": "class frequencies", **prior}], SHARES))


def describe(task: SoundTask) -> str:
    """The task in a line."""
    parts = {part: getattr(task, part) for part in ("train", "valid", "test")}
    counts = (f"{len(p.clips):,} {part} clips ({len(p):,} s)" for part, p in parts.items())
    return f"fsd50k: {', '.join(counts)}; {len(task.classes)} classes"


def build(config: Config, n_classes: int, pooling: str) -> SequenceClassifier:
    """A classifier of sounds, of which each class is heard or not."""
    return build_classifier(
        config,
        vocab_size=1,  # there are no tokens
        n_classes=n_classes,
        pooling=pooling,
        multi_label=True,
        front_end=AudioFrontEnd(config.C),
    )


def judge(model: SequenceClassifier, examples: ClipExamples, config: Config) -> dict[str, float]:
    """`figures` of a model on a split."""
    logits, _ = predict(model, examples, config)
    return figures(clip_scores(logits, examples), examples)


def clip_scores(logits: Tensor, examples: ClipExamples) -> np.ndarray:
    """The mean probabilities [clips, n_classes] of each clip's pieces, of logits [N, n_classes]."""
    sums = np.zeros_like(examples.clip_labels, dtype=np.float64)
    np.add.at(sums, examples.clip_of, torch.sigmoid(logits.double()).numpy())
    return sums / np.bincount(examples.clip_of)[:, None]


def figures(scores: np.ndarray, examples: ClipExamples) -> dict[str, float]:
    """`top5` and `mAP` of scores [clips, n_classes]."""
    labels = examples.clip_labels > 0
    return {
        "clips": len(labels),
        "top5": top_accuracy(scores, labels),
        "mAP": mean_average_precision(scores, labels),
    }


def judge_prior(training: ClipExamples, examples: ClipExamples) -> dict[str, float]:
    """The same, of scores that are the frequencies of the classes in training."""
    frequencies = training.clip_labels.mean(axis=0)
    return figures(np.broadcast_to(frequencies, examples.clip_labels.shape), examples)


def top_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = TOP) -> float:
    """The share of clips of which a class is among the k of the highest score.

    Args:
        scores, labels: [clips, n_classes], numbers and bools; of equal scores the first class wins.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float(np.take_along_axis(labels, best, axis=1).any(axis=1).mean())


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over the classes that any clip has of their average precision."""
    present = np.flatnonzero(labels.any(axis=0))
    return float(np.mean([average_precision(scores[:, c], labels[:, c]) for c in present]))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Σ_k (R_k − R_{k−1}) P_k over the distinct scores as thresholds, the highest first.

    P_k and R_k are the precision and recall of what scores at least the k-th of them.

    Args:
        scores, labels: [N], numbers and bools, at least one true.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(labels[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each group of equals
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0) * precision))
