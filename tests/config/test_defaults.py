"""A key of the recipe that an earlier version did not know is no difference at its default, and one otherwise."""

import pytest

from braidlora.config import FederatedConfig, RunConfig, is_default


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("adapter.target_parameters", None, True),
        ("adapter.target_parameters", ["experts.down_proj"], False),
        ("adapter.rank_pattern", {}, True),
        ("tasks.0.metric", None, True),
        ("tasks.0.train.limit", None, True),
        ("tasks.0.train.limit", 5, False),
        ("tasks.0.name", "a", False),  # required, so no recipe was ever without it
        ("prompt", {"template": "no default"}, False),
        ("evaluation.num_beams", 1, True),
        ("nothing.of.this", None, False),
        ("seed.of", 0, False),
        ("seed", 0, True),
    ],
)
def test_the_default_of_a_key(key, value, expected):
    assert is_default(RunConfig, key, value) is expected


def test_a_whole_section_and_those_of_a_federation():
    whole = FederatedConfig.model_fields["federation"].get_default(call_default_factory=True)
    dumped = whole.model_dump(mode="json")
    assert is_default(FederatedConfig, "federation", dumped)
    assert all(is_default(FederatedConfig, f"federation.{key}", value) for key, value in dumped.items())
    assert not is_default(FederatedConfig, "federation.change_cap", dumped["change_cap"] + 1.5)
