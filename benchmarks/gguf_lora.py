"""Exported LoRAs in llama.cpp: converted by its own script, loaded, and compared with PEFT token by token.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    python -m venv llama && llama/bin/pip install ik-llama-cpp-python==0.1.5
    python benchmarks/gguf_lora.py BASE EXPORT … --converter llama_cpp_python-0.3.36/vendor/llama.cpp \
        --python llama/bin/python

BASE is a folder with a model, EXPORT a folder from `braidlora export`. llama-cpp-python comes as source and takes long
to build, so the file is loaded by the wheel of a fork that has llama.cpp's functions for LoRAs. All is in float32.
Results go to benchmarks/results/gguf_lora.json, or to --output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

RESULTS = Path(__file__).parent / "results" / "gguf_lora.json"
PROMPTS = ("Write in capitals: bird =>", "Give the opposite of: dark =>", "The capital of France is")
TOKENS = 12
# Runs in the environment that has the loader and neither torch nor braidlora.
LOADER = """
import ctypes, importlib.metadata, json, sys
import numpy as np
import ik_llama_cpp._ctypes_api as C
from ik_llama_cpp._internals import IkContext, IkModel, make_batch_range, make_batch_single

C._lib.llama_lora_adapter_init.restype = ctypes.c_void_p
C._lib.llama_lora_adapter_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
C._lib.llama_lora_adapter_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
base, tokens, prompts, *loras = sys.argv[1:]
model, found = IkModel(base), []
for lora in ["", *loras]:
    adapter = C._lib.llama_lora_adapter_init(model.model, lora.encode()) if lora else None
    assert adapter or not lora
    answers = []
    for ids in json.loads(prompts):
        context = IkContext(model, n_ctx=256, n_threads=1, flash_attn=False)
        assert adapter is None or C._lib.llama_lora_adapter_set(context.ctx, adapter, 1.0) == 0
        assert context.decode(make_batch_range(ids)) == 0
        answer = []
        for step in range(int(tokens)):
            logits = np.ctypeslib.as_array(C.llama_get_logits_ith(context.ctx, -1), (model.n_vocab,))
            answer.append(int(logits.argmax()))
            assert context.decode(make_batch_single(answer[-1], len(ids) + step)) == 0
        answers.append(answer)
        context.close()
    found.append(answers)
print("RESULT " + json.dumps([importlib.metadata.version("ik-llama-cpp-python"), found]))
"""


def convert(converter: Path, base: Path, exports: list[Path], folder: Path) -> tuple[Path, list[Path]]:
    """The base and the adapters as GGUF files in float32."""
    environment = {**os.environ, "PYTHONPATH": str(converter / "gguf-py")}

    def run(script: str, *words: object) -> None:
        command = [sys.executable, str(converter / script), "--outtype", "f32", *map(str, words)]
        subprocess.run(command, check=True, env=environment)

    run("convert_hf_to_gguf.py", base, "--outfile", folder / "base.gguf")
    files = [folder / f"{number}.gguf" for number in range(len(exports))]
    for file, export in zip(files, exports, strict=True):
        run("convert_lora_to_gguf.py", "--base", base, "--outfile", file, export)
    return folder / "base.gguf", files


def agreeing(base: Path, export: Path | None, prompts: list[list[int]], answers: list[list[int]]) -> int:
    """How many of the answers' tokens PEFT would choose too, after the tokens before them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if export is not None:
        model = PeftModel.from_pretrained(model, export)
    same = 0
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model.eval()(torch.tensor([[*ids, *answer]])).logits[0]
        same += int((logits[len(ids) - 1 : -1].argmax(-1) == torch.tensor(answer)).sum())
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("exports", type=Path, nargs="+")
    parser.add_argument("--converter", type=Path, required=True, help="folder with llama.cpp's scripts")
    parser.add_argument("--python", default=sys.executable, help="that has ik-llama-cpp-python")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        base, files = convert(args.converter, args.base, args.exports, Path(folder))
        words = [args.python, "-c", LOADER, base, str(TOKENS), json.dumps(prompts), *files]
        done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    version, found = json.loads(line.removeprefix("RESULT "))
    rows = {}
    for export, answers in zip([None, *args.exports], found, strict=True):
        same = agreeing(args.base, export, prompts, answers)
        rows["base" if export is None else export.name] = {"same": same, "tokens": TOKENS * len(prompts)}
        print(f"{export or 'base'}: {same} of {TOKENS * len(prompts)} tokens as PEFT")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    result = {
        "kind": "gguf_lora",
        "command": "python benchmarks/gguf_lora.py BASE EXPORT …",
        "versions": {**versions, "ik-llama-cpp-python": version, "converter": args.converter.parts[-3:][0]},
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
