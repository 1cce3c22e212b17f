"""`braidlora demo --federated`: eight clients, trained separately and together, with a table of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braidlora.config import FederatedConfig, load_config, override_config
from braidlora.federated.simulation.driver import FederationResult, federate
from braidlora.runs import FederatedDirectory, atomic_write_json, hold
from braidlora.tables import format_bytes, text_table
from braidlora.terminal import say


def federated_demo(
    overrides: Sequence[str] = (), *, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train the clients of the `fed_demo` recipe alone (rule `local`) and together, and print both scores.

    A stopped demo is resumed, and a finished one is shown again, unless `overwrite` is set.

    Args:
        overrides: dotted overrides of the `fed_demo` recipe.
        overwrite: start over if an earlier demo is there.
        quiet: print nothing, show no progress.

    Returns:
        `{"alone": metrics, "together": metrics, "directories": [...]}`; also written to `demo.json` in the recipe's
        `output`.
    """
    config = load_config("fed_demo", overrides, FederatedConfig)
    root = FederatedDirectory.at(config.output).path
    rule = config.federation.rule

    def run(changes: Mapping[str, Any], local_run: Path | None) -> FederationResult:
        return federate(
            override_config(config, changes),
            resume=None if overwrite else "auto",
            overwrite=overwrite,
            local_run=local_run,
            progress=not quiet,
        )

    show = (lambda text: None) if quiet else say
    with hold(root):
        clients, output = len(config.clients() or []), str(root / "local")
        show(f"Training {clients} clients separately in {output}.")
        alone = run({"federation.rule": "local", "federation.evaluate_every": 0, "output": output}, None)
        show(f"Training the same clients together with rule {rule} in {root / rule}.")
        together = run({"output": str(root / rule)}, alone.directory)
        report = {
            "alone": alone.metrics,
            "together": together.metrics,
            "directories": [str(alone.directory), str(together.directory)],
        }
        atomic_write_json(root / "demo.json", report)
        show(_table(alone.metrics, together.metrics))
        show(
            f"\nRun directory  {together.directory}\nAdapters       {together.directory}/clients/NAME/adapter"
        )
    return report


def _table(alone: Mapping[str, Any], together: Mapping[str, Any]) -> str:
    rows: list[list[object]] = [
        [name, alone["clients"][name]["aggregated"], one["aggregated"], one["after"]]
        for name, one in together["clients"].items()
    ]
    rows.append(["mean", alone["mean"], together["mean"], together["after"]["mean"]])
    header = ["client", "alone", "together", "after last training"]
    sent = together["bytes"]
    lines = [
        text_table(header, rows, rules=[len(rows) - 1]),
        "",
        f"together is the aggregated model of rule {together['rule']} after {together['rounds']} rounds; the last "
        "column has the models after their last local training, before averaging.",
    ]
    if together["delta_m"] is not None and together["after"]["delta_m"] is not None:
        lines.append(
            f"Δm% relative to clients that train alone (lower is better): together {together['delta_m']:+.1f}, "
            f"after last training {together['after']['delta_m']:+.1f}."
        )
    lines.append(f"sent up {format_bytes(sent['up'])}, down {format_bytes(sent['down'])}")
    return "\n".join(lines)
