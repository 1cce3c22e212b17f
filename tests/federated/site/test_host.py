"""What is written of a client's adapter."""

import pytest

from braidlora.federated.site.host import alpha_of


@pytest.mark.parametrize(
    ("rank", "scaling", "alpha"), [(8, 2.0, 16), (49, 1 / 49, 1), (3, 0.5, 1.5), (3, 8 / 3, 8)]
)
def test_a_whole_alpha_is_an_int(rank, scaling, alpha):
    assert alpha_of(rank, scaling) == alpha
    assert type(alpha_of(rank, scaling)) is type(alpha)
