"""A resumed run is the uninterrupted run, or it is refused (faults.md 8, 11 to 15, 17)."""

import json
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

import braidlora.training.checkpointing as checkpointing
from braidlora.errors import BraidloraError, CheckpointError, ConfigError, Interrupted
from braidlora.one_run import train
from braidlora.runs import MANIFEST, Committed
from braidlora.training.run import open_run
from braidlora.training.trainer import MultiTaskTrainer
from helpers.results import run_bytes


def run(config, **options):
    return train(config, progress=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of 18 steps that kept its checkpoints (4, 8, 12, 16, 18), to copy and spoil."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def broken_off(finished, make_config, tmp_path):
    """A run directory as a kill after step 12 leaves it: checkpoints 4, 8 and 12, mid-epoch; and its recipe."""
    config = make_config(training__keep_checkpoints=9, split__validation=0.1)
    if not finished.exists():
        run(config.model_copy(update={"output": str(finished)}))
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    for name in ("checkpoints/step-16", "adapter", "predictions"):
        shutil.rmtree(directory / name)
    for last in directory.glob("checkpoints/step-*"):
        if int(last.name[5:]) > 12:
            shutil.rmtree(last)
    (directory / "metrics.json").unlink()
    return config, directory


def newest(directory):
    return max(directory.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))


def rewrite_manifest(folder):
    """Make a spoilt checkpoint look committed."""
    from braidlora.runs import finish_directory

    (folder / MANIFEST).unlink()
    staging = folder.with_name("staging")
    folder.rename(staging)
    finish_directory(staging, folder)


# ---- exact


@pytest.mark.parametrize("step", [4, 8, 12])
def test_resume_from_every_checkpoint_gives_the_same_bytes(broken_off, finished, step):
    config, directory = broken_off
    result = run(config, resume=directory / "checkpoints" / f"step-{step}")
    assert result.steps == 16
    assert run_bytes(directory) == run_bytes(finished)


@pytest.mark.parametrize(
    "overrides",
    [
        {"training__gradient_accumulation": 2, "training__save_steps": 2},
        {"kind": "classify"},
        {"mixing__strategy": "temperature", "mixing__temperature": 4.0},
        {"training__precision": "bfloat16"},
        {"training__load_best": True, "split__validation": 0.2, "training__eval_steps": 3},
        {"prompt__packing": True, "prompt__cutoff": 64},
        {"training__max_steps": 7, "training__scheduler": "cosine"},
        {"training__epochs": 0.7},
        {"adapter__method": "lora"},
        {"adapter__dropout_mask": "per_expert", "training__gradient_checkpointing": True},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_resume_is_exact_in_every_mode(make_config, monkeypatch, tmp_path, overrides):
    config = make_config("whole", **{"training__save_steps": 3, **overrides})
    run(config)
    other = make_config("parts", **{"training__save_steps": 3, **overrides})
    with monkeypatch.context() as patch:
        stop_in_step(patch, 5 if "training__max_steps" not in overrides else 7)
        with pytest.raises(Interrupted):
            run(other)
    run(other, resume="auto")
    assert run_bytes(tmp_path / "parts") == run_bytes(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_answers_after_training_are_not_in_the_precision_of_training(make_config, tmp_path, kind):
    """As those of a run that was resumed at its last step, and of the saved adapter."""
    config = make_config(kind=kind, training__precision="bfloat16", training__max_steps=3)
    with open_run(config, progress=False) as one:
        one.train()
        model = one.prepared.model.eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, type(model).forward(model, input_ids=ids).logits)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(input_ids=ids).logits.float()
        assert not torch.equal(model(input_ids=ids).logits, rounded)


def test_auto_starts_at_the_beginning_where_there_is_nothing(make_config, tmp_path):
    assert run(make_config(training__max_steps=3), resume="auto").steps == 3


def test_a_finished_run_is_shown_not_repeated(finished, broken_off, monkeypatch):
    config, _ = broken_off
    config = config.model_copy(update={"output": str(finished)})
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = run(config, resume="auto")
    assert result.metrics == json.loads((finished / "metrics.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_after_the_last_step_no_further_step_is_made(broken_off, finished, monkeypatch):
    config, directory = broken_off
    shutil.copytree(finished / "checkpoints" / "step-16", directory / "checkpoints" / "step-16")
    monkeypatch.setattr(MultiTaskTrainer, "training_step", lambda *args: pytest.fail("a step was made"))
    run(config, resume="auto")
    assert run_bytes(directory) == run_bytes(finished)


def test_another_run_directory_can_go_on(broken_off, finished, make_config, tmp_path):
    config, directory = broken_off
    elsewhere = config.model_copy(update={"output": str(tmp_path / "elsewhere")})
    run(elsewhere, resume=directory)
    assert run_bytes(tmp_path / "elsewhere") == run_bytes(finished)


@pytest.mark.parametrize("named", ["", "checkpoints/step-8"])
def test_resuming_from_another_run_does_not_replace_the_one_in_the_output(
    broken_off, finished, tmp_path, named
):
    config, directory = broken_off
    mine = tmp_path / "mine"
    shutil.copytree(finished, mine)
    before = run_bytes(mine)
    with pytest.raises(
        CheckpointError, match=f"mine: already has a finished run.* --output={directory} resumes"
    ):
        run(config.model_copy(update={"output": str(mine)}), resume=directory / named)
    assert run_bytes(mine) == before


def test_the_environment_tells_of_resumes(broken_off):
    config, directory = broken_off
    run(config, resume="auto")
    told = json.loads((directory / "environment.json").read_text())
    assert [once["from"] for once in told["resumed"]] == ["step-12"]
    assert told["threads"] == torch.get_num_threads()


# ---- 11: truncated or empty


def truncate(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def empty_files(folder):
    for path in folder.iterdir():
        path.write_bytes(b"")


def without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [truncate, empty, empty_files, without_weights])
def test_incomplete_checkpoints(broken_off, finished, spoil):
    config, directory = broken_off
    spoil(newest(directory))
    with pytest.raises(
        CheckpointError, match=r"step-12.*Name an older checkpoint, or use --resume auto"
    ) as caught:
        run(config, resume=newest(directory))
    assert caught.value.exit_code == 5
    with pytest.warns(UserWarning, match="incomplete checkpoint, resuming from step-8.*step-12"):
        run(config, resume="auto")
    assert run_bytes(directory) == run_bytes(finished)


def test_when_no_checkpoint_is_complete(broken_off):
    config, directory = broken_off
    for step in (4, 8, 12):
        truncate(directory / "checkpoints" / f"step-{step}")
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete.*--overwrite"):
        run(config, resume="auto")


def test_a_checkpoint_that_is_not_there(broken_off):
    config, directory = broken_off
    with pytest.raises(
        CheckpointError, match=r"step-5: no such folder. --resume takes `auto`, a run directory"
    ):
        run(config, resume=directory / "checkpoints" / "step-5")


# ---- 12: a flipped bit


def test_one_flipped_bit(broken_off):
    config, directory = broken_off
    folder = newest(directory)
    draw = random.Random(0)
    for path in sorted(path for path in folder.iterdir() if path.name != "README.md"):
        original = path.read_bytes()
        damaged = bytearray(original)
        # Not the last two bytes: a manifest without its end is an incomplete one.
        damaged[draw.randrange(len(damaged) - 2)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        for resume in ("auto", folder):
            with pytest.raises(
                CheckpointError, match=f"{path.name}.*(changed since it was written|sha256)"
            ) as caught:
                run(config, resume=resume)
            assert caught.value.exit_code == 5
        path.write_bytes(original)
    Committed(folder).verify()


# ---- 13: state is missing


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("optimizer.pt", "optimizer"),
        ("scheduler.pt", "scheduler"),
        ("rng_state.pth", "RNG"),
        ("sampler.json", "sampler"),
        ("progress_0.json", "progress"),
    ],
)
def test_missing_state(broken_off, name, what):
    config, directory = broken_off
    (newest(directory) / name).unlink()
    for resume in ("auto", newest(directory)):
        with pytest.raises(
            CheckpointError, match=rf"{name} \({what} state\) missing.*--allow-inexact-resume"
        ) as caught:
            run(config, resume=resume)
        assert caught.value.exit_code == 5
    with pytest.warns(UserWarning, match=rf"inexact resume from step-12: {name}"):
        assert run(config, resume="auto", allow_inexact_resume=True).steps == 16


# ---- 14, 15: another run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training__learning_rate": 0.02}, "training.learning_rate: 0.01 in the checkpoint, 0.02 now"),
        ({"training__epochs": 3}, "training.epochs: 2.0 in the checkpoint, 3.0 now"),
        ({"training__batch_size": 4}, "training.batch_size: 8 in the checkpoint, 4 now"),
        ({"adapter__r": 8}, "adapter.r: 4 in the checkpoint, 8 now"),
        ({"adapter__num_experts": 3}, "adapter.num_experts: 2 in the checkpoint, 3 now"),
        ({"adapter__target_modules": ["q_proj"]}, "adapter.target_modules"),
        ({"seed": 2}, "seed: 1 in the checkpoint, 2 now"),
        ({"mixing__strategy": "uniform"}, "mixing.strategy: proportional in the checkpoint, uniform now"),
        ({"prompt__cutoff": 20}, "prompt.cutoff: 24 in the checkpoint, 20 now"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(broken_off, make_config, overrides, message):
    _, directory = broken_off
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    changed = make_config(**{"training__keep_checkpoints": 9, "split__validation": 0.1, **overrides})
    with pytest.raises(CheckpointError, match=message) as caught:
        run(changed, resume="auto")
    assert caught.value.exit_code == 5
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_what_changes_no_weight_may_change(broken_off, make_config, finished):
    _, directory = broken_off
    changed = make_config(
        training__keep_checkpoints=1, split__validation=0.1, training__save_steps=5, evaluation__batch_size=3,
        training__threads=1,
    )  # fmt: skip
    run(changed, resume="auto")
    weights = "adapter/adapter_model.safetensors"
    assert (directory / weights).read_bytes() == (finished / weights).read_bytes()


def test_the_same_step_may_be_split_otherwise_when_inexact(broken_off, make_config):
    split = make_config(
        training__keep_checkpoints=9,
        split__validation=0.1,
        training__batch_size=4,
        training__gradient_accumulation=2,
    )
    with pytest.raises(CheckpointError, match=r"training\.batch_size"):
        run(split, resume="auto")
    assert run(split, resume="auto", allow_inexact_resume=True).steps == 16


def test_changed_data_is_refused(broken_off, rows, tmp_path, make_config):
    _, _ = broken_off
    changed = tmp_path / "rows.jsonl"
    lines = (rows / "rev.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps({**row, "output": row["output"][::-1] + "a"})
    changed.write_text("\n".join(lines) + "\n")
    config = make_config(training__keep_checkpoints=9, split__validation=0.1)
    tasks = [task.model_copy() for task in config.tasks]
    tasks[1] = tasks[1].model_copy(
        update={"train": tasks[1].train.model_copy(update={"source": str(changed)})}
    )
    with pytest.raises(CheckpointError) as caught:
        run(config.model_copy(update={"tasks": tasks}), resume="auto")
    assert "data of rev.train: sha256" in str(caught.value)
    assert "data of up" not in str(caught.value)


def test_another_base_is_refused(broken_off, tmp_path, make_config):
    from helpers.tiny_base import build_base

    other = build_base(tmp_path / "other", seed=9)
    config = make_config(training__keep_checkpoints=9, split__validation=0.1, model__path=str(other))
    with pytest.raises(CheckpointError, match=r"base model: .* then, .*other .* now"):
        run(config, resume="auto")


@pytest.mark.parametrize("same", [True, False])
def test_a_checkpoint_of_0_1_is_recognized(same, broken_off, tiny_base):
    """Sixteen digits of a sample of the base, no braidlora.json, and a recipe without the keys that came later."""
    from braidlora.config import ModelSection
    from braidlora.models.base import load_base
    from braidlora.models.old_fingerprints import sampled_fingerprint

    config, directory = broken_off
    folder = newest(directory)
    base, _ = load_base(ModelSection(path=str(tiny_base)))
    identity = json.loads((folder / "identity.json").read_text())
    old = sampled_fingerprint(base) if same else "0" * 16
    identity["base"] = {"path": "the base", "fingerprint": old}
    del identity["config"]["adapter"]["target_parameters"]
    del identity["config"]["evaluation"]
    (folder / "identity.json").write_text(json.dumps(identity))
    (folder / "braidlora.json").unlink()
    rewrite_manifest(folder)
    if same:
        assert run(config, resume="auto").steps == 16
    else:
        with pytest.raises(CheckpointError, match=r"base model: the base \(0000000000000000\) then"):
            run(config, resume="auto")


def test_a_key_that_came_later_counts_where_it_is_set(broken_off):
    config, directory = broken_off
    folder = newest(directory)
    identity = json.loads((folder / "identity.json").read_text())
    assert identity["config"]["training"].pop("batch_size") != 16, "or it would be the default"
    (folder / "identity.json").write_text(json.dumps(identity))
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"training\.batch_size: nothing in the checkpoint, \d+ now"):
        run(config, resume="auto")


def test_the_same_base_may_have_moved(broken_off, tmp_path, make_config, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "moved")
    config = make_config(
        training__keep_checkpoints=9, split__validation=0.1, model__path=str(tmp_path / "moved")
    )
    assert run(config, resume="auto").steps == 16


def test_a_checkpoint_with_other_modules_is_refused(broken_off):
    from safetensors.torch import load_file, save_file

    config, directory = broken_off
    folder = newest(directory)
    state = load_file(folder / "adapter_model.safetensors")
    state["base_model.model.extra.braidlora_A.weight"] = torch.zeros(1)
    save_file(state, folder / "adapter_model.safetensors")
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"1 unexpected: base_model\.model\.extra\.braidlora_A\.weight"):
        run(config, resume="auto")


def test_other_versions_and_threads_are_told(broken_off):
    config, directory = broken_off
    folder = newest(directory)
    identity = json.loads((folder / "identity.json").read_text())
    identity["environment"]["versions"]["torch"] = "1.0"
    identity["environment"]["threads"] = 64
    (folder / "identity.json").write_text(json.dumps(identity))
    rewrite_manifest(folder)
    with pytest.warns(UserWarning, match="may not be bit-exact: torch was 1.0, is .*threads was 64, is 1"):
        run(config, resume="auto")


def test_another_number_of_processes_is_refused(broken_off, monkeypatch):
    config, _ = broken_off
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="saved by 1 processes, resumed by 2"):
        run(config, resume="auto")


def test_another_row_order_is_refused(broken_off, monkeypatch):
    from braidlora.tasks import MixingSampler

    config, _ = broken_off
    drawn = MixingSampler.drawn
    monkeypatch.setattr(MixingSampler, "drawn", lambda self, epoch: drawn(self, epoch)[::-1])
    with pytest.raises(CheckpointError, match="in a different order"):
        run(config, resume="auto")


# ---- 8: pickles


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_that_would_run_code_is_refused(broken_off, tmp_path, name):
    config, directory = broken_off
    folder = newest(directory)
    torch.save({"state": Evil(tmp_path / "ran")}, folder / name)
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=f"{name}: rejected"):
        run(config, resume="auto")
    (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=f"{name}: rejected"):
        run(config, resume="auto")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_adapter_in_a_checkpoint_is_refused(broken_off):
    config, directory = broken_off
    folder = newest(directory)
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match="has its weights as a pickle"):
        run(config, resume="auto")


# ---- what stands in the run directory


def test_an_earlier_run_is_not_lost_by_accident(broken_off, finished):
    config, _ = broken_off
    before = run_bytes(finished)
    at_finished = config.model_copy(update={"output": str(finished)})
    with pytest.raises(CheckpointError, match="already has a finished run"):
        run(at_finished)
    with pytest.raises(CheckpointError, match="already has a run at step 12"):
        run(config)
    with pytest.raises(ConfigError, match="cannot be combined"):
        run(at_finished, resume="auto", overwrite=True)
    assert run_bytes(finished) == before


def test_overwrite_with_a_bad_recipe_loses_nothing(broken_off, tmp_path, make_config):
    _, directory = broken_off
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for bad in (
        {"adapter__target_modules": ["nothing"]},
        {"model__path": "./nowhere"},
        {"training__optimizer": "x"},
    ):
        with pytest.raises(BraidloraError):
            run(make_config(**bad), overwrite=True)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_overwrite_starts_over(broken_off, make_config):
    _, directory = broken_off
    (directory / "notes.txt").write_text("mine")
    run(make_config(training__max_steps=3), overwrite=True)
    assert [path.name for path in directory.glob("checkpoints/*")] == ["step-3"]
    assert (directory / "notes.txt").read_text() == "mine"


def test_pruning_keeps_newest_best_and_the_first_after_warm_up(make_config, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    evaluate = MultiTaskTrainer.evaluate

    def scripted(self, *args, **kwargs):
        return {**evaluate(self, *args, **kwargs), "eval_loss": next(losses)}

    monkeypatch.setattr(MultiTaskTrainer, "evaluate", scripted)
    config = make_config(
        training__save_steps=2, training__eval_steps=2, training__load_best=True, split__validation=0.2,
        training__keep_checkpoints=2, training__warmup_steps=3,
    )  # fmt: skip
    run(config)
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == [4, 6, 12, 14]  # after warm-up; best; the last two
    best = (tmp_path / "run" / "checkpoints" / "step-6" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == best


# ---- 17: signals


def stop_in_step(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal in the middle of a step: after its first backward pass."""
    original = MultiTaskTrainer.training_step

    def signalled(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if self.state.global_step == step - 1 and not self.stop.signal_number:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(MultiTaskTrainer, "training_step", signalled)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_leaves(make_config, tmp_path, monkeypatch, number, code):
    config = make_config(training__gradient_accumulation=2)
    before = signal.getsignal(number)
    stop_in_step(monkeypatch, 3, number)
    with pytest.raises(Interrupted, match=r"stopped after step 3, which is saved.*--resume auto") as caught:
        run(config)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")] == ["step-3"]
    Committed(tmp_path / "run" / "checkpoints" / "step-3").verify()


def test_a_second_signal_leaves_at_once(make_config, tmp_path, monkeypatch):
    original = MultiTaskTrainer.training_step

    def twice(self, *args, **kwargs):
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MultiTaskTrainer, "training_step", twice)
    with pytest.raises(Interrupted, match="stopped at once by SIGINT"):
        run(make_config())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-4"]


def test_sigterm_sent_twice_still_saves(make_config, tmp_path, monkeypatch):
    """As a process pool does: it ends its other workers once the first has left."""
    original = MultiTaskTrainer.training_step

    def twice(self, *args, **kwargs):
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MultiTaskTrainer, "training_step", twice)
    with pytest.raises(Interrupted, match="stopped after step 6, which is saved"):
        run(make_config())
    assert (tmp_path / "run" / "checkpoints" / "step-6").is_dir()


def test_a_signal_while_evaluating_loses_no_answer(make_config, tmp_path, monkeypatch):
    import braidlora.evaluation.run as evaluation

    original = evaluation.record

    def signalled(*args):
        if args[0].name == "rev":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "record", signalled)
        with pytest.raises(Interrupted) as caught:
            run(make_config())
    assert caught.value.exit_code == 143
    assert (tmp_path / "run" / "predictions" / "up.jsonl").is_file()
    assert not (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.setattr(MultiTaskTrainer, "training_step", lambda *args: pytest.fail("a step was made"))
    assert set(run(make_config(), resume="auto").metrics["tasks"]) == {"up", "rev", "len"}


# ---- inside a save


def test_a_failing_commit_leaves_the_checkpoint_before(make_config, tmp_path, monkeypatch):
    calls = []
    commit = checkpointing.finish_directory

    def second_fails(staging, target):
        calls.append(target.name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        commit(staging, target)

    monkeypatch.setattr(checkpointing, "finish_directory", second_fails)
    with pytest.raises(BraidloraError, match=r"step-8: could not be saved: .*No space left.*Intact: step-4"):
        run(make_config())
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-4"]
