"""Conflicting settings of a federated recipe, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from braidlora.config._client_conflicts import clients_and_tasks, ranks_and_scalings
from braidlora.config._privacy_conflicts import privacy
from braidlora.config._rule_conflicts import robust_aggregator, rounds, rule_settings

if TYPE_CHECKING:
    from braidlora.config._federated import FederatedConfig

Problem = tuple[str, str]  # dotted key, what is wrong


class ConflictError(ValueError):
    """Settings that conflict, each with its key and what is wrong."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))


def conflicts(config: FederatedConfig) -> list[Problem]:
    """All conflicts between the settings of a recipe."""
    return [
        *_without_effect(config),
        *clients_and_tasks(config),
        *rule_settings(config),
        *count_conflicts(config, _known_clients(config)),
    ]


def count_conflicts(config: FederatedConfig, clients: int | None) -> list[Problem]:
    """Conflicts with the number of clients; None if it depends on the data."""
    return [
        *ranks_and_scalings(config, clients),
        *rounds(config, clients),
        *robust_aggregator(config, clients),
        *privacy(config, clients),
    ]


def _without_effect(config: FederatedConfig) -> Iterator[Problem]:
    """Keys of a train recipe that would have no effect in a federation."""
    for name, instead in (
        ("epochs", "federation.local.epochs sets how long a client trains in a round"),
        ("max_steps", "federation.local.steps sets how long a client trains in a round"),
        ("save_steps", "every round is saved"),
        ("keep_checkpoints", "federation.keep_rounds sets how many rounds are kept"),
        ("eval_steps", "federation.evaluate_every sets when clients are scored"),
        ("load_best", "the result is that of the last round"),
        ("report_to", "rounds.jsonl is the log of a federation"),
    ):
        if config.training.is_given(name):
            yield f"training.{name}", f"has no effect in a federation: {instead}. Remove it"
    of_experts = (
        "num_experts",
        "dropout_mask",
        "expert_init",
        "gate",
        "task_map",
        "alignment_loss",
        "alignment",
    )
    for name in (*of_experts, "router_temperature", "balance_loss"):
        if config.adapter.is_given(name):
            yield f"adapter.{name}", "each client has one plain LoRA without a router. Remove it"
    for name in ("rank_pattern", "alpha_pattern"):
        if config.adapter.is_given(name):
            yield f"adapter.{name}", "a client has one rank and one alpha for all layers. Remove it"
    if config.adapter.target_parameters:
        yield "adapter.target_parameters", "rules aggregate the factors of linear layers only. Remove it"
    if config.split.validation or any(task.validation for task in config.tasks):
        key = "split.validation" if config.split.validation else "tasks"
        yield key, "a federation does not use validation rows. Remove them, or use test rows"
    if config.evaluation.references:
        yield "evaluation.references", "give the directory of a finished `local` run instead: --local-run RUN"


def _known_clients(config: FederatedConfig) -> int | None:
    """The number of clients, or None if it depends on the data."""
    federation = config.federation
    if federation.clients is not None:
        return len(federation.clients)
    if federation.partition is not None:
        return federation.partition.clients
    return sum(1 for task in config.tasks if task.train)
