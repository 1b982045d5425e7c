"""Which cases a plain `pytest` runs, and which only `-m slow` does."""

import pytest


def slow_but(quick, cases):
    """The cases as parameters, slow but for those in `quick`."""
    marks = lambda case: () if case in quick else pytest.mark.slow
    return [pytest.param(case, marks=marks(case)) for case in cases]


def every_nth(n, cases):
    """Tuples of several arguments as parameters, slow but for every n-th."""
    marks = lambda k: () if k % n == 0 else pytest.mark.slow
    return [pytest.param(*case, marks=marks(k)) for k, case in enumerate(cases)]
