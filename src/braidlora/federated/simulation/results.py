"""The results of a federation: a line per round, and the metrics at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braidlora.errors import CheckpointError, ConfigError
from braidlora.evaluation.balance import balance, delta_m
from braidlora.federated.simulation.exchange import Exchange
from braidlora.federated.simulation.resume import is_scoring
from braidlora.federated.site.clients import Clients
from braidlora.federated.site.scores import Scores
from braidlora.runs import FederatedDirectory

STAGES = ("before", "after", "aggregated")


@dataclass(frozen=True)
class LocalRun:
    """Scores of clients that trained alone: S_t of Δm%, with a client in place of a task.

    Args:
        directory: of their federation.
        scores: mean over a client's own tasks, by client.
        rows: the clients' rows, as `partition.json` has them.
    """

    directory: Path
    scores: dict[str, float]
    rows: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> LocalRun:
        """Of a finished federation by rule `local`.

        Raises:
            ConfigError: it is another rule's.
            CheckpointError: it is not a finished federation.
        """
        run = FederatedDirectory(directory)
        if run.state() != "finished":
            raise CheckpointError(
                f"--local-run {directory}: not a finished federation. Expected the output of `braidlora federate "
                "RECIPE --federation.rule=local`."
            )
        metrics = run.read_json(run.metrics.name)
        if metrics["rule"] != "local":
            raise ConfigError(
                f"--local-run {directory}: made by rule {metrics['rule']}; expected rule local."
            )
        # Of the saved models: not every client trained in the last round, and not every training counted.
        scores = {n: one["mean"] for n, one in metrics["clients"].items() if one["mean"] is not None}
        return cls(directory, scores, run.read_json(run.partition.name))

    def check(self, clients: Clients) -> None:
        """Reject scores on other test rows.

        Raises:
            ConfigError: names the clients.
        """
        tested = {name: _test_rows(client) for name, client in clients.report().items()}
        known = {name: _test_rows(rows) for name, rows in self.rows.items()}
        if other := [name for name, rows in tested.items() if known.get(name) != rows]:
            raise ConfigError(
                f"--local-run {self.directory}: has other test rows for {', '.join(other)}, so Δm% would not be "
                "comparable. Run rule local on this recipe."
            )


def _test_rows(report: Mapping[str, Any]) -> dict[str, str]:
    return {task: parts["test"]["sha256"] for task, parts in report["tasks"].items() if "test" in parts}


def round_line(
    round: int,
    why_not: str,
    exchange: Exchange,
    aggregated: Mapping[str, Scores],
    known: Mapping[str, Scores],
    changes: Mapping[str, Mapping[str, float | None]],
    sample: Collection[str],
    *,
    rows_known: bool = True,
) -> dict[str, Any]:
    """A line of rounds.jsonl, without the timing.

    Scores are means over a client's own tasks: `before` training (the model as received), `after` it, and of the
    `aggregated` model; absent in rounds that are not scored, null if a client has no test rows.

    Args:
        why_not: why the round does not count; empty if it does.
        known: scores of the models as received, if the previous round has computed them.
        changes: `Server.changes`.
        sample: the clients that are scored in every scored round. Means are over them, so that those of the last round,
            in which all are scored, compare with those before.
        rows_known: whether clients say how many rows they have.
    """
    clients: dict[str, Any] = {}
    for name, reply in exchange.replies.items():
        clients[name] = {
            "loss": reply.loss,
            "losses": reply.losses,
            "steps": reply.steps,
            "rows": exchange.rows[name] if rows_known else None,
            **changes.get(name, {}),
            "up": exchange.up[name],
            "down": exchange.down[name],
            **_stages("before", reply.before or (known.get(name) if reply.scores is not None else None)),
            **_stages("after", reply.scores),
        }
    for name, scores in aggregated.items():
        clients.setdefault(name, {}).update(_stages("aggregated", scores))
    line: dict[str, Any] = {"round": round, "counted": not why_not, "clients": dict(sorted(clients.items()))}
    if why_not:
        line["why_not"] = why_not
    if exchange.failed:
        line["failed"] = {
            name: {"why": reasons, "codes": exchange.codes[name], "left_out": name not in exchange.replies}
            # The bytes of all other clients' tries are above.
            | ({} if name in exchange.replies else {"up": exchange.up[name], "down": exchange.down[name]})
            for name, reasons in exchange.failed.items()
        }
    line["bytes"] = {"up": sum(exchange.up.values()), "down": sum(exchange.down.values())}
    line["means"] = {
        stage: _mean([one.get(stage) for name, one in clients.items() if name in sample]) for stage in STAGES
    }
    return line


def _stages(stage: str, scores: Scores | None) -> dict[str, float | None]:
    if scores is None:
        return {}
    common = {f"{stage}_common": scores.common_mean} if scores.common else {}
    return {stage: scores.mean, **common}


def final_metrics(
    rule: str,
    clients: Clients,
    log: Sequence[str],
    aggregated: Mapping[str, Scores],
    local_run: LocalRun | None,
    *,
    departed: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `metrics.json`, without seconds.

    `tasks`, `mean`, `worst`, `std` and `delta_m` are those of the aggregated models, which are what is saved; the
    same numbers before and after local training are given as well, from the rounds that were scored in the same way.

    Args:
        departed: identities of the clients that have left.
        changes: what has changed since the last round.
    """
    lines = [json.loads(line) for line in log]
    alike = _scored_alike(lines, changes)
    by_client: dict[str, Any] = {}
    # By client, tasks of the common test on which its head was not trained.
    untrained: dict[str, list[str]] = {}
    for name, client in clients.by_name.items():
        own = [line["clients"][name] for line in lines if name in line["clients"]]
        scored = [line["clients"][name] for line in alike if name in line["clients"]]
        trained = [one for one in own if "loss" in one]
        in_vain = [line["failed"][name] for line in lines if name in line.get("failed", {})]
        scores = aggregated[name]
        by_client[name] = {
            "rank": client.rank,
            "rows": trained[-1]["rows"] if trained else None,
            "rounds": len(trained),
            "tasks": scores.own,
            "mean": scores.mean,
            "before": _last(scored, "before"),
            "after": _last(scored, "after"),
            "aggregated": scores.mean,
            "bytes": {
                way: sum(one[way] for one in trained) + sum(one.get(way, 0) for one in in_vain)
                for way in ("up", "down")
            },
        }
        if scores.common:
            by_client[name]["common"] = {
                "tasks": scores.common,
                **{stage: _last(scored, f"{stage}_common") for stage in ("before", "after")},
                "aggregated": scores.common_mean,
            }
        tested = [task.name for task in clients.common if task.test and task.name not in scores.common]
        if tested:
            untrained[name] = tested
    metrics: dict[str, Any] = {
        "rule": rule,
        "rounds": len(lines),
        "skipped": [line["round"] for line in lines if not line["counted"]],
        "clients": by_client,
        **_spread({name: one["aggregated"] for name, one in by_client.items()}, local_run),
        "before": _spread({name: one["before"] for name, one in by_client.items()}, local_run),
        "after": _spread({name: one["after"] for name, one in by_client.items()}, local_run),
    }
    if untrained or any("common" in one for one in by_client.values()):
        # If factors stay with clients, every client has its own model: the common test's score is their mean.
        common = [one["common"] for one in by_client.values() if "common" in one]
        metrics["common"] = {stage: _mean([one[stage] for one in common]) for stage in STAGES}
        if untrained:
            metrics["common"]["left_out"] = untrained
            metrics["common"]["left_out_reason"] = (
                "classification heads stay with their clients (federation.share_head is false), and these clients "
                "have not trained theirs on the labels of these tasks"
            )
    metrics["bytes"] = {way: sum(line["bytes"][way] for line in lines) for way in ("up", "down")}
    if departed:
        metrics["departed"] = {name: _departed(name, one, lines) for name, one in departed.items()}
    if failing := _failing(lines):
        metrics["failing"] = failing
    return metrics


def scored_with(clients: Clients, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the scores of `metrics.json` depend on: clients and settings."""
    return {
        "clients": sorted(clients.by_name),
        "settings": {key: value for key, value in settings.items() if is_scoring(key)},
    }


def _scored_alike(lines: list[dict[str, Any]], changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rounds since scoring last changed."""
    later = [line.get("changes", {}) for line in lines[1:]] + [changes]
    breaks = [at for at, one in enumerate(later, 1) if any(map(is_scoring, one.get("settings", {})))]
    return lines[breaks[-1] :] if breaks else lines


def _departed(name: str, identity: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A client that has left: after which round, in how many it trained, and the last score of its model."""
    own = [line["clients"][name] for line in lines if name in line["clients"]]
    left = [line["round"] - 1 for line in lines if name in line.get("changes", {}).get("left", [])]
    return {
        "rank": identity["rank"],
        "left_after": left[-1] if left else lines[-1]["round"],
        "rounds": sum("loss" in one for one in own),
        "last_score": _last(own, "aggregated"),
    }


def _failing(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Clients that were left out: of which rounds, with which codes, and in how many others they trained."""
    found: dict[str, Any] = {}
    for line in lines:
        for name, failed in line.get("failed", {}).items():
            if failed["left_out"]:
                one = found.setdefault(name, {"left_out": [], "trained": 0, "codes": [], "last": ""})
                one["left_out"].append(line["round"])
                one["codes"] = sorted({*one["codes"], *failed["codes"]})
                one["last"] = failed["why"][-1]
    for name, one in found.items():
        one["trained"] = sum("loss" in line["clients"].get(name, {}) for line in lines)
    return dict(sorted(found.items()))


def _spread(scores: Mapping[str, float | None], local_run: LocalRun | None) -> dict[str, Any]:
    """Mean, worst client, population standard deviation and Δm% over the clients that were scored."""
    given = {name: score for name, score in scores.items() if score is not None}
    spread = balance(given)
    change = delta_m(given, local_run.scores if local_run is not None else {})
    result: dict[str, Any] = {
        "mean": spread.mean,
        "worst": spread.worst,
        "worst_client": spread.worst_task,
        "std": spread.std,
        "delta_m": change.value,
    }
    if change.value is None:
        reason = (change.reason or "").replace("single-task reference", "reference").replace("task", "client")
        if local_run is None and given:
            reason = "no finished run of rule `local` was given (--local-run RUN)"
        result["delta_m_reason"] = reason
    return result


def _last(own: Sequence[Mapping[str, Any]], stage: str) -> float | None:
    return next((one[stage] for one in reversed(own) if stage in one), None)


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return math.fsum(given) / len(given) if given else None
