"""Writes what an acceptance run counted to `benchmarks/results/acceptance.json`, one entry for each suite."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "acceptance.json"
PACKAGES = ("braidlora", "torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes")


def record(suite, entry):
    """Add or replace the entry of a suite, with the versions and date it was made with."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[suite] = {
        **entry,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
