"""The installed transformers has what `_trainer_compat` uses, and what it lacks is named."""

import ast
from pathlib import Path

import pytest
import transformers

import braidlora.training
from braidlora.config import RunConfig, load_config
from braidlora.training._trainer_compat import _METHODS, CHECKED, missing_apis

ROOM = Path(braidlora.training.__file__).parent


def test_the_installed_trainer_has_every_private_api():
    assert missing_apis() == [], (
        f"transformers {transformers.__version__} changed private APIs of Trainer. Adapt training/_trainer_compat.py, "
        "or lower the upper bound of transformers in pyproject.toml."
    )


def test_what_a_trainer_lacks_is_named():
    class Trainer:
        def __init__(self):
            self._total_loss_scalar = 0.0
            self.model_accepts_loss_kwargs = self.callback_handler = None

        def _save(self, output_dir=None):
            return self._save()

        def _get_learning_rate(self):
            return 0.0

    found = "\n".join(missing_apis(Trainer, module=object()))
    assert (
        f"transformers {transformers.__version__}: Trainer._save_checkpoint is gone (checkpoints are" in found
    )
    assert "Trainer._save has no parameter state_dict (a checkpoint holds the adapter alone)" in found
    assert "Trainer never calls _get_learning_rate" in found
    assert "Trainer._tr_loss is gone" in found
    assert "_total_loss_scalar" not in found
    assert "transformers.trainer.OPTIMIZER_NAME is None, expected 'optimizer.pt'" in found
    assert f"checked with {', '.join(CHECKED)}" in found


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_only_the_compat_file_uses_private_names_of_the_trainer(path):
    names = {method.name for method in _METHODS if method.name.startswith("_")}
    names |= {"_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_internal_call"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    assert (used & names == set()) == (path.name != "_trainer_compat.py")


def test_one_process_uses_one_gpu(monkeypatch, tmp_path):
    """transformers would give each visible GPU `batch_size` rows."""
    from braidlora.training import arguments

    made = transformers.TrainingArguments

    def with_four_gpus(**options):
        found = made(**options)
        found._n_gpu = 4
        return found

    monkeypatch.setattr(arguments.transformers, "TrainingArguments", with_four_gpus)
    config = load_config("demo", ["training.batch_size=8"], RunConfig)
    found = arguments.training_arguments(config, tmp_path, 100)
    assert (found.n_gpu, found.train_batch_size) == (1, 8)
