"""The frozen base model and its tokenizer."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from braidlora.config import ModelSection, RunConfig
from braidlora.errors import ConfigError, explain_out_of_memory, is_out_of_memory
from braidlora.models.head import labels_of_stored_head, new_modules, note_new_modules, order_head
from braidlora.models.load_errors import load_failed
from braidlora.models.location import base_source
from braidlora.models.quiet import quiet
from braidlora.models.tokenizer import choose_pad_token, set_chat_template
from braidlora.models.vocabulary import check_vocabulary
from braidlora.tasks import LabelSpace

_REMEDY = (
    "Free memory, load it in half the bytes with model.dtype=bfloat16, set model.quantization=8bit or 4bit on a GPU, "
    "or choose a smaller base."
)


def load_base(
    section: ModelSection, label_space: LabelSpace | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model and its tokenizer, in evaluation mode, on the CPU unless it is quantized.

    `dtype: auto` is the dtype of the stored weights; bf16 becomes float32 on a processor that would emulate it.

    With labels it is a sequence classifier. Its head over the union of the tasks' labels is new and drawn from torch's
    global generator, so seed that first. Weights are read from safetensors only, and code that comes with a model is
    never run.

    Args:
        section: the recipe's `model`.
        label_space: the labels of a `classify` run, which size the head; None for a causal language model.

    Raises:
        ConfigError: there is no such model, its weights are pickled or do not fit, it needs its own code, or
            quantization needs bitsandbytes.
        TrainingError: the model does not fit into memory.
    """
    path = base_source(section)
    _refuse_pickles(path)
    options: dict[str, Any] = {"revision": section.revision} if section.revision else {}
    if section.attention:
        options["attn_implementation"] = section.attention
    options.update(_quantization(section))
    model_class, stored_labels = transformers.AutoModelForCausalLM, None
    if label_space is not None:
        model_class = transformers.AutoModelForSequenceClassification
        options["num_labels"] = len(label_space.names)
        options |= {"id2label": label_space.id2label, "label2id": label_space.label2id}
        stored_labels = labels_of_stored_head(section, path, label_space)
    with quiet(), explain_out_of_memory(f"model.path: out of memory while loading {section.path}", _REMEDY):
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
            raise load_failed(section.path, path, error) from error
    note_new_modules(section.path, model, info, classifies=label_space is not None)
    if stored_labels is not None and label_space is not None and not new_modules(model):
        order_head(section.path, model, stored_labels, label_space.names)
    choose_pad_token(model, tokenizer)
    check_vocabulary(section.path, model, tokenizer)
    set_chat_template(section, tokenizer)
    unquantized = section.quantization == "none"  # otherwise only what is not quantized could be converted
    if section.dtype == "auto" and unquantized and model.dtype == torch.bfloat16 and _emulates_bf16():
        model.float()
    model.eval()
    return model, tokenizer


def _emulates_bf16() -> bool:
    """Whether the model stays on an x86 processor without bf16 instructions, where float32 is faster.

    SmolLM2-135M, all-linear LoRA, a step of 8 × 96 tokens on one core without them: 18 s in bf16, 6 s in
    float32.
    """
    if torch.accelerator.is_available() or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def positions_of(model: Any) -> int | None:
    """How many tokens a sequence of this model may have; None if its configuration sets no bound.

    Args:
        model: a transformers model, with or without a PEFT adapter.
    """
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    # RoBERTa and its relatives count positions from their padding index + 1.
    taken = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max(taken, default=0)


def check_cutoff(model: Any, config: RunConfig) -> None:
    """Reject sequences that are longer than the base's positions: some bases fail on them, others compute nonsense.

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
    # Non-reentrant checkpointing needs no gradient at the embeddings, which are frozen.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _quantization(section: ModelSection) -> dict[str, Any]:
    if section.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization: {section.quantization} needs bitsandbytes: pip install 'braidlora[quant]'."
        )
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
