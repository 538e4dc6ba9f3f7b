"""The project's models in lm-evaluation-harness: its tasks, scored by a decoder.

A context is read once, however many continuations are scored after it: each goes on from a copy of
the state. The harness's own `simple_evaluate` is called with a model object; the entry point by
which its documentation lets a package register a model is ignored by its version 0.4.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from wavelet_lm.data.tokenizers import Tokenizer
from wavelet_lm.errors import UserError

MAX_NEW_TOKENS = 256  # where a task does not say
# Logits that may stand at once, in elements.
LOGITS_AT_ONCE = 2**25

Scored = tuple[float, bool]


class Reader(Protocol):
    """What of `inference.decoder.Decoder` is needed."""

    longest: int | None
    device: torch.device
    vocab_size: int

    def prefill(self, texts: Sequence[Sequence[int]], state: Any = None) -> tuple[Tensor, Any]:
        """Texts to the logits [B, V] after them, and the state."""

    def read(self, idx: Tensor, state: Any) -> tuple[Tensor, Any]:
        """What follows, idx [B, T] int64, to the logits [B, T, V] after each, and the state."""

    def rows(self, state: Any, rows: Sequence[int]) -> Any:
        """The state of these rows, each as often as it is named."""


class HarnessModel(TemplateLM):
    """A model as the harness asks it: log-likelihoods, and texts up to where they end.

    Args:
        reader: reads tokens, as a `Decoder` does.
        write: from prompts, a number of tokens, texts to stop at and options of sampling to texts.
        start: the token before a text without a context.
        batch_size: texts at once.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer,
        write: Callable[..., list[str]],
        start: int,
        batch_size: int = 8,
    ):
        super().__init__()
        self.reader, self._tokenizer, self._write = reader, tokenizer, write
        self._start, self.batch_size = start, batch_size

    @property
    def eot_token_id(self) -> int:
        return self._start

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self._tokenizer.encode(string)

    # --- log-likelihoods --------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Scored]:
        """Of each continuation: Σ log p in nats, and whether greedy decoding would write it."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            groups.setdefault(self._fitting(context, continuation), []).append(i)
        found: dict[int, Scored] = {}
        contexts = list(groups)
        for first in range(0, len(contexts), self.batch_size):
            batch = contexts[first : first + self.batch_size]
            logits, state = self.reader.prefill([list(context) for context in batch])
            asked = [(row, i) for row, context in enumerate(batch) for i in groups[context]]
            continuations = [requests[i][2] for _, i in asked]
            scores = self._scored(logits, state, [row for row, _ in asked], continuations)
            found |= {i: score for (_, i), score in zip(asked, scores, strict=True)}
        for i, (pair, _, _) in enumerate(requests):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, found[i])
        return [found[i] for i in range(len(requests))]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The end of the context for which the model has room."""
        longest = self.reader.longest
        if longest is None:
            return tuple(context)
        room = longest + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"a continuation of {len(continuation):,} tokens is too long for this model, which"
                f" reads {longest:,}; leave this task out"
            )
        return tuple(context[-room:])

    @torch.no_grad()
    def _scored(
        self, logits: Tensor, state: Any, rows: list[int], continuations: list[list[int]]
    ) -> list[Scored]:
        """Continuations after the contexts of these rows: logits [B, V], one state for all."""
        log_probs = logits.double().log_softmax(-1).cpu()
        scores = [0.0] * len(rows)
        greedy = [True] * len(rows)

        def judge(k: int, after: Tensor, tokens: Sequence[int]) -> None:
            """after: log-probabilities [n, V] before each of the n tokens."""
            index = torch.tensor(tokens)
            scores[k] += float(after.gather(1, index[:, None]).sum())
            greedy[k] &= bool((after.argmax(-1) == index).all())

        for k, tokens in enumerate(continuations):
            if tokens:
                judge(k, log_probs[rows[k]][None], tokens[:1])
        # Those of one length are read together, so that nothing is padded but the last few.
        longer = sorted(
            (k for k, tokens in enumerate(continuations) if len(tokens) > 1),
            key=lambda k: len(continuations[k]),
        )
        while longer:
            most = len(continuations[longer[-1]]) - 1
            n = max(1, min(self.batch_size, LOGITS_AT_ONCE // (most * self.reader.vocab_size)))
            longer, part = longer[:-n], longer[-n:]
            idx = torch.zeros(len(part), most, dtype=torch.int64)
            for row, k in enumerate(part):
                idx[row, : len(continuations[k]) - 1] = torch.tensor(continuations[k][:-1])
            forked = self.reader.rows(state, [rows[k] for k in part])
            read, _ = self.reader.read(idx.to(self.reader.device), forked)
            for row, k in enumerate(part):
                T = len(continuations[k]) - 1
                judge(k, read[row, :T].double().log_softmax(-1).cpu(), continuations[k][1:])
        return list(zip(scores, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of whole texts, in nats: in one go, or by windows of what the model can read."""
        totals = []
        for request in requests:
            (text,) = request.args
            tokens, longest = self.tok_encode(text), self.reader.longest
            if longest is None:
                total = self._of_whole(tokens)
            else:
                windows = get_rolling_token_windows(tokens, self._start, longest, context_len=1)
                parts = [(None, *map(list, make_disjoint_window(pair))) for pair in windows]
                total = sum(score for score, _ in self._loglikelihood_tokens(parts))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.no_grad()
    def _of_whole(self, tokens: list[int]) -> float:
        """Of a text of any length, in chunks that the state holds together."""
        inputs = torch.tensor([[self._start, *tokens[:-1]]])
        targets = torch.tensor(tokens, dtype=torch.int64)
        size = max(1, min(4096, LOGITS_AT_ONCE // self.reader.vocab_size))
        total, state = 0.0, None
        for chunk, wanted in zip(inputs.split(size, 1), targets.split(size), strict=True):
            if not len(wanted):
                break
            logits, state = self.reader.read(chunk.to(self.reader.device), state)
            log_probs = logits[0].double().log_softmax(-1).cpu()
            total += float(log_probs.gather(1, wanted[:, None]).sum())
        return total

    # --- texts ------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to one of the texts that the task names."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found: dict[int, str] = {}
        for members in groups.values():
            options = dict(requests[members[0]].args[1])
            stop = options.get("until") or []
            stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
            n = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
            prompts = [self._prompt(requests[i].args[0], n) for i in members]
            texts = self._write(prompts, n, stop, _sampling(options))
            found |= {i: _until(t, stop) for i, t in zip(members, texts, strict=True)}
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[i])
        return [found[i] for i in range(len(requests))]

    def _prompt(self, context: str, n: int) -> str:
        """The end of the context that leaves room for n tokens."""
        longest = self.reader.longest
        tokens = [] if longest is None else self.tok_encode(context)
        if longest is None or len(tokens) + n <= longest:
            return context
        if n >= longest:
            raise UserError(
                f"a task asks for {n:,} tokens, and this model reads {longest:,}; leave it out"
            )
        return self._tokenizer.decode(tokens[n - longest :])


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Options of sampling by the project's names; greedy where the task does not ask for more."""
    sampled = {key: options[key] for key in ("temperature", "top_p", "top_k") if key in options}
    if not options.get("do_sample", sampled.get("temperature", 0) > 0):
        return {"temperature": 0.0}
    return {"temperature": 1.0, **sampled}


def _until(text: str, stop: list[str]) -> str:
    for end in stop:
        text = text.split(end)[0]
    return text


# --- tasks ----------------------------------------------------------------------------------------


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    seed: int = 1234,
) -> list[dict[str, Any]]:
    """Rows `task`, `metric`, `score`, `error`, `chance`, `n`, `num_fewshot` of tasks and groups.

    `error` is the standard error, None where the harness has none; `chance` what guessing scores,
    for accuracies of multiple choice, else None.

    Args:
        limit: documents of each task; below 1 the share of them.
        num_fewshot: worked examples before each document; None asks the task.
        include_path: a folder with more tasks, as YAML.
        seed: what examples are drawn by.

    Raises:
        UserError: an unknown task, or one whose data cannot be had.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval import evaluator

    manager = task_manager(tasks, include_path)
    # It asks git for the commit of the folder that it is called in, which is nobody's business, and
    # git says "fatal" on standard error where that is no repository.
    evaluator.get_git_commit_hash = lambda: None
    try:
        results = evaluator.simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (DatasetsError, OSError) as error:
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"the data of {', '.join(tasks)} cannot be had ({line})") from None
    except TemplateError as error:
        line = str(error).split("\n")[0]
        raise UserError(f"a template of {', '.join(tasks)} cannot be filled in ({line})") from None
    return [
        {
            "task": task,
            "metric": key.removesuffix(",none").replace(",", " "),
            "score": value,
            "error": _number(scores.get(_error_of(key))),
            "chance": chance(key, results, task),
            "n": results.get("n-samples", {}).get(task, {}).get("effective"),
            "num_fewshot": results.get("n-shot", {}).get(task),
        }
        for task, scores in {**results["results"], **results.get("groups", {})}.items()
        for key, value in scores.items()
        if "," in key and "_stderr," not in key and _number(value) is not None
    ]


def task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's manager that knows these tasks.

    Its own tasks, thousands of files, are only looked through where one of them is asked for.

    Raises:
        UserError: an unknown task.
    """
    from lm_eval.tasks import TaskManager

    unknown = list(tasks)
    damaged = _damaged_files(include_path) if include_path else {}
    for with_its_own in (False, True):
        manager = TaskManager(include_path=include_path, include_defaults=with_its_own)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
        for file, problem in damaged.items():
            if unknown[0] in file.read_text(encoding="utf-8", errors="replace"):
                raise UserError(f"{file}, of task {unknown[0]!r}, does not parse: {problem}")
    raise UserError(
        f"there is no task {unknown[0]!r} in lm-evaluation-harness"
        + (f" or in {include_path}" if include_path else "; --include_path FOLDER adds your own")
        + "".join(f"; {file} does not parse: {problem}" for file, problem in damaged.items())
    )


def _damaged_files(folder: str) -> dict[Path, str]:
    """What is wrong with task files that do not parse, which the harness leaves out in silence."""
    found = {}
    for file in sorted(Path(folder).rglob("*.yaml")):
        try:
            yaml.load(file.read_bytes(), _AnyTag)
        except yaml.YAMLError as error:
            mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
            line = f"line {mark.line + 1}: " if mark is not None else ""
            found[file] = line + " ".join(str(problem or error).split())
    return found


class _AnyTag(yaml.SafeLoader):
    """Reads files whose tags, such as !function, only the harness knows."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def chance(metric: str, results: dict[str, Any], task: str) -> float | None:
    """What guessing scores by an accuracy of multiple choice: the mean of 1 / choices."""
    config = results.get("configs", {}).get(task, {})
    if config.get("output_type") != "multiple_choice" or not metric.startswith("acc"):
        return None
    # A document is judged once for each filter, by the same answers.
    samples = results.get("samples", {}).get(task, [])
    numbers = {sample["doc_id"]: len(sample["filtered_resps"]) for sample in samples}
    if not numbers or min(numbers.values()) < 1:
        return None
    return sum(1 / n for n in numbers.values()) / len(numbers)


def _error_of(key: str) -> str:
    metric, _, filter_name = key.partition(",")
    return f"{metric}_stderr,{filter_name}"


def _number(value: Any) -> float | None:
    """It as a finite number, None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
