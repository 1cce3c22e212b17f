"""A plan as plain text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from braidlora.adapters.sharing import by_method
from braidlora.federated.protocol.rules import rule_specs
from braidlora.tables import epsilon_text, format_bytes, text_table

_MODELS = {"llama-2-7b": "Llama-2-7B", "qwen2-7b": "Qwen2-7B"}


def format_plan(plan: Mapping[str, Any]) -> str:
    """The text of any plan; `--json` has all numbers."""
    if plan["plan"] == "paper":
        return _paper(plan)
    parts = [_base(plan["base"])]
    parts += [_methods(plan)] if plan["plan"] == "train" else [_adapters(plan), _rules(plan)]
    return "\n\n".join([*parts, _memory(plan["memory"])])


def _base(base: Mapping[str, Any]) -> str:
    kind = (
        base["dtype"] if base["quantization"] == "none" else f"{base['quantization']}, else {base['dtype']}"
    )
    lines = [f"base   {base['path']}: {base['parameters']:,} parameters, {kind}"]
    if base["shapes_from"] != base["path"]:
        lines.append(f"       dimensions of {base['shapes_from']}")
    return "\n".join([*lines, *(f"note   {note}" for note in base["notes"])])


def _methods(plan: Mapping[str, Any]) -> str:
    parameters, schemes = plan["base"]["parameters"], by_method()
    rows = [
        [
            "*" if name == plan["method"] else "",
            schemes[name].label if name in schemes else name,
            size["layers"],
            f"{size['trainable_parameters']:,}",
            f"{100 * size['trainable_parameters'] / parameters:.3f} %",
            format_bytes(size["file_bytes"]),
        ]
        for name, size in plan["methods"].items()
    ]
    table = text_table(["", "method", "layers", "trainable", "of the base", "file"], rows, left=(0, 1))
    return f"{table}\n* this recipe; the others use its settings"


def _adapters(plan: Mapping[str, Any]) -> str:
    rows = [
        [
            entry["rank"],
            entry["clients"],
            f"{entry['trainable_parameters']:,}",
            format_bytes(entry["file_bytes"]),
        ]
        for entry in plan["adapters"]
    ]
    size = plan["asked_per_round"]
    clients = (
        f"{plan['clients']} clients"
        if size == plan["clients"]
        else f"{size} of {plan['clients']} clients per round"
    )
    title = f"rule {plan['rule']}, {plan['rounds']} rounds, {clients}, {plan['layers']} adapted layers"
    if plan["privacy"] is not None:
        title += f"\n{_privacy(plan['privacy'], plan['rounds'])}"
    return f"{title}\n\n{text_table(['rank', 'clients', 'trainable', 'file'], rows, left=())}"


def _privacy(found: Mapping[str, Any], rounds: int) -> str:
    if "reason" in found:
        return f"privacy: {found['reason']}"
    how = f"noise multiplier {found['noise_multiplier']:.4g}, clip {found['clip']:g}, sampling {found['sampling']:g}"
    if "why_not" in found:
        return f"privacy: no guarantee: {found['why_not']}; {how}"
    text = f"privacy: ε = {epsilon_text(found['epsilon'])} at δ = {found['delta']:g} after {rounds} rounds"
    if found["noise"] == "clients":
        text += f", and {epsilon_text(found['epsilon_server'])} toward the server, for a client that is always drawn"
    return f"{text} ({found['neighbors']}); {how}"


def _rules(plan: Mapping[str, Any]) -> str:
    rows = []
    for entry in plan["rules"]:
        own = entry["rule"] == plan["rule"] and entry["wire"] in (None, plan["wire"])
        name = entry["rule"] + (f", {entry['wire']}" if entry["wire"] else "")
        cells = ["*" if own else "", name]
        if "reason" in entry:
            rows.append([*cells, "–", "–", "–", "–", entry["reason"]])
            continue
        mean, total = entry["mean"], entry["all_rounds"]
        rows.append(
            [
                *cells,
                f"{mean['up_parameters']:,.0f}",
                f"{mean['down_parameters']:,.0f}",
                format_bytes(mean["up_bytes"]),
                format_bytes(mean["down_bytes"]),
                format_bytes(total["up_bytes"] + total["down_bytes"]),
            ]
        )
    header = ["", "rule", "parameters up", "parameters down", "up", "down", "all clients and rounds"]
    sampled = plan["asked_per_round"] < plan["clients"] and len(plan["adapters"]) > 1
    note = (
        "\nAverages assume a round with all clients; the last column counts the clients that the seed samples."
        if sampled
        else ""
    )
    return (
        "per client and round, averaged over the clients\n\n"
        f"{text_table(header, rows, left=(0, 1))}\n"
        f"* this recipe. Nothing is sent down in the first round: all clients start from the recipe's seed.{note}"
    )


def _memory(memory: Mapping[str, Any]) -> str:
    title = f"memory of a training step with {memory['rows']} rows of {memory['tokens']} tokens (an estimate)"
    parts = ("weights", "adapter", "gradients", "optimizer", "activations", "total")
    rows = [[part, "–" if memory[part] is None else format_bytes(memory[part])] for part in parts]
    width = max(len(cells[1]) for cells in rows)
    lines = [f"  {part:<12}{size:>{width}}" for part, size in rows]
    notes = [*memory["notes"], "not included: the allocator's overhead and the CUDA context"]
    return "\n".join([title, "", *lines, "", *(f"  {note}" for note in notes)])


def _paper(plan: Mapping[str, Any]) -> str:
    """The paper's table in its own unit and digits, with every way to count its last column."""
    same, different = plan["homogeneous"], plan["heterogeneous"]
    rows: list[list[str]] = []
    for model, rules in same["models"].items():
        rows.append(
            [
                "equal",
                _MODELS[model],
                *(_millions(rules[rule]) for rule in ("fedit", "fedsa-lora", "fed-alora")),
                "",
            ]
        )
    for model, rules in different["models"].items():
        for index, (how, count) in enumerate(rules["fed-alora-het"].items()):
            first = index == 0
            mark = " *" if different["printed"][model] == how else ""
            rows.append(
                [
                    "different" if first else "",
                    _MODELS[model] if first else "",
                    _millions(rules["zero-padding"]) if first else "",
                    "n/a" if first else "",
                    _millions(count),
                    how + mark,
                ]
            )
    label = {spec.name: spec.label for spec in rule_specs()}
    averaged = f"{label['fedit']} / {label['zero-padding']}"
    header = ["ranks", "model", averaged, label["fedsa-lora"], label["fed-alora"], "how it is counted"]
    listed = ",".join(map(str, different["ranks"]))
    return (
        "Communication of arXiv 2509.25414: millions of parameters per client and round, up and down together,\n"
        f"averaged over {len(same['ranks'])} clients of rank {same['ranks'][0]}, or of ranks {listed} with m = "
        f"{different['r_intermediate']}\n\n"
        f"{text_table(header, rows, left=(0, 1, 5))}\n"
        "* the number that the paper prints for this model. B_base is sent down in all of them."
    )


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f}"
