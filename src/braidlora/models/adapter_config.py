"""From the recipe's `adapter` to a PEFT configuration."""

from __future__ import annotations

import difflib
import warnings
from typing import TYPE_CHECKING, Any

from braidlora.adapters.base_edits import ALLOWED, base_edit, missing_data
from braidlora.adapters.sharing import by_method
from braidlora.config import AdapterSection, RunConfig, what_it_is
from braidlora.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig


def build_adapter_config(config: RunConfig) -> PeftConfig:
    """The PEFT configuration that the recipe's `adapter` describes.

    `lora` gives PEFT's own LoraConfig, every sharing scheme a MultiLoraConfig, and a mapping with `peft_type` any
    configuration that PEFT knows, made from that mapping alone.

    Raises:
        ConfigError: the mapping is not a valid PEFT configuration.
    """
    import peft

    from braidlora.adapters import MultiLoraConfig

    adapter = config.adapter
    task_type = "CAUSAL_LM" if config.kind == "generate" else "SEQ_CLS"
    if isinstance(adapter.method, dict):
        return _foreign_config(adapter, task_type)
    common: dict[str, Any] = {
        "task_type": task_type,
        "r": adapter.r,
        "lora_alpha": int(adapter.lora_alpha) if adapter.lora_alpha.is_integer() else adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": adapter.target_modules,
        "target_parameters": list(adapter.target_parameters) if adapter.target_parameters else None,
        "modules_to_save": list(adapter.modules_to_save) if adapter.modules_to_save else None,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
    }
    scheme = by_method()[adapter.method]
    if scheme.share is None:
        for name in ("dropout_mask", "expert_init", "router_temperature", "balance_loss", *OF_THE_METHOD):
            if getattr(adapter, name) != type(adapter).model_fields[name].default:
                instead = (
                    "; method `align-lora` is a LoRA that has it" if name.startswith("alignment") else ""
                )
                warnings.warn(
                    f"adapter.{name} is ignored: method `lora` has no experts and no router{instead}",
                    stacklevel=2,
                )
        return peft.LoraConfig(**common)
    own = {name: setting_of(adapter, name) for name in OF_THE_METHOD}
    by_task = own["gate"] == "task" or own["task_map"]
    return MultiLoraConfig(
        **common,
        **own,
        share=scheme.share,
        num_experts=scheme.experts or adapter.num_experts,
        task_names=[task.name for task in config.tasks] if by_task else None,
        dropout_mask=adapter.dropout_mask,
        init_weights="identical" if adapter.expert_init == "identical" else True,
        router_temperature=adapter.router_temperature,
        balance_loss=adapter.balance_loss,
    )


# Settings that a recipe may leave to its method.
OF_THE_METHOD = ("gate", "task_map", "alignment_loss", "alignment")
_DEFAULTS = {"gate": "token", "task_map": False, "alignment_loss": 0.0, "alignment": "mmd"}


def setting_of(adapter: AdapterSection, name: str) -> Any:
    """One of `OF_THE_METHOD`: the recipe's, or else the method's, or else the default."""
    given = getattr(adapter, name)
    if given is not None:
        return given
    scheme = by_method().get(adapter.method) if isinstance(adapter.method, str) else None
    return {**_DEFAULTS, **(scheme.defaults if scheme is not None else {})}[name]


def _foreign_config(adapter: AdapterSection, task_type: str) -> PeftConfig:
    import peft

    assert isinstance(adapter.method, dict)
    given = dict(adapter.method)
    given_type = given.pop("peft_type", "")
    kind = str(given_type).upper()
    classes = {str(name.value): cls for name, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in classes and (other := what_it_is(kind)):
        raise ConfigError(f"adapter.method: peft_type {given_type!r}: {other}.")
    if kind not in classes:
        near = difflib.get_close_matches(kind, classes, n=1)
        raise ConfigError(
            f"adapter.method: unknown peft_type {kind or None!r}"
            + (f"; did you mean {near[0]}?" if near else "")
            + f" Known are {', '.join(sorted(classes))}."
        )
    ignored = [
        name for name, field in type(adapter).model_fields.items()
        if name != "method" and getattr(adapter, name) != field.default
    ]  # fmt: skip
    if ignored:
        raise ConfigError(
            f"adapter: {', '.join(ignored)} would be ignored because `method` is a mapping; put what you need into it."
        )
    try:
        config = classes[kind](**{"task_type": task_type, **given})
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"adapter.method: not a valid {kind} configuration: {error}") from error
    _refuse_unsavable(config)
    return config


def _refuse_unsavable(config: PeftConfig) -> None:
    """Reject settings that edit the base, which an adapter folder does not hold, or that need data PEFT never gets."""
    settings = config.to_dict()
    kept = f"Choose among {', '.join(map(repr, ALLOWED))}."
    if setting := base_edit(settings):
        raise ConfigError(
            f"adapter.method: {setting} changes the base's own weights, which an adapter folder does not contain: what "
            f"is trained would give a different model on the stored base. {kept}"
        )
    if call := missing_data(settings):
        raise ConfigError(
            f"adapter.method: init_lora_weights={settings['init_lora_weights']!r} is computed from data by {call}, "
            f"which a recipe does not call; without it PEFT starts from a plain LoRA. {kept}"
        )
