"""Memory that runs out is told as such, with what helps, wherever it happens."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch
import transformers

from braidlora.cli import main
from braidlora.config import ModelSection
from braidlora.errors import TrainingError, is_out_of_memory
from braidlora.models.base import load_base

FAILURES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"
    ),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("unable to mmap 100 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_base_that_does_not_fit(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(
        TrainingError, match=r"out of memory while loading embedded.*model\.dtype=bfloat16"
    ) as caught:
        load_base(ModelSection())
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_any_verb_that_runs_out_of_memory_ends_with_4_and_a_remedy(monkeypatch, capsys, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("braidlora.config.load_config", fails)
    assert main(["preview", "demo"]) == 4
    shown = capsys.readouterr().err
    assert shown.startswith("braidlora preview: out of memory: ")
    assert "smaller batch_size" in shown


def test_other_errors_are_not_taken_for_it():
    for error in (
        RuntimeError("size mismatch"),
        OSError(errno.ENOSPC, "No space left"),
        ValueError("out of memory"),
    ):
        assert not is_out_of_memory(error)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_real_base_under_a_real_limit(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    embedded = "from braidlora.assets import embedded_base_path as e; import transformers as t; "
    code = (
        embedded
        + f"t.AutoTokenizer.from_pretrained(e()).save_pretrained({str(tmp_path)!r}); import torch, resource; "
        "from braidlora.models.base import load_base; from braidlora.config import ModelSection; "
        "load_base(ModelSection()); "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27)); "
        f"load_base(ModelSection(path={str(tmp_path)!r}, dtype='float32'))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "TrainingError: model.path: out of memory while" in child.stderr, child.stderr[-2000:]
