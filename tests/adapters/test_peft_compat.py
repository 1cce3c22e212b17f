"""What braidlora uses of PEFT, torch and transformers beyond their public names is listed, and is there."""

import ast
import importlib
from pathlib import Path

import peft
import pytest
import torch

import braidlora
from braidlora.adapters import _peft_compat as compat
from braidlora.adapters import _torch_state

SOURCE = Path(braidlora.__file__).parent
# class: {member: what for}
MEMBERS = {
    "BaseTuner": {
        "inject_adapter": "extended: ConfigErrors, parameters, an adapter of a name that exists",
        "merge_adapter": "extended: all layers or none",
        "delete_adapter": "extended: the hooks of the balance loss",
        "active_adapters": "read: a layer added for an inactive adapter starts frozen",
        "_prepare_model": "overridden: everything is checked before anything is replaced",
        "_prepare_adapter_config": "extended: target_parameters alone will do",
        "_check_target_module_exists": "called: the modules that are about to be replaced",
        "_create_and_replace": "implemented",
        "_replace_module": "extended: experts",
        "_inject_parameters": "overridden: target_parameters",
        "_unload_and_optionally_merge": "extended: all layers or none",
    },
    "PeftModel": {
        "_enable_peft_forward_hooks": "calls the tuner's of this name: mixed-adapter batches",
    },
    "BaseTunerLayer": {
        "adapter_layer_names": "set: which modules hold adapters",
        "other_param_names": "set: which settings are kept by adapter",
        "active_adapters": "read",
        "disable_adapters": "read",
        "merged": "read",
        "set_adapter": "called when an adapter is added",
        "get_base_layer": "called",
        "_get_available_adapters": "called: experts in a mixed batch",
        "_get_base_layer_device_and_dtype": "overridden: stacked experts",
        "_move_adapter_to_device_of_base_layer": "called when an adapter is added",
    },
    "AuxiliaryTrainingWrapper": {
        "delete_adapter": "called when an adapter is made again",
        "active_adapters": "read as `_active_adapter`, which mixed batches switch",
    },
}
# package: (the first and the last minor version that was checked, {name: what for})
NAMES = {
    "torch": (
        ("2.10", "2.13"),
        {
            "torch._C._functorch.maybe_current_level": "whether torch.func transforms what runs",
            "torch._C._functorch.is_legacy_batchedtensor": "whether gradients are batched (is_grads_batched)",
            "torch.autograd.forward_ad._current_level": "whether forward-mode AD is on",
            "torch.nn.modules.module._has_any_global_hook": "hooks on all modules",
            "torch._C._len_torch_dispatch_stack": "modes that see single operations",
            "torch._C._len_torch_function_stack": "modes that see single functions",
            "torch._C._get_function_stack_at": "which modes these are",
            "torch.utils._device.DeviceContext": "the one mode that looks at no result",
            "torch.autograd.Variable._execution_engine.queue_callback": "a call at the end of backward",
            "torch.Tensor._use_count": "who holds a tensor in C++",
            "torch.Tensor._base": "the tensor that a view belongs to",
            "torch._C._storage_Use_Count": "who holds its memory",
            "torch._C._nn.linear": "a linear layer's product that no patch of torch.nn.functional sees",
        },
    ),
    # Also used: `config._experts_implementation`, and accelerate's `_hf_hook`.
    "transformers": (
        ("5.10", "5.23"),
        {
            "transformers.integrations.moe._grouped_mm": "products by groups of rows, on every device that has them",
            "transformers.integrations.moe.use_experts_implementation": "gives modules the interface below",
        },
    ),
}


@pytest.mark.parametrize("name", compat.NAMES)
def test_the_installed_peft_has_the_name(name):
    assert getattr(compat, name) is not None  # otherwise an ImportError that says what is gone


@pytest.mark.parametrize(("owner", "member"), [(c, m) for c, members in MEMBERS.items() for m in members])
def test_the_installed_peft_has_the_member(owner, member):
    found = getattr(peft, owner, None) or getattr(compat, owner)
    assert hasattr(found, member), compat.missing(f"{owner}.{member}", MEMBERS[owner][member])


def test_a_name_that_is_gone_is_reported_with_its_purpose_and_the_versions(monkeypatch):
    monkeypatch.setitem(compat.NAMES, "_gone", ("peft.utils", "a test"))
    with pytest.raises(
        ImportError, match=r"has no peft\.utils\._gone, which braidlora needs \(a test\).*0\.21 to 0\."
    ):
        from braidlora.adapters._peft_compat import _gone  # noqa: F401


def test_nothing_else_imports_from_inside_peft():
    """Elsewhere only what `peft` itself exports: `from peft import X`, `peft.X`."""
    public = {name for name in dir(peft) if not name.startswith("_")} & {*peft.__all__}
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name == "_peft_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "peft":
                names = [alias.name for alias in node.names] if node.module == "peft" else [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith("peft.")]
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "peft"
            ):
                names = [node.attr]
            found += [f"{path.relative_to(SOURCE)}: {name}" for name in names if name not in public]
    assert not found, f"list these in adapters/_peft_compat.py and import them from there: {found}"


@pytest.mark.parametrize("package", NAMES)
def test_the_installed_torch_and_transformers_have_the_names(package):
    checked, names = NAMES[package]
    for name, purpose in names.items():
        _, *rest = name.split(".")
        found = importlib.import_module(package)
        for depth, part in enumerate(rest, 1):
            if not hasattr(found, part):
                try:
                    importlib.import_module(".".join([package, *rest[:depth]]))
                except ImportError:
                    version = importlib.import_module(package).__version__
                    pytest.fail(f"{package} {version} has no {name} ({purpose}); checked: {checked}")
            found = getattr(found, part)


def test_modules_have_their_hooks_where_we_look():
    linear = torch.nn.Linear(2, 2)
    assert not _torch_state.has_hooks(linear.__dict__)
    for register in (
        linear.register_forward_hook,
        linear.register_forward_pre_hook,
        linear.register_full_backward_hook,
        linear.register_full_backward_pre_hook,
    ):
        handle = register(lambda *args: None)
        assert _torch_state.has_hooks(linear.__dict__)
        handle.remove()
