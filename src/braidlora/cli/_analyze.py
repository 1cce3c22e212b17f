"""`braidlora analyze`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.analysis.output import AnalysisDirectory

STUDY = "study"
_ROWS = 64


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "analyze",
        _run,
        "compare adapters: subspaces of A and B, drift, router use, conflict of gradients",
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="adapter folders, run directories, checkpoints or federations of one base; or `study RECIPE`, which "
        "trains single-task LoRAs to see what seeds and tasks make of A and B",
    )
    parser.add_argument(
        "--output", help="folder of the results (default runs/analysis; a study's: OUTPUT-study)"
    )
    parser.add_argument(
        "--routers", action="store_true", help="load the runs' models: which expert serves whom"
    )
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="load the runs' models: do tasks, or a federation's clients, pull the same way",
    )
    parser.add_argument(
        "--rows", type=int, help=f"rows of each task for --routers and --gradients (default {_ROWS})"
    )
    parser.add_argument(
        "--tasks", help="study: names of two tasks or more, with commas (default: the first three)"
    )
    parser.add_argument("--seeds", help="study: two seeds or more, with commas (default 0,1,2)")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.targets[0] == STUDY:
        _study(args, overrides)
        return
    for option in ("tasks", "seeds"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}: belongs to `braidlora analyze study RECIPE`.")
    models = args.routers or args.gradients
    if args.rows is not None and not models:
        raise ConfigError("--rows: only --routers and --gradients look at rows; add one of them.")
    if overrides and not models:
        raise ConfigError(
            f"--{overrides[0]}: similarity and drift read no recipe; overrides go with --routers or --gradients."
        )
    from braidlora.analysis import analyze
    from braidlora.analysis.output import AnalysisDirectory
    from braidlora.analysis.summary import format_analysis

    directory = AnalysisDirectory(args.output or "runs/analysis")
    with directory.held():
        analysis = analyze(
            args.targets,
            routers=args.routers,
            gradients=args.gradients,
            rows=_ROWS if args.rows is None else args.rows,
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
            f"study: expected one recipe, got {' '.join(args.targets[1:]) or 'none'}. A folder of that name is ./study."
        )
    for option in ("routers", "gradients", "rows"):
        given = getattr(args, option)
        if given is not None and given is not False:  # 0 rows are given, too
            raise ConfigError(
                f"--{option}: a study trains plain LoRAs on one task each and has no use for it."
            )
    from braidlora.analysis.output import AnalysisDirectory
    from braidlora.analysis.study import RUNS, run_study
    from braidlora.config import load_config

    config = load_config(args.targets[1], overrides)
    directory = AnalysisDirectory(args.output or f"{config.output}-study", beside=(RUNS,))
    with directory.held():
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
        raise ConfigError(f"--{option}: got {text!r}; expected names with commas between them.")
    return words


def _seed(word: str) -> int:
    if not word.isdecimal() or int(word) >= 2**32:
        raise ConfigError(f"--seeds: got {word!r}; expected whole numbers from 0, e.g. --seeds=0,1,2.")
    return int(word)


def _print_places(directory: AnalysisDirectory, written: dict[str, Any]) -> None:
    say(f"\nNumbers  {directory.result}")
    for figure in written["figures"]:
        say(f"Figure   {directory.path / figure['name']}.png, .svg  {figure['title']}")
    if not written["figures"]:
        say("Figures need matplotlib: pip install 'braidlora[report]'")
