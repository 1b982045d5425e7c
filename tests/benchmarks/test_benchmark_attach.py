"""The script measures what it says."""

import sys

import benchmark_attach
import pytest
from speed import slow_but


@pytest.mark.parametrize("method", slow_but(("lora",), ("lora", "loha")))
def test_the_second_attachment_compiles_nothing(method, monkeypatch, capsys):
    options = ["--method", method, "--rank", "2", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_attach.py", *options])
    benchmark_attach.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("first time: ") and second.endswith(", 0 compilations")
