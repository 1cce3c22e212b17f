"""The layer under everything that may hold, count, recompute or rewrite its tensors: values, gradients, witnesses.

The fused path writes over the base layer's result and over the gradient that arrives for x where it is alone with
them. Whoever else holds them must find them as they were.
"""

import contextlib
import sys
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from two_layers import METHODS, RARE, H, K, adapted, assert_right, expected, formula, gradients, loss_of

from braidlora.adapters import _torch_state

aten = torch.ops.aten


class Witnesses:
    """Tensors as an observer holds them, and what they were when it got them."""

    def __init__(self):
        self.seen = []

    def keep(self, value):
        for tensor in torch.utils._pytree.tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                with torch.utils._python_dispatch._disable_current_modes():
                    self.seen.append((tensor, tensor.detach().clone()))
        return value

    def note(self, value):
        """`keep` as a hook: what a hook returns would replace what it sees."""
        self.keep(value)

    def assert_unchanged(self):
        assert self.seen
        for tensor, before in self.seen:
            assert torch.equal(tensor.detach(), before)


SHAPES = {"2-D": (6,), "3-D": (3, 5)}  # of 3-D input a linear layer's result is a view


@pytest.fixture(params=[pytest.param("2-D", marks=RARE), "3-D"])
def x(request):
    return input_of(request.param)


def input_of(shape):
    torch.manual_seed(1)
    return torch.randn(*SHAPES[shape], K, dtype=torch.float64)


def save(*operators):
    return partial(create_selective_checkpoint_contexts, list(operators))


def policy(answer):
    return partial(create_selective_checkpoint_contexts, lambda context, operator, *args, **kwargs: answer)


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "saves mm": {"use_reentrant": False, "context_fn": save(aten.mm.default)},
    "saves addmm": {"use_reentrant": False, "context_fn": save(aten.addmm.default)},
    "saves both and views": {
        "use_reentrant": False, "context_fn": save(aten.mm.default, aten.addmm.default, aten.view.default)
    },
    "must save": {"use_reentrant": False, "context_fn": policy(CheckpointPolicy.MUST_SAVE)},
    "must recompute": {"use_reentrant": False, "context_fn": policy(CheckpointPolicy.MUST_RECOMPUTE)},
}  # fmt: skip


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_checkpoints(method, how, fused, x):
    net = adapted(method, fused=fused)
    assert_right(lambda x: checkpoint(net, x.requires_grad_(), **CHECKPOINTS[how]), net, x)


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_a_checkpoint_around_each_layer(how, x):
    net = adapted()

    def run(x):
        h = checkpoint(net.first, x.requires_grad_(), **CHECKPOINTS[how])
        return checkpoint(net.second, nn.functional.gelu(h), **CHECKPOINTS[how])

    assert_right(run, net, x)


class Recorder(TorchDispatchMode):
    """Keeps every result of every operation, forward and backward."""

    def __init__(self, witnesses):
        super().__init__()
        self.witnesses = witnesses

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable and not func.is_view and "empty" not in func.__name__:
            self.witnesses.keep(result)
        return result


class FunctionRecorder(TorchFunctionMode):
    def __init__(self, witnesses):
        super().__init__()
        self.witnesses = witnesses

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return self.witnesses.keep(result) if func is nn.functional.linear else result


@contextlib.contextmanager
def everywhere(*registrations):
    handles = [register(hook) for register, hook in registrations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keepers(w):
    """Observers that keep what they see, by name."""
    return {
        "dispatch mode": lambda: Recorder(w),
        "function mode": lambda: FunctionRecorder(w),
        "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(w.keep, lambda t: t),
        "forward hooks on all modules": lambda: everywhere(
            (hooks.register_module_forward_hook, lambda m, i, o: w.note((i, o)))
        ),
        "pre-hooks on all modules": lambda: everywhere(
            (hooks.register_module_forward_pre_hook, lambda m, i: w.note(i))
        ),
        "backward hooks on all modules": lambda: everywhere(
            (hooks.register_module_full_backward_hook, lambda m, gi, go: w.note((gi, go))),
            (hooks.register_module_full_backward_pre_hook, lambda m, go: w.note(go)),
        ),
    }


@pytest.mark.parametrize("who", keepers(None))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["B", "factored"])
def test_whoever_keeps_what_it_sees_finds_it_unchanged(method, shape, who):
    net, witnesses, x = adapted(method), Witnesses(), input_of(shape)
    wanted = gradients(lambda x: expected(net, x), net, x)
    with keepers(witnesses)[who]():
        ours = gradients(net, net, x)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    witnesses.assert_unchanged()


@pytest.mark.parametrize(
    "mode",
    [
        lambda: FlopCounterMode(display=False),
        torch.autograd.graph.save_on_cpu,
        torch.autograd.detect_anomaly,
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
        lambda: torch.device("cpu"),
        torch.autograd.graph.allow_mutation_on_saved_tensors,
        lambda: torch.autograd.profiler.profile(use_cpu=True),
    ],
    ids=["flops", "save_on_cpu", "anomaly", "no saved hooks", "default device", "mutation allowed", "profiler"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("method", ["B", "factored"])
def test_modes_that_change_nothing(method, mode, x):
    net = adapted(method)
    with mode():
        assert_right(net, net, x)


def test_hooks_on_the_base_layer_alone(x):
    net, witnesses = adapted(), Witnesses()
    net.first.base_layer.register_forward_pre_hook(lambda m, i: witnesses.note(i))
    net.first.base_layer.register_forward_hook(lambda m, i, o: witnesses.note(o))
    net.second.base_layer.register_full_backward_hook(lambda m, gi, go: witnesses.note((gi, go)))
    net.second.base_layer.register_full_backward_pre_hook(lambda m, go: witnesses.note(go))
    assert_right(net, net, x)
    witnesses.assert_unchanged()


def nodes_of(y):
    """Every node of y's graph."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("method", ["B", "factored"])
def test_hooks_on_the_graph_that_keep_gradients(method, x):
    net, witnesses = adapted(method), Witnesses()
    wanted = gradients(lambda x: expected(net, x), net, x)

    def run(x):
        y = net(x)
        for node in nodes_of(y):
            node.register_hook(lambda gi, go: witnesses.note((gi, go)))
            node.register_prehook(lambda go: witnesses.note(go))
        return y

    for a, b in zip(gradients(run, net, x), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    witnesses.assert_unchanged()


@pytest.mark.parametrize("method", METHODS)
def test_two_passes_over_one_graph(method, x):
    net = adapted(method)
    x = x.requires_grad_()
    loss = loss_of(net(x))
    inputs = [x, *(p for p in net.parameters() if p.requires_grad)]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs)
    right = torch.autograd.grad(loss_of(expected(net, x)), inputs)
    for a, b, c, d in zip(first, copies, second, right, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=0, rtol=0)
        torch.testing.assert_close(a, d, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["B", "factored"])
def test_one_gradient_for_two_branches(method, x):
    """What arrives for a layer's result arrives elsewhere too: the layer must not write into it."""
    net = adapted(method)
    x = x.requires_grad_()
    skip = torch.randn(*x.shape[:-1], H, dtype=torch.float64, requires_grad=True)
    y = net.first(x) + skip
    upstream = torch.randn_like(y)
    kept = upstream.clone()
    y.backward(upstream)
    assert torch.equal(upstream, kept)
    assert torch.equal(skip.grad, kept)
    right = torch.autograd.grad(formula(net.first, x), x, kept)[0]
    torch.testing.assert_close(x.grad, right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["B", "factored"])
def test_compiled_functionalized_and_traced(method, x):
    net = adapted(method)
    torch._dynamo.reset()
    assert_right(torch.compile(net, backend="aot_eager"), net, x)
    assert_right(lambda x: torch.func.functionalize(net)(x), net, x)
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(net)(x)
        for _ in range(2):
            torch.testing.assert_close(traced(x), expected(net, x), atol=1e-9, rtol=1e-9)


def test_make_fx_of_the_gradient(x):
    from torch.fx.experimental.proxy_tensor import make_fx

    net = adapted()

    def gradient(x):
        return torch.autograd.grad(loss_of(net(x)), x)[0]

    traced = make_fx(gradient)(x.requires_grad_())
    right = torch.autograd.grad(loss_of(expected(net, x)), x)[0]
    torch.testing.assert_close(traced(x), right, atol=1e-9, rtol=1e-9)


def test_backward_inside_autocast_keeps_the_precision_of_forward():
    """Forward outside and backward inside: what ran in float32 is differentiated in float32."""
    net = adapted().float()
    x = torch.randn(6, K, requires_grad=True)
    y = net.first(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(y, [net.first.braidlora_B["default"].weight], torch.ones_like(y))[0]
    right = torch.autograd.grad(
        formula(net.first, x), [net.first.braidlora_B["default"].weight], torch.ones(6, H)
    )[0]
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["B", "factored"])
def test_a_base_layer_that_returns_what_it_keeps(method, x):
    """By a class of its own, by a forward of its own, and by a function in place of torch's."""
    net = adapted(method)
    base = net.first.base_layer
    kept = {}

    def forward(x):
        if x.shape not in kept:
            kept[x.shape] = nn.functional.linear(x.detach(), base.weight, base.bias)
        return kept[x.shape]

    class Cached(nn.Linear):
        def forward(self, x):
            return forward(x)

    right = formula(net.first, x).detach()
    base.forward = forward
    for _ in range(3):
        torch.testing.assert_close(net.first(x), right, atol=1e-9, rtol=1e-9)
    del base.forward
    base.__class__ = Cached
    for _ in range(3):
        torch.testing.assert_close(net.first(x), right, atol=1e-9, rtol=1e-9)


def test_a_linear_function_that_returns_what_it_keeps(x, monkeypatch):
    net = adapted()
    right, base = formula(net.first, x).detach(), net.first.base_layer
    kept = nn.functional.linear(x, base.weight, base.bias)
    before = kept.clone()
    for held in (kept, kept.detach(), kept.view(-1)):
        monkeypatch.setattr(nn.functional, "linear", lambda x, w, b, held=held: held.view_as(kept))
        torch.testing.assert_close(net.first(x), right, atol=1e-9, rtol=1e-9)
        assert torch.equal(kept, before)


def test_training_after_inference_mode(x):
    net = adapted()
    with torch.inference_mode():
        inferred = net.eval()(x)
    net.train()
    assert_right(net, net, x)
    torch.testing.assert_close(inferred.clone(), expected(net, x), atol=1e-9, rtol=1e-9)


class TestAlone:
    """The rule itself: a fresh result is alone, and any second holder is noticed."""

    @pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 2, 2, 3), (0, 3)])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("grad", [True, False])
    def test_a_fresh_result_is_alone(self, shape, bias, grad):
        layer = nn.Linear(3, 2, bias=bias).requires_grad_(False)
        y = layer(torch.ones(shape, requires_grad=grad))
        alone = _torch_state.is_alone(y, _torch_state.fresh_in_forward())
        assert alone or len(shape) == 1  # a vector's result may be seen through several views

    @pytest.mark.parametrize(
        "hold",
        [
            lambda y: y, lambda y: [y], lambda y: y.detach(), lambda y: y.view(-1), lambda y: y[:1], lambda y: y._base,
            lambda y: y.untyped_storage(), lambda y: y.detach().numpy(), lambda y: y.data,
            lambda y: y.requires_grad_().sin(), lambda y: (lambda: y), lambda y: torch.utils.dlpack.to_dlpack(y),
            weakref.ref,
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
    def test_any_holder_is_noticed(self, hold, shape):
        y = nn.functional.linear(torch.ones(shape), torch.ones(2, 3), torch.ones(2))
        held = hold(y)
        if held is None:
            pytest.skip("not a view")
        assert not _torch_state.is_alone(y, _torch_state.fresh_in_forward())
        del held

    def test_layers_write_in_place_where_they_are_alone(self, monkeypatch):
        """Else all of the above would pass for a layer that never does."""
        from braidlora.adapters import _fused

        calls = []
        apply = _fused.Expand.apply
        monkeypatch.setattr(_fused.Expand, "apply", lambda *a: calls.append(a[5]) or apply(*a))
        for method in METHODS:
            net = adapted(method)
            for layer in (net.first, net.second):  # as where the base layer is no plain product
                layer._forward_in_one = lambda *a: None
            for shape in ((6, K), (3, 5, K)):
                net(torch.randn(shape, dtype=torch.float64, requires_grad=True))
        assert calls == [True] * len(calls)
        assert len(calls) == 16

    @pytest.mark.parametrize("watch", ["patched linear", "debugger", "profiler", "autocast"])
    def test_what_is_fresh_is_not_learned_from_results_that_are_held(self, watch, monkeypatch):
        """A patch that keeps every result, or a debugger that copies local variables, as the first layer is run."""
        questions = (_torch_state.fresh_in_forward, _torch_state.fresh_in_backward)
        right = [question() for question in questions]
        for question in questions:
            question.cache_clear()
        monkeypatch.setattr(_torch_state._Probe, "counts", [])
        linear, kept, before = nn.functional.linear, [], sys.gettrace()

        def watching(frame, event, argument):
            frame.f_locals  # noqa: B018
            return watching

        place = {
            "profiler": lambda: torch.profiler.profile(with_stack=True),
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        }.get(watch, contextlib.nullcontext)
        if watch == "debugger":
            sys.settrace(watching)
        if watch == "patched linear":
            monkeypatch.setattr(nn.functional, "linear", lambda *a: kept.append(linear(*a)) or kept[-1])
        try:
            with place():
                learned = [question() for question in questions]
            still = sys.gettrace()
        finally:
            sys.settrace(before)
        assert learned == right
        assert still is (watching if watch == "debugger" else before)

    def test_a_patched_linear_that_keeps_its_results(self, x, monkeypatch):
        net, linear, kept = adapted(), nn.functional.linear, []
        _torch_state.fresh_in_forward.cache_clear()
        monkeypatch.setattr(nn.functional, "linear", lambda *a: kept.append(linear(*a)) or kept[-1])
        net.first(x)
        base = net.first.base_layer
        torch.testing.assert_close(kept[-1], linear(x, base.weight, base.bias), atol=1e-9, rtol=1e-9)

    def test_torch_without_these_names_is_served_carefully(self, monkeypatch):
        for question in (_torch_state.fresh_in_forward, _torch_state.fresh_in_backward):
            question.cache_clear()
        with monkeypatch.context() as without:
            without.delattr(torch._C, "_storage_Use_Count")
            without.delattr(hooks, "_has_any_global_hook")
            assert _torch_state.is_observed()
            net = adapted()
            x = torch.randn(3, 5, K, dtype=torch.float64)
            assert_right(net, net, x)
        for question in (_torch_state.fresh_in_forward, _torch_state.fresh_in_backward):
            question.cache_clear()
