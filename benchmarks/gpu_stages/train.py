"""`braidlora train demo` on the device: once without interruption, once killed after a checkpoint and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_stages.stage import begin

STEPS, SAVE = 30, 10
PATIENCE = 500.0  # seconds for the first checkpoint


def words(output: Path) -> list[str]:
    return [
        sys.executable, "-m", "braidlora", "train", "demo", f"--output={output}", f"--training.max_steps={STEPS}",
        f"--training.save_steps={SAVE}", "--training.warmup_steps=0", "--training.logging_steps=1",
        "--tasks.*.train.limit=200",
    ]  # fmt: skip


def losses(output: Path) -> dict[int, float]:
    lines = (output / "log.jsonl").read_text(encoding="utf-8").split("\n")
    return {line["step"]: line["loss"] for line in map(json.loads, filter(None, lines)) if "loss" in line}


def killed(output: Path) -> None:
    """Start a run and kill it after its first checkpoint."""
    process = subprocess.Popen(words(output))
    end = time.monotonic() + PATIENCE
    while (
        process.poll() is None and not (output / "checkpoints" / f"step-{SAVE}" / "manifest.json").is_file()
    ):
        if time.monotonic() > end:
            process.kill()
            raise SystemExit(f"no checkpoint after {PATIENCE:.0f} s")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        raise SystemExit("the run ended before it could be killed")


def main() -> None:
    result = begin("train")
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        start = time.monotonic()
        subprocess.run(words(whole), check=True)
        result.add(what="undisturbed", seconds=time.monotonic() - start, losses=list(losses(whole).values()))
        killed(broken)
        reached = max(losses(broken), default=0)
        subprocess.run([*words(broken), "--resume", "auto"], check=True)
        first, second = losses(whole), losses(broken)
        apart = max(abs(first[step] - second[step]) for step in first)
        same = (whole / "adapter" / "adapter_model.safetensors").read_bytes() == (
            broken / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
        result.add(
            what="killed and resumed", killed_after_step=reached, steps=len(second),
            largest_difference_of_losses=apart, same_bytes=same,
        )  # fmt: skip
        if set(first) != set(second):
            raise SystemExit(
                f"the resumed run logged steps {sorted(second)}, the uninterrupted one {sorted(first)}"
            )
        if result.rehearsed and not same:
            raise SystemExit("the resumed run has different bytes; on a CPU a resume is exact")


if __name__ == "__main__":
    main()
