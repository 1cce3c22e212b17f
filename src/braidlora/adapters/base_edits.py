"""PEFT settings for which an adapter belongs to an edited base model, or needs data that a recipe does not give.

PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ and KaSA do not start from ΔW = 0 on the stored base: they move a part of W0 into
the adapter (W0 becomes W0 - s·B A), or quantize or truncate W0. PEFT saves the adapter, not the edited base. What it
saves is therefore a different function on the stored base, in another dtype, or in a loader that does not repeat the
edit. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BASE_EDITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# These read data in a separate call before training; without it PEFT uses another initialization.
_DATA = {
    "eva": "peft.initialize_lora_eva_weights",
    "corda": "peft.tuners.lora.corda.preprocess_corda",
    "lora_ga": "peft.tuners.lora.loraga.preprocess_loraga",
}
ALLOWED = (True, False, "gaussian", "orthogonal", "mica")


def base_edit(config: Mapping[str, Any]) -> str | None:
    """The setting of a PEFT configuration that changes the base's weights, such as `init_lora_weights='pissa'`.

    Args:
        config: its fields, as in adapter_config.json.
    """
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_EDITS):
        return f"init_lora_weights={init!r}"
    if config.get("kasa_config") is not None:
        return "kasa_config"
    return None


def missing_data(config: Mapping[str, Any]) -> str | None:
    """The PEFT function that must have been called with data for this initialization, or None."""
    init = config.get("init_lora_weights")
    return _DATA.get(init.lower()) if isinstance(init, str) else None


def why_refused(setting: str) -> str:
    """Why an adapter with this setting is not loaded, and what to do."""
    return (
        f"{setting} changes the base's own weights when the adapter is created, and the adapter folder does not "
        "contain them: on the stored base the adapter would compute a different function. Save it as a LoRA for the "
        "stored base with PEFT: model.save_pretrained(PATH, "
        "path_initial_model_for_weight_conversion=PATH_OF_THE_INITIAL_ADAPTER)"
    )
