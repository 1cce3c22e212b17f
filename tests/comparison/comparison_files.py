"""What a comparison wrote, read back."""

import json
from pathlib import Path

# The comparison that is made once: its rows, its tasks, and what it was asked for.
ROWS = ["lora", "lora-matched", "alora", "loha"]
TASKS = ["up", "rev", "len"]
WORDS = ["--methods=lora,lora-matched,alora", "--variant", "loha={peft_type: loha, r: 4}", "--seeds=0,1"]


def comparison_of(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def without_timings(comparison: dict) -> dict:
    """What must not depend on when, and how fast, the runs were made."""
    kept = {key: value for key, value in comparison.items() if key not in ("environment", "command")}
    kept["recipe"] = {"name": kept["recipe"]["name"]}  # its YAML names the folder
    timed = ("seconds", " s per run")
    for name in ("verdict", "details"):
        kept[name] = [text for text in kept[name] if not any(words in text for words in timed)]
    advice = kept["advice"].items()
    kept["advice"] = {key: text for key, text in advice if not any(words in str(text) for words in timed)}
    kept["rows"] = [
        {key: value for key, value in row.items() if key not in ("seconds", "peak_memory_mib")}
        for row in kept["rows"]
    ]
    return kept
