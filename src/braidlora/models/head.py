"""The classification head of a base: new, or stored with the base and then put into the order of the labels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from braidlora.config import ModelSection
from braidlora.errors import ConfigError
from braidlora.models.load_errors import load_failed
from braidlora.runs import quoted
from braidlora.tasks import LabelSpace

_NEW_MODULES = "_braidlora_new_modules"


def new_modules(model: PreTrainedModel) -> list[str]:
    """Names of the classifier's modules that `load_base` initialized at random: they must be trained and saved."""
    return list(getattr(model, _NEW_MODULES, []))


def note_new_modules(given: str, model: PreTrainedModel, info: dict[str, Any], *, classifies: bool) -> None:
    """Remember which modules of a classifier's head are new.

    Raises:
        ConfigError: other weights are missing too, which transformers would fill with noise.
    """
    body = model.base_model_prefix + "."
    missing = sorted(info["missing_keys"])
    if classifies:
        # BERT's pooler and DistilBERT's pre_classifier belong to the head, wherever they are.
        head = [key for key in missing if not key.startswith(body) or ".pooler." in key]
        missing = [key for key in missing if key not in head]
        names = {key.removeprefix(body).split(".")[0] for key in head}
        setattr(model, _NEW_MODULES, sorted(names))
    if missing:
        raise ConfigError(
            f"model.path: {given} has no weights for {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}; they would be random. Choose a base that was made for this kind of task."
        )


def labels_of_stored_head(section: ModelSection, path: str, label_space: LabelSpace) -> list[str] | None:
    """The labels of the head that is stored with the base, in its order; None if it has no head.

    Raises:
        ConfigError: its head is for other labels.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise load_failed(section.path, path, error) from error
    architectures = getattr(config, "architectures", None) or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return None
    labels = [str(config.id2label[index]) for index in sorted(config.id2label)]
    unnamed = labels == [f"LABEL_{index}" for index in range(len(labels))]
    wanted = label_space.names
    if len(labels) != len(wanted) or not (unnamed or set(labels) == set(wanted)):
        raise ConfigError(
            f"model.path: {section.path} is a classifier with its own head, for the labels "
            f"{quoted(labels)}; the recipe's are {quoted(wanted)}. Give the tasks the same labels (`options`), or give "
            "the body alone, which gets a new head: save it with AutoModel.from_pretrained(PATH).save_pretrained(…)."
        )
    if unnamed:
        warnings.warn(
            f"{section.path}: its head does not name its labels ({labels[0]}, …); assuming "
            f"{quoted(wanted)}, in this order",
            stacklevel=4,
        )
        return wanted
    return labels


def order_head(given: str, model: PreTrainedModel, stored: list[str], wanted: list[str]) -> None:
    """Put the rows of a stored head into the order of the recipe's labels.

    Raises:
        ConfigError: the order differs, and no single linear layer is the head.
    """
    if stored == wanted:
        return
    body = model.base_model_prefix + "."
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not name.startswith(body)
        and module.out_features == len(wanted)
    ]
    if len(heads) != 1:
        raise ConfigError(
            f"model.path: {given} has the labels in the order {quoted(stored)}, the recipe in the order "
            f"{quoted(wanted)}, and its head is not one linear layer that could be put in order. List the options in "
            "the base's order."
        )
    rows = [stored.index(label) for label in wanted]
    with torch.no_grad():
        for parameter in heads[0].parameters():
            parameter.copy_(parameter[rows].clone())
