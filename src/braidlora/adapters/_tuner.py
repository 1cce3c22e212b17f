"""`LinearTuner`: what our PEFT tuners have in common. They put adapter layers in place of a model's linear layers."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from braidlora.adapters._guards import bypassed_by, is_linear, linear_problem
from braidlora.adapters._lora_spellings import warn_of_layout
from braidlora.adapters._merging import MergeableTuner
from braidlora.adapters._mixed_batch import MixedBatchTuner
from braidlora.adapters._parameters import add_experts, listed, matched_parameters, warn_of_experts_left_out
from braidlora.adapters._peft_compat import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    BaseTuner,
    BaseTunerLayer,
    _check_lora_target_modules_mamba,
    _maybe_include_all_linear_layers,
)
from braidlora.adapters._replace import adapted_layers, remove_leftovers
from braidlora.adapters._weighted import WeightedTuner
from braidlora.errors import ConfigError


class LinearTuner(MixedBatchTuner, MergeableTuner, WeightedTuner, BaseTuner):
    """The base class of our tuners: the choice of linear layers, and errors that name the nearest ones.

    A subclass sets `prefix`, `tuner_layer_cls` (an `AdapterLayer`), `linear_cls`, the layer that replaces a linear one,
    and `adapts_parameters` if it supports `target_parameters`.
    """

    linear_cls: type[nn.Module]
    adapts_parameters = False
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        names = _linear_names(model)
        before = adapted_layers(model, adapter_name, self.tuner_layer_cls)
        all_linear = _is_all_linear(config)
        if all_linear:
            _expand_all_linear(config, model)
            if self.adapts_parameters:
                add_experts(config, model)
        try:
            with _without_pattern_warnings(config):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{error} {_nearest(config.target_modules, names)}") from error
        remove_leftovers(model, adapter_name, before)
        _warn_of_unmatched(config, names)
        if all_linear:
            warn_of_experts_left_out(config, model, self.adapts_parameters)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # Before anything is replaced, so that an error leaves the model unchanged.
        adapted = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
        )
        matched = []
        for name, module in model.named_modules():
            if not name or (adapted and name.startswith(adapted)):
                continue
            if self._check_target_module_exists(peft_config, name):
                _check_linear(name, module, model)
                matched.append(name)
        _warn_of_bypassed(matched, model)
        matched_parameters(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r, lora_alpha = peft_config.rank_and_alpha(current_key)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        warn_of_layout(peft_config, current_key, isinstance(base, Conv1D))
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, r, lora_alpha)
            return
        _check_linear(current_key, target, self.model)
        layer = self.linear_cls(target, adapter_name, peft_config, r, lora_alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _is_all_linear(config: Any) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


@contextmanager
def _without_pattern_warnings(config: Any) -> Iterator[None]:
    """PEFT matches rank and alpha patterns with modules only, and warns that one for a parameter is ignored."""
    if not config.target_parameters:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning
        )
        yield


def _expand_all_linear(config: Any, model: nn.Module) -> None:
    """Replace "all-linear" by the linear layers that can be adapted; raise ConfigError if there are none."""
    names = _maybe_include_all_linear_layers(config, model).target_modules
    attention = {name for name in names if _is_in_attention(name, model)}
    if attention:
        warnings.warn(
            f"target_modules='all-linear' leaves out {listed(attention)}: nn.MultiheadAttention reads their weights "
            "and never calls them, so an adapter would have no effect",
            stacklevel=3,
        )
    config.target_modules = names - attention
    if not config.target_modules:
        raise ConfigError("target_modules='all-linear': the model has no linear layer that can be adapted.")


def _is_in_attention(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _check_linear(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raise ConfigError unless `module` is a linear layer whose forward is called."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    problem: str | None
    if _is_in_attention(name, model):
        problem = "belongs to an nn.MultiheadAttention, which reads the weight and never calls the module"
    else:
        problem = linear_problem(base)
    if problem is not None:
        raise ConfigError(
            f"target_modules match {name!r}, which {problem}; name only linear layers, or put it into "
            f"exclude_modules. {_nearest({name.rpartition('.')[2]}, _linear_names(model))}"
        )
    _check_kernels(model, name.rpartition(".")[2])


def _check_kernels(model: nn.Module, leaf: str) -> None:
    """Raise ConfigError for modules of Mamba models to which PEFT adds no LoRA (but would add ours)."""
    try:
        _check_lora_target_modules_mamba(SimpleNamespace(peft_type="LORA"), model, leaf)
    except ValueError as error:
        kind = cast(Any, model).config.model_type
        raise ConfigError(
            f"target_modules match {leaf!r}, which the fused kernels of {kind} models read "
            f"and never call, so an adapter would have no effect; add exclude_modules=[{leaf!r}]."
        ) from error


def _warn_of_bypassed(names: list[str], model: nn.Module) -> None:
    """Warn of modules whose parent reads their weight on some path, where an adapter has no effect."""
    readers: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        method = bypassed_by(model.get_submodule(parent), leaf)
        if method is not None:
            readers.setdefault(method, []).append(name)
    for method, read in readers.items():
        remedy = "Check that the code path that your model uses calls them, or add them to exclude_modules."
        if method == "TransformerEncoderLayer.forward":
            remedy = (
                "That is its fast path for evaluation without gradients: call "
                "torch.backends.mha.set_fastpath_enabled(False) first."
            )
        warnings.warn(
            f"{method} reads the weights of {listed(read)} on one of its paths instead of calling the modules, so an "
            f"adapter has no effect there. {remedy}",
            stacklevel=4,
        )


def _linear_names(model: nn.Module) -> list[str]:
    """Full names of all modules that can be adapted, without those inside adapters and nn.MultiheadAttention."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = tuple(f"{name}." for name in adapted + attention)
    return [
        name
        for name, module in model.named_modules()
        if name and not (inside and name.startswith(inside)) and (name in adapted or is_linear(module))
    ]


def _nearest(targets: Any, names: list[str]) -> str:
    """A sentence with the names of the linear layers closest to the targets."""
    leaves = {name.rpartition(".")[2] for name in names}
    known = sorted(leaves - {str(i) for i in range(1000)} or names)
    wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
    close = dict.fromkeys(
        match
        for target in wanted
        for match in difflib.get_close_matches(target.rpartition(".")[2], known, n=3, cutoff=0.5)
    )
    if not known:
        return "The model has no linear layers."
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return (f"Nearest: {', '.join(close)}. " if close else "") + f"Linear layers of this model: {listed}."


def _warn_of_unmatched(config: Any, names: list[str]) -> None:
    """PEFT silently ignores names that match nothing as long as another name matches."""
    if not isinstance(config.target_modules, set):
        return
    for target in sorted(config.target_modules):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            warnings.warn(
                f"target_modules: {target!r} matches no linear layer and is ignored. {_nearest({target}, names)}",
                stacklevel=2,
            )
