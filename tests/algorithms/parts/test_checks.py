"""Rules for hyperparameters: field, rule, value."""

import pytest

from metadist.algorithms.parts.checks import (
    check_at_least,
    check_choice,
    check_positive,
    check_within,
)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (check_at_least, ("field", float("inf"), 0), r"field must be >= 0 and finite, got inf"),
        (check_at_least, ("field", 1, 2), r"field must be >= 2, got 1"),
        (check_positive, ("field", float("inf")), r"field must be > 0 and finite, got inf"),
        (check_within, ("field", float("nan"), 0, 1), r"field must be in \[0, 1\], got nan"),
        (check_choice, ("field", "c", ("a", "b")), r"field must be one of \('a', 'b'\), got 'c'"),
    ],
)
def test_checks(check, arguments, message):
    with pytest.raises(ValueError, match=message):
        check(*arguments)


def test_checks_accept_the_ends():
    check_at_least("field", 2, 2)
    check_within("field", 0, 0, 1)
    check_within("field", 1, 0, 1)
    check_choice("field", "a", ("a", "b"))
