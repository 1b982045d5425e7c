"""The four scripts that a newcomer reads first print what they promise."""

import re
import runpy
from pathlib import Path

import jax
import pytest
from speed import slow_but

EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBER = r"\d[\d.,]*(?:e-?\d+)?"


@pytest.fixture
def printed(capsys):
    """Runs a script; gives all that it prints, and the number after a text."""

    def run(name):
        # With the promotion that a newcomer has, not the tests' own.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        text = capsys.readouterr().out

        def number(after):
            found = re.findall(rf"{re.escape(after)} +({NUMBER})", text)
            assert len(found) == 1, (after, text)
            return float(found[0].replace(",", ""))

        return text, number

    return run


@pytest.mark.parametrize("name", slow_but(["linen.py"], ["linen.py", "nnx.py"]))
def test_an_adapter_is_trained_saved_loaded_and_merged(name, printed):
    text, number = printed(name)
    rows = [x.split() for x in text.splitlines() if "LowRank" in x]
    assert [(x[1], x[3]) for x in rows] == [("64x64", "1,024")]
    # The cosine is orthogonal to the sine that the base gives: 1/2 + 1/2.
    assert number("error before") == pytest.approx(1.0, abs=0.05)
    assert number("error after") < 0.01
    assert number("loaded: max difference") == 0.0
    assert number("merged: max difference") < 1e-5  # sums of 64, values of some ones


@pytest.mark.slow
def test_a_quantised_base_takes_an_eighth_and_trains(printed):
    text, number = printed("quantised.py")
    before, after = number("base in float32"), number("base in 4 bits")
    # 4 bits, a byte for each block of 64, and the biases and norms as they were.
    assert 7.0 < before / after < 8.0
    assert number("bits a parameter") == pytest.approx(32 * after / before, abs=0.05)
    trained = number("what is trained")
    assert trained < 0.1 * before
    # Adam keeps two numbers for each that is trained.
    assert number("optimiser's state") == pytest.approx(2 * trained, abs=0.02)
    assert number("step 40: loss") < 0.2 * number("step  0: loss")
    assert number("merged bfloat16") == pytest.approx(before / 2, abs=0.02)


@pytest.mark.slow
def test_each_row_of_a_batch_has_its_own_prefix(printed):
    text, number = printed("serve.py")
    rows = re.findall(rf"row (\d), task (\d): .* by ({NUMBER})", text)
    assert [(int(row), int(task)) for row, task, _ in rows] == [
        (0, 2),
        (1, 0),
        (2, 1),
        (3, 2),
    ]
    # Sums in another order; the logits are of some ones.
    assert all(float(far) < 1e-5 for _, _, far in rows)
    assert number("merged: differs from the adapter by") < 1e-5
    assert number("merged  ") < number("adapter ") - 0.5
