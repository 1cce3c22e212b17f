"""`advise`: plan the probe, run it, and say what it shows and what past suites let it predict."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from braidlora.adapters.sharing import LORA
from braidlora.advisor.advice import advice
from braidlora.advisor.calibration import read_calibration
from braidlora.advisor.cost import METHODS, SEEDS, SHARE, ProbePlan, plan_probe
from braidlora.advisor.pairs import pairs_of, summarize
from braidlora.advisor.text import format_plan
from braidlora.analysis.output import as_written
from braidlora.analysis.study import plain_lora
from braidlora.config import RunConfig
from braidlora.errors import ConfigError, DataError, explain_write_failures
from braidlora.runs import RunDirectory, atomic_write_json, hold, is_leftover, is_lock, refuse_links
from braidlora.tasks import check_chat_settings, load_tasks
from braidlora.terminal import say

RESULT = "advice.json"


def advise(
    config: RunConfig,
    output: str | Path,
    *,
    name: str = "recipe",
    share: float = SHARE,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Probe a recipe's tasks, and say whether to share B, A, both or nothing between them.

    Args:
        config: a training recipe; its method is replaced by a plain LoRA of the same rank and targets.
        output: folder of `advice.json`, which replaces an older one.
        name: of the recipe, in what to do next.
        share: the probe may cost this share of a comparison, in (0, 1].
        command: recorded as the command that made it.
        progress: what it will cost, and a line per task, on stderr.

    Returns:
        the content of `advice.json`, see docs/reference/advising.md.

    Raises:
        ConfigError: fewer than two tasks to train, another PEFT method, a share outside (0, 1], a comparison too cheap
            for a probe, or an output folder that holds other files.
        DataError: the rows cannot be read, or a task has only one.
        TrainingError: a loss or gradient is not finite, or memory or disk ran out.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(
            f"--budget: got {share:g}; expected a share of a comparison's cost, e.g. {SHARE:g}."
        )
    if isinstance(config.adapter.method, dict):
        raise ConfigError(
            "adapter.method: the probe trains LoRAs, but this recipe's method is another PEFT configuration; add "
            "--adapter.method=lora."
        )
    if config.adapter.target_parameters:
        raise ConfigError(
            "adapter.target_parameters: the probe measures linear layers, not stacked experts; add "
            "--adapter.target_parameters=null and, if needed, --adapter.target_modules."
        )
    directory = check_output(output)
    with hold(directory):
        calibration = read_calibration()
        start = time.monotonic()
        lora = config.model_copy(update={"adapter": plain_lora(config.adapter)})
        tasks = load_tasks(lora)
        check_chat_settings(tasks, config.prompt)
        trained = [task for task in tasks if task.train]
        if len(trained) < 2:
            raise ConfigError(
                f"{name}: {len(trained)} task with training rows; with fewer than two there is nothing to share. "
                f"Use --adapter.method={LORA.method}."
            )
        for task in trained:
            if len(task.train) < 2:
                raise DataError(
                    f"task {task.name}: one training row cannot be halved; the probe needs two or more."
                )
        plan = plan_probe(config, [len(task.train) for task in trained], share)
        if progress:
            say(format_plan(name, [task.name for task in trained], plan), file=sys.stderr, flush=True)
        # Imported late: what is wrong with the recipe shows before transformers is imported.
        from braidlora.advisor.probe import run_probe

        found = run_probe(lora, trained, plan, progress)
        matrices = {
            "updates": found.updates,
            "columns": None if found.columns is None else found.columns[0],
            "inputs": found.inputs,
        }
        factors = found.gradients["factors"]
        chance = None if found.columns is None else found.columns[1]
        pairs = pairs_of(found.tasks, factors, matrices)
        measures = summarize(factors, pairs, chance)
        seconds = time.monotonic() - start
        per_row = found.train_seconds / (len(trained) * plan.steps * plan.batch_size)
        result = {
            "format": 1,
            "recipe": {"name": name, "base": config.model.path, "rank": config.adapter.r},
            "tasks": found.tasks,
            "cost": cost_entry(plan, seconds, found.load_seconds, per_row),
            "losses": found.losses,
            "gradients": found.gradients,
            "matrices": {**matrices, "columns_chance": chance},
            "pairs": pairs,
            "measures": measures,
            "advice": advice(name, measures, factors, pairs, calibration),
        }
        written = as_written(result, command)
        with explain_write_failures(directory, "or give another --output"):
            directory.mkdir(parents=True, exist_ok=True)
            atomic_write_json(directory / RESULT, written)
    return written


def cost_entry(plan: ProbePlan, seconds: float, load_seconds: float, per_row: float) -> dict[str, Any]:
    """Rows as planned, seconds as measured, and those of a comparison at the same speed (its evaluation left out)."""
    runs = len(METHODS) * SEEDS
    comparison = runs * load_seconds + plan.comparison_rows * per_row
    return {
        "steps": plan.steps, "batch_size": plan.batch_size, "gradient_rows": plan.gradient_rows,
        "rows": plan.rows, "seconds": seconds,
        "comparison": {"methods": list(METHODS), "seeds": SEEDS, "rows": plan.comparison_rows, "seconds": comparison},
        "share_of_rows": plan.share, "share_of_seconds": seconds / comparison,
    }  # fmt: skip


def check_output(output: str | Path) -> Path:
    """The folder, which may hold an older `advice.json` and nothing else.

    Raises:
        ConfigError: the path leads out of the working directory, or the folder holds other files.
    """
    path = RunDirectory.at(output).path
    refuse_links(path, {RESULT})
    if path.is_dir():
        foreign = sorted(
            one.name
            for one in path.iterdir()
            if one.name != RESULT and not is_lock(one.name) and not is_leftover(one.name)
        )
        if foreign:
            raise ConfigError(
                f"--output: {path} holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}, which are not "
                "from `advise`; nothing there was changed. Choose an empty folder."
            )
    return path
