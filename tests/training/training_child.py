"""Whole runs in processes of their own: killed, stopped or starved as a test asks."""

import gc
import json
import os
import resource
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import braidlora.train
from braidlora.config import RunConfig
from braidlora.errors import BraidloraError
from braidlora.training.checkpointing import CheckpointingTrainer

KILL_EVENTS = ("fsync", "replace", "torch.save", "step", "log")


@dataclass
class Outcome:
    """How a child ended: its exit code (negative: the signal that killed it) and what it said."""

    code: int
    output: str


def run_child(context, config: RunConfig, timeout, while_running, options) -> Outcome:
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
    kill_at = options.pop("kill_at", None)
    count_events = options.pop("count_events", None)
    largest_file = options.pop("largest_file_after_step", None)
    if kill_at is not None or count_events is not None:
        _watch(kill_at, count_events)
    if largest_file is not None:
        _limit_files(*largest_file)
    try:
        braidlora.train.train(RunConfig.model_validate(recipe), progress=False, **options)
    except BraidloraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _watch(kill_at, count_events):
    """Count what touches the disk and every step; at the `kill_at`-th event die as by `kill -9`."""
    seen = []

    def event(name):
        seen.append(name)
        if kill_at is not None and len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if count_events is not None:
            Path(count_events).write_text(json.dumps(seen))

    def before(owner, attribute, name):
        original = getattr(owner, attribute)

        def wrapped(*args, **kwargs):
            if count_events is None or str(args[0]) != count_events:
                event(name)
            return original(*args, **kwargs)

        setattr(owner, attribute, wrapped)

    before(os, "fsync", "fsync")
    before(os, "replace", "replace")
    before(torch, "save", "torch.save")
    before(CheckpointingTrainer, "training_step", "step")
    before(CheckpointingTrainer, "log", "log")


def _limit_files(step, size):
    """From `step` on no file may grow beyond `size` bytes: the kernel refuses the write, as a full disk does."""
    original = CheckpointingTrainer.training_step

    def limited(self, *args, **kwargs):
        if self.state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return original(self, *args, **kwargs)

    CheckpointingTrainer.training_step = limited


def result_bytes(directory):
    """Everything of a finished run that must not depend on when it was interrupted, by name."""
    directory = Path(directory)
    kept = {}
    for path in sorted(directory.glob("adapter*/*")) + sorted(directory.glob("predictions/*")):
        kept[str(path.relative_to(directory))] = path.read_bytes()
    for line_file, timed in (("log.jsonl", "timing"), ("metrics.json", "seconds")):
        text = (directory / line_file).read_text()
        parsed = [json.loads(line) for line in text.splitlines()] if timed == "timing" else [json.loads(text)]
        for line in parsed:
            del line[timed]
        kept[line_file] = json.dumps(parsed).encode()
    return kept
