"""What braidlora uses of PEFT, torch and transformers beyond their public names is listed, and is there."""

import ast
import importlib
from pathlib import Path

import peft
import pytest
import torch

import braidlora
from braidlora.adapters import _experts, _torch_state
from braidlora.adapters import _peft_compat as compat

SOURCE = Path(braidlora.__file__).parent


@pytest.mark.parametrize("name", compat.NAMES)
def test_the_installed_peft_has_the_name(name):
    assert getattr(compat, name) is not None  # otherwise an ImportError that says what is gone


@pytest.mark.parametrize(
    ("owner", "member"), [(c, m) for c, members in compat.MEMBERS.items() for m in members]
)
def test_the_installed_peft_has_the_member(owner, member):
    found = getattr(peft, owner, None) or getattr(compat, owner)
    assert hasattr(found, member), compat.missing(f"{owner}.{member}", compat.MEMBERS[owner][member])


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


@pytest.mark.parametrize("module", [_torch_state, _experts], ids=["torch", "transformers"])
def test_the_installed_torch_and_transformers_have_the_names(module):
    for name, purpose in module.NAMES.items():
        package, *rest = name.split(".")
        found = importlib.import_module(package)
        for depth, part in enumerate(rest, 1):
            if not hasattr(found, part):
                try:
                    importlib.import_module(".".join([package, *rest[:depth]]))
                except ImportError:
                    version = importlib.import_module(package).__version__
                    pytest.fail(f"{package} {version} has no {name} ({purpose}); checked: {module.CHECKED}")
            found = getattr(found, part)


def test_modules_have_their_hooks_where_we_look():
    linear = torch.nn.Linear(2, 2)
    assert not _torch_state.has_hooks(linear)
    for register in (
        linear.register_forward_hook,
        linear.register_forward_pre_hook,
        linear.register_full_backward_hook,
        linear.register_full_backward_pre_hook,
    ):
        handle = register(lambda *args: None)
        assert _torch_state.has_hooks(linear)
        handle.remove()
