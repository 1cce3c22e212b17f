"""The modules that an adapter adapts: whether the recipe's names fit the model, and what to write if they do not."""

from __future__ import annotations

import difflib
import re

import torch
from peft import PeftConfig
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from braidlora.adapters import stacked_parameters
from braidlora.adapters._peft_compat import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from braidlora.errors import ConfigError


def fit_targets(
    adapter_config: PeftConfig,
    model: PreTrainedModel,
    targets: str | list[str] | None,
    has_parameters: bool = False,
) -> None:
    """Set the target modules of a configuration after checking them (see `check_targets`).

    Args:
        has_parameters: parameters are adapted too, so there need not be any modules.
    """
    if has_parameters and not targets and (targets is not None or model.config.model_type not in DEFAULTS):
        adapter_config.target_modules = set()
        return
    checked = check_targets(model, targets)
    adapter_config.target_modules = checked if isinstance(checked, str) else set(checked)


def check_targets(model: PreTrainedModel, targets: str | list[str] | None) -> str | list[str]:
    """The target modules to use: those given, after checking each, or PEFT's default for this kind of model.

    Raises:
        ConfigError: a name matches nothing, or something other than a linear layer.
    """
    linear = linear_names(model)
    if targets is None:
        return _default_targets(model, linear)
    if targets == "all-linear":
        return targets
    everything = [name for name, _ in model.named_modules() if name]
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            matched = [name for name in everything if _full_match(target, name)]
        else:
            matched = [name for name in everything if name == target or name.endswith("." + target)]
        wrong = [name for name in matched if name not in linear]
        if wrong:
            module = model.get_submodule(wrong[0])
            kind = (
                "the output layer"
                if module is model.get_output_embeddings()
                else f"a {type(module).__name__}"
            )
            raise ConfigError(
                f"adapter.target_modules: {target!r} matches {wrong[0]}, {kind}; only linear layers inside the model "
                f"can be adapted. {_experts(module) or _known(target, linear)}"
            )
        if not matched:
            as_list = any(name.endswith("." + target) for name in linear) and isinstance(targets, str)
            remedy = f"A string is a regular expression over full names; for a name write [{target}]."
            owner = next((m for n, m in _stacked(model).items() if n.endswith(f".{target}")), None)
            raise ConfigError(
                f"adapter.target_modules: {target!r} matches no module of this {model.config.model_type} model. "
                f"{_experts(owner) or (remedy if as_list else _known(target, linear))}"
            )
    return targets if isinstance(targets, str) else list(targets)


def linear_names(model: PreTrainedModel) -> set[str]:
    """Full names of the model's linear layers but the output layer; quantized ones and GPT-2's Conv1D count."""
    output = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    }


def _stacked(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules that own the model's stacked experts, by the parameters' full names."""
    return {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        for name in stacked_parameters(module)
    }


def _experts(module: torch.nn.Module | None) -> str:
    """How to adapt an experts module; empty for any other."""
    names = () if module is None else stacked_parameters(module)
    return (
        f"Experts go in adapter.target_parameters: [{', '.join(f'experts.{n}' for n in names)}]."
        if names
        else ""
    )


def _default_targets(model: PreTrainedModel, linear: set[str]) -> list[str]:
    kind = model.config.model_type
    if kind in DEFAULTS:
        return list(DEFAULTS[kind])
    raise ConfigError(
        f"adapter.target_modules: required, because PEFT has no default for {kind} models. {_known('', linear)}"
    )


def _known(target: str, linear: set[str]) -> str:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear if not name.rsplit(".", 1)[-1].isdigit()})
    near = difflib.get_close_matches(target, leaves, n=3, cutoff=0.4)
    nearest = f"Nearest: {', '.join(near)}. " if near else ""
    return f"{nearest}Its linear layers: {', '.join(leaves)} (or `all-linear`)."


def _full_match(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        raise ConfigError(
            f"adapter.target_modules: {expression!r} is not a valid regular expression: {error}. Names go in a list."
        ) from None
