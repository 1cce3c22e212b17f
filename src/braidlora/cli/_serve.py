"""`braidlora serve`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import print_json, verb
from braidlora.errors import ConfigError
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.serving.engines import Options, Start
    from braidlora.serving.installation import Installation
    from braidlora.serving.targets import Hosting


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "serve",
        _run,
        "start an OpenAI-compatible server for adapters by name, with their base model",
        overrides=False,
    )
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="[NAME=]TARGET",
        help="run directory, checkpoint, adapter folder, export, RUN/clients/NAME, RUN/cells/NAME, a federation (all "
        "its clients), or a base model",
    )
    parser.add_argument(
        "--engine",
        choices=("vllm", "transformers"),
        default="vllm",
        help="vllm: all adapters in one batch; transformers: any adapter, one request at a time",
    )
    parser.add_argument("--base", metavar="PATH", help="base model, if it is not at the path in the adapters")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base model; default: that of the recipe (model.dtype)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (default 8000)")
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the API key, mode 0600; otherwise the variable BRAIDLORA_API_KEY. Required if other machines "
        "can reach the address",
    )
    parser.add_argument(
        "--load-from",
        action="append",
        metavar="DIR",
        help="folder from which adapters may be loaded at run time; repeatable. Default: any folder on the loopback "
        "address, otherwise none",
    )
    parser.add_argument("--no-loading", action="store_true", help="do not load adapters at run time")
    parser.add_argument(
        "--max-loras", type=int, metavar="N", help="vllm: adapters in one batch (default: all, at most 8)"
    )
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        metavar="R",
        help="vllm: rank of the server (default: the smallest that fits)",
    )
    parser.add_argument(
        "--engine-args", metavar="WORDS", help="vllm: additional arguments, e.g. '--max-model-len 2048'"
    )
    parser.add_argument(
        "--check", action="store_true", help="check whether this installation can serve them, and exit"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and exit")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.models.presence import refuse_missing

    if not args.targets and not args.check:
        raise ConfigError("serve: give at least one run, adapter or base model; `braidlora serve --help`.")
    if not 1 <= args.port <= 65_535:
        raise ConfigError(f"--port: got {args.port}; expected 1 to 65535.")
    if args.max_loras is not None and not 1 <= args.max_loras <= 1024:
        raise ConfigError(f"--max-loras: got {args.max_loras}; expected 1 to 1024.")
    if args.no_loading and args.load_from:
        raise ConfigError("--no-loading and --load-from cannot be combined.")
    for word in args.targets:
        if "=" not in word:  # or a path that contains one, which is resolved later
            refuse_missing(word)
    from braidlora.serving import engines, key, targets

    options = engines.Options(
        host=args.host,
        port=args.port,
        key=key.find(args.host, args.api_key_file),
        max_loras=args.max_loras,
        max_lora_rank=args.max_lora_rank,
        load_from=() if args.no_loading else _folders(args.load_from),
        extra=tuple(engines.arguments(args.engine_args)),
        dtype=args.dtype,
    )
    hosting = targets.find(args.targets, args.base) if args.targets else None
    if args.check:
        _check(args, hosting)
        _warn(args, hosting, options)
        return
    assert hosting is not None
    start = engines.start(hosting, args.engine, options)
    if not args.dry_run:
        from braidlora.serving.installation import check

        _refuse(check(args.engine))
    _show(args, hosting, options, start)
    _warn(args, hosting, options)
    if not args.dry_run:
        _become(start)


def _folders(given: list[str] | None) -> tuple[Path, ...] | None:
    if given is None:
        return None
    from braidlora.paths import expanded

    folders = tuple(expanded(one) for one in given)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--load-from: {folder} is not a folder.")
        if os.pathsep in str(folder):
            raise ConfigError(f"--load-from: {folder} contains {os.pathsep!r}, which separates folders.")
    return folders


def _check(args: argparse.Namespace, hosting: Hosting | None) -> None:
    """Print what `--check` found; exit code 2 if something is missing."""
    from braidlora.serving import engines
    from braidlora.serving.installation import check

    found = check(args.engine)
    problems = [*found.problems, *(engines.problems(hosting, args.engine) if hosting else ())]
    if args.json:
        print_json(
            {
                "engine": found.engine,
                "version": found.version,
                "tested": list(found.tested),
                "adapters": _described(hosting) if hosting else {},
                "problems": problems,
            }
        )
    else:
        say(f"Engine     {found.engine} {found.version or '(not installed)'}")
        if found.note:
            say(f"           {found.note}")
        for name, one in (_described(hosting) if hosting else {}).items():
            say(f"Adapter    {name}: {one['kind']}, {one['folder']}")
        if hosting is not None and args.engine == "vllm" and not problems:
            say(f"Rank       --max-lora-rank {engines.needed_rank(hosting)}")
        say("Can serve  " + ("no" if problems else "yes"))
    if problems:
        raise ConfigError("cannot serve:\n  " + "\n  ".join(problems))


def _refuse(found: Installation) -> None:
    if found.problems:
        raise ConfigError("\n  ".join(found.problems))
    if found.note:
        say(f"braidlora serve: note: vLLM {found.note}.", file=sys.stderr)


def _described(hosting: Hosting) -> dict[str, dict[str, Any]]:
    from braidlora.serving.adapter_file import describe_columns

    return {
        name: {
            "kind": f"{one.config.peft_type}"
            + (f", {describe_columns(one.layout)}" if one.layout is not None else ""),
            "folder": str(one.folder),
            "rank": one.layout.columns if one.layout is not None else None,
        }
        for name, one in hosting.adapters.items()
    }


def _show(args: argparse.Namespace, hosting: Hosting, options: Options, start: Start) -> None:
    from braidlora.serving.engines import curl_lines

    curls = curl_lines(hosting, options)
    if args.json:
        print_json(
            {
                "engine": args.engine,
                "url": options.url,
                "base": hosting.source,
                "adapters": _described(hosting),
                "command": list(start.command),
                "environment": dict(start.environment),
                "shown": start.shown(),
                "curl": curls,
            }
        )
        return
    say(f"Base       {hosting.source}")
    for name, one in _described(hosting).items():
        say(f"Adapter    {name}: {one['kind']}")
    say(f"\n{start.shown()}\n")
    for line in curls.values():
        say(line)


def _warn(args: argparse.Namespace, hosting: Hosting | None, options: Options) -> None:
    from braidlora.serving.engines import quantization_warning

    if hosting is not None and (text := quantization_warning(hosting, args.engine, options)):
        say(f"braidlora serve: warning: {text}", file=sys.stderr)


def _become(start: Start) -> None:
    """Replace this process by the server, which so gets signals and exit codes at first hand."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(start.command[0], list(start.command), start.variables())
