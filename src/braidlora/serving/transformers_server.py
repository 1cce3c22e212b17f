"""transformers' own server with adapters by name: python -m braidlora.serving.transformers_server

It is transformers' server with another way of loading: models are the base and the given adapters and nothing else.
Every one of them is loaded when it is first asked for, with a copy of the base, and unloaded when it is idle for long.
`braidlora serve --engine transformers` starts it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import braidlora  # noqa: F401 (before transformers loads an adapter)
from braidlora.errors import BraidloraError, ConfigError
from braidlora.inference.loading import load_target
from braidlora.inference.target import find_target
from braidlora.serving.key import VARIABLE
from braidlora.serving.targets import BASE_NAME
from braidlora.terminal import say

_IDLE = 900  # seconds


def missing() -> str | None:
    """What transformers' server lacks on this machine, as a sentence."""
    try:
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.server import build_server
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        return f"the installed transformers has no server that braidlora supports ({error}); 5.18 to 5.23 do."
    if not is_serve_available():
        return "transformers' server needs more packages: pip install 'transformers[serving]'."
    wanted = ("_load_model", "_load_processor", "process_model_name", "get_gen_models")
    if lacking := [name for name in wanted if not hasattr(ModelManager, name)] or not callable(build_server):
        return f"the server of the installed transformers is not supported (it lacks {lacking}); 5.18 to 5.23 are."
    return None


def application(
    base: str,
    adapters: dict[str, str],
    *,
    dtype: str = "auto",
    revision: str | None = None,
    quantization: str = "none",
    key: str | None = None,
) -> Any:
    """The FastAPI application.

    Args:
        base: folder or hub name.
        adapters: folders by name.
        dtype, revision: of the base.
        quantization: of the base under its own name; every adapter has it on the base that it was trained on.
        key: API key that requests must have.
    """
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    known = {BASE_NAME: base, **adapters}
    loaded: dict[str, Any] = {}  # between loading the tokenizer and the model, which come together here

    class Adapters(ModelManager):
        """Loads the base and the given adapters, and nothing else."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            name = model_id.removesuffix("@main")
            if name not in known:
                raise HTTPException(404, f"The model {name!r} does not exist; there are {', '.join(known)}.")
            return f"{name}@main"

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "braidlora"} for name in known]

        def load_model_and_processor(
            self, model_id_and_revision: str, *args: Any, **kwargs: Any
        ) -> tuple[Any, Any]:
            kwargs.pop("gguf_file", None)
            try:
                found: tuple[Any, Any] = super().load_model_and_processor(
                    self.process_model_name(model_id_and_revision), *args, **kwargs
                )
                return found
            except BraidloraError as error:
                raise HTTPException(500, str(error)) from error

        def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
            return self._loaded(model_id_and_revision).tokenizer

        def _load_model(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            # The PEFT model, not its base: virtual tokens and Activated LoRA act in PEFT's `generate` alone.
            return loaded.pop(model_id_and_revision).network

        def _loaded(self, model_id_and_revision: str) -> Any:
            name = model_id_and_revision.removesuffix("@main")
            target = find_target(known[name], base=None if name == BASE_NAME else base)
            changed = {"dtype": dtype, "revision": revision}
            if name == BASE_NAME:
                changed["quantization"] = quantization
            section = target.section.model_copy(update=changed)
            model = loaded[model_id_and_revision] = load_target(replace(target, section=section))
            return model

    manager = Adapters(model_timeout=_IDLE, dtype=dtype)
    state = GenerationState(continuous_batching=False, compile=False, cb_config=None)
    chat = ChatCompletionHandler(model_manager=manager, generation_state=state, chat_template_kwargs={})
    app = build_server(
        manager,
        chat_handler=chat,
        completion_handler=CompletionHandler(model_manager=manager, generation_state=state),
        response_handler=ResponseHandler(
            model_manager=manager, generation_state=state, chat_template_kwargs={}
        ),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(
            model_manager=manager, generation_state=state, chat_template_kwargs={}, decision_config=None
        ),
        generation_state=state,
    )
    return app if key is None else WithKey(app, key)


class WithKey:
    """An ASGI application that answers only requests with the key, but for /health.

    Args:
        app: the application.
        key: compared in constant time.
    """

    def __init__(self, app: Any, key: str) -> None:
        self.app, self.digest = app, hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._has_key(scope["headers"]):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _has_key(self, headers: Any) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        kind, _, value = (given[0] if given else b"").partition(b" ")
        own = hashlib.sha256(value).digest()
        return secrets.compare_digest(own, self.digest) and kind.lower() == b"bearer"


def main() -> None:
    """Run the server."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="braidlora.serving.transformers_server", allow_abbrev=False)
    parser.add_argument("--base", required=True)
    parser.add_argument("--revision")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    args = parser.parse_args()
    if problem := missing():
        raise ConfigError(problem)
    adapters = dict(word.split("=", 1) for word in args.adapter)
    for folder in adapters.values():
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder}: no such folder.")
    key = os.environ.pop(VARIABLE, None)
    app = application(
        args.base,
        adapters,
        dtype=args.dtype,
        revision=args.revision,
        quantization=args.quantization,
        key=key,
    )
    uvicorn.run(app, host=args.host, port=args.port, log_level="info")


if __name__ == "__main__":
    try:
        main()
    except BraidloraError as error:
        say(f"braidlora serve: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
