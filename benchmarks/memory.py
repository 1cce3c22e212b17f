"""Planned memory compared with real steps. A few minutes on one core, Linux only.

    python benchmarks/memory.py            # all cases; those without their base model are skipped, with a message
    python benchmarks/memory.py demo       # cases of one recipe

A case is a recipe with overrides. A separate process loads base model and adapter, takes one small step, then runs one
full-size forward and backward pass with AdamW's state allocated, and reads the growth of its peak resident set from the
kernel (VmHWM). This is compared with the plan's gradients + optimizer + activations; base model and adapter are in
memory before.

`tight`: the C library returns every freed block at once (MALLOC_MMAP_THRESHOLD_=65536), so the resident set equals the
live memory. `default`: as users run it, the C library keeps freed blocks for reuse.

Results go to benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_folder  # noqa: F401
from braidlora.runs import environment

RESULTS = Path(__file__).parent / "results"
CASES = [
    ("demo", ["--training.batch_size=256"]),
    ("benchmarks/flan8_small.yaml", []),
    ("benchmarks/flan8_small.yaml", ["--training.gradient_checkpointing=true"]),
    ("benchmarks/flan8_small.yaml", ["--adapter.method=moelora", "--adapter.target_modules=all-linear"]),
    ("benchmarks/flan8_small.yaml", ["--model.attention=eager"]),
    ("sentences6", ["--training.batch_size=64", "--prompt.cutoff=128"]),
]
ALLOCATORS = {"default": {}, "tight": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}}


def measure(recipe: str, overrides: list[str]) -> int:
    """Growth of the peak resident set in one step, in bytes; runs in a separate process."""
    import torch

    from braidlora.config import load_config
    from braidlora.models.attach import attach_adapter
    from braidlora.models.base import enable_gradient_checkpointing, load_base
    from braidlora.plan.memory import step_loss
    from braidlora.tasks import LabelSpace, load_tasks

    torch.set_num_threads(1)
    config = load_config(recipe, overrides)
    labels = LabelSpace.of(load_tasks(config)) if config.kind == "classify" else None
    base, _ = load_base(config.model, labels)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(base)
    model = attach_adapter(base, config, seed=0).train()
    rows, tokens = config.training.batch_size, config.prompt.cutoff

    def step(rows: int, tokens: int) -> None:
        ids = torch.randint(5, 50, (rows, tokens))
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # with padding, like nearly every batch
        step_loss(
            model, {"input_ids": ids, "attention_mask": mask}, ids if labels is None else ids[:, 0] % 2
        ).backward()

    step(1, 8)
    for parameter in model.parameters():
        parameter.grad = None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = _status("VmRSS")
    moments = [torch.full_like(parameter, 0.0) for parameter in trained for _ in range(2)]
    step(rows, tokens)
    grown = _status("VmHWM") - before
    del moments
    return grown


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def case(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Plan and measurements of one case."""
    from braidlora.plan.run import plan

    memory = plan(recipe, overrides)["memory"]
    planned = memory["gradients"] + memory["optimizer"] + memory["activations"]
    result: dict[str, Any] = {"recipe": recipe, "overrides": overrides, "planned": planned}
    for name, variables in ALLOCATORS.items():
        command = [sys.executable, __file__, "--measure", recipe, *overrides]
        done = subprocess.run(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
        )
        measured = int(done.stdout.split()[-1])
        result[name] = {"measured": measured, "ratio": round(planned / measured, 3)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="only the cases of this recipe")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.measure:
        print(measure(args.recipe, overrides))
        return
    from braidlora.config import load_config
    from braidlora.errors import ConfigError
    from braidlora.models.location import base_source

    cases = []
    for recipe, changes in CASES:
        if args.recipe not in (None, recipe):
            continue
        try:
            base_source(load_config(recipe).model)
        except ConfigError as error:
            print(f"left out: {recipe}: {error}")
            continue
        cases.append(case(recipe, changes))
        print(json.dumps(cases[-1]), flush=True)
    if args.recipe is None:
        command = "python benchmarks/memory.py"
        report = {"kind": "memory", "command": command, "environment": environment(), "cases": cases}
        (RESULTS / "memory.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
