"""`predict` and `generate` against a server that answers as vLLM's does, with the model that it stands for."""

import http.server
import json
import threading

import pytest
import torch

from braidlora.inference.loading import load


class Handler(http.server.BaseHTTPRequestHandler):
    """The part of vLLM's /v1/models and /v1/completions that is used, one prompt after the other."""

    def do_GET(self):
        self.reply({"data": [{"id": name, "owned_by": "vllm"} for name in ("base", "alora")]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        prompts = body["prompt"]
        assert all(isinstance(token, int) for prompt in prompts for token in prompt)
        choices = [{"index": index, **self.answer(ids, body)} for index, ids in enumerate(prompts)]
        self.reply({"choices": choices[::-1]})  # in another order, which the index tells

    def answer(self, ids, body):
        network, tokenizer = self.server.model.network, self.server.model.tokenizer
        with torch.inference_mode():
            logprobs = torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), -1)
            new = []
            while len(new) < body["max_tokens"]:
                logits = network(torch.tensor([[*ids, *new]])).logits[0, -1]
                new.append(int(logits.argmax()))
                if new[-1] in body.get("stop_token_ids", []):
                    new.pop()
                    break
        scores = [None] + [
            {str(ids[t]): {"logprob": float(logprobs[t - 1, ids[t]])}} for t in range(1, len(ids))
        ]
        return {
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "prompt_logprobs": scores if "prompt_logprobs" in body else None,
        }

    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(runs):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        found.model, found.bodies = load(runs["alora"]), []
        found.url = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--prompt=what comes next: a b", "--prompt=x", "--max-new-tokens=6", "--json"),
        ("generate", "--prompt=1 2 3", "--raw", "--json"),
        (
            "predict",
            "--task=rising",
            "--text=1 2 3",
            "--text=5",
            "--text=2 4",
            "--batch-size=2",
            "--mode=generate",
        ),
        ("predict", "--task=mood", "--text=fine", "--text=awful", "--mode=rank"),
    ],
)
def test_answers_are_those_of_the_model(server, runs, command, words):
    verb, *rest = words
    code, own, err = command(verb, runs["alora"], *rest)
    assert code == 0, err
    code, remote, err = command(verb, runs["alora"], *rest, "--url", server.url)
    assert code == 0, err
    for one, other in zip(own.splitlines(), remote.splitlines(), strict=True):
        one, other = json.loads(one), json.loads(other)
        assert one.pop("probabilities", {}) == pytest.approx(other.pop("probabilities", {}), abs=1e-5)
        assert one == other


def test_settings_are_explicit_and_the_seed_is_sent(server, runs, command):
    code, _, err = command(
        "generate", runs["alora"], "--prompt=a", "--temperature=0.5", "--top-p=0.9", "--top-k=4", "--seed=3",
        "--stop=END", "--max-new-tokens=2", "--url", server.url,
    )  # fmt: skip
    assert code == 0, err
    body = server.bodies[-1]
    expected = {
        "model": "alora", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 3, "stop": ["END"],
        "repetition_penalty": 1.0,
    }  # fmt: skip
    assert {name: body[name] for name in expected} == expected
    assert body["stop_token_ids"]


def test_another_name_at_the_server(server, runs, command):
    assert command("generate", runs["lora"], "--prompt=a", "--max-new-tokens=1", "--url", server.url)[0] == 2
    words = (
        "generate",
        runs["lora"],
        "--prompt=a",
        "--max-new-tokens=1",
        "--url",
        server.url,
        "--model=alora",
    )
    assert command(*words)[0] == 0
    assert server.bodies[-1]["model"] == "alora"


def test_beams_are_not_for_a_server(server, runs, command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (runs["alora"] / "config.yaml").read_text()
    recipe.write_text(text.replace("num_beams: 1", "num_beams: 2"))
    assert "num_beams: 2" in recipe.read_text()
    words = ("predict", runs["alora"], "--recipe", recipe, "--task=rising", "--text=1", "--mode=generate")
    code, _, err = command(*words, "--url", server.url)
    assert code == 2
    assert "uses 2 beams" in err
