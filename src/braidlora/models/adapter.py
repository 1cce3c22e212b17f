"""From the recipe's `adapter` to a PEFT model: configuration, targets that exist, seeded initial weights."""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from typing import TYPE_CHECKING, Any

from braidlora.adapters.base_edits import ALLOWED, base_edit, missing_data
from braidlora.adapters.sharing import by_method
from braidlora.config import AdapterSection, RunConfig
from braidlora.errors import ConfigError
from braidlora.models.head import new_modules

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def build_adapter_config(config: RunConfig) -> PeftConfig:
    """The PEFT configuration that the recipe's `adapter` describes.

    `lora` gives PEFT's own LoraConfig, every sharing scheme a MultiLoraConfig, and a mapping with `peft_type` any
    configuration that PEFT knows, made from that mapping alone.

    Raises:
        ConfigError: the mapping is no valid PEFT configuration.
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
        _warn_of_ignored(adapter, ("dropout_mask", "router_temperature", "balance_loss"))
        return peft.LoraConfig(**common)
    return MultiLoraConfig(
        **common,
        share=scheme.share,
        num_experts=adapter.num_experts,
        dropout_mask=adapter.dropout_mask,
        router_temperature=adapter.router_temperature,
        balance_loss=adapter.balance_loss,
    )


def attach_adapter(model: PreTrainedModel, config: RunConfig, seed: int) -> PeftModel:
    """Wrap `model` with the recipe's adapter, its initial weights drawn from `seed` alone.

    Torch's global generator is left as it was.

    Raises:
        ConfigError: a target module does not exist or is no linear layer (the message names the nearest), or PEFT
            refuses the configuration.
    """
    adapter_config = build_adapter_config(config)
    if not isinstance(config.adapter.method, dict):
        fit_targets(
            adapter_config, model, config.adapter.target_modules, bool(config.adapter.target_parameters)
        )
    if config.prompt.packing and adapter_config.is_prompt_learning:
        raise ConfigError(
            f"prompt.packing: {adapter_config.peft_type.value} puts virtual tokens before a sequence, and packed rows "
            "share one. Set prompt.packing=false."
        )
    save_modules(model, adapter_config)
    adapter_config.revision = config.model.revision  # of the base, which PEFT and its users load again by it
    before = _checksums(model) if isinstance(config.adapter.method, dict) else []
    wrapped = wrap(model, adapter_config, seed)
    _refuse_edited_base(before, wrapped, adapter_config)
    return wrapped


def fit_targets(
    adapter_config: PeftConfig,
    model: PreTrainedModel,
    targets: str | list[str] | None,
    has_parameters: bool = False,
) -> None:
    """Set the target modules of a configuration, once it is known that they fit (see `check_targets`).

    Args:
        has_parameters: parameters are adapted as well, so that there need not be any modules.
    """
    if has_parameters and not targets and (targets is not None or not _has_defaults(model)):
        adapter_config.target_modules = set()
        return
    checked = check_targets(model, targets)
    adapter_config.target_modules = checked if isinstance(checked, str) else set(checked)


def wrap(
    model: PreTrainedModel, adapter_config: PeftConfig, seed: int, adapter_name: str = "default"
) -> PeftModel:
    """`peft.get_peft_model`, with initial weights drawn from `seed` alone.

    Raises:
        ConfigError: PEFT refuses the configuration, or it has nothing to train.
    """
    import peft
    import torch

    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # PEFT asks for an attribute that newer transformers have renamed; users can do nothing about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, adapter_config, adapter_name=adapter_name)
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            remedy = ""
            if "lora_dropout" in str(error):  # on experts, which target_modules=all-linear may include
                remedy = " PEFT's LoRA has no dropout on experts: set adapter.lora_dropout=0 (other methods have it)."
            raise ConfigError(
                f"adapter: PEFT cannot adapt {type(model).__name__} this way: {error}{remedy}"
            ) from error
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise ConfigError("adapter: this configuration has no trainable parameter; nothing would be learnt.")
    return wrapped


def check_targets(model: PreTrainedModel, targets: str | list[str] | None) -> str | list[str]:
    """The target modules to use: those given, once each of them is known to fit, or PEFT's for this kind of model.

    Raises:
        ConfigError: a name matches nothing, or something that is no linear layer.
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
            remedy = f"A single text is a regular expression over full names; for a name write [{target}]."
            owner = next((m for n, m in _stacked(model).items() if n.endswith(f".{target}")), None)
            raise ConfigError(
                f"adapter.target_modules: {target!r} matches no module of this {model.config.model_type} model. "
                f"{_experts(owner) or (remedy if as_list else _known(target, linear))}"
            )
    return targets if isinstance(targets, str) else list(targets)


def linear_names(model: PreTrainedModel) -> set[str]:
    """Full names of the model's linear layers (quantised ones and GPT-2's Conv1D included), the output layer apart."""
    import torch
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    }


def _stacked(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The model's stacked experts: the modules that own them, by the parameters' full names."""
    from braidlora.adapters import stacked_parameters

    return {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        for name in stacked_parameters(module)
    }


def _experts(module: torch.nn.Module | None) -> str:
    """How to adapt an experts module; nothing for any other."""
    from braidlora.adapters import stacked_parameters

    names = () if module is None else stacked_parameters(module)
    return (
        f"Experts go in adapter.target_parameters: [{', '.join(f'experts.{n}' for n in names)}]."
        if names
        else ""
    )


def _has_defaults(model: PreTrainedModel) -> bool:
    from braidlora.adapters._peft_compat import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    return model.config.model_type in DEFAULTS


def _default_targets(model: PreTrainedModel, linear: set[str]) -> list[str]:
    from braidlora.adapters._peft_compat import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = model.config.model_type
    if kind in DEFAULTS:
        return list(DEFAULTS[kind])
    raise ConfigError(
        f"adapter.target_modules: required, since PEFT has no default for {kind} models. {_known('', linear)}"
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
            f"adapter.target_modules: {expression!r} is no valid regular expression: {error}. Names go in a list."
        ) from None


def save_modules(model: PreTrainedModel, adapter_config: PeftConfig) -> None:
    """Let the adapter train and save what is new in a classifier; refuse names of modules that there are not."""
    # PEFT adds these two by itself.
    fresh = [name for name in new_modules(model) if name not in ("classifier", "score")]
    if "modules_to_save" not in {field.name for field in dataclasses.fields(adapter_config)}:
        if fresh:
            raise ConfigError(
                f"adapter.method: {adapter_config.peft_type.value} cannot train the classifier's new "
                f"{', '.join(fresh)}; choose another method."
            )
        return
    if fresh:
        adapter_config.modules_to_save = [*(adapter_config.modules_to_save or []), *fresh]
    _check_modules_to_save(model, adapter_config.modules_to_save)


def _check_modules_to_save(model: PreTrainedModel, names: list[str] | None) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in modules})
    for name in names or []:
        if not any(module == name or module.endswith("." + name) for module in modules):
            near = difflib.get_close_matches(name, leaves, n=3, cutoff=0.4)
            raise ConfigError(
                f"adapter.modules_to_save: {name!r} matches no module of this {model.config.model_type} model"
                + (f"; nearest: {', '.join(near)}." if near else ".")
            )


def _foreign_config(adapter: AdapterSection, task_type: str) -> PeftConfig:
    import peft

    assert isinstance(adapter.method, dict)
    given = dict(adapter.method)
    kind = str(given.pop("peft_type", "")).upper()
    classes = {str(name.value): cls for name, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
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
            f"adapter: {', '.join(ignored)} would be ignored, since `method` is a mapping; put what you need into it."
        )
    try:
        config = classes[kind](**{"task_type": task_type, **given})
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"adapter.method: not a valid {kind} configuration: {error}") from error
    _refuse_what_cannot_be_kept(config)
    return config


def _refuse_what_cannot_be_kept(config: PeftConfig) -> None:
    """An adapter folder has to mean the same on the stored base, and a method has to do what its name says."""
    settings = config.to_dict()
    kept = f"Choose among {', '.join(map(repr, ALLOWED))}."
    if setting := base_edit(settings):
        raise ConfigError(
            f"adapter.method: {setting} changes the base's own weights, which an adapter folder does not hold: what "
            f"is trained would be another model on the stored base. {kept}"
        )
    if call := missing_data(settings):
        raise ConfigError(
            f"adapter.method: init_lora_weights={settings['init_lora_weights']!r} is computed from data by {call}, "
            f"which a recipe does not call; without it PEFT starts from a plain LoRA. {kept}"
        )


def _checksums(model: PreTrainedModel) -> list[tuple[str, Any, int]]:
    """Name, parameter and sum of the bits of every parameter of the base that has values (a plan's have none)."""
    return [
        (name, parameter, _bit_sum(parameter))
        for name, parameter in model.named_parameters()
        if parameter.device.type != "meta"
    ]


def _bit_sum(parameter: Any) -> int:
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().contiguous().view(integers).sum(dtype=torch.int64))


def _refuse_edited_base(before: list[tuple[str, Any, int]], wrapped: PeftModel, config: PeftConfig) -> None:
    """Whatever the method is called: it may add parameters to the base, but not change those that are there.

    Raises:
        ConfigError: a parameter of the base has other values than before, or is gone.
    """
    present = {id(parameter) for parameter in wrapped.parameters()}
    edited = [
        name
        for name, parameter, bits in before
        if id(parameter) not in present or _bit_sum(parameter) != bits
    ]
    if edited:
        raise ConfigError(
            f"adapter.method: {config.peft_type.value} with these settings changes the base's own weights "
            f"({edited[0]}{' and others' if edited[1:] else ''}), which an adapter folder does not hold; choose a "
            "method that leaves them as they are."
        )


def _warn_of_ignored(adapter: AdapterSection, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(adapter, name) != type(adapter).model_fields[name].default:
            warnings.warn(
                f"adapter.{name} is ignored: method `lora` has no experts and no router", stacklevel=3
            )
