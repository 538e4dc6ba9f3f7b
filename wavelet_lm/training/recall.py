"""The task of a language model that answers questions; the loss counts the answers alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.config import Config
from wavelet_lm.data.batches import batch_size
from wavelet_lm.data.tasks.recall import Questions, RecallTask
from wavelet_lm.evaluation.answers import judge
from wavelet_lm.training.task import MicroBatch, Task, Validation


class Recall(Task):
    """Mean nats per answer, of fresh examples in every step.

    The first half of the steps may have shorter sequences (`RecallTask.shorter`), each kind as many
    steps, and as many more of them in a step.

    A validation asks `eval_batches` batches of questions, the same each time. `seed` says which
    examples come.

    Attributes:
        loss_function: `model.loss`, or what computes the same.
    """

    unit = "tokens"
    validates_untrained = False

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        task: RecallTask,
        device: torch.device,
        shorter: Sequence[tuple[int, RecallTask]] = (),
    ):
        super().__init__(config, model, device)
        self.task = task
        self.stages = [*shorter, (1, task)]
        self.per_step = batch_size(config) * task.length
        self.loss_function: Callable[..., tuple[Tensor, Any]] = model.loss

    def batch(self, step: int) -> list[MicroBatch]:
        last = len(self.stages) - 1
        times, task = self.stages[min(last, 2 * step * last // self.config.max_steps)]
        n = times * batch_size(self.config)
        questions = task.questions(n, self.config.seed, "train", step)
        return split(questions, times * self.config.micro_batch_size)

    def losses(self, step: int, batch: list[MicroBatch]) -> Iterator[Tensor]:
        for inputs, asked, answers, _ in batch:
            with self.autocast():
                loss, _ = self.loss_function(inputs, answers, None, asked)
            yield loss

    def validate(self) -> Validation:
        n = self.config.eval_batches * batch_size(self.config)
        found = self.asked("valid", n, streamed=False)
        loss, accuracy = found["nats"], found["accuracy"]
        words = [f"valid {100 * accuracy:.2f}% right", f"loss {loss:.4f}"]
        return Validation(loss, {"val_loss": loss, "accuracy": accuracy}, words)

    def asked(self, part: str, n: int, *, streamed: bool = True) -> dict[str, Any]:
        """What `judge` says of n examples of a part, `micro_batch_size` at once."""
        return judge(self.model, self._examples(part, n), streamed=streamed, amp=self.autocast())

    def _examples(self, part: str, n: int) -> Iterator[Questions]:
        size = batch_size(self.config)
        for step in range(-(-n // size)):
            questions = self.task.questions(size, self.config.seed, part, step)
            wanted = Questions(*(t[: n - step * size] for t in questions))
            yield from split(wanted, self.config.micro_batch_size)


def split(questions: Questions, size: int) -> list[Questions]:
    """The same in batches of up to so many examples."""
    return list(map(Questions._make, zip(*(t.split(size) for t in questions), strict=True)))
