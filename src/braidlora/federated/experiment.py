"""What makes two federations the same one: recipe, data and base."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

from braidlora.config import FederatedConfig, load_data
from braidlora.errors import CheckpointError
from braidlora.federated.clients import Clients
from braidlora.runs import BaseRecord, FederatedDirectory
from braidlora.tasks import fingerprints
from braidlora.training.base_identity import base_differences
from braidlora.training.checkpoint import differences

# Settings that change no weight, so a resumed federation may differ in them. The base is told by its fingerprint.
_FREE = (
    "output", "model.path", "evaluation", "training.logging_steps", "training.threads", "federation.workers",
    "federation.evaluate_every", "federation.common_test", "federation.retries", "federation.rounds",
)  # fmt: skip


def identity(config: FederatedConfig, clients: Clients, base: BaseRecord) -> dict[str, Any]:
    """Recipe, sha256 of every client's rows, and the record of the base."""
    recipe = config.model_dump(mode="json")
    free = list(_FREE)
    if config.federation.optimizer_state == "keep":
        free.remove("federation.rounds")  # the schedule is made for so many
    for key in free:
        *path, last = key.split(".")
        section = recipe
        for part in path:
            section = section[part]
        del section[last]
    data = {name: fingerprints(client.own_tasks()) for name, client in clients.by_name.items()}
    return {"config": recipe, "data": data, "base": base.model_dump(mode="json")}


def check_scoring(directory: FederatedDirectory, config: FederatedConfig) -> None:
    """Refuse to go on with scores of another kind: a federation's rounds, and its metrics, stand beside each other.

    Raises:
        CheckpointError: with every difference; evaluation.batch_size alone may differ.
    """
    saved = load_data(directory.config, directory.read(directory.config.name))
    then, now = (
        {
            **{f"evaluation.{key}": value for key, value in one["evaluation"].items() if key != "batch_size"},
            "federation.common_test": one["federation"]["common_test"],
        }
        for one in (saved, config.model_dump(mode="json"))
    )
    problems = [f"{key}: {old} then, {new} now" for key, old, new in differences(then, now)]
    if problems:
        raise CheckpointError(
            f"{directory.path}: its clients were scored in another way.\n  "
            + "\n  ".join(problems)
            + "\nResume with the settings it was started with, or start a new one with another --output."
        )


def experiment_id(identity: dict[str, Any]) -> str:
    """Sixteen hex digits that every state of this federation carries."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def check_identity(directory: FederatedDirectory, current: dict[str, Any], sampled: str) -> str:
    """Refuse to resume another recipe, other data or another base; gives the federation's id.

    Args:
        directory: of the federation.
        current: `identity` of what would go on.
        sampled: `sampled_fingerprint` of its base, for federations of braidlora 0.1.

    Raises:
        CheckpointError: with every difference, what it was and what it is now.
    """
    saved = directory.read_json(directory.experiment.name)
    problems = [
        f"{key}: {old} then, {new} now" for key, old, new in differences(saved["config"], current["config"])
    ]
    problems += [
        f"rows of {key}: sha256 {str(old)[:12]}… then, {str(new)[:12]}… now"
        for key, old, new in differences(saved["data"], current["data"])
    ]
    other_base, in_another_form = base_differences(saved["base"], BaseRecord(**current["base"]), sampled)
    problems += other_base
    if problems:
        raise CheckpointError(
            f"{directory.path}: holds another federation.\n  "
            + "\n  ".join(problems)
            + "\nResume with the recipe and data it was started with, or start a new one with another --output."
        )
    for text in in_another_form:
        warnings.warn(f"{directory.path}: {text}", stacklevel=2)
    return str(saved["id"])
