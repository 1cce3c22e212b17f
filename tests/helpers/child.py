"""Complete runs in child processes, killed, stopped or starved of disk space as a test asks."""

import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from braidlora.config import FederatedConfig, RunConfig
from braidlora.errors import BraidloraError


@dataclass
class Outcome:
    """How a child ended: its exit code (negative: the signal that killed it) and what it printed."""

    code: int
    output: str


def child_runner(verb):
    """`call(config, **options)` → Outcome: `train` or `federate` in a process forked from one that has torch imported.

    Options of `call`: `timeout` in seconds; `while_running(process)`, called once the child has started; `kill_at`,
    the number of the event at which it kills itself; `signal_at` (name of an event, its number among those, signal);
    `count_events`, a file for the list of events; `largest_file_after_step` (step, bytes); others go to the verb.
    """
    context = preloaded_context()
    first = context.Process(target=gc.collect)  # returns once the server has imported them
    first.start()
    first.join()

    def call(config, timeout=240, while_running=None, **options) -> Outcome:
        with tempfile.NamedTemporaryFile("r") as printed:
            recipe = config.model_dump(mode="json")
            process = context.Process(target=_main, args=(verb, recipe, options, printed.name))
            process.start()
            if while_running is not None:
                while_running(process)
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
                raise AssertionError(f"the child did not end within {timeout} s:\n{printed.read()}")
            return Outcome(process.exitcode, printed.read())

    return call


def preloaded_context():
    """The forkserver context, whose server has the slow imports done."""
    context = multiprocessing.get_context("forkserver")
    # Modules of installed packages only: the server does not know pytest's import paths.
    context.set_forkserver_preload(
        [
            "braidlora.one_run",
            "braidlora.evaluation.run",
            "braidlora.federated.simulation.driver",
            "transformers.models.llama.modeling_llama",
            "transformers.models.bert.modeling_bert",
        ]
    )
    return context


def _main(verb, recipe, options, printed):
    output = os.open(printed, os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    warnings.simplefilter("always", UserWarning)
    gc.freeze()
    torch.set_num_threads(1)
    try:
        {"train": _train, "federate": _federate}[verb](recipe, options)
    except BraidloraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _train(recipe, options):
    from braidlora.one_run import train
    from braidlora.training.checkpointing import CheckpointingTrainer

    limit = options.pop("largest_file_after_step", None)
    watched = [
        (torch, "save", "torch.save"),
        (CheckpointingTrainer, "training_step", "step"),
        (CheckpointingTrainer, "log", "log"),
    ]
    options = _watch(watched, **options)
    if limit is not None:
        _limit_files(CheckpointingTrainer, *limit)
    train(RunConfig.model_validate(recipe), progress=False, **options)


def _federate(recipe, options):
    from braidlora.federated.simulation import driver, rounds, runner
    from braidlora.federated.site.local_training import ClientTrainer

    watched = [
        (rounds, "prune", "commit"),
        (runner.Runner, "run", "job"),
        (ClientTrainer, "training_step", "step"),
    ]
    options = _watch(watched, **options)
    driver.federate(FederatedConfig.model_validate(recipe), progress=False, **options)


def _watch(watched, *, kill_at=None, count_events=None, signal_at=None, **others):
    """Count what touches the disk and what else is `watched`, act at the chosen event, and return the other options."""
    if kill_at is count_events is signal_at is None:
        return others
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

    for owner, attribute, name in [(os, "fsync", "fsync"), (os, "replace", "replace"), *watched]:
        before(owner, attribute, name)
    return others


def _limit_files(trainer, step, size):
    """From `step` on no file may grow beyond `size` bytes: the kernel refuses the write, as a full disk does."""
    original = trainer.training_step

    def limited(self, *args, **kwargs):
        if self.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return original(self, *args, **kwargs)

    trainer.training_step = limited
