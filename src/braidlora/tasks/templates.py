"""Prompt templates: one object renders the prompt of a row, the same for training and evaluation.

| name | prompt |
|---|---|
| `alpaca` | Stanford Alpaca's layout with its opening sentence |
| `alpaca_short` | the same without the opening sentence |
| `llm-adapters` | LLM-Adapters' indented layout, with the whitespace of its evaluation script in both places |
| `llm-adapters-legacy` | reproduction switch: that research code to the character, where the two prompts differ |
| `chat` | the tokenizer's own chat template: the row's messages, or instruction and input as one user message |
| a format string | `{instruction}` and `{input}` (`{text}` for `classify`); `{{` and `}}` are literal braces |

The answer follows the prompt immediately: if there is to be a line break between them, the format string ends with it.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from braidlora.errors import ConfigError, DataError
from braidlora.tasks.chat import Chat, ChatProblem

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

# LLM-Adapters has its prompts in indented triple-quoted strings, so every line starts with 16 blanks. In its training
# script empty lines have them too, and the opening sentence ends with one blank (with input) or two (without); in its
# evaluation scripts empty lines are empty, and only the opening sentence of prompts without input ends with one blank.
_INDENT = " " * 16


def _indented(*lines: str, blank: str) -> str:
    """`lines` as indented sections of two lines, with `blank` between sections."""
    sections = [f"{_INDENT}{lines[at]}\n{_INDENT}{lines[at + 1]}" for at in range(0, len(lines), 2)]
    return f"\n{blank}\n".join(sections)


_FIELDS_WITH_INPUT = ("### Instruction:", "{instruction}", "### Input:", "{input}", "### Response:", "")
_FIELDS_WITHOUT_INPUT = ("### Instruction:", "{instruction}", "### Response:", "")


@dataclass(frozen=True)
class Template:
    """Renders the prompt of a row.

    Attributes:
        name: the name in the recipe, or the format string itself.
        with_input: format string for rows whose `input` is not empty.
        without_input: format string for the others.
        evaluation: the pair of format strings for evaluation, if they differ from training.
        chat: use the tokenizer's chat template instead of format strings.
        joint: tokenize prompt and answer as one string in training, as the research code does.
        variables: of the chat template, `prompt.chat_template_kwargs`.
    """

    name: str
    with_input: str = ""
    without_input: str = ""
    evaluation: tuple[str, str] | None = None
    chat: bool = False
    joint: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uses_input(self) -> bool:
        """Whether the prompt contains a row's `input`."""
        return self.chat or "input" in fields_of(self.with_input)

    def prompt(self, row: Mapping[str, Any], tokenizer: Any = None, *, evaluation: bool = False) -> str:
        """The prompt of `row`, up to the start of the answer; of a chat, up to that of the last answer.

        Args:
            row: a row of a `generate` task (or `text` for a `classify` task with a format string).
            tokenizer: needed only for `chat`.
            evaluation: the prompt for generation, which differs from training only for `llm-adapters-legacy`.

        Raises:
            ConfigError: the template is `chat`, and the tokenizer has no chat template.
            DataError: the chat template rejects the messages.
        """
        if self.chat:
            try:
                return Chat.of(row, self.variables).prompt(tokenizer)
            except ChatProblem as problem:
                place = getattr(row, "place", "")
                raise DataError(f"{place}: {problem}" if place else str(problem)) from None
        pair = self.evaluation if evaluation and self.evaluation else (self.with_input, self.without_input)
        return pair[0 if row.get("input") else 1].format(**row)

    def answer(self, text: str) -> str:
        """What counts of a text that the model wrote, or should write: under a chat template without the thinking."""
        return text.rpartition("</think>")[2].strip() if self.chat else text

    def written(self, answer: str, tokenizer: Any) -> str:
        """What the model writes after a prompt to give `answer`: under a chat template, with its end-of-turn marker.

        Raises:
            DataError: the chat template rejects the answer.
        """
        if not self.chat:
            return answer
        # The question does not matter; an empty one is dropped by some templates.
        chat = Chat.of({"instruction": "?", "output": answer}, self.variables)
        try:
            [(text, turns)] = chat.sequences(tokenizer, "last")
        except ChatProblem as problem:
            raise DataError(f"{answer!r}: {problem}") from None
        return text[turns[0][0] : turns[-1][1]].rstrip()


def _named() -> dict[str, Template]:
    fixed = (
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
        Template("llm-adapters", *fixed),
        Template("llm-adapters-legacy", *legacy, evaluation=fixed, joint=True),
        Template("chat", chat=True),
    ]
    return {template.name: template for template in templates}


NAMED = _named()


def get_template(name: str, kind: Literal["generate", "classify"] = "generate") -> Template:
    """The template called `name` in a recipe.

    A `classify` task is encoded as its text alone, unless `name` is a format string with `{text}`; the recipe's
    default (`alpaca`) is ignored for such a task.

    Raises:
        ConfigError: `name` is neither a known template nor a format string with the fields of this kind of row.
    """
    allowed = ("text",) if kind == "classify" else ("instruction", "input")
    if "{" in name or "}" in name:
        check_format(name, allowed)
        if allowed[0] not in fields_of(name):
            raise ConfigError(
                f"template: {name!r} does not use the row; it needs {{{allowed[0]}}} (fields: {_listed(allowed)})."
            )
        return Template(name, name, name)
    if kind == "classify":
        if name == "alpaca":
            return Template("{text}", "{text}", "{text}")
        raise ConfigError(
            f"template: {name!r} does not fit a `classify` task, whose rows have a text and a label. Remove it, or "
            "give a format string with {text}."
        )
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.5)
        hint = f"; did you mean `{near[0]}`?" if near else "."
        raise ConfigError(
            f"template: unknown template {name!r}{hint} Expected one of {', '.join(NAMED)}, or a format string with "
            "{instruction} and {input}."
        )
    return NAMED[name]


def fields_of(template: str) -> list[str]:
    """The fields in a format string."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _listed(fields: tuple[str, ...]) -> str:
    return " and ".join(f"{{{name}}}" for name in fields)


def check_format(template: str, allowed: tuple[str, ...]) -> None:
    """Reject a format string that does more than insert the fields of a row.

    An attribute or an index of a field, a conversion or a width could read or build what is not in the row.

    Raises:
        ConfigError: it is not a valid format string, or has other fields, a conversion or a specification.
    """
    known = _listed(allowed)
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
