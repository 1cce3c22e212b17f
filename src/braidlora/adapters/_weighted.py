"""`add_weighted_adapter`: a new adapter that is a weighted sum of others, as in PEFT's LoRA.

With c_j = weight_j · s_j, the new adapter has scaling 1 and

    "cat"     the ranks concatenated: exactly Σ_j c_j ΔW_j. The number of experts stays; a router must be
              bit-identical in all adapters, or Σ_j c_j ΔW_j(x) would have several routers.
    "svd"     Σ_j c_j ΔW_j formed and truncated to a rank. Only where it is one matrix: without a router. All experts
              of gate="uniform" get the factors of that matrix, which is then their mean.
    "linear"  with one expert PEFT's A = Σ ±√|c_j| A_j, B = Σ √|c_j| B_j, which has cross terms and is not a sum of
              updates. With several only where it is exact: all B's equal (Σ c_j A_j), or all A's.

"ties", "dare" and "magnitude_prune" act on single entries of A and B, which correspond between adapters only if all
started from the same weights; they are not offered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braidlora.adapters import functional
from braidlora.adapters._config import MultiLoraConfig
from braidlora.adapters.sharing import SCHEMES
from braidlora.adapters.task_gates import uniform_weights
from braidlora.errors import ConfigError

Combination = Literal["svd", "linear", "cat"]
_COMBINATIONS = ("svd", "linear", "cat")


class Svd(NamedTuple):
    """How a sum of updates is truncated: the rank, and the arguments of `torch.linalg.svd`."""

    rank: int | None
    clamp: float | None
    full_matrices: bool
    driver: str | None


class WeightedTuner:
    """`add_weighted_adapter` for our tuners."""

    if TYPE_CHECKING:
        model: nn.Module
        peft_config: dict[str, Any]
        tuner_layer_cls: type[Any]
        inject_adapter: Any

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Combination = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add the adapter `adapter_name`, inactive and frozen, as the weighted sum of `adapters`.

        Args:
            adapters, weights: names on this model, and a number for each, possibly negative.
            combination_type: "cat" (exact), "svd" or "linear", see the module's docstring.
            svd_rank: rank of the SVD; by default the largest of the adapters'.
            svd_clamp: quantile at which to clamp the SVD's factors.
            svd_full_matrices, svd_driver: for `torch.linalg.svd`.
            density, majority_sign_method: not supported.

        Raises:
            ConfigError: there is no such sum; nothing is added then.
        """
        if density is not None or majority_sign_method != "total" or combination_type not in _COMBINATIONS:
            raise ConfigError(
                f"combination_type is {combination_type!r}; it must be one of {', '.join(map(repr, _COMBINATIONS))}, "
                "without density and majority_sign_method: pruning and sign votes act on single entries of the factors"
            )
        self._check_weighted(adapters, weights, adapter_name)
        svd = Svd(svd_rank, svd_clamp, svd_full_matrices, svd_driver)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.model.named_modules():
            if not isinstance(layer, self.tuner_layer_cls):
                continue
            present = [
                (adapter, weight * layer.scaling[adapter])
                for adapter, weight in zip(adapters, weights, strict=True)
                if layer.has_adapter(adapter)
            ]
            if present:
                with torch.no_grad():
                    parts[name] = _combined(layer, name, present, combination_type, svd)
        config = self._weighted_config(adapters, parts)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for name, tensors in parts.items():
            layer = self.model.get_submodule(name)
            for part, tensor in tensors.items():
                weight = getattr(layer, part)[adapter_name].weight
                weight.data = _padded(config, part, tensor, weight).to(weight.device).contiguous()

    def _check_weighted(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        problems = []
        if adapter_name in self.peft_config:
            problems.append(
                f"an adapter {adapter_name!r} exists already; delete it first or choose another name"
            )
        if not adapters or len(adapters) != len(weights):
            problems.append(
                f"{len(adapters)} adapters and {len(weights)} weights; give one weight per adapter"
            )
        if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
            problems.append(f"weights are {list(weights)!r}; they must be finite numbers")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            problems.append(
                f"no adapter {', '.join(map(repr, unknown))}; known are {', '.join(map(repr, self.peft_config))}"
            )
        configs = {name: self.peft_config[name] for name in adapters if name not in unknown}
        for name, config in configs.items():
            for setting in ("modules_to_save", "trainable_token_indices", "target_parameters"):
                if getattr(config, setting):
                    problems.append(
                        f"adapter {name!r} has {setting}={getattr(config, setting)!r}, "
                        "which weighted sums do not support"
                    )
            if isinstance(config, MultiLoraConfig) and config.by_task:
                problems.append(
                    f"adapter {name!r} weights its experts by task; export one LoRA per task (braidlora export "
                    "--static-weights=task=NAME) and sum those"
                )
            if config.bias != "none":
                problems.append(
                    f"adapter {name!r} has bias={config.bias!r}, which weighted sums do not support"
                )
        routed = {
            (config.share, config.num_experts, config.router_temperature, config.gate)
            for config in configs.values()
            if isinstance(config, MultiLoraConfig) and config.num_experts > 1
        }
        plain = any(getattr(config, "num_experts", 1) == 1 for config in configs.values())
        if len(routed) > 1 or (routed and plain):
            listed = "; ".join(
                f"{name!r}: share={config.share!r}, num_experts={config.num_experts}, "
                f"router_temperature={config.router_temperature}, gate={config.gate!r}"
                for name, config in configs.items()
            )
            problems.append(
                f"the adapters are routed differently ({listed}); adapters that are summed must agree"
            )
        if problems:
            raise ConfigError("add_weighted_adapter: " + "; ".join(problems))

    def _weighted_config(self, adapters: Sequence[str], parts: dict[str, dict[str, Tensor]]) -> Any:
        configs = [self.peft_config[name] for name in adapters]
        choice = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        first = configs[0]
        changes: dict[str, Any] = {}
        if any(getattr(config, field) != getattr(first, field) for config in configs for field in choice):
            exact = "|".join(re.escape(name) for name in sorted(parts))
            changes = {**dict.fromkeys(choice), "target_modules": f"^({exact})$"}
        ranks = [_ranks(first, tensors) for tensors in parts.values()]
        r = max(rank for rank, _ in ranks)
        if not isinstance(first, MultiLoraConfig):
            changes["r_intermediate"] = max(m for _, m in ranks)
        return replace(
            first, r=r, lora_alpha=r, use_rslora=False, rank_pattern={}, alpha_pattern={}, inference_mode=False,
            **changes,
        )  # fmt: skip


def _combined(
    layer: Any, where: str, present: list[tuple[str, float]], how: Combination, svd: Svd
) -> dict[str, Tensor]:
    """The new adapter's tensors in one layer, by factor; ranks not yet padded."""
    if "factoredlora_A" in layer.adapter_layer_names:
        return _combined_factored(layer, present, how, svd)
    names = [name for name, _ in present]
    gate = layer.gate[names[0]]
    linears = [layer.linears(name) for name in names]
    router = linears[0][1]  # None with one expert, and with gate="uniform"
    if router is not None:
        for name, (_, other, _) in zip(names, linears, strict=True):
            if not torch.equal(other.weight, router.weight):
                raise ConfigError(
                    f"add_weighted_adapter: the routers of {names[0]!r} and {name!r} differ at {where}, and a sum of "
                    "two routed adapters is not an adapter with one router. Run both (model.base_model.set_adapter "
                    "takes a list), or fix their expert weights with `braidlora export` and sum the exported LoRAs"
                )
    # Blocks: A (experts or 1, r, k), B (d, experts or 1, r).
    As = [A.weight.unflatten(0, (-1, layer.r[name])) for name, (A, _, _) in zip(names, linears, strict=True)]
    Bs = [B.weight.unflatten(1, (-1, layer.r[name])) for name, (_, _, B) in zip(names, linears, strict=True)]
    factors = [factor for _, factor in present]
    if how == "cat":
        A = torch.cat([factor * block for factor, block in zip(factors, As, strict=True)], 1)
        B = torch.cat(Bs, 2)
    elif how == "svd":
        if router is not None:
            raise ConfigError(
                f"add_weighted_adapter: {names[0]!r} has a router, so its update is not a matrix to decompose; use "
                "combination_type='cat', which is exact"
            )
        w_N = uniform_weights(gate.num_experts, As[0])
        plain = [functional.static_factors(A.weight, B.weight, w_N, gate.share) for A, _, B in linears]
        A_rk, B_dr = _truncated(
            sum(f * (B @ A) for f, (A, B) in zip(factors, plain, strict=True)), svd, layer, names
        )
        blocks_A, blocks_B = SCHEMES[gate.share].blocks(gate.num_experts)
        A = A_rk.to(As[0].dtype).expand(blocks_A, -1, -1)
        B = B_dr.to(Bs[0].dtype)[:, None].expand(-1, blocks_B, -1)
    else:
        A, B = _linear(As, Bs, factors, names, where, gate.num_experts > 1)
    tensors = {"braidlora_A": A.flatten(0, 1), "braidlora_B": B.flatten(1)}
    return tensors if router is None else {**tensors, "braidlora_router": router.weight.clone()}


def _linear(
    As: list[Tensor], Bs: list[Tensor], factors: list[float], names: list[str], where: str, several: bool
) -> tuple[Tensor, Tensor]:
    if len({A.shape for A in As}) > 1:
        raise ConfigError(
            f"add_weighted_adapter: {', '.join(map(repr, names))} have different ranks at {where}; combination_type="
            "'linear' adds factors of equal shape, use 'cat' or 'svd'"
        )
    if not several:
        roots = [math.sqrt(abs(factor)) for factor in factors]
        A = sum(math.copysign(root, f) * A for root, f, A in zip(roots, factors, As, strict=True))
        return A, sum(root * B for root, B in zip(roots, Bs, strict=True))  # type: ignore[return-value]
    if all(torch.equal(B, Bs[0]) for B in Bs):
        return sum(f * A for f, A in zip(factors, As, strict=True)), Bs[0].clone()  # type: ignore[return-value]
    if all(torch.equal(A, As[0]) for A in As):
        return As[0].clone(), sum(f * B for f, B in zip(factors, Bs, strict=True))  # type: ignore[return-value]
    raise ConfigError(
        f"add_weighted_adapter: {', '.join(map(repr, names))} share neither A nor B at {where}: adding both "
        "factors would add cross terms between adapters; use combination_type='cat', which is exact"
    )


def _combined_factored(
    layer: Any, present: list[tuple[str, float]], how: Combination, svd: Svd
) -> dict[str, Tensor]:
    if how == "linear":
        raise ConfigError(
            "add_weighted_adapter: adding the five factors of factored LoRAs does not add their updates; "
            "use combination_type='cat', which is exact, or 'svd'"
        )
    names = [name for name, _ in present]
    all_factors = [tuple(linear.weight for linear in layer.linears(name)) for name in names]
    if how == "svd":
        deltas = []
        for (_, c), (A, M, B1, B2, base) in zip(present, all_factors, strict=True):
            deltas.append(c * ((base + B2 @ B1) @ (M @ A)))
        A, B2 = _truncated(sum(deltas), svd, layer, names)
        one = torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        values = (A, one, one.clone(), B2, torch.zeros_like(B2))
    else:
        As, Ms, B1s, B2s, bases = zip(*all_factors, strict=True)
        cs = [c for _, c in present]
        values = (
            torch.cat(As), torch.block_diag(*Ms), torch.block_diag(*B1s),
            torch.cat([c * B2 for c, B2 in zip(cs, B2s, strict=True)], 1),
            torch.cat([c * base for c, base in zip(cs, bases, strict=True)], 1),
        )  # fmt: skip
    dtype = all_factors[0][0].dtype
    return {
        f"factoredlora_{name}": value.to(dtype)
        for name, value in zip(("A", "M", "B1", "B2", "base"), values, strict=True)
    }


def _truncated(delta_dk: Any, svd: Svd, layer: Any, names: list[str]) -> tuple[Tensor, Tensor]:
    """A (r, k) and B (d, r) of the best approximation of rank r, at most min(d, k)."""
    rank = svd.rank or max(layer.r[name] for name in names)
    delta_dk = delta_dk.to(torch.promote_types(delta_dk.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(delta_dk, full_matrices=svd.full_matrices, driver=svd.driver)
    B_dr, A_rk = U[:, :rank] * S[:rank], Vh[:rank]
    B_dr = B_dr[:, : S.shape[0]]
    A_rk = A_rk[: S.shape[0]]
    if svd.clamp is not None:
        high = torch.quantile(torch.cat([B_dr.flatten(), A_rk.flatten()]), svd.clamp)
        B_dr, A_rk = B_dr.clamp(-high, high), A_rk.clamp(-high, high)
    return A_rk, B_dr


def _ranks(config: Any, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """(r, m) of one layer's tensors; m is 0 for a multi-LoRA."""
    if isinstance(config, MultiLoraConfig):
        blocks_A, _ = SCHEMES[config.share].blocks(config.num_experts)
        return tensors["braidlora_A"].shape[0] // blocks_A, 0
    return tensors["factoredlora_A"].shape[0], tensors["factoredlora_M"].shape[0]


def _padded(config: Any, part: str, tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` padded with zeros to the shape of `like`, block by block if it holds several experts."""
    if not isinstance(config, MultiLoraConfig):
        rows, columns = (like.shape[i] - tensor.shape[i] for i in (0, 1))
        return F.pad(tensor, (0, columns, 0, rows))
    blocks_A, blocks_B = SCHEMES[config.share].blocks(config.num_experts)
    if part == "braidlora_A":
        split = tensor.unflatten(0, (blocks_A, -1))
        return F.pad(split, (0, 0, 0, like.shape[0] // blocks_A - split.shape[1])).flatten(0, 1)
    if part == "braidlora_B":
        split = tensor.unflatten(1, (blocks_B, -1))
        return F.pad(split, (0, like.shape[1] // blocks_B - split.shape[2])).flatten(1)
    return tensor
