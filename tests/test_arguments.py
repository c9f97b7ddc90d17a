"""Argument checks say what was expected and what came."""

import math

import numpy as np
import pytest

from pyro_vae.arguments import one_of, whole_number


@pytest.mark.parametrize(("value", "expected"), [(3, 3), (np.int64(3), 3), (1e6, 1_000_000), (np.uint8(7), 7)])
def test_whole_numbers(value, expected):
    number = whole_number("n", value)
    assert number == expected
    assert type(number) is int


@pytest.mark.parametrize("value", [0, -1, 2.5, math.nan, math.inf, True, "3", None, [3]])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match="n: expected a whole number of at least 1, got"):
        whole_number("n", value)


def test_one_of():
    assert one_of("fruit", "pear", ("apple", "pear")) == "pear"
    with pytest.raises(ValueError, match=r"fruit: expected one of apple, pear, got 'aple'; did you mean 'apple'\?"):
        one_of("fruit", "aple", ("apple", "pear"))
