"""An answer on the terminal, word by word, with control characters escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TextStreamer

from braidlora.terminal import say


class Printer(TextStreamer):
    """Prints the answer to a single prompt while it is made, up to the first of `stop`.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer; what may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop, self.pending, self.started, self.stopped = tuple(stop), "", False, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is certain not to be cut off."""
        if not self.stopped:
            self.pending += text
            found = [at for at in map(self.pending.find, self.stop) if at >= 0]
            if found:
                self.pending, self.stopped = self.pending[: min(found)], True
            keep = 0 if stream_end or self.stopped else max(map(len, self.stop), default=1) - 1
            shown = self.pending[: len(self.pending) - keep]
            self.pending = self.pending[len(shown) :]
            if not self.started:
                shown = shown.lstrip()
            self.started = self.started or bool(shown)
            say(shown, end="", flush=True)
        if stream_end:
            say("", flush=True)
