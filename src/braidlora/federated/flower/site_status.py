"""`braidlora site status`: rounds, who took part, who is late, bytes and loss per site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braidlora.errors import ConfigError
from braidlora.federated.flower.control import connected_sites, is_up, nodes_now
from braidlora.federated.flower.last_run import last_run
from braidlora.federated.flower.settings import read_server
from braidlora.federated.flower.start import read_status
from braidlora.federated.flower.status import now_text
from braidlora.json_text import loads
from braidlora.tables import format_bytes, text_table


def site_status(folder: Path) -> dict[str, Any]:
    """What a server is doing, and what its current or last run has done.

    `connected` of a site is what the SuperLink says now; None if it does not answer, or cannot tell sites apart.

    Raises:
        ConfigError: the folder is no server's.
    """
    folder = folder.absolute()
    settings = read_server(folder)
    up = is_up(folder, settings)
    nodes = nodes_now(folder, settings) if up else None
    connected = connected_sites(settings, nodes or [])
    status = read_status(folder) or {}
    run = last_run(folder, status)
    known = status.get("sites", {}) if run.has_status else {}
    lines = _lines(run.output) if run.output is not None else []
    sites: dict[str, Any] = {}
    for name in sorted({*settings.sites, *known}):
        now = known.get(name, {})
        trained = [line["clients"][name] for line in lines if "loss" in line["clients"].get(name, {})]
        failed = [line["failed"][name] for line in lines if name in line.get("failed", {})]
        there = connected.get(name)
        if nodes is None:
            there = None
        elif there is None and run.state == "running":  # without keys the server app alone knows
            there = now.get("connected")
        sites[name] = {
            "connected": there,
            "seen": now_text() if there else now.get("seen"),
            "waiting_since": now.get("waiting_since") if run.active else None,
            "last": now.get("last"),
            "base": now.get("base"),
            "rounds": len(trained),
            "left_out": sum(one["left_out"] for one in failed),
            "loss": trained[-1]["loss"] if trained else None,
            "up": sum(one["up"] for one in trained) + sum(one.get("up", 0) for one in failed),
            "down": sum(one["down"] for one in trained) + sum(one.get("down", 0) for one in failed),
        }
    text = run.text(len(lines))
    if run.state == "running":
        text = str(status["phase"])
    return {
        "superlink": up,
        "address": f"{settings.host}:{settings.port}",
        "nodes_online": None if nodes is None else sum(one["status"] == "online" for one in nodes),
        "output": str(run.output) if run.output is not None else None,
        "phase": None if run.state == "none" else text,
        "run": {"active": run.active, "state": run.state, "text": text, "error": run.error or None},
        "rounds": len(lines),
        "counted": sum(line["counted"] for line in lines),
        "sites": sites,
        "notes": status.get("notes", []) if run.has_status else [],
    }


def format_status(status: dict[str, Any]) -> str:
    """The status as text."""
    header = ["site", "connected", "rounds", "left out", "loss", "up", "down", "base", "now"]
    rows = []
    active = status["run"]["active"]
    for name, one in status["sites"].items():
        late = f"awaited since {one['waiting_since']}" if one["waiting_since"] else (one["last"] or "")
        rows.append([
            name,
            {True: "yes", False: "no", None: "unknown"}[one["connected"]],
            str(one["rounds"]),
            str(one["left_out"]),
            f"{one['loss']:.4f}" if one["loss"] is not None else "",
            format_bytes(one["up"]),
            format_bytes(one["down"]),
            _form(one["base"]),
            late if active else "",
        ])  # fmt: skip
    head = f"SuperLink  {status['address']}, {'running' if status['superlink'] else 'not running'}"
    if (online := status["nodes_online"]) is not None:
        head += f"; {online} SuperNode{'' if online == 1 else 's'} online"
    head += "\n"
    if status["output"]:
        head += f"Run        {status['output']}\n"
        head += f"Rounds     {status['rounds']} committed, {status['counted']} counted\n"
    head += f"Now        {status['run']['text']}\n"
    notes = "".join(f"\n  {note}" for note in status["notes"][-10:])
    return head + "\n" + text_table(header, rows) + (f"\n\nNotes{notes}" if notes else "")


def _form(base: dict[str, str] | None) -> str:
    """The dtype of a base model, or how it is quantized."""
    if base is None:
        return ""
    return base["dtype"] if base["quantization"] == "none" else base["quantization"]


def _lines(output: Path) -> list[dict[str, Any]]:
    try:
        return [loads(line) for line in (output / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    except ValueError:
        raise ConfigError(f"{output / 'rounds.jsonl'}: damaged; see `braidlora verify {output}`.") from None
