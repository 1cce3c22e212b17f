"""The rows of a comparison: built-in methods, custom rows, and the values of a sweep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from braidlora.adapters.sharing import DEFAULT, LORA, PRESETS, SCHEMES, by_method
from braidlora.config import RunConfig, name_problem, override_config, same_file
from braidlora.errors import ConfigError
from braidlora.tasks import Task

_MATCHED = "lora-matched"  # LoRA at the rank at which it trains as many parameters as the default scheme
SINGLE = "single-"  # prefix of the cells of the single-task references
_OF_THE_COMPARISON = {"seed": "--seeds", "output": "--output"}
_EXPERT_KEYS = tuple(
    f"adapter.{name}"
    for name in ("num_experts", "dropout_mask", "expert_init", "router_temperature", "balance_loss", "gate")
)

Matched = Literal["none", "parameters", "rank"]


@dataclass(frozen=True)
class Row:
    """One row of the table: a name, and what it changes in the recipe."""

    name: str
    label: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def config(self, recipe: RunConfig) -> RunConfig:
        """The recipe of this row. Raises ConfigError, with the row's name, if a value is not valid."""
        try:
            return override_config(recipe, self.overrides)
        except ConfigError as error:
            raise ConfigError(f"row {self.name}: {error}") from None


@dataclass(frozen=True)
class Sweep:
    """One key, its values, and what stays fixed while it changes.

    `parameters` sets the rank for every value so that the row trains as many parameters as with the recipe's own
    value; `rank` sets it so that num_experts · r is the recipe's.
    """

    key: str
    values: list[Any]
    matched: Matched = "none"


def built_in_labels() -> dict[str, str]:
    """The built-in rows with their labels, in the order of the table: LoRA, and last the default scheme."""
    others = [scheme for scheme in (*PRESETS.values(), *SCHEMES.values()) if scheme is not DEFAULT]
    labels = {LORA.method: LORA.label, _MATCHED: f"{LORA.label}, matched"}
    return labels | {scheme.method: scheme.label for scheme in (*others, DEFAULT)}


def build_rows(
    recipe: RunConfig,
    methods: Sequence[str],
    own: Mapping[str, Mapping[str, Any]],
    sweep: Sweep | None,
    tasks: Sequence[Task],
) -> list[Row]:
    """The rows in the order of the table.

    Args:
        recipe: what the rows change.
        methods: names of built-in rows.
        own: custom rows: a PEFT configuration (with `peft_type`), or values of the recipe by dotted key.
        sweep: turns each row into one per value; LoRA stays one row if the key is about experts.
        tasks: for matching ranks, which needs a classifier's labels.

    Raises:
        ConfigError: an unknown method, a name that is repeated or not valid as a folder name, a value out of range.
    """
    labels = built_in_labels()
    unknown = [name for name in methods if name not in labels]
    if unknown:
        raise ConfigError(
            f"--methods: unknown {', '.join(unknown)}; known are {', '.join(labels)}. Add your own row with "
            "--variant NAME='{peft_type: LOHA, r: 8}' or --variant NAME='{adapter.r: 16}'."
        )
    _check_names([*methods, *own])
    rows = [_built_in(name, recipe, tasks) for name in methods]
    rows += [_custom(name, given, recipe) for name, given in own.items()]
    if not rows:
        raise ConfigError("nothing to compare: give --methods, --variant, or both.")
    for row in rows:
        check_keys(f"row {row.name}", row.overrides)
    if sweep is not None:
        check_keys("--sweep", [sweep.key])
        rows = [swept for row in rows for swept in _swept(row, sweep, recipe, tasks)]
        _check_names([row.name for row in rows])
    for row in rows:
        row.config(recipe)
    return rows


def value_name(key: str, value: Any) -> str:
    """A value as part of a folder name: `num_experts=3`."""
    text = f"{key.rsplit('.', 1)[-1]}={value}"
    return re.sub(r"[^A-Za-z0-9_.+=,\-]+", "_", text)


def check_keys(where: str, keys: Iterable[str]) -> None:
    """Raise ConfigError, with `where`, if a key would be ignored because the comparison sets it for every run."""
    for key in keys:
        if key in _OF_THE_COMPARISON:
            raise ConfigError(
                f"{where}: {key} would be ignored, because {_OF_THE_COMPARISON[key]} sets it for all rows."
            )


_ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=,\-]*")


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        problem = name_problem(name, _ROW_NAME)
        if problem is not None and _ROW_NAME.fullmatch(name):
            raise ConfigError(f"row: {problem}.")
        if problem is not None or name.startswith(SINGLE):
            raise ConfigError(
                f"row {name!r}: expected a name of letters, digits, `_`, `.`, `-` that does not start with `{SINGLE}`."
            )
    twice = same_file(names)
    if twice:
        raise ConfigError(
            f"rows: {', '.join(twice)} is given twice (upper and lower case count as the same); every row needs a "
            "unique name."
        )


def _built_in(name: str, recipe: RunConfig, tasks: Sequence[Task]) -> Row:
    if name != _MATCHED:
        return Row(name, built_in_labels()[name], {"adapter.method": name})
    from braidlora.comparison._matching import matched_rank, trainable_parameters

    wanted = trainable_parameters(override_config(recipe, {"adapter.method": DEFAULT.method}), tasks)
    found = matched_rank(override_config(recipe, {"adapter.method": LORA.method}), wanted, tasks)
    return Row(name, f"{LORA.label}, r = {found['adapter.r']}", {"adapter.method": LORA.method, **found})


def _custom(name: str, given: Mapping[str, Any], recipe: RunConfig) -> Row:
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"row {name}: got {given!r}; expected a PEFT configuration such as {{peft_type: LOHA, r: 8}}, or values of "
            "the recipe by dotted key such as {adapter.r: 16}."
        )
    overrides = dict(given)
    if "peft_type" in overrides:
        overrides = {"adapter.method": overrides}
    method = overrides.pop("adapter.method", None)
    if isinstance(method, dict):
        # A PEFT configuration replaces the adapter section: next to its other keys it would be rejected.
        overrides = {"adapter": {"method": _with_targets(method, recipe)}, **overrides}
    elif method is not None:
        overrides = {"adapter.method": method, **overrides}
    return Row(name, name, overrides)


def _with_targets(method: dict[str, Any], recipe: RunConfig) -> dict[str, Any]:
    """The PEFT configuration, with the recipe's target modules and parameters if it can have these and names none."""
    import peft

    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(str(method.get("peft_type", "")).upper())
    known = {} if kind is None else kind.__dataclass_fields__
    given = {name: getattr(recipe.adapter, name) for name in ("target_modules", "target_parameters")}
    return {name: value for name, value in given.items() if value is not None and name in known} | method


def ignores(config: RunConfig, key: str) -> bool:
    """Whether a recipe's method has no experts, and `key` is about them."""
    method = config.adapter.method
    return key in _EXPERT_KEYS and isinstance(method, str) and not by_method()[method].router


def _swept(row: Row, sweep: Sweep, recipe: RunConfig, tasks: Sequence[Task]) -> list[Row]:
    if ignores(row.config(recipe), sweep.key):
        return [row]
    return [_at_value(row, value, sweep, recipe, tasks) for value in sweep.values]


def _at_value(row: Row, value: Any, sweep: Sweep, recipe: RunConfig, tasks: Sequence[Task]) -> Row:
    if sweep.key in row.overrides:
        raise ConfigError(f"--sweep {sweep.key}: row {row.name} sets this key itself; leave one out.")
    if sweep.matched != "none" and sweep.key in ("adapter.r", "adapter.lora_alpha"):
        raise ConfigError(
            f"--matched {sweep.matched} chooses the rank and keeps the scaling, and --sweep {sweep.key} sets it; use "
            "--matched none."
        )
    own = row.config(recipe)
    overrides = {**row.overrides, sweep.key: value}
    if sweep.matched != "none":
        overrides |= _matched(own, override_config(own, {sweep.key: value}), sweep.matched, tasks)
    name = f"{row.name}+{value_name(sweep.key, value)}"
    label = f"{row.label}, {sweep.key.rsplit('.', 1)[-1]} = {value}"
    if "adapter.r" in overrides and overrides["adapter.r"] != own.adapter.r:
        label += f", r = {overrides['adapter.r']}"
    return replace(row, name=name, label=label, overrides=overrides)


def _matched(own: RunConfig, swept: RunConfig, matched: Matched, tasks: Sequence[Task]) -> dict[str, Any]:
    from braidlora.comparison._matching import at_rank, matched_rank, trainable_parameters

    if isinstance(own.adapter.method, dict):
        raise ConfigError(
            "--matched: braidlora cannot choose the rank of a PEFT configuration; use --matched none."
        )
    if matched == "parameters":
        return matched_rank(swept, trainable_parameters(own, tasks), tasks)
    return at_rank(swept, max(1, round(own.adapter.num_experts * own.adapter.r / swept.adapter.num_experts)))
