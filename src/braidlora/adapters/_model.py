"""The PEFT tuners: they put adapter layers in place of a model's linear layers."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from braidlora.adapters._layer import MultiLoraLayer
from braidlora.adapters._mixed_batch import MixedBatchTuner
from braidlora.adapters._register import PREFIX
from braidlora.errors import ConfigError


class MultiLoraLinear(MultiLoraLayer):
    """What the tuner puts in place of a linear layer.

    The name matters: PEFT counts an adapted layer among "all-linear" if its class is called something with "Linear".
    """


class LinearTuner(MixedBatchTuner, BaseTuner):
    """What our tuners have in common: the choice of linear layers, and errors that name the nearest ones.

    A subclass sets `prefix`, `tuner_layer_cls` (with `update_layer`) and `linear_cls`, the layer to put in place.
    """

    linear_cls: type[nn.Module]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        names = _linear_names(model)
        before = self._weights_of(model, adapter_name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{error} {_nearest(config.target_modules, names)}") from error
        if before:
            self._forget_what_is_left(model, adapter_name, before)
        _warn_of_unmatched(config, names)

    def _weights_of(self, model: nn.Module, adapter_name: str) -> dict[Any, nn.Module]:
        """The layers that have an adapter of this name, as on a model that is wrapped again, with a part of each.

        Raises:
            ConfigError: it is merged, so that its weights are still needed to take it out of the base.
        """
        layers = [module for module in model.modules() if isinstance(module, self.tuner_layer_cls)]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ConfigError(
                f"the model has an adapter {adapter_name!r} that is merged into the base weights; call "
                "unmerge_adapter (or merge_and_unload, to keep the merged weights) before making it anew"
            )
        first = self.tuner_layer_cls.adapter_layer_names[0]
        return {
            layer: getattr(layer, first)[adapter_name] for layer in layers if layer.has_adapter(adapter_name)
        }

    def _forget_what_is_left(self, model: nn.Module, adapter_name: str, before: dict[Any, nn.Module]) -> None:
        """Of an adapter that was made anew: the old one's layers, heads and tokens that the new one does not have."""
        first = self.tuner_layer_cls.adapter_layer_names[0]
        for layer, part in before.items():
            if layer.has_adapter(adapter_name) and getattr(layer, first)[adapter_name] is part:
                layer.forget_adapter(adapter_name)
        # PEFT adds the new one's heads and tokens after this.
        for name, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, [])
                if not module._adapters:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, module.original_module)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # Before anything is replaced, so that an error leaves the model as it was.
        adapted = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
        )
        for name, module in model.named_modules():
            if not name or (adapted and name.startswith(adapted)):
                continue
            if self._check_target_module_exists(peft_config, name):
                _check_linear(name, module, model)

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
        r_key = get_pattern_key(peft_config.rank_pattern, current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern, current_key)
        r = peft_config.rank_pattern.get(r_key, peft_config.r)
        lora_alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, r, lora_alpha)
            return
        _check_linear(current_key, target, self.model)
        layer = self.linear_cls(target, adapter_name, peft_config, r, lora_alpha)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


class MultiLoraModel(LinearTuner):
    """PEFT tuner of type BRAIDLORA; `peft.get_peft_model` with a `MultiLoraConfig` makes one.

    Raises:
        ConfigError: `target_modules` match nothing, or something that is no linear layer.
    """

    prefix = PREFIX
    tuner_layer_cls = MultiLoraLayer
    linear_cls = MultiLoraLinear


def _check_linear(name: str, module: nn.Module, model: nn.Module) -> None:
    """Raise ConfigError unless `module` is a linear layer whose forward is called."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        problem = "belongs to an nn.MultiheadAttention, which reads the weight and never calls the module"
    elif not _is_linear(base):
        problem = f"is a {type(base).__name__}, not a linear layer"
    else:
        return
    raise ConfigError(
        f"target_modules match {name!r}, which {problem}; name linear layers only, or put it into exclude_modules. "
        f"{_nearest({name.rpartition('.')[2]}, _linear_names(model))}"
    )


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses, Conv1D, and quantised layers, which all name their input and output features."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    if isinstance(module, (nn.Embedding, nn.MultiheadAttention, nn.Bilinear, nn.modules.conv._ConvNd)):
        return False
    features = (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size"))
    return any(
        isinstance(getattr(module, k, None), int) and isinstance(getattr(module, d, None), int)
        for k, d in features
    )


def _linear_names(model: nn.Module) -> list[str]:
    """Full names of all modules that can be adapted; adapters' own layers and attention's own are not among them."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = tuple(f"{name}." for name in adapted + attention)
    return [
        name
        for name, module in model.named_modules()
        if name and not (inside and name.startswith(inside)) and (name in adapted or _is_linear(module))
    ]


def _nearest(targets: Any, names: list[str]) -> str:
    """A sentence with the names of linear layers that come closest to the targets."""
    known = sorted({name.rpartition(".")[2] for name in names} - {str(i) for i in range(1000)}) or sorted(
        names
    )
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
    """PEFT passes silently over names that match nothing as long as another name matches."""
    if not isinstance(config.target_modules, set):
        return
    for target in sorted(config.target_modules):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            warnings.warn(
                f"target_modules: {target!r} matches no linear layer and is ignored. {_nearest({target}, names)}",
                stacklevel=2,
            )
