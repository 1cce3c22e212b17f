"""The `braidlora` command. Every verb is a thin call; heavy imports happen inside it, so `--help` is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from braidlora import __version__
from braidlora.errors import BraidloraError, ConfigError

EPILOG = """\
Recipes are YAML files, or names from `braidlora recipes`. Any key of a recipe can be overridden on the command
line by its dotted name: --training.learning_rate=1e-4, --tasks.snli.train.limit=50, --tasks.*.train.limit=50.
Exit codes: 0 done, 2 recipe or usage, 3 data, 4 training, 5 checkpoint, 130/143 stopped by Ctrl-C/SIGTERM.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="braidlora",
        description="Fine-tune one language model with several LoRAs that share a matrix.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"braidlora {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    demo = _verb(verbs, "demo", _demo, "train ALoRA on eight generated tasks; no network, no data needed")
    demo.add_argument("--overwrite", action="store_true", help="replace a finished demo run")

    train = _verb(verbs, "train", _train, "fine-tune a base model on the tasks of a recipe, then evaluate it")
    train.add_argument("recipe", help="a recipe file or a built-in name")
    train.add_argument(
        "--resume", metavar="auto|PATH", help="carry on from the newest (auto) or a named checkpoint"
    )
    train.add_argument(
        "--allow-inexact-resume",
        action="store_true",
        help="resume though optimizer, scheduler or RNG state is missing",
    )
    train.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run left in the directory"
    )

    evaluate = _verb(
        verbs, "evaluate", _evaluate, "score a run, an adapter folder or a base model on the test rows"
    )
    evaluate.add_argument(
        "target", help="run directory, adapter folder, or base model (folder, hub name, `embedded`)"
    )
    evaluate.add_argument("--recipe", help="tasks and prompts to evaluate on; a run directory brings its own")
    evaluate.add_argument(
        "--directory", type=Path, help="where predictions and metrics.json go (default: in the target)"
    )
    evaluate.add_argument(
        "--fresh", action="store_true", help="answer every row again, also those answered before"
    )

    preview = _verb(
        verbs, "preview", _preview, "show encoded rows per task, with the tokens that carry loss marked"
    )
    preview.add_argument("recipe", help="a recipe file or a built-in name")
    preview.add_argument("--rows", type=int, default=2, help="rows per task (default 2)")

    recipes = _verb(verbs, "recipes", _recipes, "list the built-in recipes, or print one", overrides=False)
    recipes.add_argument("name", nargs="?", help="print this recipe's YAML")
    return parser


def _verb(
    verbs: Any, name: str, run: Callable[..., Any], text: str, *, overrides: bool = True
) -> argparse.ArgumentParser:
    suffix = ", --dotted.key=value for any key of the recipe" if overrides else ""
    verb: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}{suffix}.", allow_abbrev=False
    )
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    verb.set_defaults(run=run, takes_overrides=overrides)
    return verb


def _demo(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.demo import demo

    result = demo(overrides, overwrite=args.overwrite, quiet=args.json)
    if args.json:
        _print_json(result)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import load_config
    from braidlora.evaluation.table import format_metrics
    from braidlora.training.run import train

    config = load_config(args.recipe, overrides)
    resume = args.resume if args.resume in (None, "auto") else Path(args.resume)
    result = train(
        config,
        resume=resume,
        allow_inexact_resume=args.allow_inexact_resume,
        overwrite=args.overwrite,
        progress=not args.json,
    )
    if args.json:
        _print_json({"directory": str(result.directory), **result.metrics})
        return
    if result.metrics.get("tasks"):
        print(format_metrics(result.metrics))
    print(f"\nRun directory  {result.directory}\nAdapter        {result.directory / 'adapter'}")
    print(
        f"Load it with   import braidlora; PeftModel.from_pretrained(base, '{result.directory / 'adapter'}')"
    )


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import load_config
    from braidlora.evaluation.run import evaluate
    from braidlora.evaluation.table import format_metrics

    config = load_config(args.recipe, overrides) if args.recipe else None
    metrics = evaluate(
        args.target,
        config,
        overrides=[] if config else overrides,
        directory=args.directory,
        resume=not args.fresh,
        progress=not args.json,
    )
    if args.json:
        _print_json(metrics)
    else:
        print(format_metrics(metrics))


def _preview(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import load_config
    from braidlora.tasks.preview import preview

    if args.rows < 1:
        raise ConfigError(f"--rows: got {args.rows}; expected at least 1.")
    result = preview(load_config(args.recipe, overrides), rows=args.rows, as_json=args.json)
    if args.json:
        _print_json(result)
    else:
        print(result)


def _recipes(args: argparse.Namespace, overrides: list[str]) -> None:
    from braidlora.config import built_in_recipes, find_recipe

    if args.name:
        path = find_recipe(args.name)
        text = path.read_text(encoding="utf-8")
        _print_json({"name": args.name, "path": str(path), "yaml": text}) if args.json else print(
            text, end=""
        )
        return
    listed = {name: _first_comment(path) for name, path in built_in_recipes().items()}
    if args.json:
        _print_json(listed)
        return
    width = max(map(len, listed), default=0)
    for name, comment in listed.items():
        print(f"{name:<{width}}  {comment}")


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False))


def parse_overrides(words: Sequence[str]) -> list[str]:
    """Turn the words argparse did not know into `key=value` overrides; accepts `--key=value` and `--key value`.

    Raises:
        ConfigError: a word is no override, or a key has no value.
    """
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"unexpected argument {word!r}. Overrides look like --training.learning_rate=1e-4."
            )
        key = word[2:]
        if "=" not in key:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"override --{key}: no value given. Write --{key}=VALUE.")
            key = f"{key}={rest.pop(0)}"
        overrides.append(key)
    return overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; errors made for people go to stderr as one message."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        overrides = parse_overrides(unknown)
        if overrides and not args.takes_overrides:
            raise ConfigError(f"`braidlora {args.verb}` takes no overrides, got --{overrides[0]}.")
        args.run(args, overrides)
    except BraidloraError as error:
        print(f"braidlora {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (`head`, say) has seen enough. Point stdout elsewhere so that the exit flush stays quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"braidlora {args.verb}: stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
