"""The settings that may change when a federation is resumed. Any other change is rejected by name."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from braidlora.config import FederatedConfig, recipe_differences
from braidlora.errors import CheckpointError
from braidlora.federated.site.clients import Clients
from braidlora.models.identity import base_differences
from braidlora.processes import launched
from braidlora.runs import BaseRecord, FederatedDirectory
from braidlora.tasks import LabelSpace

# The keys of the recipe that may change on resume (a section means all its keys, `*` every task), and whether
# rounds.jsonl notes a change, because it affects which clients take part in a round, or the scores.
# docs/reference/federated.md has the same list, with the effect of a change; a test compares the two.
MAY_CHANGE = {
    "output": False,
    "model.path": False,  # the base model itself is compared by its fingerprint
    "training.logging_steps": False,
    "training.threads": False,
    "federation.workers": False,
    "federation.keep_rounds": False,
    "federation.rounds": False,
    "federation.retries": True,
    "federation.min_clients": True,
    "federation.quorum": True,
    "federation.sample": True,
    "federation.share_cap": True,
    "federation.change_cap": True,
    "federation.privacy.epsilon": True,
    "federation.robust.trim": True,
    "federation.robust.f": True,
    "federation.robust.keep": True,
    "federation.evaluate_every": True,
    "federation.evaluate_sample": True,
    "federation.common_test": True,
    "evaluation": True,
    "evaluation.batch_size": False,
    "tasks.*.metric": True,
    "tasks.*.positive": True,
    "tasks.*.mode": True,
    "tasks.*.extract": True,
    "tasks.*.max_new_tokens": True,
}
# Clients are compared one by one, by rank, scaling, seed and rows, however the recipe defines them.
_COMPARED_BY_CLIENT = (
    "federation.clients", "federation.ranks", "tasks.*.train", "tasks.*.validation", "tasks.*.test",
)  # fmt: skip
_SCORING = ("evaluation.", "federation.common_test", "tasks.")


def identity(config: FederatedConfig, clients: Clients, base: BaseRecord) -> dict[str, Any]:
    """What a resume must find unchanged: the recipe except what may change, clients, labels, and the base model."""
    recipe, _ = _parted(config)
    _, processes = launched()
    return {
        **({"processes": processes} if processes > 1 else {}),  # each takes `training.batch_size` rows a step
        "config": recipe,
        "clients": _client_identities(clients.report()),
        "labels": clients.label_space.task_labels if clients.label_space is not None else None,
        "base": base.model_dump(mode="json"),
    }


def recipe_of_sites(config: FederatedConfig) -> dict[str, Any]:
    """What a resume must find unchanged of the recipe, and how clients are scored, which every site reads in its copy.

    Clients and files are not included: they are compared one by one.
    """
    return _parted(
        config, keep=[key for key, noted in MAY_CHANGE.items() if noted and is_scoring(f"{key}.")]
    )[0]


def settings(config: FederatedConfig) -> dict[str, Any]:
    """The settings whose changes rounds.jsonl notes, by dotted key."""
    _, free = _parted(config)
    return {key: value for key, value in free.items() if MAY_CHANGE.get(key, True)}


def is_scoring(key: str) -> bool:
    """Whether scores with different values of this setting are not comparable."""
    return key.startswith(_SCORING)


def experiment_id(identity: Mapping[str, Any]) -> str:
    """Sixteen hex digits that identify a federation that starts with this identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def resumed_identity(
    directory: FederatedDirectory, current: dict[str, Any], sampled: str
) -> tuple[str, dict[str, Any]]:
    """The experiment's id, and its new identity, which includes clients that left, so that they may return.

    Args:
        directory: of the federation.
        current: `identity` of the federation that would resume.
        sampled: `sampled_fingerprint` of its base model, for federations of braidlora 0.1.

    Raises:
        CheckpointError: something has changed that may not; with every difference, then and now.
    """
    saved = directory.read_json(directory.experiment.name)
    saved_clients = saved.get("clients") or _client_identities(directory.read_json(directory.partition.name))
    problems = [
        f"{key}: {_short(old)} then, {_short(new)} now"
        for key, old, new in _recipe_differences(saved["config"], current["config"])
    ]
    for name in sorted(saved_clients.keys() & current["clients"].keys()):
        problems += _client_differences(name, saved_clients[name], current["clients"][name])
    if (then := saved.get("processes", 1)) != (now := current.get("processes", 1)):
        problems.append(
            f"processes: {then} then, {now} now; training.batch_size counts rows per process, so rounds would change"
        )
    problems += _label_differences(saved.get("labels") or _saved_labels(directory), current["labels"])
    other_base, in_another_form = base_differences(saved["base"], BaseRecord(**current["base"]), sampled)
    problems += other_base
    if problems:
        raise CheckpointError(
            f"{directory.path}: belongs to another federation.\n  "
            + "\n  ".join(problems)
            + "\nResume with the recipe and data it was started with, or start a new one with another --output. What "
            "may change on resume is listed in docs/reference/federated.md."
        )
    for text in in_another_form:
        warnings.warn(f"{directory.path}: {text}", stacklevel=2)
    return saved["id"], {**current, "clients": dict(sorted((saved_clients | current["clients"]).items()))}


def _saved_labels(directory: FederatedDirectory) -> Any:
    """Labels of a federation of braidlora 0.1, whose identity does not include them."""
    path = directory.labels
    return LabelSpace.parse(path, directory.read(path.name)).task_labels if path.is_file() else None


def changes(server: Mapping[str, Any], clients: Clients, now: Mapping[str, Any]) -> dict[str, Any]:
    """Changes since the round that wrote `server`: clients that joined and left, and settings, then and now."""
    found: dict[str, Any] = {}
    members = server.get("clients")
    if members is not None:
        joined, left = sorted(clients.by_name.keys() - members), sorted(set(members) - clients.by_name.keys())
        found |= {key: names for key, names in (("joined", joined), ("left", left)) if names}
    if "settings" in server:
        then = server["settings"]
        changed = {
            key: {"then": then.get(key), "now": now.get(key)}
            for key in sorted({*then, *now})
            if then.get(key) != now.get(key)
        }
        if changed:
            found["settings"] = changed
    return found


def rounds_may_change(config: FederatedConfig) -> bool:
    """Whether the number of rounds may change: no schedule depends on it."""
    federation = config.federation
    scheduled = federation.lr_schedule.decay in ("linear", "cosine")
    return federation.optimizer_state == "restart" and not scheduled


def _parted(config: FederatedConfig, keep: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe without the settings that may change or are compared by client; and the former, by dotted key.

    Args:
        keep: settings that stay in the recipe although they may change.
    """
    recipe = config.model_dump(mode="json")
    recipe["tasks"] = {task.pop("name"): task for task in recipe["tasks"]}
    free: dict[str, Any] = {}
    keys = [key for key in MAY_CHANGE if key not in keep]
    if not rounds_may_change(config):
        keys.remove("federation.rounds")
    for key in keys:
        _take(recipe, key.split("."), "", free)
    for key in _COMPARED_BY_CLIENT:
        _take(recipe, key.split("."), "", {})
    if config.kind == "classify":  # the resulting labels are compared
        _take(recipe, ["tasks", "*", "options"], "", {})
    return recipe, free


def _take(node: dict[str, Any], path: list[str], prefix: str, taken: dict[str, Any]) -> None:
    """Move the values at `path` from a recipe to `taken`; a section key by key."""
    key, *rest = path
    for name in list(node) if key == "*" else [key] if key in node else []:
        dotted = f"{prefix}{name}"
        if rest:
            if node[name] is not None:  # a section that is not given
                _take(node[name], rest, f"{dotted}.", taken)
        elif dotted == "evaluation":
            taken |= {f"evaluation.{one}": value for one, value in node.pop(name).items()}
        else:
            taken[dotted] = node.pop(name)


def _client_identities(report: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change of each client in `partition.json`."""
    return {
        name: {
            "rank": one["rank"],
            "scaling": one["scaling"],
            "seed": one["seed"],
            "rows": {
                f"{task}.{part}": found["sha256"]
                for task, parts in one["tasks"].items()
                for part, found in parts.items()
            },
        }
        for name, one in sorted(report.items())
    }


def _recipe_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Differences of two recipes without what may change; tasks of only one of them are compared by client."""
    if isinstance(saved["tasks"], list):  # as earlier versions wrote it
        saved["tasks"] = {task.pop("name"): task for task in saved["tasks"]}
    for setting in (*MAY_CHANGE, *_COMPARED_BY_CLIENT):
        if setting != "federation.rounds" or "rounds" not in current["federation"]:
            _take(saved, setting.split("."), "", {})
    both = [name for name in saved["tasks"] if name in current["tasks"]]
    for name in both:
        if "options" not in current["tasks"][name]:  # labels are compared instead
            saved["tasks"][name].pop("options", None)
    found = recipe_differences(
        {**saved, "tasks": {name: saved["tasks"][name] for name in both}},
        {**current, "tasks": {name: current["tasks"][name] for name in both}},
        FederatedConfig,
    )
    gone = saved["tasks"].keys() ^ current["tasks"].keys()
    found = [
        (key, old, new)
        for key, old, new in found
        if not (key.startswith("mixing.weights.") and key.split(".", 2)[2] in gone)
    ]
    order = [name for name in current["tasks"] if name in saved["tasks"]]
    return found if order == both else [*found, ("order of tasks", ", ".join(both), ", ".join(order))]


def _client_differences(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    problems = [
        f"client {name}: {key} {saved[key]} then, {current[key]} now"
        for key in ("rank", "scaling", "seed")
        if saved[key] != current[key]
    ]
    for part in sorted(saved["rows"].keys() | current["rows"].keys()):
        old, new = saved["rows"].get(part), current["rows"].get(part)
        if old != new:
            problems.append(f"rows of {name}.{part}: {_digest(old)} then, {_digest(new)} now")
    return problems


def _label_differences(saved: Any, current: Any) -> list[str]:
    """Differences in the classes of the head, in order, and in the labels of each task."""
    if not saved or not current:
        return []
    heads = [
        list(dict.fromkeys(label for labels in one.values() for label in labels)) for one in (saved, current)
    ]
    if heads[0] != heads[1]:
        return [
            f"labels of the head: {', '.join(heads[0])} then, {', '.join(heads[1])} now (name them in the task's "
            "`options`; if a client has left with its task, keep the task and list it in federation.common_test)"
        ]
    return [
        f"labels of task {task}: {', '.join(labels)} then, {', '.join(current[task])} now"
        for task, labels in saved.items()
        if current.get(task, labels) != labels
    ]


def _digest(sha256: str | None) -> str:
    return "none" if sha256 is None else f"sha256 {sha256[:12]}…"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:199] + "…"
