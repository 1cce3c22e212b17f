"""Adapter folders of braidlora, read by vLLM's own loader: configuration, checks, and tensors in the server's form."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from braidlora.errors import BraidloraError
from braidlora.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Committed
from braidlora.serving import adapter_file
from braidlora.serving.adapter_file import AdapterFile, Layout

logger = logging.getLogger("vllm.plugins.braidlora")


class Folder:
    """An adapter folder between vLLM's steps: its configuration, then its rank, then its tensors.

    Attributes:
        max_rank: of the server; known when vLLM has validated the configuration.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.files = Committed(self.path, needs_manifest=False)
        self.config: AdapterFile = adapter_file.parse_adapter_file(
            self.files.read(ADAPTER_CONFIG), self.path / ADAPTER_CONFIG
        )
        self.max_rank = 0

    def validate(self, max_rank: int) -> None:
        """Reject what cannot be served.

        Raises:
            ValueError: with all reasons, or the rank that the server needs.
        """
        reasons = adapter_file.refusals(self.config)
        shapes: adapter_file.Shapes = {}
        if not reasons:  # with trained modules there are tensors of other names
            shapes = adapter_file.read_shapes(self.path, self.config.peft_type)
            head = adapter_file.head_refusal(shapes)
            reasons += [head] if head else []
        if reasons:
            raise ValueError(
                f"{self.path}: vLLM cannot serve this adapter: {'; '.join(reasons)}. `braidlora predict` loads it"
                + ("." if self.config.by_task else ", and `braidlora serve --engine transformers`.")
            )
        layout = adapter_file.layout_of(self.config, shapes, self.path / ADAPTER_WEIGHTS)
        if layout.columns > max_rank:
            smallest = adapter_file.smallest_allowed_rank(layout.columns, str(self.path))
            raise ValueError(
                f"{self.path}: needs {adapter_file.describe_columns(layout)}, and this server has --max-lora-rank "
                f"{max_rank}. Start it with --max-lora-rank {smallest}."
            )
        self.max_rank = max_rank

    def tensors(self) -> tuple[dict[str, Any], Layout]:
        """The tensors in the server's form, checked against the folder's manifest, and how their columns are used."""
        from safetensors.torch import load

        from braidlora.serving import encoding

        path = self.path / ADAPTER_WEIGHTS
        stored = load(self.files.read(ADAPTER_WEIGHTS))
        modules = encoding.group(stored.items(), self.config.peft_type, path)
        layout = encoding.layout(self.config, modules, path)
        return encoding.encode(self.config, modules, layout, self.max_rank), layout


def install() -> None:
    """Replace the three functions of vLLM that read an adapter folder."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.utils import get_lora_id

    from braidlora.serving.vllm.seams import replaced

    read_config = PEFTHelper.from_local_dir.__func__
    validate = PEFTHelper.validate_legal
    read_weights = LoRAModel.from_local_checkpoint.__func__
    taken = inspect.signature(LoRAModel.from_lora_tensors).parameters

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(lora_path):
            return read_config(cls, lora_path, *args, **kwargs)
        folder = _as_value_error(lambda: Folder(lora_path))
        # Scaling 1: ours is in the tensors. The rank is checked by `validate`.
        helper = cls.from_dict({"r": 1, "lora_alpha": 1, "target_modules": []})
        helper.braidlora = folder
        return helper

    def validate_legal(self: Any, lora_config: Any) -> None:
        folder = getattr(self, "braidlora", None)
        if folder is None:
            validate(self, lora_config)
        else:
            _as_value_error(lambda: folder.validate(lora_config.max_lora_rank))

    def from_local_checkpoint(
        cls: Any, lora_dir: str, expected_lora_modules: Any, peft_helper: Any, **kwargs: Any
    ) -> Any:
        folder = getattr(peft_helper, "braidlora", None)
        if folder is None:
            return read_weights(cls, lora_dir, expected_lora_modules, peft_helper, **kwargs)
        tensors, layout = _as_value_error(folder.tensors)
        _check_modules(lora_dir, tensors, expected_lora_modules, kwargs.get("weights_mapper"))
        # Other arguments are about how and for which experts of a mixture the files are read, which was done here.
        known = {name: value for name, value in kwargs.items() if name in taken}
        if known.get("lora_model_id") is None:
            known["lora_model_id"] = get_lora_id()
        model = cls.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **known)
        for layer in model.loras.values():
            layer.rank = layer.lora_a.shape[0]
        model.rank = max(layer.rank for layer in model.loras.values())
        model.braidlora = layout
        kind = (
            f"{layout.num_experts} experts of rank {layout.r}" if layout.num_experts > 1 else "a plain LoRA"
        )
        logger.info("%s: %s.", lora_dir, kind)
        return model

    PEFTHelper.from_local_dir = classmethod(replaced(read_config, from_local_dir))
    PEFTHelper.validate_legal = replaced(validate, validate_legal)
    LoRAModel.from_local_checkpoint = classmethod(replaced(read_weights, from_local_checkpoint))


def _is_ours(lora_path: str) -> bool:
    """Whether the configuration in this folder names a type of ours; vLLM's own reader explains all other problems."""
    try:
        return adapter_file.read_adapter_file(Path(lora_path)).ours
    except BraidloraError:
        return _names_our_type(Path(lora_path))


def _names_our_type(folder: Path) -> bool:
    """Whether a configuration that is not valid is still one of ours, so that our message explains it."""
    from braidlora.json_text import loads

    try:
        content = loads((folder / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("peft_type") in (
        adapter_file.MULTI,
        adapter_file.FACTORED,
    )


def _as_value_error(call: Any) -> Any:
    """What `call` returns; our errors as the one that vLLM reports to the client."""
    try:
        return call()
    except BraidloraError as error:
        raise ValueError(str(error)) from error


def _check_modules(folder: str, tensors: dict[str, Any], expected: Any, mapper: Any) -> None:
    """Reject modules to which vLLM does not apply a LoRA in this model."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    names = {parse_fine_tuned_lora_name(name, mapper)[0] for name in tensors}
    unknown = sorted({name.rpartition(".")[2] for name in names} - set(expected))
    if unknown:
        raise ValueError(
            f"{folder}: adapts {', '.join(unknown)}, and vLLM applies LoRA in this model to "
            f"{', '.join(sorted(expected))}."
        )
