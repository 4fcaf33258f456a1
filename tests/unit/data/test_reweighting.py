from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.data.mixture.reweighting import group_members, normalised_changes, reweighted
from megatron_syne.errors import ConfigError


def test_the_formula_by_hand() -> None:
    """r = (.2, .2, .4) of .8, changes +2, -1, 0 -> delta 1, -.5, 0 -> f 1.1, .9 (weight 2), 1."""
    new = reweighted(
        {"a": 0.2, "b": 0.2, "c": 0.4},
        {"a": 10.0, "b": 5.0, "c": 7.0},
        {"a": 12.0, "b": 4.0, "c": 7.0},
        alpha=0.1,
        weights={"b": 2.0},
    )
    norm = 0.2 * 1.1 + 0.2 * 0.9 + 0.4 * 1.0
    assert new == pytest.approx({"a": 0.8 * 0.22 / norm, "b": 0.8 * 0.18 / norm, "c": 0.8 * 0.4 / norm})
    assert new["a"] > 0.2 > new["b"]


def test_nothing_changed() -> None:
    now = {"a": 3.0, "b": 4.0}
    assert normalised_changes(now, now) == {"a": 0.0, "b": 0.0}
    assert reweighted({"a": 0.25, "b": 0.5}, now, now, 0.5, {}) == {"a": 0.25, "b": 0.5}


PERPLEXITY = st.floats(1.0, 1e6)


@given(
    st.lists(st.tuples(st.floats(1e-3, 1.0), PERPLEXITY, PERPLEXITY), min_size=1, max_size=12),
    st.floats(0, 0.99),
)
@settings(deadline=None, max_examples=60)
def test_the_group_keeps_its_share(rows: list[tuple[float, float, float]], alpha: float) -> None:
    names = [str(n) for n in range(len(rows))]
    shares, before, now = (dict(zip(names, column, strict=True)) for column in zip(*rows, strict=True))
    new = reweighted(shares, before, now, alpha, {})
    assert math.fsum(new.values()) == pytest.approx(math.fsum(shares.values()), rel=1e-12)
    assert all(share > 0 for share in new.values())
    gains = [new[n] / shares[n] for n in names]
    deltas = normalised_changes(before, now)
    for one in range(len(names)):  # who rose more, gains more
        for other in range(len(names)):
            if deltas[names[one]] > deltas[names[other]]:
                assert gains[one] >= gains[other] * (1 - 1e-12)


def test_a_factor_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="source b would get the factor -1"):
        reweighted({"a": 0.5, "b": 0.5}, {"a": 2.0, "b": 3.0}, {"a": 2.0, "b": 2.0}, 1.0, {"b": 2.0})


def test_members_of_a_group_at_any_depth() -> None:
    mixture = {
        "en": {"share": 0.8, "of": {"web": {"share": 0.5, "of": {"x": 0.5, "y": 0.5}}, "z": 0.5}},
        "zh": 0.2,
    }
    assert group_members(mixture, "web") == ("x", "y")
    assert group_members(mixture, "zh") == group_members(mixture, "x") == ()
