"""A model that a server runs: prompts are made here, as for the model itself, and answered there."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from braidlora.errors import ConfigError
from braidlora.evaluation.questions import Questions
from braidlora.inference.connection import Connection
from braidlora.inference.model import Model
from braidlora.inference.sampling import Sampling
from braidlora.inference.target import Target
from braidlora.models.location import base_source
from braidlora.models.tokenizer import load_tokenizer

Ids = Sequence[int]


def connect(target: Target, url: str, model: str) -> RemoteModel:
    """The model of `target` at a server.

    Args:
        target: what the server hosts under that name; its tasks, prompts and tokenizer are read here.
        url: of the server.
        model: the name there.

    Raises:
        ConfigError: the server cannot be reached or has no such model; the model is a classifier.
    """
    if target.kind == "classify":
        raise ConfigError(f"--url: {target.given} is a classifier, which no server hosts; leave --url out.")
    return RemoteModel(target, Connection(url, model))


class RemoteModel(Model):
    """As `Model`, with the answers of a server."""

    def __init__(self, target: Target, connection: Connection) -> None:
        source = base_source(target.section)
        tokenizer = load_tokenizer(target.section)
        if target.chat_template is not None:
            tokenizer.chat_template = target.chat_template
        config = transformers.AutoConfig.from_pretrained(source, revision=target.section.revision)
        # What encoding reads of a model: its positions.
        network = SimpleNamespace(config=config, named_modules=list)
        super().__init__(target, network, tokenizer)
        self.connection = connection
        self.ends = _end_tokens(source, target.section.revision, tokenizer)

    def _questions(self, task: Any, settings: Any) -> Questions:
        evaluation = settings.evaluation
        if evaluation.mode == "rank" and not self.connection.is_vllm:
            raise ConfigError(
                "--mode: only vLLM's server returns the log-likelihoods that `rank` needs; use generate."
            )
        if evaluation.mode == "generate" and evaluation.num_beams > 1:
            raise ConfigError(
                f"--url: the recipe uses {evaluation.num_beams} beams, and the server decodes greedily; remove --url."
            )
        return RemoteQuestions(self, task, settings)

    def _continued(
        self, ids: Sequence[Ids], sampling: Sampling, batch_size: int, streamer: Any = None
    ) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(ids), batch_size):
            texts += self.complete(ids[start : start + batch_size], sampling)
        return texts

    def complete(self, prompts: Sequence[Ids], sampling: Sampling) -> list[str]:
        """The continuation of each prompt, without an end token, stripped.

        All settings are given explicitly, because a server fills in those of the base's generation_config.json.
        """
        body: dict[str, Any] = {
            "model": self.connection.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "seed": sampling.seed,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if not self.connection.is_vllm:
            return [self._complete_text(one, body, sampling) for one in prompts]
        body |= {
            "prompt": [list(one) for one in prompts],
            "top_k": sampling.top_k or 0,
            "repetition_penalty": 1.0,
            "stop_token_ids": self.ends,
        }
        choices = sorted(self._ask(body, len(prompts)), key=lambda one: one.get("index", 0))
        return [str(one["text"]).strip() for one in choices]

    def _complete_text(self, prompt: Ids, body: dict[str, Any], sampling: Sampling) -> str:
        """transformers' server takes texts, which it must encode to the same tokens."""
        if sampling.top_k is not None:
            raise ConfigError("--top-k: only vLLM's server supports it.")
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        if self.tokenizer(text)["input_ids"] != list(prompt):
            text = self.tokenizer.decode(prompt, skip_special_tokens=True)
        if self.tokenizer(text)["input_ids"] != list(prompt):
            raise ConfigError(
                "--url: this server only accepts text, and the prompt's tokens cannot be written as text."
            )
        answer: str = self._ask({**body, "prompt": text}, 1)[0]["text"]
        at = [found for found in map(answer.find, sampling.stop) if found >= 0]
        return answer[: min(at, default=len(answer))].strip()

    def log_likelihoods(self, prompt: Ids, options: Sequence[Ids]) -> list[float]:
        """Sum over the tokens of each option of their log-likelihood after the prompt."""
        body = {
            "model": self.connection.model,
            "prompt": [[*prompt, *option] for option in options],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        choices = sorted(self._ask(body, len(options)), key=lambda one: one.get("index", 0))
        sums = []
        for option, choice in zip(options, choices, strict=True):
            steps = choice["prompt_logprobs"][len(prompt) :]
            sums.append(
                sum(float(step[str(token)]["logprob"]) for token, step in zip(option, steps, strict=True))
            )
        return sums

    def _ask(self, body: dict[str, Any], count: int) -> list[dict[str, Any]]:
        answer = self.connection.request("/v1/completions", body)
        choices: list[dict[str, Any]] = answer.get("choices", [])
        if len(choices) != count:
            raise ConfigError(f"--url: {self.connection.url} gave {len(choices)} answers to {count} prompts.")
        return choices


class RemoteQuestions(Questions):
    """The rows of a task, answered by a server."""

    def __init__(self, remote: RemoteModel, task: Any, settings: Any) -> None:
        super().__init__(task, remote.network, remote.tokenizer, settings, None)
        self.remote = remote

    def scored(
        self, missing: Sequence[int]
    ) -> Generator[tuple[int, str, dict[str, float] | None], None, None]:
        if self.mode == "rank":
            for index in missing:
                yield index, *self._ranked(self.prompts[index])
            return
        sampling, size = Sampling(max_new_tokens=self.max_new_tokens), self.evaluation.batch_size
        for start in range(0, len(missing), size):
            indices = missing[start : start + size]
            texts = self.remote.complete([self.prompts[index] for index in indices], sampling)
            for index, text in zip(indices, texts, strict=True):
                yield index, text, None

    def _ranked(self, prompt: Ids) -> tuple[str, dict[str, float]]:
        names = self.task.options or []
        values = self.remote.log_likelihoods(prompt, self.options)
        if self.evaluation.length_normalized:
            values = [value / len(option) for value, option in zip(values, self.options, strict=True)]
        shares = torch.softmax(torch.tensor(values, dtype=torch.float64), 0)
        return names[int(shares.argmax())], dict(zip(names, shares.tolist(), strict=True))


def _end_tokens(source: str, revision: str | None, tokenizer: Any) -> list[int]:
    """The end tokens of the base and of its tokenizer."""
    try:
        own = transformers.GenerationConfig.from_pretrained(source, revision=revision).eos_token_id
    except OSError:
        own = None
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})
