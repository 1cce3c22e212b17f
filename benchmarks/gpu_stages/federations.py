"""A table of `benchmarks/rules_side_by_side.py` on the device, with as many federations at a time as cores allow.

A rehearsal shrinks it to two rules, two rates and one seed on the embedded base, where its data is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import rules_side_by_side
from federated_tables import TABLES, Table
from gpu_stages.stage import begin

SHRUNK = [
    "--model.path=embedded", "--prompt.cutoff=96", "--tasks.*.train.limit=20", "--federation.rounds=1",
    "--adapter.target_modules=[q_proj]", "--evaluation.max_new_tokens=2",
]  # fmt: skip


def shrunk(table: Table) -> Table:
    """The first two rows of the first group, two rates and one seed, with few rows on the embedded base."""
    title, group = next(iter(table.groups.items()))
    rows = dict(list(group.rows.items())[:2])
    return dataclasses.replace(
        table,
        groups={title: dataclasses.replace(group, rows=rows, baseline=next(iter(rows)), pairs=[])},
        seeds=table.seeds[:1],
        options=[*SHRUNK, "--tasks.*.test.limit=4"],
        rates=table.rates[:2],
        held_out=[one for one in table.held_out if "limit" not in one],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", choices=sorted(TABLES), required=True)
    name = parser.parse_known_args()[0].table
    result = begin(name, parser)
    table, root, out = TABLES[name], Path("runs", name), rules_side_by_side.RESULTS / f"{name}.json"
    if result.rehearsed:
        table, root = shrunk(table), result.out.parent / f"{name}-runs"
        out = result.out.with_name(f"{name}-table.json")
    workers = max(2, (os.cpu_count() or 1) * 5 // 4)
    command = f"python benchmarks/gpu.py --stages {name}"
    try:
        found = rules_side_by_side.measure(root, table, list(table.seeds), workers, command)
    except SystemExit as error:
        if not result.rehearsed or not str(error).endswith("exit code 3"):  # 3: no data here
            raise
        result.add(skipped=str(error))
        return
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for title, group in found["groups"].items():
        for row, numbers in group["rows"].items():
            result.add(group=title, row=row, mean=numbers["mean"], worst=numbers["worst"])


if __name__ == "__main__":
    main()
