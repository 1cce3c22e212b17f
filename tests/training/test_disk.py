"""Disk full, read-only, out of memory: the remedy is named, the previous checkpoint is intact (faults.md 16)."""

import errno
import os
from pathlib import Path

import pytest
import torch

import braidlora.runs._commit as commit
from braidlora.errors import ConfigError, TrainingError
from braidlora.one_run import train
from braidlora.runs import Committed
from braidlora.training.trainer import MultiTaskTrainer
from helpers.results import run_bytes


def run(config, **options):
    return train(config, progress=False, **options)


def test_a_disk_that_fills_up_in_a_save(make_config, in_child, tmp_path):
    # The kernel refuses to let a file grow, so torch.save itself fails in the middle of the optimizer's state.
    whole = in_child(make_config("whole"))
    assert whole.code == 0, whole.output
    outcome = in_child(make_config(), largest_file_after_step=(5, 20_000))
    assert outcome.code == 4, outcome.output
    assert "step-8: could not be saved" in outcome.output
    assert "Intact: step-4. Free space on that disk or make it writable" in outcome.output
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-4"]
    Committed(tmp_path / "run" / "checkpoints" / "step-4").verify()
    outcome = in_child(make_config(), resume="auto")
    assert outcome.code == 0, outcome.output
    assert run_bytes(tmp_path / "run") == run_bytes(tmp_path / "whole")


def test_a_full_disk_when_the_adapter_is_saved(make_config, tmp_path, monkeypatch):
    finish = commit.finish_directory

    def full(staging, target):
        if target.name == "adapter":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        finish(staging, target)

    with monkeypatch.context() as patch:
        patch.setattr(commit, "finish_directory", full)
        with pytest.raises(
            TrainingError,
            match=r"adapter: cannot be written: No space left.*Intact: .*step-18.*--resume auto",
        ):
            run(make_config())
    assert not (tmp_path / "run" / "adapter").exists()
    assert run(make_config(), resume="auto").steps == 18


def test_a_log_that_cannot_be_written(make_config, tmp_path, monkeypatch):
    from braidlora.training import run_log

    def full(path, *args, **kwargs):
        if str(path).endswith("log.jsonl") and "a" in args:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, *args, **kwargs)

    monkeypatch.setattr(run_log, "open", full, raising=False)
    with pytest.raises(TrainingError, match=r"log\.jsonl: cannot be written: No space left.*--resume auto"):
        run(make_config())


@pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="needs a file system that refuses new folders (/proc)"
)
def test_a_place_that_cannot_be_written(make_config):
    with pytest.raises(TrainingError, match=r"/proc/.*: cannot be written: .*--output") as caught:
        run(make_config().model_copy(update={"output": "/proc/self/no/run"}))
    assert caught.value.exit_code == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder(make_config, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(TrainingError, match="Permission denied"):
        run(make_config("closed/run"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried …"
        ),
        MemoryError("no memory"),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory(make_config, tmp_path, monkeypatch, error):
    loss = MultiTaskTrainer.compute_loss

    def starved(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise error
        return loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MultiTaskTrainer, "compute_loss", starved)
        with pytest.raises(
            TrainingError, match=r"out of memory.*Halve training\.batch_size and double"
        ) as caught:
            run(make_config())
    assert caught.value.exit_code == 4
    Committed(tmp_path / "run" / "checkpoints" / "step-4").verify()
    # The remedy works: half the batch, twice the accumulation, from where it stopped.
    smaller = make_config(training__batch_size=4, training__gradient_accumulation=2)
    assert run(smaller, resume="auto", allow_inexact_resume=True).steps == 18


@pytest.mark.parametrize("place", ["optimizer", "validation"])
def test_out_of_memory_between_the_steps(make_config, tmp_path, monkeypatch, place):
    """The optimizer's state is made at its first step, and a validation batch may be the larger one."""

    def starved(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    owner, name = (torch.optim.AdamW, "step") if place == "optimizer" else (MultiTaskTrainer, "evaluate")
    monkeypatch.setattr(owner, name, starved)
    with pytest.raises(TrainingError, match=r"out of memory.*evaluation\.batch_size"):
        run(make_config(split__validation=0.1))


@pytest.mark.parametrize("output", ["../outside", "runs/../../outside"])
def test_output_that_escapes(make_config, tmp_path, monkeypatch, output):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(ConfigError, match=r"contains `\.\.`"):
        run(make_config().model_copy(update={"output": output}))
    assert os.listdir(tmp_path) == ["inside"]
    assert os.listdir(tmp_path / "inside") == []
