"""`braidlora analyze`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import old_name, print_json, recipe_here, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.analysis.output import AnalysisDirectory

STUDY = "study"
_ROWS = 64
_MEMBERS = 500


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "analyze",
        _run,
        "analyze adapters: subspaces of A and B, drift, router use, gradient conflict, membership",
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="adapter folders, run directories, checkpoints or federations of one base model; or `study RECIPE`, "
        "which trains single-task LoRAs to separate the effects of seed and task on A and B",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="output folder (default runs/analysis; for a study, OUTPUT-study)"
    )
    parser.add_argument(
        "--routers", action="store_true", help="measure which experts each task uses (loads the models)"
    )
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="measure gradient conflict between tasks, or between a federation's clients (loads the models)",
    )
    parser.add_argument(
        "--membership",
        action="store_true",
        help="measure whether losses tell which rows were trained on (loads the models; no comparison)",
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="--membership: names training and test rows of an adapter folder"
    )
    rows = parser.add_argument(
        "--rows-per-task",
        type=int,
        metavar="N",
        help=f"data rows for --routers and --gradients (default {_ROWS}) and --membership (default {_MEMBERS})",
    )
    old_name(parser, "--rows", rows)
    parser.add_argument(
        "--tasks",
        metavar="A,B,…",
        help="study: two or more task names, separated by commas (default: the first three)",
    )
    parser.add_argument(
        "--seeds", metavar="A,B,…", help="study: two or more seeds, separated by commas (default 0,1,2)"
    )


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.targets[0] == STUDY:
        _study(args, overrides)
        return
    for option in ("tasks", "seeds"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option} only applies to `braidlora analyze study RECIPE`.")
    models = args.routers or args.gradients or args.membership
    if args.rows_per_task is not None and not models:
        raise ConfigError("--rows-per-task requires --routers, --gradients or --membership.")
    if overrides and not models:
        raise ConfigError(
            f"--{overrides[0]}: overrides require --routers, --gradients or --membership; similarity and drift read no "
            "recipe."
        )
    from braidlora.models.presence import refuse_missing

    for target in args.targets:
        refuse_missing(target)
    from braidlora.analysis import analyze
    from braidlora.analysis.output import AnalysisDirectory
    from braidlora.analysis.text import format_analysis
    from braidlora.runs import hold

    default = _ROWS if args.routers or args.gradients else _MEMBERS
    directory = AnalysisDirectory(args.output or "runs/analysis")
    with hold(directory.path):
        analysis = analyze(
            args.targets,
            routers=args.routers,
            gradients=args.gradients,
            membership=args.membership,
            recipe=args.recipe,
            rows=default if args.rows_per_task is None else args.rows_per_task,
            overrides=overrides,
        )
        written = directory.write(analysis, args.command)
    if args.json:
        print_json(written)
        return
    say(format_analysis(analysis))
    _print_places(directory, written)


def _study(args: argparse.Namespace, overrides: list[str]) -> None:
    if len(args.targets) != 2:
        raise ConfigError(
            f"study: expected one recipe, got {' '.join(args.targets[1:]) or 'none'}. "
            "For a folder named study, write ./study."
        )
    for option in ("routers", "gradients", "membership", "recipe", "rows-per-task"):
        given = getattr(args, option.replace("-", "_"))
        if given is not None and given is not False:  # --rows-per-task=0 was given
            raise ConfigError(f"--{option} does not apply to a study, which trains plain single-task LoRAs.")
    from braidlora.runs import hold

    config = recipe_here(args.targets[1], overrides)
    from braidlora.analysis.output import AnalysisDirectory
    from braidlora.analysis.study import RUNS, run_study

    directory = AnalysisDirectory(args.output or f"{config.output}-study", allowed=(RUNS,))
    with hold(directory.path):
        analysis = run_study(
            config,
            directory.path,
            tasks=None if args.tasks is None else _words("tasks", args.tasks),
            seeds=None if args.seeds is None else [_seed(word) for word in _words("seeds", args.seeds)],
            progress=not args.json,
        )
        written = directory.write(analysis, args.command)
    if args.json:
        print_json(written)
        return
    for finding in analysis["study"]["verdict"].values():
        say(f"\n{finding['text']}")
    _print_places(directory, written)


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"--{option}: got {text!r}; expected names separated by commas.")
    return words


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 2**32:
        raise ConfigError(
            f"--seeds: got {word!r}; expected non-negative integers below 2^32, e.g. --seeds=0,1,2."
        )
    return int(word)


def _print_places(directory: AnalysisDirectory, written: dict[str, Any]) -> None:
    say(f"\nNumbers  {directory.result}")
    for figure in written["figures"]:
        say(f"Figure   {directory.path / figure['name']}.png, .svg  {figure['title']}")
    if not written["figures"]:
        say("Figures need matplotlib: pip install 'braidlora[report]'")
