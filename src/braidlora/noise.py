"""What libraries print by themselves, which says nothing about the user's run. Worker processes call this too."""

from __future__ import annotations

import logging
import os
import warnings

from braidlora.terminal import Formatter, printable

# transformers and datasets log hints about their own calls.
_VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Not torch.cuda, whose warnings say why a GPU is not used, and neither peft nor transformers: warnings of adapters are
# attributed to the code that called them.
_MODULES = (
    r"(torch(?!\.cuda)|bitsandbytes|accelerate|datasets|huggingface_hub|matplotlib|numpy|multiprocess)(\.|$)"
)
_OURS = "braidlora"


class OursOrErrors(logging.Filter):
    """Passes braidlora's records, and errors of libraries; their warnings are for their callers."""

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name == _OURS or record.name.startswith(f"{_OURS}.")
        return ours or record.levelno >= logging.ERROR


def quiet_libraries() -> None:
    """Keep libraries' hints from the terminal; before they are imported. Variables that are set keep their values."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", category=UserWarning, module=_MODULES)
    last = logging.lastResort  # prints log records when logging is not configured
    if last is not None:
        last.setFormatter(Formatter())
        if not any(isinstance(one, OursOrErrors) for one in last.filters):
            last.addFilter(OursOrErrors())


def plain_warnings(prefix: str) -> None:
    """Show each UserWarning as one line that begins with `prefix`, without its place in the code."""
    shown = warnings.formatwarning

    def for_people(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, UserWarning):
            return printable(f"{prefix}: warning: {message}") + "\n"
        return shown(message, category, filename, lineno, line)

    warnings.formatwarning = for_people
