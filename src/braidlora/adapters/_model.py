"""`MultiLoraModel`: puts multi-LoRA layers into a model, as a PEFT tuner."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import wrapt
from torch import nn

from braidlora.adapters import _lorafa_guard
from braidlora.adapters._balance import share_scope
from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters._experts import MultiLoraExperts, MultiLoraParameter
from braidlora.adapters._layer import MultiLoraLayer
from braidlora.adapters._parameters import Target, matched_parameters
from braidlora.adapters._peft_compat import init_empty_weights
from braidlora.adapters._registration import NAME, PREFIX, register
from braidlora.adapters._tasks import Tasks, current, for_tasks, take_tasks
from braidlora.adapters._tuner import LinearTuner
from braidlora.errors import ConfigError


class MultiLoraLinear(MultiLoraLayer):
    """The layer that replaces a linear layer.

    The name matters: PEFT includes an adapted layer in "all-linear" if its class name contains "Linear".
    """


class MultiLoraModel(LinearTuner):
    """PEFT tuner of type BRAIDLORA; `peft.get_peft_model` with a `MultiLoraConfig` makes one.

    Raises:
        ConfigError: `target_modules` match nothing, or something that is not a linear layer.
    """

    prefix = PREFIX
    tuner_layer_cls = MultiLoraLayer
    linear_cls = MultiLoraLinear
    adapts_parameters = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        share_scope(model)
        if self.peft_config[adapter_name].task_names:
            take_tasks(model)

    def generate(self, *args: Any, tasks: Tasks | None = None, **kwargs: Any) -> Any:
        """The base model's generate. `tasks`: those of the rows, for a gate by task; beams have their row's."""
        generate: Any = self.model.generate
        with for_tasks(current() if tasks is None else tasks):
            return generate(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter, and the hooks of the balance loss with the last adapter that has one."""
        super().delete_adapter(adapter_name)
        share_scope(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        share_scope(unloaded)
        return unloaded

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """As for all our tuners; "all-linear" may have added the experts of a mixture-of-experts base by now."""
        if peft_config.target_parameters and (problem := peft_config.problem_with_parameters()):
            raise ConfigError(f"{problem} Name the target_modules without them.")
        super()._prepare_model(peft_config, model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """As in PEFT's LoRA: parameters suffice for a base whose usual target modules are unknown."""
        known = self.target_module_mapping.get(model_config.get("model_type"))
        if peft_config.target_modules is None and peft_config.target_parameters and known is None:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the experts that `target_parameters` match; PEFT's method knows only the wrapper of its LoRA."""
        targets = matched_parameters(peft_config, model)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for target in targets:
                self._adapt_parameter(peft_config, adapter_name, target, model)
        names = [target.name for target in targets]
        # PEFT 0.20 leaves the bookkeeping to this method, 0.21 does it from the result.
        self.targeted_parameter_names += [name for name in names if name not in self.targeted_parameter_names]
        return names

    def _adapt_parameter(self, config: Any, adapter_name: str, target: Target, model: nn.Module) -> None:
        experts = model.get_submodule(target.module)
        if not isinstance(experts, MultiLoraExperts):
            parent, _, leaf = target.module.rpartition(".")
            experts = MultiLoraExperts(experts)
            setattr(model.get_submodule(parent), leaf, experts)
        r, lora_alpha = config.rank_and_alpha(target.name)
        part = experts.adapted().get(target.parameter)
        if part is not None:
            part.update_layer(adapter_name, config, r, lora_alpha)
            return
        part = MultiLoraParameter(experts.base_layer, target.parameter, adapter_name, config, r, lora_alpha)
        if adapter_name not in self.active_adapters:
            part.requires_grad_(False)
        setattr(experts, target.parameter, part)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, MultiLoraExperts):  # unloaded: there is no weight to restore
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)


register(NAME, PREFIX, MultiLoraConfig, MultiLoraModel)
wrapt.register_post_import_hook(_lorafa_guard.guard, _lorafa_guard.MODULE)
