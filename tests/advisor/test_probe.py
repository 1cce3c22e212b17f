"""The probe's numbers against rows run one by one in float64, and its LoRAs against each other."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from braidlora.advisor import probe
from braidlora.advisor.cost import ProbePlan
from braidlora.advisor.probe import run_probe, training_rows
from braidlora.analysis.batches import task_batches
from braidlora.analysis.study import plain_lora
from braidlora.tasks import load_tasks

PLAN = ProbePlan(steps=4, batch_size=4, gradient_rows=6, rows=100, comparison_rows=10_000)
FACTORS = ("lora_A", "lora_B")


def lora_recipe(make_config, **overrides):
    config = make_config(**overrides)
    return config.model_copy(update={"adapter": plain_lora(config.adapter)})


def cosine(one, other):
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def test_numbers_are_those_of_single_rows_in_float64(make_config, monkeypatch):
    """With LoRAs drawn at random instead of trained, so that the average is known."""
    config, drawn, kept = lora_recipe(make_config), {}, {}

    def draw(loaded, task, plan):
        kept["loaded"] = loaded
        generator = torch.Generator().manual_seed(len(drawn))
        tensors = {}
        for name, parameter in loaded.model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                tensors[name] = parameter.detach().double().numpy().copy()
        drawn[task.name] = tensors
        return 1.0

    monkeypatch.setattr(probe, "_train", draw)
    found = run_probe(config, load_tasks(config), PLAN, progress=False)
    loaded = kept["loaded"]
    model = loaded.model.double()
    named = {name: one for name, one in model.named_parameters() if any(factor in name for factor in FACTORS)}
    tasks = task_batches(loaded, PLAN.gradient_rows, ("train",))
    names = list(drawn)

    # at the average of the LoRAs
    for name, parameter in named.items():
        mean = np.mean([drawn[task][name] for task in names], axis=0)
        np.testing.assert_allclose(parameter.detach().numpy(), mean, atol=1e-7)

    # ΔW, and the column spaces of B
    layers = sorted({name.split(".lora_")[0] for name in named})
    updates = [
        np.concatenate([
            (drawn[task][f"{layer}.lora_B.default.weight"] @ drawn[task][f"{layer}.lora_A.default.weight"]).ravel()
            for layer in layers
        ])
        for task in names
    ]  # fmt: skip
    for t, u in itertools.product(range(3), repeat=2):
        assert found.updates[t][u] == pytest.approx(cosine(updates[t], updates[u]), abs=1e-6)
        spaces = [
            np.mean([
                np.linalg.norm(np.linalg.qr(drawn[names[t]][f"{layer}.lora_B.default.weight"])[0].T
                               @ np.linalg.qr(drawn[names[u]][f"{layer}.lora_B.default.weight"])[0]) ** 2 / 4
                for layer in layers
            ])
        ]  # fmt: skip
        assert found.columns[0][t][u] == pytest.approx(spaces[0], abs=1e-6)

    # gradients, and A x, from rows without padding
    gradients, moments = [], []
    for task in tasks:
        halves, sums = [], []
        for batches in task.halves:
            total = {name: torch.zeros_like(one) for name, one in named.items()}
            seen = dict.fromkeys(layers, 0.0)
            for batch in batches:
                for ids, mask, labels in zip(
                    batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
                ):
                    ids, labels = ids[mask.bool()][None], labels[mask.bool()][None]
                    inputs = {}
                    handles = [
                        model.get_submodule(f"{layer}.lora_A.default").register_forward_hook(
                            lambda module, given, z, layer=layer, inputs=inputs: inputs.update({layer: z[0]})
                        )
                        for layer in layers
                    ]
                    loss = model(input_ids=ids, labels=labels).loss * int((labels[:, 1:] != -100).sum())
                    for handle in handles:
                        handle.remove()
                    grads = torch.autograd.grad(loss, list(named.values()))
                    for name, grad in zip(named, grads, strict=True):
                        total[name] += grad
                    for layer, z in inputs.items():
                        seen[layer] = seen[layer] + (z.T @ z).detach()
            halves.append(total)
            sums.append(seen)
        gradients.append(halves)
        moments.append(sums)
    for letter, factor in zip("AB", FACTORS, strict=True):
        of = [name for name in named if factor in name]
        parts = [
            [torch.cat([half[name].flatten() for name in of]).numpy() for half in halves]
            for halves in gradients
        ]
        section = found.gradients["factors"][letter]
        for t, u in itertools.product(range(3), repeat=2):
            expected = cosine(*parts[t]) if t == u else cosine(sum(parts[t]), sum(parts[u]))
            assert section["cosine"][t][u] == pytest.approx(expected, abs=1e-4)
            if t != u:
                signs = sum(np.sign(one @ other) for one in parts[t] for other in parts[u])
                assert section["signs"][t][u] == signs
    for t, u in itertools.product(range(3), repeat=2):
        by_layer = []
        for layer in layers:
            (one, other), (third, fourth) = ([half[layer] for half in moments[at]] for at in (t, u))
            pair = (one, other) if t == u else (one + other, third + fourth)
            by_layer.append(cosine(*(matrix.numpy().ravel() for matrix in pair)))
        assert found.inputs[t][u] == pytest.approx(np.mean(by_layer), abs=1e-5)


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_every_task_starts_from_the_same_adapter_and_moves(kind, make_config, monkeypatch):
    """A classifier's head starts over too."""
    config, starts, ends = lora_recipe(make_config, kind=kind), [], []
    train = probe._train

    def watched(loaded, task, plan):
        slots = {name: one for name, one in loaded.model.named_parameters() if one.requires_grad}
        starts.append({name: one.detach().clone() for name, one in slots.items()})
        loss = train(loaded, task, plan)
        ends.append({name: one.detach().clone() for name, one in slots.items()})
        return loss

    monkeypatch.setattr(probe, "_train", watched)
    found = run_probe(config, load_tasks(config), PLAN, progress=False)
    assert found.tasks == ["up", "rev", "len"]
    assert all(np.isfinite(loss) and loss > 0 for loss in found.losses.values())
    for start in starts[1:]:
        assert all(torch.equal(start[name], starts[0][name]) for name in start)
    assert all(not start[name].any() for start in starts for name in start if "lora_B" in name)
    assert all(end[name].any() for end in ends for name in end if "lora_B" in name)
    assert not torch.equal(*(next(v for n, v in end.items() if "lora_B" in n) for end in ends[:2]))
    assert found.columns is not None
    assert 0.0 < found.columns[1] < found.columns[0][0][1] <= 1.0


def test_a_probe_is_the_same_again(make_config):
    config = lora_recipe(make_config)
    one, again = (run_probe(config, load_tasks(config), PLAN, progress=False) for _ in range(2))
    assert (one.updates, one.inputs, one.gradients) == (again.updates, again.inputs, again.gradients)


def test_rows_that_are_measured_are_not_trained_on(make_config):
    config = lora_recipe(make_config)
    tasks = {task.name: task for task in load_tasks(config)}
    measured = probe.drawn_rows(tasks["up"], "train", PLAN.gradient_rows, config.seed)
    trained = training_rows(tasks["up"], PLAN, config.seed)
    assert len(trained) == 16
    assert trained == training_rows(tasks["up"], PLAN, config.seed)
    assert trained != training_rows(tasks["up"], PLAN, config.seed + 1)
    assert not any(row in measured for row in trained)
    wide = ProbePlan(steps=4, batch_size=10, gradient_rows=12, rows=1, comparison_rows=1)
    assert len(training_rows(tasks["len"], wide, config.seed)) == len(
        tasks["len"].train
    )  # there are no others


def test_a_sorted_file_gives_the_probe_all_its_labels(make_config):
    [task, *_] = load_tasks(lora_recipe(make_config))
    halves = [{"text": f"{label} {row}", "label": label} for label in ("neg", "pos") for row in range(200)]
    trained = training_rows(replace(task, train=halves), PLAN, seed=0)
    assert {row["label"] for row in trained} == {"neg", "pos"}
