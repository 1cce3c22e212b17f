"""The smallest runs, comparisons and federations, and the verbs that work on them, as command lines."""

import contextlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from helpers.tiny_base import build_base, write_rows

# What the clock says, and what a federation notes of a client that failed and was asked again.
RETRIED = ("failed", "bytes", "up", "down")
TIMED = (*RETRIED, "seconds", "timing", "environment", "peak_memory_mib", "command", "memory", "date")
VERBS = (
    "train", "resume", "overwrite", "evaluate", "compare", "report", "federate", "add-client", "export", "export-over",
    "merge", "analyze", "study",
)  # fmt: skip
FILES = ("init", "predict")  # verbs that write a file where the user says, and no directory


@dataclass(frozen=True)
class Scene:
    """One verb on one directory.

    Args:
        verb: its command line.
        again: the command line after the fault is mended; the same where it is left out.
        before: command lines that make what the verb works on, once.
        results: glob patterns of what it leaves, whose bytes do not depend on faults along the way.
        memory: whether it runs the model.
    """

    verb: list[str]
    again: list[str] | None = None
    before: list[list[str]] = field(default_factory=list)
    results: tuple[str, ...] = ("out/**/*",)
    memory: bool = True


class World:
    """A folder with a base, rows and recipes. `work` is where the verbs write, always under the same path."""

    def __init__(self, folder: Path):
        self.folder, self.work = folder, folder / "work"
        build_base(folder / "base", hidden=16, layers=1)
        write_rows(folder)
        self.recipe = self._write("train.yaml", {
            **self._common(["up", "rev"]),
            "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 1, "save_steps": 2,
                         "eval_steps": 2, "logging_steps": 2, "load_best": True},
        })  # fmt: skip
        self.federated = self._write("federated.yaml", {
            **self._common(["up", "rev"], split={"test": 0.25}),
            "adapter": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
            "training": {"batch_size": 8, "learning_rate": 0.05},
            "federation": {"rounds": 2, "evaluate_every": 1, "rule": "fed-alora"},
        })  # fmt: skip

    def _common(self, names, split=None):
        options = {"up": ["yes", "no"], "rev": ["yes", "no"]}
        return {
            "model": {"path": str(self.folder / "base")},
            "adapter": {"r": 2, "num_experts": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
            "tasks": [
                {"name": name, "train": {"source": str(self.folder / f"{name}-labels.jsonl"), "limit": 12},
                 "options": options[name], "columns": {"instruction": "text", "output": "label"}}
                for name in names
            ],
            "split": split or {"test": 0.25, "validation": 0.15},
            "prompt": {"template": "{instruction}->", "cutoff": 24},
            "evaluation": {"batch_size": 64, "mode": "rank"},
        }  # fmt: skip

    def _rows(self, task):
        return str(self.folder / f"{task}-labels.jsonl")

    def _write(self, name, content):
        path = self.folder / name
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    def scenes(self) -> dict[str, Scene]:
        """Every verb that writes."""
        out = str(self.work / "out")
        train = ["train", self.recipe, f"--output={out}", "--json"]
        # The same run with all checkpoints, so that it can be resumed from the first one.
        federate = ["federate", self.federated, f"--output={out}", "--json"]
        compare = ["compare", self.recipe, f"--output={out}", "--methods=lora,alora", "--seeds=0", "--workers=1",
                   "--no-single-task", "--json"]  # fmt: skip
        analyze = ["analyze", f"{out}/run", f"--output={out}/analysis", "--json"]
        study = ["analyze", "study", self.recipe, f"--output={out}", "--tasks=up,rev", "--seeds=0,1", "--json",
                 "--training.max_steps=2", "--training.load_best=false"]  # fmt: skip
        run = ["train", self.recipe, f"--output={out}/run", "--json", "--adapter.method=lora"]
        export = ["export", f"{out}/run", f"--output={out}/lora", "--json"]
        init = [
            "init",
            "--model",
            str(self.folder / "base"),
            "--output",
            f"{out}/mine.yaml",
            "--overwrite",
            "--json",
        ]
        predict = ["predict", f"{out}/run", "--task=up", f"--output={out}/answers.jsonl", "--overwrite"]
        add = ["federate", "add-client", out, "--name=late", "--tasks=up", "--json"]
        return {
            "train": Scene(train, [*train, "--resume=auto"]),
            "resume": Scene(
                [*train, "--resume", f"{out}/checkpoints/step-2"],
                [*train, "--resume=auto"],
                [train],
            ),
            "overwrite": Scene([*train, "--seed=1", "--overwrite"], None, [train]),
            "evaluate": Scene(
                ["evaluate", f"{out}/run", "--fresh", "--json"], ["evaluate", f"{out}/run", "--json"], [run]
            ),
            "compare": Scene([*compare, "--no-report"]),
            "report": Scene(compare, None, [[*compare, "--no-report"]], memory=False),
            "federate": Scene(federate, [*federate, "--resume=auto"]),
            "add-client": Scene(add, None, [federate]),
            "export": Scene(export, None, [run], memory=False),
            "export-over": Scene([*export, "--overwrite"], None, [run, export], memory=False),
            "merge": Scene([*export, "--overwrite", "--merge"], None, [run, export]),
            "analyze": Scene(analyze, None, [run], memory=False),
            "study": Scene(study),
            "init": Scene([*init, self._rows("up")], None, [[*init, self._rows("rev")]], memory=False),
            "predict": Scene(
                [*predict, f"--file={self._rows('up')}"],
                None,
                [run, [*predict, f"--file={self._rows('rev')}"]],
                memory=False,
            ),
        }

    def set(self, stage: Path | None):
        """Put what stood there before the verb back into `work`."""
        shutil.rmtree(self.work, ignore_errors=True)
        if stage is None:
            self.work.mkdir()
        else:
            shutil.copytree(stage, self.work)

    def results(self, patterns) -> dict[str, bytes]:
        """Content by name, without what the clock says."""
        found = {}
        for pattern in patterns:
            for path in sorted(self.work.glob(pattern)):
                name = path.relative_to(self.work).as_posix()
                if path.is_file() and _lasts(name):
                    found[name] = _untimed(path)
        return found


def _lasts(name: str) -> bool:
    """Files whose bytes are the same whenever, and after whatever fault, they are written."""
    parts = name.split("/")
    if parts[-1] in ("manifest.json", "environment.json", "README.md") or parts[-1].startswith("progress_"):
        return False  # they hold times, or sha256 of files that do
    if parts[-1] == "errors.log":
        return False  # what went wrong at a client stays there, with its time
    if any(part.startswith(".") for part in parts):
        return False  # left half written by the fault; swept up by a later start
    return parts[-1].rpartition(".")[2] not in ("html", "png", "svg", "pt", "pth")


def _untimed(path: Path) -> bytes:
    with contextlib.suppress(ValueError):  # damaged on purpose
        return _parsed_without_times(path)
    return path.read_bytes()


def _parsed_without_times(path: Path) -> bytes:
    if path.suffix == ".json":
        return json.dumps(_without_times(json.loads(path.read_text()))).encode()
    if path.suffix == ".jsonl":
        lines = path.read_text().split("\n")[:-1]
        return json.dumps([_without_times(json.loads(line)) for line in lines]).encode()
    if path.name == "comparison.md":
        return b""
    return path.read_bytes()


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if key not in TIMED}
    if isinstance(value, list):
        return [_without_times(one) for one in value if not (isinstance(one, str) and "seconds" in one)]
    if isinstance(value, str):  # the advice of a comparison says what a run costs
        return re.sub(r"[\d.,]+( s per run| times its run time)", r"\1", value)
    return value
