"""`braidlora.json`, the card of an adapter folder: its tasks, prompts, the label of each logit, and its base model.

PEFT's two files describe how an adapter is built, not which logit belongs to which label or what a prompt is. The card
is part of the folder, so that an adapter copied out of its run, exported or sent to someone else is still read as it
was trained. It may come from an untrusted source: it is validated strictly, and nothing it names is executed or opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from braidlora.errors import CheckpointError
from braidlora.runs._files import parse_json
from braidlora.runs._names import ADAPTER_CARD

FORMAT_VERSION = 1
_MOST_BYTES = 16 << 20

# Shown in messages verbatim, so no control characters.
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")
]
Long = Annotated[str, StringConstraints(max_length=1 << 20)]
Format = Annotated[str, StringConstraints(max_length=1 << 16)]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^((loaded-)?sha256:[0-9a-f]{64}|[0-9a-f]{16})$")]


class _Part(BaseModel):
    # Optional fields that a later version adds are ignored; required ones come with a higher format_version.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class BaseRecord(_Part):
    """The base model that an adapter was trained on.

    Attributes:
        path: as in the recipe; it may be somewhere else on this machine.
        revision: the revision of a hub model.
        fingerprint: `sha256:` and 64 hex digits, over all tensors of the stored checkpoint, before any cast; 16 hex
            digits without a prefix in records of version 0.1.
        dtype, quantization: of the weights in memory.
        architecture: the settings of its configuration that affect what it computes.
    """

    path: Text
    revision: Text | None = None
    fingerprint: Fingerprint
    dtype: Text | None = None
    quantization: Text | None = None
    architecture: dict[str, Any] = {}


class PromptText(_Part):
    """A prompt template as text.

    Attributes:
        name: in the recipe.
        with_input: format string for rows whose `input` is not empty; empty for `chat`.
        without_input: format string for the others. Both are those of evaluation.
        chat: the tokenizer's chat template: a row's messages, or instruction and input as one user message.
        chat_template_kwargs: variables for it.
    """

    name: Format
    with_input: Format
    without_input: Format
    chat: bool = False
    chat_template_kwargs: dict[Text, bool | int | float | Long] = {}


class TaskCard(_Part):
    """One task; for `classify` with its labels in order and the index of each logit.

    Attributes:
        template: its prompt; None in cards of version 0.2 and before.
        columns: the column of each field in the rows it was trained on, where the names differ.
        options, option_texts: the answers to choose from, and how each is written as an answer.
        mode: how it is answered, if not as `answers` says for all tasks.
        extract, max_new_tokens, metric: as in the recipe.
    """

    name: Text
    kind: Literal["generate", "classify"]
    labels: list[str] | None = None
    indices: list[int] | None = None
    template: PromptText | None = None
    columns: dict[Text, Long] = {}
    options: list[Long] | None = None
    option_texts: list[Long] | None = None
    mode: Literal["generate", "rank"] | None = None
    extract: Text = "none"
    max_new_tokens: Tokens | None = None
    metric: Text | None = None


class PromptCard(_Part):
    """How text becomes tokens.

    Attributes:
        cutoff: the most tokens of a sequence in training, and of a prompt.
        bos_token_ids: what a prompt begins with, unless it is a chat.
        eos_token, eos_token_id: what every answer ends with.
        chat_template: the tokenizer's, as text, if a task uses it; otherwise its digest alone.
    """

    cutoff: Tokens
    bos_token_ids: list[Token] = []
    eos_token: Long | None = None
    eos_token_id: Token | None = None
    chat_template: Long | None = None
    chat_template_digest: Digest | None = None


class AnswerCard(_Part):
    """How the recipe's evaluation takes answers, which is how `predict` takes them."""

    mode: Literal["generate", "rank"] = "generate"
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    num_beams: Annotated[int, Field(ge=1, le=1024)] = 1
    max_new_tokens: Tokens = 32
    length_normalized: bool = True


class AdapterCard(_Part):
    """The content of `braidlora.json`.

    Attributes:
        format_version: the version of this file's format.
        braidlora: the version of braidlora that wrote it.
        tasks: the tasks of the training; empty if unknown.
        labels: for a classifier, the label of each logit: the union of the tasks' labels.
        base: None for a merged model, which is its own base, or if the base is unknown.
        prompt, answers: how text becomes tokens, and tokens an answer; None in cards of version 0.2 and before.
        versions: of the libraries that trained it.
    """

    format_version: Literal[1] = 1
    braidlora: Text
    tasks: list[TaskCard]
    labels: list[str] | None = None
    base: BaseRecord | None = None
    prompt: PromptCard | None = None
    answers: AnswerCard | None = None
    versions: dict[Text, Text] = {}

    @model_validator(mode="after")
    def _consistent(self) -> AdapterCard:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("two tasks have the same name")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("two logits have the same label")
        for task in self.tasks:
            if (task.option_texts is None) != (task.options is None) or (
                task.option_texts is not None and len(task.option_texts) != len(task.options or [])
            ):
                raise ValueError(f"task {task.name!r}: options and option_texts do not match")
            if task.mode == "rank" and not task.options:
                raise ValueError(f"task {task.name!r}: mode is rank, and there are no options")
            if task.kind == "generate":
                if task.labels is not None or task.indices is not None:
                    raise ValueError(f"task {task.name!r}: a generate task has no labels")
                continue
            if self.labels is None or not task.labels or task.indices is None:
                raise ValueError(f"task {task.name!r}: a classify task needs labels and indices")
            if len(set(task.labels)) < len(task.labels):
                raise ValueError(f"task {task.name!r}: duplicate label")
            logits = dict(enumerate(self.labels))
            if [logits.get(index) for index in task.indices] != list(task.labels):
                raise ValueError(
                    f"task {task.name!r}: its labels and indices do not match those of the logits"
                )
        return self

    @property
    def task_labels(self) -> dict[str, list[str]]:
        """The labels of each `classify` task."""
        return {task.name: list(task.labels) for task in self.tasks if task.labels is not None}

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write the card into an adapter folder."""
        (folder / ADAPTER_CARD).write_text(self.to_json(), encoding="utf-8", newline="\n")


def read_adapter_card(folder: Path) -> AdapterCard | None:
    """The card of an adapter folder; None if it has none, as folders of version 0.1 and of other programs.

    Raises:
        CheckpointError: the card is damaged, invalid, or of a newer format.
    """
    path = folder / ADAPTER_CARD
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    return parse_adapter_card(content, path)


def parse_adapter_card(content: bytes, path: Path) -> AdapterCard:
    """Parse the content of a card; `path` is for error messages.

    Raises:
        CheckpointError: the card is damaged, invalid, or of a newer format.
    """
    if len(content) > _MOST_BYTES:
        raise CheckpointError(
            f"{path}: larger than {_MOST_BYTES >> 20} MiB, so this is not a {ADAPTER_CARD}."
        )
    value = parse_json(path, content)
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, bool):  # True == 1
        raise CheckpointError(f"{path}: not valid: format_version: got {version}, expected {FORMAT_VERSION}.")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: got format_version {version}; this version of braidlora reads at most {FORMAT_VERSION}. Upgrade: "
            "pip install -U braidlora."
        )
    try:
        return AdapterCard.model_validate(value)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}"
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: not valid: {'; '.join(problems[:3])}{more}.") from None


def quoted(labels: Sequence[str], most: int = 20) -> str:
    """Labels for a message, in order, quoted and with control characters escaped."""
    rest = f", … ({len(labels) - most} more)" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + rest
