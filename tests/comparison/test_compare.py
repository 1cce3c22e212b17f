"""`braidlora compare` from the command line: what it writes, what it uses again, what it refuses."""

import dataclasses
import html
import json
import math
import re
import shutil

import pytest
import yaml
from comparison_files import ROWS, TASKS, WORDS, comparison_of
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from braidlora.cli import main
from braidlora.comparison._cells import Cell, refuse_other_runs
from braidlora.config import dump_config, load_config
from braidlora.errors import CheckpointError, Interrupted
from braidlora.evaluation.balance import delta_m
from braidlora.models.old_fingerprints import sampled_files
from braidlora.models.stored_weights import stored_fingerprint
from braidlora.runs import RunDirectory, cover
from helpers.tiny_base import WORDS as VOCABULARY
from helpers.tiny_base import build_base

# With so few rows the test rows have answers that training lacks; test_checks.py tests what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore::braidlora.errors.DataWarning")

WILD = "wild={training.learning_rate: 1e37, adapter.lora_alpha: 1000}"  # overflows in the second step


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_every_cell_is_a_run_directory(finished):
    names = [f"{row}-seed{seed}" for row in ROWS for seed in (0, 1)]
    names += [f"single-{task}-seed{seed}" for task in TASKS for seed in (0, 1)]
    assert sorted(path.name for path in (finished / "cells").iterdir()) == sorted(names)
    for name in names:
        run = RunDirectory.at(finished / "cells" / name)
        assert run.state() == "finished"
        assert load_config(run.config).seed == int(name[-1])
        assert load_config(run.config).training.threads == 1
        assert (run.adapter / "adapter_model.safetensors").is_file()
    assert load_config(finished / "cells" / "alora-seed1" / "config.yaml").adapter.method == "alora"
    saved = json.loads((finished / "cells" / "loha-seed0" / "adapter" / "adapter_config.json").read_text())
    assert (saved["peft_type"], sorted(saved["target_modules"])) == ("LOHA", ["q_proj", "v_proj"])


def test_the_command_that_is_named_does_not_start_over(compare, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    words = ["--methods=lora", "--seeds=0", "--no-single-task", "--overwrite"]
    assert compare(folder, *words).code == 0
    assert comparison_of(folder)["command"].endswith("--no-single-task")

    def stopped(cell):
        raise Interrupted("stopped", 15)

    monkeypatch.setattr("braidlora.comparison._runner.run_cell", stopped)
    outcome = compare(folder, *words)
    assert outcome.code == 143
    assert "0 of 2 runs are done; the same command without --overwrite resumes" in outcome.err


def test_the_numbers_are_those_of_the_runs(finished):
    comparison = comparison_of(finished)
    assert (comparison["format"], comparison["seeds"], comparison["baseline"]) == (1, [0, 1], "lora")
    assert comparison["tasks"] == {
        name: {"metric": "exact_match", "n": n} for name, n in (("up", 16), ("rev", 10), ("len", 6))
    }
    assert [row["name"] for row in comparison["rows"]] == ROWS
    for row in comparison["rows"]:
        runs = [json.loads((finished / run / "metrics.json").read_text()) for run in row["runs"]]
        assert row["trainable_parameters"] == runs[0]["trainable_parameters"]
        assert row["seconds"]["values"] == [run["seconds"] for run in runs]
        assert row["mean"]["values"] == [run["mean"] for run in runs]
        assert row["worst"]["values"] == [run["worst"] for run in runs]
        assert row["worst"]["tasks"] == [run["worst_task"] for run in runs]
        assert all(200 < value < 20_000 for value in row["peak_memory_mib"]["values"])
        for task in TASKS:
            values = [run["tasks"][task]["score"] for run in runs]
            assert row["tasks"][task]["values"] == values
            assert row["tasks"][task]["std_seeds"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert len({row["mean"]["mean"] for row in comparison["rows"]}) > 1


def test_differences_are_paired_by_seed_and_row(finished):
    def scores(name, task):
        lines = (finished / "cells" / name / "predictions" / f"{task}.jsonl").read_text().splitlines()
        return [json.loads(line)["score"] for line in lines]

    rows = {row["name"]: row for row in comparison_of(finished)["rows"]}
    assert rows["lora"]["difference"] is rows["lora"]["difference_reason"] is None
    for name in ROWS[1:]:
        difference = rows[name]["difference"]
        assert difference["baseline"] == "lora"
        for seed in (0, 1):
            by_task = [
                sum(scores(f"{name}-seed{seed}", task)) / len(scores(f"{name}-seed{seed}", task))
                - sum(scores(f"lora-seed{seed}", task)) / len(scores(f"lora-seed{seed}", task))
                for task in TASKS
            ]
            assert difference["values"][seed] == pytest.approx(sum(by_task) / 3)
        assert difference["mean"] == pytest.approx(sum(difference["values"]) / 2)
        assert difference["low"] <= difference["mean"] <= difference["high"]
        assert set(difference["tasks"]) == set(TASKS)


def test_delta_m_is_measured_against_the_single_task_runs_of_the_same_seed(finished):
    comparison = comparison_of(finished)
    references = comparison["references"]
    assert references["runs"]["rev"] == ["cells/single-rev-seed0", "cells/single-rev-seed1"]
    for row in comparison["rows"]:
        for seed in (0, 1):
            single = {task: references["scores"][task]["values"][seed] for task in TASKS}
            expected = delta_m({task: row["tasks"][task]["values"][seed] for task in TASKS}, single)
            assert expected.value is not None
            assert row["delta_m"]["values"][seed] == pytest.approx(expected.value)


def test_a_single_task_run_has_the_schedule_of_its_share_of_the_rows(finished):
    config = load_config(finished / "cells" / "single-up-seed0" / "config.yaml")
    assert [task.name for task in config.tasks] == ["up"]
    # 20 of 40 training rows: half of twelve steps, and of two that warm up.
    assert (config.training.max_steps, config.training.warmup_steps) == (6, 1)
    assert (config.adapter.method, config.adapter.r) == ("lora", 4)


def test_the_matched_rank_comes_nearest_in_parameters(finished):
    rows = {row["name"]: row for row in comparison_of(finished)["rows"]}
    rank = rows["lora-matched"]["overrides"]["adapter.r"]
    assert rows["lora-matched"]["label"] == f"LoRA, r = {rank}"
    per_rank = rows["lora"]["trainable_parameters"] / 4
    target = rows["alora"]["trainable_parameters"]
    assert abs(rows["lora-matched"]["trainable_parameters"] - target) <= per_rank / 2
    config = load_config(finished / "cells" / "lora-matched-seed0" / "config.yaml")
    assert config.adapter.lora_alpha / rank == 16 / 4


def test_base_and_majority_stand_beside(finished):
    comparison = comparison_of(finished)
    base = json.loads((finished / "base" / "metrics.json").read_text())
    assert comparison["base"]["mean"] == base["mean"]
    assert comparison["base"]["tasks"] == {task: base["tasks"][task]["score"] for task in TASKS}
    assert set(comparison["majority"]["tasks"]) == set(TASKS)


def test_a_finished_comparison_is_tabulated_from_what_is_there(finished, compare):
    before, table = stamps(finished), (finished / "comparison.md").read_text()
    outcome = compare(finished, *WORDS)
    after = stamps(finished)
    assert {path.name for path in after if before.get(path) != after[path]} == {
        "comparison.json", "comparison.md", "manifest.json", "recipe.yaml",
    }  # fmt: skip
    assert (finished / "comparison.md").read_text() == table
    assert "LoRA, r = 7" in outcome.out
    assert "Δm%" in outcome.out
    assert outcome.err == ""


def test_it_ends_in_a_report(finished, recipe, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "out")
    assert main(["compare", str(recipe), f"--output={folder}", *WORDS]) == 0
    assert f"\nReport  {folder / 'report.html'}\n" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    plain = re.sub("</?code>", "`", re.sub('<code class="flag">(.*?)</code>', r"\1", page))
    plain = html.unescape(re.sub("</?span.*?>", "", plain)).replace("−", "-")
    for sentence in comparison_of(folder)["verdict"]:
        assert sentence in plain
    inside = json.loads((folder / "analysis.json").read_text())
    assert [adapter["label"] for adapter in inside["adapters"]] == ["alora-seed0"]
    assert (folder / "figures" / "routers-alora-seed0.svg").is_file()
    assert "Which expert serves which task in alora-seed0" in page
    assert main(["compare", str(recipe), f"--output={folder}", *WORDS, "--methods=lora"]) == 0
    assert not (folder / "analysis.json").exists()
    assert "Which expert serves which task" not in (folder / "report.html").read_text(encoding="utf-8")
    assert main(["compare", str(recipe), f"--output={folder}", *WORDS, "--no-report"]) == 0
    assert not (folder / "report.html").exists(), "of fewer rows than the table beside it"


def test_the_report_analyzes_a_run_with_weights_by_task(recipe, tmp_path, capsys):
    words = ["--methods=alora,hydralora", "--adapter.gate=task", "--seeds=0", "--no-single-task"]
    assert main(["compare", str(recipe), "--workers=1", f"--output={tmp_path / 'out'}", *words]) == 0
    assert "warning" not in capsys.readouterr().err
    assert (tmp_path / "out/report.html").is_file()
    inside = json.loads((tmp_path / "out/analysis.json").read_text())
    assert inside["routers"] == {"alora-seed0": None}
    assert inside["drift"]["alora-seed0"]["changes"]


def test_a_run_that_cannot_be_analyzed_is_left_out_of_the_report(recipe, tmp_path, capsys):
    """An adapter of a mixture's stacked experts alone has no linear layer whose factors could be compared."""
    base = tmp_path / "base"
    build_base(base)  # its tokenizer
    sizes = {"moe_intermediate_size": 24, "intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=1, pad_token_id=3, **sizes,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(base)
    made = yaml.safe_load(recipe.read_text())
    made["model"]["path"] = str(base)
    del made["adapter"]["target_modules"]
    made["adapter"]["target_parameters"] = ["experts.gate_up_proj"]
    made["training"] |= {"max_steps": 2, "save_steps": 1, "warmup_steps": 1}
    source = tmp_path / "experts.yaml"
    source.write_text(yaml.safe_dump(made))
    command = ["compare", str(source), "--methods=lora,alora", "--seeds=0", "--no-single-task", "--workers=1",
               f"--output={tmp_path / 'out'}"]  # fmt: skip
    for _ in range(2):  # the second one repeats it from what is there
        with pytest.warns(UserWarning, match="no analysis of alora-seed0: .*only the base's stacked experts"):
            assert main(command) == 0
        assert comparison_of(tmp_path / "out")["verdict"][0] in capsys.readouterr().out
        assert (tmp_path / "out/report.html").is_file()
        assert not (tmp_path / "out/analysis.json").exists()


def test_one_task_has_no_single_task_runs_unless_asked(recipe, compare, tmp_path):
    config = load_config(recipe)
    alone = tmp_path / "alone.yaml"
    alone.write_text(dump_config(config.model_copy(update={"tasks": config.tasks[:1]})))
    words = ["--methods=lora", "--seeds=0"]
    assert compare(tmp_path / "out", *words, source=alone).code == 0
    assert [one.name for one in (tmp_path / "out" / "cells").iterdir()] == ["lora-seed0"]
    assert compare(tmp_path / "out", *words, "--single-task", source=alone).code == 0
    names = sorted(one.name for one in (tmp_path / "out" / "cells").iterdir())
    assert names == ["lora-seed0", f"single-{config.tasks[0].name}-seed0"]


def test_fewer_rows_another_baseline_and_no_references(finished, compare, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")  # a comparison may be moved
    outcome = compare(
        tmp_path / "moved", "--methods=alora,lora", "--seeds=1", "--baseline=alora", "--no-single-task", "--json"
    )  # fmt: skip
    comparison = json.loads(outcome.out)
    assert comparison == comparison_of(tmp_path / "moved")
    assert [row["name"] for row in comparison["rows"]] == ["alora", "lora"]
    assert comparison["rows"][1]["difference"]["baseline"] == "alora"
    assert comparison["rows"][0]["delta_m"] is None
    assert "no single-task LoRAs" in comparison["rows"][0]["delta_m_reason"]
    assert comparison["rows"][0]["mean"]["std_seeds"] is None
    assert any(sentence.startswith("One seed only") for sentence in comparison["verdict"])


def test_the_recipes_own_references_serve_where_none_are_trained(finished, compare, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")
    given = "--evaluation.references={up: 50, rev: 40, len: 25}"
    refused = compare(tmp_path / "moved", "--methods=lora", "--seeds=0", "--no-single-task", given)
    assert refused.code == 5
    assert "lora-seed0: evaluation.references.up: nothing there, 50.0 now" in refused.err
    outcome = compare(
        tmp_path / "moved", "--methods=lora", "--seeds=0", "--no-single-task", given, "--overwrite", "--json"
    )
    [row] = json.loads(outcome.out)["rows"]
    scores = {task: row["tasks"][task]["mean"] for task in TASKS}
    assert row["delta_m"]["mean"] == pytest.approx(delta_m(scores, {"up": 50, "rev": 40, "len": 25}).value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.learning_rate=0.02"], "alora-seed0: training.learning_rate: 0.01 there, 0.02 now"),
        (["--split.test=0.5"], "data.up.test"),
    ],
)
def test_runs_of_another_recipe_are_not_used_again(finished, compare, words, said):
    before = stamps(finished)
    outcome = compare(finished, *WORDS, *words)
    assert outcome.code == 5
    assert said in outcome.err
    assert "--overwrite" in outcome.err
    assert stamps(finished) == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"recipe": {}}', "{"])
def test_a_damaged_note_is_told(finished, compare, tmp_path, content):
    folder = shutil.copytree(finished, tmp_path / "out")
    (folder / "cells" / "lora-seed0" / "cell.json").write_text(content)
    outcome = compare(folder, "--methods=lora", "--seeds=0", "--no-single-task")
    assert outcome.code == 5
    assert "cell.json: " in outcome.err
    assert "damaged" in outcome.err or "--overwrite trains all runs again" in outcome.err


def test_another_base_and_other_rows_under_the_same_name_are_noticed(finished, compare, recipe, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    folder = tmp_path / "source"
    shutil.copytree(recipe.parent, folder)
    text = (folder / "tiny.yaml").read_text()
    note = tmp_path / "out" / "cells" / "lora-seed0" / "cell.json"
    note.write_text(note.read_text().replace(str(recipe.parent), str(folder)))
    cover(note.parent, [note.name])
    recipe_there = folder / "tiny.yaml"
    recipe_there.write_text(text.replace(str(recipe.parent), str(folder)))
    words = ["--methods=lora", "--seeds=0", "--no-single-task"]
    shutil.rmtree(tmp_path / "out" / "base")
    assert compare(tmp_path / "out", *words, source=recipe_there).code == 0
    weights = folder / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3000] ^= 1
    weights.write_bytes(content)
    rows = folder / "up-labels.jsonl"
    rows.write_text(rows.read_text().replace("yes", "no", 1))
    outcome = compare(tmp_path / "out", *words, source=recipe_there)
    assert outcome.code == 5
    assert "lora-seed0: base: " in outcome.err
    assert "lora-seed0: data.up." in outcome.err


def test_a_note_of_0_1_and_settings_of_another_version_are_no_other_base(finished, recipe, tmp_path):
    """Cells that are done are recognised by the old digest, and compared by every setting that both sides have."""
    folder = shutil.copytree(finished, tmp_path / "out")
    base = recipe.parent / "base"
    path = folder / "cells" / "lora-seed0" / "cell.json"
    (path.parent / "manifest.json").unlink()
    note = json.loads(path.read_text())
    assert note["made_from"]["base"] == stored_fingerprint(base)
    config = load_config(folder / "cells" / "lora-seed0" / "config.yaml")
    cell = Cell("lora-seed0", config, {**note["made_from"]})
    cell = dataclasses.replace(cell, config=config.model_copy(update={"output": str(path.parent)}))
    refuse_other_runs([cell])
    del note["recipe"]["adapter"]["target_parameters"]
    old = {"data": note["made_from"]["data"], "base": sampled_files(base)}
    path.write_text(json.dumps(note | {"made_from": old}))
    refuse_other_runs([cell])
    path.write_text(json.dumps(note | {"made_from": old | {"base": "0" * 16}}))
    with pytest.raises(CheckpointError, match="lora-seed0: base: 0000"):
        refuse_other_runs([cell])
    settings = note["made_from"]["architecture"]
    path.write_text(
        json.dumps(note | {"made_from": note["made_from"] | {"architecture": settings | {"new": 1}}})
    )
    refuse_other_runs([cell])
    eps = note["made_from"] | {"architecture": settings | {"rms_norm_eps": 0.5}}
    path.write_text(json.dumps(note | {"made_from": eps}))
    with pytest.raises(CheckpointError, match=r"architecture\.rms_norm_eps: 0\.5 there, 1e-06 now"):
        refuse_other_runs([cell])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods=lora,qlora"], "unknown qlora; known are lora, lora-matched"),
        (["--methods="], "nothing to compare"),
        (["--seeds=0,0"], "different non-negative integers"),
        (["--seeds="], "--seeds: got []"),
        (["--seeds=a"], "--seeds: got ['a']"),
        (["--baseline=best"], "no row 'best'; the rows are lora, lora-matched"),
        (["--variant", "mine"], "expected NAME={…}"),
        (["--variant", "mine={r: ["], "not readable as YAML"),
        (["--variant", "mine=8"], "row mine: got 8; expected a PEFT configuration"),
        (["--variant", "mine={adapter.rr: 8}"], "row mine: 1 problem in the recipe"),
        (["--variant", "lora={adapter.r: 8}"], "lora is given twice"),
        (["--variant", "../out={adapter.r: 8}"], "expected a name of letters"),
        (["--variant", "single-up={adapter.r: 8}"], "does not start with `single-`"),
        (["--variant", "mine={peft_type: LOHAA}"], "mine-seed0: adapter.method: unknown peft_type 'LOHAA'"),
        (["--tune", "training.learning_rate"], "expected KEY=A,B,…"),
        (["--tune", "training.learning_rate=0.1,0.1"], "one or more values that differ"),
        (["--tune", "training.learning_rate=-1"], "training.learning_rate: got -1"),
        (["--tune", "adapter.method=lora"], "sets this key itself"),
        (["--tune", "training.learning_rate=0.1,0.2", "--split.validation=0"], "--split.validation=0.1"),
        (["--variant", "mine={seed: 3}"], "row mine: seed would be ignored, because --seeds sets it"),
        (["--sweep", "seed=3,4"], "--sweep: seed would be ignored"),
        (["--tune", "output=a,b"], "--tune: output would be ignored, because --output"),
        (["--seeds=true"], "--seeds: got [True]"),
        (["--workers=²"], "--workers: got '²'"),
        (["--matched=rank"], "requires --sweep"),
        (["--sweep", "adapter.r=2,4", "--matched=rank"], "use --matched none"),
        (["--workers=0"], "expected `auto` or an integer from 1 to 1024"),
        (["--workers=two"], "--workers: got 'two'"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(compare, tmp_path, words, said):
    outcome = compare(tmp_path / "out", *words)
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


def test_no_test_rows_are_a_data_error(compare, tmp_path):
    outcome = compare(tmp_path / "out", "--split.test=0")
    assert outcome.code == 3
    assert "--split.test=0.1" in outcome.err


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt"])
def test_a_folder_of_something_else_is_left_alone(compare, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    outcome = compare(tmp_path / "out")
    assert outcome.code == 2
    assert "nothing there was changed" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_run_that_fails_is_left_out_and_named(compare, tmp_path):
    outcome = compare(
        tmp_path / "out", "--methods=lora", "--variant", WILD, "--seeds=0",
        "--no-single-task",
    )  # fmt: skip
    assert outcome.code == 4
    assert "LoRA" in outcome.out
    assert "wild-seed0" in outcome.err
    comparison = comparison_of(tmp_path / "out")
    assert [row["name"] for row in comparison["rows"]] == ["lora"]
    [failed] = comparison["failed"]
    assert failed["run"] == "wild-seed0"
    assert "The step was not taken" in failed["reason"]


def test_tuning_chooses_on_validation_rows_and_leaves_the_test_rows_alone(compare, tmp_path):
    words = [
        "--methods=alora",
        "--seeds=0",
        "--no-single-task",
        "--adapter.lora_alpha=1000",
        "--split.validation=0.3",
    ]
    values = [1e-5, 1e-4, 1e37]  # the last overflows
    outcome = compare(tmp_path / "out", *words, f"--tune=training.learning_rate={','.join(map(str, values))}")
    assert outcome.code == 0
    assert "alora+learning_rate=1e+37-seed0: step" in outcome.err
    cells = {value: tmp_path / "out" / "cells" / f"alora+learning_rate={value}-seed0" for value in values}
    losses = {}
    for value in values[:2]:
        lines = [json.loads(line) for line in (cells[value] / "log.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 12
        losses[value] = lines[-1]["validation_loss"]
    chosen = min(losses, key=losses.__getitem__)
    [row] = comparison_of(tmp_path / "out")["rows"]
    assert row["tuned"] == {"training.learning_rate": chosen}
    assert row["runs"] == [f"cells/alora+learning_rate={chosen}-seed0"]
    assert [entry["values"]["training.learning_rate"] for entry in row["tuning"]] == values
    assert [entry["validation_loss"]["mean"] for entry in row["tuning"][:2]] == list(losses.values())
    assert row["tuning"][2]["validation_loss"] is None
    assert "The step was not taken" in row["tuning"][2]["reason"]
    scored = [value for value in values if (cells[value] / "predictions").exists()]
    assert scored == [chosen]
    assert comparison_of(tmp_path / "out")["failed"] == []
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert f"| learning_rate {chosen} | {losses[chosen]:.3f} * |" in table
    assert "| learning_rate 1e+37 | failed |" in table
