"""A loaded model that predicts rows of its tasks and continues prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from braidlora.adapters import for_tasks
from braidlora.config import EvaluationSection, PromptSection
from braidlora.errors import ConfigError, DataError
from braidlora.evaluation.extraction import extract
from braidlora.evaluation.questions import Questions, mode_of
from braidlora.inference.rows import Given, from_values, read_given
from braidlora.inference.sampling import Sampling
from braidlora.inference.target import Target
from braidlora.inference.text import continue_prompts, encode_prompts, is_chat
from braidlora.tasks import Task
from braidlora.tasks.read import RawRow

_BATCHES = 4  # of rows that are read before the first of them is answered

Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Settings:
    evaluation: EvaluationSection
    prompt: PromptSection


class Model:
    """A model with its tasks, as `braidlora.load` returns it.

    Attributes:
        tasks: the names of the tasks it was trained on; empty if its folder does not record them.
        network: the transformers or PEFT model, in evaluation mode.
        tokenizer: its tokenizer.
    """

    def __init__(self, target: Target, network: Any, tokenizer: Any) -> None:
        self._target, self.network, self.tokenizer = target, network, tokenizer
        self.tasks = list(target.tasks)

    def labels(self, task: str | None = None) -> list[str] | None:
        """The labels, or the options, of a task; None if its answers are free text."""
        found = self.task(task)
        return list(found.labels or []) if found.kind == "classify" else found.options

    def task(self, name: str | None = None) -> Task:
        """A task by name, without rows; a model with a single task needs no name.

        Raises:
            ConfigError: there is no such task, or several and no name.
        """
        return self._target.task(name)

    def batch_size(self, given: int | None = None) -> int:
        """Rows at once: `given`, or the recipe's."""
        return self._settings(None, None, given).evaluation.batch_size

    def predict(
        self,
        rows: str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]],
        task: str | None = None,
        *,
        mode: Literal["generate", "rank"] | None = None,
        batch_size: int | None = None,
    ) -> list[dict[str, Any]]:
        """Answer rows of a task, as `evaluate` answers test rows.

        Args:
            rows: mappings with the task's columns or fields (`text`; or `instruction` and `input`), or texts.
            task: its name; not needed if there is one.
            mode: of a language model: `rank` chooses among the task's options, `generate` writes; by default as the
                recipe says.
            batch_size: rows at once; changes nothing but rounding.

        Returns:
            for each row, in order, `row` (from 1), `task` and `prediction`; `probabilities` by label or option, if it
            chooses among some; `extracted`, if the task extracts its answer from the text.

        Raises:
            ConfigError: an unknown task, or a mode that does not fit it.
            DataError: a row lacks a field.
        """
        values = [rows] if isinstance(rows, str | Mapping) else rows
        answers = []
        for answer in self.predictions(from_values(values), task, mode=mode, batch_size=batch_size):
            if "error" in answer:
                raise DataError(f"row {answer['row']}: {answer['error']}.")
            answers.append(answer)
        return answers

    def predictions(
        self,
        raws: Iterable[RawRow],
        task: str | None = None,
        *,
        mode: Literal["generate", "rank"] | None = None,
        batch_size: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """As `predict`, but one by one, and a bad row gives `error` and `place` instead of a prediction."""
        found = self.task(task)
        settings = self._settings(found, mode, batch_size)
        if mode is not None:
            found = replace(found, mode=mode)
        given = read_given(raws, found, self._target.columns.get(found.name, {}))
        return self._answered(given, found, settings)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        task: str | None = None,
        *,
        raw: bool = False,
        sampling: Sampling | None = None,
        batch_size: int | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Any:
        """Continue prompts.

        Args:
            prompts: a text, a mapping with `instruction` and `input`, a chat (a list of messages with `role` and
                `content`, or a mapping with such `messages`, and `tools`), or an iterable of these.
            task: whose template the text is put into; by default that of all tasks, if they have the same. Of an
                adapter that weights its experts by task also whose weights are used, for chats and with `raw` too.
            raw: take a text as it is, without a template.
            sampling, options: how the next token is chosen, see `Sampling`: `max_new_tokens`, `temperature`, `top_p`,
                `top_k`, `seed`, `stop`. Greedy by default.
            batch_size: prompts at once. Samples depend on it.
            streamer: of transformers, e.g. `TextStreamer(model.tokenizer, skip_prompt=True)`, for a single prompt.

        Returns:
            a text for a single prompt, otherwise a list of texts.

        Raises:
            ConfigError: the model is a classifier, a setting is out of range, or the template is not clear.
        """
        if self._target.kind == "classify":
            raise ConfigError(f"{self._target.given}: a classifier writes no text; use `predict`.")
        chosen = sampling or Sampling(**options)
        single = _is_prompt(prompts)
        given: list[Any] = [prompts] if single else list(prompts)
        settings = self._settings(None, None, batch_size)
        gate = self._gate(task)
        if gate is not None and not self.tasks:
            task = None  # the folder names the tasks of its weights, but describes none
        template = None if raw else self._template(task, given)
        room = chosen.max_new_tokens or self._max_new_tokens(task)
        ids = encode_prompts(given, template, self.network, self.tokenizer, settings.prompt.cutoff, room)
        with for_tasks(gate) if gate is not None else nullcontext():
            texts = self._continued(
                ids, replace(chosen, max_new_tokens=room), settings.evaluation.batch_size, streamer
            )
        return texts[0] if single else texts

    def _answered(self, given: Iterator[Given], task: Task, settings: _Settings) -> Iterator[dict[str, Any]]:
        size = _BATCHES * settings.evaluation.batch_size
        while chunk := list(itertools.islice(given, size)):
            good = [one.row for one in chunk if one.row is not None]
            answers: dict[int, tuple[str, dict[str, float] | None]] = {}
            if good:
                questions = self._questions(replace(task, test=good), settings)
                for index, answer, probabilities in questions.scored(range(len(good))):
                    answers[index] = answer, probabilities
            at = itertools.count()
            for one in chunk:
                line: dict[str, Any] = {"row": one.number, "task": task.name}
                if one.row is None:
                    yield line | {"error": one.problem, "place": one.place}
                    continue
                prediction, probabilities = answers[next(at)]
                line["prediction"] = prediction
                if probabilities is not None:
                    line["probabilities"] = probabilities
                if task.kind == "generate" and task.extract != "none":
                    line["extracted"] = extract(task.extract, prediction)
                yield line

    def _questions(self, task: Task, settings: _Settings) -> Questions:
        """The rows of a task and how they are answered; a subclass may have a server answer."""
        return Questions(task, self.network, self.tokenizer, settings, self._target.label_space)

    def _continued(
        self, ids: Sequence[Sequence[int]], sampling: Sampling, batch_size: int, streamer: Any = None
    ) -> list[str]:
        """The continuation of each prompt; a subclass may have a server continue it."""
        return continue_prompts(self.network, self.tokenizer, ids, sampling, batch_size, streamer)

    def _settings(self, task: Task | None, mode: str | None, batch_size: int | None) -> _Settings:
        changed: dict[str, Any] = {}
        if batch_size is not None:
            if not 1 <= batch_size <= 65_536:
                raise ConfigError(f"--batch-size: got {batch_size}; expected 1 to 65536.")
            changed["batch_size"] = batch_size
        if mode is not None:
            if task is not None and task.kind == "classify":
                raise ConfigError(
                    f"--mode: task {task.name} is answered by a classifier's head; leave it out."
                )
            changed["mode"] = mode
        evaluation = self._target.evaluation.model_copy(update=changed)
        ranks = task is not None and (mode or mode_of(task, evaluation)) == "rank"
        if task is not None and ranks and not task.options:
            raise ConfigError(
                f"--mode: `rank` chooses among a task's options, but {task.name} has none; use generate."
            )
        return _Settings(evaluation, self._target.prompt)

    def _template(self, task: str | None, prompts: Sequence[Any]) -> Any:
        if all(map(is_chat, prompts)):
            own = [self.task(task)] if task is not None else self._target.tasks.values()
            return next((one.template for one in own if one.template.chat), None)
        if task is not None:
            return self.task(task).template
        if not self.tasks:
            return None
        templates = [one.template for one in self._target.tasks.values()]
        if any(one != templates[0] for one in templates):
            raise ConfigError(
                f"--task: the tasks of {self._target.given} have different prompts; choose one of "
                f"{', '.join(self.tasks)}, or pass the prompt unchanged with --raw (raw=True)."
            )
        return templates[0]

    def _gate(self, task: str | None) -> str | None:
        """The task that chooses the weights of the experts; None if they do not depend on it.

        Raises:
            ConfigError: they do, and no task is given.
        """
        adapter: Any = getattr(self.network, "peft_config", {}).get("default")
        if not getattr(adapter, "by_task", False):
            return None
        names = adapter.task_names
        if task is None and len(names) > 1:
            raise ConfigError(
                f"--task: {self._target.given} weights its experts by task; choose one of {', '.join(names)}."
            )
        return names[0] if task is None else task

    def _max_new_tokens(self, task: str | None) -> int:
        own = self.task(task).max_new_tokens if task is not None else None
        return own or self._target.evaluation.max_new_tokens


def _is_prompt(value: Any) -> bool:
    """Whether this is one prompt: a text, a row, or a chat."""
    if isinstance(value, str | Mapping):
        return True
    return isinstance(value, Sequence) and bool(value) and all(
        isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value
    )  # fmt: skip
