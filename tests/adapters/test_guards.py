"""Which modules an adapter fits, and which are refused or named in a warning, for the kinds that outsiders bring."""

from __future__ import annotations

import re
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from braidlora import MultiLoraConfig
from braidlora.adapters import FactoredLoraConfig
from braidlora.adapters._guards import bypassed_by, linear_problem
from braidlora.errors import ConfigError

CONFIGS = [MultiLoraConfig, FactoredLoraConfig]


class Plain(nn.Module):
    """A linear layer of its own making."""

    def __init__(self, k: int = 6, d: int = 5) -> None:
        super().__init__()
        self.in_features, self.out_features = k, d
        self.weight = nn.Parameter(torch.randn(d, k))
        self.bias = nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Rectified(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Saturating(Plain):
    """Nearly linear for small inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e3 * torch.tanh(super().forward(x) / 1e3)


class Normalized(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(super().forward(x), (self.out_features,))


class Counted(Rectified):
    """Holds integers, but far fewer than its weight has values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))


class Masked(Rectified):
    """Holds a mask of its weight's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(5, 6, dtype=torch.bool))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 5
        self.table = nn.Embedding(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class WrongWidth(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)[..., :2]


class Packed(nn.Module):
    """Four bits a value, as GPTQ lays them out; computes nothing here."""

    def __init__(self, k: int = 64, d: int = 32) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = k, d
        self.register_buffer("qweight", torch.zeros(k // 8, d, dtype=torch.int32))


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 4),
        nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4),
        Plain(),
        Plain().bfloat16(),
        Packed(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_linear_layers_are_taken(module):
    assert linear_problem(module) is None


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Rectified(), "not proportional"),
        (Rectified().bfloat16(), "not proportional"),
        (Saturating(), "not proportional"),
        (Normalized(), "not proportional"),
        (Counted(), "not proportional"),
        (Masked(), "not proportional"),
        (Lookup(), "raises"),
        (WrongWidth(), r"does not return one of shape \(4, 5\)"),
        (Plain().to("meta"), "meta device"),
        (nn.Bilinear(4, 4, 4), "is a Bilinear"),
        (nn.Embedding(4, 4), "is a Embedding"),
        (nn.LSTM(4, 4), "is a LSTM"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_impostors_are_refused(module, reason):
    problem = linear_problem(module)
    assert problem is not None
    assert type(module).__name__ in problem
    assert re.search(reason, problem)


def test_trying_a_module_out_leaves_it_as_it_was():
    torch.manual_seed(0)
    module = nn.Sequential(Plain(), nn.Dropout())
    module.in_features, module.out_features = 6, 5
    module[1].eval()
    state, random = {n: t.clone() for n, t in module.state_dict().items()}, torch.random.get_rng_state()
    assert linear_problem(module) is None
    assert module.training
    assert not module[1].training
    assert all(torch.equal(t, state[n]) for n, t in module.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_an_impostor_is_refused_before_anything_is_replaced(config):
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "second": Rectified()})
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=r"'second', which is a Rectified, not a linear layer"):
        peft.get_peft_model(model, config(target_modules=["first", "second"]))
    assert dict(model.named_modules()) == before


def test_a_layer_of_ones_own_is_adapted():
    model = nn.ModuleDict({"first": Plain()})
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Unsupported layer type"
        )  # PEFT's, which falls back to the features
        peft_model = peft.get_peft_model(model, MultiLoraConfig(target_modules=["first"], init_weights=False))
    layer = peft_model.base_model.model["first"]
    x = torch.randn(3, 6)
    assert layer(x).shape == (3, 5)
    assert not torch.equal(layer(x), layer.base_layer(x))


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.parametrize("config", CONFIGS)
def test_all_linear_leaves_attentions_own_layer_out_and_says_so(config):
    with pytest.warns(UserWarning, match=r"leaves out attention\.out_proj: nn\.MultiheadAttention reads"):
        model = peft.get_peft_model(WithAttention(), config(target_modules="all-linear", init_weights=False))
    assert model.base_model.targeted_module_names == ["head"]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        adapted = model(x)
        with model.disable_adapter():
            assert not torch.allclose(adapted, model(x))


@pytest.mark.parametrize("config", CONFIGS)
def test_attentions_own_layer_is_refused_by_name(config):
    model = WithAttention()
    with pytest.raises(
        ConfigError, match=r"'attention\.out_proj', which belongs to an nn\.MultiheadAttention"
    ):
        peft.get_peft_model(model, config(target_modules=["out_proj", "head"]))
    assert type(model.head) is nn.Linear


def test_all_linear_with_nothing_left_is_an_error():
    with pytest.warns(UserWarning, match="leaves out"), pytest.raises(ConfigError, match="no linear layer"):
        peft.get_peft_model(
            nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), MultiLoraConfig(target_modules="all-linear")
        )


def _tiny_mamba(kind: str):
    common = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}
    if kind == "mamba2":
        return transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(
                **common, num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=16
            )
        )
    if kind == "falcon_mamba":
        return transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**common, state_size=8))
    return transformers.MambaForCausalLM(transformers.MambaConfig(**common, state_size=8))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"]])
def test_mambas_output_projection_is_refused_as_for_lora(kind, config, targets):
    model = _tiny_mamba(kind)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    model = _tiny_mamba(kind)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=rf"'out_proj', which the fused kernels of {kind} models read"):
        peft.get_peft_model(model, config(target_modules=targets))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_mamba_is_adapted_without_its_output_projection():
    config = MultiLoraConfig(target_modules="all-linear", exclude_modules=["out_proj"])
    model = peft.get_peft_model(_tiny_mamba("mamba2"), config)
    assert [name.rpartition(".")[2] for name in model.base_model.targeted_module_names] == ["in_proj"]


def test_weights_that_kernels_read_are_named():
    """Mamba's x_proj and dt_proj go into the fused kernel too; PEFT's guard does not know them."""
    config = MultiLoraConfig(target_modules=["in_proj", "x_proj", "dt_proj"])
    with pytest.warns(UserWarning, match="MambaMixer") as seen:
        peft.get_peft_model(_tiny_mamba("mamba"), config)
    text = " ".join(str(warning.message) for warning in seen)
    assert "x_proj" in text
    assert "dt_proj" in text
    assert "in_proj" not in text


def test_the_encoders_fast_path_is_named_and_can_be_switched_off():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    config = MultiLoraConfig(target_modules=["linear1", "linear2"], init_weights=False)
    with pytest.warns(UserWarning, match=r"set_fastpath_enabled\(False\)") as seen:
        model = peft.get_peft_model(encoder, config).eval()
    assert "layers.*.linear1 (2), layers.*.linear2 (2)" in " ".join(str(w.message) for w in seen)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            adapted = model(x)
            with model.disable_adapter():
                plain = model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert torch.allclose(model(x), plain, atol=1e-5), (
            "the warning is about this; without it, drop the warning"
        )
    assert not torch.allclose(adapted, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (lambda: nn.TransformerDecoderLayer(16, 2, 32), ["linear1", "linear2"]),
        (
            lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=96,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                )
            ),
            "all-linear",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
            ),
            "all-linear",
        ),
    ],
    ids=["decoder", "llama", "t5"],
)
def test_models_that_call_their_layers_are_left_in_peace(make, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft.get_peft_model(make(), MultiLoraConfig(target_modules=targets))


class Tying(nn.Module):
    """Reads weights where no forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 4), nn.Linear(4, 4)

    def tie_weights(self) -> None:
        self.embed.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).to(self.head.weight.dtype))


def test_tying_and_metadata_are_no_reads():
    assert bypassed_by(Tying(), "head") is None


def test_a_path_that_the_settings_rule_out_is_no_read():
    """Bloom emulates tensor parallelism with slices of the weight, if asked to."""
    settings = {"hidden_size": 16, "n_head": 2, "pretraining_tp": 2}
    make = transformers.models.bloom.modeling_bloom.BloomAttention
    usual = make(transformers.BloomConfig(**settings), layer_idx=0)
    exact = make(transformers.BloomConfig(**settings, slow_but_exact=True), layer_idx=0)
    assert bypassed_by(usual, "dense") is None
    assert bypassed_by(exact, "dense") == "BloomAttention.forward"


def test_known_readers():
    wavlm = transformers.models.wavlm.modeling_wavlm.WavLMAttention(16, 2)
    assert bypassed_by(wavlm, "q_proj") == "WavLMAttention.torch_multi_head_self_attention"
    assert bypassed_by(nn.TransformerEncoderLayer(16, 2), "linear1") == "TransformerEncoderLayer.forward"
    assert bypassed_by(nn.TransformerDecoderLayer(16, 2), "linear1") is None
