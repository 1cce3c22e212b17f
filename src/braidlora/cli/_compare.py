"""`braidlora compare`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from braidlora.adapters.sharing import PRESETS, by_method
from braidlora.cli._common import old_name, print_json, recipe_here, verb
from braidlora.errors import ConfigError, TrainingError
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.comparison import RaySettings, Sweep

_PERHAPS_A_NUMBER = 10  # `--seeds 3` is one seed, and up to here may have been meant as how many


def add(verbs: Any) -> None:
    parser = verb(
        verbs, "compare", _run, "train a recipe with several methods and seeds, and report which is better"
    )
    parser.add_argument("recipe", help="a recipe file or a built-in name")
    parser.add_argument(
        "--methods",
        metavar="A,B,…",
        help=f"{', '.join(by_method())}, lora-matched, or all (default: without {' and '.join(PRESETS)}; with --sweep: "
        "lora and the recipe's own)",
    )
    variant = parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME={…}",
        help="compare your own variant too: a PEFT configuration {peft_type: LOHA, r: 8}, or recipe values "
        "{adapter.r: 16}; repeatable",
    )
    old_name(parser, "--row", variant)
    parser.add_argument("--seeds", default="0,1,2", metavar="A,B,…", help="seeds of the runs (default 0,1,2)")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="method or variant that the others are compared with (default lora)",
    )
    single_task = parser.add_argument(
        "--single-task",
        action=argparse.BooleanOptionalAction,
        help="also train one LoRA per task and seed, as the reference for Δm%% (default: if there are several tasks)",
    )
    old_name(
        parser, "--references", single_task, {"single-task": "--single-task", "none": "--no-single-task"}
    )
    parser.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="auto|KEY=A,B,…",
        help="auto (recommended): try three learning rates for every method; or try these values of a key, repeatable "
        "for a grid. The values with the lowest validation loss are used",
    )
    parser.add_argument("--sweep", metavar="KEY=A,B,…", help="compare these values of one recipe key")
    parser.add_argument(
        "--matched",
        choices=("none", "parameters", "rank"),
        help="with --sweep: adjust the rank to keep trainable parameters or num_experts x r fixed (default none)",
    )
    parser.add_argument("--workers", default="auto", metavar="N|auto", help="worker processes (default auto)")
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="where runs are trained: worker processes on this machine (default), or Ray",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="with --engine ray: a running cluster (default: this machine)"
    )
    parser.add_argument(
        "--cell-cpus",
        type=float,
        metavar="N",
        help="with --engine ray: CPUs per run (default training.threads)",
    )
    parser.add_argument(
        "--cell-gpus", type=float, metavar="X", help="with --engine ray: GPUs per run, may be a fraction"
    )
    parser.add_argument("--overwrite", action="store_true", help="retrain every run")
    parser.add_argument("--no-report", action="store_true", help="skip report.html and the figures")
    parser.add_argument(
        "--submit",
        metavar="FILE",
        help="also write the table as one JSON file whose cells others can rerun and check",
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import built_in_recipes
    from braidlora.runs import output_of

    recipe = recipe_here(args.recipe, overrides)
    from braidlora.comparison import compare
    from braidlora.comparison.submission import check_submission, write_submission

    seeds = given_seeds(args.seeds)
    submit = None if args.submit is None else check_submission(args.submit, len(seeds))
    recipe = recipe.model_copy(update={"output": output_of(recipe.output, "compare", overrides)})
    references: Literal["single-task", "none"] | None = None
    if args.single_task is not None:
        references = "single-task" if args.single_task else "none"
    result = compare(
        recipe,
        name=args.recipe if args.recipe in built_in_recipes() else Path(args.recipe).stem,
        methods=None if args.methods is None else [word for word in args.methods.split(",") if word],
        rows=dict(_variant(given) for given in args.variant),
        seeds=seeds,
        baseline=args.baseline,
        references=references,
        tune=_tune(args.tune),
        sweep=_sweep(args.sweep, args.matched),
        workers=_workers(args.workers),
        ray=_ray(args),
        overwrite=args.overwrite,
        report=not args.no_report,
        command=again(args.command),
        progress=not args.json,
    )
    show(result, Path(recipe.output), args)
    if submit is not None:
        write_submission(result, submit)
        if not args.json:
            say(f"Submit  {submit}")


def _ray(args: argparse.Namespace) -> RaySettings | None:
    from braidlora.comparison import RaySettings

    given = {"--address": args.address, "--cell-cpus": args.cell_cpus, "--cell-gpus": args.cell_gpus}
    if args.engine == "ray":
        return RaySettings(*given.values())
    for option, value in given.items():
        if value is not None:
            raise ConfigError(f"{option} requires --engine ray.")
    return None


def again(command: str) -> str:
    """The command as tables quote it: without `--overwrite`, so that running it again keeps finished runs."""
    return command.replace(" --overwrite", "")


def show(result: dict[str, Any], directory: Path, args: argparse.Namespace) -> None:
    """Print a comparison as tables with the paths of its files, or as JSON.

    Raises:
        TrainingError: some runs failed; the message lists them.
    """
    from braidlora.comparison import as_text

    if args.json:
        print_json(result)
    else:
        say(f"{as_text(result)}\n\nTable   {directory / 'comparison.md'}")
        if not args.no_report:
            say(f"Report  {directory / 'report.html'}")
        if result["advice"]["run"] is not None and not result["advice"]["undecided"]:
            say(f"Ship    braidlora export {shlex.quote(str(directory))} --best")
    if result["failed"]:
        runs = "\n  ".join(f"{failed['run']}: {failed['reason']}" for failed in result["failed"])
        raise TrainingError(f"these runs failed and are missing from the table:\n  {runs}")


def _tune(given: list[str]) -> Any:
    if "auto" in given:
        if len(given) > 1:
            raise ConfigError(
                "--tune auto cannot be combined with other --tune options; remove them, or replace auto by keys and "
                "values."
            )
        return "auto"
    return dict(_key_and_values("tune", one) for one in given)


def _variant(given: str) -> tuple[str, Any]:
    name, separator, text = given.partition("=")
    if not separator:
        raise ConfigError(
            f"--variant {given}: expected NAME={{…}}, e.g. --variant loha='{{peft_type: LOHA, r: 8}}'."
        )
    return name, _parse("variant", given, text)


def given_seeds(given: str) -> list[Any]:
    """The seeds of `--seeds A,B,…`; `compare` checks them. A small number alone may be meant as how many."""
    seeds = _values("seeds", given)
    if len(seeds) == 1 and isinstance(seeds[0], int) and 1 < seeds[0] <= _PERHAPS_A_NUMBER:
        many = ",".join(map(str, range(seeds[0])))
        say(f"--seeds {given}: one seed, {given}. For {given} seeds, write --seeds {many}.", file=sys.stderr)
    return seeds


def _sweep(given: str | None, matched: Any) -> Sweep | None:
    from braidlora.comparison import Sweep

    if given is None:
        if matched is not None:
            raise ConfigError("--matched requires --sweep KEY=A,B,….")
        return None
    return Sweep(*_key_and_values("sweep", given), matched or "none")


def _key_and_values(option: str, given: str) -> tuple[str, list[Any]]:
    key, separator, text = given.partition("=")
    if not separator or not text:
        raise ConfigError(f"--{option} {given}: expected KEY=A,B,…, e.g. training.learning_rate=1e-4,1e-3.")
    return key.removeprefix("--"), _values(option, text)


def _values(option: str, text: str) -> list[Any]:
    values: list[Any] = _parse(option, text, f"[{text}]")
    return values


def _parse(option: str, given: str, text: str) -> Any:
    from braidlora.config import parse_scalar

    try:
        return parse_scalar(text)
    except ConfigError as error:
        raise ConfigError(f"--{option} {given}: {error}; check brackets and quotes.") from None


def _workers(given: str) -> Any:
    if given != "auto" and not (given.isdecimal() and 1 <= int(given[:9]) <= 1024):
        raise ConfigError(f"--workers: got {given[:40]!r}; expected `auto` or an integer from 1 to 1024.")
    return given if given == "auto" else int(given)
