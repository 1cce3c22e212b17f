"""A table of `benchmarks/evidence.py` on the device, with as many runs at a time as cores allow.

A rehearsal shrinks it to two tasks, methods, rates and seeds on the embedded base, where its data is installed. The
rows of `parts` all stay, because each has settings of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

import evidence
from braidlora.errors import DataError
from gpu_stages.stage import begin

SHRUNK = [
    "--model.path=embedded", "--prompt.cutoff=96", "--tasks.*.train.limit=20", "--tasks.*.test.limit=4",
    "--training.max_steps=2", "--adapter.target_modules=[q_proj]", "--training.warmup_steps=0",
    "--evaluation.max_new_tokens=2",
]  # fmt: skip
FIRST = {"induction21": ("active_to_passive", "antonyms"), "flan8": ("definite_pronoun_resolution", "snli")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", choices=sorted(evidence.TABLES), required=True)
    name = parser.parse_known_args()[0].table
    result = begin(name, parser)
    table, given, root = evidence.TABLES[name], [], evidence.RUNS / name
    out = evidence.RESULTS / f"{name}.json"
    if result.rehearsed:
        table = dataclasses.replace(
            table,
            methods=("lora", "alora"),
            rates=table.rates[:2],
            seeds=(0, 1),
            tasks=table.tasks[:2] or FIRST[table.recipe],
            variants={},
            unlearned=(),
        )
        given, root, out = (
            SHRUNK,
            result.out.parent / f"{name}-runs",
            result.out.with_name(f"{name}-table.json"),
        )
    try:
        recipe = evidence.table_recipe(table, given)
        workers = max(2, (os.cpu_count() or 1) * 5 // 4)
        found = evidence.run(
            table, recipe, root, f"python benchmarks/gpu.py --stages {name}", workers=workers
        )
    except DataError as error:
        if not result.rehearsed:
            raise
        result.add(skipped=str(error))
        return
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in found["comparison"]["rows"]:
        result.add(method=row["name"], mean=row["mean"], worst=row["worst"])


if __name__ == "__main__":
    main()
