"""`braidlora export`: the exported LoRA is the adapter, or says by how much it is not."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from braidlora import FactoredLoraConfig, MultiLoraConfig, MultiLoraLayer
from braidlora.adapters.base_edits import ALLOWED
from braidlora.adapters.router_means import router_means
from braidlora.assets import embedded_base_path
from braidlora.cli import main
from braidlora.config import dump_config, load_config
from braidlora.errors import CheckpointError, ConfigError, TrainingError
from braidlora.export.merge import merge_and_save
from braidlora.export.run import export
from braidlora.export.write import write_lora
from braidlora.models.adapter_reader import load_adapter
from braidlora.runs import RunDirectory, atomic_write_json, commit_directory

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
IDS = torch.tensor([[5, 9, 33, 7, 21, 60], [8, 8, 2, 40, 11, 3]])
# Constructor, target modules and task type of each architecture: plain linear layers, Conv1D, and two kinds of head.
BASES = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), ["q_proj", "down_proj"], "CAUSAL_LM"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)),
        ["c_attn", "c_fc"],
        "CAUSAL_LM",
    ),
    "llama head": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)),
        ["q_proj", "v_proj"],
        "SEQ_CLS",
    ),
    "bert head": (
        lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
        ["query", "value"],
        "SEQ_CLS",
    ),
}  # fmt: skip
EXACT = {
    "lora": lambda **kw: peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **kw),
    "factored": lambda **kw: FactoredLoraConfig(
        r=3, r_intermediate=5, lora_alpha=6, init_weights=False, **kw
    ),
    "one expert": lambda **kw: MultiLoraConfig(num_experts=1, r=3, lora_alpha=6, init_weights=False, **kw),
}


def base(name):
    torch.manual_seed(7)
    return BASES[name][0]().double().eval()


def saved(folder, name, make, **settings):
    """An adapter with random weights and a changed head, saved; the logits of the model it was saved from."""
    _, targets, task_type = BASES[name]
    network = base(name)
    torch.manual_seed(3)
    config = make(**{"target_modules": targets, "task_type": task_type, "lora_dropout": 0.1, **settings})
    model = peft.get_peft_model(network, config).eval()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and ("modules_to_save" in key or key.endswith("bias")):
            parameter.data.normal_()
    model.save_pretrained(folder)
    return model, model(IDS).logits.detach()


def reloaded(folder, name):
    """Logits of the exported LoRA under PEFT alone; every tensor of it is used."""
    model = peft.PeftModel.from_pretrained(base(name), str(folder), autocast_adapter_dtype=False).eval()
    assert type(model.peft_config["default"]) is peft.LoraConfig
    assert set(load_file(folder / "adapter_model.safetensors")) == set(peft.get_peft_model_state_dict(model))
    return model(IDS).logits.detach()


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_exact_exports_have_the_same_logits(kind, name, tmp_path):
    _, expected = saved(tmp_path / "adapter", name, EXACT[kind])
    record = export(tmp_path / "adapter")
    assert (record["exact"], record["cost"], record["form"]) == (True, None, "lora")
    close(reloaded(tmp_path / "adapter-lora", name), expected)


@pytest.mark.parametrize("kind", ["factored", "one expert"])
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "bias": "all"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 5.0}},
        {"target_modules": "all-linear", "layers_to_transform": None, "exclude_modules": ["o_proj"]},
        {"trainable_token_indices": [3, 8]},
    ],
    ids=["rslora", "patterns", "all-linear", "tokens"],
)
def test_settings_are_taken_over(kind, settings, tmp_path):
    _, expected = saved(tmp_path / "adapter", "llama", EXACT[kind], **settings)
    export(tmp_path / "adapter")
    close(reloaded(tmp_path / "adapter-lora", "llama"), expected)


@pytest.mark.parametrize(
    ("kind", "bias"), [("factored", "factoredlora_only"), ("one expert", "braidlora_only")]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_trained_biases_are_exported(kind, bias, tmp_path):
    _, expected = saved(tmp_path / "adapter", "gpt2", EXACT[kind], bias=bias)
    export(tmp_path / "adapter")
    close(reloaded(tmp_path / "adapter-lora", "gpt2"), expected)


def test_a_plain_lora_is_copied_byte_for_byte(tmp_path):
    saved(tmp_path / "adapter", "llama", EXACT["lora"])
    export(tmp_path / "adapter", tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.slow  # starts another interpreter
def test_peft_loads_an_export_without_braidlora(tmp_path):
    saved(tmp_path / "adapter", "llama", EXACT["factored"])
    export(tmp_path / "adapter", tmp_path / "out")
    script = (
        "import sys, peft\n"
        f"config = peft.PeftConfig.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(type(config).__name__, config.r, config.lora_alpha, 'braidlora' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["LoraConfig", "5", "10", "False"]


def trained_lora(folder, **settings):
    """A LoRA of PEFT with these settings, every trained parameter moved, saved; its logits on its own base."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base("llama").float(), config).eval()  # PiSSA knows no float64
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model(IDS).logits.detach().double()


def edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("init", ALLOWED)
@pytest.mark.filterwarnings("ignore")
def test_every_initialization_that_leaves_the_base_alone_is_exported_exactly(init, tmp_path):
    expected = trained_lora(tmp_path / "adapter", init_lora_weights=init)
    record = export(tmp_path / "adapter")
    assert record["exact"]
    assert (expected - base("llama")(IDS).logits).abs().max() > 0.02
    # A loader that knows nothing of initializations gets the same: the stored base plus s·B A.
    edit_config(tmp_path / "adapter-lora", init_lora_weights=True)
    if init == "mica":  # of which PEFT saves neither more nor less than A and B
        assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    close(reloaded(tmp_path / "adapter-lora", "llama"), expected, atol=2e-6)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_an_edited_base_is_refused(init, tmp_path, capsys):
    made = init.startswith(("pissa", "olora"))  # the others need data, or another quantization library
    expected = trained_lora(tmp_path / "adapter", init_lora_weights=init if made else True)
    if made:  # why: on the stored base its A and B are another model
        plain = tmp_path / "plain"
        shutil.copytree(tmp_path / "adapter", plain)
        edit_config(plain, init_lora_weights=True)
        assert (reloaded(plain, "llama") - expected).abs().max() > 1e-4
    else:
        edit_config(tmp_path / "adapter", init_lora_weights=init)
    base("llama").float().save_pretrained(tmp_path / "base")
    for call in (
        ["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")],
        ["analyze", str(tmp_path / "adapter"), str(tmp_path / "adapter")],
    ):
        assert main(call) in (2, 5)
    with pytest.raises(
        CheckpointError, match=rf"init_lora_weights='{init}' changes the base's own weights.*PEFT"
    ):
        export(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(CheckpointError, match="changes the base's own weights"):
        load_adapter(base("llama"), tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_what_peft_converts_is_exported(tmp_path):
    """The way out that the refusal names."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
    )
    model = peft.get_peft_model(base("llama").float(), config).eval()
    model.save_pretrained(tmp_path / "initial")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter)
    expected = model(IDS).logits.detach().double()
    model.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    record = export(tmp_path / "adapter")
    assert (record["exact"], record["rank"]) == (True, 4)
    close(reloaded(tmp_path / "adapter-lora", "llama"), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"use_dora": True}, "DoRA of rank 2"),
        ({"lora_bias": True}, "with lora_bias"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "with layer_replication"),
        ({"alora_invocation_tokens": [9]}, "with alora_invocation_tokens"),
        ({"trainable_token_indices": [3, 8]}, "a plain LoRA"),
        ({"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 1}, "use_rslora": True}, "a plain LoRA"),
        ({"bias": "all"}, "a plain LoRA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_variants_of_lora_are_named_exported_exactly_and_merged_only_where_they_are_a_sum(
    settings, word, tmp_path
):
    class Tokenizer:
        def save_pretrained(self, folder):
            pass

    expected = trained_lora(tmp_path / "adapter", **settings)
    record = export(tmp_path / "adapter", tmp_path / "lora")
    assert record["exact"]
    assert word in record["how"]
    exported = reloaded(tmp_path / "lora", "llama")
    (tmp_path / "merged").mkdir()
    merges = settings.keys() & {"lora_bias", "layer_replication", "alora_invocation_tokens"} == set()
    if "alora_invocation_tokens" not in settings:  # it acts in `generate` and by ids that PEFT looks for
        close(exported, expected, atol=2e-6)
    if merges:
        report = merge_and_save(base("llama"), Tokenizer(), tmp_path / "lora", tmp_path / "merged")
        assert report["largest_logit_difference"] < 1e-9
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(model(IDS).logits.double(), expected, atol=1e-4, rtol=0)
    else:
        with pytest.raises(ConfigError, match=r"--merge: .*Leave out --merge"):
            merge_and_save(base("llama"), Tokenizer(), tmp_path / "lora", tmp_path / "merged")
        assert not any((tmp_path / "merged").iterdir())


def test_a_merge_that_changes_the_model_is_refused(tmp_path, monkeypatch):
    """Whatever PEFT makes of it: the merged model is compared, and not only described."""
    trained_lora(tmp_path / "adapter")
    whole = peft.PeftModel.merge_and_unload if hasattr(peft.PeftModel, "merge_and_unload") else None
    assert whole is None  # it is reached through the tuner
    merge = peft.LoraModel.merge_and_unload

    def wrong(self, **options):
        merged = merge(self, **options)
        merged.model.layers[0].self_attn.q_proj.weight.data *= 2
        return merged

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", wrong)
    (tmp_path / "merged").mkdir()
    with pytest.raises(ConfigError, match="the merged model's logits differ by"):
        merge_and_save(base("llama"), None, tmp_path / "adapter", tmp_path / "merged")
    assert not any((tmp_path / "merged").iterdir())


def with_dense_updates(model, weights):
    """The base with s·Σ wᵢ Bᵢ Aᵢ added to its weights, written out from the tensors: METHOD's formula."""
    updates = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, MultiLoraLayer):
            A, B = (getattr(layer, f"braidlora_{factor}")["default"].weight.detach() for factor in "AB")
            r, share = layer.r["default"], layer.gate["default"].share
            As = [A if share == "A" else A[i * r : (i + 1) * r] for i in range(3)]
            Bs = [B if share == "B" else B[:, i * r : (i + 1) * r] for i in range(3)]
            updates[name] = layer.scaling["default"] * sum(
                w * b @ a for w, b, a in zip(weights, Bs, As, strict=True)
            )
    network = model.unload()
    for name, update in updates.items():
        weight = network.get_submodule(name).weight
        weight.data += (
            update if weight.shape == update.shape and not name.endswith(("c_attn", "c_fc")) else update.T
        )
    return network


@pytest.mark.parametrize("share", ["B", "A", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_static_weights_give_the_formulas_lora(share, name, tmp_path):
    def make(**kw):
        return MultiLoraConfig(share=share, r=2, lora_alpha=6.0, init_weights=False, **kw)

    model, routed = saved(tmp_path / "adapter", name, make)
    record = export(tmp_path / "adapter", static_weights="0.5,0.3,0.2")
    assert record["rank"] == (6 if share == "none" else 2)
    assert (record["exact"], record["static_weights"]) == (False, {"weights": [0.5, 0.3, 0.2]})
    assert "was not measured" in (tmp_path / "adapter-lora" / "README.md").read_text()
    exported = reloaded(tmp_path / "adapter-lora", name)
    close(exported, with_dense_updates(model, [0.5, 0.3, 0.2])(IDS).logits)
    assert (exported - routed).abs().max() > 1e-3


def test_static_weights_of_different_ranks(tmp_path):
    def make(**kw):
        return MultiLoraConfig(share="none", r=2, rank_pattern={"q_proj": 1}, init_weights=False, **kw)

    model, _ = saved(tmp_path / "adapter", "llama", make)
    export(tmp_path / "adapter", static_weights="uniform")
    close(reloaded(tmp_path / "adapter-lora", "llama"), with_dense_updates(model, [1 / 3] * 3)(IDS).logits)


def test_router_means_leave_padding_out(tmp_path):
    """Against each row alone, without padding, and softmax written out."""
    model, _ = saved(
        tmp_path / "adapter",
        "llama",
        lambda **kw: MultiLoraConfig(router_temperature=0.5, init_weights=False, **kw),
    )
    model = model.double()
    rows = [[5, 9, 33], [8, 2, 40, 11, 3, 7], [1]]
    layer = model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for row in rows:
        model(torch.tensor([row]))
    hook.remove()
    logits = torch.cat(seen) @ layer.braidlora_router["default"].weight.T / 0.5
    expected = (logits.exp() / logits.exp().sum(-1, keepdim=True)).mean(0)
    padded = torch.zeros(3, 6, dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    mask = torch.tensor([[i < len(row) for i in range(6)] for row in rows]).long()
    batches = [{"input_ids": padded[at], "attention_mask": mask[at]} for at in (slice(0, 2), slice(2, 3))]
    means, tokens = router_means(model, batches)
    assert tokens == 10
    torch.testing.assert_close(
        means["model.layers.1.mlp.down_proj"].weights, expected.detach(), atol=1e-10, rtol=0
    )
    assert len(means) == 4


@pytest.mark.parametrize("name", BASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_merged_model_needs_no_peft(name, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            Path(folder, "tokenizer.json").write_text("{}")

    _, expected = saved(tmp_path / "adapter", name, EXACT["factored"])
    export(tmp_path / "adapter", tmp_path / "lora")
    (tmp_path / "merged").mkdir()
    report = merge_and_save(base(name).float(), Tokenizer(), tmp_path / "lora", tmp_path / "merged")
    assert (report["dtype"], report["largest_logit_difference"] < 1e-4) == ("float32", True)
    auto = AutoModelForSequenceClassification if "head" in name else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "merged", use_safetensors=True).eval()
    torch.testing.assert_close(model(IDS).logits.double(), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run of two generated tasks on the embedded base as training leaves it, with an adapter of random weights."""
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "model": {"path": "embedded"},
        "prompt": {"template": "{instruction} =", "cutoff": 64},
        "tasks": [
            {
                "name": name,
                **{part: {"source": f"generated:{name}", "limit": 12} for part in ("train", "test")},
            }
            for name in ("sum", "mood")
        ],
        "evaluation": {"max_new_tokens": 3, "batch_size": 50},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    run.config.write_text(dump_config(load_config(folder / "recipe.yaml")), encoding="utf-8")
    atomic_write_json(run.environment, {})
    config = MultiLoraConfig(
        r=2, lora_alpha=4.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    torch.manual_seed(5)
    network = AutoModelForCausalLM.from_pretrained(embedded_base_path())
    with commit_directory(run.adapter) as staging:
        peft.get_peft_model(network, config).save_pretrained(staging)
    return folder


def test_the_cost_is_the_difference_of_two_evaluations(finished_run, tmp_path, capsys):
    run, out = finished_run / "run", tmp_path / "out"
    listed = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert main(["export", str(run), "--output", str(out), "--static-weights", "task=sum", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == listed
    assert json.loads((out / "export.json").read_text()) == {k: record[k] for k in record if k != "directory"}
    assert list(record["cost"]["tasks"]) == ["sum"]
    for target, key in ((run, "before"), (out, "after")):
        recipe = ["--recipe", str(finished_run / "recipe.yaml"), "--directory", str(tmp_path / key)]
        assert main(["evaluate", str(target), "--json", *recipe]) == 0
        task = json.loads(capsys.readouterr().out)["tasks"]["sum"]
        assert (task["score"], task["n"]) == (
            record["cost"]["tasks"]["sum"][key],
            record["cost"]["tasks"]["sum"]["n"],
        )
    static = record["static_weights"]
    assert (static["task"], static["rows"]) == ("sum", 12)
    assert static["tokens"] > 30
    assert all(abs(sum(weights) - 1) < 1e-6 for weights in static["layers"].values())
    assert record["cost_reason"] is None
    table = (out / "README.md").read_text().split("\n")[-2].split()
    assert (table[0], table[-1]) == ("sum", f"{record['cost']['change']:.1f}")


def test_all_tasks_are_scored_for_other_weights_and_the_text_shows_it(finished_run, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    assert main(["export", str(finished_run / "run"), *out, "--static-weights", "uniform"]) == 0
    text = capsys.readouterr().out
    assert "An approximation" in text
    table = [line.split()[0] for line in text.split("\n") if line.startswith("    ")]
    assert [word for word in table if word.isalpha()] == ["task", "sum", "mood", "mean"]
    assert set(json.loads((tmp_path / "out" / "export.json").read_text())["cost"]["tasks"]) == {"sum", "mood"}


def test_an_adapter_outside_a_run_takes_its_rows_from_one(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run / "run" / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    call = ["export", str(tmp_path / "adapter"), "--static-weights", "task=mood", "--no-scores", "--json"]
    assert main(call) == 2
    assert "give --weights-from RUN, or --recipe RECIPE" in capsys.readouterr().err
    rows = ["--weights-from", str(finished_run / "run"), "--rows-per-task", "4"]
    with pytest.warns(UserWarning, match=r"tokenizer\.json was added after the adapter was written"):
        assert main([*call, *rows, "--output", str(tmp_path / "listed")]) == 0
    assert not (tmp_path / "listed" / "tokenizer.json").exists()
    capsys.readouterr()
    (tmp_path / "adapter" / "manifest.json").unlink()  # as other programs save adapters
    assert main([*call, *rows]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["directory"] == str(tmp_path / "adapter-lora-mood")
    assert (record["static_weights"]["rows"], record["cost"]) == (4, None)
    assert "--no-scores" in record["cost_reason"]
    assert (tmp_path / "adapter-lora-mood" / "tokenizer.json").read_text() == "{}"


def test_merging_a_run_into_its_base(finished_run, tmp_path, capsys):
    out = tmp_path / "out"
    call = ["export", str(finished_run / "run"), "--output", str(out), "--merge", "--json"]
    assert main([*call, "--static-weights", "1,0,0", "--no-scores"]) == 0
    assert json.loads(capsys.readouterr().out)["merge"]["largest_logit_difference"] < 1e-3
    assert not (out / "adapter_config.json").exists()
    lora = ["--output", str(tmp_path / "lora"), "--static-weights", "1,0,0", "--no-scores"]
    assert main(["export", str(finished_run / "run"), *lora]) == 0
    network = AutoModelForCausalLM.from_pretrained(embedded_base_path())
    expected = peft.PeftModel.from_pretrained(network, str(tmp_path / "lora")).eval()(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-3, rtol=0)
    quantised = [*call, "--static-weights", "1,0,0", "--overwrite", "--model.quantization=4bit"]
    assert main(quantised) == 2
    assert "--model.quantization=none" in capsys.readouterr().err


@pytest.fixture
def routed(tmp_path) -> Path:
    saved(tmp_path / "adapter", "llama", lambda **kw: MultiLoraConfig(r=2, init_weights=False, **kw))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no single LoRA equals it.*--static-weights task=NAME, uniform, or one number per expert"),
        (["--static-weights", "mean"], "got 'mean'; expected task=NAME"),
        (["--static-weights", "0.5,0.5"], "got 2 numbers; the adapter has 3 experts"),
        (["--static-weights", "1,1,1"], "sum to 3.*Write 0.3333,0.3333,0.3333"),
        (["--static-weights", "nan,1,0"], "finite numbers of at least 0"),
        (["--static-weights", "2,-1,0"], "finite numbers of at least 0"),
        (["--static-weights", "uniform", "--seed=1"], "it has no recipe to override"),
        (
            ["--static-weights", "task=sum", "--weights-from", "nowhere"],
            "nowhere: no such run, adapter or model",
        ),
        (["--static-weights", "uniform", "--rows-per-task", "0"], "--rows-per-task: got 0"),
        (
            ["--static-weights", "uniform", "--rows-per-task", "9"],
            "--rows-per-task has no effect here: it is for .*task=NAME",
        ),
        (
            ["--static-weights", "uniform", "--base", "embedded"],
            "--base has no effect here: no base model is needed",
        ),
        (["--static-weights", "uniform", "--recipe", "demo", "--no-scores"], "--recipe has no effect here"),
    ],
)
def test_what_is_refused_of_a_routed_adapter(routed, words, said, capsys):
    assert main(["export", str(routed), *words]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert list(routed.parent.iterdir()) == [routed]


def test_an_unknown_task_is_refused_with_the_known_ones(finished_run, tmp_path):
    with pytest.raises(ConfigError, match="unknown task 'summ'; the recipe's tasks are sum, mood"):
        export(finished_run / "run", tmp_path / "out", static_weights="task=summ", progress=False)


def test_static_weights_without_a_router_are_refused(tmp_path):
    saved(tmp_path / "adapter", "llama", EXACT["one expert"])
    with pytest.raises(ConfigError, match="has no router; leave out the option"):
        export(tmp_path / "adapter", static_weights="uniform")


def test_options_that_would_do_nothing_to_an_exact_export_are_refused(finished_run, tmp_path):
    saved(tmp_path / "adapter", "llama", EXACT["one expert"])
    for given in ({"base": "x"}, {"recipe": "demo"}, {"weights_from": finished_run / "run"}):
        with pytest.raises(
            ConfigError, match=r"has no effect here: .* the exported LoRA equals the adapter exactly"
        ):
            export(tmp_path / "adapter", **given)
    with pytest.raises(ConfigError, match=r"--weights-from has no effect here: it is for"):
        export(finished_run / "run", static_weights="uniform", weights_from=finished_run / "run")


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder; expected a run directory or an adapter folder"):
        export(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is a base model"):
        export(embedded_base_path(), tmp_path / "out")
    loha = peft.LoHaConfig(target_modules=["q_proj"], r=2)
    peft.get_peft_model(base("llama"), loha).save_pretrained(tmp_path / "loha")
    with pytest.raises(ConfigError, match="type LOHA has no exact LoRA form"):
        export(tmp_path / "loha")


def test_pickled_and_damaged_adapters_are_refused(tmp_path):
    saved(tmp_path / "adapter", "llama", EXACT["factored"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        export(tmp_path / "adapter")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickle"):
        export(tmp_path / "adapter")
    assert not (tmp_path / "adapter-lora").exists()


def test_what_stands_at_the_output_is_not_lost(tmp_path, monkeypatch):
    saved(tmp_path / "adapter", "llama", EXACT["factored"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="contains files that are not from an export"):
            export(tmp_path / "adapter", out, overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "years of work"
    export(tmp_path / "adapter", tmp_path / "lora")
    before = (tmp_path / "lora" / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match=r"contains an earlier export\. --overwrite replaces it"):
        export(tmp_path / "adapter", tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"model\.path"):  # fails after the first files are written
        export(tmp_path / "adapter", tmp_path / "lora", overwrite=True, merge=True, base="./no-such-base")
    assert (tmp_path / "lora" / "manifest.json").read_bytes() == before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            return write_lora(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr("braidlora.export.run.write_lora", on_a_full_disk)
        with pytest.raises(
            TrainingError, match=r"lora: cannot be written: .*The earlier export is unchanged"
        ):
            export(tmp_path / "adapter", tmp_path / "lora", overwrite=True)
    assert (tmp_path / "lora" / "manifest.json").read_bytes() == before
    export(tmp_path / "adapter", tmp_path / "lora", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora", "out"]


def test_an_export_that_a_kill_left_aside_comes_back(tmp_path):
    """On a file system that cannot exchange two folders the old one steps aside for a moment."""
    saved(tmp_path / "adapter", "llama", EXACT["factored"])
    lora = tmp_path / "lora"
    export(tmp_path / "adapter", lora)
    before = (lora / "manifest.json").read_bytes()
    lora.rename(tmp_path / ".lora.replaced")
    with pytest.raises(ConfigError, match="contains an earlier export"):
        export(tmp_path / "adapter", lora)
    assert (lora / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora"]


def test_an_output_without_a_name(tmp_path, monkeypatch):
    """`.` is the working directory, `/` can be no export, and `~` is a home folder."""
    saved(tmp_path / "adapter", "llama", EXACT["factored"])
    for wrong, message in (
        ("", "is empty"),
        (" ", "is empty"),
        ("/", "cannot be an export"),
        ("a\0b", "null character"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(tmp_path / "adapter", wrong)
    with pytest.raises(ConfigError, match="home folder ~nobody-of-this-name is unknown"):
        export(tmp_path / "adapter", "~nobody-of-this-name/out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export(tmp_path / "adapter", ".")["directory"] == str(tmp_path / "here")
    assert (tmp_path / "here" / "adapter_model.safetensors").is_file()
    assert export(tmp_path / "adapter", "~/out")["directory"] == str(tmp_path / "out")
