"""`braidlora evaluate` on runs, adapters and bases, and what it refuses."""

import errno
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from evaluation_models import make_model
from safetensors.torch import load_file, save_file

from braidlora import MultiLoraConfig
from braidlora.cli import main
from braidlora.config import dump_config, load_config
from braidlora.errors import CheckpointError, ConfigError, DataError, TrainingError
from braidlora.evaluation.predictions import PredictionFile
from braidlora.evaluation.results import results_directory
from braidlora.evaluation.run import evaluate, evaluate_tasks
from braidlora.evaluation.scoring import majority_scores
from braidlora.models.adapter_reader import load_adapter
from braidlora.models.loading import find, load_for_evaluation
from braidlora.models.old_fingerprints import sampled_fingerprint
from braidlora.runs import RunDirectory, atomic_write_json, commit_directory


def adapted(kind: str = "alora", **options):
    if kind == "lora":
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
    else:
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
        config = MultiLoraConfig(init_weights=False, **options)
    torch.manual_seed(3)
    return peft.get_peft_model(make_model("llama"), config).eval()


@pytest.fixture(params=["alora", "lora"])
def any_adapter(request, tmp_path) -> Path:
    adapted(request.param).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def adapter(tmp_path) -> Path:
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def run_directory(tmp_path, recipe) -> RunDirectory:
    """A finished run as training leaves it, made by hand."""
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(dump_config(load_config(recipe)), encoding="utf-8")
    atomic_write_json(run.environment, {})
    with commit_directory(run.adapter) as staging:
        adapted().save_pretrained(staging)
    atomic_write_json(run.metrics, {"tasks": {}, "seconds": 12.5, "trainable_parameters": 99})
    return run


def test_an_adapter_folder_is_scored_as_the_model_it_was_saved_from(any_adapter, recipe, tmp_path, tokenizer):
    config = load_config(recipe)
    got = evaluate(any_adapter, config, progress=False)
    kind = json.loads((any_adapter / "adapter_config.json").read_text())["peft_type"]
    model, tasks = (
        adapted("lora" if kind == "LORA" else "alora"),
        load_for_evaluation(any_adapter, config).tasks,
    )
    direct = evaluate_tasks(model, tokenizer, tasks, config, tmp_path / "direct", progress=False)
    assert got == {**direct, "majority": majority_scores(tasks)}
    for task in ("sums", "text"):
        file = Path("predictions", f"{task}.jsonl")
        assert (any_adapter / "evaluation" / file).read_bytes() == (tmp_path / "direct" / file).read_bytes()
    assert json.loads((any_adapter / "evaluation" / "metrics.json").read_text()) == got


def test_a_run_brings_its_recipe_and_keeps_its_record(run_directory):
    metrics = evaluate(run_directory.path, progress=False)
    assert (metrics["seconds"], metrics["trainable_parameters"]) == (12.5, 99)
    assert json.loads(run_directory.metrics.read_text()) == metrics
    assert (run_directory.predictions / "sums.jsonl").is_file()
    before = run_directory.metrics.read_bytes()
    other = evaluate(run_directory.path, overrides=["tasks.sums.test.limit=3"], progress=False)
    assert other["tasks"]["sums"]["n"] == 3
    assert run_directory.metrics.read_bytes() == before
    assert len(list(run_directory.path.glob("evaluations/*/metrics.json"))) == 1


def test_an_adapter_inside_a_run_takes_the_runs_recipe(run_directory):
    checkpoint = run_directory.checkpoint(5)
    shutil.copytree(run_directory.adapter, checkpoint)
    before = run_directory.metrics.read_bytes()
    assert (
        evaluate(checkpoint, progress=False)["tasks"]
        == evaluate(run_directory.adapter, progress=False)["tasks"]
    )
    assert run_directory.metrics.read_bytes() == before
    assert (checkpoint / "evaluation" / "metrics.json").is_file()


def test_a_base_model_is_scored_without_an_adapter(base_folder, recipe, tmp_path, tokenizer):
    config = load_config(recipe)
    metrics = evaluate(base_folder, config, progress=False)
    tasks = load_for_evaluation(base_folder, config).tasks
    direct = evaluate_tasks(make_model("llama"), tokenizer, tasks, config, tmp_path / "x", progress=False)
    assert metrics == {**direct, "majority": majority_scores(tasks)}
    assert (tmp_path / "run-base" / "metrics.json").is_file()
    assert RunDirectory.at(tmp_path / "run").state() == "new"


def test_the_command_line_prints_a_table_or_json(adapter, recipe, tmp_path, capsys):
    out = ["--directory", str(tmp_path / "out")]
    assert main(["evaluate", str(adapter), "--recipe", str(recipe), *out]) == 0
    table = capsys.readouterr().out
    assert table.split("\n")[0].split()[:4] == ["task", "metric", "n", "score"]
    assert "Δm% not available: no single-task references were given" in table
    assert main(["evaluate", str(adapter), "--recipe", str(recipe), "--json", *out]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "metrics.json").read_text())


def exit_code(capsys, *arguments) -> tuple[int, str]:
    code = main(["evaluate", *map(str, arguments)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, error


def test_without_a_recipe_the_message_says_so(adapter, capsys):
    code, error = exit_code(capsys, adapter)
    assert code == 2
    assert "has no recipe of its own" in error
    assert "--recipe" in error
    code, error = exit_code(capsys, adapter / "checkpoints" / "step-8")
    assert code == 2
    assert "step-8: no such run, adapter or model" in error


def test_a_folder_of_something_else_is_refused(tmp_path, recipe, capsys):
    (tmp_path / "some").mkdir()
    code, error = exit_code(capsys, tmp_path / "some", "--recipe", recipe)
    assert code == 2
    assert "no run (config.yaml), no adapter (adapter_config.json) and no base model (config.json)" in error


def test_a_pickled_adapter_is_refused(adapter, recipe, capsys):
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    code, error = exit_code(capsys, adapter, "--recipe", recipe)
    assert code == 5
    assert "adapter_model.bin" in error
    assert "safetensors" in error


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.1.self_attn.q_proj.braidlora_B.weight"


def test_missing_and_unexpected_keys_are_listed(adapter):
    edit_weights(
        adapter, lambda weights: weights.update({KEY.replace("layers.1", "layers.7"): weights.pop(KEY)})
    )
    with pytest.raises(CheckpointError) as caught:
        load_adapter(make_model("llama"), adapter)
    assert f"Of 12 tensors 1 missing: {KEY}; 1 unexpected: {KEY.replace('layers.1', 'layers.7')}." in str(
        caught.value
    )
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("field", "value", "part"), [("r", 4, "braidlora_A"), ("num_experts", 5, "braidlora_router")]
)
def test_a_wrong_rank_or_number_of_experts_is_listed(adapter, field, value, part):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(
        CheckpointError, match=rf"with a different shape: .*{part}.* is \(\d+, \d+\), expected \(\d+, \d+\)"
    ):
        load_adapter(make_model("llama"), adapter)


@pytest.mark.parametrize("other", [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_base_is_refused(any_adapter, other):
    with pytest.raises(CheckpointError, match=r"missing|unexpected|with a different shape"):
        load_adapter(make_model("llama", **other), any_adapter)
    with pytest.raises(CheckpointError, match="cannot load this adapter"):
        load_adapter(make_model("gpt2"), any_adapter)


def test_damaged_adapters_are_refused(adapter):
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    for cut in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        (adapter / "adapter_model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            load_adapter(make_model("llama"), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    edit_weights(adapter, lambda weights: weights[KEY].view(-1)[3:4].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=f"{KEY} contains NaN"):
        load_adapter(make_model("llama"), adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"adapter_config\.json is missing"),
        ("{", "not readable as JSON"),
        ("[1]", "has no `peft_type`"),
        ('{"peft_type": "NO_SUCH"}', "which the installed PEFT does not know"),
        ('{"peft_type": "BRAIDLORA", "r": -1}', "cannot load this adapter"),
        ('{"peft_type": "BRAIDLORA", "target_modules": ["no_such"]}', "cannot load this adapter"),
    ],
)
def test_damaged_adapter_configurations_are_refused(adapter, content, message):
    path = adapter / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(make_model("llama"), adapter)


def test_an_adapter_whose_manifest_does_not_match_is_refused(run_directory, capsys):
    weights = run_directory.adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    code, error = exit_code(capsys, run_directory.path)
    assert code == 5
    assert "sha256" in error


def test_a_run_of_0_1_on_another_base_of_the_same_shape_is_refused(run_directory, base_folder, tmp_path):
    checkpoint = run_directory.checkpoint(5)
    base = make_model("llama")
    record = {"base": {"path": "the base", "fingerprint": sampled_fingerprint(base)}}
    with commit_directory(checkpoint) as staging:
        atomic_write_json(staging / "identity.json", record)
    assert evaluate(run_directory.path, progress=False)["mean"] is not None
    with torch.no_grad():
        base.model.embed_tokens.weight += 0.01
    base.save_pretrained(tmp_path / "other")
    shutil.copy(base_folder / "tokenizer.json", tmp_path / "other")
    shutil.copy(base_folder / "tokenizer_config.json", tmp_path / "other")
    with pytest.raises(
        CheckpointError,
        match=r"(?s)trained on a different base model\.\n  base model: the base .*--model\.path",
    ):
        evaluate(run_directory.path, overrides=[f"model.path={tmp_path / 'other'}"], progress=False)


def test_a_full_disk_names_the_remedy(adapter, recipe, monkeypatch):
    def full(self, record):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(PredictionFile, "append", full)
    with pytest.raises(TrainingError, match=r"sums\.jsonl: cannot be written: No space left.*--directory"):
        evaluate(adapter, load_config(recipe), progress=False)


def test_a_run_without_its_adapter_says_how_to_carry_on(run_directory):
    shutil.rmtree(run_directory.adapter)
    with pytest.raises(CheckpointError, match="--resume auto"):
        evaluate(run_directory.path, progress=False)


def test_no_test_rows_at_all_is_a_data_error(adapter, recipe):
    with pytest.raises(DataError, match=r"no test rows in any task \(sums, text\).*split\.test"):
        evaluate(adapter, load_config(recipe, ["tasks.*.test=null"]), progress=False)


def test_a_linked_results_folder_is_refused(adapter, recipe, tmp_path):
    (tmp_path / "outside").mkdir()
    (adapter / "evaluation").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="is a link"):
        evaluate(adapter, load_config(recipe), progress=False)
    assert list((tmp_path / "outside").iterdir()) == []


def test_the_runs_own_recipe_is_what_overrides_apply_to(run_directory):
    found = find(run_directory.path, overrides=["evaluation.batch_size=2"])
    assert found.load().config.evaluation.batch_size == 2
    assert results_directory(found).parent == run_directory.path.resolve() / "evaluations"
    assert yaml.safe_load(run_directory.config.read_text())["evaluation"]["batch_size"] == 4


def test_results_never_stand_among_other_files(run_directory, tmp_path, capsys):
    elsewhere = tmp_path / "thesis"
    elsewhere.mkdir()
    (elsewhere / "chapter.tex").write_text("…")
    assert main(["evaluate", str(run_directory.path), "--directory", str(elsewhere)]) == 2
    assert "chapter.tex" in capsys.readouterr().err
    assert [path.name for path in elsewhere.iterdir()] == ["chapter.tex"]
    assert main(["evaluate", str(run_directory.path), "--directory", str(elsewhere / "chapter.tex")]) == 2
    for _ in range(2):  # a free folder, and one with earlier results
        assert main(["evaluate", str(run_directory.path), "--directory", str(tmp_path / "free")]) == 0
