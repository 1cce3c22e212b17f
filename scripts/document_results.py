"""Fill in the tables of docs/results.md from the JSON files under benchmarks/results.

    python scripts/document_results.py            # rewrite the page
    python scripts/document_results.py --check    # exit with 1 if the page is out of date

A table goes between `<!-- results: NAME -->` and `<!-- end -->`, where NAME is a file in benchmarks/results without its
suffix. The kind of the file determines the table: a comparison, a study, the layer benchmark, the acceptance counts,
the flan8 run, a comparison of federations, the gradients of their shared factor, the overhead of a federated round,
planned memory, the cost of an export, what a probe predicts, or a tuned comparison of benchmarks/evidence.py;
`summary` is the first screen, from all of them. Verdicts are recomputed from the numbers, to have the current wording.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

from braidlora.analysis.findings import findings
from braidlora.comparison import as_markdown
from braidlora.comparison._advice import advise
from braidlora.comparison._verdict import details
from braidlora.comparison._verdict import verdict as comparison_verdict
from results_advise import advise as advise_tables
from results_evidence import evidence
from results_privacy import privacy
from results_serving import decode, vllm
from results_summary import summary

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results"
_COST = ("loss", "upload / download, kB", "seconds")
_PARTS = {
    "judging and aggregating": "checking and aggregating",
    "packing": "serializing",
    "tensors in and out": "moving tensors",
}
_RATIOS = {  # goals of the layer benchmark in words
    "alora_3 ratio_to_": "ALoRA with 3 experts / ",
    "alora ratio_to_": "ALoRA / ",
    "peft_lora": "PEFT LoRA",
}
_CLIENTS = 8  # more clients than this get no table of scores by client
_BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.S)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(result: dict[str, Any]) -> str:
    """The tables, verdict and command of a comparison as in `comparison.md`, with headings two levels deeper."""
    result = {**result, "advice": advise(result), "details": details(result)}
    text = as_markdown({**result, "verdict": comparison_verdict(result, result["advice"])}).split("\n", 2)[2]
    return re.sub(r"^## ", "#### ", text, flags=re.M).strip()


def layer(result: dict[str, Any]) -> str:
    """Milliseconds and paired ratios from the layer benchmark, followed by its goals."""
    columns = ("frozen", "loop", "peft_lora", "alora", "hydralora")
    rows = []
    for row in result["rows"]:
        if row["benchmark"] != "layer":
            continue
        ratios = [f"{row[f'ratio_to_{other}']['alora']:.2f}" for other in ("loop", "peft_lora")]
        times = [f"{row['ms'][name]:.2f}" for name in columns]
        saved = f"{row['saved_mib']['alora']:.2f} / {row['saved_mib']['loop']:.1f}"
        rows.append([str(row["width"]), str(row["experts"]), *times, *ratios, saved])
    header = ["width", "N", "frozen", "loop", "PEFT LoRA", "ALoRA", "HydraLoRA", "ALoRA / loop", "ALoRA / PEFT LoRA",
              "saved activations, MiB: ALoRA / loop"]  # fmt: skip
    goals = []
    for goal in result["goals"]:
        met = "goal met" if goal["met"] else "**goal missed**"
        what = goal["what"]
        for key, words in _RATIOS.items():
            what = what.replace(key, words)
        goals.append(f"- {met}: {what}: {goal['value']:.2f} (at most {goal['at_most']:.2f}); {goal['row']}")
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    made = (
        f"`{result['command']}`, {result['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['threads']} "
        f"threads; Python {result['python']}, {versions}. Milliseconds, forward and backward, 2048 tokens."
    )
    return "\n".join([table(header, rows), "", *goals, "", made])


def acceptance(result: dict[str, Any]) -> str:
    """Passed and skipped tests of every suite, with reasons for skipping."""
    rows = []
    for suite, counts in result.items():
        failed = counts.get("failed", 0) + counts.get("failure", 0) + counts.get("error", 0)
        reasons = "; ".join(
            f"{number} × {_plain(reason)}" for reason, number in counts["skip_reasons"].items()
        )
        rows.append([suite, str(counts["passed"]), str(failed), str(counts["skipped"]), reasons or "–"])
    some = next(iter(result.values()))
    versions = ", ".join(f"{name} {version}" for name, version in some["versions"].items())
    made = f"`make acceptance`, {some['date']}, Python {some['python']}; {versions}."
    return "\n".join([table(["suite", "passed", "failed", "skipped", "why skipped"], rows), "", made])


def study(result: dict[str, Any]) -> str:
    """The verdict, similarity of A and B by group of pairs, and drift."""
    found = result["study"]
    groups = {
        "different_tasks_same_seed": "different tasks, same seed",
        "same_task_different_seeds": "same task, different seeds",
        "different_tasks_different_seeds": "different tasks, different seeds",
    }
    stages = [
        ("A before training", found["start"]["A"]),
        *((f"{name} after", found["end"][name]) for name in "AB"),
    ]
    similar = [
        [stage, f"{part['chance']:.3f}", *(_spread(part["groups"][group]) for group in groups)]
        for stage, part in stages
    ]
    moved = []
    for since in ("since_start", "since_warmup"):
        change = found["drift"][since]
        for factor in ("A",) if since == "since_start" else ("A", "B", "delta"):
            name = "ΔW" if factor == "delta" else factor
            start = "the start" if since == "since_start" else change["from"].replace("step-", "step ")
            moved.append([
                f"{name} since {start}", *(_spread(change[factor][what]) for what in ("magnitude", "direction"))
            ])  # fmt: skip
    base = found["base"].removeprefix("package:").removesuffix("/model").rsplit("/", 1)[-1]
    about = (
        f"Base {base}, rank {found['rank']}; tasks {', '.join(found['tasks'])}; seeds "
        f"{', '.join(map(str, found['seeds']))}; {found['steps']} steps each, {found['warmup_steps']} of them warm-up. "
        "± is the standard deviation over pairs (similarity) or over runs (change)."
    )
    parts = [
        "\n".join(f"- {finding['text']}" for finding in findings(found).values()),
        table(["similarity", "chance", *groups.values()], similar),
        table(["change until the end", "magnitude", "direction"], moved),
        about,
        _made(result),
    ]
    return "\n\n".join(parts)


def _spread(found: dict[str, Any] | None) -> str:
    return "–" if found is None else f"{found['mean']:.3f} ± {found['std']:.3f}"


def loss_positions(result: dict[str, Any]) -> str:
    """A training step with all logits and with those that carry loss."""
    rows = [
        [
            case["recipe"], case["base"].removeprefix("package:"), f"{case['kept_share']:.0%}",
            f"{case['every_ms']:,.0f}", f"{case['kept_ms']:,.0f}", f"{case['ratio']:.2f}",
        ]
        for case in result["cases"]
    ]  # fmt: skip
    header = ["rows of", "base", "positions kept", "all logits, ms", "kept logits, ms", "kept / all"]
    return "\n\n".join([table(header, rows), _made(result)])


def flan8(result: dict[str, Any]) -> str:
    """Loss, answer form and score of every task before and after training, and the outcome of the chain of commands."""
    rows = []
    for name, task in result["tasks"].items():
        form = "–" if task["in_form"] is None else f"{task['in_form_base']:.0f} → {task['in_form']:.0f}"
        rows.append([
            name, f"{task['loss_first']:.2f} → {task['loss_last']:.2f}", str(task["answers"]), form,
            f"{task['metric']} {task['score_base']:.1f} → {task['score']:.1f}",
        ])  # fmt: skip
    header = ["task", "training loss", "distinct answers", "% of predictions among them", "score"]
    peft, again = result["reloaded_with_peft"], result["evaluated_again_with_the_same_scores"]
    chain = (
        f"{result['steps']} steps, killed after step {result['killed_after_step']} and resumed from step "
        f"{result['resumed_from_step']}; {result['trainable_parameters']:,} trainable parameters; "
        f"{result['seconds']:.0f} s. `evaluate --fresh` gave {'the same' if again else '**different**'} scores; plain "
        f"PEFT gave the same answers as `evaluate` on {peft['same']} of {peft['rows']} rows."
    )
    return "\n".join([table(header, rows), "", chain, "", _made(result)])


def federations(result: dict[str, Any]) -> str:
    """A table per group of rules; with scores only if the base model supports them."""
    parts = []
    for title, group in result["groups"].items():
        if title:
            parts.append(f"#### {title}")
        parts += _scored(group, len(result["seeds"])) if result["scored"] else [_sent(group)]
    seeds = ", ".join(map(str, result["seeds"]))
    about = (
        "Loss: mean over clients, first round → last. kB as sent, per client and round; the first round has no "
        f"download. Seconds: fastest seed; federations run in parallel: {result['at_a_time']}."
    )
    if result["scored"]:
        about = (
            "Scores are means over clients: the aggregated models on the clients' own test rows; `after training` is a "
            "client's model before the last aggregation. "
            + (
                "± is the sample standard deviation over seeds; brackets are 95% CIs. "
                if "," in seeds
                else ""
            )
            + f"Δm% is relative to `local`; lower is better. {about}"
        )
    recipe = f"Recipe `{result['recipe']}` with `{shlex.join(result['options'])}`; seeds {seeds}."
    return "\n\n".join([*parts, about, recipe, _made(result)])


def _scored(group: dict[str, Any], seeds: int) -> list[str]:
    """Scores, Δm%, differences and cost of every rule; scores by client if there are few; selected pairs."""
    rows = group["rows"]
    common = any(row["common"]["mean"] is not None for row in rows.values())
    several = seeds > 1
    header = ["rule", "mean", *(["common test"] if common else []), "worst client", "after training", "Δm%",
              *([f"vs. {group['baseline']}"] if several else []), *_COST]  # fmt: skip
    lines = [
        [
            name, _number(row["mean"]), *([_number(row["common"])] if common else []), _number(row["worst"]),
            _number(row["after"]), _number(row["delta_m"], sign=name != "local"),
            *([_interval(row["difference"])] if several else []), *_cost(row),
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    parts = [table(header, lines)]
    clients = list(next(iter(rows.values()))["clients"])
    if len(clients) <= _CLIENTS:
        by_client = [
            [name, *(_number(row["clients"][client]) for client in clients)] for name, row in rows.items()
        ]
        parts.append(table(["rule", *clients], by_client))
    if group["pairs"] and several:
        parts.append(_pairs(group["pairs"]))
    return parts


def _sent(group: dict[str, Any]) -> str:
    return table(["rule", *_COST], [[name, *_cost(row)] for name, row in group["rows"].items()])


def _cost(row: dict[str, Any]) -> list[str]:
    sent, loss = row["bytes_per_client_and_round"], row["loss"]
    return [
        f"{loss['first']['mean']:.2f} → {loss['last']['mean']:.2f}",
        f"{_kilobytes(sent['up'])} / {_kilobytes(sent['down'])}",
        f"{min(row['seconds']['values']):.0f}",
    ]


def _pairs(pairs: list[dict[str, Any]]) -> str:
    """Differences within pairs of rules, on the common test if there is one, and clients that differ significantly."""
    common, by_client = (any(pair[key] for pair in pairs) for key in ("common", "clients"))
    rows = [
        [
            pair["row"], pair["to"], _interval(pair["difference"]),
            *([_interval(pair["common"])] if common else []), *([_significant(pair)] if by_client else []),
        ]
        for pair in pairs
    ]  # fmt: skip
    header = ["rule", "compared with", "mean over clients", *(["common test"] if common else []),
              *(["clients with a significant difference"] if by_client else [])]  # fmt: skip
    return table(header, rows)


def _significant(pair: dict[str, Any]) -> str:
    named = [
        f"{client} " + f"{one['mean']:+.1f}".replace("-", "−")
        for client, one in pair["clients"].items()
        if not one["low"] <= 0 <= one["high"]
    ]
    return ", ".join(named) or "–"


def shared_factor(result: dict[str, Any]) -> str:
    """Pull, change and similarity of either factor, by rule and initial A."""
    rows = [
        [
            f"{one['rule']}, {one['start']}", one["factor"], "yes" if one["shared"] else "no",
            f"{_decimals(one['between'])} ({_decimals(one['lowest'])})", _decimals(one["within"]),
            _decimals(one["pull"]), _decimals(one["moved"]), _decimals(one["kept"]),
            "identical" if one["shared"] else f"{_decimals(one['similarity'])} ({one['chance']['mean']:.2f})",
        ]
        for one in result["federations"]
    ]  # fmt: skip
    header = ["rule, initial A", "factor", "shared", "cosine between clients (lowest pair)", "within a client", "pull",
              "moved by a client", "kept by the mean", "similarity between clients (chance)"]  # fmt: skip
    about = (
        f"Mean ± standard deviation over seeds {', '.join(map(str, result['seeds']))}; gradients of {result['rows']} "
        "training rows per client, `within` between two halves of them. Pull is ‖gradient‖·‖factor‖; moved is ‖Δ‖ "
        "of a client's last local training; kept is ‖mean of Δ‖ over the mean of ‖Δ‖, 0.41 for six orthogonal "
        "changes."
    )
    return "\n\n".join([table(header, rows), about, _made(result)])


def federated_round(result: dict[str, Any]) -> str:
    """Where the overhead of a round goes, and a federation with many clients compared with one with few."""
    measured = {name: one for name, one in result["round"].items() if name != "environment"}
    parts = list(next(iter(measured.values()))["of_which_seconds"])
    rows = [
        [name, f"{one['round_seconds']:.1f}", f"{100 * one['overhead_share']:.1f}%"]
        + [f"{1000 * one['of_which_seconds'][part]:.0f}" for part in parts]
        for name, one in measured.items()
    ]
    header = ["federation", "round, s", "overhead", *(f"{_PARTS.get(part, part)}, ms" for part in parts)]
    many = result["many_clients"]
    sizes = [
        [
            str(one["clients"]), f"{one['seconds']:.0f}", f"{one['seconds_per_client_and_round']:.2f}",
            f"{one['peak_memory_mb']:.0f}", f"{one['disk_mb']:.0f}",
        ]
        for one in (many["small"], many["large"])
    ]  # fmt: skip
    columns = [
        "clients",
        "seconds, two rounds",
        "seconds per client and round",
        "peak memory, MiB",
        "on disk, MB",
    ]
    script = "python benchmarks/federate_round.py"
    made = [_made({"command": script, **result["round"]}), _made({"command": f"{script} --many", **many})]
    return "\n\n".join([table(header, rows), made[0], table(columns, sizes), made[1]])


def memory(result: dict[str, Any]) -> str:
    """Planned and measured memory of a step, by recipe."""
    rows = [
        [
            " ".join([case["recipe"], *(f"`{override}`" for override in case["overrides"])]),
            f"{case['planned'] / 2**20:,.0f}",
            *(
                f"{case[name]['measured'] / 2**20:,.0f} ({case[name]['ratio']:.2f})"
                for name in ("tight", "default")
            ),
        ]
        for case in result["cases"]
    ]
    header = [
        "recipe",
        "planned, MiB",
        "measured, freed blocks returned (planned / measured)",
        "measured, default malloc",
    ]
    return "\n\n".join([table(header, rows), _made(result)])


def export_cost(result: dict[str, Any]) -> str:
    """Scores of a routed run, and of its exports with uniform weights and with each task's own weights."""
    keys = ("router", "uniform", "own")
    rows = [[name, task["metric"], str(task["n"]), *(f"{task[key]:.1f}" for key in keys)]
            for name, task in result["tasks"].items()]  # fmt: skip
    means = [sum(task[key] for task in result["tasks"].values()) / len(rows) for key in keys]
    rows.append(["mean", "", "", *(f"{mean:.1f}" for mean in means)])
    header = ["task", "metric", "rows", "with router", "`uniform`", "`task=` (own task)"]
    return "\n\n".join([table(header, rows), _made(result)])


def many_sites(result: dict[str, Any]) -> str:
    """The server side of large federations: time and memory of a round."""
    rows = [
        [
            f"`{cell['rule']}`",
            f"{cell['sites']:,}",
            str(cell["sampled"]),
            f"{cell['registering_seconds']:.1f}",
            f"{cell['round_cpu_seconds']:.1f}",
            str(cell["peak_MiB"]),
        ]
        for cell in result["cells"]
    ]
    header = [
        "rule",
        "registered",
        "sampled per round",
        "registering, s",
        "round, s of CPU",
        "peak memory, MiB",
    ]
    return "\n\n".join([table(header, rows), _made(result)])


def coverage(result: dict[str, Any]) -> str:
    """Coverage of simulated intervals: one line per scenario, one column per number of seeds."""
    cells = {(row["truth"], row["seeds"]): row for row in result["rows"]}
    seeds = sorted({seeds for _, seeds in cells})
    rows = []
    for truth in dict.fromkeys(row["truth"] for row in result["rows"]):
        own = [cells[truth, count] for count in seeds]
        rows.append(
            [truth, *(f"{one['coverage']:.1%}" for one in own), *(f"{one['flagged']:.1%}" for one in own)]
        )
    header = [
        "scenario",
        *(f"covered, {count} seeds" for count in seeds),
        *(f"flagged, {count} seeds" for count in seeds),
    ]
    error = max(row["standard_error"] for row in result["rows"])
    note = f"{result['trials']:,} simulated comparisons each, seed {result['seed']}; standard errors up to {error:.1%}."
    return "\n\n".join([table(header, rows), note, _made(result)])


def _number(value: dict[str, Any] | None, sign: bool = False) -> str:
    """A mean with its spread over seeds."""
    if value is None or value["mean"] is None:
        return "–"
    spread = "" if value["std_seeds"] is None else f" ± {value['std_seeds']:.1f}"
    return f"{value['mean']:{'+' if sign else ''}.1f}{spread}".replace("-", "−")


def _decimals(value: dict[str, Any]) -> str:
    """As `_number`, with two decimals, for values between −1 and 1."""
    if value["mean"] is None:
        return "–"
    spread = "" if value["std_seeds"] is None else f" ± {value['std_seeds']:.2f}"
    return f"{value['mean']:.2f}{spread}".replace("-", "−")


def _interval(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]".replace("-", "−")


def _kilobytes(sent: float) -> str:
    return f"{sent / 1000:,.0f}"


def _made(result: dict[str, Any]) -> str:
    here = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    return f"`{result['command']}`, {here['date'][:10]}, {here['machine']['processor']}; {versions}."


def _plain(reason: str) -> str:
    """A reason without the module path of a class, safe for a table cell."""
    return re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", reason).replace("|", "/").rstrip(".")


def draw(name: str, page: str) -> str:
    """Markdown for one results file, or the summary of all files on the page."""
    if name == "summary":
        return summary(page, RESULTS)
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if name.startswith("decode"):
        return "\n\n".join([decode(result), _made(result)])
    if result.get("kind") == "vllm_serve":
        return "\n\n".join([vllm(result), _made(result)])
    if result.get("kind") == "evidence":
        return f"{comparison(result['comparison'])}\n\n{evidence(result)}\n\n{_made(result)}"
    if "verdict" in result and "rows" in result:
        return comparison(result)
    if "study" in result:
        return study(result)
    if result.get("kind") == "flan8":
        return flan8(result)
    if result.get("kind") == "federations":
        return federations(result)
    if result.get("kind") == "shared_factor":
        return shared_factor(result)
    if result.get("kind") == "loss_positions":
        return loss_positions(result)
    if result.get("kind") == "memory":
        return memory(result)
    if result.get("kind") == "export_cost":
        return export_cost(result)
    if result.get("kind") == "privacy":
        latest = max((one["environment"] for one in result["cells"]), key=itemgetter("date"))
        return f"{privacy(result)}\n\n{_made({**result, 'environment': latest})}"
    if result.get("kind") == "many_sites":
        return many_sites(result)
    if result.get("kind") == "coverage":
        return coverage(result)
    if result.get("kind") == "advise":
        return advise_tables(result)
    if "many_clients" in result:
        return federated_round(result)
    return layer(result) if "goals" in result else acceptance(result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = _BLOCK.sub(lambda block: f"{block[1]}{draw(block[2], before)}\n{block[3]}", before)
    if check and before != after:
        print(
            f"{PAGE}: out of date; run python scripts/document_results.py",
            file=sys.stderr,
        )
        return 1
    if not check:
        PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
