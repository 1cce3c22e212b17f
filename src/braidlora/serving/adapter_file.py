"""What a server needs to know of an adapter folder, from its configuration and the header of its weights.

Imports neither torch nor PEFT: the plugin reads adapters inside vLLM's own processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from braidlora.adapters.sharing import SCHEMES, lora_scaling
from braidlora.errors import CheckpointError, ConfigError
from braidlora.json_text import loads
from braidlora.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS

MULTI, FACTORED, PLAIN = "BRAIDLORA", "FACTOREDLORA", "LORA"
FACTORS = {
    MULTI: ("braidlora_A", "braidlora_router", "braidlora_B"),
    FACTORED: tuple(f"factoredlora_{name}" for name in ("A", "M", "B1", "B2", "base")),
    PLAIN: ("lora_A", "lora_B"),
}
ROOT = "base_model.model."  # precedes a module's name in PEFT's state dicts
# The values that vLLM allows for --max-lora-rank (vllm.config.lora.MaxLoRARanks).
ALLOWED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Settings of PEFT's LoRA that make it more than W0 + s·B A, or store more tensors; vLLM loads none of them.
_VARIANTS = (
    "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "arrow_config",
    "velora_config", "monteclora_config",
)  # fmt: skip
_MOST_HEADER = 100 * 2**20  # bytes; the limit of the safetensors library

Shapes = dict[str, dict[str, tuple[int, ...]]]  # by module, by factor


class AdapterFile(BaseModel):
    """The fields of adapter_config.json that a server computes with; the others are in `model_extra`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    share: str = "B"
    gate: str = "token"
    task_map: bool = False
    num_experts: int = Field(1, ge=1)
    r: int = Field(8, ge=1)
    r_intermediate: int | None = None
    lora_alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    router_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    task_type: str | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: Any = None

    @property
    def ours(self) -> bool:
        """Whether this is an adapter of braidlora rather than PEFT's own."""
        return self.peft_type in (MULTI, FACTORED)

    @property
    def routed(self) -> bool:
        """Whether a router weighs experts per token."""
        return self.peft_type == MULTI and self.num_experts > 1 and self.gate == "token"

    @property
    def by_task(self) -> bool:
        """Whether it is another LoRA for each of its tasks, which a server does not know."""
        gated = self.gate not in ("token", "uniform") and self.num_experts > 1
        return self.peft_type == MULTI and (gated or self.task_map)

    @property
    def uniform(self) -> bool:
        """Whether all experts have the same weight, so that it is a plain LoRA."""
        return self.peft_type == MULTI and self.num_experts > 1 and self.gate == "uniform"

    def scaling_of(self, module: str) -> float:
        """s of a module, after `rank_pattern` and `alpha_pattern`.

        Args:
            module: its full name in the base model.
        """
        r = _by_pattern(self.rank_pattern, module, self.r)
        return lora_scaling(_by_pattern(self.alpha_pattern, module, self.lora_alpha), r, self.use_rslora)


@dataclass(frozen=True)
class Layout:
    """How the columns between an adapter's shrink and expand matrices are used in a server.

    Attributes:
        num_experts: N; 1 has no router.
        r: columns of each expert, the largest rank of the adapter's modules.
    """

    num_experts: int
    r: int

    @property
    def columns(self) -> int:
        """The rank that a server needs: N blocks of r columns, and one for each router logit."""
        return self.r if self.num_experts == 1 else self.num_experts * (self.r + 1)


def read_adapter_file(folder: Path) -> AdapterFile:
    """Parse adapter_config.json.

    Raises:
        CheckpointError: it is missing, damaged or not valid.
    """
    path = folder / ADAPTER_CONFIG
    try:
        return parse_adapter_file(path.read_bytes(), path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG}, so this is not an adapter folder.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None


def parse_adapter_file(content: bytes, path: Path) -> AdapterFile:
    """Parse the content of adapter_config.json; `path` is for messages. Raises as `read_adapter_file`."""
    try:
        values = loads(content)
        if isinstance(values, dict) and values.get("peft_type") not in FACTORS:
            # A field of PEFT's other types may have the name of one of ours and another meaning (OFT's r may be 0).
            values = {name: values[name] for name in ("peft_type", "modules_to_save") if name in values}
        found = AdapterFile.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}"
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise CheckpointError(f"{path}: not valid: {'; '.join(problems[:3])}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}.") from None
    if found.peft_type == MULTI and found.share not in SCHEMES:
        raise CheckpointError(
            f"{path}: share is {found.share!r}; this version of braidlora knows {', '.join(map(repr, SCHEMES))}."
        )
    return found


def read_shapes(folder: Path, kind: str) -> Shapes:
    """The shape of each factor, by module, from the header of the weights.

    Args:
        kind: the PEFT type, a key of `FACTORS`.

    Raises:
        CheckpointError: the file is missing or damaged, or holds other tensors than such an adapter's.
    """
    path = folder / ADAPTER_WEIGHTS
    shapes: Shapes = {}
    for name, shape in _header(path).items():
        module, factor = split_name(name, kind, path)
        shapes.setdefault(module, {})[factor] = shape
    if not shapes:
        raise CheckpointError(f"{path}: holds no tensors.")
    return shapes


def split_name(name: str, kind: str, path: Path) -> tuple[str, str]:
    """Module and factor of a tensor's name, as in PEFT's state dict.

    Raises:
        CheckpointError: it is not a factor of an adapter of this kind.
    """
    module, _, factor = name.removesuffix(".weight").rpartition(".")
    if not module or factor not in FACTORS[kind] or not name.endswith(".weight"):
        raise CheckpointError(
            f"{path}: unexpected tensor {name}; an adapter of type {kind} that can be served has only "
            f"{', '.join(FACTORS[kind])}."
        )
    return module.removeprefix(ROOT), factor


def layout_of(config: AdapterFile, shapes: Shapes, path: Path) -> Layout:
    """Experts and columns of an adapter whose tensors have these shapes.

    Raises:
        CheckpointError: a factor is missing or has another shape than the configuration says.
    """
    experts = config.num_experts if config.routed else 1
    ranks = {module: _rank(config, module, factors, path) for module, factors in shapes.items()}
    return Layout(experts, max(ranks.values()))


def _rank(config: AdapterFile, module: str, factors: Mapping[str, tuple[int, ...]], path: Path) -> int:
    """The rank of one module; of a factored LoRA, that of the plain LoRA that it is."""
    needed = set(FACTORS[config.peft_type]) - ({"braidlora_router"} if not config.routed else set())
    if set(factors) != needed:
        raise CheckpointError(
            f"{path}: {module} has {', '.join(sorted(factors))}; expected {', '.join(sorted(needed))}."
        )
    if any(len(shape) != 2 for shape in factors.values()):
        raise CheckpointError(f"{path}: {module} has a factor that is not a matrix.")
    served = 0
    if config.peft_type == FACTORED:
        (r, k), (m, _) = factors["factoredlora_A"], factors["factoredlora_M"]
        d = factors["factoredlora_base"][0]
        expected = dict(zip(FACTORS[FACTORED], ((r, k), (m, r), (r, m), (d, r), (d, m)), strict=True))
        rank = m
    elif config.peft_type == MULTI:
        blocks_A, blocks_B = SCHEMES[config.share].blocks(config.num_experts)
        rows, k = factors["braidlora_A"]
        rank, d = rows // blocks_A, factors["braidlora_B"][0]
        expected = {"braidlora_A": (rank * blocks_A, k), "braidlora_B": (d, rank * blocks_B)}
        if config.routed:
            expected["braidlora_router"] = (config.num_experts, k)
        if config.uniform and config.share == "none":
            served = rank * config.num_experts  # the experts side by side
    else:
        rank, k = factors["lora_A"]
        expected = {"lora_A": (rank, k), "lora_B": (factors["lora_B"][0], rank)}
    wrong = [f"{name} is {factors[name]}, expected {shape}" for name, shape in expected.items()
             if factors[name] != shape]  # fmt: skip
    if wrong or rank < 1:
        raise CheckpointError(f"{path}: {module}: {'; '.join(wrong) or 'has rank 0'}.")
    return served or rank


def refusals(config: AdapterFile) -> list[str]:
    """Why vLLM cannot serve an adapter, as far as its configuration says; empty if it can."""
    found = []
    if config.by_task:
        found.append(
            "it is a different LoRA for each of its tasks, and a server does not know the task; serve an exact "
            "export of each (`braidlora export RUN --static-weights task=NAME`)"
        )
    if config.modules_to_save:
        found.append(
            f"it has trained modules (modules_to_save: {', '.join(config.modules_to_save)}), which vLLM would ignore"
        )
    if config.bias != "none":
        found.append(f"it has trained biases (bias: {config.bias}), which vLLM does not load")
    if config.target_parameters:
        found.append(
            f"it adapts stacked experts (target_parameters: {', '.join(config.target_parameters)}), whose LoRA in vLLM "
            "has no router"
        )
    if config.trainable_token_indices:
        found.append("it has trained token embeddings (trainable_token_indices), which vLLM does not load")
    others = config.model_extra or {}
    if variants := [name for name in _VARIANTS if others.get(name)]:
        found.append(f"it is a variant of LoRA ({', '.join(variants)}) that vLLM does not load")
    return found


def head_refusal(modules: Mapping[str, Any]) -> str | None:
    """Why modules outside the linear layers cannot be served, as a sentence."""
    heads = sorted({name.rpartition(".")[2] for name in modules} & {"lm_head", "embed_tokens"})
    if heads:
        return f"it adapts {' and '.join(heads)}, where vLLM's LoRA has no place for a router"
    return None


def smallest_allowed_rank(columns: int, what: str) -> int:
    """The smallest --max-lora-rank that vLLM allows with room for so many columns.

    Raises:
        ConfigError: there is none.
    """
    for rank in ALLOWED_RANKS:
        if rank >= columns:
            return rank
    raise ConfigError(
        f"{what}: needs rank {columns} in the server, and vLLM allows at most {ALLOWED_RANKS[-1]}. Fix its expert "
        "weights with `braidlora export`, or serve it with --engine transformers."
    )


def describe_columns(layout: Layout) -> str:
    """How many columns an adapter needs, and why."""
    if layout.num_experts == 1:
        return f"rank {layout.r}"
    n, r = layout.num_experts, layout.r
    return f"rank {layout.columns} ({n} experts of rank {r} and {n} router logits: {n}·{r} + {n})"


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that fits the whole name, or its end from a dot on, wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEADER:
                raise ValueError("its header is too long")
            header = loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a mapping")
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; only adapters in safetensors are served.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}.") from None
    if not all(all(isinstance(n, int) and n >= 0 for n in shape) for shape in shapes.values()):
        raise CheckpointError(f"{path}: not a safetensors file: a shape is not made of numbers.")
    return shapes
