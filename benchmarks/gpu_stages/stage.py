"""Code shared by all stages: options, a results file written after every row, and paired timings."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from braidlora.runs import environment


class Result:
    """One stage's JSON: `{"stage", "device", "environment", "rows"}`, rewritten after every row."""

    def __init__(self, name: str, device: str, out: Path) -> None:
        self.device, self.out = device, out
        self.content: dict[str, Any] = {
            "stage": name,
            "device": device,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "environment": environment(),
            "rows": [],
        }
        self.write()

    @property
    def rehearsed(self) -> bool:
        """Tiny sizes on the CPU: the same code path, no meaningful numbers."""
        return self.device == "cpu"

    def add(self, **row: Any) -> None:
        """Append a row and write the file."""
        self.content["rows"].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        temporary = self.out.with_name(f".{self.out.name}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.out)


def begin(name: str, parser: argparse.ArgumentParser | None = None) -> Result:
    """Read `--device` and `--out`; a CUDA stage needs CUDA. A parser given has further options of the stage."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --rehearse runs the stages on the CPU")
    return Result(name, arguments.device, arguments.out)


def seconds(step: Callable[[], object], device: str) -> float:
    """One call, including everything it starts on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(
    steps: Mapping[str, Callable[[], object]], device: str, reference: str, rounds: int
) -> dict[str, Any]:
    """Median seconds of each step, and medians of their ratios to `reference` within a round.

    The steps take turns, and each round starts with a different one, so a slowdown of the machine affects all of them.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        seconds(steps[name], device)  # warm-up
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(steps[name], device))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))
        for name in names
    }
    return {
        "seconds": {name: statistics.median(times[name]) for name in names},
        f"ratio_to_{reference}": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "rounds": rounds,
    }


def free(device: str) -> None:
    """Free the memory of models that are out of scope before the next one is built."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: str) -> float | None:
    """Peak of torch's allocator since `free`; null on a CPU, which does not count it."""
    return round(torch.cuda.max_memory_allocated() / 2**20, 1) if device == "cuda" else None


def random_llama(device: str, dtype: torch.dtype, **sizes: Any) -> Any:
    """A Llama with random weights drawn on the device in `dtype`, without a float32 copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)
