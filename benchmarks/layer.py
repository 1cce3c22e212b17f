"""Time of one adapted layer, forward and backward, compared with alternatives; and of a training step of a small Llama.

    python benchmarks/layer.py                  # CPU: widths 576, 2048, 4096; 3 and 8 experts; 2048 tokens
    python benchmarks/layer.py --quick          # width 576 and the step, in under a minute
    python benchmarks/layer.py --device cuda    # 16-bit base; float32 and 16-bit adapters; with and without launch time
    python benchmarks/layer.py --compiled       # also each variant under torch.compile
    python benchmarks/layer.py --others         # also unsloth's LoRA, if installed
    python benchmarks/layer.py --overhead       # width 64, 8 tokens, one thread: what calls cost

All variants of a row take turns in one process, and the ratios are medians over rounds of the ratios within a round,
so a slowdown of the machine affects both sides. Results go to benchmarks/results/layer-DEVICE.json, row by row.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from braidlora import MultiLoraConfig

RESULTS = Path(__file__).parent / "results"
RANK, ALPHA = 8, 16


class OneLayer(nn.Module):
    """A model with a single linear layer for PEFT to adapt."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, width, bias=False, dtype=dtype, device=device).requires_grad_(False)


class ExpertLoop(nn.Module):
    """y = W0 x + s Σᵢ wᵢ(x) B Aᵢ x as a loop over the experts: each is computed at full width before weighting."""

    def __init__(self, base: nn.Linear, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        width, kind = base.in_features, {"dtype": dtype, "device": base.weight.device}
        self.base = base
        self.A = nn.ModuleList(nn.Linear(width, RANK, bias=False, **kind) for _ in range(experts))
        self.B = nn.Linear(RANK, width, bias=False, **kind)
        self.router = nn.Linear(width, experts, bias=False, **kind)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x = x.to(self.router.weight.dtype)
        weights = torch.softmax(self.router(x), -1, dtype=torch.float32).to(x.dtype)
        for i, A in enumerate(self.A):
            y = y + weights[..., i : i + 1] * self.B(A(x)) * (ALPHA / RANK)
        return y.to(self.base.weight.dtype)


class Unsloth(nn.Module):
    """One LoRA by unsloth's fused autograd function, on the same base layer."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        from unsloth.kernels.fast_lora import LoRA_W

        kind = {"dtype": dtype, "device": base.weight.device}
        self.base, self.function = base, LoRA_W
        self.A = nn.Parameter(torch.randn(RANK, base.in_features, **kind) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, RANK, **kind))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function.apply(x.unsqueeze(0), self.base.weight, None, self.A, self.B, ALPHA / RANK)
        return y.squeeze(0)


def other_variants(base: nn.Linear, dtype: torch.dtype) -> dict[str, nn.Module]:
    """LoRA layers of other installed libraries; reports those that are missing."""
    if importlib.util.find_spec("unsloth") is None:
        print("unsloth is not installed: skipped")
        return {}
    return {"unsloth_lora": Unsloth(base, dtype)}


def adapted(width: int, config: object, dtype: torch.dtype, adapter: torch.dtype, device: str) -> nn.Module:
    model = get_peft_model(OneLayer(width, dtype, device), config, autocast_adapter_dtype=adapter != dtype)
    return model.base_model.model.layer.train()


def layer_variants(
    width: int, experts: int, dtype: torch.dtype, adapter: torch.dtype, device: str
) -> dict[str, nn.Module]:
    base = OneLayer(width, dtype, device).layer
    common = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": ["layer"]}

    def ours(share: str) -> nn.Module:
        config = MultiLoraConfig(share=share, num_experts=experts, **common)
        return adapted(width, config, dtype, adapter, device)

    return {
        "frozen": base,
        "loop": ExpertLoop(base, experts, adapter),
        "peft_lora": adapted(width, LoraConfig(**common), dtype, adapter, device),
        "alora": ours("B"),
        "hydralora": ours("A"),
    }


def layer_step(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def step() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        layer(x).backward(upstream)

    return step


def llama_steps(device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Forward, backward and AdamW of a four-layer Llama of width 576 with 1024 tokens; q_proj and v_proj adapted."""
    sizes = {
        "vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    ids = torch.randint(0, 4096, (4, 256), device=device)
    common = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    configs = {"frozen": None, "peft_lora": LoraConfig(**common)}
    configs |= {f"alora_{n}": MultiLoraConfig(share="B", num_experts=n, **common) for n in (3, 8)}
    configs["hydralora_3"] = MultiLoraConfig(share="A", num_experts=3, **common)
    steps = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(device=device, dtype=dtype)
        model.requires_grad_(False)
        model.enable_input_require_grads()  # the frozen base also passes gradients down to its first layer
        model = model if config is None else get_peft_model(model, config)
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer | None = optimizer) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        steps[name] = step
    return steps


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph: device time without Python's launch time."""
    gc.collect()  # cycles of eager steps keep the nodes of their gradients, whose stream a capture must not wait for
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def seconds(step: Callable[[], None], device: str, repeats: int) -> float:
    if device == "cpu":
        # With one thread its own time, without that of others on the machine.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        for _ in range(repeats):
            step()
        return (clock() - start) / repeats
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeats):
        step()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1000 / repeats


def measure(
    steps: dict[str, Callable[[], None]], device: str, rounds: int, repeats: int
) -> dict[str, object]:
    """Median milliseconds of each variant, and paired ratios of each to the reference variants."""
    names, times = list(steps), {name: [] for name in steps}
    for name in names:
        seconds(steps[name], device, 2)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # vary which variant follows which
            times[name].append(seconds(steps[name], device, repeats))
    result: dict[str, object] = {
        "ms": {name: round(1000 * statistics.median(times[name]), 4) for name in names}
    }
    for reference in ("frozen", "loop", "peft_lora"):
        if reference in times:
            result[f"ratio_to_{reference}"] = {
                name: round(
                    statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True)), 3
                )
                for name in names
                if name != reference
            }
    return result


def saved_mib(layer: nn.Module, x: Tensor) -> float:
    """Activations saved for backward, without x and the parameters, in MiB."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)  # kept alive until all storages are counted, so that no address is reused
    for tensor in [x, *layer.parameters()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return round(sum(kept.values()) / 2**20, 3)


GOALS = [
    # (device, benchmark, width, experts, ratio, variant, at most)
    ("cpu", "layer", 576, 3, "ratio_to_loop", "alora", 0.65),
    ("cpu", "layer", 576, 8, "ratio_to_loop", "alora", 0.45),
    ("cpu", "layer", None, 3, "ratio_to_peft_lora", "alora", 1.10),
    ("cpu", "layer", None, 8, "ratio_to_peft_lora", "alora", 1.25),
    ("cpu", "overhead", 64, 3, "ratio_to_peft_lora", "alora", 2.00),
    ("cpu", "llama step", 576, None, "ratio_to_frozen", "alora_3", 1.10),
    ("cuda", "layer", 4096, 3, "ratio_to_peft_lora", "alora", 0.95),
]


def check(rows: list[dict]) -> list[dict]:
    """Check every goal on every row that it applies to."""
    checked = []
    for device, benchmark, width, experts, ratio, variant, limit in GOALS:
        for row in rows:
            if row["device"] != device or row["benchmark"] != benchmark:
                continue
            if width not in (None, row["width"]) or experts not in (None, row.get("experts")):
                continue
            what = f"{variant} {ratio}" + (f", {row['experts']} experts" if "experts" in row else "")
            value = row[ratio][variant]
            checked.append(
                {
                    "row": f"{label(row)}",
                    "what": what,
                    "value": value,
                    "at_most": limit,
                    "met": value <= limit,
                }
            )
    return checked


def label(row: dict) -> str:
    parts = [row["benchmark"], f"width {row['width']}", f"{row['tokens']} tokens"]
    parts += [f"{row['experts']} experts"] if "experts" in row else []
    return ", ".join([*parts, f"base {row['base']}, adapter {row['adapter']}", row["timing"]])


def machine(device: str) -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def run_overhead(arguments: argparse.Namespace, keep: Callable[[list[dict]], None]) -> list[dict]:
    """One layer so small that starting its operations is all that takes time."""
    device, width, tokens, experts = arguments.device, 64, 8, 3
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)
        upstream = torch.randn_like(x)
        layers = layer_variants(width, experts, dtype, torch.float32, device)
        steps = {name: layer_step(layer, x, upstream) for name, layer in layers.items()}
        rows.append(
            {
                "benchmark": "overhead", "device": device, "width": width, "tokens": tokens, "experts": experts,
                "base": str(dtype)[6:], "adapter": "float32", "timing": "eager",
                **measure(steps, device, arguments.rounds or 40, 50),
            }
        )  # fmt: skip
        show(rows[-1])
        keep(rows)
    return rows


def run(arguments: argparse.Namespace, keep: Callable[[list[dict]], None]) -> list[dict]:
    """Measure all rows; `keep` is called after each, so that an interrupted run keeps its results."""
    device, quick = arguments.device, arguments.quick
    widths = [576] if quick else arguments.widths
    tokens_list = arguments.tokens or ([2048] if device == "cpu" or quick else [2048, 4096])
    precisions = [(torch.float32, torch.float32)]
    if device == "cuda" or arguments.precision == "mixed":
        precisions = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
    timings = ["eager", "captured"] if device == "cuda" else ["eager"]
    timings += ["compiled"] if arguments.compiled else []
    rows = []
    for width in widths:
        repeats = (3 if width < 1024 else 1) if device == "cpu" else 20
        rounds = arguments.rounds or (7 if quick or (device == "cpu" and width > 1024) else 15)
        for tokens in tokens_list:
            for dtype, adapter in precisions:
                for experts in (3, 8):
                    x = torch.randn(tokens, width, dtype=dtype, device=device, requires_grad=True)
                    upstream = torch.randn_like(x)
                    layers = layer_variants(width, experts, dtype, adapter, device)
                    if arguments.others:
                        layers |= other_variants(layers["frozen"], adapter)
                    saved = {name: saved_mib(layer, x) for name, layer in layers.items()}
                    for timing in timings:
                        steps = {name: layer_step(layer, x, upstream) for name, layer in layers.items()}
                        if timing == "captured":
                            steps = {name: captured(step) for name, step in steps.items()}
                        if timing == "compiled":
                            torch.compiler.reset()
                            steps = {
                                name: layer_step(torch.compile(layer), x, upstream)
                                for name, layer in layers.items()
                                if name != "unsloth_lora"  # custom kernels; dynamo breaks the graph there
                            }
                        rows.append(
                            {
                                "benchmark": "layer",
                                "device": device,
                                "width": width,
                                "tokens": tokens,
                                "experts": experts,
                                "base": str(dtype)[6:],
                                "adapter": str(adapter)[6:],
                                "timing": timing,
                                "saved_mib": saved,
                                **measure(steps, device, rounds, repeats),
                            }
                        )
                        show(rows[-1])
                        keep(rows)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    # The ratio of a step is near 1, and varies by several percent per round on a shared machine.
    rounds = arguments.rounds or (7 if quick else 45)
    steps = llama_steps(device, dtype)
    rows.append(
        {
            "benchmark": "llama step",
            "device": device,
            "width": 576,
            "tokens": 1024,
            "base": str(dtype)[6:],
            "adapter": "float32",
            "timing": "eager",
            **measure(steps, device, rounds, 1 if device == "cpu" else 10),
        }
    )
    show(rows[-1])
    keep(rows)
    return rows


def show(row: dict) -> None:
    print(label(row))
    for name, ms in row["ms"].items():
        ratios = [
            f"{row[key][name]:.2f} of {key.removeprefix('ratio_to_')}"
            for key in ("ratio_to_loop", "ratio_to_peft_lora", "ratio_to_frozen")
            if name in row.get(key, {})
        ]
        saved = f", keeps {row['saved_mib'][name]:.2f} MiB" if "saved_mib" in row else ""
        print(f"  {name:12} {ms:9.3f} ms  {', '.join(ratios)}{saved}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="width 576 only, fewer rounds")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 2048, on CUDA 2048 and 4096")
    parser.add_argument(
        "--rounds",
        type=int,
        help="default: 15 (45 for the step); 7 with --quick and for wide layers on a CPU",
    )
    parser.add_argument("--precision", choices=["mixed"], help="also 16-bit bases on a CPU (always on CUDA)")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--others", action="store_true", help="also LoRA layers of other installed libraries")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--overhead", action="store_true", help="one small layer alone, on one CPU thread")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/layer-DEVICE.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; omit the option to measure on the CPU")
    if arguments.overhead and (
        arguments.quick or arguments.compiled or arguments.others or arguments.threads or arguments.precision
    ):
        parser.error("--overhead takes only --device, --rounds and --out")
    if arguments.threads or arguments.overhead:
        torch.set_num_threads(arguments.threads or 1)
    kind = "-overhead" if arguments.overhead else ""
    out = (
        arguments.out or RESULTS / f"layer{kind}-{arguments.device}{'-quick' if arguments.quick else ''}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": " ".join(["python", "benchmarks/layer.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(arguments.device),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")},
        "rank": RANK,
    }

    def keep(rows: list[dict]) -> None:
        temporary = out.with_name(f".{out.name}")
        temporary.write_text(json.dumps({**report, "rows": rows, "goals": check(rows)}, indent=1) + "\n")
        os.replace(temporary, out)

    for goal in check((run_overhead if arguments.overhead else run)(arguments, keep)):
        verdict = "met" if goal["met"] else "MISSED"
        print(
            f"{verdict}: {goal['value']:.2f}, at most {goal['at_most']:.2f}: {goal['what']} ({goal['row']})"
        )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
