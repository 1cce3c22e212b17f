"""From rows to tokens: what the model sees, and which tokens carry loss.

    <bos>  p p p p p p  a a a  <eos>
    -100   prompt: -100  answer  eos      labels (the prompt's own tokens with `train_on_prompt`)

Prompt and answer are tokenized separately and concatenated, so that the prompt tokens in training are exactly those
that generation starts from: no token spans the boundary, whatever the tokenizer merges. The one exception is
`llm-adapters-legacy`, which tokenizes both as one string, as the research code does.

In a chat every assistant turn that contributes to the loss is an answer; `chat` finds its characters, `encode_chat` its
tokens. A chat that is too long loses tokens from its start, and a turn that is cut has no loss.

In a row that is too long, the prompt loses tokens from its start (after `<bos>`), because its end holds the last words
of the question and the response marker; answer and EOS are never cut. If these alone exceed the cutoff, the row is
dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from braidlora.config import PromptSection
from braidlora.errors import ConfigError, DataError
from braidlora.tasks._task import ChatRow, Row, Task
from braidlora.tasks.chat import Chat, ChatProblem
from braidlora.tasks.encode_chat import lost_tokens, tokenized_turns
from braidlora.tasks.templates import Template

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One encoded row.

    Attributes:
        input_ids: all tokens.
        labels: as long as `input_ids`, -100 where a token carries no loss (the first never does, because nothing
            predicts it). Empty for `classify`, which has one label per row.
        truncated: whether prompt (or text) tokens were cut off.
        whole: how many tokens it would have without a cutoff.
        prompt: how many of `input_ids` are the prompt's; all for `classify`.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    whole: int
    prompt: int


@dataclass(frozen=True)
class Rejected:
    """Why a chat cannot be trained on under this template; `prompt.bad_rows: skip` skips and counts it."""

    problem: str


def encode_examples(
    rows: Sequence[Row], template: Template, tokenizer: Any, prompt: PromptSection
) -> list[Encoded | Rejected | None]:
    """Encode training rows of a `generate` task, tokenized in one batch.

    Returns:
        the encoded rows; None for one whose answer and EOS alone exceed `prompt.cutoff`. A chat gives several where one
        sequence cannot hold all its turns exactly.

    Raises:
        ConfigError: the tokenizer has no EOS token, or no chat template although the template needs one.
        DataError: the chat template rejects a row, or its labels would not be exact; with `prompt.bad_rows: skip` such
            a row is `Rejected` instead.
    """
    eos = eos_token(tokenizer)
    if template.chat:
        return [one for row in rows for one in _chat(row, template, tokenizer, prompt)]
    start = bos_tokens(tokenizer)
    prompts = [template.prompt(row, tokenizer) for row in rows]
    prompt_tokens = _tokenize(prompts, tokenizer)
    if template.joint:
        texts = [text + row["output"] for text, row in zip(prompts, rows, strict=True)]
        answers = []
        for at, joint in enumerate(_tokenize(texts, tokenizer)):
            shared = _common_prefix(prompt_tokens[at], joint)
            prompt_tokens[at] = joint[:shared]
            answers.append(joint[shared:])
    else:
        answers = _tokenize([row["output"] for row in rows], tokenizer)
    encoded: list[Encoded | Rejected | None] = []
    for before, answer in zip(prompt_tokens, answers, strict=True):
        answer = _ended(answer, eos)
        kept = _fit(start, before, prompt.cutoff - len(answer))
        if kept is None:
            encoded.append(None)
            continue
        input_ids = kept + answer
        labels = list(input_ids) if prompt.train_on_prompt else [IGNORED] * len(kept) + answer
        labels[0] = IGNORED
        full = len(start) + len(before)
        encoded.append(Encoded(input_ids, labels, len(kept) < full, full + len(answer), len(kept)))
    return encoded


def _chat(
    row: Row, template: Template, tokenizer: Any, prompt: PromptSection
) -> Iterator[Encoded | Rejected | None]:
    try:
        sequences = Chat.of(row, template.variables).sequences(tokenizer, prompt.train_on_turns)
    except ChatProblem as problem:
        place = row.place if isinstance(row, ChatRow) else ""
        message = f"{place}: {problem}" if place else str(problem)
        if prompt.bad_rows == "stop":
            raise DataError(
                f"{message} To skip and count such training rows, set prompt.bad_rows=skip."
            ) from None
        yield Rejected(message)
        return
    for text, spans in sequences:
        for ids, turns in tokenized_turns(text, spans, lambda texts: _tokenize(texts, tokenizer)):
            yield _labeled(ids, turns, tokenizer, prompt)


def _labeled(
    ids: list[int], turns: list[tuple[int, int]], tokenizer: Any, prompt: PromptSection
) -> Encoded | None:
    """The tokens of a chat that ends with its last turn with loss; `turns` are those turns."""
    end = len(ids)
    while end and tokenizer.decode([ids[end - 1]]).isspace():  # the template's marks may include a line break
        end -= 1
    if ids[end - 1] != eos_token(tokenizer):  # a template may close turns with EOS
        ids = [*ids, eos_token(tokenizer)]
        turns = [*turns[:-1], (turns[-1][0], len(ids))]
    cut = lost_tokens(turns, prompt.cutoff)
    if cut is None:
        return None
    labels = list(ids) if prompt.train_on_prompt else [IGNORED] * len(ids)
    for start, end in turns:
        if start >= cut:  # a turn that is cut has no loss
            labels[start:end] = ids[start:end]
    labels[cut] = IGNORED
    return Encoded(ids[cut:], labels[cut:], cut > 0, len(ids), max(0, turns[0][0] - cut))


def written_answers(task: Task, tokenizer: Any) -> Task:
    """The task with references for test rows whose answer is a tool call: the call as its chat template writes it.

    Raises:
        DataError: the chat template rejects a row.
    """
    if not any("messages" in row for row in task.test[:1]):
        return task
    return replace(task, test=[_with_written_answer(row, task.template, tokenizer) for row in task.test])


def _with_written_answer(row: Row, template: Template, tokenizer: Any) -> Row:
    if "tool_calls" not in row["messages"][-1]:
        return row
    try:
        [(text, turns)] = Chat.of(row, template.variables).sequences(tokenizer, "last")
    except ChatProblem as problem:
        raise DataError(f"{row.place if isinstance(row, ChatRow) else ''}: {problem}") from None
    [ids] = _tokenize([text[turns[0][0] : turns[-1][1]]], tokenizer)
    new = ChatRow({**row, "answer": str(tokenizer.decode(ids, skip_special_tokens=True)).strip()})
    new.place = row.place if isinstance(row, ChatRow) else ""
    return new


def encode_prompt(row: Row, template: Template, tokenizer: Any, cutoff: int) -> list[int]:
    """The tokens that generation starts from: those of the training prompt, truncated at the start to `cutoff` tokens.

    Raises:
        ConfigError: as `encode_examples`.
    """
    start = [] if template.chat else bos_tokens(tokenizer)
    tokens = _tokenize([template.prompt(row, tokenizer, evaluation=True)], tokenizer)[0]
    kept = _fit(start, tokens, cutoff)
    assert kept is not None  # a cutoff is never negative
    return kept


def prompt_lengths(rows: Sequence[Row], template: Template, tokenizer: Any) -> list[int]:
    """The number of tokens of every test row's prompt, before any cut; for `classify`, with special tokens."""
    if not rows:
        return []
    if "text" in rows[0]:
        texts = [template.prompt(row) for row in rows]
        return [
            len(ids) for ids in tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
        ]
    start = 0 if template.chat else len(bos_tokens(tokenizer))
    texts = [template.prompt(row, tokenizer, evaluation=True) for row in rows]
    return [start + len(ids) for ids in _tokenize(texts, tokenizer)]


def encode_answer(answer: str, tokenizer: Any) -> list[int]:
    """The tokens of an answer as they follow the prompt in training, including EOS (for ranking options)."""
    return _ended(_tokenize([answer], tokenizer)[0], eos_token(tokenizer))


def encode_texts(rows: Sequence[Row], template: Template, tokenizer: Any, cutoff: int) -> list[Encoded]:
    """Encode rows of a `classify` task with the tokenizer's special tokens; long texts are truncated at the end."""
    texts = [template.prompt(row) for row in rows]
    tokens = tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]
    encoded = []
    for text, ids in zip(texts, tokens, strict=True):
        whole = len(ids)
        if whole > cutoff:
            ids = tokenizer(text, truncation=True, max_length=cutoff)["input_ids"]
        encoded.append(Encoded(list(ids), [], whole > cutoff, whole, len(ids)))
    return encoded


def eos_token(tokenizer: Any) -> int:
    """The id of EOS, which ends every answer.

    Raises:
        ConfigError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model: the tokenizer of {getattr(tokenizer, 'name_or_path', '')} has no EOS token, so the model cannot "
            "learn where an answer ends. Set `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def bos_tokens(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer starts sequences with it, otherwise []."""
    if tokenizer.bos_token_id is None:
        return []
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [int(tokenizer.bos_token_id)] if starts else []


def _tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # verbose=False: no warning about long sequences, which are truncated later.
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [list(row) for row in encoded["input_ids"]]


def _ended(answer: list[int], eos: int) -> list[int]:
    # A chat template may close the turn with the EOS token itself.
    return answer if answer[-1:] == [eos] else [*answer, eos]


def _fit(start: list[int], tokens: list[int], room: int) -> list[int] | None:
    """`start` and as many of the last `tokens` as fit into `room`; None if `room` is negative."""
    if room < 0:
        return None
    # If there is hardly any room, the response marker is worth more than <bos>.
    start = start[: max(0, room - 1)] if tokens else start[:room]
    keep = room - len(start)
    return start + tokens[max(0, len(tokens) - keep) :]


def _common_prefix(a: list[int], b: list[int]) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in same)
