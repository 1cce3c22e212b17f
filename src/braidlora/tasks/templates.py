"""Prompt templates: one object renders a row's prompt, the same characters for training and for evaluation.

| name | what it is |
|---|---|
| `alpaca` | Stanford Alpaca's layout with its opening sentence |
| `alpaca_short` | the same without the opening sentence: fewer tokens |
| `llm-adapters` | LLM-Adapters' indented layout, the evaluation script's white space in both places |
| `llm-adapters-legacy` | that research code to the character: its training and evaluation prompts differ |
| `chat` | the tokenizer's own chat template, instruction and input as one user message |
| a format string | `{instruction}` and `{input}` (`{text}` for `classify`); `{{` and `}}` are literal braces |

The answer follows the prompt at once, so a format string says itself whether a line break stands between them.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from braidlora.errors import ConfigError

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_SECTIONS_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_SECTIONS_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"

# LLM-Adapters keeps its prompts in indented triple-quoted strings, so every line carries 16 blanks. Its training
# script has them on empty lines too, and one blank (with input) or two (without) after the opening sentence; its
# evaluation scripts leave empty lines empty, and have one blank after the sentence of prompts without input only.
_INDENT = " " * 16


def _indented(*lines: str, blank: str) -> str:
    """`lines` as sections of two lines each, indented, with `blank` between the sections."""
    sections = [f"{_INDENT}{lines[at]}\n{_INDENT}{lines[at + 1]}" for at in range(0, len(lines), 2)]
    return f"\n{blank}\n".join(sections)


_FIELDS_WITH_INPUT = ("### Instruction:", "{instruction}", "### Input:", "{input}", "### Response:", "")
_FIELDS_WITHOUT_INPUT = ("### Instruction:", "{instruction}", "### Response:", "")
_STAND_IN = "braidlora-answer-3f9c1d"


@dataclass(frozen=True)
class Template:
    """How a row becomes a prompt.

    Attributes:
        name: the name in the recipe, or the format string itself.
        with_input: format string for rows whose `input` is not empty.
        without_input: format string for the others.
        evaluation: the pair of format strings for evaluation where they differ from training on purpose.
        chat: use the tokenizer's chat template instead of the format strings.
        joint: tokenize prompt and answer as one string when training (the research code's way).
    """

    name: str
    with_input: str = ""
    without_input: str = ""
    evaluation: tuple[str, str] | None = None
    chat: bool = False
    joint: bool = False

    @property
    def uses_input(self) -> bool:
        """Whether a row's `input` reaches the prompt."""
        return self.chat or "input" in _fields(self.with_input)

    def prompt(self, row: Mapping[str, str], tokenizer: Any = None, *, evaluation: bool = False) -> str:
        """The prompt of `row`, up to where the answer starts.

        Args:
            row: a row of a `generate` task (or `text` for a `classify` task with a format string).
            tokenizer: needed by `chat` only.
            evaluation: the prompt for generation; differs from training for `llm-adapters-legacy` alone.

        Raises:
            ConfigError: `chat`, and the tokenizer has no chat template.
        """
        if self.chat:
            return str(
                _chat_template(tokenizer)(
                    [{"role": "user", "content": _user_message(row)}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        pair = self.evaluation if evaluation and self.evaluation else (self.with_input, self.without_input)
        return pair[0 if row.get("input") else 1].format(**row)

    def closing(self, row: Mapping[str, str], tokenizer: Any) -> str:
        """What the chat template writes after the answer (an end-of-turn marker); empty for other templates."""
        if not self.chat:
            return ""
        # A stand-in for the answer, so that no short answer ("e") is taken for a part of the marker ("<|im_end|>").
        messages = [
            {"role": "user", "content": _user_message(row)},
            {"role": "assistant", "content": _STAND_IN},
        ]
        _, found, closing = str(_chat_template(tokenizer)(messages, tokenize=False)).rpartition(_STAND_IN)
        return closing.rstrip() if found else ""


def _user_message(row: Mapping[str, str]) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def _chat_template(tokenizer: Any) -> Any:
    if getattr(tokenizer, "chat_template", None) is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ConfigError(
            f"prompt.template: `chat` needs a tokenizer with a chat template, and that of {name} has none. Use an "
            "instruction-tuned base, or another template, e.g. `alpaca`."
        )
    return tokenizer.apply_chat_template


def _named() -> dict[str, Template]:
    mended = (
        f"{_WITH_INPUT}\n\n" + _indented(*_FIELDS_WITH_INPUT, blank=""),
        f"{_WITHOUT_INPUT} \n\n" + _indented(*_FIELDS_WITHOUT_INPUT, blank=""),
    )
    legacy = (
        f"{_WITH_INPUT} \n\n" + _indented(*_FIELDS_WITH_INPUT, blank=_INDENT),
        f"{_WITHOUT_INPUT}  \n\n" + _indented(*_FIELDS_WITHOUT_INPUT, blank=_INDENT),
    )
    templates = [
        Template(
            "alpaca",
            f"{_WITH_INPUT}\n\n{_SECTIONS_WITH_INPUT}",
            f"{_WITHOUT_INPUT}\n\n{_SECTIONS_WITHOUT_INPUT}",
        ),
        Template("alpaca_short", _SECTIONS_WITH_INPUT, _SECTIONS_WITHOUT_INPUT),
        Template("llm-adapters", *mended),
        Template("llm-adapters-legacy", *legacy, evaluation=mended, joint=True),
        Template("chat", chat=True),
    ]
    return {template.name: template for template in templates}


NAMED = _named()


def get_template(name: str, kind: Literal["generate", "classify"] = "generate") -> Template:
    """The template that a recipe calls `name`.

    A `classify` task is encoded as its text alone unless `name` is a format string with `{text}`; the recipe's
    default (`alpaca`) says nothing about such a task.

    Raises:
        ConfigError: neither a known name nor a format string with the fields that rows of this kind have.
    """
    allowed = ("text",) if kind == "classify" else ("instruction", "input")
    if "{" in name or "}" in name:
        _check(name, allowed)
        return Template(name, name, name)
    if kind == "classify":
        if name == "alpaca":
            return Template("{text}", "{text}", "{text}")
        raise ConfigError(
            f"template: {name!r} does not fit a `classify` task, whose rows have a text and a label. "
            "Leave it out, or give a format string with {text}."
        )
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.5)
        hint = f"; did you mean `{near[0]}`?" if near else "."
        raise ConfigError(
            f"template: unknown template {name!r}{hint} Known are {', '.join(NAMED)}, or a format string with "
            "{instruction} and {input}."
        )
    return NAMED[name]


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _check(template: str, allowed: tuple[str, ...]) -> None:
    known = " and ".join(f"{{{name}}}" for name in allowed)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"template: {template!r} is not a valid format string: {error}. Write {{{{ and }}}} for literal braces."
        ) from None
    for _, name, specification, conversion in parts:
        if name is None:
            continue
        if name not in allowed or specification or conversion:
            got = (
                name
                + (f"!{conversion}" if conversion else "")
                + (f":{specification}" if specification else "")
            )
            raise ConfigError(
                f"template: unknown field {{{got}}} in {template!r}; the fields of a row are {known}. "
                "Write {{ and }} for literal braces."
            )
    if allowed[0] not in _fields(template):
        raise ConfigError(
            f"template: {template!r} never shows the row; it needs {{{allowed[0]}}} (fields: {known})."
        )
