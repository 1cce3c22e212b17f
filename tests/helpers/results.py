"""Everything of a finished run that must not depend on when it was interrupted, as bytes by file name."""

import json
from pathlib import Path


def run_bytes(directory):
    """The results of a training run."""
    directory = Path(directory)
    kept = _files(directory, "adapter*/*", "predictions/*")
    kept["log.jsonl"] = _lines(directory / "log.jsonl", "timing")
    kept["metrics.json"] = _object(directory / "metrics.json")
    return kept


def federation_bytes(directory):
    """The results of a federation."""
    directory = Path(directory)
    kept = _files(
        directory, "clients/*/adapter/*", "clients/*/predictions/*", "clients/*/state/*/*.safetensors",
        "rounds/*/*.safetensors", "partition.json", "experiment.json",
    )  # fmt: skip
    kept["metrics.json"] = _object(directory / "metrics.json")
    kept["rounds.jsonl"] = _lines(directory / "rounds.jsonl", "timing")
    for path in sorted(directory.glob("rounds/*/server.json")):
        kept[str(path.relative_to(directory))] = _object(path)
    return kept


def _files(directory, *patterns):
    found = [path for pattern in patterns for path in sorted(directory.glob(pattern))]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def _object(path):
    content = json.loads(path.read_text())
    del content["seconds"]
    content.pop("timing", None)
    return json.dumps(content).encode()


def _lines(path, clock):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line[clock]
    return json.dumps(lines).encode()
