"""Steps of decoding: what a layer keeps between them is right, never older than its weights, and nobody else's."""

import copy
import io
import pickle

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from tiny import IDS, adapted, config, layers, llama, logits
from torch import nn
from torch.nn.utils import parametrize
from two_layers import METHODS, H, K, expected, formula, trained
from two_layers import adapted as two_layers

from braidlora import MultiLoraConfig
from braidlora.adapters import _no_grad, rescale_adapter_scale

BOTH = ["B", "factored"]
LLAMA = ["multi", "factored"]


def step_of(*shape, dtype=torch.float64):
    torch.manual_seed(3)
    return torch.randn(*(shape or (3, 1)), K, dtype=dtype)


def kept_layer(method="B", **settings):
    """A layer that has done two steps of decoding, the second with what it kept of the first."""
    layer = two_layers(method, **settings).eval().first
    assert_right(layer)
    assert len(layer._kept) == 1
    return layer


def assert_right(layer, tolerance=1e-9, dtype=torch.float64):
    """Two steps give what the formula gives for the weights of now."""
    x = step_of(dtype=dtype)
    with torch.no_grad():
        right = formula(layer, x)
        for _ in range(2):
            torch.testing.assert_close(layer(x), right, atol=tolerance, rtol=tolerance)


# ---- values


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (2, 5), (4,), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_values(method, context, tokens):
    net, x = two_layers(method).eval(), step_of(*tokens)
    right = expected(net, x).detach()
    with context():
        for _ in range(3):
            torch.testing.assert_close(net(x), right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "settings", [{"router_temperature": 0.3}, {"num_experts": 1}, {"balance_loss": 0.1}], ids=str
)
@pytest.mark.parametrize("share", ["B", "A", "none"])
def test_settings(share, settings):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, H)).double()
    settings = {"share": share, "num_experts": 3, **settings}
    net = get_peft_model(
        base, MultiLoraConfig(r=4, target_modules=["0"], init_weights=False, **settings)
    ).double()
    net.eval()
    for x in (step_of(), step_of(1, 1), step_of(2, 4)):
        right = net(x).detach()  # with gradients
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(net(x), right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_a_16_bit_base_is_rounded_once(method, dtype):
    """As near to the float64 result as its dtype allows: the adapter computes in float32 on a CPU."""
    net = two_layers(method).eval().to(dtype)
    for linear in net.modules():
        if isinstance(linear, nn.Linear):
            linear.requires_grad_(False)
    layer = net.first
    wide = copy.deepcopy(layer).double()
    for shape in ((1, 1), (3, 1)):
        x = step_of(*shape, dtype=dtype)
        with torch.no_grad():
            base = layer.base_layer(x)
            right = base.double() + (formula(wide, x.double()) - wide.base_layer(x.double()))
            for _ in range(2):
                y = layer(x)
                assert y.dtype == dtype
                torch.testing.assert_close(y.double(), right, atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", BOTH)
def test_nothing_else_is_changed(method):
    """Neither the input nor a result that a hook on the base layer keeps."""
    layer, seen = two_layers(method).eval().first, []
    layer.base_layer.register_forward_hook(lambda module, inputs, y: seen.append((y, y.clone())))
    for x in (step_of(), step_of(2, 5)):
        before = x.clone()
        with torch.no_grad():
            layer(x)
        assert torch.equal(x, before)
    assert all(torch.equal(kept, then) for kept, then in seen)


# ---- nothing stale


def write_in_place(layer):
    with torch.no_grad():
        for linear in layer.linears("default"):
            linear.weight.mul_(1.5)


def write_elsewhere(layer):
    for linear in layer.linears("default"):
        linear.weight.data = linear.weight.data * 1.5


def write_elsewhere_twice(layer):
    """The second time possibly to the place of the first tensors, which are free by then."""
    for linear in layer.linears("default"):
        linear.weight.data = linear.weight.data + 0.5
    for linear in layer.linears("default"):
        linear.weight.data = linear.weight.data * 0.5


def replace_parameters(layer):
    for linear in layer.linears("default"):
        linear.weight = nn.Parameter(linear.weight.detach() * 1.5)


def replace_modules(layer):
    for name in layer.adapter_layer_names:
        if "default" not in getattr(layer, name):
            continue
        new = copy.deepcopy(getattr(layer, name)["default"])
        with torch.no_grad():
            new.weight.mul_(1.5)
        getattr(layer, name)["default"] = new


def load_state_dict(layer):
    layer.load_state_dict({name: 1.5 * tensor for name, tensor in layer.state_dict().items()})


def assign_state_dict(layer):
    layer.load_state_dict({name: 1.5 * tensor for name, tensor in layer.state_dict().items()}, assign=True)


def one_step_of(make, layer):
    optimizer = make([p for p in layer.parameters() if p.requires_grad])
    layer(step_of(2, 3)).square().sum().backward()
    optimizer.step()


def write_unseen_while_training(layer):
    """Writes that no counter sees, as those of 8-bit optimizers, between `train` and `eval`."""
    layer.train()
    for linear in layer.linears("default"):
        linear.weight.data.mul_(1.5)
    layer.eval()


def write_unseen_before_a_prompt(layer):
    for linear in layer.linears("default"):
        linear.weight.data.mul_(1.5)
    with torch.no_grad():
        layer(step_of(2, 5))


CHANGES = [
    write_in_place, write_elsewhere, write_elsewhere_twice, replace_parameters, replace_modules, load_state_dict,
    assign_state_dict, write_unseen_while_training, write_unseen_before_a_prompt,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_changed_weights(method, change):
    layer = kept_layer(method)
    with torch.no_grad():
        before = layer(step_of())
    change(layer)
    with torch.no_grad():
        assert not torch.allclose(layer(step_of()), before)
    assert_right(layer)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    # The default of the transformers Trainer. It does not count its writes.
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", BOTH)
def test_optimizers(method, optimizer, mode):
    layer = kept_layer(method)
    layer.train(mode == "train")
    one_step_of(OPTIMIZERS[optimizer], layer)
    layer.eval()
    assert_right(layer)


@pytest.mark.parametrize("method", BOTH)
def test_scaling(method):
    layer = kept_layer(method)
    for change in (
        lambda: layer.scaling.update(default=0.7),
        lambda: layer.set_scale("default", 3.0),
        lambda: layer.scale_layer(0.5),
        lambda: layer.unscale_layer(),
    ):
        change()
        assert_right(layer)
    with rescale_adapter_scale(nn.ModuleList([layer]), 0.25):
        assert_right(layer)
    assert_right(layer)


@pytest.mark.parametrize("method", BOTH)
def test_dtype_and_device(method):
    layer = kept_layer(method)
    layer.float()
    assert not len(layer._kept)
    assert_right(layer, 1e-4, torch.float32)
    layer.double()
    assert_right(layer, 1e-5)
    with torch.no_grad():
        shapes = copy.deepcopy(layer).to("meta")(step_of().to("meta"))
    assert shapes.shape == (3, 1, H)


def test_another_batch_size():
    layer = kept_layer()
    for batch in (1, 3, 1, 5):
        x = step_of(batch, 1)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), formula(layer, x))


def test_inputs_of_another_dtype():
    """Autocast: the base computes in 16 bits, and the adapter too."""
    layer = two_layers().float().eval().first
    x = step_of(dtype=torch.float32)
    with torch.no_grad():
        right = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                y = layer(x)
                assert y.dtype == torch.bfloat16
                torch.testing.assert_close(y.float(), right, atol=0.1, rtol=0.02)
        assert torch.equal(layer(x), right)


def test_autocast_of_another_device():
    layer = kept_layer()
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert_right(layer)
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_weights_made_in_inference_mode_are_not_kept():
    """They have no version counter."""
    with torch.inference_mode():
        layer = two_layers().eval().first
        x = step_of()
        torch.testing.assert_close(layer(x), formula(layer, x))
        layer.linears("default")[0].weight.mul_(1.5)
        torch.testing.assert_close(layer(x), formula(layer, x))
        assert not len(layer._kept)


@pytest.mark.parametrize("method", BOTH)
def test_hooks_and_wrappers_of_the_matrices_are_called(method):
    layer = kept_layer(method)
    A = layer.linears("default")[0]
    calls = []
    handle = A.register_forward_hook(lambda module, inputs, output: calls.append(1))
    assert_right(layer)
    assert len(calls) == 2
    handle.remove()

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    before = A.weight.detach().clone()
    parametrize.register_parametrization(A, "weight", Half())
    torch.testing.assert_close(A.weight, before / 2)
    assert_right(layer)
    parametrize.remove_parametrizations(A, "weight", leave_parametrized=True)
    assert_right(layer)
    own = A.forward
    A.forward = lambda x: calls.append(2) or own(x)
    assert_right(layer)
    assert calls[2:] == [2, 2]


def test_functional_call():
    layer, x = kept_layer(), step_of()
    other = {name: 1.5 * p.detach() for name, p in layer.named_parameters() if "braidlora" in name}
    with torch.no_grad():
        before = layer(x)
        swapped = torch.func.functional_call(layer, other, (x,))
        assert not torch.allclose(swapped, before)
        assert torch.equal(layer(x), before)


def test_the_switch():
    layer, made = kept_layer(), []
    layer.fused["default"] = False
    layer._delta = lambda x, name, of=layer._delta: made.append(1) or of(x, name)
    assert_right(layer)
    assert len(made) == 2


def test_under_a_mode_nothing_is_kept():
    """What a mode returns may be no ordinary tensor, and a counter of operations must see all of them."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = two_layers().eval().first
    with FlopCounterMode(display=False), torch.no_grad():
        layer(step_of())
    assert not len(layer._kept)


# ---- copies


@pytest.mark.parametrize("method", BOTH)
def test_copies_keep_nothing(method):
    layer = kept_layer(method)
    names = set(layer.state_dict())
    assert names == set(two_layers(method).first.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    assert len(layer._kept) == 1
    for one in copies:
        assert not len(one._kept)
        write_in_place(one)
        assert_right(one)
    assert_right(layer)


# ---- adapters


@pytest.mark.parametrize("tuner", LLAMA)
def test_adapters(tuner):
    """set_adapter, add_adapter, load of the same name, delete_adapter, disable_adapter."""
    model = adapted(tuner)

    def decoded():
        return last_logits(model)

    first = decoded()
    model.add_adapter("other", config(tuner, r=2))
    model.double().eval()
    assert torch.equal(decoded(), first)
    model.set_adapter("other")
    other = decoded()
    assert not torch.allclose(other, first)
    torch.testing.assert_close(other, logits(model)[:, -1])
    with model.disable_adapter():
        base = decoded()
        torch.testing.assert_close(base, logits(llama().double().eval())[:, -1])
    assert torch.equal(decoded(), other)
    model.set_adapter("default")
    assert torch.equal(decoded(), first)
    model.set_adapter("other")
    model.delete_adapter("other")
    model.set_adapter("default")
    assert all("other" not in layer._kept._entries for layer in layers(model))
    model.add_adapter("other", config(tuner, r=3))
    model.double().eval().set_adapter("other")
    assert not torch.allclose(decoded(), other)
    torch.testing.assert_close(decoded(), logits(model)[:, -1])


@pytest.mark.parametrize("settings", [("multi", {"num_experts": 1}), ("factored", {})], ids=str)
def test_merge_and_unmerge(settings):
    tuner, more = settings
    model = adapted(tuner, **more)
    first = last_logits(model)
    model.merge_adapter()
    torch.testing.assert_close(last_logits(model), first)
    model.unmerge_adapter()
    torch.testing.assert_close(last_logits(model), first)
    with model.disable_adapter():
        torch.testing.assert_close(last_logits(model), logits(llama().double().eval())[:, -1])


@pytest.mark.parametrize("tuner", LLAMA)
def test_two_active_adapters(tuner):
    model = adapted(tuner)
    model.add_adapter("other", config(tuner, r=2))
    model.double().eval().base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(last_logits(model), logits(model)[:, -1])


@pytest.mark.parametrize("tuner", LLAMA)
def test_mixed_batches(tuner):
    model = adapted(tuner)
    model.add_adapter("other", config(tuner, r=2))
    model.double().eval()
    ids = IDS[:1].repeat(3, 1)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "other", "__base__"], **settings)
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        assert torch.equal(mixed[row : row + 1], model.generate(input_ids=ids[:1], **settings))
    with model.disable_adapter():
        assert torch.equal(mixed[2:], model.generate(input_ids=ids[:1], **settings))
    write_in_place(layers(model)[0])
    mixed = model.generate(input_ids=ids, adapter_names=["default"] * 3, **settings)
    model.set_adapter("default")
    assert torch.equal(mixed, model.generate(input_ids=ids, **settings))


# ---- whole models


def last_logits(model, ids=IDS):
    """Logits (B, V) of the last token, decoded token by token after the first two."""
    with torch.no_grad():
        result = model(input_ids=ids[:, :2], use_cache=True)
        for i in range(2, ids.shape[1]):
            result = model(
                input_ids=ids[:, i : i + 1], past_key_values=result.past_key_values, use_cache=True
            )
        return result.logits[:, -1]


@pytest.mark.parametrize("tuner", LLAMA)
def test_the_matrices_are_made_twice_per_answer(tuner, monkeypatch):
    """For the prompt and for the first step, whatever the number of new tokens is."""
    model, made = adapted(tuner), []
    for layer in layers(model):
        of = layer._multipliers
        monkeypatch.setattr(layer, "_multipliers", lambda *a, of=of: made.append(1) or of(*a))
    torch.testing.assert_close(last_logits(model), logits(model)[:, -1])
    made.clear()
    for _ in range(2):
        model.generate(input_ids=IDS, max_new_tokens=9, min_new_tokens=9)
    assert len(made) == 2 * 2 * len(layers(model))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"cache_implementation": "static"}, {}], ids=str)
@pytest.mark.parametrize("tuner", LLAMA)
def test_generate(tuner, settings):
    model = adapted(tuner)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **settings}
    fast = model.generate(input_ids=IDS, **settings)
    for layer in layers(model):
        layer.fused["default"] = False
    assert torch.equal(fast, model.generate(input_ids=IDS, **settings))


@pytest.mark.parametrize("method", METHODS)
def test_compiled_in_one_graph(method):
    net = two_layers(method).eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for x in (step_of(), step_of(2, 5)):
        right = expected(net, x).detach()
        with torch.no_grad():
            net(x)
            torch.testing.assert_close(compiled(x), right, atol=1e-9, rtol=1e-9)
            write_in_place(net.first)
            torch.testing.assert_close(compiled(x), expected(net, x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tuner", LLAMA)
def test_training_and_decoding_in_turn(tuner):
    model = adapted(tuner)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    before = last_logits(model)
    for _ in range(3):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        now = last_logits(model)
        assert not torch.allclose(now, before)
        torch.testing.assert_close(now, logits(model)[:, -1])
        before = now


@pytest.mark.parametrize("tuner", LLAMA)
def test_a_saved_adapter_has_no_more_than_before(tuner, tmp_path):
    model = adapted(tuner)
    names = set(get_peft_model_state_dict(model))
    last_logits(model)
    assert set(get_peft_model_state_dict(model)) == names
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "adapter_model.safetensors")) == names


@pytest.mark.parametrize("tuner", LLAMA)
def test_offloading(tuner):
    """accelerate puts weights in place for a call, and takes them away after it."""
    accelerate = pytest.importorskip("accelerate")
    model = adapted(tuner)
    right = last_logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(last_logits(model), right)
    torch.testing.assert_close(last_logits(model), right)


@pytest.fixture
def one_process():
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", BOTH)
def test_fully_sharded(method, one_process):
    """FSDP gathers new values into the same parameter without counting that as a change."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = two_layers(method).eval()
    mesh = init_device_mesh("cpu", (1,))
    plain = copy.deepcopy(net)
    fully_shard(net, mesh=mesh)
    x = step_of()
    for _ in range(2):
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(net(x), expected(plain, x), atol=1e-9, rtol=1e-9)
            net.reshard()  # the root keeps its gathered parameters after a forward
            for sharded, full in zip(net.parameters(), plain.parameters(), strict=True):
                if full.requires_grad:
                    sharded.to_local().data.mul_(1.5)
                    full.mul_(1.5)
    assert not len(net.first._kept)


# ---- what is asked of torch


def test_version_counters_do_not_see_fused_optimizers():
    """If this fails, torch has changed, and fewer reasons to drop what is kept would do."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    before = parameter._version
    torch.optim.AdamW([parameter], fused=True).step()
    assert parameter._version == before
    parameter.data = torch.zeros(3)
    assert parameter._version == before


def test_a_kept_alias_holds_the_place_in_memory():
    layer = kept_layer()
    A = layer.linears("default")[0]
    (source,) = [s for s in layer._kept._entries["default"].sources if s.linear is A]
    place = A.weight.data_ptr()
    A.weight.data = torch.zeros_like(A.weight)
    assert source.memory.data_ptr() == place
    assert not source.is_unchanged()


def test_streams_and_captures_exist_only_on_cuda():
    x = torch.zeros(1)
    assert _no_grad.stream_of(x) == 0
    assert not _no_grad.is_capturing(x)
    assert not trained(kept_layer())[0].is_cuda
