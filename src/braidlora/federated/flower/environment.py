"""Flower as it runs here: nothing installed at run time, no telemetry, no update check, no files outside a folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from braidlora.errors import ConfigError

# Read by Flower's programs and by Ray when they start, so a process sets them before it imports or starts any.
QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise Ray warns of a change of its own to come
    "TOKENIZERS_PARALLELISM": "false",
}
OLDEST = (1, 41)


def prepare(home: Path | None = None) -> None:
    """Set what Flower reads from the environment, for this process and those that it starts.

    Args:
        home: the folder for Flower's own files, instead of `~/.flwr`.

    Raises:
        ConfigError: Flower is not installed, or too old.
    """
    os.environ.update(QUIET)
    if home is not None:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.environ["FLWR_HOME"] = str(home.absolute())
    check_installed()


def environment(home: Path, programs: Path | None = None) -> dict[str, str]:
    """The environment of one of Flower's programs.

    Args:
        home: the folder for its own files.
        programs: a folder of programs that are found before all others.
    """
    env = {**os.environ, **QUIET, "FLWR_HOME": str(home.absolute())}
    env.pop("FORWARDED_ALLOW_IPS", None)  # whose word the web server takes for where a request comes from
    # Flower starts its own programs by name.
    path = [str(Path(sys.executable).parent), env.get("PATH", os.defpath)]
    env["PATH"] = os.pathsep.join([*([str(programs)] if programs else []), *path])
    return env


def check_installed(simulation: bool = False) -> None:
    """Check that Flower can be used.

    Args:
        simulation: whether Ray is needed, too.

    Raises:
        ConfigError: a package is missing or too old; with the command that installs it.
    """
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        raise ConfigError(
            "Flower is not installed. Install it with: pip install 'braidlora[fed]' (Python 3.11 or newer)."
        ) from None
    if tuple(int(part) for part in installed.split(".")[:2] if part.isdigit()) < OLDEST:
        raise ConfigError(
            f"flwr {installed} is too old; expected {'.'.join(map(str, OLDEST))} or newer. Update it with: "
            "pip install -U 'braidlora[fed]'."
        )
    if simulation and importlib.util.find_spec("ray") is None:
        raise ConfigError("flower-sim needs Ray. Install it with: pip install 'braidlora[fed]'.")
