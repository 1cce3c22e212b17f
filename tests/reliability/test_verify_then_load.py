"""A flipped bit, a cut or a missing file: a verb notices it or ends as if nothing had happened; `verify` names it."""

import json
import random
import shutil

import pytest

from braidlora.cli import main
from braidlora.runs import MANIFEST, commit_directory, verify

LOADING = ("resume", "evaluate", "report", "add-client", "export", "merge", "analyze")
DAMAGES = ("flipped", "cut", "missing")


def damage(path, how, draw):
    data = path.read_bytes()
    if how == "missing" or not data:
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        changed = bytearray(data)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(7)
        path.write_bytes(changed)


def files_of(stage):
    """Every file that a manifest vouches for, manifests too."""
    listed = {
        (manifest.parent / name).relative_to(stage)
        for manifest in stage.rglob(MANIFEST)
        for name in json.loads(manifest.read_text())["files"]
    }
    return sorted(listed | {path.relative_to(stage) for path in stage.rglob(MANIFEST)})


@pytest.fixture
def damaged(world, undisturbed, call):
    """Damage a file of what stood before a verb, then call the verb."""

    def tried(verb, name, how):
        stage, _, expected = undisturbed(verb)
        scene = world.scenes()[verb]
        world.set(stage)
        path = world.work / name
        damage(path, how, random.Random(f"{verb} {name}"))
        before = world.results(scene.results)
        where = f"{verb} with {name} {how}"
        if name.name != MANIFEST or how != "missing":  # of a run it is as in version 0.1
            report = verify(world.work)
            assert report["damaged"] or (how == "missing" and report["unfinished"]), where
        code, error = call(scene.verb)
        assert code in (0, 2, 3, 4, 5), f"{where}: {error}"
        if code:
            return code
        for result, content in world.results(scene.results).items():
            untouched = before.get(result) == content and result == name.as_posix()
            assert untouched or content == expected.get(result), f"{where}: {result} is another one"
        return code

    return tried


@pytest.mark.parametrize("verb", LOADING)
def test_damage_to_some_files(undisturbed, damaged, verb):
    draw = random.Random(verb)
    files = files_of(undisturbed(verb)[0])
    for how in DAMAGES:
        for name in draw.sample(files, 1):
            damaged(verb, name, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("verb", LOADING)
def test_damage_to_every_file(undisturbed, damaged, verb, how):
    for name in files_of(undisturbed(verb)[0]):
        damaged(verb, name, how)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("evaluate", "out/run/config.yaml"),
        ("evaluate", "out/run/adapter/adapter_model.safetensors"),
        ("export", "out/run/adapter/adapter_config.json"),
        ("analyze", "out/run/adapter_init/adapter_model.safetensors"),
        ("add-client", "out/config.yaml"),
        ("add-client", "out/metrics.json"),
        ("report", "out/cells/alora-seed0/metrics.json"),
    ],
)  # fmt: skip
def test_what_a_verb_reads_is_refused(damaged, verb, name, how):
    from pathlib import Path

    code = damaged(verb, Path(name), how)
    if how == "missing" and verb == "report":
        assert code == 0  # a comparison finishes what is not finished
    elif how == "missing" and name.endswith("config.yaml"):
        assert code in (2, 5)  # without its recipe a folder is no run
    else:
        assert code == 5


def test_half_a_recipe_is_not_scored_with_default_prompts(world, undisturbed, call):
    """Cut between two sections it is YAML still, and a valid recipe."""
    stage, _, _ = undisturbed("evaluate")
    world.set(stage)
    path = world.work / "out" / "run" / "config.yaml"
    text = path.read_text()
    path.write_text(text[: text.index("\nprompt:") + 1])
    code, error = call(["evaluate", str(world.work / "out" / "run")])
    assert code == 5
    assert "config.yaml: changed since it was written" in error


def test_verify_names_what_is_damaged_and_what_is_not_covered(world, undisturbed, call, capsys):
    stage, _, _ = undisturbed("evaluate")
    world.set(stage)
    run = world.work / "out" / "run"
    assert main(["verify", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["what"] == "run"
    assert report["damaged"] == report["not_covered"] == report["unfinished"] == []
    (run / "predictions" / "up.jsonl").write_text("")
    (run / "adapter" / "adapter_config.json").unlink()
    code, error = call(["verify", str(run)])
    assert code == 5
    assert "2 damaged" in error
    assert main(["verify", str(world.work), "--json"]) == 5
    names = [one["file"] for one in json.loads(capsys.readouterr().out)["damaged"]]
    assert names == ["out/run/adapter/adapter_config.json", "out/run/predictions/up.jsonl"]
    assert call(["verify", str(world.folder / "none")])[0] == 5


def test_a_run_of_version_0_1_is_not_covered_but_works(world, undisturbed, call):
    """It has manifests in its checkpoints and adapters alone; a resume adds that of the run."""
    stage, _, _ = undisturbed("resume")
    world.set(stage)
    out = world.work / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    (out / MANIFEST).unlink()
    report = verify(out)
    assert report["damaged"] == []
    assert {"config.yaml", "metrics.json", "predictions/up.jsonl"} <= set(report["not_covered"])
    assert call(["evaluate", str(out), "--evaluation.batch_size=8"])[0] == 0
    lines = (out / "predictions" / "up.jsonl").read_text().replace('"score": 100.0', '"score": 900.0')
    (out / "predictions" / "up.jsonl").write_text(lines.replace('"score": 0.0', '"score": 900.0'))
    code, error = call(world.scenes()["train"].again)
    assert code == 0, error
    assert json.loads((out / "metrics.json").read_text())["tasks"] == metrics["tasks"]
    assert verify(out)["not_covered"] == []


def test_a_finished_run_makes_again_what_is_missing(world, undisturbed, call):
    stage, _, expected = undisturbed("resume")
    world.set(stage)
    shutil.rmtree(world.work / "out" / "adapter")
    (world.work / "out" / "predictions" / "up.jsonl").unlink()
    code, error = call(world.scenes()["train"].again)
    assert code == 0, error
    assert world.results(("out/**/*",)) == expected


def test_a_finished_run_is_evaluated_with_new_settings(world, undisturbed, call):
    stage, _, _ = undisturbed("resume")
    world.set(stage)
    again = [*world.scenes()["train"].again, "--evaluation.length_normalized=false"]
    code, error = call(again)
    assert code == 0, error
    assert "length_normalized: False" in (world.work / "out" / "config.yaml").read_text() or (
        "length_normalized: false" in (world.work / "out" / "config.yaml").read_text()
    )


def test_a_missing_best_checkpoint_is_found_before_training(world, undisturbed, call):
    stage, _, _ = undisturbed("resume")
    world.set(stage)
    out = world.work / "out"
    last = out / "checkpoints" / "step-4"
    with commit_directory(
        last
    ) as staging:  # the same checkpoint of a run whose validation loss was lower at step 2
        shutil.copytree(last, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        state = json.loads((staging / "trainer_state.json").read_text())
        (staging / "trainer_state.json").write_text(json.dumps({**state, "best_global_step": 2}))
    shutil.rmtree(out / "checkpoints" / "step-2")
    (out / "metrics.json").unlink()
    code, error = call(world.scenes()["train"].again)
    assert code == 5
    assert "lowest validation loss so far" in error


def test_another_runs_predictions_are_refused(world, undisturbed, call):
    """They have the same rows, the same form, and a source file of their own beside them."""
    stage, _, _ = undisturbed("report")
    world.set(stage)
    cells = world.work / "out" / "cells"
    for name in ("up.jsonl", "up.source.json"):
        shutil.copyfile(
            cells / "alora-seed0" / "predictions" / name, cells / "lora-seed0" / "predictions" / name
        )
    code, error = call(world.scenes()["compare"].verb)
    assert code == 5, error
    assert "lora-seed0/predictions/up" in error
