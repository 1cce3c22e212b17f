"""The aggregation rules, by name. Their specs are known without torch, which a rule's class needs.

A rule is a file here that declares its `RuleSpec` as `SPEC`; what is more than averaging factors is in `…_rule.py`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from braidlora.errors import ConfigError
from braidlora.federated.protocol.factors import AXES
from braidlora.federated.protocol.rules import (
    fed_alora,
    fed_alora_het,
    fedalt,
    fedit,
    fedsa_lora,
    ffa_lora,
    flexlora,
    flora,
    local,
    raflora,
    rolora,
    zero_padding,
)
from braidlora.federated.protocol.rules.spec import RuleSpec, Turn

if TYPE_CHECKING:
    from braidlora.federated.protocol.rules.rule import Rule

_BUILT_IN = (
    local, fedit, ffa_lora, fedsa_lora, fed_alora, rolora, zero_padding, flora, flexlora, raflora, fed_alora_het, fedalt
)  # fmt: skip
_SPECS: dict[str, RuleSpec] = {module.SPEC.name: module.SPEC for module in _BUILT_IN}
RULE_NAMES = tuple(_SPECS)


def rule_specs() -> tuple[RuleSpec, ...]:
    """All rules that a recipe can name: the built-in ones, then those that were registered."""
    return tuple(_SPECS.values())


def spec_of(name: str) -> RuleSpec:
    """The spec of a rule.

    Raises:
        ConfigError: no rule has this name.
    """
    if name not in _SPECS:
        close = difflib.get_close_matches(str(name), _SPECS, n=1)
        raise ConfigError(
            f"unknown aggregation rule {name!r}{f'; did you mean {close[0]!r}?' if close else ''} "
            f"The rules are {', '.join(_SPECS)}"
        )
    return _SPECS[name]


def rules_where(fits: Callable[[RuleSpec], bool]) -> str:
    """The names of the rules that share something and whose spec `fits`, for a message: `a, b and c`."""
    names = [spec.name for spec in _SPECS.values() if spec.shares and fits(spec)]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def register_rule(spec: RuleSpec) -> None:
    """Make a rule known, so that a recipe can name it.

    Worker processes import the script that was started, and nothing else: with `federation.workers` above 1, call this
    at the top level of the script, or of a module that it imports.

    Raises:
        ConfigError: another rule has this name, or the spec names a factor that does not exist or is not among those of
            all its turns.
    """
    problems = []
    if _SPECS.get(spec.name, spec) != spec:
        problems.append(f"the name {spec.name!r} is taken; choose another")
    for field in Turn._fields:
        given = getattr(spec, field)
        if unknown := sorted(set(given) - AXES.keys()):
            problems.append(f"{field}: unknown factor {', '.join(unknown)}; known are {', '.join(AXES)}")
        if missing := sorted({factor for turn in spec.turns for factor in getattr(turn, field)} - {*given}):
            problems.append(f"{field}: {', '.join(missing)} of its turns missing")
    if problems:
        raise ConfigError(f"rule {spec.name!r}: " + "; ".join(problems))
    _SPECS[spec.name] = spec


def get_rule(name: str, **settings: Any) -> Rule:
    """A new rule.

    Args:
        settings: `r_intermediate`, `also_share`, `aggregator`, and the `settings` of its spec.

    Raises:
        ConfigError: no rule has this name, or it does not know or allow a setting.
    """
    spec = spec_of(name)
    known = {"r_intermediate", "also_share", "aggregator", *spec.settings}
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(
            f"rule {name!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    module, _, made = spec.implementation.partition(":")
    rule: Rule = getattr(importlib.import_module(module), made)(spec, **settings)
    return rule


__all__ = [
    "RULE_NAMES",
    "RuleSpec",
    "Turn",
    "get_rule",
    "register_rule",
    "rule_specs",
    "rules_where",
    "spec_of",
]
