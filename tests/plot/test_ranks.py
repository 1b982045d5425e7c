"""The heat map shows the ranks there are."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS

import jpeft
from jpeft.plot.allocation import rank_table

KEY = jax.random.key(0)


def pruned(leaf, lam):
    return leaf.replace(lam=jnp.asarray(lam, jnp.float32))


def encoder():
    """Two layers with three matrices between them, of AdaLoRA and LoRA."""
    kernel = lambda: {"kernel": jnp.ones((7, 5))}
    params = {
        "layer_0": {"query": kernel(), "up": kernel()},
        "layer_10": {"query": kernel()},
        "head": kernel(),
    }
    params = jpeft.chain(
        jpeft.adalora(4, where=".*query.*"),
        jpeft.lora(2, where=".*(up|head|layer_10/query)/kernel"),
    )(KEY, params)
    first, second = (params[f"layer_{k}"]["query"] for k in (0, 10))
    first["kernel"] = pruned(first["kernel"], [1, 0, 0, -2])
    outer = second["kernel"]  # LoRA on AdaLoRA: 2 + 1
    second["kernel"] = outer.replace(base=pruned(outer.base, [0, 0, 3, 0]))
    return params


def test_the_table_has_a_row_a_matrix_and_a_column_a_layer():
    table = rank_table(encoder())
    assert table.layers == ("0", "10", "-")
    assert set(table.matrices) == {
        "layer/query/kernel",
        "layer/up/kernel",
        "head/kernel",
    }
    at = dict(zip(table.matrices, table.values.tolist(), strict=True))
    nan = np.nan
    np.testing.assert_array_equal(at["layer/query/kernel"], [2, 3, nan])
    np.testing.assert_array_equal(at["layer/up/kernel"], [2, nan, nan])
    np.testing.assert_array_equal(at["head/kernel"], [nan, nan, 2])


def test_layers_of_a_stack_are_columns():
    f = FORMS["scan"]()
    uses = jpeft.find_uses(f.fn, f.params, *f.args)
    params = jpeft.adalora(3, where="layers/.*")(KEY, f.params, uses=uses)
    up = params["layers"]["up"]
    up["kernel"] = pruned(up["kernel"], [[1, 0, 0], [1, 2, 3], [0, 0, 0]])
    table = rank_table(params)
    assert table.layers == ("0", "1", "2")
    at = dict(zip(table.matrices, table.values.tolist(), strict=True))
    assert at == {"layers/up/kernel": [1, 3, 0], "layers/down/kernel": [0, 0, 0]}


def test_experts_of_a_stack_are_rows_where_the_path_counts_layers():
    params = {
        f"h{k}": {"experts": {"kernel": jnp.ones((2, 7, 5)), "bias": jnp.ones((2, 5))}}
        for k in range(3)
    }

    def model(params, x):
        for k in range(3):
            w = params[f"h{k}"]["experts"]
            y = jnp.einsum("ebi,eio->ebo", x, w["kernel"]) + w["bias"][:, None]
            x = x + jnp.pad(y, ((0, 0), (0, 0), (0, 2)))
        return x

    uses = jpeft.find_uses(model, params, jnp.ones((2, 3, 7)))
    params = jpeft.lora(2)(KEY, params, uses=uses)
    table = rank_table(params)
    assert table.matrices == ("h/experts/kernel[0]", "h/experts/kernel[1]")
    np.testing.assert_array_equal(table.values, np.full((2, 3), 2))


def test_the_figure_shows_the_table(tmp_path):
    pytest.importorskip("matplotlib")
    params = encoder()
    table, figure = rank_table(params), jpeft.plot.ranks(params)
    axes = figure.axes[0]
    drawn = np.ma.filled(axes.get_images()[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(drawn, table.values)
    assert [x.get_text() for x in axes.get_yticklabels()] == list(table.matrices)
    assert [x.get_text() for x in axes.get_xticklabels()] == list(table.layers)
    texts = {x.get_position(): x.get_text() for x in axes.texts}
    row = table.matrices.index("layer/query/kernel")
    assert texts[1, row] == "3" and len(texts) == 4
    figure.savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    assert "matplotlib.pyplot" not in sys.modules or not _open_figures()


def _open_figures():
    return sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jpeft\[plots\]'"):
        jpeft.plot.ranks(encoder())


def test_a_tree_without_ranks_is_refused():
    params = jpeft.bitfit()(KEY, {"dense": {"bias": jnp.zeros(5)}})
    with pytest.raises(ValueError, match="no leaf of this tree has a rank"):
        jpeft.plot.ranks(params)
