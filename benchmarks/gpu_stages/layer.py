"""`benchmarks/layer.py` on the device: widths 2048 to 8192, two precisions; eager, in a CUDA graph, compiled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gpu_stages.stage import begin

SCRIPT = Path(__file__).parents[1] / "layer.py"


def main() -> None:
    result = begin("layer")
    rows = result.out.with_name(f".layer-rows-{result.out.stem}.json")
    sizes = ["--widths", "2048", "4096", "8192", "--tokens", "4096", "--rounds", "7"]
    if result.rehearsed:
        sizes = ["--widths", "64", "--tokens", "32", "--rounds", "1"]
    words = [
        *sizes,
        "--device",
        result.device,
        "--precision",
        "mixed",
        "--compiled",
        "--others",
        "--out",
        str(rows),
    ]
    # Goals are not enforced here: a missed goal is a result, not a failure.
    process = subprocess.Popen([sys.executable, str(SCRIPT), *words])
    shown = 0
    while True:
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = None
        if rows.is_file():  # layer.py rewrites it after every row
            content = json.loads(rows.read_text(encoding="utf-8"))
            for row in content["rows"][shown:]:
                result.add(**row)
            shown = len(content["rows"])
        if code is not None:
            break
    if code != 0:
        raise SystemExit(f"layer.py ended with exit code {code}")
    result.content["goals"] = content["goals"]
    result.write()
    rows.unlink()


if __name__ == "__main__":
    main()
