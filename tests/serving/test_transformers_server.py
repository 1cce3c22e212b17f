"""`braidlora serve --engine transformers`, and `predict` and `generate` against it."""

import json
import shutil

import peft
import pytest
from servers import ask, served
from small_models import on_embedded
from transformers import AutoTokenizer

from braidlora.errors import ConfigError
from braidlora.models.location import resolve_path
from braidlora.serving import transformers_server

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="transformers' server needs it: pip install 'braidlora[serve]'")

from fastapi.testclient import TestClient  # noqa: E402 (if it is there)

KEY = "sk-0123456789abcdef"

CAUSAL = {"task_type": "CAUSAL_LM"}
PROMPT = "what comes next: a b"
# Adapters that act in PEFT's own `generate`, and one whose configuration has fields of other meaning than LoRA's.
FOREIGN = {
    "prompts": peft.PromptTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "encoder": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, **CAUSAL),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL),
    "activated": peft.LoraConfig(target_modules=["q_proj", "v_proj"], **CAUSAL),
    "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "v_proj"], **CAUSAL),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The folders of adapters of PEFT's other types, by name."""
    tokens = AutoTokenizer.from_pretrained(resolve_path("embedded"))(PROMPT)["input_ids"]
    FOREIGN["activated"].alora_invocation_tokens = tokens[-3:-1]
    folder = tmp_path_factory.mktemp("foreign")
    return {name: on_embedded(folder / name, config) for name, config in FOREIGN.items()}


@pytest.fixture(scope="module")
def url(runs, foreign, tmp_path_factory):
    others = (f"{name}={path}" for name, path in foreign.items())
    words = (runs["alora"], f"plain={runs['lora']}", *others, "--engine", "transformers")
    log = tmp_path_factory.mktemp("server") / "log"
    with served(*words, log=log, seconds=240, environment={"BRAIDLORA_API_KEY": KEY}) as url:
        yield url


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("BRAIDLORA_API_KEY", KEY)


def test_models_are_the_base_and_the_adapters(url):
    status, answer = ask(url, "/v1/models", key=KEY)
    assert status == 200
    assert [one["id"] for one in answer["data"]] == ["base", "alora", "plain", *FOREIGN]


def test_the_key(url):
    for path, body in (
        ("/v1/models", None),
        ("/v1/completions", {"model": "alora", "prompt": "a"}),
        ("/reset", {}),
    ):
        assert ask(url, path, body)[0] == 401
        assert ask(url, path, body, key="another")[0] == 401
    assert ask(url, "/health")[0] == 200


def test_nothing_else_is_loaded(url, runs):
    for name in (str(runs["lora"] / "adapter"), "owner/name", "../x"):
        status, answer = ask(url, "/v1/completions", {"model": name, "prompt": "a"}, key=KEY)
        assert status == 404
        assert "there are base, alora, plain, prompts" in str(answer)
        assert ask(url, "/load_model", {"model": name}, key=KEY)[0] == 404


@pytest.mark.parametrize("method", ["alora", "lora"])
def test_generate_and_predict_say_what_they_say_without_a_server(url, runs, command, method):
    name = ["--model", "plain"] if method == "lora" else []
    for words in (
        (
            "generate",
            runs[method],
            "--prompt",
            "what comes next: a b",
            "--prompt",
            "x",
            "--max-new-tokens=6",
            "--json",
        ),
        ("predict", runs[method], "--task=rising", "--text", "1 2 3", "--text", "5", "--mode=generate"),
    ):
        code, own, err = command(*words)
        assert code == 0, err
        code, remote, err = command(*words, "--url", url, *name)
        assert code == 0, err
        assert [json.loads(line) for line in remote.splitlines()] == [
            json.loads(line) for line in own.splitlines()
        ]


@pytest.mark.parametrize("name", FOREIGN)
def test_other_types_of_peft_answer_as_without_a_server(url, foreign, command, name):
    words = ("--prompt", PROMPT, "--max-new-tokens=6")
    own, remote, base = (
        command("generate", *target, *words)
        for target in ((foreign[name],), (foreign[name], "--url", url, "--model", name), ("embedded",))
    )
    assert remote == own
    assert own[0] == 0
    assert own[1] != base[1]


def test_what_is_loaded_is_quantized_as_in_training(runs, tmp_path, monkeypatch):
    sections = {}

    def load(target):
        sections[target.given] = target.section
        raise ConfigError("only looking")

    monkeypatch.setattr(transformers_server, "load_target", load)
    folder = tmp_path / "copy"
    shutil.copytree(runs["lora"] / "adapter", folder)
    (folder / "manifest.json").unlink()
    card = json.loads((folder / "braidlora.json").read_text())
    card["base"]["quantization"] = "8bit"
    (folder / "braidlora.json").write_text(json.dumps(card))
    base = resolve_path("embedded")
    app = transformers_server.application(base, {"one": str(folder)}, quantization="4bit")
    client = TestClient(app)
    for name in ("base", "one"):
        answer = client.post("/v1/completions", json={"model": name, "prompt": "a"})
        assert (answer.status_code, answer.json()) == (500, {"detail": "only looking"})
    assert {given: section.quantization for given, section in sections.items()} == {
        base: "4bit",
        str(folder): "8bit",
    }


def test_rank_needs_vllm(url, runs, command):
    code, _, err = command(
        "predict", runs["alora"], "--task=mood", "--text=fine", "--mode=rank", "--url", url
    )
    assert code == 2
    assert "only vLLM's server returns the log-likelihoods" in err


def test_chat(url):
    body = {"model": "alora", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    status, _ = ask(url, "/v1/chat/completions", body, key=KEY)
    assert status in (200, 400, 500)  # the embedded base has no chat template; the server lives on
    assert ask(url, "/health")[0] == 200
