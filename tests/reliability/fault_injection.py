"""The n-th write, rename, sync or allocation of a command fails, as SQLite's tests have it.

What Python does with files is caught where it enters the operating system's interface; torch and safetensors write in
C++ and Rust, so their saving functions fail as these libraries do. Reads are left alone.
"""

import builtins
import errno
import functools
import io
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import peft.peft_model
import safetensors.torch
import torch
from safetensors import SafetensorError

from braidlora.runs import _commit

KINDS = ("disk", "memory")


class Faults:
    """Counts operations and makes some of them fail.

    Args:
        kind: `disk` counts writes, renames, syncs and new files and folders, `memory` forward passes of the model.
        at: the number of the operation that fails; None only counts.
        stays: the disk stays full after that; otherwise one operation fails and the rest succeed.
    """

    def __init__(self, kind, at=None, *, stays=False):
        self.kind, self.at, self.stays = kind, at, stays
        self.operations = []
        self.places = []  # of each operation: its name and our lines of the stack that it came from

    def fails(self, name):
        """Count an operation; whether it is to fail."""
        self.operations.append(name)
        if self.at is None:
            self.places.append((name, *_stack()))
        number = len(self.operations)
        return self.at is not None and (number == self.at or (self.stays and number > self.at))

    def full(self, name, path=None):
        if self.fails(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if path is None else str(path))

    @contextmanager
    def active(self):
        with ExitStack() as stack:
            for patch in self._memory() if self.kind == "memory" else self._disk():
                stack.enter_context(patch)
            yield self

    def _disk(self):
        for name in ("replace", "rename", "mkdir", "fsync", "link", "write", "ftruncate"):
            yield mock.patch.object(os, name, self._before(name, getattr(os, name)))
        yield mock.patch.object(_commit, "exchange", self._before("exchange", _commit.exchange))
        yield mock.patch.object(os, "open", self._os_open(os.open))
        opened = self._open(builtins.open)
        yield mock.patch.object(builtins, "open", opened)
        yield mock.patch.object(io, "open", opened)  # pathlib's
        yield mock.patch.object(torch, "save", self._torch_save(torch.save))
        saved = self._save_file(safetensors.torch.save_file)
        yield mock.patch.object(safetensors.torch, "save_file", saved)
        yield mock.patch.object(peft.peft_model, "safe_save_file", saved)

    def _memory(self):
        from transformers import LlamaForCausalLM

        forward = LlamaForCausalLM.forward

        @functools.wraps(forward)  # what it takes decides which logits are computed
        def starved(model, *arguments, **options):
            if self.fails("forward"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(model, *arguments, **options)

        yield mock.patch.object(LlamaForCausalLM, "forward", starved)

    def _before(self, name, function):
        def called(*arguments, **options):
            path = arguments[0] if arguments and not isinstance(arguments[0], int) else None
            self.full(name, path)
            return function(*arguments, **options)

        return called

    def _os_open(self, function):
        def called(path, flags, *arguments, **options):
            if flags & os.O_CREAT:
                self.full("create", path)
            return function(path, flags, *arguments, **options)

        return called

    def _open(self, function):
        def called(file, mode="r", *arguments, **options):
            writes = set(mode) & set("wax+") and not isinstance(file, int) and str(file) != os.devnull
            if writes and not str(file).startswith("/proc/"):
                self.full("open", file)
                return _Writer(function(file, mode, *arguments, **options), self, file)
            return function(file, mode, *arguments, **options)

        return called

    def _torch_save(self, function):
        def called(value, target, *arguments, **options):
            if isinstance(target, (str, os.PathLike)) and self.fails("torch.save"):
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
            return function(value, target, *arguments, **options)

        return called

    def _save_file(self, function):
        def called(*arguments, **options):
            if self.fails("save_file"):
                raise SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                )
            return function(*arguments, **options)

        return called


def at_every_place(places):
    """The numbers of the first and the last operation from every place of the program.

    A loop that writes a thousand lines is one place. What came before an operation differs between its first and its
    last time more than between any others.
    """
    first = {}
    for number, place in enumerate(places, start=1):
        first.setdefault(place, number)
    last = {place: number for number, place in enumerate(places, start=1)}
    return sorted({*first.values(), *last.values()})


def _stack():
    frame = sys._getframe(2)
    while frame is not None:
        if "braidlora" in Path(frame.f_code.co_filename).parts:
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


class _Writer:
    """An open file whose writes are counted."""

    def __init__(self, file, faults, path):
        self._file, self._faults, self._path = file, faults, path

    def write(self, data):
        self._faults.full("write", self._path)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exception):
        return self._file.__exit__(*exception)

    def __iter__(self):
        return iter(self._file)
