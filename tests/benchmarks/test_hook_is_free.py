"""LoRA through `jpeft.adapt` compiles to what LoRA written into the model compiles to.

Small sizes, deterministic figures; `benchmarks/benchmark_hook.py` prints the same for
larger ones, with trace times and other libraries beside them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _decoder import (
    FORMS,
    SMALL,
    Decoder,
    Sizes,
    Variant,
    decoder,
    merged_in_forward,
    with_jpeft,
)
from benchmark_hook import HAND, JPEFT, Cost, copied_weights, cost, inner_functions
from speed import slow_but

# Each compiles a program of its own.
in_each_form = pytest.mark.parametrize("form", slow_but(FORMS[1:], FORMS))
# Equal programs give equal figures; the hundredth is room for another XLA's choices.
ROOM = 1.01
# Codes come in groups of 64 rows, two tiles at least: weights must have some.
WIDE = Sizes(layers=3, width=256, hidden=512, heads=4, vocab=128, batch=2, tokens=64)


@functools.cache
def model(form: str) -> Decoder:
    return decoder(form, SMALL)


@functools.cache
def costs(form: str) -> tuple[Cost, Cost]:
    """Of the twin and of jpeft."""
    return cost_of(form, model(form).twin), cost_of(form, with_jpeft(model(form)))


def cost_of(form: str, variant: Variant) -> Cost:
    m = model(form)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        return cost(variant, m.tokens, m.base)


@functools.cache
def gradients(form: str) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Loss and gradients at the start, of the twin and of jpeft."""
    m, found = model(form), []
    for v in (m.twin, with_jpeft(m)):
        f = jax.jit(jax.value_and_grad(v.loss))
        value, tree = f(v.trainable, v.frozen, m.tokens)
        flat = jax.tree_util.tree_leaves_with_path(tree)
        found.append((float(value), {plain(p): np.asarray(g) for p, g in flat}))
    return found


def plain(path) -> str:
    """Layer, linear, factor: where the trees of the twin and of jpeft agree."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return "/".join(x for x in parts if x not in ("kernel", "value", "raw_value"))


@pytest.mark.sample(1)
@in_each_form
def test_no_more_flops_than_by_hand(form):
    hand, ours = costs(form)
    assert 0 < ours.flops <= ROOM * hand.flops


@pytest.mark.sample(1)
@in_each_form
def test_no_more_temporaries_than_by_hand(form):
    hand, ours = costs(form)
    assert 0 < ours.temp_bytes <= ROOM * hand.temp_bytes


@pytest.mark.slow
@in_each_form
def test_the_step_returns_the_adapters_and_nothing_else(form):
    hand, ours = costs(form)
    assert ours.output_bytes <= ROOM * hand.output_bytes


@pytest.mark.slow
@in_each_form
def test_three_steps_reach_the_loss_of_the_twin(form):
    hand, ours = costs(form)
    (start, _), _ = gradients(form)
    assert hand.loss < start  # it trains at all
    assert ours.loss == pytest.approx(hand.loss, abs=1e-5)  # float32, three steps


@pytest.mark.sample(1)
@in_each_form
def test_gradients_are_those_of_the_twin(form):
    (start, hand), (ours_start, ours) = gradients(form)
    assert ours_start == pytest.approx(start, abs=1e-5)
    assert hand.keys() == ours.keys()
    assert len(ours) == 2 * len(model(form).factors())
    for path, expected in hand.items():
        assert np.abs(expected).max() > 0, path
        # float32, sums of some hundred terms in another order
        np.testing.assert_allclose(ours[path], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.sample(2)
@in_each_form
def test_the_second_step_compiles_nothing(form):
    _, ours = costs(form)
    assert ours.compiled == 0


@pytest.mark.sample(2)
@in_each_form
def test_no_copy_of_a_weight_waits_for_the_backward_pass(form):
    _, ours = costs(form)
    assert ours.copies == 0


def test_twelve_equal_layers_stay_one_inner_jit():
    found = inner_functions(SMALL, 12)
    assert found[HAND][0] == 1
    assert found[JPEFT] == found[HAND]


# --- that the figures would show a fault ---------------------------------------------


def test_merging_in_the_forward_pass_shows():
    form = "scan"
    merged = cost_of(form, merged_in_forward(model(form)))
    hand, _ = costs(form)
    assert merged.flops > 1.2 * hand.flops
    assert merged.temp_bytes > 1.2 * hand.temp_bytes
    assert merged.copies > 0


@pytest.mark.parametrize("stop", [False, True])
def test_a_copied_base_shows(stop):
    """`stop_gradient` on a weight in a scan's body: JAX no longer sees that the saved
    value is the scanned input, and stacks a copy of the base."""
    layers, d, rank, x = 3, 8, 2, jnp.ones((5, 8))

    def loss(factors, base, x):
        def body(x, row):
            w, (a, b) = row
            w = jax.lax.stop_gradient(w) if stop else w
            return jnp.tanh(x @ w + (x @ a) @ b), None

        return jax.lax.scan(body, x, (base, factors))[0].sum()

    base = jnp.ones((layers, d, d))
    factors = jnp.ones((layers, d, rank)), jnp.ones((layers, rank, d))
    found = copied_weights(Variant(loss, factors, base), x, base)
    assert bool(found) == stop
    assert set(found) <= {base.shape}
