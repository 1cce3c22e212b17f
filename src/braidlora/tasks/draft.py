"""A recipe for data files: what `braidlora init` writes. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from braidlora.config import TaskSection, parse_scalar
from braidlora.errors import ConfigError
from braidlora.tasks.guess import Guess

_FEW, _SOME = 200, 1000  # rows
_STEPS, _EPOCHS, _MOST_EPOCHS = 100, 3, 10  # fewer steps teach an adapter little
_STEP = 32  # the cutoff is a multiple of it
_TEMPLATE_TOKENS = 64  # of a prompt template or a chat's markers, roughly
_SMALL, _LARGEST = 64, 2048
_SHOWN = 4  # columns in a comment


@dataclass(frozen=True)
class DraftBase:
    """The base that a recipe is written for.

    Attributes:
        path, gguf_file: as in the recipe.
        comment: behind it.
        positions: most tokens of a sequence; None if unknown.
        hidden: its width; None if unknown.
        characters: of text per token.
        chat_template: whether its tokenizer has one.
    """

    path: str
    gguf_file: str | None = None
    comment: str = ""
    positions: int | None = None
    hidden: int | None = None
    characters: float = 3.0
    chat_template: bool = True

    def learning_rate(self) -> float:
        """Small bases need more; the paper's 3e-4 is for 7B parameters."""
        if self.hidden is None or self.hidden > 1024:
            return 3e-4
        return 1e-3 if self.hidden > 256 else 5e-3


def by_task(guesses: Sequence[Guess]) -> dict[str, dict[str, Guess]]:
    """The files of every task by part; files of the same name and part become tasks of their own.

    Raises:
        ConfigError: a task has test rows, say, and no training rows, or its files differ in kind.
    """
    tasks: dict[str, dict[str, Guess]] = {}
    for guess in guesses:
        name, number = guess.name, 2
        while guess.part in tasks.get(name, {}):
            name, number = f"{guess.name}_{number}", number + 1
        tasks.setdefault(name, {})[guess.part] = guess
    for name, parts in tasks.items():
        if "train" not in parts:
            [other, *_] = parts.values()
            raise ConfigError(
                f"{other.path}: its name suggests the {other.part} rows of {name}, but no file has the training rows. "
                f"Add their file, or rename this one."
            )
        kinds = {guess.kind for guess in parts.values()}
        if len(kinds) > 1:
            looks = ", ".join(f"{guess.path} looks like {guess.kind}" for guess in parts.values())
            raise ConfigError(
                f"{name}: {looks}; the files of one task must have the same layout. Name the columns with --columns."
            )
    return tasks


def needs_chat_template(guesses: Sequence[Guess], base: DraftBase) -> bool:
    """Whether there are chats, and the base's tokenizer has no template for them."""
    return not base.chat_template and any(guess.kind == "chat" for guess in guesses)


# ChatML, without tools: for chats on a base that was not trained on any.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def draft_recipe(
    guesses: Sequence[Guess],
    base: DraftBase,
    output: str,
    command: str,
    *,
    chat_template: str | None = None,
    tokens: int | None = None,
) -> str:
    """The text of a recipe, with comments on what was guessed.

    Args:
        guesses: one per file.
        base: the base model.
        output: the run directory.
        command: what wrote it, for the first line.
        chat_template: file with a chat template, for a base without one.
        tokens: of a row with its prompt template, all but the longest in a hundred; by default estimated.

    Raises:
        ConfigError: the files do not form tasks.
    """
    tasks = by_task(guesses)
    train = [parts["train"] for parts in tasks.values()]
    classify = all(guess.kind == "classify" for guess in train)
    cutoff, cut = _cutoff(guesses, base, tokens)
    rows = sum(guess.rows for guess in train)
    batch = _batch(rows)
    per_epoch = max(1, math.ceil(rows / batch))
    epochs = min(_MOST_EPOCHS, max(_EPOCHS, math.ceil(_STEPS / per_epoch)))
    steps = epochs * per_epoch
    model = f"model:\n  path: {_text(base.path)}{f'  # {base.comment}' if base.comment else ''}\n"
    if base.gguf_file:
        model += f"  gguf_file: {_text(base.gguf_file)}\n"
    if chat_template is not None:
        model += f"  chat_template: {_text(chat_template)}  # ChatML, because the base has no template of its own\n"
    prompt = f"prompt:\n  cutoff: {cutoff}  # tokens of a row, at most{cut}\n"
    chat = any(guess.kind == "chat" for guess in train)
    if not classify:
        template = "chat" if chat or base.chat_template else "alpaca"
        about = (
            "the tokenizer's chat template"
            if template == "chat"
            else "or alpaca_short, chat, a format string"
        )
        prompt += f"  template: {template}  # {about}\n"
    lines = [
        f"# Written by: {command}",
        "# Check what the model will see:  braidlora preview THIS_FILE",
        "# Train, then compare methods:    braidlora train THIS_FILE; braidlora compare THIS_FILE",
        model.rstrip(),
        "",
        "adapter:",
        "  method: alora  # or lora, hydralora, moelora; `braidlora compare` tries them all",
        "  num_experts: 3",
        "  r: 8",
        "  lora_alpha: 16",
        "  target_modules: all-linear",
        "",
        "tasks:",
    ]
    for name, parts in tasks.items():
        lines += _task(name, parts, classify)
    missing = [part for part in ("validation", "test") if any(part not in parts for parts in tasks.values())]
    if missing:
        smallest = min(guess.rows for guess in train)
        share = {"validation": 0.1, "test": _test_share(smallest)}
        shares = ", ".join(f"{part}: {share[part]:g}" for part in missing)
        lines += ["", f"split: {{{shares}}}  # shares of `train` that tasks without such files hold out"]
    lines += [
        "",
        prompt.rstrip(),
        "",
        "training:",
        f"  epochs: {epochs}" + ("  # few rows need more passes" if epochs > _EPOCHS else ""),
        f"  batch_size: {batch}",
        f"  learning_rate: {base.learning_rate():g}  # compare --tune training.learning_rate=A,B,C finds a better one",
        f"  warmup_steps: {min(100, steps // 10)}",
        "",
        f"output: {_text(output)}",
    ]
    return "\n".join(lines) + "\n"


def _batch(rows: int) -> int:
    """Rows of a step: fewer where a large batch would leave only a few steps."""
    return 4 if rows < _FEW else 8 if rows < _SOME else 16


def _test_share(rows: int) -> float:
    """Share of a file to hold out for the test: a score on a handful of rows says nothing."""
    return 0.3 if rows < _FEW else 0.2 if rows < _SOME else 0.1


def _task(name: str, parts: dict[str, Guess], classify: bool) -> list[str]:
    guess = parts["train"]
    lines = [f"  - name: {_text(name)}"]
    if classify:
        lines.append("    kind: classify")
    for part in ("train", "validation", "test"):
        if part in parts:
            lines.append(f"    {part}: {_text(parts[part].path)}")
    columns = dict(guess.columns)
    options: list[str] = []
    if guess.kind == "classify" and not classify:  # a head cannot share a recipe with tasks that generate
        columns = {"instruction": guess.column("text"), "output": guess.column("label")}
        options = list(guess.labels)
    if columns:
        pairs = ", ".join(f"{field}: {_text(column)}" for field, column in columns.items())
        lines.append(f"    columns: {{{pairs}}}  # the file has {_some(guess.there)}")
    if options:
        lines.append(f"    options: [{', '.join(map(_text, options))}]")
        lines.append("    metric: accuracy")
        if "mode" in TaskSection.model_fields:
            lines.append("    mode: rank  # choose among the options instead of writing an answer")
    elif guess.brief:
        lines.append("    metric: exact_match  # rougeL compares longer answers word by word")
    elif guess.kind != "classify":
        lines.append("    metric: rougeL  # or exact_match, where one short answer is right")
    return lines


def most_tokens(base: DraftBase) -> int:
    """The highest cutoff that a recipe is written with."""
    return min(base.positions or _LARGEST, _LARGEST)


def _cutoff(guesses: Sequence[Guess], base: DraftBase, tokens: int | None) -> tuple[int, str]:
    """Tokens for all but the longest rows, and a comment where the base reads fewer."""
    if tokens is None:
        tokens = math.ceil(max(guess.longest for guess in guesses) / base.characters) + _TEMPLATE_TOKENS
    wanted, most = max(_SMALL, math.ceil(tokens / _STEP) * _STEP), most_tokens(base)
    if wanted <= most:
        return wanted, ""
    return most, f"; the longest rows have about {wanted}, and lose their beginning"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _text(value: str) -> str:
    """A text as a YAML scalar in a flow or block, quoted where it must be."""
    plain = value.replace("_", "").replace("-", "").replace("/", "").replace(".", "")
    if (
        plain.isalnum()
        and plain.isascii()
        and not value.startswith(("-", "."))
        and parse_scalar(value) == value
    ):
        return value
    return json.dumps(value, ensure_ascii=False)
