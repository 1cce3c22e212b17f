"""`braidlora plan`: what it says beforehand is what training then has."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from braidlora.assets import embedded_base_path
from braidlora.cli import main
from braidlora.config import built_in_recipes, load_config, schema_of
from braidlora.models.adapter_writer import save_adapter
from braidlora.models.attach import attach_adapter
from braidlora.models.base import enable_gradient_checkpointing, load_base
from braidlora.models.gguf import dequantized
from braidlora.models.skeleton import HUB_NAMES, packaged_architectures
from braidlora.plan.base import base_of
from braidlora.plan.memory import ATTENTION, LiveBytes, activation_bytes, optimizer_bytes, step_loss
from braidlora.plan.run import plan
from helpers.tiny_gguf import build_gguf

TASK = {"name": "sum", "train": "generated:sum"}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4,
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    """A recipe over a folder that holds nothing but a config.json; `write(adapter={"r": 4}, model={…})` changes it."""

    def write(config=LLAMA, name="recipe.yaml", **sections):
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        content = {
            "model": {"path": str(folder)},
            "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
            "tasks": [TASK],
            "prompt": {"template": "{instruction} =", "cutoff": 32},
        }
        for key, value in sections.items():
            content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def planned(recipe, capsys, *overrides):
    assert main(["plan", str(recipe), "--json", *overrides]) == 0
    return json.loads(capsys.readouterr().out)


def test_parameters_of_each_method_by_the_formulas(recipe, capsys):
    """k(Nr + N) + dr and its relatives (METHOD §1), from a config.json alone."""
    result = planned(recipe(), capsys)
    r, N, sizes = 4, 3, [(48, 48), (24, 48)] * 2  # q and v: (d, k)
    expected = {
        "alora": sum(k * (N * r + N) + d * r for d, k in sizes),
        "hydralora": sum(k * (r + N) + d * N * r for d, k in sizes),
        "moelora": sum(k * (N * r + N) + d * N * r for d, k in sizes),
        "mtl-lora": sum(r * k + d * N * r + r * r + N for d, k in sizes),  # of one task
        "align-lora": sum(r * (d + k) for d, k in sizes),
        "lora": sum(r * (d + k) for d, k in sizes),
    }
    assert {name: one["trainable_parameters"] for name, one in result["methods"].items()} == expected
    assert {one["layers"] for one in result["methods"].values()} == {4}
    assert result["method"] == "alora"
    embeddings, attention, mlp = 2 * 96 * 48, 2 * 48 * 48 + 2 * 48 * 24, 3 * 48 * 80
    assert result["base"]["parameters"] == embeddings + 2 * (attention + mlp + 2 * 48) + 48
    memory = result["memory"]
    assert memory["weights"] == 4 * result["base"]["parameters"]
    assert memory["adapter"] == memory["gradients"] == 4 * expected["alora"]
    assert memory["optimizer"] == 8 * expected["alora"]
    assert memory["total"] == sum(
        memory[part] for part in ("weights", "adapter", "gradients", "optimizer", "activations")
    )


def test_experts_of_each_method_by_the_formulas(recipe, capsys):
    """Every expert's matrix counts as a linear layer of its own; PEFT's LoRA has the same (and no dropout there)."""
    adapter = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    result = planned(recipe(MIXTRAL, adapter=adapter), capsys)
    r, N, sizes = 4, 3, [(48, 48), *[(160, 48)] * 4] * 2  # q, and four experts' gate and up: (d, k)
    expected = {
        "alora": sum(k * (N * r + N) + d * r for d, k in sizes),
        "hydralora": sum(k * (r + N) + d * N * r for d, k in sizes),
        "moelora": sum(k * (N * r + N) + d * N * r for d, k in sizes),
        "lora": sum(r * (d + k) for d, k in sizes),
    }
    assert {name: one["trainable_parameters"] for name, one in result["methods"].items()} == expected
    assert {one["layers"] for one in result["methods"].values()} == {4}


@pytest.mark.parametrize(
    "method", ["alora", "lora", {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj"]}]
)
def test_the_file_has_the_planned_size_to_the_byte(method, tmp_path, capsys):
    adapter = (
        {"method": method, "target_modules": ["q_proj", "down_proj"]}
        if isinstance(method, str)
        else {"method": method}
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"path": "embedded"}, "adapter": adapter, "tasks": [TASK]}))
    result = planned(recipe, capsys)
    config = load_config(recipe)
    model = attach_adapter(load_base(config.model)[0], config, seed=0)
    save_adapter(model, tmp_path)
    size = result["methods"][result["method"]]
    assert size["file_bytes"] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert list(result["methods"]) == (
        ["alora", "hydralora", "moelora", "mtl-lora", "align-lora", "lora"]
        if isinstance(method, str)
        else ["LOHA"]
    )


CASES = {
    "plain": {},
    "checkpointing": {"training": {"gradient_checkpointing": True}, "adapter": {"lora_dropout": 0.1}},
    "eager": {"model": {"path": "embedded", "attention": "eager"}},
}


@pytest.mark.parametrize("name", CASES)
def test_activations_on_shapes_are_those_of_a_real_step(name, tmp_path):
    """The same count over a step on real tensors, with real attention and a real mask."""
    content = {
        "model": {"path": "embedded"},
        "adapter": {"lora_dropout": 0.0},
        "training": {},
        "tasks": [TASK],
    }
    content = {
        key: {**value, **CASES[name].get(key, {})} if isinstance(value, dict) else value
        for key, value in content.items()
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**content, "prompt": {"cutoff": 48}}))
    config = load_config(recipe, ["training.batch_size=24"])
    base, _ = load_base(config.model)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    model = attach_adapter(base, config, seed=0).train()
    ids = torch.randint(5, 50, (24, 48))
    mask = torch.ones_like(ids)
    mask[0, -8:] = 0
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients, ids, mask]) as live:
        step_loss(model, {"input_ids": ids, "attention_mask": mask}, ids).backward()
    assert plan(recipe, ["training.batch_size=24"])["memory"]["activations"] == pytest.approx(
        live.peak, rel=0.05
    )


def test_an_encoders_dropped_attention_weights_count():
    """With dropout in its attention no fused kernel runs on a CPU, and rows × heads × tokens² weights are kept."""
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}

    def model(attention, dropout):
        config = transformers.BertConfig(
            vocab_size=100, num_labels=3, attention_probs_dropout_prob=dropout, **sizes
        )
        base = transformers.BertForSequenceClassification._from_config(config, attn_implementation=attention)
        return peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        )

    def on_shapes(dropout):
        with torch.device("meta"):
            return activation_bytes(model(ATTENTION, dropout), "classify", 8, 64)

    real = model("sdpa", 0.1).train()
    ids = torch.randint(5, 50, (8, 64))
    mask = torch.ones_like(ids)
    mask[0, -8:] = 0
    for parameter in (p for p in real.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in real.parameters() if p.grad is not None]
    with LiveBytes([*real.parameters(), *real.buffers(), *gradients, ids, mask]) as live:
        step_loss(
            real, {"input_ids": ids, "attention_mask": mask}, torch.zeros(8, dtype=torch.int64)
        ).backward()
    assert on_shapes(0.1) == pytest.approx(live.peak, rel=0.05)
    assert (
        on_shapes(0.1) - on_shapes(0.0) > 2 * 8 * 4 * 64 * 64 * 4
    )  # one float32 weight in each of two layers


def test_a_classifiers_head_counts(recipe, capsys):
    task = {"name": "mood", "kind": "classify", "train": "rows.jsonl", "options": ["good", "bad", "so-so"]}
    path = recipe(BERT, adapter={"target_modules": ["query"]}, tasks=[task])
    result = planned(path, capsys)
    adapter = 2 * (48 * (3 * 4 + 3) + 48 * 4)
    assert result["methods"]["alora"]["trainable_parameters"] == adapter + 3 * 48 + 3
    assert result["memory"]["activations"] > 0
    del task["options"]
    result = planned(recipe(BERT, adapter={"target_modules": ["query"]}, tasks=[task]), capsys)
    assert result["methods"]["alora"]["trainable_parameters"] == adapter + 2 * 48 + 2
    assert "a head with 2 labels is assumed" in result["base"]["notes"][0]


def test_sixteen_bit_and_quantised_weights(recipe, capsys):
    """NF4: half a byte a value and a float32 scale for every 64; 8bit: a byte a value and a scale a row."""
    path = recipe()
    linear, rows = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80), 2 * (2 * 48 + 2 * 24 + 2 * 80 + 48)
    everything = planned(path, capsys)["base"]["parameters"]
    rest = 2 * (everything - linear)
    weights = {
        q: planned(path, capsys, "--model.dtype=bfloat16", f"--model.quantization={q}")["memory"]["weights"]
        for q in ("none", "8bit", "4bit")
    }
    assert weights == {
        "none": 2 * everything,
        "8bit": linear + 4 * rows + rest,
        "4bit": linear // 2 + linear // 16 + rest,
    }


def test_what_makes_a_step_smaller_makes_the_plan_smaller(recipe, capsys):
    lora = {"method": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}}
    path = recipe({**LLAMA, "num_hidden_layers": 3})
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "adapter": lora}))  # no other methods beside it
    activations = {
        name: planned(path, capsys, *words)["memory"]["activations"]
        for name, words in {
            "plain": [],
            "half the rows": ["--training.batch_size=8"],
            "checkpointing": ["--training.gradient_checkpointing=true"],
            "autocast": ["--training.precision=bfloat16"],
            "16-bit base": ["--model.dtype=bfloat16"],
        }.items()
    }
    assert activations["half the rows"] == pytest.approx(activations["plain"] / 2, rel=0.05)
    assert activations["checkpointing"] < 0.6 * activations["plain"]
    assert activations["16-bit base"] < activations["autocast"] < activations["plain"]


def test_states_of_optimizers():
    trained = [torch.zeros(10, 3), torch.zeros(5)]
    sizes = {
        name: optimizer_bytes(name, trained)
        for name in ("adamw_torch_fused", "adamw_8bit", "sgd", "lion_32bit", "lomo")
    }
    assert sizes == {
        "adamw_torch_fused": (8 * 35, []), "adamw_8bit": (2 * 35, []), "sgd": (0, []), "lion_32bit": (4 * 35, []),
        "lomo": (8 * 35, ["the state of optimizer lomo is counted as AdamW's"]),
    }  # fmt: skip


def test_a_model_that_asks_for_values_has_no_activations():
    class Asks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3, device="meta"))
            self.config = SimpleNamespace()

        def forward(self, **inputs):
            return self.weight * self.weight.sum().item()

    with pytest.raises(RuntimeError, match="meta"):
        activation_bytes(Asks(), "generate", 2, 4)


def test_the_text_shows_the_recipes_method_and_the_total(recipe, capsys):
    assert main(["plan", str(recipe()), "--adapter.method=hydralora"]) == 0
    text = capsys.readouterr().out
    assert next(line.split()[1] for line in text.split("\n") if line.startswith("* ")) == "HydraLoRA"
    assert "(an estimate)" in text


def test_what_is_refused(recipe, tmp_path, capsys):
    for words, said in (
        (["plan"], "expected either a recipe"),
        (["plan", "demo", "--paper"], "or --paper alone"),
        (["plan", "--paper", "--seed=1"], "or --paper alone"),
        (["plan", str(recipe()), "--model.path=./nowhere"], "no such folder './nowhere'"),
        (["plan", str(recipe()), "--adapter.target_modules=[w_q]"], "matches no module"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_no_weights_are_read(recipe, tmp_path, capsys):
    """A base whose weights are not there, and one whose weights are no weights."""
    path = recipe()
    save_file({"x": torch.zeros(1)}, tmp_path / "base" / "model.safetensors")
    assert planned(path, capsys)["base"]["parameters"] > 0


# The paper's table, as printed (arXiv 2509.25414).
PAPER = {
    "homogeneous": {
        "llama-2-7b": {"fedit": "8.39", "fedsa-lora": "4.19", "fed-alora": "4.19"},
        "qwen2-7b": {"fedit": "6.42", "fedsa-lora": "3.21", "fed-alora": "3.21"},
    },
    "zero-padding": {"llama-2-7b": "49.28", "qwen2-7b": "37.73"},
    "fed-alora-het": {"llama-2-7b": "12.12", "qwen2-7b": "9.23"},
}


def test_a_gguf_file_is_planned_from_its_header(recipe, tmp_path, monkeypatch):
    """The numbers are those of the dequantized folder, which is not made."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_gguf(tmp_path / "tiny.gguf")
    for section in ({"path": str(tmp_path / "tiny.gguf")}, {"path": str(tmp_path), "gguf_file": "tiny.gguf"}):
        planned = plan(recipe(model=section))
        assert not (tmp_path / "cache").exists()
    folder = dequantized(tmp_path / "tiny.gguf")
    again = plan(recipe(model={"path": str(folder), "gguf_file": None}))
    assert planned["base"]["dtype"] == "bfloat16"
    for result in (planned, again):
        del result["base"]["path"], result["base"]["shapes_from"]
    assert planned == again


def test_a_file_that_is_no_gguf(recipe, tmp_path, capsys):
    pytest.importorskip("gguf")
    (tmp_path / "tiny.gguf").write_bytes(b"nothing of that kind")
    assert main(["plan", str(recipe(model={"path": str(tmp_path / "tiny.gguf")}))]) == 2
    assert "tiny.gguf: no usable header" in capsys.readouterr().err


def test_built_in_recipes_are_planned_without_their_base(monkeypatch):
    """Neither the base nor a network is there."""

    def no_network(*_args, **_options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("braidlora.models.hub_copies._on_hub", no_network)
    configs = [load_config(name, [], schema_of(name)) for name in built_in_recipes()]
    by_base = {config.model.path: config for config in configs}
    assert set(by_base) <= {"embedded", *HUB_NAMES}
    for path in ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"):
        assert base_of(by_base[path]).shapes_from in packaged_architectures()


def test_the_papers_table_to_the_printed_digit(capsys):
    assert main(["plan", "--paper", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)

    def millions(count):
        return f"{count / 1e6:.2f}"

    for model, rules in PAPER["homogeneous"].items():
        got = table["homogeneous"]["models"][model]
        assert {rule: millions(got[rule]) for rule in rules} == rules
    different = table["heterogeneous"]
    for model in ("llama-2-7b", "qwen2-7b"):
        got = different["models"][model]
        assert millions(got["zero-padding"]) == PAPER["zero-padding"][model]
        assert millions(got["fed-alora-het"][different["printed"][model]]) == PAPER["fed-alora-het"][model]
    travels = {model: list(got["fed-alora-het"].values())[2:] for model, got in different["models"].items()}
    assert {model: [millions(one) for one in both] for model, both in travels.items()} == {
        "llama-2-7b": ["12.09", "7.87"], "qwen2-7b": ["9.26", "6.02"],
    }  # fmt: skip
    assert main(["plan", "--paper"]) == 0
    marked = [line.split() for line in capsys.readouterr().out.split("\n") if line.endswith("*")]
    assert [next(word for word in words if word in ("12.12", "9.23")) for words in marked] == [
        "12.12",
        "9.23",
    ]


FEDERATED = {"rule": "fed-alora-het", "rounds": 3, "ranks": [8, 2, 4, 2], "r_intermediate": 4}


@pytest.fixture
def federated(recipe):
    """Four clients with a task each; `federated(rule="fedit", ranks=[4, 4, 4, 4])`."""

    def write(tasks=None, **settings):
        tasks = tasks or [
            {"name": name, "train": f"generated:{name}"} for name in ("sum", "mood", "who", "count")
        ]
        federation = {key: value for key, value in {**FEDERATED, **settings}.items() if value is not None}
        return recipe(tasks=tasks, federation=federation, adapter={"r": 4})

    return write


def rules_of(result):
    return {(one["rule"], one["wire"]): one for one in result["rules"]}


def test_traffic_by_every_rule_that_the_ranks_allow(federated, capsys):
    """METHOD §4's table of what travels, on q and v of two layers."""
    result = planned(federated(), capsys)
    rules, sizes, m = rules_of(result), [(48, 48), (24, 48)] * 2, 4
    assert [key for key, one in rules.items() if "reason" in one] == [
        ("fedit", None), ("ffa-lora", None), ("fedsa-lora", None), ("fed-alora", None),
        ("rolora", None), ("fedalt", None),
    ]  # fmt: skip
    both = sum(d + k for d, k in sizes)
    expected = {
        ("local", None): (0, 0),
        ("zero-padding", None): (4 * both, 8 * both),
        ("flora", None): (4 * both, sum((d + k) * min(16, d) for d, k in sizes)),
        ("flexlora", None): (4 * both, 4 * both),
        ("raflora", None): (4 * both, 4 * both),
        ("fed-alora-het", "factors"): (4 * sum(d + m for d, _ in sizes), m * sum(d for d, _ in sizes)),
        ("fed-alora-het", "smallest"): (
            sum(min(r * (d + m), d * m) for r in (8, 2, 4, 2) for d, _ in sizes) / 4,
            m * sum(d for d, _ in sizes),
        ),
    }
    assert {
        key: (rules[key]["mean"]["up_parameters"], rules[key]["mean"]["down_parameters"]) for key in expected
    } == expected
    own = rules["fed-alora-het", "factors"]
    assert [one["rank"] for one in own["by_rank"]] == [2, 4, 8]
    assert own["all_rounds"]["up_bytes"] == round(3 * 4 * own["mean"]["up_bytes"])
    assert own["all_rounds"]["down_bytes"] == round(2 * 4 * own["mean"]["down_bytes"])
    trained = {one["rank"]: (one["clients"], one["trainable_parameters"]) for one in result["adapters"]}
    assert trained == {
        r: (n, sum(r * k + m * r + r * m + d * r for d, k in sizes)) for r, n in {2: 2, 4: 1, 8: 1}.items()
    }
    assert (result["clients"], result["asked_per_round"], result["layers"]) == (4, 4, 4)


def test_equal_ranks_sampling_and_sixteen_bits(federated, capsys):
    path = federated(rule="fed-alora", ranks=None, r_intermediate=None, sample={"number": 2})
    whole = rules_of(planned(path, capsys))
    half = rules_of(planned(path, capsys, "--federation.upload_dtype=bfloat16"))
    assert not [one for one in whole.values() if "reason" in one]
    numbers = 4 * sum(d for d in (48, 24, 48, 24))
    mean = whole["fed-alora", None]["mean"]
    assert (mean["up_parameters"], mean["down_parameters"]) == (numbers, numbers)
    assert mean["up_bytes"] - half["fed-alora", None]["mean"]["up_bytes"] == pytest.approx(
        2 * numbers, abs=16
    )
    assert mean["down_bytes"] == half["fed-alora", None]["mean"]["down_bytes"]
    # Two clients take part in a round: their stack is what flora sends down.
    assert whole["flora", None]["mean"]["down_parameters"] == 8 * sum(d + 48 for d in (48, 24, 48, 24))
    assert whole["fed-alora", None]["all_rounds"]["up_bytes"] == 3 * 2 * mean["up_bytes"]


def test_a_frozen_factor_is_in_memory_but_not_trained(federated, capsys):
    sizes = [(48, 48), (24, 48)] * 2
    memory = planned(federated(rule="ffa-lora", ranks=None, r_intermediate=None), capsys)["memory"]
    assert memory["adapter"] == 4 * 4 * sum(d + k for d, k in sizes)
    assert memory["gradients"] == memory["optimizer"] / 2 == 4 * 4 * sum(d for d, _ in sizes)
    het = planned(federated(), capsys)["memory"]  # of the client with the largest rank
    assert het["gradients"] == 4 * sum(8 * k + 2 * 8 * 4 + d * 8 for d, k in sizes)
    assert het["adapter"] == het["gradients"] + 4 * 4 * sum(d for d, _ in sizes)
    flora = planned(federated(rule="flora", r_intermediate=None), capsys)["memory"]
    stack = sum((d + k) * min(3 * 16, d) for d, k in sizes)
    assert flora["adapter"] == 4 * (8 * sum(d + k for d, k in sizes) + stack)


def test_the_federated_text(federated, capsys):
    assert main(["plan", str(federated())]) == 0
    text = capsys.readouterr().out
    assert [line.split()[1] for line in text.split("\n") if line.startswith("*") and "fed-" in line] == [
        "fed-alora-het,"
    ]
    assert text.count("needs one rank for all clients") == 6


@pytest.mark.slow  # loads a base in two processes of their own
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark from /proc")
def test_a_real_steps_peak_is_what_was_planned(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from memory import case

    result = case("demo", ["--training.batch_size=256"])
    assert result["tight"]["ratio"] == pytest.approx(1.0, abs=0.1)
    assert 0.5 < result["default"]["ratio"] <= 1.1
    assert embedded_base_path().is_dir()


def test_a_private_recipe_knows_its_noise_and_its_epsilon(capsys):
    pytest.importorskip("dp_accounting", reason="needs dp-accounting")
    words = ["plan", "fed_demo", "--federation.weights=uniform", "--federation.privacy.clip=1"]
    assert main([*words, "--federation.privacy.epsilon=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["privacy"]
    assert 7.9 < found["epsilon"] <= 8.0
    assert main([*words, f"--federation.privacy.noise_multiplier={found['noise_multiplier']}"]) == 0
    said = capsys.readouterr().out
    assert "at δ = 1e-05 after 6 rounds (add or remove one client)" in said
    assert (
        main([*words, "--federation.privacy.noise=clients", "--federation.privacy.noise_multiplier=2"]) == 0
    )
    assert "toward the server, for a client that is always drawn" in capsys.readouterr().out
    assert main(["plan", "fed_demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["privacy"] is None
