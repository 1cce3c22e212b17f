"""Words of a command line that are no verb, option or override, and what was meant."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence

from braidlora.errors import ConfigError

# What other tools call it.
_VERBS = {
    "finetune": "train", "fine-tune": "train", "fit": "train", "sft": "train", "run": "train",
    "eval": "evaluate", "test": "evaluate", "score": "evaluate", "benchmark": "compare", "bench": "compare",
    "infer": "predict", "inference": "predict", "classify": "predict", "chat": "generate", "complete": "generate",
    "merge": "export", "convert": "export", "save": "export", "new": "init", "create": "init", "start": "init",
    "federated": "federate", "check": "verify", "show": "preview", "list": "recipes", "examples": "recipes",
    "report": "compare", "study": "analyze", "analyse": "analyze", "sweep": "compare", "tune": "compare",
}  # fmt: skip

_RECIPE = ("recipe", "config", "config-file", "yaml")


def unknown_verb(words: Sequence[str], verbs: Sequence[str]) -> str | None:
    """The message for a command line whose first word is not a verb, or None."""
    from braidlora.config import nearest

    word = next((word for word in words if not word.startswith("-")), None)
    if word is None or word in verbs or words[0] != word:
        return None
    meant = _VERBS.get(word.lower()) or nearest(word, verbs)
    hint = f" Did you mean `braidlora {meant}`?" if meant in verbs else ""
    return f"unknown command {word!r}.{hint} The commands are {', '.join(verbs)}."


def parse_overrides(words: Sequence[str]) -> list[str]:
    """Turn the words that argparse did not know into `key=value`; accepts `--key=value` and `--key value`.

    Raises:
        ConfigError: a word is not an override, or a key has no value.
    """
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"unexpected argument {word!r}. Overrides look like --training.learning_rate=1e-4, with `=`, and come "
                "after the recipe."
            )
        key = word[2:]
        if "=" not in key:
            if key in _RECIPE:  # the file that follows was read as the recipe already
                raise ConfigError(
                    f"no option --{key}. Give the recipe without it: the first word after the command."
                )
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"override --{key}: no value given. Write --{key}=VALUE.{_meant_key(key)}")
            key = f"{key}={rest.pop(0)}"
        overrides.append(key)
    return overrides


def check_options(
    parser: argparse.ArgumentParser, overrides: Sequence[str], *, takes_overrides: bool
) -> None:
    """Raise ConfigError for an override that is a misspelled option of this verb, or where none is taken.

    Args:
        parser: of the verb.
        overrides: as of `parse_overrides`.
        takes_overrides: whether the verb reads a recipe.
    """
    from braidlora.config import nearest

    options = [option for option in parser._option_string_actions if option.startswith("--")]
    for override in overrides:
        key = override.partition("=")[0]
        near = nearest(f"--{key}", options, cutoff=0.75)
        if key == "seed" and "," in override and "--seeds" in options:
            raise ConfigError(f"--{override}: use --seeds for several seeds.")
        if not takes_overrides:
            verb = parser.prog
            hint = f" Did you mean {near}?" if near else f" `{verb} --help` lists its options."
            raise ConfigError(f"`{verb}` takes no overrides, got --{key}.{hint}")
        if near and "." not in key and key not in _TOP:
            raise ConfigError(
                f"no option --{key}. Did you mean {near}?{_meant_key(key, ' Or the recipe key')}"
            )


_TOP = ("model", "adapter", "tasks", "split", "prompt", "mixing", "training", "evaluation", "seed", "output",
        "federation")  # fmt: skip


def _meant_key(key: str, words: str = " Did you mean") -> str:
    from braidlora.config import FederatedConfig, suggest_key

    meant = suggest_key(key, FederatedConfig)
    return f"{words} {shlex.quote(f'--{meant}')}?" if meant and meant != key else ""


def verb_parsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
