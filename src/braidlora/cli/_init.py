"""`braidlora init`: a recipe from data files."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import print_json, rows_here, verb
from braidlora.errors import BraidloraError, ConfigError, DataError, explain_write_failures
from braidlora.runs import atomic_write_text
from braidlora.terminal import say

if TYPE_CHECKING:
    from braidlora.tasks.guess import Guess

_LABELS = 6  # shown
_ENCODED = 500  # rows of a task


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "init",
        _run,
        "write a recipe for your data files: columns are detected and shown",
        overrides=False,
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="csv, json, jsonl, parquet or xlsx; each is a task; NAME-train, NAME-test and NAME-validation form one "
        "task",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="base model: a folder, hub name or GGUF file (default: a small one that is available)",
    )
    parser.add_argument(
        "--columns",
        metavar="FIELD=COLUMN,…",
        help="columns of all files, such as text=body,label=queue, or instruction=question,output=answer",
    )
    parser.add_argument("--output", type=Path, metavar="RECIPE", help="recipe to write (default: NAME.yaml)")
    parser.add_argument("--yes", action="store_true", help="ask no questions, even on a terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace the recipe file")


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    for path in args.files:
        rows_here(path)
    from braidlora.models.draft_base import choose_base, how_to_get_one
    from braidlora.models.presence import EMBEDDED
    from braidlora.tasks.draft import (
        CHAT_TEMPLATE,
        by_task,
        draft_recipe,
        most_tokens,
        needs_chat_template,
    )
    from braidlora.tasks.guess import guess_file, like

    given = _columns(args.columns)
    asks = not (args.yes or args.json) and sys.stdin.isatty() and sys.stdout.isatty()
    guesses = [guess_file(path, given) for path in args.files]
    train = {guess.name: guess for guess in reversed(guesses) if guess.part == "train"}
    guesses = [
        like(guess.path, train[guess.name]) if guess.part != "train" and guess.name in train else guess
        for guess in guesses
    ]
    if not args.json:
        for guess in guesses:
            say(_shown(guess))
    if asks:
        guesses = [_asked(guess) for guess in guesses]
    name = next(iter(by_task(guesses))) if len(by_task(guesses)) == 1 else "my"
    recipe = args.output or Path(f"{name}.yaml")
    if recipe.exists() and not args.overwrite:
        raise ConfigError(f"{recipe}: exists; --overwrite replaces it, --output FILE.yaml writes another.")
    base = choose_base(args.model, all(guess.kind == "classify" for guess in guesses))
    if args.model is None and base.path == EMBEDDED:
        say(f"braidlora init: warning: {how_to_get_one()}.", file=sys.stderr)
    template = recipe.with_name(f"{recipe.stem}-chat.jinja") if needs_chat_template(guesses, base) else None
    if template is not None and template.exists() and not args.overwrite:
        raise ConfigError(f"{template}: exists; --overwrite replaces it, --output FILE.yaml writes another.")

    def draft(tokens: int | None) -> str:
        text = draft_recipe(
            guesses, base, f"runs/{recipe.stem}", args.command,
            chat_template=None if template is None else str(template), tokens=tokens,
        )  # fmt: skip
        return text.replace("THIS_FILE", shlex.quote(str(recipe)))

    with explain_write_failures(recipe, "or give another --output"):
        recipe.parent.mkdir(parents=True, exist_ok=True)
        if template is not None:
            atomic_write_text(template, CHAT_TEMPLATE)
        atomic_write_text(recipe, draft(most_tokens(base)))
        tokens, problem = _measure(recipe)
        atomic_write_text(recipe, draft(tokens))
    if args.json:
        print_json(
            {
                "recipe": str(recipe),
                "base": base.path,
                "tasks": {
                    task: {part: _as_json(guess) for part, guess in parts.items()}
                    for task, parts in by_task(guesses).items()
                },
                "problem": problem,
            }
        )
        return
    say(f"\nBase model     {base.path}{f' ({base.comment})' if base.comment else ''}")
    say(f"Recipe         {recipe}")
    if problem:
        raise DataError(f"{recipe} was written, but cannot be run yet: {problem}")
    quoted = shlex.quote(str(recipe))
    say(f"Preview        braidlora preview {quoted}\nTrain          braidlora train {quoted}")
    say(f"Compare        braidlora compare {quoted}")


def _columns(given: str | None) -> dict[str, str]:
    if given is None:
        return {}
    found = {}
    for pair in given.split(","):
        field, separator, column = pair.partition("=")
        if not separator or not field.strip() or not column.strip():
            raise ConfigError(f"--columns {given}: expected FIELD=COLUMN,…, such as text=body,label=queue.")
        found[field.strip()] = column.strip()
    known = ("instruction", "input", "output", "answer", "text", "label", "messages", "tools")
    unknown = [field for field in found if field not in known]
    if unknown:
        raise ConfigError(f"--columns: unknown field {unknown[0]!r}; the fields are {', '.join(known)}.")
    return found


def _shown(guess: Guess) -> str:
    """What a file was taken for, in a few lines."""
    from braidlora.tasks.guess import FIELDS, columns_of

    kinds = {"classify": "labels to classify", "generate": "answers to generate", "chat": "chats"}
    found = columns_of(guess, FIELDS[guess.kind])
    used = ", ".join(f"{field} from {column!r}" for field, column in found.items())
    lines = [f"{guess.path}: {guess.part} rows of task {guess.name}, {kinds[guess.kind]}"]
    read = f", {guess.read_as}" if guess.read_as else ""
    lines.append(f"  {guess.rows:,} rows read{read}; {used or 'the chats are in `conversations`'}")
    if guess.labels:
        shown = ", ".join(f"{label} ({count})" for label, count in list(guess.labels.items())[:_LABELS])
        more = f" and {len(guess.labels) - _LABELS} more" if len(guess.labels) > _LABELS else ""
        lines.append(f"  {len(guess.labels)} labels: {shown}{more}")
    lines += [f"  check: {text}" for text in guess.unsure]
    lines += [f"  note: {text}" for text in guess.notes]
    if guess.unused:
        shown = ", ".join(map(repr, guess.unused[:_LABELS]))
        more = f" and {len(guess.unused) - _LABELS} more" if len(guess.unused) > _LABELS else ""
        lines.append(f"  warning: columns that are not used: {shown}{more}")
    return "\n".join(lines)


def _asked(guess: Guess) -> Guess:
    """The guess, with columns confirmed or corrected by the person at the terminal, where they are uncertain."""
    from braidlora.tasks.guess import columns_of, guess_file

    if not guess.unsure:
        return guess
    fields = ("text", "label") if guess.kind == "classify" else ("instruction", "output")
    say(f"{guess.path}: columns {', '.join(guess.there)}. Enter keeps the one in brackets.")
    chosen = columns_of(guess, ("input",)) if guess.kind == "generate" else {}
    for field in fields:
        while True:
            answer = input(f"  {field} [{guess.column(field)}]: ").strip() or guess.column(field)
            if answer in guess.there:
                chosen[field] = answer
                break
            say(f"  no column {answer!r}")
    return guess_file(guess.path, chosen)


def _measure(recipe: Path) -> tuple[int | None, str | None]:
    """How many tokens the rows need, and why the recipe does not run yet; None each if unknown, or if it runs.

    The recipe is read as `train` reads it, with all rows; of each task the first rows are encoded.
    """
    from braidlora.config import load_config
    from braidlora.models.tokenizer import load_tokenizer
    from braidlora.tasks import encode_tasks, load_tasks

    try:
        config = load_config(recipe)
        tasks = load_tasks(config)
    except BraidloraError as error:
        return None, str(error)
    try:
        tokenizer = load_tokenizer(config.model)
        some = [replace(task, train=task.train[:_ENCODED]) for task in tasks]
        lengths = sorted(encode_tasks(some, tokenizer, config.prompt).lengths())
    except (ConfigError, DataError) as error:
        return None, str(error)
    return lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))], None


def _as_json(guess: Guess) -> dict[str, Any]:
    return {
        "path": guess.path, "kind": guess.kind, "columns": guess.columns, "rows": guess.rows, "labels": guess.labels,
        "unsure": guess.unsure, "notes": guess.notes, "unused": guess.unused,
    }  # fmt: skip
