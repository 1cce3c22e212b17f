"""`braidlora predict`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from braidlora.cli._common import rows_here, verb
from braidlora.errors import ConfigError, DataError, explain_write_failures
from braidlora.terminal import json_printable, say

_MOST_SHOWN = 20  # bad rows in messages


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "predict",
        _run,
        "answer rows of a task with a trained adapter, one JSON object per line",
        overrides=False,
    )
    parser.add_argument("target", help=TARGETS)
    parser.add_argument("--task", metavar="NAME", help="task of the rows; not needed if there is one")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="rows: a json, jsonl, csv, xlsx or parquet file, a txt file with a text per line, or - for JSONL on stdin",
    )
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="one row: its text, or its instruction; repeatable"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here instead of to stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument(
        "--mode",
        choices=("rank", "generate"),
        help="language models: rank the task's options, or generate text (default: as in the recipe)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows per batch (default: the recipe's)")
    add_sources(parser)
    add_server(parser)


TARGETS = (
    "run directory, checkpoint, adapter folder, export, merged model, RUN/clients/NAME of a federation, or "
    "RUN/cells/NAME of a comparison"
)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Options for an adapter whose folder does not say everything."""
    parser.add_argument("--base", metavar="PATH", help="base model, if it is not at the path in the adapter")
    parser.add_argument("--recipe", help="recipe it was trained with, if its folder has no tasks and prompts")


def sources_here(args: argparse.Namespace) -> None:
    """Raise ConfigError if the target, its base or its recipe is missing, before the heavy imports."""
    from braidlora.config import find_recipe
    from braidlora.models.presence import refuse_missing

    refuse_missing(args.target)
    if args.base is not None:
        refuse_missing(args.base)
    if args.recipe is not None:
        find_recipe(args.recipe)


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if (args.file is None) == (args.text is None):
        raise ConfigError("give the rows with either --file FILE or --text TEXT.")
    if args.model is not None and args.url is None:
        raise ConfigError("--model is a model name on a server; it requires --url.")
    sources_here(args)
    if args.file is not None:
        rows_here(args.file)
    _check_output(args.output, args.overwrite)
    from braidlora.inference.rows import from_file, from_values
    from braidlora.inference.target import find_target

    target = find_target(args.target, base=args.base, recipe=args.recipe)
    target.task(args.task)  # a mistyped task shows before a large base is loaded
    raws = from_values(args.text, "--text") if args.file is None else from_file(args.file)
    count, bad = 0, 0
    model = remote_or_local(args, target)
    with _opened(args.output) as file:
        for line in model.predictions(raws, args.task, mode=args.mode, batch_size=args.batch_size):
            count += 1
            if "error" in line:
                bad += 1
                if bad <= _MOST_SHOWN:
                    say(
                        f"braidlora predict: row {line['row']} ({line['place']}): {line['error']}",
                        file=sys.stderr,
                    )
            file.write(json_printable(json.dumps(line, ensure_ascii=False)) + "\n")
            file.flush()
    if args.output is not None:
        say(f"Predictions  {args.output} ({count} rows)", file=sys.stderr)
    if bad:
        raise DataError(f"{bad} of {count} rows have no prediction; their lines have an `error` instead.")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Options for a model that a server runs."""
    parser.add_argument(
        "--url", metavar="URL", help="query a server (`braidlora serve`) instead of loading the model; its API key is "
        "read from the variable BRAIDLORA_API_KEY"
    )  # fmt: skip
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the target's name on the server (default: the name that `serve` assigns)",
    )


def _remote(args: argparse.Namespace, target: Any) -> Any:
    """The target's model at the server that --url names."""
    from braidlora.inference.remote import connect
    from braidlora.serving.targets import BASE_NAME, default_name

    own = BASE_NAME if target.origin.folder is None else default_name(Path(args.target).expanduser())
    return connect(target, args.url, args.model or own)


def remote_or_local(args: argparse.Namespace, target: Any) -> Any:
    """The model of the target: loaded here, or at the server that --url names."""
    from braidlora.inference.loading import load_target

    return load_target(target) if args.url is None else _remote(args, target)


def _check_output(path: Path | None, overwrite: bool) -> None:
    if path is not None and path.exists() and not overwrite:
        raise ConfigError(f"--output: {path} exists; --overwrite replaces it.")


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[str]]:
    """Where the lines go, as they come. An earlier file is replaced only once all of them are written."""
    if path is None:
        yield sys.stdout
        return
    staged = path.with_name(f".{path.name}.partial") if path.exists() else path
    try:
        with explain_write_failures(path, "and start again, or give another --output"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(staged, "w", encoding="utf-8", newline="\n") as file:
                yield file
            os.replace(staged, path)
    finally:
        if staged != path:
            staged.unlink(missing_ok=True)
