"""The notebooks of docs/ run, cell by cell, and print what is written below the cells.

python tests/test_notebooks.py      # writes what they print now into them
"""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import pytest
from speed import slow_but

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"))
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def run(notebook):
    """Yields (cell, what it prints), for one cell of code after the other."""
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        yield cell, printed.getvalue()


def written(cell):
    return "".join(line for out in cell["outputs"] for line in out["text"])


def words(text):
    return re.sub(NUMBER, "#", text)


def numbers(text):
    return [float(x.replace(",", "")) for x in re.findall(NUMBER, text)]


@pytest.mark.parametrize(
    "path", slow_but(NOTEBOOKS[-1:], NOTEBOOKS), ids=lambda p: p.stem
)
def test_a_notebook_prints_what_is_written_in_it(path):
    texts = 0
    # With the promotion that a reader has, not the tests' own.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell, text in run(read(path)):
            assert words(text) == words(written(cell))
            # The last digits of a loss differ from processor to processor.
            assert numbers(text) == pytest.approx(
                numbers(written(cell)), rel=0.05, abs=0.05
            )
            texts += bool(text)
    assert texts >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_one_that_jupyter_opens(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({c["id"] for c in cells}) == len(cells)
    for cell in cells:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | code
        assert cell["cell_type"] in ("code", "markdown")


def write(path):
    notebook = read(path)
    for cell, text in run(notebook):
        stream = {"name": "stdout", "output_type": "stream"}
        cell["outputs"] = [stream | {"text": text.splitlines(True)}] if text else []
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in NOTEBOOKS:
        write(path)
