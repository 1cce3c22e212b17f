"""PEFT settings under which an adapter belongs to a base that was edited, or to data that a recipe does not give.

PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ and KaSA do not start from ΔW = 0 on the base as it is stored: they take a part of
W0 into the adapter (W0 becomes W0 - s·B A), or quantize or truncate W0. PEFT saves the adapter and not the edited
base. What it saves therefore means something else on the stored base, in another dtype, or in a loader that does not
repeat the edit. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EDITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# These read data in a call of their own before training; without it PEFT goes on with another initialization.
_DATA = {
    "eva": "peft.initialize_lora_eva_weights",
    "corda": "peft.tuners.lora.corda.preprocess_corda",
    "lora_ga": "peft.tuners.lora.loraga.preprocess_loraga",
}
ALLOWED = (True, False, "gaussian", "orthogonal", "mica")


def base_edit(config: Mapping[str, Any]) -> str | None:
    """The setting of a PEFT configuration, such as `init_lora_weights='pissa'`, by which the base's weights change.

    Args:
        config: its fields, as in adapter_config.json.
    """
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_EDITS):
        return f"init_lora_weights={init!r}"
    if config.get("kasa_config") is not None:
        return "kasa_config"
    return None


def missing_data(config: Mapping[str, Any]) -> str | None:
    """The PEFT function that an initialization needs to have been called with data, or None."""
    init = config.get("init_lora_weights")
    return _DATA.get(init.lower()) if isinstance(init, str) else None


def why_refused(setting: str) -> str:
    """Why an adapter with this setting is not read, and what to do."""
    return (
        f"{setting} changes the base's own weights when the adapter is made, and the folder does not hold what it "
        "changed them to: on the stored base the adapter is another function. Save it as a LoRA for the stored base "
        "with PEFT: model.save_pretrained(PATH, path_initial_model_for_weight_conversion=PATH_OF_THE_INITIAL_ADAPTER)"
    )
