"""The command that starts a server, for each engine, and why an engine cannot host an adapter."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from braidlora.adapters.base_edits import base_edit, why_refused
from braidlora.errors import ConfigError
from braidlora.serving.adapter_file import (
    ALLOWED_RANKS,
    FACTORED,
    MULTI,
    PLAIN,
    describe_columns,
    head_refusal,
    read_shapes,
    refusals,
    smallest_allowed_rank,
)
from braidlora.serving.key import VARIABLE, Key, is_loopback
from braidlora.serving.targets import BASE_NAME, Hosting, Served
from braidlora.serving.vllm.folders import VARIABLE as FOLDERS

ENGINES = ("vllm", "transformers")
_MOST_SLOTS = 8  # adapters in one batch by default; each takes memory in every layer
# Arguments of vLLM that `serve` sets, and what to use for them.
_SAME_OPTION = "use the option of that name of `braidlora serve`"
_RESERVED = {
    **dict.fromkeys(("--host", "--port", "--dtype", "--max-loras", "--max-lora-rank"), _SAME_OPTION),
    "--model": "use --base",
    "--api-key": f"use --api-key-file, or the variable {VARIABLE}",
    **dict.fromkeys(
        ("--served-model-name", "--enable-lora", "--lora-modules", "--max-cpu-loras"),
        "it follows from the targets",
    ),
}


@dataclass(frozen=True)
class Options:
    """How a server is started.

    Attributes:
        host, port: where it listens.
        key: its API key.
        key_file: the file of the key, if it is from one.
        max_loras: adapters in one batch; None for as many as there are, at most 8.
        max_lora_rank: of the server; None for the smallest that all adapters fit.
        load_from: folders that adapters may be loaded from while the server runs; None for any folder where only this
            machine reaches the server, and otherwise no loading.
        extra: further arguments for vLLM.
        dtype: of the base; None for that of the recipe.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: Key | None = None
    key_file: str | None = None
    max_loras: int | None = None
    max_lora_rank: int | None = None
    load_from: tuple[Path, ...] | None = None
    extra: tuple[str, ...] = ()
    dtype: str | None = None

    @property
    def loads(self) -> bool:
        """Whether adapters may be loaded while the server runs."""
        return bool(self.load_from) or (self.load_from is None and is_loopback(self.host))

    @property
    def url(self) -> str:
        """Where clients on this machine find it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"


@dataclass(frozen=True)
class Start:
    """A command and what it needs from the environment.

    Attributes:
        command: the words.
        environment: variables that may be shown.
        secrets: variables with a value that may not, and how to write it in a shell.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Key] = field(default_factory=dict)

    def shown(self) -> str:
        """The command as one may type it; keys are not in it."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words += [f'{name}="{key.shell}"' for name, key in self.secrets.items()]
        return " ".join([*words, shlex.join(self.command)])

    def variables(self) -> dict[str, str]:
        """The environment of the process."""
        secrets = {name: key.value for name, key in self.secrets.items()}
        return {**os.environ, **self.environment, **secrets}


def problems(hosting: Hosting, engine: str) -> list[str]:
    """Why this engine cannot host some of the adapters, one line each."""
    return [
        f"{one.name} ({one.folder}): {'; '.join(why)}"
        for one in hosting.adapters.values()
        if (
            why := _edited_base(one) or (_not_in_vllm(one) if engine == "vllm" else _not_in_transformers(one))
        )
    ]


def _edited_base(one: Served) -> list[str]:
    setting = base_edit(one.config.model_extra or {})
    return [why_refused(setting)] if setting is not None else []


def _not_in_vllm(one: Served) -> list[str]:
    predict = "use `braidlora predict`"
    if one.target.kind == "classify":
        return [
            f"a classifier's adapter with a head of its own (modules_to_save: "
            f"{', '.join(one.config.modules_to_save or ['…'])}), which vLLM does not load; {predict}, or for other "
            "trained modules --engine transformers"
        ]
    if one.config.peft_type not in (MULTI, FACTORED, PLAIN):
        return [f"its type {one.config.peft_type} is not one that vLLM loads; use --engine transformers"]
    why = refusals(one.config)
    if not why and one.config.ours:
        head = head_refusal(read_shapes(one.folder, one.config.peft_type))
        why += [head] if head else []
    if one.config.by_task:
        return why
    return [*why, "use --engine transformers, or `braidlora predict`"] if why else []


def _not_in_transformers(one: Served) -> list[str]:
    if one.config.by_task:
        return refusals(one.config)[:1]
    if one.target.kind == "classify":
        return ["a classifier, and transformers' server only generates text; use `braidlora predict`"]
    return []


def quantization_warning(hosting: Hosting, engine: str, options: Options) -> str | None:
    """What differs from training if adapters were trained on a quantized base; None if nothing does."""
    trained = hosting.quantizations
    listed = ", ".join(f"{name} ({quantization})" for name, quantization in trained.items())
    if engine == "transformers":
        if len({*trained.values()}) < 2:
            return None
        return (
            f"the adapters were trained on bases of different quantization: {listed}. Each is loaded with its own, "
            f"and `{BASE_NAME}` with that of the first."
        )
    given = {word.partition("=")[0] for word in options.extra}
    if {*trained.values()} <= {"none"} or given & {"--quantization", "-q"}:
        return None
    return (
        f"vLLM loads the base unquantized, and adapters were trained on a quantized one: {listed}. Answers may differ; "
        "--engine transformers loads it as in training."
    )


def start(hosting: Hosting, engine: str, options: Options) -> Start:
    """The command for an engine.

    Raises:
        ConfigError: it cannot host the adapters, or an option does not fit.
    """
    if found := problems(hosting, engine):
        raise ConfigError(f"the engine {engine} cannot host:\n  " + "\n  ".join(found))
    return _vllm(hosting, options) if engine == "vllm" else _transformers(hosting, options)


def needed_rank(hosting: Hosting) -> int:
    """The smallest --max-lora-rank that vLLM allows and all adapters fit."""
    ranks = [
        smallest_allowed_rank(one.layout.columns, one.name)
        for one in hosting.adapters.values()
        if one.layout is not None
    ]
    return max(ranks, default=ALLOWED_RANKS[2])


def _vllm(hosting: Hosting, options: Options) -> Start:
    for word in options.extra:
        if instead := _RESERVED.get(word.partition("=")[0].replace("_", "-")):
            raise ConfigError(
                f"--engine-args: `braidlora serve` sets {word.partition('=')[0]} itself; {instead}."
            )
    needed = needed_rank(hosting)
    rank = options.max_lora_rank or needed
    if rank not in ALLOWED_RANKS:
        raise ConfigError(f"--max-lora-rank: got {rank}; vLLM allows {', '.join(map(str, ALLOWED_RANKS))}.")
    too_small = [
        f"{one.name} needs {describe_columns(one.layout)}"
        for one in hosting.adapters.values()
        if one.layout is not None and one.layout.columns > rank
    ]
    if too_small:
        raise ConfigError(f"--max-lora-rank: got {rank}; {'; '.join(too_small)}. Give at least {needed}.")
    slots = options.max_loras or max(1, min(len(hosting.adapters), _MOST_SLOTS))
    stored = max(slots, len(hosting.adapters) + (_MOST_SLOTS if options.loads else 0))
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", hosting.source, "--served-model-name", BASE_NAME,
        "--host", options.host, "--port", str(options.port),
    ]  # fmt: skip
    if hosting.section.revision:
        command += ["--revision", hosting.section.revision]
    if (dtype := options.dtype or hosting.section.dtype) != "auto":
        command += ["--dtype", dtype]
    if hosting.adapters or options.loads:
        command += [
            "--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(slots), "--max-cpu-loras", str(stored),
        ]  # fmt: skip
    if hosting.adapters:
        command += ["--lora-modules", *(_module(one) for one in hosting.adapters.values())]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if options.loads:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    else:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "0"
    if options.load_from is not None or not is_loopback(options.host):
        folders = [one.folder for one in hosting.adapters.values()] + [
            Path(os.path.realpath(folder)) for folder in options.load_from or ()
        ]
        environment[FOLDERS] = os.pathsep.join(map(str, folders))
    secrets = {"VLLM_API_KEY": options.key} if options.key is not None else {}
    return Start((*command, *options.extra), environment, secrets)


def _module(one: Served) -> str:
    import json

    simple = f"{one.name}={one.folder}"
    # vLLM reads an item with a comma as JSON.
    return json.dumps({"name": one.name, "path": str(one.folder)}) if "," in simple else simple


def _transformers(hosting: Hosting, options: Options) -> Start:
    for name, value in (
        ("--max-loras", options.max_loras),
        ("--max-lora-rank", options.max_lora_rank),
        ("--load-from", options.load_from),
        ("--engine-args", options.extra),
    ):
        if value:
            raise ConfigError(f"{name}: is for the engine vllm; the engine transformers has no such setting.")
    command = [
        sys.executable, "-m", "braidlora.serving.transformers_server",
        "--base", hosting.source, "--host", options.host, "--port", str(options.port),
        "--dtype", options.dtype or hosting.section.dtype,
        *(word for one in hosting.adapters.values() for word in ("--adapter", f"{one.name}={one.folder}")),
    ]  # fmt: skip
    if hosting.section.revision:
        command += ["--revision", hosting.section.revision]
    if (quantization := next(iter(hosting.quantizations.values()), "none")) != "none":
        command += ["--quantization", quantization]
    secrets = {VARIABLE: options.key} if options.key is not None else {}
    return Start(tuple(command), {}, secrets)


def curl_lines(hosting: Hosting, options: Options) -> dict[str, str]:
    """By name of a model, a command that asks it something."""
    import json

    lines = {}
    for name in [BASE_NAME, *hosting.adapters]:
        place, body = _question(hosting.adapters.get(name))
        words = ["curl", f"{options.url}{place}", "-H", "Content-Type: application/json"]
        line = shlex.join(words)
        if (
            options.key is not None
        ):  # printf is part of the shell, so that the key is in no process's arguments
            shell = options.key.shell
            line += f" -H @<(printf 'Authorization: Bearer %s' \"{shell}\")"
        data = json.dumps({"model": name, **body, "max_tokens": 32, "temperature": 0}, ensure_ascii=False)
        lines[name] = f"{line} -d {shlex.quote(data)}"
    return lines


def _question(one: Served | None) -> tuple[str, Mapping[str, object]]:
    """A path and the part of a request that asks an adapter in the form of its first task."""
    example = {"instruction": "The capital of France is", "input": ""}
    tasks = list(one.target.tasks.values()) if one is not None else []
    if not tasks:
        return "/v1/completions", {"prompt": example["instruction"]}
    template = tasks[0].template
    if template.chat:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": example["instruction"]}]}
    return "/v1/completions", {"prompt": template.prompt(example, evaluation=True)}


def arguments(text: str | None) -> Sequence[str]:
    """Words of --engine-args.

    Raises:
        ConfigError: an open quotation mark.
    """
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(f"--engine-args: {error}: {text!r}.") from None
