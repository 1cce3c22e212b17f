"""Time of cached greedy decoding, prefill and scoring: base model, PEFT LoRA, and braidlora's adapters.

    python benchmarks/decode.py                      # SmolLM2's widths, 12 layers; bf16 and float32; batch 1 and 8
    python benchmarks/decode.py --quick              # 4 layers, fewer rounds, under a minute
    python benchmarks/decode.py --device cuda

Each model has a cache of its own and they take turns token by token, in changing order, so a slowdown of the machine
affects all of them. A ratio is the median, over all tokens of all rounds, of the ratios of one turn. With one thread on
a CPU the time is the thread's CPU time, which leaves out other processes' turns; otherwise it is wall-clock time.

All models have the same base weights, adapters on all linear layers with random factors, and float32 adapter weights,
PEFT's default under a 16-bit base. `logits` is the largest difference of decoded logits from those of the same model in
a wider dtype (float32 for bf16, float64 for float32), as a share of the largest logit.

Results go to benchmarks/results/decode-DEVICE.json, row by row.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from braidlora import FactoredLoraConfig, MultiLoraConfig
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
COMMON = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
CONFIGS: dict[str, Any] = {
    "peft_lora": lambda: LoraConfig(**COMMON, init_lora_weights=False),
    "alora": lambda: MultiLoraConfig(**COMMON, share="B", num_experts=3, init_weights=False),
    "hydralora": lambda: MultiLoraConfig(**COMMON, share="A", num_experts=3, init_weights=False),
    "moelora": lambda: MultiLoraConfig(**COMMON, share="none", num_experts=3, init_weights=False),
    "factored": lambda: FactoredLoraConfig(**COMMON, r_intermediate=16, init_weights=False),
}
GOALS = {"alora": 1.10, "hydralora": 1.10, "moelora": 1.10, "factored": 1.10}  # of PEFT LoRA's decoding time
PROMPT = 64
WHAT = ["decode", "prefill", "score"]


def build(
    layers: int, vocab: int, dtype: torch.dtype, device: str, methods: Iterable[str] = CONFIGS
) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = SMOLLM2 | {"num_hidden_layers": layers, "vocab_size": vocab}
    base = LlamaForCausalLM(LlamaConfig(**sizes)).to(device, dtype).eval().requires_grad_(False)
    models: dict[str, Any] = {"base": base}
    for name in dict.fromkeys(("peft_lora", *methods)):
        torch.manual_seed(1)
        # The base weights are shared: their memory traffic is that of one model, whoever's turn it is.
        models[name] = get_peft_model(_with_same_weights(base), CONFIGS[name]()).eval()
    return models


def _with_same_weights(base: LlamaForCausalLM) -> LlamaForCausalLM:
    memo = {id(parameter): parameter for parameter in base.parameters()}
    return copy.deepcopy(base, memo)


class Timer:
    """Takes turns: every round calls each step once, the first one a different one each time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cpu_time = device == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if self.cpu_time else time.perf_counter

    def __call__(self, step: Callable[[], object]) -> float:
        self._wait()
        start = self.clock()
        step()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def summary(times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Milliseconds per turn (median and smallest), tokens per second, and ratios to the base and PEFT LoRA."""
    found: dict[str, Any] = {
        "ms": {name: round(1000 * statistics.median(taken), 4) for name, taken in times.items()},
        "ms_smallest": {name: round(1000 * min(taken), 4) for name, taken in times.items()},
        "tokens_per_second": {
            name: round(tokens / statistics.median(taken), 1) for name, taken in times.items()
        },
    }
    for reference in ("base", "peft_lora"):
        found[f"ratio_to_{reference}"] = {
            name: round(statistics.median(a / b for a, b in zip(taken, times[reference], strict=True)), 4)
            for name, taken in times.items()
            if name != reference
        }
    return found


def in_turn(
    timer: Timer, steps: dict[str, Callable[[], object]], times: dict[str, list[float]], turn: int
) -> None:
    names = list(steps)
    shift = turn % len(names)
    for name in names[shift:] + names[:shift]:
        times[name].append(timer(steps[name]))


@torch.inference_mode()
def decode(models: dict[str, Any], batch: int, tokens: int, rounds: int, device: str) -> dict[str, Any]:
    """Greedy decoding with a cache after a prompt of `PROMPT` tokens, one token per turn."""
    timer = Timer(device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        torch.manual_seed(round_)
        ids = torch.randint(0, models["base"].config.vocab_size, (batch, PROMPT), device=device)
        state: dict[str, tuple[Tensor, DynamicCache]] = {}
        for name, model in models.items():
            cache = DynamicCache(config=model.config)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]
            state[name] = logits.argmax(-1), cache

        def step(name: str, state: dict[str, Any] = state) -> None:
            following, cache = state[name]
            logits = models[name](input_ids=following, past_key_values=cache, use_cache=True).logits
            state[name] = logits[:, -1:].argmax(-1), cache

        steps = {name: (lambda name=name, step=step: step(name)) for name in models}
        kept = times if round_ else {name: [] for name in models}  # the first round warms up
        for token in range(tokens if round_ else 4):
            in_turn(timer, steps, kept, token)
    return {"new_tokens": tokens, "rounds": rounds, "clock": timer.clock.__name__, **summary(times, batch)}


@torch.inference_mode()
def forwards(
    models: dict[str, Any], batch: int, length: int, rounds: int, device: str, last: bool
) -> dict[str, Any]:
    """A forward of `batch` × `length` tokens: the logits of the `last` token (prefill), or of all (scoring)."""
    timer = Timer(device)
    times: dict[str, list[float]] = {name: [] for name in models}
    ids = torch.randint(0, models["base"].config.vocab_size, (batch, length), device=device)
    keep = {"logits_to_keep": 1} if last else {}
    steps = {
        name: (lambda model=model: model(input_ids=ids, use_cache=last, **keep))
        for name, model in models.items()
    }
    for round_ in range(rounds + 1):
        in_turn(timer, steps, times if round_ else {name: [] for name in models}, round_)
    return {
        "length": length, "rounds": rounds, "clock": timer.clock.__name__, **summary(times, batch * length)
    }  # fmt: skip


@torch.inference_mode()
def rounding(models: dict[str, Any], device: str) -> dict[str, float]:
    """The largest difference of decoded logits from those of the same model in a wider dtype, to the largest logit."""
    torch.manual_seed(3)
    ids = torch.randint(0, models["base"].config.vocab_size, (2, 8), device=device)
    found = {}
    for name, model in models.items():
        ours = decoded_logits(model, ids).double()
        # A copy: the base weights are shared.
        wide = torch.float32 if models["base"].dtype == torch.bfloat16 else torch.float64
        right = decoded_logits(copy.deepcopy(model).to(wide), ids).double()
        found[name] = float((ours - right).abs().max() / right.abs().max())
    return found


def decoded_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, L − 4, V) of the tokens after the fourth, fed one by one."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    return torch.cat(
        [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(4, ids.shape[1])
        ],
        1,
    )


def run(arguments: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Measure all rows; `keep` is called after each, so that an interrupted run keeps its results."""
    rows: list[dict[str, Any]] = []
    layers = 4 if arguments.quick else 12
    for dtype in arguments.dtypes:
        models = build(layers, arguments.vocab, getattr(torch, dtype), arguments.device, arguments.methods)
        logits = rounding(models, arguments.device)
        for what in arguments.what:
            for batch in arguments.batches:
                row = {
                    "benchmark": what, "device": arguments.device, "base": dtype, "adapter": "float32",
                    "layers": layers, "vocabulary": arguments.vocab, "batch": batch,
                    **measure(what, models, batch, arguments),
                }  # fmt: skip
                rows.append(row | ({"logits": logits} if what == "decode" else {}))
                show(rows[-1])
                keep(rows)
    return rows


def measure(what: str, models: dict[str, Any], batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rounds = arguments.rounds or (2 if arguments.quick else 4)
    if what == "decode":
        return decode(models, batch, arguments.tokens, rounds, arguments.device)
    return forwards(models, batch, PROMPT // 2, 2 * rounds, arguments.device, what == "prefill")


def show(row: dict[str, Any]) -> None:
    print(f"{row['benchmark']}, batch {row['batch']}, base {row['base']}, {row['layers']} layers")
    for name, ms in row["ms"].items():
        ratios = [
            f"{row[key][name]:.3f} of {key.removeprefix('ratio_to_')}"
            for key in ("ratio_to_peft_lora", "ratio_to_base")
            if name in row[key]
        ]
        logits = f", logits within {row['logits'][name]:.1e}" if name in row.get("logits", {}) else ""
        print(f"  {name:10} {ms:9.3f} ms  {', '.join(ratios)}{logits}")
    sys.stdout.flush()


def check(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check the goal on every decoding row."""
    return [
        {
            "row": f"batch {row['batch']}, base {row['base']}", "what": f"{name} against PEFT LoRA",
            "value": row["ratio_to_peft_lora"][name], "at_most": limit,
            "met": row["ratio_to_peft_lora"][name] <= limit,
        }
        for row in rows
        if row["benchmark"] == "decode"
        for name, limit in GOALS.items()
        if name in row["ms"]
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="4 layers, fewer rounds")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--methods", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, default=24, help="new tokens per round")
    parser.add_argument("--rounds", type=int, help="default: 4; 2 with --quick")
    parser.add_argument("--vocab", type=int, default=SMOLLM2["vocab_size"], help="size of the vocabulary")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/decode-DEVICE.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; omit the option to measure on the CPU")
    torch.set_num_threads(arguments.threads)
    out = arguments.out or RESULTS / f"decode-{arguments.device}{'-quick' if arguments.quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "environment": environment(),
        "rank": COMMON["r"],
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        temporary = out.with_name(f".{out.name}")
        temporary.write_text(json.dumps({**report, "rows": rows, "goals": check(rows)}, indent=1) + "\n")
        os.replace(temporary, out)

    for goal in check(run(arguments, keep)):
        verdict = "met" if goal["met"] else "MISSED"
        print(
            f"{verdict}: {goal['value']:.3f}, at most {goal['at_most']:.2f}: {goal['what']} ({goal['row']})"
        )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
