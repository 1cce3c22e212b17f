"""Conflicts in what a federation does: its rule, its rounds, its learning rates, its aggregator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from braidlora.config._federation import FederationSection
from braidlora.federated.protocol.factors import ZERO_AT_START
from braidlora.federated.protocol.rules import RuleSpec, rule_specs, rules_where, spec_of

if TYPE_CHECKING:
    from braidlora.config._conflicts import Problem
    from braidlora.config._federated import FederatedConfig

_AGGREGATOR_SETTINGS = {
    "norm-clip": ("max_norm",),
    "trimmed-mean": ("trim",),
    "krum": ("f",),
    "multi-krum": ("f", "keep"),
}
_DECAY_SETTINGS = {"exponential": ("factor",), "step": ("factor", "every")}


def rule_settings(config: FederatedConfig) -> Iterator[Problem]:
    """Settings that the rule does not use or does not allow."""
    federation = config.federation
    spec = spec_of(federation.rule)
    own = {name for one in rule_specs() for name in _settings(one)} - {*_settings(spec)}
    for name in sorted(own & FederationSection.model_fields.keys()):
        if federation.is_given(name):
            owners = rules_where(lambda one, name=name: name in _settings(one))  # type: ignore[misc]
            yield f"federation.{name}", f"applies to {owners}, not to {spec.name}. Remove it"
    if not spec.shares:
        for name in ("weights", "change_cap", "share_cap"):
            if federation.is_given(name):
                yield f"federation.{name}", f"rule {spec.name} aggregates nothing. Remove it"
    if federation.state == "reset-each-round" and not (spec.shares and spec.stays):
        why = "no trained factor stays with a client" if spec.shares else "a client would lose its training"
        yield "federation.state", f"reset-each-round does not apply to {spec.name}: {why}. Remove it"
    yield from _modifiers(config)
    if federation.client_init == "independent" and spec.needs_shared_init:
        yield (
            "federation.client_init",
            f"{spec.name} needs `shared`: clients must start from the same factors, because not all of them are sent "
            "in a round",
        )
    if federation.optimizer_state == "keep" and (spec.turns or spec.starts_over):
        why = "trains different factors" if spec.turns else "starts a new adapter"
        yield (
            "federation.optimizer_state",
            f"{spec.name} {why} in every round, so the optimizer must restart as well. Remove it",
        )
    if federation.optimizer_state == "keep" and federation.state == "reset-each-round":
        yield (
            "federation.optimizer_state",
            "`keep` would apply old moments to factors that are reset each round. Use `restart`",
        )
    if not spec.shares and federation.upload_dtype != "float32":
        yield "federation.upload_dtype", f"rule {spec.name} uploads nothing. Remove it"
    if federation.share_head and not spec.shares:
        yield "federation.share_head", f"rule {spec.name} shares nothing; choose another rule"
    elif federation.share_head and config.kind == "generate" and not config.adapter.modules_to_save:
        yield "federation.share_head", "`generate` tasks have no head, and adapter.modules_to_save is empty"


def _modifiers(config: FederatedConfig) -> Iterator[Problem]:
    """FedProx and FedAvgM, where the rule leaves them nothing to act on."""
    federation, spec = config.federation, spec_of(config.federation.rule)
    if federation.proximal_mu and not spec.pulled:
        why = "clients receive no factor to stay close to"
        if spec.shares:
            why = "no factor that a client trains starts the round at the value it received"
        others = rules_where(lambda one: bool(one.pulled))
        yield (
            "federation.proximal_mu",
            f"FedProx does not apply to {spec.name}: {why}. It works with {others}",
        )
    for name in ("server_momentum", "server_learning_rate"):
        if not federation.is_given(name):
            continue
        why = spec.no_momentum if spec.shares else "nothing is aggregated"
        if why:
            others = rules_where(lambda one: not one.no_momentum)
            yield (
                f"federation.{name}",
                f"FedAvgM does not apply to {spec.name}: {why}. It works with {others}",
            )


def _settings(spec: RuleSpec) -> tuple[str, ...]:
    """The keys of `federation` that this rule reads and some other rules do not."""
    return (*spec.settings, "r_intermediate") if spec.adapter == "factored" else spec.settings


def rounds(config: FederatedConfig, clients: int | None) -> Iterator[Problem]:
    """Settings of a round that cannot be combined, or that need more clients."""
    federation = config.federation
    if federation.local.epochs is not None and federation.local.steps is not None:
        yield "federation.local", "give either epochs or steps"
    sample = federation.sample
    if sample is not None and (sample.fraction is None) == (sample.number is None):
        yield "federation.sample", "give either fraction or number"
    scored = federation.evaluate_sample
    if scored.fraction is not None and scored.number is not None:
        yield "federation.evaluate_sample", "give either fraction or number"
    yield from _rate_schedule(config)
    if clients is None:
        return
    spec = spec_of(federation.rule)
    if clients < spec.least_clients:
        yield (
            "federation.rule",
            f"{spec.name} needs at least {spec.least_clients} clients; there is {clients}",
        )
    if sample is not None and sample.number is not None and sample.number > clients:
        yield "federation.sample.number", f"got {sample.number}, but there are only {clients} clients"
    sampled = config.sampled_per_round(clients)
    if federation.min_clients > sampled:
        yield (
            "federation.min_clients",
            f"got {federation.min_clients}, but only {sampled} clients are sampled in a round",
        )
    if federation.share_cap is not None and federation.share_cap * sampled < 1.0 - 1e-12:
        yield "federation.share_cap", f"must be at least {1 / sampled:g} with {sampled} clients in a round"


def _rate_schedule(config: FederatedConfig) -> Iterator[Problem]:
    schedule, key = config.federation.lr_schedule, "federation.lr_schedule"
    needs = _DECAY_SETTINGS.get(schedule.decay, ())
    takes = (*needs, "floor") if schedule.decay in ("linear", "cosine") else needs
    for name in ("floor", "factor", "every"):
        given = getattr(schedule, name) is not None
        if given and name not in takes:
            yield f"{key}.{name}", f"has no effect with `decay: {schedule.decay}`. Remove it"
        if not given and name in needs:
            yield f"{key}.{name}", f"`decay: {schedule.decay}` needs it"
    decays = not config.training.scheduler.startswith("constant")
    if schedule.decay != "constant" and config.federation.optimizer_state == "keep" and decays:
        yield (
            f"{key}.decay",
            f"with optimizer_state: keep, training.scheduler: {config.training.scheduler} already decays over all "
            "rounds, and the learning rate would decay twice. Set training.scheduler: constant, or remove lr_schedule",
        )


def robust_aggregator(config: FederatedConfig, clients: int | None) -> Iterator[Problem]:
    """Settings of a robust aggregator that are missing, have no effect, or need more clients."""
    federation, robust, key = config.federation, config.federation.robust, "federation.robust"
    name = robust.aggregator
    needed = _AGGREGATOR_SETTINGS.get(name, ())
    complete = True
    for setting in ("max_norm", "trim", "f", "keep"):
        given = getattr(robust, setting) is not None
        if given != (setting in needed):
            complete = False
            yield f"{key}.{setting}", f"has no effect on {name}. Remove it" if given else f"{name} needs it"
    if name == "mean" or not complete:
        return
    spec = spec_of(federation.rule)
    if not spec.robust:
        why = f"{name} needs averaged updates of one shape, which {spec.name} does not have"
        if spec.not_robust:
            why = f"{name} cannot be used with {spec.name}: {spec.not_robust}"
        yield f"{key}.aggregator", f"{why}. It works with {rules_where(lambda one: one.robust)}"
        return
    if federation.is_given("change_cap"):
        yield "federation.change_cap", f"{name} itself bounds the change of a client. Remove it"
    if name != "norm-clip":
        for setting in ("share_cap", "weights"):
            if federation.is_given(setting):
                yield f"federation.{setting}", f"{name} gives every client the same weight. Remove it"
    drawn = set(spec.uploads) - ZERO_AT_START - set(spec.multiplies)  # uploaded, and not zero at the start
    if name == "norm-clip" and federation.client_init == "independent" and drawn:
        yield (
            f"{key}.aggregator",
            "norm-clip measures changes from a common start, but with client_init: independent every A of "
            f"{spec.name} starts from its own values. Use client_init: shared",
        )
    if clients is None:
        return
    sampled = config.sampled_per_round(clients)
    if robust.trim and math.floor(robust.trim * sampled + 1e-9) < 1:
        yield f"{key}.trim", f"{robust.trim:g} of {sampled} clients is less than one; at least 1 / {sampled}"
    if robust.f is not None and sampled < (least := 2 * robust.f + 3):
        yield (
            f"{key}.f",
            f"{name} with f = {robust.f} needs at least 2f + 3 = {least} clients in a round; {sampled} are sampled",
        )
    elif robust.f is not None and robust.keep is not None and robust.keep > sampled - robust.f:
        yield f"{key}.keep", f"at most n − f = {sampled - robust.f} updates can be kept"
