"""A plug on every family of language models that transformers lists: it works, or it is refused at once."""

import pytest
from families import EXPECTED, families, verdict


@pytest.mark.parametrize("model_type, kind", families())
def test_a_plug_works_or_is_refused(model_type, kind):
    """A family that a new release of transformers brings is expected to work; if it does not, EXPECTED must say so."""
    assert verdict(model_type, kind).startswith(EXPECTED.get((model_type, kind), "works"))


def test_only_families_of_the_library_are_expected():
    assert EXPECTED.keys() <= set(families())
