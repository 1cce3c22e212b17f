"""From the text of a chat to tokens: every turn with loss follows exactly the tokens that generation starts from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Span = tuple[int, int]
Tokenize = Callable[[list[str]], list[list[int]]]


def tokenized_turns(
    text: str, spans: Sequence[Span], tokenize: Tokenize
) -> list[tuple[list[int], list[Span]]]:
    """Token ids with the (start, end) tokens of the turns with loss; usually one sequence for all turns.

    The tokens before a turn are those of the text before it, as generation reads it, and no token spans an end of the
    turn. A turn for which the tokens of the entire text differ from that gets a sequence of its own: where a tokenizer
    merges an answer's first line break with those of the prompt, or reads line breaks at the end of a text otherwise.

    Args:
        text: a rendered chat.
        spans: the characters of the turns with loss, in order.
        tokenize: texts → token ids, without special tokens.
    """
    cuts = sorted({at for span in spans for at in span})
    edges = [0, *cuts]
    whole, *parts = tokenize([text[: cuts[-1]], *(text[a:b] for a, b in itertools.pairwise(edges))])
    if list(itertools.chain(*parts)) == whole:
        ends = list(itertools.accumulate(map(len, parts)))
        count = dict(zip(cuts, ends, strict=True))
        return [(whole, [(count[start], count[end]) for start, end in spans])]
    # Also tokenizers that put a blank before the first word of a text, such as Llama 2's, come here.
    found: list[tuple[list[int], list[Span]]] = []
    together: list[Span] = []
    for start, end in spans:
        before, until, alone = tokenize([text[:start], text[:end], text[start:end]])
        answer = until[len(before) :] if until[: len(before)] == before else alone
        turn = (len(before), len(before) + len(answer))
        if whole[: turn[1]] == before + answer:
            together.append(turn)
        else:
            found.append((before + answer, [turn]))
    return [*found, (whole[: together[-1][1]], together)] if together else found


def lost_tokens(turns: Sequence[Span], cutoff: int) -> int | None:
    """How many tokens a chat loses at its start so that `cutoff` are left up to the end of its last turn with loss.

    None if that turn alone is longer.

    Args:
        turns: the (start, end) tokens of the turns with loss, in order.
    """
    start, end = turns[-1]
    return None if end - start > cutoff else max(0, end - cutoff)
