"""How a task's test rows are put to a model, and how its answers are read: by writing, ranking, or its head."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal, Protocol

from braidlora.adapters import for_tasks
from braidlora.config import EvaluationSection, PromptSection
from braidlora.errors import ConfigError, DataError
from braidlora.evaluation import predict
from braidlora.evaluation.digest import digest_json
from braidlora.models.base import positions_of
from braidlora.tasks import LabelSpace, Task, encode_answer, encode_prompt, encode_texts, option_texts
from braidlora.tasks.checks import check_positive


def mode_of(task: Task, evaluation: EvaluationSection) -> Literal["generate", "rank", "classify"]:
    """How a task is answered: by a classifier's head, or as the task says, or else as the recipe says for all."""
    return "classify" if task.kind == "classify" else task.mode or evaluation.mode


class Settings(Protocol):
    """What of a recipe decides how rows are answered."""

    @property
    def evaluation(self) -> EvaluationSection: ...
    @property
    def prompt(self) -> PromptSection: ...


class Questions:
    """The encoded test rows of one task, and how the model answers them.

    Args:
        task: with test rows.
        model, tokenizer: the model; its adapter's weights may change between two calls of `answers`.
        config: its `evaluation` and `prompt` sections are read.
        label_space: of `classify` tasks.
    """

    def __init__(
        self, task: Task, model: Any, tokenizer: Any, config: Settings, label_space: LabelSpace | None
    ) -> None:
        self.task, self.model, self.tokenizer = task, model, tokenizer
        self.evaluation = config.evaluation
        self.mode = mode_of(task, config.evaluation)
        self.max_new_tokens = _max_new_tokens(task, config)
        self.options: list[list[int]] = []
        if self.mode == "classify":
            assert label_space is not None
            self.label_names = label_space.names
            self.allowed = label_space.mask[_row_of(task, label_space)]
            self.prompts = [
                row.input_ids
                for row in encode_texts(task.test, task.template, tokenizer, config.prompt.cutoff)
            ]
            return
        if self.mode == "rank":
            self.options = encoded_options(task, tokenizer)
        cutoff = longest_prompt(task, model, config, self.options)
        self.prompts = [encode_prompt(row, task.template, tokenizer, cutoff) for row in task.test]

    def digests(self) -> dict[str, str]:
        """Digests of what the answers depend on apart from the model; the batch size is not part of it."""
        settings: dict[str, Any] = {
            "mode": self.mode,
            "metric": self.task.metric,
            "extract": self.task.extract,
        }
        if self.mode == "generate":
            ends = predict.end_tokens(self.model, self.tokenizer)
            settings |= {
                "beams": self.evaluation.num_beams, "max_new_tokens": self.max_new_tokens, "end_tokens": ends,
            }  # fmt: skip
        elif self.mode == "rank":
            settings |= {"options": self.options, "length_normalized": self.evaluation.length_normalized}
        else:
            settings |= {"labels": self.label_names, "allowed": self.allowed.tolist()}
        return {"prompts": digest_json(self.prompts), "settings": digest_json(settings)}

    def answers(self, missing: Sequence[int]) -> Generator[tuple[int, str], None, None]:
        """Yields (row index, answer) for the rows of `missing`, in the order in which they are answered."""
        for index, answer, _ in self.scored(missing):
            yield index, answer

    def scored(
        self, missing: Sequence[int]
    ) -> Generator[tuple[int, str, dict[str, float] | None], None, None]:
        """As `answers`, with the probability of each of the task's labels or options; None where text is generated.

        Of options: the softmax of what `rank` compares, which is the mean log-likelihood of a token by default.
        """
        with for_tasks(self.task.name):
            yield from self._scored(missing)

    def _scored(
        self, missing: Sequence[int]
    ) -> Generator[tuple[int, str, dict[str, float] | None], None, None]:
        prompts = [self.prompts[index] for index in missing]
        batch_size, pad = self.evaluation.batch_size, self.tokenizer.pad_token_id
        if self.mode == "generate":
            for at, text in predict.generate(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.max_new_tokens,
                num_beams=self.evaluation.num_beams,
                batch_size=batch_size,
            ):
                yield missing[at], self.task.template.answer(text), None
        elif self.mode == "rank":
            names = self.task.options or []
            for at, values in predict.rank(
                self.model,
                prompts,
                self.options,
                pad_token_id=pad,
                length_normalized=self.evaluation.length_normalized,
                batch_size=batch_size,
            ):
                best = max(range(len(values)), key=values.__getitem__)
                yield missing[at], names[best], dict(zip(names, _softmax(values), strict=True))
        else:
            for indices, logits_bL in predict.class_logits(
                self.model, prompts, self.allowed, pad_token_id=pad, batch_size=batch_size
            ):
                chosen = logits_bL.argmax(-1).tolist()
                for at, label, values in zip(indices, chosen, logits_bL.double().tolist(), strict=True):
                    shares = _softmax(values)
                    own = {name: shares[id] for id, name in enumerate(self.label_names) if self.allowed[id]}
                    yield missing[at], self.label_names[label], own


def _softmax(values: Sequence[float]) -> list[float]:
    largest = max(values)
    shares = [math.exp(value - largest) for value in values]
    return [share / math.fsum(shares) for share in shares]


def _row_of(task: Task, label_space: LabelSpace) -> int:
    if task.name not in label_space.task_labels:
        raise ConfigError(
            f"task {task.name}: the classifier was not trained on it; its tasks are "
            f"{', '.join(label_space.task_labels)}."
        )
    known = label_space.task_labels[task.name]
    unknown = sorted({row["label"] for row in task.test if "label" in row} - set(known))
    if unknown:
        raise DataError(
            f"task {task.name}: test rows have the label {', '.join(unknown)}, which the classifier lacks. "
            f"Its labels for this task are {', '.join(known)}."
        )
    check_positive(task, known)
    return list(label_space.task_labels).index(task.name)


def _max_new_tokens(task: Task, config: Settings) -> int:
    return task.max_new_tokens or config.evaluation.max_new_tokens


def encoded_options(task: Task, tokenizer: Any) -> list[list[int]]:
    texts = option_texts(task)
    return [encode_answer(task.template.written(text, tokenizer), tokenizer) for text in texts]


def longest_prompt(task: Task, model: Any, config: Settings, options: Sequence[Sequence[int]]) -> int:
    """The recipe's cutoff, or less if prompt and answer together would exceed the model's positions."""
    room = max(map(len, options)) if options else _max_new_tokens(task, config)
    positions = positions_of(model)
    if positions is None:
        return config.prompt.cutoff
    if room >= positions:
        raise ConfigError(
            f"task {task.name}: answers of {room} tokens leave no room for a prompt, because the model has {positions} "
            "positions. Lower max_new_tokens."
        )
    return min(config.prompt.cutoff, positions - room)
