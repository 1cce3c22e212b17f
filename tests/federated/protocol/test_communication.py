"""The plan's numbers: the paper's table, every rule on paper and on the wire."""

import dataclasses

import pytest
import torch
from safetensors.torch import save
from synthetic import HET, clients, run

from braidlora.errors import ConfigError
from braidlora.federated import RULE_NAMES, AdaptedLayer, get_rule
from braidlora.federated.protocol.communication import mean_parameters, traffic
from braidlora.models.skeleton import HUB_NAMES, packaged_architectures, skeleton
from braidlora.plan.layers import adapted_layers
from braidlora.safetensors_size import serialized_bytes

PAPER_RANKS = [64, 64, 32, 32, 16, 16, 8, 8]
PAPER_TARGETS = {"llama-2-7b": ["q_proj", "v_proj"], "qwen2-7b": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module")
def paper_layers():
    return {name: adapted_layers(name, targets) for name, targets in PAPER_TARGETS.items()}


def millions(layers, rule, ranks, **settings):
    """Up and down together, averaged over clients, as the paper prints it."""
    per_client = traffic(rule, layers, ranks, **settings)
    return f"{sum(client.parameters for client in per_client) / len(ranks) / 1e6:.2f}"


def test_dimensions_from_the_configuration_alone(paper_layers):
    llama, qwen = paper_layers["llama-2-7b"], paper_layers["qwen2-7b"]
    assert [len(llama), len(qwen)] == [64, 56]
    assert {layer[1:] for layer in llama} == {(4096, 4096)}
    assert {layer[1:] for layer in qwen} == {(3584, 3584)}
    assert llama[0].name == "base_model.model.model.layers.0.self_attn.q_proj"
    assert {tuple(layer[1:]) for layer in adapted_layers("qwen2-7b", ["v_proj", "down_proj"])} == {
        (512, 3584),
        (3584, 18944),
    }


@pytest.mark.parametrize(
    ("model", "rule", "printed"),
    [
        ("llama-2-7b", "fedit", "8.39"), ("llama-2-7b", "fedsa-lora", "4.19"), ("llama-2-7b", "fed-alora", "4.19"),
        ("qwen2-7b", "fedit", "6.42"), ("qwen2-7b", "fedsa-lora", "3.21"), ("qwen2-7b", "fed-alora", "3.21"),
    ],
)  # fmt: skip
def test_papers_table_homogeneous(paper_layers, model, rule, printed):
    assert millions(paper_layers[model], get_rule(rule), [8] * 8) == printed


@pytest.mark.parametrize(
    ("model", "zero_padding", "factors", "smallest"),
    [("llama-2-7b", "49.28", "12.09", "7.87"), ("qwen2-7b", "37.73", "9.26", "6.02")],
)
def test_papers_table_heterogeneous(paper_layers, model, zero_padding, factors, smallest):
    layers = paper_layers[model]
    assert millions(layers, get_rule("zero-padding"), PAPER_RANKS) == zero_padding
    assert millions(layers, get_rule(HET), PAPER_RANKS) == factors
    assert millions(layers, get_rule(HET, wire="smallest"), PAPER_RANKS) == smallest


@pytest.mark.parametrize(
    ("model", "up", "printed"),
    [
        ("llama-2-7b", ["factoredlora_B1", "factoredlora_B2", "factoredlora_M"], "12.12"),
        ("qwen2-7b", ["factoredlora_B2"], "9.23"),
    ],
)
def test_papers_two_ways_of_counting_the_heterogeneous_row(paper_layers, model, up, printed):
    total = mean_parameters(paper_layers[model], PAPER_RANKS, [*up, "factoredlora_base"])
    assert f"{total / 1e6:.2f}" == printed


def first_turn(rule):
    """The rule of the first turn alone; a plan is a mean over the turns (tests of rules that alternate add them up)."""
    turn = rule.spec.at(1)
    rule.spec = dataclasses.replace(rule.spec, turns=(turn,))
    return rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("name", "wire"), [*((name, "factors") for name in RULE_NAMES), (HET, "smallest")])
def test_the_plan_is_what_travels_to_the_byte(name, wire, dtype):
    """Serialized uploads and payloads of a real round against the plan, with per-client ranks where allowed."""
    ranks = [2, 7, 4] if get_rule(name).spec.ranks == "any" else [3, 3, 3]
    rule = get_rule(name, r_intermediate=5, **({"wire": wire} if name == HET else {}))
    made = clients(name, ranks, [(40, 30), (18, 25)], m=5)
    layers = [
        AdaptedLayer(f"base_model.model.layers.{j}.q_proj", d, k)
        for j, (d, k) in enumerate([(40, 30), (18, 25)])
    ]
    shared = run(rule, made)
    if rule.spec.turns:
        rule = first_turn(rule)
    for client, planned in zip(made, traffic(rule, layers, ranks, dtype=dtype), strict=True):
        up = client.update(rule, dtype).tensors
        down = {n: t.to(dtype) for n, t in rule.payload_for(shared, client.rank, client.scaling).items()}
        assert planned.rank == client.rank
        assert planned.up_parameters == sum(tensor.numel() for tensor in up.values())
        assert planned.down_parameters == sum(tensor.numel() for tensor in down.values())
        assert planned.up_bytes == (len(save(dict(up))) if up else 0)
        assert planned.down_bytes == (len(save(down)) if down else 0)


def test_stacking_down_grows_with_the_clients_up_to_the_full_rank():
    layers = [AdaptedLayer("l", 100, 60)]
    down = [traffic(get_rule("flora"), layers, [8] * n)[0].down_parameters for n in (1, 5, 8, 50)]
    assert down == [8 * 160, 40 * 160, 60 * 160, 60 * 160]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_bytes_of_mixed_types_and_with_a_header(metadata):
    tensors = {
        "b.lora_A.weight": torch.zeros(3, 7),
        "a.lora_B.weight": torch.zeros(5, 3, dtype=torch.bfloat16),
        "head.weight": torch.zeros(2, 5, dtype=torch.float16),
        "head.bias": torch.zeros(2, dtype=torch.float64),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert serialized_bytes(shapes, dtypes, metadata) == len(save(tensors, metadata))


def test_a_shared_head_travels_both_ways_and_downloads_may_have_a_type_of_their_own():
    layers, head = [AdaptedLayer("l", 10, 6)], {"head.weight": (3, 10)}
    [plain] = traffic(get_rule("fed-alora"), layers, [4])
    [client] = traffic(
        get_rule("fed-alora"), layers, [4], dtype=torch.float16, down_dtype=torch.float32, also=head
    )
    assert (client.up_parameters, client.down_parameters) == (
        plain.up_parameters + 30,
        plain.down_parameters + 30,
    )
    sent = {"l.lora_B.weight": torch.zeros(10, 4), "head.weight": torch.zeros(3, 10)}
    assert client.down_bytes == len(save(sent))
    assert client.up_bytes == len(save({name: tensor.half() for name, tensor in sent.items()}))


def test_names_on_the_hub_whose_dimensions_are_known():
    sizes = {name: sum(p.numel() for p in skeleton(name).parameters()) for name in HUB_NAMES}
    assert sizes == {  # as published
        "meta-llama/Llama-2-7b-hf": 6_738_415_616,
        "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
        "Qwen/Qwen2-7B": 7_615_616_512,
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
    }


def test_other_architectures(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2, "n_head": 4}'
    )
    tied = 50257 * 32 + 1024 * 32  # the output layer has the embedding's weight
    assert sum(p.numel() for p in skeleton(tmp_path).parameters()) == tied + 2 * (12 * 32**2 + 13 * 32) + 64
    assert {tuple(layer[1:]) for layer in adapted_layers(tmp_path)} == {(96, 32)}
    assert len(adapted_layers(tmp_path, "all-linear")) == 2 * 4
    (tmp_path / "config.json").write_text(
        '{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 24,'
        ' "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}'
    )
    names = [layer.name for layer in adapted_layers(tmp_path, ["query", "value"])]
    assert names == [
        f"base_model.model.bert.encoder.layer.0.attention.self.{one}" for one in ("query", "value")
    ]


def test_what_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no usable config\.json.*llama-2-7b, llama-3-8b, minilm-l6-h384, qwen2-7b"
    ):
        adapted_layers(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match="no-such-model"):
        adapted_layers(tmp_path)
    with pytest.raises(ConfigError, match=r"target_modules \['w_q'\]"):
        adapted_layers("llama-2-7b", ["w_q"])
    assert list(packaged_architectures()) == [
        "llama-2-7b", "llama-3-8b", "minilm-l6-h384", "qwen2-7b", "smollm2-135m",
    ]  # fmt: skip
