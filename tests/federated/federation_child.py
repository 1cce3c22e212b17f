"""Whole federations in processes of their own, killed or stopped as a test asks."""

import gc
import json
import os
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from braidlora.config import FederatedConfig
from braidlora.errors import BraidloraError
from braidlora.federated.simulation import driver as local
from braidlora.federated.simulation import round as round_module
from braidlora.federated.simulation import runner
from braidlora.federated.site.local_training import ClientTrainer


@dataclass
class Outcome:
    """How a child ended: its exit code (negative: the signal that killed it) and what it said."""

    code: int
    output: str


def run_child(context, config: FederatedConfig, timeout, while_running, options) -> Outcome:
    with tempfile.NamedTemporaryFile("r") as said:
        process = context.Process(target=_main, args=(config.model_dump(mode="json"), options, said.name))
        process.start()
        if while_running is not None:
            while_running(process)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"the child did not end within {timeout} s:\n{said.read()}")
        return Outcome(process.exitcode, said.read())


def _main(recipe, options, said):
    output = os.open(said, os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.simplefilter("always", UserWarning)
    gc.freeze()
    torch.set_num_threads(1)
    kill_at, count_events = options.pop("kill_at", None), options.pop("count_events", None)
    signal_at = options.pop("signal_at", None)
    if kill_at is not None or count_events is not None or signal_at is not None:
        _watch(kill_at, count_events, signal_at)
    try:
        local.federate(FederatedConfig.model_validate(recipe), progress=False, **options)
    except BraidloraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _watch(kill_at, count_events, signal_at):
    """Count what touches the disk, every job and every training step; die as by `kill -9` at the `kill_at`-th event.

    `signal_at` is (name of an event, its number among those, signal): the process sends itself the signal there.
    """
    seen = []

    def event(name):
        seen.append(name)
        if kill_at is not None and len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if signal_at is not None and (name, seen.count(name)) == tuple(signal_at[:2]):
            os.kill(os.getpid(), signal_at[2])
        if count_events is not None:
            Path(count_events).write_text(json.dumps(seen))

    def before(owner, attribute, name):
        original = getattr(owner, attribute)

        def wrapped(*args, **kwargs):
            event(name)
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    before(os, "fsync", "fsync")
    before(os, "replace", "replace")
    before(runner.Runner, "run", "job")
    before(round_module, "prune", "commit")
    before(ClientTrainer, "training_step", "step")


def result_bytes(directory):
    """Everything of a finished federation that must not depend on when it was interrupted, by name."""
    directory = Path(directory)
    kept = {}
    for pattern in (
        "clients/*/adapter/*",
        "clients/*/predictions/*",
        "rounds/*/*.safetensors",
        "clients/*/state/*/*.safetensors",
    ):
        for path in sorted(directory.glob(pattern)):
            kept[str(path.relative_to(directory))] = path.read_bytes()
    for name in ("partition.json", "experiment.json"):
        kept[name] = (directory / name).read_bytes()
    metrics = json.loads((directory / "metrics.json").read_text())
    del metrics["seconds"]
    kept["metrics.json"] = json.dumps(metrics).encode()
    lines = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    for line in lines:
        del line["timing"]
    kept["rounds.jsonl"] = json.dumps(lines).encode()
    for path in sorted(directory.glob("rounds/*/server.json")):
        server = json.loads(path.read_text())
        del server["seconds"]
        kept[str(path.relative_to(directory))] = json.dumps(server).encode()
    return kept
