"""PEFT's own test suite, of the installed version, with our configurations as its parameters.

The suite is not part of this repository: the sdist of the installed PEFT is fetched from the package registry when
the test runs, and the test is skipped where that is out of reach. Counts are printed and written to
`benchmarks/results/acceptance.json`.
"""

import collections
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from acceptance_record import record
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

pytestmark = pytest.mark.acceptance
PEFT = importlib.metadata.version("peft")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def peft_tests(tmp_path_factory):
    """A folder that holds PEFT's tests as the package `peft_own_tests`, and a stand-in for diffusers."""
    folder = tmp_path_factory.mktemp("peft")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--no-binary", ":all:", f"peft=={PEFT}", "--dest", str(folder)]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(
            f"the source of peft {PEFT} cannot be fetched: {str(error.stderr or error).strip()[-300:]}"
        )
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (folder / f"peft-{PEFT}" / "tests").rename(folder / "peft_own_tests")
    (folder / "peft_own_tests" / "__init__.py").touch()
    # The common tests import one name of it for tests of image models, which are not run here.
    (folder / "diffusers.py").write_text("class StableDiffusionPipeline:\n    pass\n")
    return folder


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder / "qwen2")
    gpt2 = GPT2Config(
        vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,  # safetensors refuses tied weights where PEFT's test saves a plain state dict
    )  # fmt: skip
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    return folder


@pytest.mark.parametrize(
    ("suite", "at_least"), [("TestCustomModels", 300), ("TestDecoders", 200)], ids=["custom", "decoders"]
)
def test_peft_suite(suite, at_least, peft_tests, tiny_models, tmp_path, capsys):
    report = tmp_path / "report.xml"
    command = [
        sys.executable, "-m", "pytest", str(HERE / "peft_suite" / "cases.py"), "-k", suite, "--junitxml", str(report),
        "-q", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(peft_tests),
        "TINY_MODELS": str(tiny_models),
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert report.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    counts, skipped, failed = collections.Counter(), collections.Counter(), []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next(
            (child.tag for child in case if child.tag in ("skipped", "failure", "error")), "passed"
        )
        counts[outcome] += 1
        if outcome == "skipped":
            skipped[case.find("skipped").get("message")] += 1
        elif outcome != "passed":
            failed.append(case.get("name"))
    summary = {name: counts[name] for name in ("passed", "skipped", "failure", "error")}
    with capsys.disabled():
        print(f"\nPEFT {PEFT}, {suite}: " + ", ".join(f"{count} {name}" for name, count in summary.items()))
        for reason, count in skipped.most_common():
            print(f"  {count} skipped: {reason}")
    record(f"peft/{suite}", {**summary, "skip_reasons": dict(skipped)})
    assert not failed, f"{failed}\n{run.stdout[-5000:]}"
    assert counts["passed"] >= at_least
