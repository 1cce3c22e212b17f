"""`braidlora generate`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braidlora.cli._common import verb
from braidlora.cli._predict import TARGETS, add_server, add_sources, remote_or_local, sources_here
from braidlora.errors import ConfigError, DataError
from braidlora.terminal import json_printable, say

if TYPE_CHECKING:
    from braidlora.inference.model import Model
    from braidlora.inference.sampling import Sampling
    from braidlora.inference.target import Target


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "generate",
        _run,
        "generate text from prompts, or chat, with a trained adapter or a base model",
        overrides=False,
    )
    parser.add_argument("target", help=f"{TARGETS}; or a base model")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeatable")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="prompts: a text file with one per line, or json or jsonl with `prompt`, `instruction` and `input`, or "
        "`messages` and `tools`; - for stdin",
    )
    parser.add_argument(
        "--chat", action="store_true", help="read a conversation from stdin, one user message per line"
    )
    parser.add_argument("--system", metavar="TEXT", help="the chat's system message")
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="task whose template is applied to the prompts, if the templates differ; an adapter that weights its "
        "experts by task needs it, with --raw and --chat too",
    )
    parser.add_argument("--raw", action="store_true", help="use the prompts unchanged, without a template")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest answer, in tokens (default: the recipe's)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default): always the most likely token",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most likely tokens with this total probability",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; repeatable"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts per batch (default: the recipe's)"
    )
    add_sources(parser)
    add_server(parser)


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    if sum((args.prompt is not None, args.file is not None, args.chat)) != 1:
        raise ConfigError("give one of --prompt TEXT, --file FILE and --chat.")
    if args.system is not None and not args.chat:
        raise ConfigError("--system sets the system message of a chat; it requires --chat.")
    if args.model is not None and args.url is None:
        raise ConfigError("--model is a model name on a server; it requires --url.")
    sources_here(args)
    prompts = args.prompt if args.file is None else _prompts(args.file)
    from braidlora.inference.sampling import Sampling
    from braidlora.inference.target import find_target

    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed, tuple(args.stop)
    )
    target = find_target(args.target, base=args.base, recipe=args.recipe)
    if args.task is not None and (args.raw or args.chat) and not _by_task(target):
        raise ConfigError("--task selects a template, which --raw and --chat do not use; remove it.")
    model = remote_or_local(args, target)
    if args.chat:
        _chat(model, sampling, args)
        return
    options = {"raw": args.raw, "sampling": sampling, "batch_size": args.batch_size}
    if len(prompts) == 1 and sys.stdout.isatty() and not args.json and args.url is None:
        model.generate(prompts[0], args.task, streamer=_streamer(model, sampling), **options)
        return
    size = model.batch_size(args.batch_size)
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        for number, text in enumerate(model.generate(part, args.task, **options), start + 1):
            if args.json:
                line = {"row": number, "prompt": prompts[number - 1], "text": text}
                say(json_printable(json.dumps(line, ensure_ascii=False)), flush=True)
            else:
                say(text, flush=True)


def _by_task(target: Target) -> bool:
    """Whether the target is an adapter that is another LoRA for each of its tasks."""
    from braidlora.serving.adapter_file import read_adapter_file

    folder = target.origin.folder
    return folder is not None and read_adapter_file(folder).by_task


def _prompts(name: str) -> list[Any]:
    """The prompts of a file: texts, rows, or chats.

    Raises:
        DataError: the file cannot be read, or a line is none of these.
    """
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        lines = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{name}: is not UTF-8 text; save it as UTF-8.") from None
    if not lines:
        raise DataError(f"{name}: holds no prompt.")
    if Path(name).suffix == ".json" and lines[0].lstrip().startswith("["):
        return _prompts_of_list(name, "\n".join(lines))
    if Path(name).suffix not in (".jsonl", ".json") and not lines[0].startswith("{"):
        return [line.rstrip("\r") for line in lines]
    return [
        _prompt(f"{name}:{number}", _parsed(f"{name}:{number}", line)) for number, line in enumerate(lines, 1)
    ]


def _prompts_of_list(name: str, text: str) -> list[Any]:
    values = _parsed(name, text)
    if not isinstance(values, list) or not values:
        raise DataError(f"{name}: expected a list of prompts.")
    return [_prompt(f"{name}, prompt {number}", value) for number, value in enumerate(values, 1)]


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}.") from None


def _prompt(place: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if value.get("messages") or value.get("conversations"):
            return value
        if isinstance(value.get("prompt"), str):
            return value["prompt"]
        if "instruction" in value or "input" in value:
            return value
    there = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
    raise DataError(f"{place}: expected `prompt`, `instruction` and `input`, or `messages`; got {there}.")


def _streamer(model: Model, sampling: Sampling) -> Any:
    from braidlora.inference.streaming import Printer

    return Printer(model.tokenizer, sampling.stop)


def _chat(model: Model, sampling: Sampling, args: argparse.Namespace) -> None:
    """Answer one line after the other, with all that was said before."""
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        if on_terminal:
            say("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\r\n")})
        live = sys.stdout.isatty() and not args.json and args.url is None
        text = model.generate(
            messages,
            task=args.task,
            sampling=sampling,
            streamer=_streamer(model, sampling) if live else None,
        )
        messages.append({"role": "assistant", "content": text})
        if args.json:
            say(json_printable(json.dumps({"text": text}, ensure_ascii=False)), flush=True)
        elif not live:
            say(text, flush=True)
