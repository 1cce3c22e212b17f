"""An export on disk: the LoRA's files, a README that describes it, and export.json."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from braidlora.adapters.sharing import SCHEMES
from braidlora.errors import ConfigError, TrainingError
from braidlora.export.source import KINDS, Source
from braidlora.export.static_weights import StaticWeights
from braidlora.models.adapter_writer import write_adapter
from braidlora.models.model_card import merged_card, model_card
from braidlora.runs import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    MODEL_CARD,
    read_adapter_card,
    restore_replaced,
)
from braidlora.tables import text_table

RECORD = "export.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def refuse_to_replace(output: Path, *, overwrite: bool) -> None:
    """Raise unless `output` is empty, or an earlier export that may be replaced.

    Raises:
        ConfigError: it is not.
        TrainingError: an earlier export that a killed process had moved aside cannot be restored.
    """
    if output.is_symlink():
        raise ConfigError(f"--output: {output} is a link; give the folder itself.")
    try:
        restore_replaced(output)
    except OSError as error:
        raise TrainingError(
            f"{error.filename or output}: cannot be restored to {output}: {error.strerror or error}."
        ) from error
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not all((output / name).is_file() for name in (RECORD, MANIFEST)):
        raise ConfigError(
            f"--output: {output} contains files that are not from an export; nothing there was changed. Choose an "
            "empty folder."
        )
    if not overwrite:
        raise ConfigError(
            f"--output: {output} contains an earlier export. --overwrite replaces it, --output PATH puts the new one "
            "elsewhere."
        )


def manifest_of(output: Path) -> bytes | None:
    """The manifest of the export in `output`, which identifies it; None without one."""
    path = output / MANIFEST
    return path.read_bytes() if path.is_file() else None


def left_in(output: Path, before: bytes | None) -> str:
    """What a failed export left in `output`, which had the manifest `before`."""
    if manifest_of(output) != before:
        return "The new export is complete."
    return "Nothing was written there." if before is None else "The earlier export is unchanged."


def write_lora(folder: Path, source: Source, tensors: dict[str, Any] | None, config: Any) -> dict[str, Any]:
    """Write a LoRA in PEFT's format, with the source's card and tokenizer; returns adapter_config.json.

    Args:
        tensors: its state dict; None copies the source's files byte for byte.
        config: its LoraConfig.
    """
    if tensors is None:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            (folder / name).write_bytes(source.files.read(name))
    else:
        write_adapter(folder, tensors, config)
    source.origin.described().write(folder)
    for name in _TOKENIZER:
        if source.files.lists(name):
            (folder / name).write_bytes(source.files.read(name))
    unlisted = [
        name for name in _TOKENIZER if not source.files.lists(name) and (source.folder / name).exists()
    ]
    if unlisted:  # the source's manifest does not cover them, but the export's would
        warnings.warn(
            f"{source.folder}: {', '.join(unlisted)} was added after the adapter was written, and {MANIFEST} does not "
            "list it; it is not exported. If it belongs to the adapter, copy it into the export yourself.",
            stacklevel=2,
        )
    return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))


def write_record(folder: Path, record: dict[str, Any], config: dict[str, Any]) -> None:
    """Write export.json and the README.

    Args:
        record: the content of export.json.
        config: the LoRA's adapter_config.json.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")
    known = read_adapter_card(folder)
    card = merged_card(config, known) if record["form"] == "merged" else model_card(config, known)
    (folder / MODEL_CARD).write_text(f"{card.rstrip()}\n\n{description(record)}\n", encoding="utf-8")


def description(record: dict[str, Any]) -> str:
    """What was exported, whether it is exact, and its cost, for the README and the terminal."""
    lines = [f"Exported from: {record['source']['what']}.", record["how"]]
    if "merge" in record:
        lines.append(_how_merged(record["merge"]))
    cost = record["cost"]
    if cost is not None:
        lines += ["Scores on the test rows, before and after:", "", format_cost(cost)]
    elif not record["exact"]:
        lines.append(f"The cost of the approximation was not measured: {record['cost_reason']}.")
    return "\n".join(lines)


def how(source: Source, rank: int, fixed: StaticWeights | None, task: str | None = None) -> str:
    """How the LoRA is derived from the adapter, and whether it is exact."""
    if source.kind == "LORA":
        if source.plain:
            return "Copied unchanged: it is a plain LoRA."
        return (
            f"Copied unchanged: {source.describe()}, which PEFT loads; other LoRA loaders may treat it as a plain "
            "one."
        )
    if source.kind == "FACTOREDLORA":
        return f"Exact: A = M A and B = B_base + B2 B1, a LoRA of rank {rank} with the same scaling."
    if task is not None:
        return f"Exact for task {task}: with the expert weights of one task the adapter is a LoRA of rank {rank}."
    if fixed is None and source.experts > 1:
        return f"Exact: all experts have the same weight for every token, which makes them a LoRA of rank {rank}."
    if fixed is None:
        return "Exact: with one expert the adapter is a LoRA."
    return (
        f"An approximation: the expert weights, which the router computes for every token, are fixed "
        f"{fixed.in_words()}; {SCHEMES[source.config.share].static}, a LoRA of rank {rank}."
    )


def copied(source: Source) -> str:
    """That an adapter without an exact LoRA form was copied, and what loads it."""
    loads = "`import braidlora` before PEFT loads it" if source.kind in KINDS else "PEFT loads it"
    return f"Copied unchanged: {source.describe()}; it has no exact LoRA form, so {loads}."


def format_cost(cost: dict[str, Any]) -> str:
    """The scores before and after as a table, indented as a Markdown code block."""
    columns = ("metric", "n", "before", "after", "change")
    rows = [[name, *(task[key] for key in columns)] for name, task in cost["tasks"].items()]
    rules = []
    if len(rows) > 1:
        rules = [len(rows)]
        total = sum(task["n"] for task in cost["tasks"].values())
        rows.append(["mean", "", total, *(cost[key] for key in columns[2:])])
    table = text_table(["task", *columns], rows, left=(0, 1), rules=rules)
    return "\n".join(f"    {line}" for line in table.split("\n"))


def _how_merged(merge: dict[str, Any]) -> str:
    return (
        f"Merged: W0 + s·B A, rounded to {merge['dtype']}. On random tokens the logits differ from those of base and "
        f"LoRA by at most {merge['largest_logit_difference']:.2g} (largest logit {merge['largest_logit']:.3g})."
    )
