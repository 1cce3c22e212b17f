"""From chats to tokens: the labels are exactly the tokens of the assistant turns that contribute to the loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Tokenize = Callable[[list[str]], list[list[int]]]


def token_cuts(text: str, cuts: Sequence[int], tokenize: Tokenize) -> tuple[list[int], list[int]]:
    """The tokens of `text`, and how many of them lie before each of `cuts`.

    The tokens before a cut are those of the text before it, as generation reads it. Usually they are the first tokens
    of the entire text. Where the tokenizer would merge across a cut (an answer that begins with a line break, after a
    prompt that ends with one), the text is tokenized in two parts.

    Args:
        text: a rendered chat.
        cuts: character positions, ascending.
        tokenize: texts → token ids, without special tokens.
    """
    edges = [0, *cuts, len(text)]
    whole, *parts = tokenize([text, *(text[a:b] for a, b in itertools.pairwise(edges))])
    if [token for part in parts for token in part] == whole:
        return whole, [sum(map(len, parts[: at + 1])) for at in range(len(cuts))]
    # Tokenizers that put a blank before the first word, such as Llama 2's, put one before each part.
    counts: list[int] = []
    for at, (cut, before) in enumerate(zip(cuts, tokenize([text[:cut] for cut in cuts]), strict=True)):
        if whole[: len(before)] != before:
            first, counted = token_cuts(text[:cut], cuts[:at], tokenize)
            rest, later = token_cuts(text[cut:], [one - cut for one in cuts[at + 1 :]], tokenize)
            return first + rest, [*counted, len(first), *(len(first) + count for count in later)]
        counts.append(len(before))
    return whole, counts


def lost_tokens(turns: Sequence[tuple[int, int]], cutoff: int) -> int | None:
    """How many tokens a chat loses at its start so that `cutoff` are left up to the end of its last turn with loss.

    None if that turn alone is longer.

    Args:
        turns: the (start, end) tokens of the turns with loss, in order.
    """
    start, end = turns[-1]
    return None if end - start > cutoff else max(0, end - cutoff)
