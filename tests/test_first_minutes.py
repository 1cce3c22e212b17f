"""What a new user types wrong, and the answer: each mistake has its message."""

import json
import logging
import subprocess
import sys

import pytest

from braidlora.cli import main
from braidlora.cli._common import load_call
from braidlora.cli._compare import given_seeds
from braidlora.config import built_in_recipes, load_config
from braidlora.errors import ConfigError
from braidlora.models.base import load_base
from braidlora.noise import OursOrErrors
from braidlora.runs import comparison_cells, output_of
from helpers.recipes import run_config
from helpers.tiny_base import build_base, write_rows


def said(capsys, *words: str, code: int = 2) -> str:
    assert main(list(words)) == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian", "demo"],
            "unknown command 'trian'. Did you mean `braidlora train`? The commands are demo, ",
        ),
        (["finetune", "demo"], "unknown command 'finetune'. Did you mean `braidlora train`?"),
        (["eval", "runs/x"], "Did you mean `braidlora evaluate`?"),
        (["xyz"], "unknown command 'xyz'. The commands are demo, init, train, evaluate, predict,"),
        (
            ["train", "demo", "--lr=1e-4"],
            "override --lr: unknown key; did you mean --training.learning_rate?",
        ),
        (
            ["train", "demo", "--epochs", "3"],
            "override --epochs: unknown key; did you mean --training.epochs?",
        ),
        (
            ["train", "demo", "--epochs"],
            "override --epochs: no value given. Write --epochs=VALUE. Did you mean --tr",
        ),
        (["train", "demo", "--limit=5"], "did you mean '--tasks.*.train.limit'?"),
        (["train", "demo", "--adapter.lr=1"], "did you mean --training.learning_rate?"),
        (["train", "demo", "--adaptor.r=4"], "override --adaptor.r: unknown key; did you mean --adapter.r?"),
        (["train", "demo", "--tasks.sum.trian.limit=4"], "did you mean --tasks.sum.train.limit?"),
        (["train", "demo", "--model=owner/name"], "Write --model.path=owner/name."),
        (
            ["train", "--lr", "1e-3", "demo"],
            "If it is the value of an override, write --key=value, with `=`.",
        ),
        (
            ["compare", "demo", "--method", "lora"],
            "no option --method. Did you mean --methods? Or the recipe key --ad",
        ),
        (
            ["train", "--recipe", "demo"],
            "no option --recipe. Give the recipe without it: the first word after the command.",
        ),
        (["demo", "--seed", "0,1"], "--seed=0,1: use --seeds for several seeds."),
        (["predict", "runs/x", "--tsk=a"], "takes no overrides, got --tsk. Did you mean --task?"),
        (
            ["train", "demo", "--adapter.method=dora"],
            "DoRA is LoRA with `use_dora`: write method: {peft_type: LORA",
        ),
        (
            ["train", "demo", "--adapter.method=qlora"],
            "QLoRA is LoRA on a quantized base: write model.quantization",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_word_that_was_meant_otherwise(words, message, capsys):
    err = said(capsys, *words)
    assert message in err
    assert "Traceback" not in err


def test_no_word_at_all_shows_the_help(capsys):
    assert main([]) == 2
    err = capsys.readouterr().err
    assert "compare LoRA, HydraLoRA and ALoRA on eight generated" in err
    assert "`braidlora init data.csv` writes one" in err


@pytest.mark.parametrize(
    ("given", "seeds", "note"),
    [
        ("3", [3], "--seeds 3: one seed, 3. For 3 seeds, write --seeds 0,1,2.\n"),
        ("0", [0], ""),
        ("1", [1], ""),
        ("42", [42], ""),
        ("3,4", [3, 4], ""),
    ],
)
def test_one_seed_that_may_be_meant_as_how_many(given, seeds, note, capsys):
    assert given_seeds(given) == seeds
    assert capsys.readouterr().err == note


@pytest.mark.parametrize("peft_type", ["LORA", "BRAIDLORA"])
def test_a_classifier_is_loaded_as_its_readme_says(tmp_path, peft_type):
    """The bare call would stop with a size mismatch of the head."""
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": peft_type, "task_type": "SEQ_CLS"})
    )
    (tmp_path / "README.md").write_text("")
    assert load_call(tmp_path) == f"the code in {tmp_path / 'README.md'}"
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": peft_type, "task_type": "CAUSAL_LM"})
    )
    call = f"PeftModel.from_pretrained(base, '{tmp_path}')"
    assert load_call(tmp_path) == ("import braidlora; " + call if peft_type == "BRAIDLORA" else call)


def test_dora_as_a_peft_type(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    err = said(
        capsys, "train", "demo", "--adapter={method: {peft_type: DORA, r: 8}}", "--training.max_steps=1"
    )
    assert "adapter.method: peft_type 'DORA': DoRA is LoRA with `use_dora`" in err


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("prompt:\n  template: Q: {x} A\n", 2, "a value with a colon and a space in it must be quoted"),
        ("model:\n  path: embedded\n   dtype: auto\n", 3, "indented more than the line above"),
        ("model:\n    path: embedded\n  dtype: auto\n", 3, "indentation matches no line above"),
        ("model:\n\tpath: embedded\n", 2, "a tab indents this line. Use spaces instead of tabs"),
        ("model\n  path: embedded\n", 1, "'model' has no colon. Write `key: value`"),
        ("seed: 1\nmodel embedded\noutput: x\n", 2, "'model embedded' has no colon"),
        ('seed: 1\noutput: "runs/x\nmodel:\n  path: y\n', 2, "a quote is opened here and never closed"),
        (
            "adapter:\n  target_modules: [q_proj\nseed: 1\n",
            2,
            "the list that begins here with [ is not closed with ]",
        ),
        (
            "tasks:\n  - {name: a, train: x\nseed: 1\n",
            2,
            "the mapping that begins here with { is not closed with }",
        ),
        ("output: @x\n", 1, "a value cannot start with @. If it is text, put it in quotes"),
        ('output: "runs\\data"\n', 1, "Use 'single quotes' for paths and patterns"),
        ("seed:1\nmodel: {path: embedded}\n", 1, "a space is missing after the colon of 'seed'"),
        ("tasks:\n  -name: a\n   train: b\n", 2, "a space is missing after the dash of this list item"),
        ("a: b\nc: [a]]\n", 2, "a ] has no opening bracket"),
        ('output: "runs"/x\n', 1, "text follows a closed quote"),
    ],
)
def test_yaml_errors_are_in_plain_words_with_the_line(text, line, message, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:{line}: not valid YAML: ")
    assert message in str(caught.value)
    assert "block" not in str(caught.value)


def test_a_data_file_where_a_recipe_is_expected(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,b\n")
    assert f"Is it a data file? `braidlora init {path}` writes a recipe for one." in said(
        capsys, "train", str(path)
    )
    for name, content in (
        ("latin.csv", "text,label\ngrün,b\n".encode("latin-1")),
        ("rows.jsonl", b'{"a": 1}\n{"a": 2}\n'),
        ("book.xlsx", b"PK\x03\x04\xff\xfe"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        message = f"{path}: a data file, not a recipe. `braidlora init {path}` writes a recipe for one."
        assert message in said(capsys, "train", str(path))
    assert "a folder; expected a recipe file" in said(capsys, "train", str(tmp_path))
    path = tmp_path / "base.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    assert "a GGUF file, which is a base model, not a recipe" in said(capsys, "train", str(path))


def test_what_is_not_a_base_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    config = load_config("demo", [f"--model.path={tmp_path}"]).model

    def refused(message):
        with pytest.raises(ConfigError, match=message):
            load_base(config)

    refused(r"a folder without a model: there is no config\.json in it\. It has notes\.txt\.")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "config.json").write_text("{}")
    refused("It contains models: sub")
    (tmp_path / "base.gguf").write_bytes(b"")
    refused(r"has GGUF files and no config\.json\. Name the file: model\.gguf_file=base\.gguf")
    (tmp_path / "base.gguf").unlink()
    (tmp_path / "cells").mkdir()
    refused("a comparison, not a base model")
    (tmp_path / "config.yaml").write_text("")
    refused("a run directory, not a base model")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("an adapter, not a base model. Give the base that it was trained on")
    with pytest.raises(ConfigError, match="a file; expected the folder"):
        load_base(config.model_copy(update={"path": str(tmp_path / "notes.txt")}))


def grow_tokenizer(folder, words):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused_when_a_row_needs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = build_base(tmp_path / "base")
    grow_tokenizer(base, ["zebra"])
    rows = tmp_path / "rows.jsonl"
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        f"model: {{path: {base}}}\nprompt: {{template: '{{instruction}}', cutoff: 32}}\noutput: runs/my\n"
        "adapter: {target_modules: [q_proj]}\ntraining: {max_steps: 1, warmup_steps: 0, batch_size: 2}\n"
        f"tasks: [{{name: a, train: {rows}, test: {rows}}}]\n"
    )
    rows.write_text('{"instruction": "up a", "output": "A"}\n' * 4)
    assert main(["train", str(recipe), "--no-report"]) == 0
    rows.write_text('{"instruction": "up zebra", "output": "A"}\n' * 4)
    err = said(capsys, "train", str(recipe), "--overwrite")
    assert "its tokenizer has 34 tokens, but its embedding has 33 rows" in err
    assert "The rows contain 'zebra', token 33." in err
    assert "Traceback" not in err


def test_a_vocabulary_larger_than_the_embedding_is_refused_at_once(tmp_path):
    base = build_base(tmp_path)
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zebra"] = len(content["model"]["vocab"])
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="its tokenizer has 34 tokens, but its embedding has 33 rows"):
        load_base(load_config("demo", [f"--model.path={base}"]).model)


@pytest.mark.parametrize("verb", ["compare", "federate"])
def test_each_verb_has_its_own_folder(verb, tmp_path):
    output = str(tmp_path / "runs" / "my")
    assert output_of(output, verb) == f"{output}-{verb}"
    assert output_of(f"{output}/", verb) == f"{output}-{verb}"
    assert output_of(output, verb, ["--output=x", "seed=1"]) == output
    assert output_of(output, verb, ["seed=1", "outputs=2"]) == f"{output}-{verb}"


def test_an_old_folder_is_continued_where_it_is(tmp_path):
    output = tmp_path / "my"
    (output / "cells").mkdir(parents=True)
    (output / "recipe.yaml").write_text("")
    assert output_of(str(output), "compare") == str(output)
    assert output_of(str(output), "federate") == f"{output}-federate"
    (tmp_path / "my-compare").mkdir()
    assert output_of(str(output), "compare") == f"{output}-compare"
    old = tmp_path / "fed"
    old.mkdir()
    (old / "config.yaml").write_text("federation:\n  rounds: 1\n")
    assert output_of(str(old), "federate") == str(old)
    assert output_of(str(old), "compare") == f"{old}-compare"


def test_train_then_compare_then_ship_the_best(tmp_path, capsys, monkeypatch):
    """The whole road on one recipe: nothing collides, and the comparison's folder is understood by each verb."""
    monkeypatch.chdir(tmp_path)
    base, rows = build_base(tmp_path / "base"), tmp_path / "rows"
    rows.mkdir()
    config = run_config(base, write_rows(rows), "runs/my", training__max_steps=2, training__warmup_steps=0)
    recipe = tmp_path / "my.yaml"
    recipe.write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["train", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "Report         runs/my/report.html" in out
    assert "Confidence: one run with one seed" in out
    compare = ["compare", str(recipe), "--methods=lora,alora", "--seeds=0", "--no-single-task", "--workers=1"]
    assert main([*compare, "--no-report"]) == 0
    printed = capsys.readouterr()
    assert "Verdict\n" in printed.out
    assert "! One seed only" in printed.out
    assert "! Not tuned" in printed.out
    assert "the total time is estimated after the first steps" in printed.err
    folder = tmp_path / "runs" / "my-compare"
    assert comparison_cells(folder) == ["alora-seed0", "lora-seed0"]
    advice = json.loads((folder / "comparison.json").read_text())["advice"]
    for verb in ("evaluate", "export"):
        err = said(capsys, verb, "runs/my-compare")
        assert "a comparison; give one of its runs: runs/my-compare/cells/NAME" in err
        assert "alora-seed0, lora-seed0. `braidlora export runs/my-compare --best`" in err
    if advice["choice"] is None:
        assert "recommends no method" in said(capsys, "export", "runs/my-compare", "--best")
        result = json.loads((folder / "comparison.json").read_text())
        result["advice"] |= {"choice": "alora", "run": "cells/alora-seed0"}
        (folder / "manifest.json").unlink()
        (folder / "comparison.json").write_text(json.dumps(result))
    assert main(["export", "runs/my-compare", "--best", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["directory"] == "runs/my-compare-best"
    assert record["advice"]["run"] in record["source"]["path"]
    exported = tmp_path / "runs" / "my-compare-best"
    kind = json.loads((exported / "adapter_config.json").read_text())["peft_type"]
    assert (record["form"], kind) in {("adapter", "BRAIDLORA"), ("lora", "LORA")}
    assert main(["predict", str(exported), "--task=up", "--text=ab"]) == 0
    assert "prediction" in capsys.readouterr().out


def test_best_is_for_comparisons(tmp_path, capsys):
    assert "--best takes the directory of a comparison" in said(capsys, "export", str(tmp_path), "--best")


def test_the_demo_takes_seeds_and_references(monkeypatch, tmp_path, capsys):
    called = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "braidlora.comparison.compare", lambda recipe, **options: called.append((recipe, options))
    )
    monkeypatch.setattr("braidlora.cli._demo.show", lambda *_: None)
    assert main(["demo", "--seeds", "3,4", "--references"]) == 0
    assert main(["demo", "--output=here"]) == 0
    (first, given), (second, default) = called
    assert (given["seeds"], given["references"], first.output) == ([3, 4], "single-task", "runs/demo-compare")
    assert (default["seeds"], default["references"], second.output) == ([0, 1, 2], "none", "here")
    assert "--seeds does not apply to --federated" in said(capsys, "demo", "--federated", "--seeds=0")


def test_libraries_say_nothing_below_an_error():
    passes = OursOrErrors().filter

    def record(name, level):
        return logging.LogRecord(name, level, "", 0, "", None, None)

    assert not passes(record("bitsandbytes.backends.cpu.ops", logging.WARNING))
    assert passes(record("bitsandbytes.backends.cpu.ops", logging.ERROR))
    assert passes(record("braidlora.evaluation.predictions", logging.WARNING))
    assert not passes(record("braidloraish", logging.WARNING))


def test_hints_of_libraries_do_not_reach_the_terminal():
    code = """
import logging, warnings
from braidlora.noise import quiet_libraries
quiet_libraries()
quiet_libraries()
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
logging.getLogger("braidlora.x").warning("ours")
warnings.warn("old name", FutureWarning)
warnings.warn_explicit("a hint", UserWarning, "x.py", 1, module="torch.utils.data.dataloader")
warnings.warn_explicit("no driver", UserWarning, "x.py", 1, module="torch.cuda")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "ours"
    assert "no driver" in done.stderr
    for hint in ("Failed", "old name", "a hint"):
        assert hint not in done.stderr


def test_every_built_in_recipe_writes_below_runs():
    for path in built_in_recipes().values():
        assert "\noutput: runs/" in path.read_text(encoding="utf-8"), path
