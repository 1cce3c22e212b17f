"""Counts of `pytest -m cuda`. A rehearsal runs the same tests on the CPU, where those that need CUDA are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_stages.stage import begin

ROOT = Path(__file__).parents[2]


def main() -> None:
    result = begin("tests")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "BRAIDLORA_CUDA_TESTS_ON": result.device}
        words = ["-m", "cuda", "-q", "--timeout", "100", f"--junitxml={report}"]
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment, check=False
        ).returncode
        if not report.is_file():
            raise SystemExit(f"pytest wrote no report (exit code {code})")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcomes = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in cases:
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    result.add(**outcomes, failures=failed, exit_code=code)
    if code != 0 or not outcomes["passed"]:
        raise SystemExit(f"pytest ended with exit code {code}: {outcomes}")


if __name__ == "__main__":
    main()
