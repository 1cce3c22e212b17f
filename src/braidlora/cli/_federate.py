"""`braidlora federate`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import old_name, print_json, verb
from braidlora.errors import ConfigError, explain_write_failures
from braidlora.processes import launched
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.config import FederatedConfig

ENGINES = ("local", "flower-sim", "flower")


def add(verbs: Any) -> None:
    parser = verb(verbs, "federate", _run, "train the clients of a federated recipe together and score them")
    parser.add_argument("recipe", help="a federated recipe file or a built-in name")
    parser.add_argument("--resume", metavar="auto", help="resume after the last committed round")
    parser.add_argument(
        "--overwrite", action="store_true", help="discard an earlier federation in the directory"
    )
    parser.add_argument(
        "--rollback", type=int, metavar="ROUND",
        help="return to an earlier round still on disk and delete those after it; add --resume auto to continue "
        "from there. RECIPE may be the federation's directory",
    )  # fmt: skip
    local_run = parser.add_argument(
        "--local-run",
        metavar="RUN",
        type=Path,
        help="finished run of rule `local`, as the reference for Δm%%",
    )
    old_name(parser, "--references", local_run)
    parser.add_argument(
        "--engine", choices=ENGINES, default="local",
        help="local: this process or federation.workers of them (default); flower-sim: Flower's simulation on Ray; "
        "flower: sites that `braidlora site join FOLDER` has connected",
    )  # fmt: skip
    parser.add_argument("--client-cpus", type=float, metavar="N", help="flower-sim: CPUs of one client's job")
    parser.add_argument(
        "--client-gpus",
        type=float,
        metavar="N",
        help="flower-sim: share of a GPU that one client's job takes, 0 to 1",
    )
    parser.add_argument(
        "--site", type=Path, metavar="DIR", help="flower: the server's folder, from `site init`"
    )
    parser.add_argument(
        "--accept-fresh-state", metavar="NAMES", help="flower: clients, separated by commas, that may start "
        "from scratch although the server has counted rounds from them",
    )  # fmt: skip


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import FederatedConfig, load_config
    from braidlora.runs import FederatedDirectory, hold, output_of

    if args.resume not in (None, "auto"):
        raise ConfigError(
            f"--resume {args.resume}: expected `auto`, which resumes from the newest round in the output directory."
        )
    _check_engine(args)
    config = load_config(_recipe(args), overrides, FederatedConfig)
    if launched()[1] > 1:
        from braidlora.federated.simulation.launch import check_launch

        check_launch(config, connect=None if args.engine == "local" else args.engine)
    own = args.rollback is not None and Path(args.recipe).is_dir()
    output = args.recipe if own else output_of(config.output, "federate", overrides)
    config = config.model_copy(update={"output": output})
    if args.rollback is not None and args.resume is None:
        with hold(FederatedDirectory.at(config.output).path):
            _roll_back(args, config.output)
        return
    options = {
        "resume": args.resume,
        "overwrite": args.overwrite,
        "rollback": args.rollback,
        "local_run": args.local_run,
        "progress": not args.json,
    }
    if args.engine == "flower":
        _run_at_sites(args, config, options)
        return
    if args.engine == "flower-sim":  # it holds the directory in a thread of its own
        from braidlora.federated.flower.simulated import federate_on_ray

        result = federate_on_ray(config, cpus=args.client_cpus, gpus=args.client_gpus or 0.0, **options)
        report, why_not = write_page(result.directory, _again(args.command))
    else:
        from braidlora.federated.simulation.driver import federate

        with hold(FederatedDirectory.at(config.output).path):
            result = federate(config, **options)
            if not result.metrics:
                return  # of several processes, the first one reports
            report, why_not = write_page(result.directory, _again(args.command))
    _show(
        args, result.directory, result.metrics, f"{result.directory}/clients/NAME/adapter", report or why_not
    )


def _show(
    args: argparse.Namespace, directory: Path, metrics: dict[str, Any], adapters: str, report: Path | str
) -> None:
    from braidlora.federated.simulation.table import format_federation
    from braidlora.runs import failing_lines

    for line in failing_lines(metrics):  # the federation succeeded, but the user must see them
        say(f"braidlora {args.verb}: warning: {line}", file=sys.stderr)
    if args.json:
        print_json({"directory": str(directory), **metrics})
        return
    say(format_federation(metrics))
    say(f"\nRun directory  {directory}\nAdapters       {adapters}\nReport         {report}")


def _run_at_sites(args: argparse.Namespace, config: FederatedConfig, options: dict[str, Any]) -> None:
    from braidlora.federated.flower.start import federate_at_sites
    from braidlora.runs import FederatedDirectory, hold

    if args.site is None:
        raise ConfigError(
            "--engine flower needs --site DIR, the server's folder of `braidlora site init --server`."
        )
    shown = options.pop("progress")
    fresh = [name for name in (args.accept_fresh_state or "").split(",") if name]
    output = federate_at_sites(
        config,
        args.site,
        accept_fresh=fresh,
        say=(lambda text: say(text, file=sys.stderr)) if shown else (lambda text: None),
        **options,
    )
    directory = FederatedDirectory(output)
    with hold(output):
        report, why_not = write_page(output, _again(args.command))
    metrics = directory.read_json(directory.metrics.name)
    _show(args, output, metrics, "at each site, in federations/ID/adapter", report or why_not)


def _check_engine(args: argparse.Namespace) -> None:
    """Reject options of another engine.

    Raises:
        ConfigError: names the option and its engine.
    """
    for option, engine in (
        ("client_cpus", "flower-sim"),
        ("client_gpus", "flower-sim"),
        ("site", "flower"),
        ("accept_fresh_state", "flower"),
    ):
        if getattr(args, option) is not None and args.engine != engine:
            raise ConfigError(
                f"--{option.replace('_', '-')} applies to --engine {engine}; the engine is {args.engine}."
            )


def _recipe(args: argparse.Namespace) -> str:
    """Path or name of the recipe; with --rollback, RECIPE may be a federation directory, whose recipe is used."""
    if args.rollback is not None and Path(args.recipe).is_dir():
        return str(Path(args.recipe) / "config.yaml")
    return str(args.recipe)


def _roll_back(args: argparse.Namespace, output: str) -> None:
    from braidlora.federated.simulation.rollback import rollback
    from braidlora.runs import FederatedDirectory

    if args.overwrite:
        raise ConfigError(
            "--rollback and --overwrite are mutually exclusive: one goes back to a round, the other starts over."
        )
    directory = FederatedDirectory.at(output)
    gone = rollback(directory, args.rollback)
    if args.json:
        print_json({"directory": str(directory.path), "round": args.rollback, "removed": gone})
        return
    removed = ", ".join(map(str, sorted(gone)))
    say(
        f"{directory.path}: "
        + (
            f"rolled back to round {args.rollback}; removed {'round' if len(gone) == 1 else 'rounds'} {removed}"
            if removed
            else f"already at round {args.rollback}"
        )
        + ". Use --resume auto to continue from there."
    )


def _again(command: str) -> str:
    """The command as the report quotes it: with `--resume auto`, without `--overwrite` and `--rollback`."""
    words, given = shlex.split(command), []
    while words:
        word = words.pop(0)
        if word in ("--resume", "--rollback") and words:
            words.pop(0)
        elif word != "--overwrite" and not word.startswith(("--resume=", "--rollback=")):
            given.append(word)
    return shlex.join([*given, "--resume", "auto"])


def write_page(directory: Path, command: str) -> tuple[Path | None, str]:
    """Write the report with its figures; without the packages of the extra `report`, return the reason instead."""
    from braidlora.reporting.federated_sections import read_federation
    from braidlora.reporting.page import write_report
    from braidlora.runs import hold

    with hold(directory):
        try:
            with explain_write_failures(
                directory, "then --resume auto writes the report; the results are complete"
            ):
                return write_report(directory, None, federated=read_federation(directory, command)), ""
        except ConfigError as error:
            return None, f"none: {error}"
