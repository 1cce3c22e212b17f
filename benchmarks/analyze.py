"""Cost of comparing two adapters the size of a 7B model's: seconds and peak memory of the full command.

    python benchmarks/analyze.py            # 32 layers × 7 modules of Llama-2-7B, rank 8
    python benchmarks/analyze.py --quick    # 2 layers

Two random PEFT LoRAs are written to a temporary folder. The script times `braidlora analyze ONE OTHER` in a separate
process with one thread, including Python startup, both figures and `analysis.json`, and the drift from one to the other
in magnitude and direction (A, B and ΔW), which a run's drift computes per stage. Results go to
benchmarks/results/analyze.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
LAYERS, RANK, HIDDEN, INNER = 32, 8, 4096, 11008
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER), "mlp.down_proj": (INNER, HIDDEN),
}  # fmt: skip


def write_adapter(folder: Path, layers: int, seed: int) -> float:
    """A random LoRA in PEFT's format; returns its size in MiB."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module, (k, d) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, k, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(d, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": sorted(MODULES)})
    )
    return (folder / "adapter_model.safetensors").stat().st_size / 2**20


def timed(command: list[str]) -> dict[str, Any]:
    """Wall time in seconds and peak resident set in MiB of a separate process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with {child.returncode}")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_MiB": round(usage.ru_maxrss / 1024),
    }


def own(*arguments: Any) -> str:
    """The output of this script in a separate process."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def drift(before: Path, after: Path) -> dict[str, Any]:
    """Drift between two adapters, in this process."""
    import torch

    from braidlora.analysis.drift import change_between
    from braidlora.analysis.factors import AdapterFile

    torch.set_num_threads(1)
    start = time.perf_counter()
    change_between(AdapterFile(before, "before"), AdapterFile(after, "after"))
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--drift", nargs=2, type=Path, metavar="FOLDER", help="one case, as JSON")
    parser.add_argument("--write", nargs=3, metavar=("FOLDER", "LAYERS", "SEED"), help="one adapter")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/analyze.json")
    arguments = parser.parse_args()
    if arguments.drift:
        print(json.dumps(drift(*arguments.drift)))
        return
    if arguments.write:
        print(write_adapter(Path(arguments.write[0]), int(arguments.write[1]), int(arguments.write[2])))
        return
    layers = 2 if arguments.quick else LAYERS
    with tempfile.TemporaryDirectory() as folder:
        one, other = Path(folder) / "one", Path(folder) / "other"
        # Separate processes, also for writing: a child's peak memory starts at that of its parent.
        size = float(own("--write", one, layers, 0))
        own("--write", other, layers, 1)
        python = [sys.executable, "-m", "braidlora"]
        cells = {
            "help": timed([*python, "analyze", "--help"]),
            "import": timed([sys.executable, "-c", "import braidlora.analysis"]),
            "analyze": timed([*python, "analyze", str(one), str(other), "--output", f"{folder}/analysis"]),
        }
        cells["drift"] = json.loads(own("--drift", one, other))
        found = json.loads((Path(folder) / "analysis" / "analysis.json").read_text())["similarity"]
    result = {
        "environment": environment(),
        "layers": layers * len(MODULES),
        "rank": RANK,
        "adapter_MiB": round(size, 1),
        "cells": cells,
        "similarity": {factor: found[factor]["pairs"] for factor in ("A", "B")},
    }
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))
    out = arguments.out or RESULTS / f"analyze{'-quick' if arguments.quick else ''}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
