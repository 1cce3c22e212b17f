"""Gates by task and uniform gates, and the map per task, against their formulas in float64."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from braidlora import MultiLoraConfig
from braidlora.adapters import for_tasks, multi_to_lora
from braidlora.adapters.sharing import SCHEMES
from braidlora.errors import ConfigError, MergeError

K, D, R, N = 12, 10, 3, 4
TASKS = ["one", "two", "three"]
MAP = {"task_map": True}
FORMS = [
    {"gate": "task"},
    {"gate": "task", **MAP},
    {"gate": "uniform"},
    {"gate": "uniform", **MAP},
    {"gate": "token", **MAP},
]


def adapted(share="A", experts=N, **settings):
    torch.manual_seed(0)
    config = MultiLoraConfig(
        share=share, num_experts=experts, r=R, lora_alpha=6, target_modules=["layer"], init_weights=False,
        router_temperature=0.7, task_names=TASKS, **settings,
    )  # fmt: skip
    base = nn.ModuleDict({"layer": nn.Linear(K, D)})
    base.forward = lambda x: base["layer"](x)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    for name, parameter in model.named_parameters():
        if "braidlora" in name:
            nn.init.normal_(parameter)
    return model


def layer_of(model):
    return model.base_model.model["layer"]


def dense(model, x, task):
    """W0 x + s Σᵢ wᵢ Bᵢ Λ_t Aᵢ x for one token x (k,)."""
    layer = layer_of(model)
    gate = layer.gate["default"]
    A, B = layer.braidlora_A["default"].weight, layer.braidlora_B["default"].weight
    n = gate.num_experts
    own = SCHEMES[gate.share].per_expert
    As = A.split(R) if "A" in own else [A] * n
    Bs = B.split(R, 1) if "B" in own else [B] * n
    kind = layer.task_gate["default"].gate
    if n == 1 or kind == "uniform":
        w = torch.full((n,), 1 / n, dtype=torch.float64)
    elif kind == "task":
        w = torch.softmax(layer.braidlora_router["default"].weight[:, task] / 0.7, 0)
    else:
        w = torch.softmax(layer.braidlora_router["default"].weight @ x / 0.7, 0)
    L = torch.eye(R, dtype=torch.float64)
    if "default" in layer.braidlora_map:
        L = layer.braidlora_map["default"].weight[task * R : (task + 1) * R]
    return layer.base_layer(x) + 2.0 * sum(w[i] * Bs[i] @ L @ As[i] @ x for i in range(n))


@pytest.mark.parametrize("settings", FORMS, ids=str)
@pytest.mark.parametrize("share", SCHEMES)
def test_formula_with_a_task_per_row_per_token_and_for_all(share, settings):
    model = adapted(share, **settings)
    x = torch.randn(4, 5, K, dtype=torch.float64)
    rows = torch.tensor([2, 0, 1, 2])
    tokens = torch.randint(0, 3, (4, 5))
    one = torch.full((4, 5), 1)
    for given, task_BL in ((rows, rows[:, None].expand(4, 5)), (tokens, tokens), ("two", one), (1, one),
                           (["three", "one", "two", "three"], rows[:, None].expand(4, 5))):  # fmt: skip
        got = model(x, tasks=given)
        for b in range(4):
            for i in range(5):
                wanted = dense(model, x[b, i], int(task_BL[b, i]))
                torch.testing.assert_close(got[b, i], wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize("share", SCHEMES)
def test_one_expert_with_a_map(share):
    model = adapted(share, experts=1, task_map=True)
    x = torch.randn(2, K, dtype=torch.float64)
    got = model(x, tasks=torch.tensor([1, 2]))
    for b, task in enumerate((1, 2)):
        torch.testing.assert_close(got[b], dense(model, x[b], task), atol=1e-11, rtol=0)


def test_mtl_lora_counts_and_starts_as_published():
    """rk + ndr + Tr² + Tn per layer; Λ = I and B = 0, so that it starts as the base."""
    config = MultiLoraConfig.mtl_lora(TASKS, target_modules=["layer"], r=R)
    base = nn.ModuleDict({"layer": nn.Linear(K, D)})
    base.forward = lambda x: base["layer"](x)
    model = get_peft_model(base, config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == R * K + 3 * D * R + 3 * R * R + 3 * 3
    layer = layer_of(model)
    assert torch.equal(layer.braidlora_map["default"].weight, torch.eye(R).repeat(3, 1))
    assert not layer.braidlora_B["default"].weight.any()
    V = layer.braidlora_router["default"].weight
    assert V.shape == (3, 3)
    assert V.abs().max() <= 1 / math.sqrt(3)
    x = torch.randn(2, K)
    torch.testing.assert_close(model(x, tasks="one"), layer.base_layer(x))
    layer.braidlora_B["default"].weight.data.normal_()
    model(x, tasks=torch.tensor([0, 2])).square().sum().backward()
    gradient = layer.braidlora_map["default"].weight.grad.unflatten(0, (3, R))
    assert gradient[0].any()
    assert gradient[2].any()
    assert not gradient[1].any(), "a task without rows has no gradient"


@pytest.mark.parametrize("settings", FORMS[:4], ids=str)
@pytest.mark.parametrize("share", SCHEMES)
def test_the_plain_lora_of_a_task_is_the_layer(share, settings):
    model = adapted(share, **settings)
    state = get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    x = torch.randn(7, K, dtype=torch.float64)
    for number, name in enumerate(TASKS):
        tensors, lora = multi_to_lora(state, config, task=name)
        A, B = (tensors[f"base_model.model.layer.lora_{f}.weight"] for f in "AB")
        s = lora.lora_alpha / lora.r
        wanted = layer_of(model).base_layer(x) + s * x @ A.T @ B.T
        torch.testing.assert_close(model(x, tasks=number), wanted, atol=1e-11, rtol=0)
    if config.by_task:
        with pytest.raises(ConfigError, match="different LoRA for each of its tasks: one, two, three"):
            multi_to_lora(state, config)


def test_a_uniform_gate_merges_and_a_gate_by_task_does_not():
    x = torch.randn(7, K, dtype=torch.float64)
    for share in SCHEMES:
        model = adapted(share, gate="uniform")
        before = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), before, atol=1e-11, rtol=0)
    with pytest.raises(MergeError, match="export --static-weights=task=NAME"):
        adapted(gate="task").merge_adapter()


@pytest.mark.parametrize("how", ["transformers", "none"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(how, reentrant):
    """The recomputed forward sees the tasks of its own pass, whatever pass came after it."""
    from braidlora.adapters import _tasks

    model = adapted(gate="task", task_map=True)
    model.train()
    x = [torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ids = [torch.tensor([0, 1]), torch.tensor([2, 2])]

    def gradients(call):
        model.zero_grad()
        losses = [call(one, tasks).square().sum() for one, tasks in zip(x, ids, strict=True)]
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    wanted = gradients(lambda one, tasks: model(one, tasks=tasks))
    layer = layer_of(model)
    if how == "transformers":
        again = _tasks._Carrying(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
        inner = layer

        def call(one, tasks):
            with for_tasks(tasks):
                return again(inner, one)

        for one, other in zip(gradients(call), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
        return

    def forgetful(one, tasks):
        with for_tasks(tasks):
            return checkpoint(layer, one, use_reentrant=reentrant)

    with pytest.raises(ConfigError, match="was given no task"):
        gradients(forgetful)


def test_rows_are_repeated_for_beams_and_nothing_else_is_guessed():
    model = adapted(gate="task").eval()
    x = torch.randn(6, 1, K, dtype=torch.float64)
    got = model(x, tasks=torch.tensor([0, 2]))
    for b in range(6):
        torch.testing.assert_close(got[b, 0], dense(model, x[b, 0], [0, 2][b // 3]), atol=1e-11, rtol=0)
    for tasks, says in [
        (torch.tensor([0, 1, 2, 0]), "tasks has 4 rows"),
        (torch.tensor([0, 1, 3, 0, 0, 0]), "numbered from 0 to 2: one, two, three"),
        ("four", "not trained on task 'four'"),
        (torch.zeros(6, 2, dtype=torch.int64), r"a task per token"),
    ]:
        with pytest.raises(ConfigError, match=says):
            model(x, tasks=tasks)
    with pytest.raises(ConfigError, match="rows cannot be distinguished"):
        model(x.flatten(0, 1), tasks=torch.tensor([0, 2]))
    with pytest.raises(ConfigError, match=r"given no task.*one, two, three"):
        model(x)


def test_saved_and_loaded(tmp_path):
    model = adapted(gate="task", task_map=True)
    model.save_pretrained(tmp_path)
    base = nn.ModuleDict({"layer": nn.Linear(K, D)})
    base.forward = lambda x: base["layer"](x)
    base["layer"].load_state_dict(layer_of(model).base_layer.state_dict())
    loaded = PeftModel.from_pretrained(base.double(), tmp_path, autocast_adapter_dtype=False)
    x = torch.randn(3, K, dtype=torch.float64)
    for task in TASKS:
        torch.testing.assert_close(loaded(x, tasks=task), model(x, tasks=task), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gate": "sequence"}, "must be one of 'token', 'task', 'uniform'"),
        ({"gate": "task"}, "gate='task' needs task_names"),
        ({"task_map": True}, "task_map=True needs task_names"),
        ({"gate": "task", "task_names": ["a", "a"]}, "list of different names"),
        ({"gate": "uniform", "balance_loss": 0.1}, "nothing to balance"),
        ({"alignment_loss": -1.0}, "0 \\(off\\) or more"),
        ({"alignment": "cosine"}, "'mmd' or 'kl'"),
        ({"gate": "uniform", "target_parameters": ["experts.down_proj"]}, "rows cannot be distinguished"),
    ],
)
def test_what_cannot_be(settings, says):
    with pytest.raises(ConfigError, match=says):
        MultiLoraConfig(**settings)


@pytest.mark.parametrize("settings", FORMS, ids=str)
@pytest.mark.parametrize("share", SCHEMES)
def test_without_gradients_a_prompt_and_a_step_are_the_formula(share, settings):
    """The forward that decoding takes keeps matrices of a layer, which these gates do not have."""
    model = adapted(share, **settings).eval()
    x = torch.randn(2, 5, K, dtype=torch.float64)
    with torch.no_grad():
        for part in (x, x[:, :1], x[:, 1:2]):
            got = model(part, tasks=torch.tensor([2, 0]))
            for b, task in enumerate((2, 0)):
                torch.testing.assert_close(got[b, -1], dense(model, part[b, -1], task), atol=1e-11, rtol=0)
