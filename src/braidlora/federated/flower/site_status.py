"""`braidlora site status`: rounds, who took part, who is late, bytes and loss per site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braidlora.errors import ConfigError
from braidlora.federated.flower.serve import is_up
from braidlora.federated.flower.settings import read_server
from braidlora.federated.flower.start import read_status
from braidlora.json_text import loads
from braidlora.tables import format_bytes, text_table


def site_status(folder: Path) -> dict[str, Any]:
    """What a server is doing, and what its current or last federation has done.

    Raises:
        ConfigError: the folder is no server's.
    """
    settings = read_server(folder)
    status = read_status(folder) or {}
    lines = _lines(Path(status["output"])) if status else []
    sites: dict[str, Any] = {}
    for name in sorted({*settings.sites, *status.get("sites", {})}):
        now = status.get("sites", {}).get(name, {})
        trained = [line["clients"][name] for line in lines if "loss" in line["clients"].get(name, {})]
        failed = [line["failed"][name] for line in lines if name in line.get("failed", {})]
        sites[name] = {
            "connected": now.get("connected", False),
            "seen": now.get("seen"),
            "waiting_since": now.get("waiting_since"),
            "last": now.get("last"),
            "base": now.get("base"),
            "rounds": len(trained),
            "left_out": sum(one["left_out"] for one in failed),
            "loss": trained[-1]["loss"] if trained else None,
            "up": sum(one["up"] for one in trained) + sum(one.get("up", 0) for one in failed),
            "down": sum(one["down"] for one in trained) + sum(one.get("down", 0) for one in failed),
        }
    return {
        "superlink": is_up(folder, settings),
        "address": f"{settings.host}:{settings.port}",
        "output": status.get("output"),
        "phase": status.get("phase"),
        "rounds": len(lines),
        "counted": sum(line["counted"] for line in lines),
        "sites": sites,
        "notes": status.get("notes", []),
    }


def format_status(status: dict[str, Any]) -> str:
    """The status as text."""
    header = ["site", "connected", "rounds", "left out", "loss", "up", "down", "base", "now"]
    rows = []
    for name, one in status["sites"].items():
        late = f"awaited since {one['waiting_since']}" if one["waiting_since"] else (one["last"] or "")
        rows.append([
            name,
            "yes" if one["connected"] else "no",
            str(one["rounds"]),
            str(one["left_out"]),
            f"{one['loss']:.4f}" if one["loss"] is not None else "",
            format_bytes(one["up"]),
            format_bytes(one["down"]),
            _form(one["base"]),
            late,
        ])  # fmt: skip
    head = f"SuperLink  {status['address']}, {'running' if status['superlink'] else 'not running'}\n"
    if status["output"]:
        head += f"Run        {status['output']}\n"
        head += f"Rounds     {status['rounds']} committed, {status['counted']} counted; {status['phase']}\n"
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
