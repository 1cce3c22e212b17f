"""The frozen base model and its tokenizer: a folder, a hub name, the embedded one, or one inside a package."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from braidlora.config import ModelSection, RunConfig
from braidlora.errors import BraidloraError, ConfigError, TrainingError, is_out_of_memory
from braidlora.models.gguf import dequantized, find_gguf
from braidlora.models.package import PACKAGE, package_places
from braidlora.paths import find_data, places_searched
from braidlora.runs import BASE_CONFIG, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from braidlora.tasks import LabelSpace

EMBEDDED = "embedded"
_NEW_MODULES = "_braidlora_new_modules"


def load_base(
    section: ModelSection, kind: Literal["generate", "classify"], label_space: LabelSpace | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model and its tokenizer, in evaluation mode, on the CPU unless it is quantised.

    `dtype: auto` is the dtype of the stored weights; bf16 becomes float32 on a processor that would emulate it.

    For `classify` the head over the union of the tasks' labels is new, drawn from torch's global generator: seed it
    before. Weights are read from safetensors only, and code that comes with a model is never run.

    Args:
        section: the recipe's `model`.
        kind: `generate` loads a causal language model, `classify` a sequence classifier.
        label_space: the labels of a `classify` run (its `id2label` sizes the head).

    Raises:
        ConfigError: there is no such model, its weights are pickled or do not fit, it needs its own code, or
            quantisation was asked for without bitsandbytes.
        TrainingError: the model does not fit into memory.
    """
    import torch
    import transformers

    path = base_source(section)
    if (kind == "classify") != (label_space is not None):
        raise ValueError(f"load_base: kind {kind!r} and label_space {label_space!r} do not go together.")
    model_class = (
        transformers.AutoModelForCausalLM
        if kind == "generate"
        else transformers.AutoModelForSequenceClassification
    )
    options: dict[str, Any] = {"revision": section.revision} if section.revision else {}
    if section.attention:
        options["attn_implementation"] = section.attention
    options.update(_quantization(section))
    if label_space is not None:
        options["num_labels"] = len(label_space.id2label)
        options["id2label"] = dict(label_space.id2label)
        options["label2id"] = {label: index for index, label in label_space.id2label.items()}
    _refuse_pickles(path)
    stored_labels = _labels_of_stored_head(section, path, label_space) if label_space is not None else None
    with _quiet(), _memory_failure_told(section.path):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, revision=section.revision, trust_remote_code=False
            )
            model, info = model_class.from_pretrained(
                path,
                dtype=section.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(_why_not(section.path, path, error)) from error
    _note_new_modules(section.path, kind, model, info)
    if stored_labels is not None and label_space is not None and not new_modules(model):
        _order_head(section.path, model, stored_labels, label_space.names)
    _choose_pad_token(model, tokenizer)
    if section.dtype == "auto" and model.dtype == torch.bfloat16 and _emulates_bf16():
        model.float()
    model.eval()
    return model, tokenizer


def _emulates_bf16() -> bool:
    """Whether the model stays on an x86 processor without bf16 instructions, where a step takes longer than in float32.

    SmolLM2-135M, all-linear LoRA, 8 × 96 tokens, one core without them: 18 s in bf16, FLOAT32 s in float32. With them
    (two cores): 2.8 s and 4.4 s.
    """
    import torch

    if torch.accelerator.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def _memory_failure_told(given: str) -> Iterator[None]:
    try:
        yield
    except BraidloraError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise TrainingError(
            f"model.path: out of memory while {given} was loaded ({first[:200]}). Free memory, load it in half the "
            "bytes with model.dtype=bfloat16, set model.quantization=8bit or 4bit on a GPU, or choose a smaller base."
        ) from error


def base_source(section: ModelSection) -> str:
    """What transformers loads for the recipe's `model`: a folder, or a hub name as it is given.

    A GGUF file is dequantized first, unless the cache has it (`models.gguf`).

    Raises:
        ConfigError: as `resolve_path`, `find_gguf` and `dequantized`.
    """
    file = find_gguf(section)
    if file is None:
        return resolve_path(section.path)
    with _quiet():
        return str(dequantized(file))


def resolve_path(path: str) -> str:
    """What transformers is given for a `model.path` that is no GGUF file: a folder, or a hub name left as it is.

    Raises:
        ConfigError: `package:NAME/sub` names a package that is not installed or a folder it has not; a path that can
            only be local does not exist.
    """
    if path == EMBEDDED:
        from braidlora.assets import embedded_base_path

        return str(embedded_base_path())
    if path.startswith(PACKAGE):
        return _inside_package(path)
    local = find_data(path)
    if local.is_dir():
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ConfigError(
            f"model.path: there is no folder {path!r}; {places_searched(path)}. Expected a folder, a hub name "
            "(owner/name), `embedded`, or `package:NAME/folder`."
        )
    return path


def local_folder(section: ModelSection) -> Path | None:
    """The folder of the base's files on this machine; None where a hub model has not been downloaded yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    path = Path(base_source(section))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path), revision=section.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):  # not here, or no name at all, which loading it explains
        return None


def positions_of(model: Any) -> int | None:
    """How many tokens a sequence of this model may have; None where its configuration sets no bound.

    Args:
        model: a transformers model, with or without a PEFT adapter.
    """
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    # RoBERTa and its kin count positions from the one after their padding index.
    taken = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max(taken, default=0)


def check_cutoff(model: Any, config: RunConfig) -> None:
    """Refuse sequences that are longer than the base's positions: some bases fail there, others go wrong silently.

    Raises:
        ConfigError: `prompt.cutoff` is above what the base can read.
    """
    positions = positions_of(model)
    if positions is not None and config.prompt.cutoff > positions:
        raise ConfigError(
            f"prompt.cutoff: {config.prompt.cutoff} tokens, but {config.model.path} has {positions} positions. Set "
            f"prompt.cutoff={positions} or lower."
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass instead of keeping them."""
    # Non-reentrant: it needs no gradient at the embeddings, which are frozen.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _inside_package(path: str) -> str:
    for place in package_places(path):
        if (place / BASE_CONFIG).is_file():
            return str(place)
    name, _, folder = path.removeprefix(PACKAGE).partition("/")
    raise ConfigError(f"model.path: the package {name!r} has no model in {folder or 'its folder'!r}.")


def _quantization(section: ModelSection) -> dict[str, Any]:
    if section.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization: {section.quantization} needs bitsandbytes: pip install 'braidlora[quant]'."
        )
    import torch
    import transformers

    if section.quantization == "8bit":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = torch.float32 if section.dtype == "float32" else torch.bfloat16
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def _refuse_pickles(path: str) -> None:
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise ConfigError(
                f"model.path: {path} has its weights as a pickle ({pickles[0]}), which can run code when it is read. "
                "Only safetensors is read: load it where you trust it and call save_pretrained() again."
            )


def _why_not(given: str, path: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            f"model.path: {given} needs code that comes with the model, and braidlora never runs such code. "
            "Choose a base whose class transformers has."
        )
    first = text.strip().split("\n")[0]
    if "safetensors" in text and "no file named" in text.lower():
        first += " Only safetensors is read; pickled weights are refused."
    elif not Path(path).is_dir():
        first += f" There is no such folder ({places_searched(given)}), and the hub did not provide it."
    return f"model.path: {given} cannot be loaded: {first}"


def new_modules(model: PreTrainedModel) -> list[str]:
    """Names of the classifier's modules that `load_base` drew anew: they have to be trained and saved."""
    return list(getattr(model, _NEW_MODULES, []))


def _note_new_modules(given: str, kind: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """A classifier's head may be new; transformers would fill other missing weights with noise as well."""
    body = model.base_model_prefix + "."
    missing = sorted(info["missing_keys"])
    if kind == "classify":
        # BERT's pooler and DistilBERT's pre_classifier belong to the head, whatever their place.
        head = [key for key in missing if not key.startswith(body) or ".pooler." in key]
        missing = [key for key in missing if key not in head]
        names = {key.removeprefix(body).split(".")[0] for key in head}
        setattr(model, _NEW_MODULES, sorted(names))
    if missing:
        raise ConfigError(
            f"model.path: {given} has no weights for {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}; they would be random. Choose a base that was made for this kind of task."
        )


def _labels_of_stored_head(section: ModelSection, path: str, label_space: LabelSpace) -> list[str] | None:
    """The labels of the classification head that the base brings, in its order; None where it brings none.

    Raises:
        ConfigError: it brings one for other labels.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            path, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(_why_not(section.path, path, error)) from error
    architectures = getattr(config, "architectures", None) or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return None
    labels = [str(config.id2label[index]) for index in sorted(config.id2label)]
    unnamed = labels == [f"LABEL_{index}" for index in range(len(labels))]
    wanted = label_space.names
    if len(labels) != len(wanted) or not (unnamed or set(labels) == set(wanted)):
        raise ConfigError(
            f"model.path: {section.path} is a classifier with a head of its own, for the labels "
            f"{quoted(labels)}; the recipe's are {quoted(wanted)}. Give the tasks the same labels (`options`), or give "
            "the body alone, whose head is then new: save it with AutoModel.from_pretrained(PATH).save_pretrained(…)."
        )
    if unnamed:
        warnings.warn(
            f"{section.path}: its head does not name its labels ({labels[0]}, …); they are taken to be "
            f"{quoted(wanted)}, in this order",
            stacklevel=4,
        )
        return wanted
    return labels


def _order_head(given: str, model: PreTrainedModel, stored: list[str], wanted: list[str]) -> None:
    """Put the rows of a stored head into the order of the recipe's labels.

    Raises:
        ConfigError: the order is another one, and it cannot be told which layer is the head.
    """
    import torch

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


def _choose_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep the tokenizer's own padding; otherwise unk, which texts seldom hold, otherwise EOS. No token is added.

    Padding is masked by attention and carries no loss, so the choice matters to classifiers on decoders only, which
    find the last token of a row by it.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            "model.path: the tokenizer has neither a padding, an unknown nor an end token to pad with. Give it one "
            "(tokenizer.pad_token = …, save_pretrained) and load that folder."
        )
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of the new head while weights are read."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
