"""Write the tables of docs/reference/federated-rules.md, between their marker comments.

python scripts/document_rules.py          # writes
python scripts/document_rules.py --check  # exits with 1 where the page differs

Properties come from the rules, bytes from `braidlora.federated.protocol.communication`, and measurements from
benchmarks/results/rules.json and aggregate.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from braidlora.federated import RULE_NAMES, AdaptedLayer, get_rule
from braidlora.federated.protocol.communication import traffic
from braidlora.plan.layers import adapted_layers

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "federated-rules.md"
RESULTS = ROOT / "benchmarks" / "results"
PAPER_RANKS = [64, 64, 32, 32, 16, 16, 8, 8]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured(results: dict) -> str:
    """Date and machine of a results file."""
    environment = results["environment"]
    machine, versions = environment["machine"], environment["versions"]
    return (
        f"Measured {environment['date'][:10]} on {machine['cpus']} × {machine['processor']}, "
        f"{environment['threads']} thread, Python {versions['python']}, torch {versions['torch']}."
    )


def properties() -> str:
    """Properties that the rules declare."""
    aggregate = {True: "exact", False: "biased", None: "a factor stays on the client"}
    rows = []
    for name in RULE_NAMES:
        rule = get_rule(name)
        if name == "local":
            rows.append([f"`{name}`", "nothing is shared", "any", "any", "none", "no", "no"])
            continue
        rows.append(
            [
                f"`{name}`",
                aggregate[rule.spec.exact],
                rule.spec.ranks,
                "same for all" if rule.spec.one_scaling else "any",
                "constant" if rule.spec.streams else "grows",
                "yes" if rule.spec.robust else "no",
                "no" if rule.spec.no_privacy else "yes",
            ]
        )
    return table(
        ["rule", "aggregate", "ranks", "scaling s", "server memory", "robust aggregators", "privacy"], rows
    )


def bias() -> str:
    """Error of one round's aggregate, from rules.json."""
    results = json.loads((RESULTS / "rules.json").read_text())
    steps = list(results["bias"][0]["relative_error_by_steps"])
    rows = [
        [f"`{row['rule']}`", row["client_init"], *(_error(row["relative_error_by_steps"][n]) for n in steps)]
        for row in results["bias"]
    ]
    head = ["rule", "`client_init`", *(f"after {n} local steps" for n in steps)]
    return (
        f"{measured(results)} Mean ± standard deviation over {results['seeds']} seeds.\n\n{table(head, rows)}"
    )


def liars() -> str:
    """Error of one round's change with malicious clients among ten, from rules.json."""
    results = json.loads((RESULTS / "rules.json").read_text())
    counts = list(results["liars"][0]["relative_error_by_liars"])
    rows = []
    for row in results["liars"]:
        settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items() if key != "clients")
        errors = (row["relative_error_by_liars"][n] for n in counts)
        rows.append([f"`{row['aggregator']}`", settings, *(_error(error) for error in errors)])
    head = ["aggregator", "settings", *(f"{n} malicious" for n in counts)]
    return (
        f"{measured(results)} Mean ± standard deviation over {results['seeds']} seeds.\n\n{table(head, rows)}"
    )


def _error(value: dict) -> str:
    return "0" if value["mean"] < 1e-12 else f"{value['mean']:.2f} ± {value['std']:.2f}"


def communication() -> str:
    """Parameters and bytes per client and round, Llama-2-7B with q_proj and v_proj, averaged over eight clients."""
    layers = adapted_layers("llama-2-7b", ["q_proj", "v_proj"])
    rows = [_sent(name, f"`{name}`", {}, layers, [8] * 8) for name in RULE_NAMES]
    mixed = [name for name in RULE_NAMES if get_rule(name).spec.ranks == "any" and name != "local"]
    rows += [_sent(name, f"`{name}`", {}, layers, PAPER_RANKS) for name in mixed]
    rows.append(
        _sent("fed-alora-het", "`fed-alora-het`, wire smallest", {"wire": "smallest"}, layers, PAPER_RANKS)
    )
    head = ["rule", "ranks", "upload, M values", "download, M values", "upload, MB", "download, MB"]
    return table(head, rows)


def _sent(name: str, label: str, settings: dict, layers: list[AdaptedLayer], ranks: list[int]) -> list[str]:
    clients = traffic(get_rule(name, **settings), layers, ranks)
    means = [
        sum(getattr(client, what) for client in clients) / len(clients) / 1e6
        for what in ("up_parameters", "down_parameters", "up_bytes", "down_bytes")
    ]
    numbers = [f"{mean:.2f}" for mean in means[:2]] + [f"{mean:.1f}" for mean in means[2:]]
    return [label, "8" if len(set(ranks)) == 1 else "8 … 64", *numbers]


def cost() -> str:
    """CPU time and memory of a server, from aggregate.json."""
    results = json.loads((RESULTS / "aggregate.json").read_text())
    by_rule: dict[str, dict[int, dict]] = {}
    for cell in results["cells"]:
        by_rule.setdefault(cell["rule"], {})[cell["clients"]] = cell
    counts = sorted({cell["clients"] for cell in results["cells"]})

    def each(cells: dict[int, dict], key: str) -> list[str]:
        return [f"{cells[n][key]:.0f}" if n in cells else "" for n in counts]

    rows = [
        [f"`{rule}`", *each(cells, "total_ms"), *each(cells, "memory_grown_MiB")]
        for rule, cells in by_rule.items()
    ]
    head = ["rule", *(f"CPU ms, {n}" for n in counts), *(f"MiB, {n}" for n in counts)]
    return f"{measured(results)}\n\n{table(head, rows)}"


TABLES = {
    "properties": properties, "bias": bias, "communication": communication, "liars": liars, "cost": cost,
}  # fmt: skip


def page_with_tables(page: str) -> str:
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    wanted = page_with_tables(page)
    if args.check:
        if page != wanted:
            sys.exit(
                "docs/reference/federated-rules.md is out of date. Run: python scripts/document_rules.py"
            )
    else:
        PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
