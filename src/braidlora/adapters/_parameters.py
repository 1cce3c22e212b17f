"""Which parameters `target_parameters` match, what "all-linear" adds to them, and what it leaves out."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from braidlora.adapters import _peft_compat as compat  # its tables load much, and only for all-linear
from braidlora.adapters._experts import MultiLoraExperts, stacked_parameters
from braidlora.errors import ConfigError


class Target(NamedTuple):
    """A parameter by the name it has in the base model: `module`.`parameter`."""

    module: str
    parameter: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"


def matched_parameters(config: Any, model: nn.Module) -> list[Target]:
    """The parameters that `target_parameters` match, after exclusions and layer numbers.

    Raises:
        ConfigError: one of them is not a supported stack of experts, or none matches.
    """
    wanted = set(config.target_parameters or [])
    if not wanted:
        return []
    patterns = copy.copy(config)
    patterns.target_modules = wanted
    excluded = []
    matched = []
    for target, module in _all_parameters(model):
        if not compat.check_target_module_exists(patterns, target.name):
            if _names(wanted, target.name):
                excluded.append(target.name)
            continue
        if isinstance(compat.check_target_module_exists(patterns, target.module), compat._ExcludedModule):
            excluded.append(target.name)
            continue
        _check(target, module, model)
        matched.append(target)
    found = [target.name for target in matched] + excluded
    missing = sorted(name for name in wanted if not any(_names({name}, known) for known in found))
    if missing:
        message = f"target_parameters: {', '.join(map(repr, missing))} match no parameter. {_stacked_in_words(model)}"
        if len(missing) == len(wanted) and not config.target_modules:
            raise ConfigError(message)
        warnings.warn(message, stacklevel=5)
    return matched


def _all_parameters(model: nn.Module) -> Iterator[tuple[Target, nn.Module]]:
    for path, module in model.named_modules():
        if path.endswith(".base_layer") and isinstance(
            model.get_submodule(path.rpartition(".")[0]), MultiLoraExperts
        ):
            path = path.removesuffix(".base_layer")
        for name, _ in module.named_parameters(recurse=False):
            yield Target(path, name), module


def _names(wanted: set[str], name: str) -> bool:
    return name in wanted or any(name.endswith(f".{suffix}") for suffix in wanted)


def _check(target: Target, module: nn.Module, model: nn.Module) -> None:
    if target.parameter in stacked_parameters(module) and target.module:
        return
    if isinstance(module, nn.Linear):
        remedy = f"It belongs to a linear layer: name {target.module.rpartition('.')[2]!r} in target_modules."
    else:
        remedy = _stacked_in_words(model)
    raise ConfigError(
        f"target_parameters match {target.name!r} {tuple(getattr(module, target.parameter).shape)} of a "
        f"{type(module).__name__}, which cannot be adapted; only stacked experts in modules that follow "
        f"transformers' experts interface can. {remedy}"
    )


def _stacked_in_words(model: nn.Module) -> str:
    suffixes = sorted(
        {_suffix(target.name) for target, module in _all_parameters(model) if _is_stack(target, module)}
    )
    return f"This model has: {', '.join(suffixes)}." if suffixes else "This model has no supported ones."


def _is_stack(target: Target, module: nn.Module) -> bool:
    return target.parameter in stacked_parameters(module)


def _suffix(name: str) -> str:
    """The last two parts: experts.gate_up_proj."""
    return ".".join(name.split(".")[-2:])


def add_experts(config: Any, model: nn.Module) -> None:
    """For target_modules="all-linear": add the experts of those base models for which PEFT's LoRA adds them.

    They were separate linear layers before transformers 5, with the gate and up projections apart: PEFT gives their
    fused matrix twice the rank and twice the alpha. The weight that routes tokens to experts, which PEFT's LoRA adds
    too, is left out with a warning.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = compat._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    converted = compat._MOE_TARGET_MODULE_MAPPING.get(family, {})
    parameters = sorted(set(converted.values()))
    found: dict[str, list[Target]] = {}
    left_out = []
    for target, module in _all_parameters(model):
        for name in parameters:
            if _names({name}, target.name):
                if _is_stack(target, module):
                    found.setdefault(name, []).append(target)
                elif not isinstance(module, nn.Linear):
                    left_out.append(target.name)
    if not found:
        return
    config.target_parameters = sorted({*(config.target_parameters or []), *found})
    for name, parts in compat._MOE_FUSED_TARGETS.get(family, {}).items():
        key = rf".*\.{re.escape(name)}"
        for pattern, value in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)):
            # The user's own setting has priority.
            if found.get(name) and compat.get_pattern_key(pattern, found[name][0].name) not in pattern:
                pattern[key] = value * len(parts)
    if left_out:
        warnings.warn(
            f"target_modules='all-linear' leaves out {listed(left_out)}, which route tokens to experts; adapters "
            "on them are not supported (PEFT's LoRA trains them)",
            stacklevel=5,
        )


def warn_of_experts_left_out(config: Any, model: nn.Module, supported: bool) -> None:
    """After target_modules="all-linear": warn of experts without an adapter.

    Args:
        supported: whether the tuner supports `target_parameters`.
    """
    adapted = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, MultiLoraExperts)
        for name in module.adapted()
    }
    able: list[str] = []
    unable: list[str] = []
    for target, module in _all_parameters(model):
        parameter = getattr(module, target.parameter)
        is_experts = parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
        if not is_experts or target.name in adapted:
            continue
        (able if supported and _is_stack(target, module) else unable).append(target.name)
    if able:
        suffixes = sorted({_suffix(name) for name in able})
        warnings.warn(
            f"target_modules='all-linear' leaves out the experts {listed(able)}, as PEFT's LoRA does for this model. "
            f"To train them set target_parameters={suffixes}.",
            stacklevel=4,
        )
    if unable:
        warnings.warn(
            f"target_modules='all-linear' leaves out {listed(unable)}: they are not linear layers, and adapters "
            f"on them are not supported by {type(config).__name__}",
            stacklevel=4,
        )


def listed(names: Any) -> str:
    """Names of modules or parameters, with names that differ only in numbers as one: layers.*.linear1 (12)."""
    patterns: dict[str, int] = {}
    for name in sorted(names):
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        patterns[pattern] = patterns.get(pattern, 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in patterns.items())
