"""`--engine flower`: has the SuperLink run the server app for a recipe, and follows it to its end."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.config import FederatedConfig, dump_config
from braidlora.errors import BraidloraError, ConfigError, FederationError, Interrupted
from braidlora.federated.flower.control import CONNECTION, ask_flwr, check_up
from braidlora.federated.flower.environment import check_installed
from braidlora.federated.flower.settings import ServerSettings, read_server
from braidlora.json_text import loads
from braidlora.runs import FederatedDirectory, atomic_write_json
from braidlora.training.stop import stop_requests

if TYPE_CHECKING:
    from braidlora.federated.site.clients import Client

STATUS, JOBS = "status.json", "jobs"
_STARTS_WITHIN = 120.0  # seconds for the server app to show that it runs, before Flower is asked
_ENDS_WITHIN = 15.0  # seconds for the server app to end after `flwr stop`


def app_folder() -> Path:
    """The Flower App that comes with the package."""
    return Path(__file__).parent / "flower_app"


def federate_at_sites(
    config: FederatedConfig,
    folder: Path,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    rollback: int | None = None,
    local_run: Path | None = None,
    accept_fresh: Collection[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Run a federation at the sites that are connected to a SuperLink on this machine. Returns the run directory.

    Args:
        config: the recipe; `output` is a folder on this machine.
        folder: the server's, which `site init --server` made and `site serve` serves.
        resume, overwrite, rollback, local_run: as of `federate`.
        accept_fresh: clients that may start from a fresh state although rounds of theirs have counted.
        say: told of progress, a line at a time.

    Raises:
        ConfigError: the folder or the recipe cannot be used, here or at any site.
        BraidloraError: what the federation raised.
        FederationError: the SuperLink does not answer, or the server app ended without a result.
    """
    check_installed()
    folder = folder.absolute()
    settings = read_server(folder)
    known = settings.sites.keys() | {client.name for client in config.clients() or []}
    if unknown := sorted(set(accept_fresh) - known):
        raise ConfigError(f"--accept-fresh-state: no client {', '.join(unknown)} in the recipe.")
    _check_recipe(config, settings)
    check_up(folder, settings)
    output = FederatedDirectory.at(config.output).path.absolute()
    config = config.model_copy(update={"output": str(output)})
    (folder / JOBS).mkdir(mode=0o700, exist_ok=True)
    path = folder / JOBS / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}.json"
    job = {
        "folder": str(folder),
        "recipe": dump_config(config),
        "resume": resume,
        "overwrite": overwrite,
        "rollback": rollback,
        "local_run": str(local_run.absolute()) if local_run is not None else None,
        "accept_fresh": sorted(accept_fresh),
        "started_by": os.getpid(),
        "output": str(output),
    }
    atomic_write_json(path, job)
    run = ask_flwr(folder, settings, ["run", str(app_folder()), CONNECTION, "--run-config", f'job="{path}"'])
    with stop_requests():
        try:
            _follow(folder, settings, path, output, str(run["run-id"]), say)
        except Interrupted as error:
            say("stopping the server app")
            with contextlib.suppress(BraidloraError):  # the SuperLink is gone, and the server app with it
                ask_flwr(folder, settings, ["stop", str(run["run-id"]), CONNECTION])
            _wait_for_end(folder, path)
            if not result_of(path).is_file():
                atomic_write_json(
                    result_of(path), {"exit_code": error.exit_code, "error": str(error), "stopped": True}
                )
            raise
    return output


def _check_recipe(config: FederatedConfig, settings: ServerSettings) -> None:
    """Check what every site would reject, before anybody waits for sites that cannot join.

    Raises:
        ConfigError, DataError: as `site join` does.
    """
    from braidlora.federated.site.load import check_for_sites

    clients_with_keys(config, settings)
    check_for_sites(config)


def clients_with_keys(config: FederatedConfig, settings: ServerSettings) -> dict[str, Client]:
    """The clients of the recipe, without rows, by name; each has a key where nodes need one.

    Raises:
        ConfigError: the recipe's clients are not the sites of server.yaml.
    """
    from braidlora.federated.flower.roster import clients_of

    clients = clients_of(config, settings.sites)
    if settings.node_auth and (unknown := sorted(clients.keys() - settings.sites.keys())):
        raise ConfigError(
            f"server.yaml: no key for {', '.join(unknown)}. Add each with: braidlora site add DIR NAME NODE.pub"
        )
    return clients


def _wait_for_end(folder: Path, path: Path) -> None:
    """Wait until the server app has ended after a stop, so that a resume finds the run directory free."""
    end = time.monotonic() + _ENDS_WITHIN
    while time.monotonic() < end and not result_of(path).is_file():
        status = read_status(folder)
        if status is None or status.get("job") != path.name or not pid_is_alive(status["pid"]):
            return
        time.sleep(0.2)


def _follow(
    folder: Path, settings: ServerSettings, path: Path, output: Path, run: str, say: Callable[[str], None]
) -> None:
    """Wait for the result of a job, and raise what it raised."""
    result, started, said = result_of(path), time.monotonic(), ""
    rounds = _say_rounds(output, 0, lambda text: None)  # of an earlier start
    pid: int | None = None
    while not result.is_file():
        status = read_status(folder)
        if status is not None and status.get("job") == path.name:
            pid = status["pid"]
            if status["phase"] != said:
                said = status["phase"]
                say(said)
        rounds = _say_rounds(output, rounds, say)
        gone = pid is not None and not pid_is_alive(pid)
        if pid is None and time.monotonic() - started > _STARTS_WITHIN:
            started = time.monotonic()
            gone = not _run_state(folder, settings, run).startswith(("pending", "starting", "running"))
        if gone:
            time.sleep(2.0)  # it may have ended between the two looks
            if not result.is_file():
                state = _run_state(folder, settings, run)
                raise FederationError(
                    f"{output}: the server app ended without a result (Flower says: {state}). Committed rounds are "
                    f"intact. See {folder / 'superlink.log'}, then --resume auto continues."
                )
        time.sleep(0.5)
    _say_rounds(output, rounds, say)
    found = loads(result.read_bytes())
    if found["exit_code"] == 1:
        raise RuntimeError(f"the server app failed; please report this:\n{found['error']}")
    if found["exit_code"]:
        raise _error(found["exit_code"], found["error"])


def result_of(path: Path) -> Path:
    """Where a job's result is."""
    return path.with_suffix(".result.json")


def pid_is_alive(pid: int) -> bool:
    """Whether a process of this machine runs.

    A zombie does not: Flower's SuperExec, the parent of a server app, looks at it only when it starts the next one.
    """
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _error(code: int, text: str) -> BraidloraError:
    kinds: list[type[BraidloraError]] = [BraidloraError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    error = BraidloraError(text)
    error.exit_code = code
    for kind in kinds:
        if kind.__dict__.get("exit_code") == code and kind.__init__ is BraidloraError.__init__:
            return kind(text)
    return error


def _say_rounds(output: Path, seen: int, say: Callable[[str], None]) -> int:
    """Tell of the rounds that have been committed since; returns how many there are."""
    try:
        lines = (output / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return seen
    for text in lines[seen:]:
        say(round_text(loads(text)))
    return max(seen, len(lines))


def round_text(line: dict[str, Any]) -> str:
    """A line of rounds.jsonl for people."""
    from braidlora.tables import format_bytes

    trained = {name: one for name, one in line["clients"].items() if "loss" in one}
    losses = [one["loss"] for one in trained.values() if one["loss"] is not None]
    loss = f", loss {sum(losses) / len(losses):.4f}" if losses else ""
    missing = sorted(name for name, one in line.get("failed", {}).items() if one["left_out"])
    return (
        f"round {line['round']}: {len(trained)} sites{loss}, {format_bytes(line['bytes']['up'])} up, "
        f"{format_bytes(line['bytes']['down'])} down"
        + (f", left out: {', '.join(missing)}" if missing else "")
        + ("" if line["counted"] else f"; not counted: {line.get('why_not', '')}")
    )


def read_status(folder: Path) -> dict[str, Any] | None:
    """The content of a server's status file; None if there is none."""
    try:
        found = loads((folder / STATUS).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _run_state(folder: Path, settings: ServerSettings, run: str) -> str:
    try:
        runs = ask_flwr(folder, settings, ["ls", CONNECTION, "--run-id", run]).get("runs", [])
        return str(runs[0]["status"])
    except (BraidloraError, LookupError):
        return "the SuperLink does not answer"
