"""Where an adapter comes from, and what that tells about its labels and its base."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from braidlora import __version__
from braidlora.config import FederatedConfig, ModelSection, RunConfig, load_config
from braidlora.errors import CheckpointError, ConfigError
from braidlora.models.identity import base_differences, base_record
from braidlora.models.old_fingerprints import sampled_fingerprint
from braidlora.runs import (
    ADAPTER_CARD,
    IDENTITY,
    AdapterCard,
    BaseRecord,
    Committed,
    FederatedDirectory,
    IncompleteError,
    RunDirectory,
    TaskCard,
    federation_around,
    parse_adapter_card,
    quoted,
)
from braidlora.tasks import LabelSpace, Task


def recipe_of(place: RunDirectory, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe of a run or a federation, read from checked bytes."""
    kind = FederatedConfig if place.FEDERATED else RunConfig
    return load_config(place.config, overrides, kind, content=place.read(place.config.name))


@dataclass(frozen=True)
class Origin:
    """What is known of an adapter folder apart from PEFT's own files.

    Attributes:
        folder: of the adapter; None for a base model.
        place: the run or federation that it belongs to, if any.
        card: its `braidlora.json`; None in folders of braidlora 0.1 and of other programs.
    """

    folder: Path | None = None
    place: RunDirectory | None = None
    card: AdapterCard | None = None

    @classmethod
    def of(
        cls, folder: Path | None, place: RunDirectory | None = None, files: Committed | None = None
    ) -> Origin:
        """Of an adapter folder; reads its card. `files` are the folder's, if it is open already.

        Raises:
            CheckpointError: the card is damaged or not valid.
        """
        if folder is None:
            return cls(None, place)
        place = place or federation_around(folder)
        files = files or Committed(folder, needs_manifest=False)
        card = None
        if files.lists(ADAPTER_CARD):
            card = parse_adapter_card(files.read(ADAPTER_CARD), folder / ADAPTER_CARD)
        return cls(folder, place, card)

    def label_space(self, config: RunConfig, tasks: Sequence[Task]) -> LabelSpace | None:
        """The labels of a classifier in the order of its logits: the adapter's, or the recipe's if those are unknown.

        A recipe may list the same labels in another order; they are matched by name.

        Raises:
            ConfigError, DataError: the recipe has other labels, or is not for a classifier.
            CheckpointError: the adapter's and its run's records disagree.
        """
        known = self.known_labels(config)
        if config.kind != "classify":
            return None
        if known is not None:
            known.check(tasks, str(self.folder or (self.place and self.place.path)))
            return known
        space = LabelSpace.of(tasks)
        if self.folder is not None:
            warnings.warn(
                f"{self.folder}: does not record the order of its labels (there is no {ADAPTER_CARD}); assuming "
                f"{quoted(space.names)}, as in the recipe. Is that the recipe it was trained with?",
                stacklevel=3,
            )
        return space

    def known_labels(self, config: RunConfig) -> LabelSpace | None:
        """The labels that the adapter's own card, or its run or federation, records; reads no rows.

        Raises:
            ConfigError: the recipe's tasks are of another kind.
            CheckpointError: the adapter's and its run's records disagree.
        """
        self._check_kind(config)
        return self._trained_labels() if config.kind == "classify" else None

    def described(self) -> AdapterCard:
        """The card for another form of this adapter: its own, or one made from the records of its run or federation."""
        if self.card is not None:
            return self.card
        if self.place is None:
            return AdapterCard(braidlora=__version__, tasks=[])
        config, labels = recipe_of(self.place), self._trained_labels()
        tasks = [TaskCard(name=task.name, kind="generate") for task in config.tasks]
        if config.kind == "classify":
            tasks = [] if labels is None else labels.cards()
        saved, _ = self._recorded_base()
        record = {"fingerprint": saved} if isinstance(saved, str) else saved
        return AdapterCard(
            braidlora=__version__,
            tasks=tasks,
            labels=labels.names if labels is not None else None,
            base=BaseRecord(**{"path": config.model.path, **record}) if record else None,
        )

    def _check_kind(self, config: RunConfig) -> None:
        kinds = {task.kind for task in self.card.tasks} if self.card is not None else set()
        if kinds and config.kind not in kinds:
            raise ConfigError(
                f"{self.folder}: was trained on {kinds.pop()} tasks, and the recipe has {config.kind} tasks. Give a "
                "recipe with tasks of that kind."
            )

    def _trained_labels(self) -> LabelSpace | None:
        place, recorded = self.place, None
        if place is not None and place.labels.is_file():
            recorded = LabelSpace.parse(place.labels, place.read(place.labels.name))
        own = LabelSpace.from_card(self.card) if self.card is not None else None
        if own is not None and recorded is not None and own != recorded:
            assert place is not None
            raise CheckpointError(
                f"{self.folder}: has the labels {quoted(own.names)}, and {place.labels} has {quoted(recorded.names)}; "
                "one of them belongs to another run. Copy the adapter out of that folder to use its own."
            )
        return own or recorded

    def check_base(
        self, model: PreTrainedModel, section: ModelSection, option: str = "--model.path=PATH"
    ) -> None:
        """Reject a base other than the one that the adapter was trained on, and warn of another dtype.

        Args:
            model: as `load_base(section)` returned it, without an adapter.
            section: where it was loaded from.
            option: how the caller is given another base, for the message.

        Raises:
            CheckpointError: what differs.
        """
        saved, form = self._recorded_base()
        if saved is None:
            return
        same_form = form is None or _form(form) == _form(section)
        problems, notes = base_differences(
            saved, base_record(model, section), sampled_fingerprint(model), same_form=same_form
        )
        if problems:
            raise CheckpointError(
                f"{self.place.path if self.place else self.folder}: trained on a different base model.\n  "
                + "\n  ".join(problems)
                + f"\nGive the base it was trained on with {option}."
            )
        for note in notes:
            warnings.warn(f"{self.folder}: {note}", stacklevel=3)

    def _recorded_base(self) -> tuple[dict[str, Any] | str | None, ModelSection | None]:
        """The record of the base, and with an old record the recipe's `model`, for dtype and quantization."""
        if self.card is not None and self.card.base is not None:
            return self.card.base.model_dump(mode="json"), None
        if self.place is None:
            return None, None
        own = recipe_of(self.place).model
        if isinstance(self.place, FederatedDirectory):
            return self.place.read_json(self.place.experiment.name)["base"], own
        for step in reversed(self.place.checkpoint_steps()):
            with contextlib.suppress(IncompleteError):
                return Committed(self.place.checkpoint(step)).read_json(IDENTITY)["base"], own
        return None, own


def _form(section: ModelSection) -> ModelSection:
    unset = {"path": "", "revision": None, "attention": None, "chat_template": None}
    return section.model_copy(update=unset)
