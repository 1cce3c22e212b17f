"""Which routers have a mean to fix."""

import pytest
import torch

from braidlora.adapters.router_means import RouterMean
from braidlora.errors import ConfigError
from braidlora.export.static_weights import _check_called


def mean(tokens):
    return RouterMean(torch.tensor([0.5, 0.5], dtype=torch.float64), 1.0, tokens)


def test_a_pooler_that_sees_one_token_of_each_row_has_a_mean():
    _check_called({"query": mean(164), "pooler.dense": mean(16)}, tokens=164, rows=16)


@pytest.mark.parametrize(("seen", "problem"), [(0, "is not called"), (40, "sees 40 of 164 tokens")])
def test_what_sees_nothing_or_an_unknown_part_is_refused(seen, problem):
    with pytest.raises(ConfigError, match=f"pooler.dense: {problem}"):
        _check_called({"pooler.dense": mean(seen)}, tokens=164, rows=16)
