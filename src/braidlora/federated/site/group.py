"""The processes that train a client together: the first one leads, and the others follow its orders.

Orders and failures travel over gloo, apart from the gradients, which travel over NCCL on GPUs. An error in one process
is raised in all of them, so that none waits for a gradient that never comes. A process that can no longer reach the
others ends, and whoever started it starts all of them again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from braidlora.errors import (
    BraidloraError,
    ConfigError,
    Interrupted,
    TrainingError,
    first_line,
    is_out_of_memory,
)
from braidlora.federated.protocol.failure import failure_of
from braidlora.json_text import loads
from braidlora.terminal import say

_BETWEEN_ORDERS = timedelta(days=365)  # the next round may be a long time off
_PATIENCE = timedelta(
    minutes=30
)  # they load a base model, and reach the end of a step, at about the same time
_TEXT = 4096  # bytes of another process's error


class OtherProcessError(BraidloraError):
    """Another process of the group failed, in a way that only its message describes (exit code 4)."""

    exit_code = TrainingError.exit_code


class Group:
    """This process and those that train with it. All methods are collective: every process calls them in step.

    Args:
        store: a file that all of them can reach and that does not exist yet, for processes of one machine; None: as
            torchrun and `accelerate launch` have set it in the environment.

    Attributes:
        rank, size: the number of this process, and how many there are.
    """

    def __init__(self, store: Path | None = None) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        on_gpus = torch.accelerator.is_available()
        if on_gpus:
            _check_device(int(os.environ["LOCAL_RANK"]))
        # Or accelerate, and with it the Trainer, sets a number of CPU threads of its own.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        if store is not None:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            made = dist.FileStore(str(store), self.size)
            dist.init_process_group(backend, store=made, rank=self.rank, world_size=self.size)
        PartialState(cpu=not on_gpus)  # what the Trainer finds, and the device of this process
        self._orders = dist.new_group(backend="gloo", timeout=_BETWEEN_ORDERS)
        self._outcomes = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._stopped_by = 0
        self._in_step = True

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which alone reads messages, writes files and scores."""
        return self.rank == 0

    def send(self, order: bytes) -> None:
        """In the first process: give the others an order."""
        self._in_step = False
        with self._ending_if_lost():
            self._broadcast(torch.tensor([len(order)]))
            self._broadcast(torch.frombuffer(bytearray(order), dtype=torch.uint8))
        self._in_step = True

    def receive(self) -> bytes | None:
        """In the other processes: wait for the next order; None is the end."""
        with self._ending_if_lost():
            size = self._broadcast(torch.zeros(1, dtype=torch.int64))
            if not size.item():
                return None
            return self._broadcast(torch.empty(int(size.item()), dtype=torch.uint8)).numpy().tobytes()

    def end(self) -> None:
        """In the first process: tell the others to end, unless they wait for something else."""
        if self._in_step:
            with contextlib.suppress(RuntimeError):  # those that are gone need not be told
                self._broadcast(torch.zeros(1, dtype=torch.int64))

    def ignore_signals(self) -> None:
        """Leave SIGTERM and Ctrl-C, which reach all processes, to the first one; the others end after it."""

        def note(number: int, frame: FrameType | None) -> None:
            self._stopped_by = number

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in every process; if one of them fails, so do all.

        Raises:
            TrainingError, OtherProcessError: this process did not fail, but another one did; names it.
            Exception: what the block raised here.
        """
        error: Exception | None = None
        try:
            yield
        except (Interrupted, KeyboardInterrupt):
            self._in_step = False  # the others wait for a step that this process does not take part in
            raise
        except Exception as caught:
            error = caught
        with self._ending_if_lost(error):
            others = self._failures(error)
        if error is not None:
            raise error
        if others:
            raise _as_error(*others[0])

    def average(self, gradients: Iterable[torch.nn.Parameter]) -> None:
        """Replace the parameters' gradients by their means over all processes; a gradient that is missing is 0."""
        parameters = list(gradients)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not parameters:
            return
        flat = torch.cat([one.grad.reshape(-1).float() for one in parameters if one.grad is not None])
        dist.all_reduce(flat)
        means = (flat / self.size).split([one.numel() for one in parameters])
        for parameter, mean in zip(parameters, means, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(mean.view_as(parameter))

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, 0, group=self._orders)
        return tensor

    def _failures(self, error: Exception | None) -> list[tuple[int, dict[str, str]]]:
        """How processes failed, by number."""
        failed = torch.tensor([error is not None], dtype=torch.int32)
        dist.all_reduce(failed, group=self._outcomes)
        if not failed.item():
            return []
        own = torch.zeros(_TEXT, dtype=torch.uint8)
        if error is not None:
            code = "out-of-memory" if is_out_of_memory(error) else failure_of(error).code
            text = json.dumps({"code": code, "text": _described(error)}).encode()
            own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        all_of_them = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(all_of_them, own, group=self._outcomes)
        texts = [bytes(one.numpy().tobytes()).rstrip(b"\0") for one in all_of_them]
        return [(rank, loads(text)) for rank, text in enumerate(texts) if text]

    @contextlib.contextmanager
    def _ending_if_lost(self, error: Exception | None = None) -> Iterator[None]:
        """End this process if the others cannot be reached: they wait somewhere else, or are gone."""
        try:
            yield
        except RuntimeError as lost:
            if self._stopped_by:
                os._exit(128 + self._stopped_by)
            why = f"; this one had failed: {_described(error)}" if error is not None else ""
            say(
                f"braidlora: process {self.rank} of {self.size} has lost the others ({first_line(lost)}){why}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(TrainingError.exit_code)


def _check_device(local_rank: int) -> None:
    there = torch.accelerator.device_count()
    if local_rank >= there:
        raise ConfigError(
            f"{local_rank + 1} or more processes were started on this machine, which has {there} "
            f"{'GPU' if there == 1 else 'GPUs'}: start one process per GPU."
        )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]  # at most 12 bytes each as JSON


def _as_error(rank: int, failure: dict[str, str]) -> Exception:
    """The error of another process, with the same code for the server."""
    text = f"process {rank} failed: {failure['text']}"
    if failure["code"] == "not-finite":
        return TrainingError(text)
    if failure["code"] == "out-of-memory":
        error = TrainingError(text)
        error.__cause__ = MemoryError(failure["text"])
        return error
    return OtherProcessError(text)
