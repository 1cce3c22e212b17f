"""Whether this installation can serve with vLLM: python -m braidlora.serving.vllm.check prints it as JSON.

A process of its own, because importing vLLM changes logging, signals and environment of the one that does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib.metadata import entry_points
from typing import Any

from braidlora.terminal import json_printable, say


def installation() -> dict[str, Any]:
    """`version`, `tested` and `problems` (sentences; empty if everything is in place)."""
    from braidlora.serving.vllm import TESTED, seams

    try:
        import vllm  # noqa: F401
    except ImportError as error:
        why = f"{type(error).__name__}: {error}"
        return {"version": None, "tested": list(TESTED), "problems": [f"vLLM cannot be imported ({why})."]}
    found: list[str] = []
    if different := seams.problems():
        found.append(seams.refusal(different))
    names = [one.name for one in entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if "braidlora" not in names:
        found.append(
            "braidlora is importable but not installed, so vLLM does not find its plugin: pip install braidlora in "
            "this environment."
        )
    elif allowed is not None and "braidlora" not in allowed.split(","):
        found.append(f"VLLM_PLUGINS is {allowed!r}, which excludes the plugin; add braidlora to it.")
    return {"version": seams.version(), "tested": list(TESTED), "problems": found}


def main() -> None:
    """Print the result as the last line of standard output; vLLM's own lines go to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        result = installation()
    say(json_printable(json.dumps(result)))


if __name__ == "__main__":
    main()
