"""Record what today's code computes, and hold a refactoring to it: tensors to the byte, numbers in JSON to the digit.

    python scripts/golden.py record golden/          # before the change
    python scripts/golden.py record golden-after/    # after it
    python scripts/golden.py compare golden/ golden-after/ --renamed scripts/golden_renamed.json

Runs small trainings, a comparison, an analysis and a federation under each rule on the recipes in the package, and
writes `golden.json`: the sha256 of every tensor of every adapter, and every number of every JSON result that no clock
has a part in. `golden_renamed.json` maps patterns in keys and paths of the first to replacements in the second,
`{"pattern": ["replacement", …]}`. Prose is not compared. Record twice before the change: what differs between the two
is no evidence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from braidlora.paths import find_data

if "BRAIDLORA_DATA" not in os.environ and Path("../shared").is_dir():
    os.environ["BRAIDLORA_DATA"] = str(Path("../shared").resolve())

RULES = (
    "local", "fedit", "ffa-lora", "fedsa-lora", "fed-alora", "zero-padding", "flora", "flexlora", "fed-alora-het",
)  # fmt: skip
MIXED_RANKS = ("zero-padding", "flora", "flexlora", "fed-alora-het")
SMALL = ["--training.threads=1", "--tasks.*.train.limit=64"]
STEPS = ["--training.max_steps=12", "--training.warmup_steps=2"]
ROUNDS = ["--federation.rounds=2", "--federation.evaluate_every=1"]
# Numbers of these come from a clock, a machine, or a hash of what is compared anyway.
_CLOCK = ("seconds", "timing", "environment", "peak_memory", "date", "sha256", "manifest", "fingerprint")


def commands() -> dict[str, list[str]]:
    """Name and words of every run; `{NAME}` stands for the folder of an earlier one."""
    found = {
        f"train-{method}": ["train", "demo", f"--adapter.method={method}", *STEPS, *SMALL]
        for method in ("alora", "hydralora", "moelora")
    }
    found["compare"] = [
        "compare", "demo", "--methods=lora,lora-matched,alora", "--seeds=0,1", "--references=none", "--workers=1",
        "--no-report", *STEPS, *SMALL,
    ]  # fmt: skip
    for rule in RULES:
        found[f"fed-{rule}"] = ["federate", "fed_demo", f"--federation.rule={rule}", *ROUNDS, *SMALL]
        if rule in MIXED_RANKS:
            found[f"fed-{rule}"].append("--federation.ranks=[8,8,6,6,4,4,2,2]")
    if find_data("data/fed").is_dir():
        found["fed-flan8-het"] = [
            "federate",
            "benchmarks/fed_flan8_het_small.yaml",
            "--federation.rounds=1",
            "--tasks.*.test.limit=16",
            *SMALL,
        ]
    found["analyze"] = ["analyze", "{train-alora}", "--routers", "--gradients"]
    return found


def record(folder: Path) -> None:
    """Run everything, and write `golden.json`; the runs themselves are removed."""
    if (folder / "golden.json").exists():
        raise SystemExit(f"{folder}: holds a recording already; remove it or name another folder.")
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, words in commands().items():
        filled = [
            str(runs / word[1:-1]) if word.startswith("{") and word.endswith("}") else word for word in words
        ]
        command = [sys.executable, "-m", "braidlora", *filled, f"--output={runs / name}"]
        print(f"{name}: {' '.join(command[2:])}", flush=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    golden: dict[str, dict[str, Any]] = {"tensors": {}, "numbers": {}}
    for path in sorted(runs.rglob("*")):
        name = path.relative_to(runs).as_posix()
        if path.suffix == ".safetensors" and "checkpoints" not in path.parts:
            golden["tensors"][name] = tensors(path)
        elif path.suffix in (".json", ".jsonl") and not _is_clockwork(name):
            golden["numbers"][name] = dict(numbers(read(path)))
    (folder / "golden.json").write_text(json.dumps(golden, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(runs)
    print(f"{len(golden['tensors'])} files of tensors, {len(golden['numbers'])} of numbers")


def tensors(path: Path) -> dict[str, str]:
    """sha256 over dtype, shape and bytes of every tensor."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(key).contiguous()
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
            found[key] = digest.hexdigest()
    return found


def read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def numbers(value: Any, key: str = "") -> Iterator[tuple[str, float | int | bool | None]]:
    """Every number, truth value and null below a value, by dotted key."""
    if isinstance(value, dict):
        for name, one in value.items():
            if not _is_clockwork(name):
                yield from numbers(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from numbers(one, f"{key}[{index}]")
    elif not isinstance(value, str):
        yield key, value


def _is_clockwork(name: str) -> bool:
    return any(word in name for word in _CLOCK)


def compare(before: Path, after: Path, renamed: dict[str, list[str]]) -> int:
    """Print what differs; 1 if anything does."""
    old, new = (
        json.loads((folder / "golden.json").read_text(encoding="utf-8")) for folder in (before, after)
    )

    def rename(text: str, known: Collection[str]) -> str:
        """The first of the new names that exists, or the old one."""
        found = [text]
        for pattern, replacements in renamed.items():
            found = [re.sub(pattern, new, one) for one in found for new in replacements]
        return next((one for one in found if one in known), found[0])

    problems = []
    for kind in ("tensors", "numbers"):
        for file, values in old[kind].items():
            there = new[kind].get(rename(file, new[kind]))
            if there is None:
                problems.append(f"{file}: gone")
                continue
            for key, value in values.items():
                name = rename(key, there)
                if name not in there:
                    problems.append(f"{file}: {key} is gone (it was {value})")
                elif there[name] != value:
                    problems.append(f"{file}: {key} was {value}, is {there[name]}")
    for problem in problems[:200]:
        print(problem)
    count = sum(len(values) for kind in old.values() for values in kind.values())
    print(f"{count} tensors and numbers compared, {len(problems)} differ or are gone")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record", help="run everything and write FOLDER/golden.json").add_argument(
        "folder", type=Path
    )
    comparing = verbs.add_parser("compare", help="exit with 1 where two recordings differ")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--renamed", type=Path, help="a JSON object, as in golden_renamed.json")
    arguments = parser.parse_args()
    if arguments.verb == "record":
        record(arguments.folder)
        return 0
    renamed = json.loads(arguments.renamed.read_text(encoding="utf-8")) if arguments.renamed else {}
    return compare(arguments.before, arguments.after, renamed)


if __name__ == "__main__":
    sys.exit(main())
