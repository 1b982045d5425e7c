"""The script measures what it says, and its losses are one loss."""

import functools
import sys

import benchmark_cross_entropy as script
import jax
import numpy as np
import pytest
from draws import normal


@pytest.mark.slow
def test_the_table(monkeypatch, capsys):
    options = ["--tokens", "64", "--features", "8", "--vocabulary", "301"]
    monkeypatch.setattr(sys, "argv", ["script", *options, "--chunk", "8"])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    assert [x.split("|")[1].strip() for x in lines[4:]] == [
        "plain",
        "jpeft",
        "jpeft, half masked",
        "remat",
        "remat, half masked",
    ]


def test_remat_is_the_plain_loss():
    args = normal(0, 8, 5), normal(1, 5, 7), np.arange(8) % 7, np.arange(8) % 3 > 0
    again = functools.partial(script.remat, chunk=4)
    both = [jax.jit(f)(*args).mean() for f in (script.plain, again)]
    np.testing.assert_allclose(*both, rtol=1e-6)
