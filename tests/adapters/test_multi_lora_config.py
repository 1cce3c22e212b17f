"""`MultiLoraConfig` and the PEFT type: what is accepted, what is refused and how it is said."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import peft
import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import PeftType
from torch import nn

import braidlora
from braidlora import FactoredLoraConfig, MultiLoraConfig, MultiLoraModel
from braidlora.adapters._registration import NAME, PREFIX, extend_peft_type, register
from braidlora.errors import ConfigError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 5)


def adapt(**settings):
    return get_peft_model(Model(), MultiLoraConfig(**settings)).base_model


class TestType:
    def test_behaves_like_a_member_of_the_enumeration(self):
        member = PeftType("BRAIDLORA")
        assert member is PeftType.BRAIDLORA is PeftType["BRAIDLORA"] is extend_peft_type("BRAIDLORA")
        assert member in list(PeftType)
        assert list(PeftType).count("BRAIDLORA") == 1
        assert "BRAIDLORA" in PeftType.__members__
        assert member.value == member.name == "BRAIDLORA"
        assert member == "BRAIDLORA"
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy(member) is member
        assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "BRAIDLORA"}
        assert isinstance(hash(member), int)

    def test_registering_again_changes_nothing(self):
        before = list(PeftType), dict(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
        register(NAME, PREFIX, MultiLoraConfig, MultiLoraModel)
        assert (list(PeftType), dict(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)) == before

    @pytest.mark.parametrize(
        "imports",
        [
            "import braidlora.adapters",
            "import braidlora.adapters.multi_lora",
            "from braidlora.adapters import _layer, scaled_layers",
            "from braidlora.adapters import _peft_compat; _peft_compat.BaseTuner",
        ],
    )
    def test_is_registered_in_every_order_of_imports(self, imports):
        check = "from peft.mapping import *; assert 'BRAIDLORA' in PEFT_TYPE_TO_TUNER_MAPPING"
        subprocess.run([sys.executable, "-c", f"{imports}\n{check}"], check=True)


class TestValues:
    def test_defaults_are_the_papers_and_dropout_is_off_as_in_lora(self):
        config = MultiLoraConfig()
        assert (config.share, config.num_experts, config.r) == ("B", 3, 8)
        assert (config.lora_alpha, config.lora_dropout) == (16, LoraConfig().lora_dropout) == (16, 0.0)
        assert FactoredLoraConfig().lora_dropout == 0.0
        assert config.fused
        assert config.peft_type == "BRAIDLORA"

    @pytest.mark.parametrize(("make", "share"), [("alora", "B"), ("hydralora", "A"), ("moelora", "none")])
    def test_named_methods(self, make, share):
        config = getattr(MultiLoraConfig, make)(target_modules=["q_proj"], r=4)
        assert (config.share, config.num_experts, config.r, config.lora_alpha) == (share, 3, 4, 16)
        assert config.lora_dropout == 0.05
        assert getattr(MultiLoraConfig, make)(lora_dropout=0.0).lora_dropout == 0.0

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("share", "C", "'B' (ALoRA"),
            ("num_experts", 0, "at least 1"),
            ("num_experts", 2.5, "integer"),
            ("r", 0, "at least 1"),
            ("r", True, "integer"),
            ("lora_alpha", 0, "above 0"),
            ("lora_alpha", -1.0, "above 0"),
            ("lora_alpha", float("nan"), "finite"),
            ("lora_alpha", float("inf"), "finite"),
            ("lora_dropout", 1.0, "[0, 1)"),
            ("lora_dropout", -0.1, "[0, 1)"),
            ("lora_dropout", float("nan"), "[0, 1)"),
            ("lora_dropout", "0.1", "[0, 1)"),
            ("router_temperature", 0.0, "above 0"),
            ("balance_loss", -1.0, "0 (off) or more"),
            ("fused", "no", "true or false"),
            ("balance_loss", float("inf"), "finite"),
            ("dropout_mask", "both", "'shared' or 'per_expert'"),
            ("init_weights", "same", "'gaussian' or 'identical'"),
            ("bias", "some", "'none', 'all', 'braidlora_only'"),
            ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] is 0"),
            ("alpha_pattern", {"q_proj": float("nan")}, "alpha_pattern['q_proj'] is nan"),
            ("rank_pattern", {"q_(": 2}, "regular expression"),
            ("target_modules", [], "target_modules is empty"),
            ("target_modules", "*.q", "regular expression"),
            ("layers_pattern", "layers", "layers_to_transform"),
            ("target_parameters", "experts.w", "must be a list of parameter names"),
            ("ensure_weight_tying", True, "not supported"),
            ("task_type", "CAUSAL", "task_type"),
        ],
    )
    def test_out_of_range(self, field, value, said):
        with pytest.raises(ConfigError) as error:
            MultiLoraConfig(**{field: value})
        assert field.split("[")[0] in str(error.value)
        assert said in str(error.value)
        assert error.value.exit_code == 2

    def test_all_problems_at_once(self):
        with pytest.raises(ConfigError, match=r"r is 0.*lora_alpha is -1.*lora_dropout is 2"):
            MultiLoraConfig(r=0, lora_alpha=-1, lora_dropout=2)

    def test_a_setting_without_effect_is_warned_of(self):
        with pytest.warns(UserWarning, match="only one A"):
            MultiLoraConfig(share="A", dropout_mask="per_expert")

    def test_round_trip_through_json(self, tmp_path):
        config = MultiLoraConfig(
            share="none",
            num_experts=5,
            target_modules=["q_proj"],
            rank_pattern={"q_proj": 2},
            balance_loss=0.1,
        )
        config.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert type(loaded) is MultiLoraConfig
        assert loaded.to_dict() == config.to_dict()
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BRAIDLORA"

    def test_a_file_of_an_older_version_loads(self, tmp_path):
        MultiLoraConfig(target_modules=["q_proj"], fused=False, lora_dropout=0.05).save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).fused is False
        path = tmp_path / "adapter_config.json"
        written = json.loads(path.read_text())
        del written["fused"]
        path.write_text(json.dumps(written))
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert (loaded.fused, loaded.lora_dropout) == (True, 0.05)

    def test_a_damaged_file_is_refused(self, tmp_path):
        MultiLoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(path.read_text().replace('"r": 8', '"r": -8'))
        with pytest.raises(ConfigError, match="r is -8"):
            PeftConfig.from_pretrained(tmp_path)


class TestTargets:
    def test_nothing_matches(self):
        model = Model()
        with pytest.raises(ConfigError, match=r"'qproj'.*not found.*Nearest: q_proj") as error:
            get_peft_model(model, MultiLoraConfig(target_modules=["qproj"]))
        assert error.value.exit_code == 2
        assert type(model.layers[0].q_proj) is nn.Linear

    def test_a_regular_expression_that_matches_nothing(self):
        with pytest.raises(ConfigError, match=r"Linear layers of this model: head, .*q_proj"):
            adapt(target_modules=r".*\.w_q")

    @pytest.mark.parametrize(
        ("target", "said"),
        [
            ("norm", "LayerNorm"),
            ("embed", "Embedding"),
            ("layers.0", "Block"),
            ("out_proj", "MultiheadAttention"),
        ],
    )
    def test_not_a_linear_layer(self, target, said):
        model = Model()
        with pytest.raises(ConfigError, match=rf"{target}.*{said}.*exclude_modules"):
            get_peft_model(model, MultiLoraConfig(target_modules=["q_proj", target]))
        assert type(model.layers[0].q_proj) is nn.Linear, "the model must be left as it was"

    def test_one_of_several_names_matches_nothing(self):
        with pytest.warns(UserWarning, match=r"'vproj' matches no linear layer.*Nearest: v_proj"):
            adapt(target_modules=["q_proj", "vproj"])

    def test_unknown_architecture_without_targets(self):
        with pytest.raises(ConfigError, match=r"specify `target_modules`.*q_proj"):
            adapt()

    def test_patterns_layers_and_exclusions(self):
        model = adapt(
            target_modules=["q_proj", "v_proj"],
            exclude_modules=["layers.2.v_proj"],
            rank_pattern={"v_proj": 2, r"layers\.0\.q_proj": 4},
            alpha_pattern={"v_proj": 5.0},
            use_rslora=True,
        ).model
        assert [layer.q_proj.r["default"] for layer in model.layers] == [4, 8, 8]
        assert model.layers[0].v_proj.r["default"] == 2
        assert model.layers[0].v_proj.scaling["default"] == pytest.approx(5.0 / 2**0.5)
        assert model.layers[0].q_proj.scaling["default"] == pytest.approx(16.0 / 4**0.5)
        assert model.layers[0].v_proj.braidlora_A["default"].weight.shape == (6, 6)
        assert type(model.layers[2].v_proj) is nn.Linear

    def test_layers_to_transform(self):
        model = adapt(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers").model
        assert [isinstance(b.q_proj, braidlora.MultiLoraLayer) for b in model.layers] == [False, True, False]

    @pytest.mark.parametrize(
        ("bias", "trained"), [("none", 0), ("braidlora_only", 3), ("all", 3 * 4 + 2)], ids=str
    )
    def test_bias(self, bias, trained):
        model = adapt(target_modules=["q_proj"], bias=bias)
        biases = [n for n, p in model.named_parameters() if p.requires_grad and "bias" in n]
        assert len(biases) == trained

    @pytest.mark.parametrize(
        ("share", "shapes"),
        [
            ("B", [(12, 6), (3, 6), (6, 4)]),
            ("A", [(4, 6), (3, 6), (6, 12)]),
            ("none", [(12, 6), (3, 6), (6, 12)]),
        ],
    )
    def test_tensors_as_documented(self, share, shapes):
        layer = adapt(share=share, r=4, target_modules=["q_proj"]).model.layers[0].q_proj
        modules = [layer.braidlora_A, layer.braidlora_router, layer.braidlora_B]
        assert [tuple(m["default"].weight.shape) for m in modules] == shapes
        assert all(type(m["default"]) is nn.Linear and m["default"].bias is None for m in modules)
        assert layer.scaling["default"] == 4.0

    def test_no_warning_without_cause(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapt(target_modules=["q_proj", "layers.1.v_proj"])
