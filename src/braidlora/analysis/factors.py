"""Adapters on disk, read layer by layer: the A and B of every expert. The base model is not needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from braidlora.adapters.sharing import LORA, SCHEMES, SharingScheme, lora_scaling
from braidlora.errors import CheckpointError
from braidlora.models.adapter_reader import open_adapter
from braidlora.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_KEY = re.compile(r"(?P<layer>.+)\.(?:lora|braidlora|factoredlora)_(?P<factor>A|B|M|B1|B2|base)\.weight")
_NEEDED = {
    "LORA": ("A", "B"),
    "BRAIDLORA": ("A", "B"),
    "FACTOREDLORA": ("A", "M", "B1", "B2", "base"),
}


@dataclass(frozen=True)
class LayerName:
    """The position of a layer in the model: `model.layers.3.self_attn.q_proj` is layer 3, module `self_attn.q_proj`."""

    name: str
    layer: int | None
    module: str

    @classmethod
    def of(cls, name: str) -> LayerName:
        parts = name.split(".")
        numbered = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if numbered is None:
            return cls(name, None, name)
        return cls(name, int(parts[numbered]), ".".join(parts[numbered + 1 :]))

    @property
    def order(self) -> tuple[int, int, str]:
        """Layers without a number (an output head, say) come last."""
        return (0, self.layer, self.module) if self.layer is not None else (1, 0, self.module)


@dataclass(frozen=True)
class LayerFactors:
    """The matrices of one adapted layer.

    Attributes:
        A: (r, k) for every expert, or one if A is shared.
        B: (d, r) for every expert, or one if B is shared.
        rank: the expected rank of each; below r for the plain form of a factored LoRA.
        scaling: s of ΔW = s·B A; None if the update also depends on the base weight (DoRA).
    """

    A: list[Tensor]
    B: list[Tensor]
    rank: int
    scaling: float | None

    @property
    def updates(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of every expert's update, the shared factor repeated."""
        experts = max(len(self.A), len(self.B))
        A = self.A * experts if len(self.A) == 1 else self.A
        B = self.B * experts if len(self.B) == 1 else self.B
        return list(zip(A, B, strict=True))


class AdapterFile:
    """One adapter folder: PEFT's LoRA, a multi-LoRA (its experts are blocks of A or B), or a factored LoRA.

    A factored LoRA is treated as the equivalent plain LoRA of rank m.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        label: its name in results.

    Attributes:
        layers: the adapted layers, by number and module.

    Raises:
        CheckpointError: no such folder, not an adapter, pickled, damaged, or of another type.
    """

    def __init__(self, folder: Path, label: str) -> None:
        from safetensors import SafetensorError, safe_open

        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; expected an adapter or a run directory.")
        files = open_adapter(folder)
        self.folder, self.label = folder, label
        self.config: dict[str, Any] = files.read_json(ADAPTER_CONFIG)
        self.kind = str(self.config["peft_type"])
        if self.kind not in _NEEDED:
            raise CheckpointError(
                f"{folder}: a {self.kind} adapter; only those with an A and a B can be analyzed: {', '.join(_NEEDED)}."
            )
        try:
            # Layers are read one by one, from a private copy of the file that was checked.
            with files.copy((ADAPTER_WEIGHTS,)) as copy:
                self._file = safe_open(copy / ADAPTER_WEIGHTS, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: damaged or truncated ({error}).") from None
        self._keys: dict[str, dict[str, str]] = {}
        for key in self._file.keys():  # noqa: SIM118 (not a dict)
            if match := _KEY.fullmatch(key):
                name = match["layer"].removeprefix("base_model.model.")
                self._keys.setdefault(name, {})[match["factor"]] = key
        stacked = [name for name in self._keys if self._is_stacked(name)]
        for name in stacked:
            del self._keys[name]
        if stacked and not self._keys:
            raise CheckpointError(
                f"{folder}: an adapter of only the base's stacked experts ({stacked[0]} …); only adapters of linear "
                "layers can be analyzed."
            )
        self._check()
        self.layers = sorted((LayerName.of(name) for name in self._keys), key=lambda layer: layer.order)

    @property
    def experts(self) -> int:
        return int(self.config["num_experts"]) if self.kind == "BRAIDLORA" else 1

    @property
    def scheme(self) -> SharingScheme:
        """What the experts share; LoRA with one expert."""
        return SCHEMES.get(str(self.config.get("share")), LORA) if self.experts > 1 else LORA

    def widths(self, name: str) -> tuple[int, int]:
        """(k, d) of a layer, from the file's header alone."""
        k = self._shape(name, "A")[1]
        d = self._shape(name, "base" if self.kind == "FACTOREDLORA" else "B")[0]
        return k, d

    def read(self, name: str) -> LayerFactors:
        """The factors of the layer `name`, in their stored dtype (float64 if they are products).

        Raises:
            CheckpointError: a value is not finite.
        """
        tensors = {factor: self._tensor(key) for factor, key in self._keys[name].items()}
        A = tensors["A"]
        rank = A.shape[0]
        if self.kind == "FACTOREDLORA":
            from braidlora.adapters.factored_lora import to_plain_lora

            parts = {factor: tensor.double() for factor, tensor in tensors.items()}
            plain_A, plain_B = to_plain_lora(*(parts[factor] for factor in _NEEDED["FACTOREDLORA"]))
            return LayerFactors([plain_A], [plain_B], min(rank, plain_A.shape[0]), self._scaling(name, rank))
        r = rank // self._stacked[0]
        return LayerFactors(list(A.split(r)), list(tensors["B"].split(r, dim=1)), r, self._scaling(name, r))

    @property
    def _stacked(self) -> tuple[int, int]:
        """How many blocks of r rows A has, and how many blocks of r columns B has."""
        return self.scheme.blocks(self.experts)

    def _is_stacked(self, name: str) -> bool:
        """Whether this is a parameter of stacked experts (many layers in one tensor), which is left out."""
        targets = self.config.get("target_parameters") or []
        if self.kind == "LORA":  # named by the module, with a wrapper around it for every further parameter
            owners = {target.rpartition(".")[0] for target in targets} - {""}
            return bool(targets) and (
                name.endswith((".base_layer", ".experts"))
                or f"{name}.base_layer" in self._keys
                or any(name.endswith(f".{owner}") for owner in owners)
            )
        if not any(f".{name}".endswith(f".{target}") for target in targets) or "A" not in self._keys[name]:
            return False
        return self._shape(name, "A")[0] > self._setting("r", "rank_pattern", name) * self._stacked[0]

    def _tensor(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.folder}: {key} contains NaN or infinity; use an older checkpoint.")
        return tensor

    def _shape(self, name: str, factor: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self._keys[name][factor]).get_shape())

    def _scaling(self, name: str, rank: int) -> float | None:
        if self.config.get("use_dora"):
            return None
        alpha = self._setting("lora_alpha", "alpha_pattern", name)
        return float(lora_scaling(alpha, rank, bool(self.config.get("use_rslora"))))

    def _setting(self, key: str, patterns: str, name: str) -> Any:
        """A setting of one layer: its own in the patterns, or that of all layers."""
        pattern = self.config.get(patterns)
        if not pattern:
            return self.config[key]
        from braidlora.adapters._peft_compat import get_pattern_key

        return pattern.get(get_pattern_key(pattern, name), self.config[key])

    def _check(self) -> None:
        if not self._keys:
            raise CheckpointError(
                f"{self.folder}: it has no A and B of linear layers, so there is nothing to analyze."
            )
        problems = [
            name
            for name, allowed in (
                ("lora_alpha", isinstance(self.config.get("lora_alpha"), int | float)),
                ("num_experts", self.kind != "BRAIDLORA" or _is_count(self.config.get("num_experts"))),
                ("share", self.kind != "BRAIDLORA" or str(self.config.get("share")) in SCHEMES),
            )
            if not allowed
        ]
        if problems:
            given = ", ".join(f"{name}: {self.config.get(name)!r}" for name in problems)
            raise CheckpointError(f"{self.folder / ADAPTER_CONFIG}: damaged: it has {given}.")
        needed = _NEEDED[self.kind]
        for name, keys in self._keys.items():
            if missing := [factor for factor in needed if factor not in keys]:
                raise CheckpointError(
                    f"{self.folder}: {name} has no {', '.join(missing)}; the adapter is incomplete."
                )
            shapes = {factor: self._shape(name, factor) for factor in needed}
            if not self._fits(shapes):
                listed = ", ".join(f"{factor} {shape}" for factor, shape in shapes.items())
                share = self.scheme.share
                experts = f" (share {share!r}, {self.experts} experts)" if share else ""
                raise CheckpointError(
                    f"{self.folder}: {name} has {listed}: not a linear layer, or another {ADAPTER_CONFIG}{experts}. "
                    "Only adapters of linear layers can be analyzed."
                )

    def _fits(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        if any(len(shape) != 2 for shape in shapes.values()):
            return False
        if self.kind == "FACTOREDLORA":
            (r, k), (d, m) = shapes["A"], shapes["base"]
            return shapes == {"A": (r, k), "M": (m, r), "B1": (r, m), "B2": (d, r), "base": (d, m)}
        blocks_A, blocks_B = self._stacked
        r, rest = divmod(shapes["A"][0], blocks_A)
        return rest == 0 and shapes["B"][1] == r * blocks_B


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1
