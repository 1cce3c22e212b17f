"""What one step is: losses, accumulation, rates, precision, and steps that stop on NaN (faults.md 9)."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import PromptTuningConfig, get_peft_model

import braidlora.training.trainer as trainer_module
from braidlora.adapters._balance import balance_scopes
from braidlora.config import ModelSection
from braidlora.errors import ConfigError, TrainingError
from braidlora.models.attach import attach_adapter
from braidlora.models.base import load_base
from braidlora.one_run import train
from braidlora.tasks import Collator, LabelSpace, MixingSampler, encode_tasks, load_tasks
from braidlora.training.arguments import training_arguments
from braidlora.training.loss import Losses, TaskMeter
from braidlora.training.rates import factor_of
from braidlora.training.trainer import MultiTaskTrainer


def build(config, tmp_path, *, callbacks=()):
    """A trainer over the recipe, without a run directory."""
    tasks = load_tasks(config)
    labels = LabelSpace.of(tasks) if config.kind == "classify" else None
    torch.manual_seed(config.seed)
    base, tokenizer = load_base(config.model, labels)
    rows = encode_tasks(tasks, tokenizer, config.prompt, "train", labels)
    validation = encode_tasks(tasks, tokenizer, config.prompt, "validation", labels)
    rows_per_step = config.training.batch_size * config.training.gradient_accumulation
    sampler = MixingSampler(rows, config.mixing, config.seed, rows_per_step)
    arguments = training_arguments(config, tmp_path, len(sampler))
    arguments.save_strategy = "no"
    collator = Collator(tokenizer.pad_token_id, config.kind, packing=config.prompt.packing, cutoff=24)
    return MultiTaskTrainer(
        attach_adapter(base, config, config.seed), arguments, rows, validation, sampler, collator,
        label_space=labels, multipliers=config.training.rate_multipliers, callbacks=list(callbacks),
    )  # fmt: skip


def log_lines(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def first_step(config, tmp_path):
    """Loss and gradients of the first optimizer step."""
    gradients = {}

    class Keep(trainer_module.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            model = kwargs["model"]
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = build(config, tmp_path, callbacks=[Keep()])
    result = trainer.train()
    return result.training_loss, gradients, trainer.state.log_history[0]


STEP = {
    "adapter__lora_dropout": 0.0, "training__max_steps": 1, "training__warmup_steps": 0, "training__logging_steps": 1,
    "training__max_grad_norm": 0.0, "training__scheduler": "constant",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_eight_by_one_is_one_by_eight(make_config, tmp_path, kind):
    whole = first_step(make_config(kind=kind, training__batch_size=8, **STEP), tmp_path)
    parts = first_step(
        make_config(kind=kind, training__batch_size=1, training__gradient_accumulation=8, **STEP), tmp_path
    )
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    assert set(whole[1]) == set(parts[1])
    for name, gradient in whole[1].items():
        assert torch.allclose(gradient, parts[1][name], rtol=1e-4, atol=1e-6), name
    for key in ("loss", "grad_norm", "loss/up", "loss/rev", "loss/len"):
        assert whole[2][key] == pytest.approx(parts[2][key], rel=1e-4), key


by_row = pytest.mark.skipif(
    not hasattr(trainer_module.modeling_utils, "slice_logits_to_keep"), reason="needs transformers 5.21"
)


@by_row
@pytest.mark.parametrize("packing", [False, True])
def test_logits_are_computed_only_where_there_is_loss(make_config, tmp_path, monkeypatch, packing):
    config = make_config(training__batch_size=8, split__validation=0.2, prompt__packing=packing, **STEP)
    shapes = []

    class Seen(Losses):
        def __init__(self, logits, labels, *rest):
            shapes.append((logits.shape[1], labels.shape[1]))
            super().__init__(logits, labels, *rest)

    monkeypatch.setattr(trainer_module, "Losses", Seen)
    some = first_step(config, tmp_path)
    assert shapes
    assert all(kept < length - 1 for kept, length in shapes), shapes
    monkeypatch.setattr(trainer_module, "_keeps_positions", lambda model: False)
    shapes.clear()
    every = first_step(config, tmp_path)
    assert all(kept == length for kept, length in shapes), shapes
    assert some[0] == pytest.approx(every[0], rel=1e-6)
    for name, gradient in every[1].items():
        assert torch.allclose(gradient, some[1][name], rtol=1e-4, atol=1e-7), name
    for key in ("loss", "grad_norm", "loss/up", "loss/rev", "loss/len"):
        assert some[2][key] == pytest.approx(every[2][key], rel=1e-5), key


@by_row
def test_positions_are_not_asked_of_models_that_cannot_tell(tiny_base, monkeypatch):
    base, _ = load_base(ModelSection(path=str(tiny_base)))
    assert trainer_module._keeps_positions(base)
    prompts = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert not trainer_module._keeps_positions(prompts), "virtual tokens shift the positions"

    class Own(torch.nn.Module):
        def forward(self, input_ids, logits_to_keep=0):
            return input_ids

    assert not trainer_module._keeps_positions(Own()), "what it does with positions is unknown"
    monkeypatch.delattr(trainer_module.modeling_utils, "slice_logits_to_keep")
    assert not trainer_module._keeps_positions(base), "transformers before 5.21"


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize(
    ("kind", "packing"), [("generate", False), ("generate", True), ("classify", False)], ids=str
)
def test_the_balance_loss_counts_once_a_step(make_config, tmp_path, kind, packing, passes, monkeypatch):
    """Every pass weighs as much in it as in the loss: as its targets among the step's."""
    config = make_config(
        kind=kind, prompt__packing=packing, adapter__balance_loss=0.4, training__gradient_accumulation=passes,
        **{**STEP, "training__max_steps": 3},  # of 9 batches an epoch: 4, 4 and 1
    )  # fmt: skip
    trainer = build(config, tmp_path)
    (scope,) = balance_scopes(trainer.model)
    begin, training_step = scope.begin, trainer.training_step
    scales, steps = [], []

    def spied_begin(*noted):
        begin(*noted)
        scales.append(scope._latest.scale.item())

    def spied_step(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            steps.append(len(scales))
        return loss

    monkeypatch.setattr(scope, "begin", spied_begin)
    monkeypatch.setattr(trainer, "training_step", spied_step)
    trainer.train()
    assert len(steps) == 3
    sums = [sum(scales[start:end]) for start, end in zip([0, *steps], steps, strict=False)]
    assert sums == pytest.approx([1.0] * 3, rel=1e-5)
    assert len(scales) > 3 or passes == 1


def test_the_balance_loss_is_in_the_gradients(make_config, tmp_path):
    """Of 8 passes as of one, but for the mean weights, which are taken over the tokens of one pass."""

    def routers(**settings):
        gradients = first_step(make_config(**STEP, **settings), tmp_path)[1]
        return torch.cat([g.flatten() for name, g in gradients.items() if "router" in name])

    whole, parts = (
        {"training__batch_size": 8},
        {"training__batch_size": 1, "training__gradient_accumulation": 8},
    )
    once = routers(**whole, adapter__balance_loss=1.0) - routers(**whole)
    split = routers(**parts, adapter__balance_loss=1.0) - routers(**parts)
    assert once.norm() > 0.0
    assert 0.7 < (split.norm() / once.norm()).item() < 2.0
    assert torch.nn.functional.cosine_similarity(once, split, dim=0) > 0.8


def test_the_last_incomplete_step_of_an_epoch_counts_its_own_tokens(make_config, tmp_path):
    # 72 rows: 9 batches of 8, so steps of 4, 4 and 1 batches.
    config = make_config(training__gradient_accumulation=4, training__epochs=1, training__logging_steps=1)
    trainer = build(config, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert 0.4 * losses[0] < losses[2] < 1.5 * losses[0]  # a quarter of it if divided by four


def test_loss_equals_an_independent_one(make_config, tmp_path):
    trainer = build(make_config(), tmp_path)
    rows = [trainer.train_dataset[index] for index in (0, 1, 40, 60)]
    batch = trainer.data_collator(rows)
    model = trainer.model.eval()
    expected, counts = {}, {}
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
            for at in range(1, len(row["labels"])):
                if row["labels"][at] != -100:
                    loss = -F.log_softmax(logits[at - 1], dim=-1)[row["labels"][at]].item()
                    expected[row["task_id"]] = expected.get(row["task_id"], 0.0) + loss
                    counts[row["task_id"]] = counts.get(row["task_id"], 0) + 1
        total = trainer.compute_loss(model, batch)
        losses, _ = trainer._losses(model, batch)
    meter = TaskMeter(3, "cpu")
    meter.add(losses)
    assert total.item() == pytest.approx(sum(expected.values()) / sum(counts.values()), rel=1e-5)
    read = meter.read(["up", "rev", "len"])
    for task, name in enumerate(("up", "rev", "len")):
        assert read[name] == pytest.approx(expected[task] / counts[task], rel=1e-5)
    assert meter.read(["up", "rev", "len"]) == {}


def test_virtual_tokens_have_no_target(make_config, tmp_path):
    method = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    trainer = build(make_config(adapter={"method": method}), tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 1, 40)])
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, batch)
        pefts = trainer.model(**{key: value for key, value in batch.items() if key != "task_id"}).loss
    assert ours.item() == pytest.approx(pefts.item(), rel=1e-5)


def test_packed_rows_have_the_loss_of_unpacked_ones(make_config, tmp_path):
    plain, packed = (
        first_step(make_config(prompt__packing=packing, prompt__cutoff=64, **STEP), tmp_path)
        for packing in (False, True)
    )
    for key in ("loss", "grad_norm", "loss/up", "loss/rev", "loss/len"):
        assert plain[2][key] == pytest.approx(packed[2][key], rel=1e-4), key


def test_a_class_loss_knows_its_own_task_only():
    space = LabelSpace({"a": ["x", "y"], "b": ["y", "z", "w"]})
    logits = torch.randn(3, 4, requires_grad=True)
    losses = Losses(logits, torch.tensor([0, 3, 1]), torch.tensor([0, 1, 1]), space)
    expected = [
        F.cross_entropy(logits[:1, :2], torch.tensor([0])),
        F.cross_entropy(logits[1:2, 1:], torch.tensor([2])),
        F.cross_entropy(logits[2:, 1:], torch.tensor([0])),
    ]
    assert torch.allclose(losses.values, torch.stack(expected))
    losses.values.sum().backward()
    assert torch.equal(logits.grad[0, 2:], torch.zeros(2))
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("base_model.model.layers.0.q_proj.braidlora_A.default.weight", "A"),
        ("base_model.model.layers.0.q_proj.braidlora_B.default.weight", "B"),
        ("base_model.model.layers.0.q_proj.braidlora_router.default.weight", "router"),
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", "A"),
        ("base_model.model.embed.lora_embedding_B.default", "B"),
        ("base_model.model.score.modules_to_save.default.weight", "other"),
    ],
)
def test_factors(name, factor):
    assert factor_of(name) == factor


def test_rates_are_multiples(make_config, tmp_path):
    config = make_config(
        kind="classify",
        training__rate_multipliers={"A": 0.5, "B": 16.0, "router": 4.0},
        training__weight_decay=0.1,
    )
    trainer = build(config, tmp_path)
    trainer.create_optimizer_and_scheduler(10)
    rates = {group["factor"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"A": 0.005, "B": 0.16, "router": 0.04, "other": 0.01}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1}
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    grouped = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert set(grouped) == trained
    assert len(grouped) == len(trained)
    for _ in range(2):
        trainer.lr_scheduler.step()
    assert trainer._get_learning_rate() == pytest.approx(0.01)  # what is logged is the plain rate, warmed up


def test_a_multiplier_without_its_factor_is_told(make_config, tmp_path):
    config = make_config(adapter__method="lora", training__rate_multipliers={"router": 2.0})
    with pytest.warns(UserWarning, match=r"rate_multipliers\.router is ignored"):
        build(config, tmp_path).create_optimizer()


def test_a_larger_rate_for_b_moves_b_more(make_config, tmp_path):
    def moved(multiplier):
        trainer = build(
            make_config(training__rate_multipliers={"B": multiplier}, training__max_steps=3), tmp_path
        )
        trainer.train()
        return sum(p.norm().item() for n, p in trainer.model.named_parameters() if "braidlora_B" in n)

    assert moved(4.0) > 2 * moved(1.0)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("linear", [0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025]),
        ("constant", [0.01] * 6),
        ("constant_with_warmup", [0.0, 0.005, 0.01, 0.01, 0.01, 0.01]),
        ("cosine", [0.0, 0.005, *(0.005 * (1 + math.cos(math.pi * k / 4)) for k in range(4))]),
    ],
)
def test_schedulers(make_config, tmp_path, scheduler, rates):
    config = make_config(training__scheduler=scheduler, training__max_steps=6, training__logging_steps=1)
    trainer = build(config, tmp_path)
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(rates, abs=1e-9)


def test_a_warm_up_longer_than_the_run_is_told(make_config, tmp_path):
    with pytest.warns(UserWarning, match="warmup_steps is 100, but the run has 18 steps"):
        training_arguments(make_config(training__warmup_steps=100), tmp_path, 72)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training__optimizer": "adamw_torchh"}, "unknown optimizer 'adamw_torchh'; known are adamw"),
        ({"training__report_to": ["wnadb"]}, "unknown tracker 'wnadb'; known are .*wandb"),
        ({"training__precision": "float16"}, "float16 needs a GPU"),
    ],
)
def test_arguments_that_cannot_be(make_config, tmp_path, overrides, message):
    if "training__precision" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where float16 works")
    with pytest.raises(ConfigError, match=message):
        training_arguments(make_config(**overrides), tmp_path, 72)


def test_gradient_checkpointing_changes_nothing(make_config, tmp_path):
    config = make_config(training__gradient_checkpointing=True, **STEP)
    from braidlora.models.base import enable_gradient_checkpointing

    plain = first_step(make_config(**STEP), tmp_path)
    load = trainer_module.MultiTaskTrainer.__init__

    def with_checkpoints(self, model, *args, **kwargs):
        enable_gradient_checkpointing(model.get_base_model())
        load(self, model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.MultiTaskTrainer, "__init__", with_checkpoints)
        recomputed = first_step(config, tmp_path)
    assert plain[0] == recomputed[0]
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name


def test_gradient_checkpointing_computes_every_layer_twice(make_config, monkeypatch):
    from braidlora import MultiLoraLayer

    original, calls = MultiLoraLayer.forward, []

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MultiLoraLayer, "forward", counted)
    steps, layers = 3, 4
    for checkpointing, passes in ((False, 1), (True, 2)):
        calls.clear()
        settings = {"training__max_steps": steps, "training__gradient_checkpointing": checkpointing}
        train(make_config(f"{checkpointing}", **settings), progress=False)
        assert sum(calls) == steps * layers * passes


@pytest.mark.parametrize(
    "overrides",
    [
        {"training__precision": "bfloat16"},
        {"model__dtype": "bfloat16"},
        {"training__gradient_checkpointing": True},
        {"model__quantization": "4bit"},
        {"model__quantization": "8bit"},
        {"adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"}},
        {"adapter": {"method": {"peft_type": "LOHA", "target_modules": ["up_proj", "down_proj", "q_proj"]}}},
        {
            "adapter": {"method": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}},
            "training__learning_rate": 1.0,
        },
        {"adapter": {"method": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [4, 5, 6]}}},
        {"kind": "classify"},
        {"kind": "classify", "adapter__method": "lora"},
        {"training__optimizer": "adafactor"},
        {"mixing__strategy": "uniform"},
        {"training__max_grad_norm": 0.0},
    ],
    ids=lambda overrides: "-".join(f"{key.split('__')[-1]}={value}" for key, value in overrides.items())[:60],
)
def test_loss_falls_and_the_run_ends(make_config, tmp_path, overrides):
    if overrides.get("model__quantization"):
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'braidlora[quant]')")
    result = train(make_config(training__epochs=3, **overrides), progress=False)
    losses = [line["loss"] for line in log_lines(result.directory) if "loss" in line]
    assert losses[-1] < losses[0]
    assert set(result.metrics["tasks"]) == {"up", "rev", "len"}
    assert result.metrics["trainable_parameters"] > 0


# ---- what is not finite


def poison(monkeypatch, at_call, value=math.nan):
    """The `at_call`-th batch has the loss `value` in its second row."""
    original, calls = trainer_module.Losses, []

    class Poisoned(original):
        def __init__(self, *args):
            super().__init__(*args)
            calls.append(1)
            if len(calls) == at_call:
                bad = torch.zeros_like(self.values)
                bad[1] = value
                self.values = self.values + bad

    monkeypatch.setattr(trainer_module, "Losses", Poisoned)


def with_scaler(trainer, scale):
    """The trainer as float16 on CUDA makes it: a loss scaler, whose overflowing steps are skipped."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    return trainer


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_overflow_under_a_loss_scaler_skips_steps_and_is_no_error(make_config, tmp_path, clip):
    config = make_config(training__max_grad_norm=clip, training__logging_steps=1, training__max_steps=20)
    trainer = with_scaler(build(config, tmp_path), 2.0**24)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "loss" in line]
    assert norms[0] is None
    assert all(norm is None or math.isfinite(norm) for norm in norms)
    assert (norms[-1] is not None) == (clip > 0.0)  # unclipped, the Trainer never divides the scale out
    assert trainer.accelerator.scaler.get_scale() < 2.0**24
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    json.dumps(trainer.state.log_history[0], allow_nan=False)  # what log.jsonl does


def test_overflow_without_end_stops_the_run(make_config, tmp_path, monkeypatch):
    config = make_config(training__max_steps=40, training__logging_steps=1)
    trainer = with_scaler(build(config, tmp_path), 2.0**16)
    monkeypatch.setattr(trainer.accelerator.__class__, "optimizer_step_was_skipped", property(lambda _: True))
    with pytest.raises(TrainingError, match=r"step 30: 30 steps in a row .* changed no weights"):
        trainer.train()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_that_step(make_config, tmp_path, monkeypatch, value):
    config = make_config(training__gradient_accumulation=2, training__batch_size=4)
    poison(monkeypatch, 12, value)  # the second batch of step 6
    with pytest.raises(TrainingError) as caught:
        train(config, progress=False)
    assert caught.value.exit_code == 4
    text = str(caught.value)
    assert f"step 6: the loss is {'nan' if math.isnan(value) else 'inf'}" in text
    rows = load_rows_of_batch(config, 11, 4)
    assert f"Batch: encoded rows {rows}. The step was not taken" in text
    assert (tmp_path / "run" / "checkpoints" / "step-4" / "manifest.json").is_file()
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [3]
    monkeypatch.undo()
    assert train(config, resume="auto", progress=False).steps == 18


def test_validation_takes_all_rows_the_longest_first(make_config, tmp_path):
    trainer = build(make_config(split__validation=0.3, training__batch_size=4), tmp_path)
    rows = trainer.eval_dataset
    trainer.args.per_device_eval_batch_size = 4
    batches = list(trainer.get_eval_dataloader())
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(rows.lengths())
    assert sum(len(batch["task_id"]) for batch in batches) == len(rows)


def test_a_validation_loss_that_is_not_finite_stops_the_run(make_config, tmp_path, monkeypatch):
    original = MultiTaskTrainer._losses

    def poisoned(self, model, inputs):
        losses, outputs = original(self, model, inputs)
        if not model.training and self.state.global_step == 8:
            losses.values = losses.values * math.nan
        return losses, outputs

    monkeypatch.setattr(MultiTaskTrainer, "_losses", poisoned)
    with pytest.raises(TrainingError, match=r'step 8: not finite: .*"validation_loss": NaN.*Lower training'):
        train(make_config(split__validation=0.1), progress=False)
    assert (tmp_path / "run" / "checkpoints" / "step-4" / "manifest.json").is_file()
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def load_rows_of_batch(config, batch, size):
    """The rows of one batch as a message names them, worked out from the sampler alone."""
    tasks = load_tasks(config)
    _, tokenizer = load_base(config.model)
    rows = encode_tasks(tasks, tokenizer, config.prompt, "train")
    sampler = MixingSampler(rows, config.mixing, config.seed, size * config.training.gradient_accumulation)
    drawn = sampler.indices(0)[batch * size : (batch + 1) * size]
    first = {0: 0, 1: len(tasks[0].train), 2: len(tasks[0].train) + len(tasks[1].train)}
    named = {}
    for index in drawn:
        named.setdefault(tasks[rows.task_ids[index]].name, []).append(index - first[rows.task_ids[index]])
    return ", ".join(f"{name} {numbers}" for name, numbers in named.items())


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_is_named(make_config, monkeypatch, clip):
    original, calls = MultiTaskTrainer.compute_loss, []

    def with_bad_gradient(self, model, *args, **kwargs):
        if not calls:
            last = "layers.1.self_attn.v_proj.braidlora_B"
            parameter = next(p for name, p in model.named_parameters() if last in name)
            parameter.register_hook(lambda g: g * math.inf if len(calls) == 3 else g)
        calls.append(1)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(MultiTaskTrainer, "compute_loss", with_bad_gradient)
    with pytest.raises(
        TrainingError,
        match=r"step 3: (NaN|Inf) in the gradient of .*layers\.1\.self_attn\.v_proj\.braidlora_B",
    ):
        train(make_config(training__max_grad_norm=clip), progress=False)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_weight_that_is_not_finite_is_named_and_never_saved(make_config, tmp_path, monkeypatch, value):
    original, calls = torch.optim.AdamW.step, []

    def with_bad_weight(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            self.param_groups[1]["params"][2].data[0, 0] = value
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", with_bad_weight)
    kind = "NaN" if math.isnan(value) else "Inf"
    with pytest.raises(
        TrainingError, match=rf"step 5: {kind} in the weight of .*layers\.1.*q_proj\.braidlora_B"
    ):
        train(make_config(training__save_steps=1), progress=False)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-2", "step-3", "step-4"]
    from safetensors.torch import load_file

    for path in (tmp_path / "run").rglob("adapter_model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


def test_a_base_with_nan_is_named(make_config, tmp_path, tiny_base):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TrainingError, match=r"step 1: NaN in the weight of .*layers\.1\.mlp\.up_proj\.weight before it"
    ):
        train(make_config(model__path=str(folder)), progress=False)
