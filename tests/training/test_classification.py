"""Training a classifier and predicting with it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import tiny_config
from wavelet_lm.data.batches import ShuffledExamples
from wavelet_lm.data.tasks.examples import Batch, TokenExamples, cut, some
from wavelet_lm.experiments.comparison_folder import ModelRun
from wavelet_lm.experiments.tasks import curve_of
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.models.classifier.model import build_classifier
from wavelet_lm.training.classification import (
    Classification,
    accuracy,
    judge,
    majority_rate,
    predict,
    total_steps,
)
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.report import Diverged

SMALL = {
    "layers": 2,
    "levels": 3,
    "per_scale_mixer_widths": None,
    "heads": 2,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    "head_hidden": 16,
    "micro_batch_size": 8,
    "optimizer": "AdamW",
    "optimizer_eps": 1e-8,
    "lr": 0.01,
    "warmup_fraction": 0.1,
    "eval_interval": 10,
    "log_interval": 1,
    "skip_warmup_saves": False,
    "device": "cpu",
    **{f"dropout_{place}": 0 for place in ("embedding", "mixer", "projection", "mlp", "lm_head")},
}


def small_config(**changes):
    return tiny_config(**{**SMALL, **changes})


def marked(n: int, seed: int = 0) -> TokenExamples:
    """Of 2 … 12 tokens all are 4 but one, which is the class; where it stands says nothing."""
    generator = np.random.default_rng(seed)

    def rows():
        for _ in range(n):
            row = np.full(generator.integers(2, 13), 4, np.uint8)
            label = int(generator.integers(3))
            row[generator.integers(len(row))] = label
            yield row.tobytes(), label

    return TokenExamples.of(rows())


@pytest.fixture
def train(tmp_path):
    """Train a classifier in a run folder; its trainer, and the curve of its run."""
    folders = (tmp_path / str(i) for i in itertools.count())

    def trained(model, training, validation, config, steps, score=accuracy):
        run = ModelRun(next(folders))
        run.path.mkdir()
        run.begin(config)
        data = SimpleNamespace(train=training, valid=validation, test=validation)
        task = Classification(config, model, data, torch.device("cpu"), score)
        trainer = Trainer(config, task, run, steps)
        trainer.train()
        return trainer, curve_of(run.metrics())

    return trained


@pytest.mark.parametrize("model", ["wavelet_lm", "gpt", "wavelet_gpt"])
def test_a_simple_task_is_learned(model, train):
    """Read at the last position, to which the answer has to be carried."""
    config = small_config(model=model)
    torch.manual_seed(0)
    classifier = build_classifier(config, 5, 3)
    trainer, curve = train(classifier, marked(300), marked(50, 1), config, steps=100)
    result = judge(classifier, marked(100, 2), config)
    assert result["accuracy"] > 0.9
    assert result["examples"] == 100
    assert 1 / 3 <= result["majority"] < 0.5
    assert [row["step"] for row in curve] == list(range(10, 101, 10))
    assert curve[-1]["train_loss"] < 0.5 < curve[0]["train_loss"]
    assert trainer.progress.best_loss == -max(row["valid"] for row in curve)


def test_equal_seeds_make_equal_runs(train):
    curves = []
    for seed in (1, 1, 2):
        config = small_config(seed=seed)
        torch.manual_seed(0)
        _, curve = train(build_classifier(config, 5, 3), marked(50), marked(20), config, steps=20)
        curves.append([(row["train_loss"], row["valid"]) for row in curve])
    assert curves[0] == curves[1] != curves[2]


def test_accumulated_gradients_are_those_of_the_whole_batch(train):
    losses = []
    for changes in ({"micro_batch_size": 8}, {"micro_batch_size": 2, "grad_accum": 4}):
        config = small_config(eval_interval=1, **changes)
        torch.manual_seed(0)
        model = build_classifier(config, 5, 3).double()
        _, curve = train(model, marked(30), marked(9), config, steps=5)
        losses.append([row["train_loss"] for row in curve])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_best_weights_are_kept(train):
    config = small_config(eval_interval=5)
    values, weights = iter([0.2, 0.7, 0.7, 0.1]), []
    model = build_classifier(config, 5, 3)

    def score(logits, labels):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return next(values)

    trainer, curve = train(model, marked(50), marked(9), config, steps=18, score=score)
    assert [row["step"] for row in curve] == [5, 10, 15, 18]
    assert trainer.progress.best_step == 10
    assert not all(torch.equal(p, weights[1][name]) for name, p in model.named_parameters())
    Checkpoint(trainer.run.best).load_into(model)
    assert all(torch.equal(p, weights[1][name]) for name, p in model.named_parameters())


def test_a_diverged_training_stops(train):
    config = small_config()
    model = build_classifier(config, 5, 3)
    nn.init.constant_(model.classify[0].weight, float("nan"))
    with pytest.raises(Diverged, match=r"the loss is nan at step 1 .*; lower lr \(0.01\)"):
        train(model, marked(50), marked(9), config, steps=20)


def test_predictions_come_in_the_order_of_the_examples():
    examples, config = marked(37), small_config(micro_batch_size=5)
    model = build_classifier(config, 5, 3)
    logits, labels = predict(model, examples, config)
    assert labels.tolist() == examples.labels.tolist()
    with torch.no_grad():
        alone = [model.eval()(*examples.batch([i])[:2]) for i in range(37)]
    torch.testing.assert_close(logits, torch.cat(alone))
    expected = sum(z.argmax().item() == y for z, y in zip(alone, labels.tolist(), strict=True)) / 37
    assert accuracy(logits, labels) == pytest.approx(expected)
    assert majority_rate(np.array([0, 2, 2, 1, 2])) == 0.6


def test_every_epoch_shows_every_example_once():
    batches = ShuffledExamples(7, 3, seed=3)
    order = np.concatenate([batches[step] for step in range(7)])
    epochs = order.reshape(3, 7).tolist()
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    # Of any step alone, and of one that is longer than an epoch.
    assert all(batches[step].tolist() == order[3 * step :][:3].tolist() for step in (5, 0, 2))
    assert ShuffledExamples(7, 20, seed=3)[0].tolist() == order[:20].tolist()


def test_the_length_is_that_of_the_steps_or_of_the_epochs():
    config = small_config(micro_batch_size=4, grad_accum=2, epochs=3.5)
    assert [total_steps(config, n) for n in (1, 16, 100)] == [1, 7, 44]
    assert total_steps(config.replace(max_steps=5), 100) == 5


class Waves:
    """Sequences of frames that are no tokens, with labels for each class by itself."""

    key = "waves"

    def __init__(self, n: int):
        generator = torch.Generator().manual_seed(n)
        self.frames = torch.randn(n, 6, 4, generator=generator)
        self.lengths = np.full(n, 6)
        self.labels = (self.frames.mean(dim=1)[:, :2] > 0).float().numpy()

    def __len__(self):
        return len(self.lengths)

    def batch(self, indices):
        labels = torch.from_numpy(self.labels[indices])
        return Batch(self.frames[indices], torch.from_numpy(self.lengths[indices]), labels)


def test_other_inputs_and_many_labels(train):
    """A linear layer as front end; each of two classes is the sign of a mean over time."""
    config = small_config(model="gpt")
    model = build_classifier(
        config, 1, 2, pooling="mean", multi_label=True, front_end=nn.Linear(4, config.C)
    )

    def score(logits, labels):
        return ((logits > 0) == (labels > 0)).float().mean().item()

    _, curve = train(model, Waves(500), Waves(100), config, steps=150, score=score)
    assert curve[-1]["valid"] > 0.8


def test_examples_are_told_apart_by_their_keys():
    """Also where a sequence ends, and of which class it is."""
    splits = ([(b"ab", 0), (b"c", 1)], [(b"a", 0), (b"bc", 1)], [(b"ab", 1), (b"c", 1)])
    keys = [TokenExamples.of(pairs).key for pairs in (*splits, splits[0])]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


def test_parts_of_a_split_keep_the_shares_of_the_classes(tmp_path):
    examples = TokenExamples.of((bytes([i + 1, 1]), int(i % 10 == 0)) for i in range(100))
    parts = cut(examples, (0.5, 0.3, 0.2), 1, tmp_path)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[45, 5], [27, 3], [18, 2]]
    firsts = [part.sequence(i)[0] for part in parts for i in range(len(part))]
    assert sorted(firsts) == list(range(1, 101))
    few = some(examples, 7, seed=1)
    assert len(few) == 7
    assert few.batch([0, 6]).inputs.shape == (2, 2)
    assert some(examples, None, seed=1) is some(examples, 100, seed=1) is examples
