"""`braidlora.json`: what an adapter folder means. Tasks, labels with their logits, and the base it was made for.

PEFT's own two files say how an adapter is built, not which logit is which label. This file travels in the folder, so
that an adapter that is copied out of its run, exported or sent to somebody is read as it was trained. It may come from
a stranger: it is validated strictly, and nothing in it is run or opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from braidlora.errors import CheckpointError
from braidlora.runs._names import ADAPTER_CARD

FORMAT_VERSION = 1
_MOST_BYTES = 16 << 20

# Shown in messages as it is, so no control characters.
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")
]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^((loaded-)?sha256:[0-9a-f]{64}|[0-9a-f]{16})$")]


class _Part(BaseModel):
    # Fields that a later version adds, and that can be done without, are passed over; what cannot be done without
    # comes with a higher format_version.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class BaseRecord(_Part):
    """The base model that an adapter was trained on.

    Attributes:
        path: as the recipe names it; where it is found here may differ.
        revision: of a hub model.
        fingerprint: `sha256:` and 64 hex digits over all tensors of the stored checkpoint, before any cast; sixteen
            bare digits in records of 0.1.
        dtype, quantization: what the weights were held in.
        architecture: the settings of its configuration that change what it computes.
    """

    path: Text
    revision: Text | None = None
    fingerprint: Fingerprint
    dtype: Text | None = None
    quantization: Text | None = None
    architecture: dict[str, Any] = {}


class TaskCard(_Part):
    """One task: for `classify` its labels in order, and the logit of each."""

    name: Text
    kind: Literal["generate", "classify"]
    labels: list[str] | None = None
    indices: list[int] | None = None


class AdapterCard(_Part):
    """The content of `braidlora.json`.

    Attributes:
        format_version: of this file.
        braidlora: the version that wrote it.
        tasks: what the adapter was trained on; none where that is not known.
        labels: of a classifier, the label of each logit: the union of the tasks' labels.
        base: None for a merged model, which is its own base, and where the base is not known.
    """

    format_version: Literal[1] = 1
    braidlora: Text
    tasks: list[TaskCard]
    labels: list[str] | None = None
    base: BaseRecord | None = None

    @model_validator(mode="after")
    def _consistent(self) -> AdapterCard:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("two tasks have the same name")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("two logits have the same label")
        for task in self.tasks:
            if task.kind == "generate":
                if task.labels is not None or task.indices is not None:
                    raise ValueError(f"task {task.name!r}: a generate task has no labels")
                continue
            if self.labels is None or not task.labels or task.indices is None:
                raise ValueError(f"task {task.name!r}: a classify task needs labels and indices")
            if len(set(task.labels)) < len(task.labels):
                raise ValueError(f"task {task.name!r}: a label stands there twice")
            logits = dict(enumerate(self.labels))
            if [logits.get(index) for index in task.indices] != list(task.labels):
                raise ValueError(f"task {task.name!r}: its labels and indices are not those of the logits")
        return self

    @property
    def task_labels(self) -> dict[str, list[str]]:
        """The labels of each `classify` task."""
        return {task.name: list(task.labels) for task in self.tasks if task.labels is not None}

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write it into an adapter folder that is being made."""
        (folder / ADAPTER_CARD).write_text(self.to_json(), encoding="utf-8", newline="\n")


def read_adapter_card(folder: Path) -> AdapterCard | None:
    """The card of an adapter folder; None where there is none, as in folders of 0.1 and of other programs.

    Raises:
        CheckpointError: it is damaged, not valid, or of a newer format.
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
    """The card in `content`; `path` is named in errors.

    Raises:
        CheckpointError: it is damaged, not valid, or of a newer format.
    """
    if len(content) > _MOST_BYTES:
        raise CheckpointError(f"{path}: larger than {_MOST_BYTES >> 20} MiB; this is no {ADAPTER_CARD}.")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). The file is damaged.") from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(version, bool):  # which equals 1, and is none
        raise CheckpointError(f"{path}: not valid: format_version: got {version}, expected {FORMAT_VERSION}.")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format_version {version}, and this braidlora reads up to {FORMAT_VERSION}; it was written by "
            "a newer one. Upgrade: pip install -U braidlora."
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
    """Labels for a message, in order, each in quotes and with control characters escaped."""
    rest = f", … ({len(labels) - most} more)" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + rest
