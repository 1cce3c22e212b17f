"""The adapter to export: an adapter folder, or the adapter of a run or of a federation's client."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from torch import Tensor

from braidlora.adapters import FactoredLoraConfig, MultiLoraConfig
from braidlora.adapters.sharing import SCHEMES
from braidlora.errors import CheckpointError, ConfigError
from braidlora.models.adapter_reader import checked_copy, open_adapter
from braidlora.models.loading import adapter_folder, client_folder
from braidlora.models.origin import Origin
from braidlora.paths import expanded
from braidlora.runs import Committed, federation_around, run_around

_VARIANTS = (
    "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "monteclora_config", "target_parameters",
)  # fmt: skip
KINDS = ("LORA", "FACTOREDLORA", "BRAIDLORA")


@dataclass(frozen=True)
class Source:
    """An adapter on disk, read and checked.

    Attributes:
        files: its folder, read as committed.
        config: its PEFT configuration.
        tensors: its state dict, as PEFT saved it.
        origin: what its card, and its run or federation, record about it.
    """

    files: Committed
    config: Any
    tensors: dict[str, Tensor]
    origin: Origin

    @property
    def folder(self) -> Path:
        """The adapter's folder."""
        return self.files.directory

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return str(self.config.peft_type.value)

    @property
    def experts(self) -> int:
        """N; 1 for an adapter without a router."""
        return self.config.num_experts if isinstance(self.config, MultiLoraConfig) else 1

    @property
    def routed(self) -> bool:
        """Whether a router weighs the experts for every token."""
        return self.experts > 1 and self.config.gate == "token"

    @property
    def tasks(self) -> list[str]:
        """The tasks of a gate or map by task, for each of which the adapter is another LoRA; empty for others."""
        config = self.config
        return list(config.task_names or ()) if isinstance(config, MultiLoraConfig) and config.by_task else []

    def describe(self) -> str:
        """The kind in words, e.g. `ALoRA (shared B), 3 experts of rank 8`."""
        config = self.config
        if isinstance(config, MultiLoraConfig):
            gate = (
                ""
                if config.gate == "token"
                else f", weighted {'by task' if config.gate == 'task' else 'equally'}"
            )
            if config.num_experts == 1:
                return f"LoRA of rank {config.r}{', with a map per task' if config.task_map else ''}"
            return f"{SCHEMES[config.share].title}, {config.num_experts} experts of rank {config.r}{gate}"
        if isinstance(config, FactoredLoraConfig):
            return f"factored LoRA of rank {config.r}, intermediate rank {config.r_intermediate}"
        if self.kind != "LORA":
            return f"{self.kind} adapter"
        return f"{'DoRA' if config.use_dora else 'LoRA'} of rank {config.r}{self._variant()}"

    def _variant(self) -> str:
        """Settings of PEFT's LoRA that change its forward, e.g. ` with lora_bias`."""
        named = [name for name in _VARIANTS if getattr(self.config, name, None)]
        return f" with {', '.join(named)}" if named else ""

    @property
    def has_exact_lora(self) -> bool:
        """Whether a LoRA computes exactly what this adapter does."""
        return self.kind in KINDS and not self.routed and not self.tasks

    @property
    def plain(self) -> bool:
        """Whether it is exactly W0 + s·B A, which any LoRA loader supports."""
        return self.kind != "LORA" or not (self.config.use_dora or self._variant())


def read_source(target: str | Path, *, any_kind: bool = False) -> Source:
    """Read the adapter that `target` is, or holds as a run or as a federation's client.

    Args:
        target: a run directory or an adapter folder.
        any_kind: also read an adapter that has no LoRA form.

    Raises:
        ConfigError: the target is not an adapter, or of a kind without a LoRA form.
        CheckpointError: the adapter is missing, damaged, not finite, or pickled.
    """
    path = expanded(target)
    federation = federation_around(path)
    place = federation or run_around(path)
    folder = client_folder(path, federation) if federation is not None else adapter_folder(path, place)
    if folder is None:
        what = "is a base model" if path.is_dir() else "is not a folder"
        raise ConfigError(f"{target}: {what}; expected a run directory or an adapter folder.")
    files = open_adapter(folder)
    with checked_copy(files) as (copy, stored):
        tensors = dict(stored)
        try:
            config = peft.PeftConfig.from_pretrained(str(copy))
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder}: PEFT cannot read its configuration: {error}") from error
        source = Source(files, config, tensors, Origin.of(folder, place, files))
    if source.kind not in KINDS and not any_kind:
        raise ConfigError(
            f"{target}: an adapter of type {source.kind} has no exact LoRA form. Supported are {', '.join(KINDS)}; "
            "PEFT loads this one directly, without braidlora."
        )
    return source
