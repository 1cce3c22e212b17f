"""What aggregation costs a server: CPU per client and peak memory, for adapters as large as a 7B model's.

    python benchmarks/aggregate.py            # 10, 100 and 1000 clients; FLoRA and FlexLoRA up to 100
    python benchmarks/aggregate.py --quick    # an eighth of the layers, 10 and 40 clients

Clients are synthetic: rank 8 on q_proj and v_proj of Llama-2-7B (64 layers of 4096 × 4096), and for the heterogeneous
rule ranks 64, 64, 32, 32, 16, 16, 8, 8 in turn with m = 16. Every case is a process of its own with one thread. Per
client are timed: reading the upload (safetensors, float32), the guard, and `add`. Memory is the growth of the resident
set to its highest mark, which Linux lets a process reset. Results go to benchmarks/results/aggregate.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from braidlora.federated import RULE_NAMES, AdaptedLayer, ClientUpdate, get_rule
from braidlora.federated.guard import Guard
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
RANK, M = 8, 16
HET, HET_RANKS = "fed-alora-het", [64, 64, 32, 32, 16, 16, 8, 8]
STACKING = ("flora", "flexlora")
WIDTH, LAYERS = 4096, 64


def measure(name: str, clients: int, layer_count: int) -> dict[str, Any]:
    """One round of a rule over `clients` synthetic clients; times in CPU milliseconds, memory in MiB."""
    torch.set_num_threads(1)
    rule = get_rule(name)
    layers = [
        AdaptedLayer(f"base_model.model.model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj", WIDTH, WIDTH)
        for i in range(layer_count)
    ]
    ranks = HET_RANKS if name == HET else [RANK] * 3
    generator = torch.Generator().manual_seed(0)

    def upload(rank: int) -> bytes:
        shapes = rule.upload_shapes(layers, rank, M)
        return save({n: torch.rand(shape, generator=generator) - 0.5 for n, shape in shapes.items()})

    # Averages do not care for the values: a few uploads are sent in turn. Stacked factors must be independent.
    pool = None if name in STACKING else [upload(rank) for rank in ranks]
    names = [f"client{i:04d}" for i in range(clients)]
    guard = Guard(rule, layers, {c: ranks[i % len(ranks)] for i, c in enumerate(names)}, r_intermediate=M)
    guard.open(1, names)
    rule.start({})
    Path("/proc/self/clear_refs").write_text("5")  # making the uploads took memory, too
    before = peak_mib()
    spent = {"read": 0.0, "guard": 0.0, "add": 0.0}
    for i, client in enumerate(names):
        rank = ranks[i % len(ranks)]
        data = upload(rank) if pool is None else pool[i % len(ranks)]
        marks = [time.process_time()]
        update = ClientUpdate(client, 100 + i, load(data), rank, 2.0, 1)
        marks.append(time.process_time())
        guard.check(update)
        marks.append(time.process_time())
        rule.add(update)
        marks.append(time.process_time())
        for what, start, end in zip(spent, marks, marks[1:], strict=False):
            spent[what] += end - start
    start = time.process_time()
    shared = rule.finish()
    finish = time.process_time() - start
    per_client = {f"{what}_ms": round(1e3 * seconds / clients, 2) for what, seconds in spent.items()}
    return {
        "rule": name,
        "clients": clients,
        "layers": layer_count,
        "upload_MiB": round(len(upload(ranks[0])) / 2**20, 1),
        **per_client,
        "total_ms": round(1e3 * (sum(spent.values()) + finish) / clients, 2),
        "finish_s": round(finish, 2),
        "memory_grown_MiB": round(peak_mib() - before),
        "peak_MiB": round(peak_mib()),
        "shared_MiB": round(sum(t.numel() * t.element_size() for t in shared.values()) / 2**20, 1),
    }


def peak_mib() -> float:
    """The process's largest resident set since the mark was reset."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, flags=re.M)[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rules", nargs="+", default=list(RULE_NAMES), choices=RULE_NAMES)
    parser.add_argument("--case", nargs=3, metavar=("RULE", "CLIENTS", "LAYERS"), help="one case, as JSON")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/aggregate.json")
    arguments = parser.parse_args()
    if arguments.case:
        rule, clients, layers = arguments.case
        print(json.dumps(measure(rule, int(clients), int(layers))))
        return
    sizes = [10, 40] if arguments.quick else [10, 100, 1000]
    cells = []
    number = count(1)
    for rule in arguments.rules:
        for clients in sizes:
            if rule == "local" or (rule in STACKING and clients > 100):
                continue
            case = [rule, str(clients), str(LAYERS // 8 if arguments.quick else LAYERS)]
            command = [sys.executable, __file__, "--case", *case]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            cells.append(json.loads(done.stdout))
            shown = {
                key: value for key, value in cells[-1].items() if key not in ("rule", "clients", "layers")
            }
            print(f"{next(number):3d} {rule:14s} {clients:5d} clients  {shown}", flush=True)
    out = arguments.out or RESULTS / f"aggregate{'-quick' if arguments.quick else ''}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), "cells": cells}, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
