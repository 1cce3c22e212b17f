"""Bases and adapters for engines of vLLM, and what PEFT says to the same requests."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("vllm_engine.py")
# Heads divide by two for tensor parallelism; the head size is one that vLLM's CPU attention has.
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.08,
}  # fmt: skip
PROMPTS = [[1, 40, 50, 60, 70], [1, *range(100, 140)], [1, 7, 7, 7, 9, 300, 301, 302, 303]]


def random_base(folder):
    """A small Llama whose next tokens are far from ties."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def random_adapter(base, folder, config, seed):
    """An adapter with all factors random and large enough to change the base's tokens."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def run_engine(tmp_path, base, adapters, rounds, *, max_tokens=12, python=sys.executable, **engine):
    """What `vllm_engine.py` answers: by round, by request."""
    settings = {
        "model": str(base), "dtype": "float32", "max_model_len": 256, "max_lora_rank": 32,
        "max_loras": len(adapters), "skip_tokenizer_init": True, "enable_prefix_caching": False, **engine,
    }  # fmt: skip
    request = {
        "engine": settings,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "rounds": rounds,
        "max_tokens": max_tokens,
    }
    file = tmp_path / "requests.json"
    file.write_text(json.dumps(request))
    done = subprocess.run([python, WORKER, file], capture_output=True, text=True, timeout=1500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(lines[-1].removeprefix("RESULT "))


class Reference:
    """PEFT's log-probabilities for what a server answered."""

    def __init__(self, base, adapters):
        self.base, self.adapters, self.models = base, adapters, {}

    def model(self, name):
        if name not in self.models:
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            if name is not None:
                model = PeftModel.from_pretrained(model, self.adapters[name])
            self.models[name] = model.eval()
        return self.models[name]

    def check(self, name, prompt, answer, tolerance=1e-4):
        """Every token is the one that PEFT would choose after the tokens before it, with the same log-probability."""
        tokens = torch.tensor(answer["tokens"])
        with torch.inference_mode():
            logits = self.model(name)(torch.tensor([[*prompt, *answer["tokens"]]])).logits[0]
        logprobs = torch.log_softmax(logits.float(), -1)[len(prompt) - 1 : -1]
        assert torch.equal(logprobs.argmax(-1), tokens), (name, prompt, answer)
        own = logprobs.gather(-1, tokens[:, None])[:, 0]
        error = (own - torch.tensor(answer["logprobs"])).abs().max().item()
        assert error <= tolerance, (name, error)
        return error
