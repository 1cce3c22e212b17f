"""All of PEFT that braidlora uses and PEFT does not export from `peft` itself, with what it is for.

PEFT has no stable interface for tuners from outside, so these names may change with any release. A name is looked up
when it is imported from here; one that is gone raises an ImportError that says which, what for, and which versions
have it. Nothing else in braidlora imports from inside PEFT. Tests look for all of these names, and for the methods
that our classes override or call.

To support a new release of PEFT: run the tests, repair what they name, and raise the last version in `CHECKED` and in
pyproject.toml.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

CHECKED = ("0.21", "0.21")  # the first and the last minor version of PEFT that these were checked against

_TUNERS = "peft.tuners.tuners_utils"
_CONVERSION = "peft.utils.transformers_weight_conversion"

# name: (module, what for)
NAMES = {
    "BaseTuner": (_TUNERS, "the base class of our tuners"),
    "BaseTunerLayer": (_TUNERS, "the base class of adapter layers, by which they are recognized"),
    "LoraLayer": ("peft.tuners.lora", "PEFT's own LoRA layers, scaled and counted like ours"),
    "AuxiliaryTrainingWrapper": ("peft.utils", "the wrapper of modules and tokens that are trained in full"),
    "ModulesToSaveWrapper": ("peft.utils", "the wrapper of modules_to_save, which mixed batches switch"),
    "CONFIG_NAME": ("peft.utils", "the name of adapter_config.json"),
    "register_peft_method": ("peft.utils", "the registration of our types"),
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": (
        "peft.utils",
        "the usual target modules of known architectures",
    ),
    "init_empty_weights": ("peft.utils.integrations", "low_cpu_mem_usage: layers on the meta device"),
    "get_pattern_key": ("peft.utils.other", "which key of rank_pattern or alpha_pattern fits a module"),
    "check_target_module_exists": (_TUNERS, "whether target_modules and their like name a module"),
    "check_adapters_to_merge": (_TUNERS, "which adapters a merge means"),
    "onload_layer": (_TUNERS, "merging where accelerate offloads the base"),
    "_ExcludedModule": (_TUNERS, "telling an excluded module from one that is not named"),
    "_get_in_out_features": (_TUNERS, "the widths of any linear layer, quantized ones included"),
    "_maybe_include_all_linear_layers": (_TUNERS, "what target_modules='all-linear' means"),
    "_check_lora_target_modules_mamba": (_TUNERS, "the modules that Mamba's kernels read and never call"),
    "_MODEL_TO_CONVERSION_PATTERN": (_CONVERSION, "the family of a mixture-of-experts base"),
    "_MOE_TARGET_MODULE_MAPPING": (
        _CONVERSION,
        "the stacked experts that 'all-linear' adapts in that family",
    ),
    "_MOE_FUSED_TARGETS": (_CONVERSION, "the matrices that transformers 5 has joined in one, for their rank"),
}

# Attributes that instances get when they are made: `BaseTunerLayer._disable_adapters` and `_active_adapter` are set by
# our layers, `BaseTuner.targeted_parameter_names` is kept complete in PEFT 0.20, `AuxiliaryTrainingWrapper._adapters`,
# `._active_adapter` and `.original_module` are read. PEFT's keyword argument `adapter_names` reaches the layers'
# forward, and `peft.optimizers.lorafa.LoraFAOptimizer` rejects ours (`_lorafa_guard`).


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, purpose = NAMES[name]
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(missing(f"{module}.{name}", purpose)) from error
    globals()[name] = value
    return value


def missing(name: str, purpose: str) -> str:
    """What to say of a name that the installed PEFT does not have."""
    return (
        f"peft {importlib.metadata.version('peft')} has no {name}, which braidlora needs ({purpose}). braidlora was "
        f"checked against peft {CHECKED[0]} to {CHECKED[1]}: pip install 'peft>={CHECKED[0]},<={CHECKED[1]}.99'"
    )
