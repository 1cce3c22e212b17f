"""Tiny mixture-of-experts models, and a reference for their experts that shares no code with the product."""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from braidlora import MultiLoraConfig
from braidlora.adapters import MultiLoraParameter

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.tensor([[5, 9, 33, 7, 21, 60], [8, 8, 2, 40, 11, 3]])
_COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtral(**settings):
    return _model(
        "Mixtral", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}, settings
    )


def qwen3_moe(**settings):
    sizes = {"moe_intermediate_size": 24, "intermediate_size": 40, "num_experts": 5, "num_experts_per_tok": 2}
    return _model("Qwen3Moe", sizes | {"head_dim": 8}, settings)


def gpt_oss(**settings):
    sizes = {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return _model("GptOss", sizes, settings)


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def _model(name, sizes, settings):
    implementation = settings.pop("implementation", "eager")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_COMMON, **sizes, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    # The biases of gpt-oss start at zero, where a test would not see them, and its weights are too small to clamp.
    for parameter_name, parameter in model.named_parameters():
        if "experts" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.4)
    model.set_experts_implementation(implementation)
    return model.eval()


def experts_of(model, layer=0):
    return model.get_submodule(f"model.layers.{layer}.mlp.experts")


def config(**settings):
    """A configuration whose B is drawn too, so that the adapter acts from the start."""
    defaults = {
        "r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS,
        "task_type": "CAUSAL_LM", "init_weights": False,
    }  # fmt: skip
    return MultiLoraConfig(**{**defaults, **settings})


def adapt(base, **settings):
    torch.manual_seed(1)
    return peft.get_peft_model(base, config(**settings))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def parts(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, MultiLoraParameter)}


class AnySettings:
    """Small values for whatever an experts class asks its configuration for."""

    def __init__(self, implementation: str = "eager") -> None:
        self._experts_implementation = implementation

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "moe_latent_size":
            return None
        for part, value in (
            ("act", "silu"), ("limit", 7.0), ("alpha", 1.7), ("eps", 1e-6), ("hidden_size", 16), ("size", 24),
            ("dim", 24), ("per", 2) if "_per_" in name else ("expert", 4),
        ):  # fmt: skip
            if part in name:
                return value
        return 2


def reference_experts(
    kind: str, weights: dict[str, Tensor], adapters: dict[str, dict], x: Tensor, index, routing
) -> Tensor:
    """One token, one expert, one matrix at a time.

    Args:
        kind: a key of MODELS.
        weights: the experts' parameters, as the model stores them.
        adapters: by parameter name: A (E, N or 1, r, k), router (E, N, k) or None, B (E, N or 1, d, r), scaling.
        x: (T, k). index, routing: (T, top_k).
    """
    transposed = kind == "gpt_oss"

    def project(name: str, e: int, v: Tensor) -> Tensor:
        W = weights[name][e].T if transposed else weights[name][e]
        y = W @ v
        if f"{name}_bias" in weights:
            y = y + weights[f"{name}_bias"][e]
        if name in adapters:
            a = adapters[name]
            A, B = a["A"][e], a["B"][e]
            N = max(len(A), len(B))
            w = torch.ones(1, dtype=v.dtype) if a["router"] is None else torch.softmax(a["router"][e] @ v, 0)
            for i in range(N):
                y = y + a["scaling"] * w[i] * (B[i % len(B)] @ (A[i % len(A)] @ v))
        return y

    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[0])
        for slot in range(index.shape[1]):
            e = int(index[t, slot])
            z = project("gate_up_proj", e, x[t])
            if transposed:
                gate, up = z[0::2].clamp(max=7.0), z[1::2].clamp(-7.0, 7.0)
                hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                half = len(z) // 2
                hidden = F.silu(z[:half]) * z[half:]
            total = total + routing[t, slot] * project("down_proj", e, hidden)
        rows.append(total)
    return torch.stack(rows)


def adapter_blocks(part, name: str = "default") -> dict:
    """The factors of a `MultiLoraParameter`, cut up as its docstring says; views, so that gradients reach them."""
    E, gate = part.blocks, part.gate[name]
    A, B = part.braidlora_A[name].weight, part.braidlora_B[name].weight
    n_A = 1 if gate.share == "A" else gate.num_experts
    n_B = 1 if gate.share == "B" else gate.num_experts
    router = None
    if gate.num_experts > 1:
        router = part.braidlora_router[name].weight.reshape(E, gate.num_experts, -1)
    return {
        "A": A.reshape(E, n_A, gate.r, -1),
        "router": router,
        # Column ((e · n_B) + i) · r + j is rank j of expert i of base expert e.
        "B": B.reshape(len(B), E, n_B, gate.r).permute(1, 2, 0, 3),
        "scaling": part.scaling[name],
    }
