"""Settings of a federated recipe that do not go together, found before anything is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from braidlora.config._federation import FederationSection, PartitionSection
from braidlora.config._schema import AdapterSection, TrainingSection
from braidlora.federated.protocol.factors import ZERO_AT_START
from braidlora.federated.protocol.rules import RuleSpec, rule_specs, rules_where, spec_of

if TYPE_CHECKING:
    from braidlora.config._federated import FederatedConfig

Problems = list[tuple[str, str]]


class Contradictions(ValueError):  # noqa: N818 (several errors at once)
    """Settings that do not go together: (dotted key, what is wrong) each."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{key}: {text}" for key, text in problems))


def contradictions(config: FederatedConfig) -> Problems:
    """Everything that is wrong with the recipe as a whole: (dotted key, what is wrong) each."""
    clients = _known_clients(config)
    return _ignored(config) + _clients(config) + _rule(config) + count_problems(config, clients)


def count_problems(config: FederatedConfig, clients: int | None) -> Problems:
    """What is wrong with ranks and rounds for so many clients; None where only the data tell how many there are."""
    return _ranks(config, clients) + _round(config, clients) + _robust(config, clients)


def _ignored(config: FederatedConfig) -> Problems:
    """Keys of a train recipe that would have no effect here."""
    problems = []
    for name, instead in (
        ("epochs", "federation.local.epochs says how long a client trains in a round"),
        ("max_steps", "federation.local.steps says how long a client trains in a round"),
        ("save_steps", "every round is saved"),
        ("keep_checkpoints", "federation.keep_rounds says how many rounds are kept"),
        ("eval_steps", "federation.evaluate_every says when clients are scored"),
        ("load_best", "the result is that of the last round"),
        ("report_to", "rounds.jsonl has the log of a federation"),
    ):
        if getattr(config.training, name) != TrainingSection.model_fields[name].default:
            problems.append((f"training.{name}", f"has no effect in a federation: {instead}. Remove it"))
    for name in ("num_experts", "dropout_mask", "router_temperature", "balance_loss"):
        if getattr(config.adapter, name) != AdapterSection.model_fields[name].default:
            problems.append(
                (f"adapter.{name}", "clients have one plain LoRA each, without router. Remove it")
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config.adapter, name):
            problems.append(
                (f"adapter.{name}", "a client has one rank and one alpha for all layers. Remove it")
            )
    if config.adapter.target_parameters:
        problems.append(
            ("adapter.target_parameters", "the rules know the factors of linear layers only. Remove it")
        )
    if config.split.validation or any(task.validation for task in config.tasks):
        key = "split.validation" if config.split.validation else "tasks"
        problems.append((key, "validation rows are not used in a federation. Remove them, or use test rows"))
    if config.evaluation.references:
        problems.append(
            (
                "evaluation.references",
                "give the directory of a finished `local` run instead: --local-run RUN",
            )
        )
    return problems


def _clients(config: FederatedConfig) -> Problems:
    federation, problems = config.federation, []
    if federation.clients is not None and federation.partition is not None:
        return [("federation.partition", "clients and partition are both given; keep one of them")]
    known = [task.name for task in config.tasks]
    trained = [task.name for task in config.tasks if task.train]
    used = set(federation.common_test)
    if federation.clients is not None:
        names = [client.name.lower() for client in federation.clients]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            problems.append(("federation.clients", f"names must differ, given twice: {', '.join(twice)}"))
        for index, client in enumerate(federation.clients):
            key = f"federation.clients.{index}.tasks"
            used.update(client.tasks)
            if unknown := sorted(set(client.tasks) - set(known)):
                problems.append((key, f"unknown task {', '.join(unknown)}; known are {', '.join(known)}"))
            elif not set(client.tasks) & set(trained):
                problems.append((key, f"none of {', '.join(client.tasks)} has training rows"))
    if federation.partition is not None:
        task = federation.partition.task
        if task is not None and task not in trained:
            problems.append(
                ("federation.partition.task", f"{task}: no such task with training rows; {_listed(trained)}")
            )
        elif task is None and len(trained) != 1:
            problems.append(("federation.partition.task", f"say which task is divided; {_listed(trained)}"))
        else:
            used.add(config.divided_task())
        problems += _partition(federation.partition)
    elif federation.clients is None:
        used.update(trained)
    if unknown := sorted(set(federation.common_test) - set(known)):
        problems.append(
            ("federation.common_test", f"unknown task {', '.join(unknown)}; known are {', '.join(known)}")
        )
    if unused := [name for name in known if name not in used]:
        problems.append(
            (
                "tasks",
                f"no client has {', '.join(unused)}. Give it to one, list it in common_test, or remove it",
            )
        )
    return problems


def _listed(tasks: list[str]) -> str:
    return f"tasks with training rows: {', '.join(tasks) or 'none'}"


def _partition(partition: PartitionSection) -> Problems:
    problems, by = [], partition.by
    counted = by in ("iid", "dirichlet")
    if counted and partition.clients is None:
        problems.append(("federation.partition.clients", f"`by: {by}` needs a number of clients"))
    if not counted and partition.clients is not None:
        problems.append(("federation.partition.clients", f"`by: {by}` makes one client per {by}. Remove it"))
    if by == "column" and partition.column is None:
        problems.append(("federation.partition.column", "`by: column` needs the name of a column"))
    if by in ("iid", "file") and partition.column is not None:
        problems.append(("federation.partition.column", f"`by: {by}` looks at no column. Remove it"))
    if by == "file" and partition.min_rows != PartitionSection.model_fields["min_rows"].default:
        problems.append(("federation.partition.min_rows", "`by: file` takes every file as it is. Remove it"))
    if not counted and partition.seed != PartitionSection.model_fields["seed"].default:
        problems.append(("federation.partition.seed", f"`by: {by}` draws nothing. Remove it"))
    if by != "dirichlet" and partition.alpha != PartitionSection.model_fields["alpha"].default:
        problems.append(("federation.partition.alpha", f"belongs to `by: dirichlet`, not to {by}. Remove it"))
    return problems


def _ranks(config: FederatedConfig, clients: int | None) -> Problems:
    federation, problems = config.federation, []
    listed = federation.clients or []
    if federation.ranks is not None and any(client.rank for client in listed):
        problems.append(("federation.ranks", "clients give ranks of their own as well; keep one of the two"))
    elif federation.ranks is not None and clients is not None and len(federation.ranks) != clients:
        problems.append(
            ("federation.ranks", f"{len(federation.ranks)} ranks for {clients} clients; give one for each")
        )
    ranks = set(federation.ranks or [client.rank or config.adapter.r for client in listed])
    spec = spec_of(federation.rule)
    if spec.ranks == "equal" and len(ranks) > 1:
        problems.append(
            (
                "federation.ranks" if federation.ranks else "federation.clients",
                f"rule {spec.name} needs one rank for all clients, got {', '.join(map(str, sorted(ranks)))}; "
                f"{rules_where(lambda one: one.ranks == 'any')} allow different ones",
            )
        )
    if spec.one_scaling and any(client.alpha for client in listed) and not problems:
        scalings = {client.name: round(config.scaling_of(client), 9) for client in config.with_ranks(listed)}
        if len(set(scalings.values())) > 1:
            given = ", ".join(f"{name} {value:g}" for name, value in scalings.items())
            problems.append(
                (
                    "federation.clients",
                    f"rule {spec.name} averages factors, which needs one scaling alpha / rank, got {given}. "
                    "Leave alpha out: it then follows from the rank",
                )
            )
    return problems


def _rule(config: FederatedConfig) -> Problems:
    federation, problems = config.federation, []
    spec = spec_of(federation.rule)
    own = {name for one in rule_specs() for name in _settings(one)} - {*_settings(spec)}
    for name in sorted(own & FederationSection.model_fields.keys()):
        if _is_given(federation, name):
            whose = rules_where(lambda one, name=name: name in _settings(one))  # type: ignore[misc]
            problems.append((f"federation.{name}", f"belongs to {whose}, not to {spec.name}. Remove it"))
    if not spec.shares:
        for name in ("weights", "change_cap", "share_cap"):
            if _is_given(federation, name):
                problems.append((f"federation.{name}", f"rule {spec.name} aggregates nothing. Remove it"))
    if federation.state == "reset-each-round" and not (spec.shares and spec.stays):
        why = "no trained factor stays with a client" if spec.shares else "it would forget everything"
        problems.append(("federation.state", f"reset-each-round makes no sense under {spec.name}: {why}"))
    if federation.client_init == "independent" and spec.needs_shared_init:
        problems.append(
            (
                "federation.client_init",
                f"{spec.name} needs `shared`: clients must start from the same factors, for not all of them travel in "
                "a round",
            )
        )
    if federation.optimizer_state == "keep" and (spec.turns or spec.starts_over):
        why = "trains other factors" if spec.turns else "starts a new adapter"
        problems.append(
            (
                "federation.optimizer_state",
                f"{spec.name} {why} in every round, so its optimizer must restart, too. Remove it",
            )
        )
    if federation.optimizer_state == "keep" and federation.state == "reset-each-round":
        problems.append(
            (
                "federation.optimizer_state",
                "`keep` would apply old moments to factors that are drawn anew each round",
            )
        )
    if not spec.shares and federation.upload_dtype != "float32":
        problems.append(("federation.upload_dtype", f"rule {spec.name} sends nothing. Remove it"))
    if federation.share_head and not spec.shares:
        problems.append(("federation.share_head", f"rule {spec.name} shares nothing; choose another rule"))
    elif federation.share_head and config.kind == "generate" and not config.adapter.modules_to_save:
        problems.append(
            (
                "federation.share_head",
                "`generate` tasks have no head, and adapter.modules_to_save names no module",
            )
        )
    return problems


def _settings(spec: RuleSpec) -> tuple[str, ...]:
    """The keys of `federation` that only some rules read."""
    return (*spec.settings, "r_intermediate") if spec.adapter == "factored" else spec.settings


def _is_given(federation: FederationSection, key: str) -> bool:
    return bool(getattr(federation, key) != FederationSection.model_fields[key].default)


def _round(config: FederatedConfig, clients: int | None) -> Problems:
    federation, problems = config.federation, []
    if federation.local.epochs is not None and federation.local.steps is not None:
        problems.append(("federation.local", "give epochs or steps, not both"))
    sample = federation.sample
    if sample is not None and (sample.fraction is None) == (sample.number is None):
        problems.append(("federation.sample", "give one of fraction and number"))
    scored = federation.evaluate_sample
    if scored.fraction is not None and scored.number is not None:
        problems.append(("federation.evaluate_sample", "give one of fraction and number"))
    problems += _rate_schedule(config)
    if clients is None:
        return problems
    if sample is not None and sample.number is not None and sample.number > clients:
        problems.append(("federation.sample.number", f"{sample.number} of {clients} clients cannot be asked"))
    asked = config.asked_per_round(clients)
    if federation.min_clients > asked:
        problems.append(
            (
                "federation.min_clients",
                f"{federation.min_clients} can never reply: {asked} are asked in a round",
            )
        )
    if federation.share_cap is not None and federation.share_cap * asked < 1.0 - 1e-12:
        problems.append(
            ("federation.share_cap", f"with {asked} clients in a round it must be at least {1 / asked:g}")
        )
    return problems


def _rate_schedule(config: FederatedConfig) -> Problems:
    schedule, problems, key = config.federation.lr_schedule, [], "federation.lr_schedule"
    needs = {"exponential": ("factor",), "step": ("factor", "every")}.get(schedule.decay, ())
    takes = (*needs, "floor") if schedule.decay in ("linear", "cosine") else needs
    for name in ("floor", "factor", "every"):
        given = getattr(schedule, name) is not None
        if given and name not in takes:
            problems.append((f"{key}.{name}", f"has no effect on `decay: {schedule.decay}`. Remove it"))
        if not given and name in needs:
            problems.append((f"{key}.{name}", f"`decay: {schedule.decay}` needs it"))
    falls = not config.training.scheduler.startswith("constant")
    if schedule.decay != "constant" and config.federation.optimizer_state == "keep" and falls:
        problems.append(
            (
                f"{key}.decay",
                f"with optimizer_state: keep, training.scheduler: {config.training.scheduler} already falls over all "
                "rounds, and the rate would fall twice. Set training.scheduler: constant, or leave lr_schedule out",
            )
        )
    return problems


def _robust(config: FederatedConfig, clients: int | None) -> Problems:
    federation, robust, problems = config.federation, config.federation.robust, []
    name = robust.aggregator
    needed = {
        "norm-clip": ("max_norm",),
        "trimmed-mean": ("trim",),
        "krum": ("f",),
        "multi-krum": ("f", "keep"),
    }.get(name, ())
    for setting in ("max_norm", "trim", "f", "keep"):
        given = getattr(robust, setting) is not None
        if given and setting not in needed:
            problems.append((f"federation.robust.{setting}", f"has no effect on {name}. Remove it"))
        if not given and setting in needed:
            problems.append((f"federation.robust.{setting}", f"{name} needs it"))
    if name == "mean" or problems:
        return problems
    spec = spec_of(federation.rule)
    if not spec.robust:
        return [
            (
                "federation.robust.aggregator",
                f"{name} needs updates of one shape that are averaged; {spec.name} has none. It works with "
                f"{rules_where(lambda one: one.robust)}",
            )
        ]
    if _is_given(federation, "change_cap"):
        problems.append(("federation.change_cap", f"{name} bounds what a client changes itself. Remove it"))
    if name != "norm-clip":
        for key in ("share_cap", "weights"):
            if _is_given(federation, key):
                problems.append(
                    (f"federation.{key}", f"{name} counts every client once, whatever its rows. Remove it")
                )
    drawn = (
        set(spec.uploads) - ZERO_AT_START - set(spec.multiplies)
    )  # what travels and does not start at zero
    if name == "norm-clip" and federation.client_init == "independent" and drawn:
        problems.append(
            (
                "federation.robust.aggregator",
                f"norm-clip measures changes from a common start, and under {spec.name} with client_init: "
                "independent every A starts elsewhere. Use client_init: shared",
            )
        )
    if (
        robust.trim
        and clients is not None
        and math.floor(robust.trim * config.asked_per_round(clients) + 1e-9) < 1
    ):
        asked = config.asked_per_round(clients)
        problems.append(
            (
                "federation.robust.trim",
                f"{robust.trim:g} of {asked} clients leaves out nobody; at least 1 / {asked}",
            )
        )
    if robust.f is not None and clients is not None:
        asked, least = config.asked_per_round(clients), 2 * robust.f + 3
        if asked < least:
            problems.append(
                (
                    "federation.robust.f",
                    f"{name} with f = {robust.f} needs at least 2f + 3 = {least} clients in a round; {asked} are asked",
                )
            )
        elif robust.keep is not None and robust.keep > asked - robust.f:
            problems.append(
                ("federation.robust.keep", f"at most n − f = {asked - robust.f} updates can be kept")
            )
    return problems


def _known_clients(config: FederatedConfig) -> int | None:
    """How many clients there are, where the recipe alone tells."""
    federation = config.federation
    if federation.clients is not None:
        return len(federation.clients)
    if federation.partition is not None:
        return federation.partition.clients
    return sum(1 for task in config.tasks if task.train)
