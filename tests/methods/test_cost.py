"""What each method costs beside the same method written into the model by hand.

FLOPs and temporary bytes of the compiled loss and gradient, as XLA states them, with
respect to what trains.  A twin reads the arrays that the method trains and computes the
same loss and the same gradients.
"""

from __future__ import annotations

import dataclasses
import functools

import every_method
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from speed import slow_but
from twins import BATCH, LAYERS, LENGTH, SCALE, VOCAB, D, F, Model, N, written

import jpeft

ROOM = 1.02
KEY = jax.random.key(0)
METHODS = {
    f"{name} {of}".strip(): cost
    for name, method in every_method.METHODS.items()
    for of, cost in method.costs.items()
}


@functools.cache
def model(form):
    """(the model, its parameters)."""
    dense = lambda n, m: {"kernel": (n, m), "bias": (m,)}
    norm = {"scale": (D,), "bias": (D,)}
    attention = {n: dense(D, D) for n in ("query", "key", "value", "out")}
    mlp = {"up": dense(D, F), "down": dense(F, D)}
    layer = {"norm_1": norm, "attention": attention, "norm_2": norm, "mlp": mlp}
    is_shape = lambda x: isinstance(x, tuple)
    if "scan" in form:
        stack = lambda shape: (LAYERS, *shape)
        body = {"layers": jax.tree.map(stack, layer, is_leaf=is_shape)}
    else:
        body = {f"layer_{k}": layer for k in range(LAYERS)}
    shapes = {"embed": {"embedding": (VOCAB, D)}, **body, "norm": norm}
    ones = lambda path: 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
    params = jax.tree_util.tree_map_with_path(
        lambda path, shape: jnp.full(shape, ones(path)), shapes, is_leaf=is_shape
    )
    return Model(form), noisy(params, D**-0.5)


def noisy(tree, size):
    rng = np.random.default_rng(0)
    noise = lambda x: (size * rng.standard_normal(x.shape)).astype(x.dtype)
    return jax.tree.map(lambda x: x + noise(x), tree)


# On a CPU, XLA takes the barriers of `jax.checkpoint` out half-way and then joins some
# of what is made again with what was there, by chance of how it was fused.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiled(method, form):
    """(ours, by hand): loss and gradient, compiled, and what they are of."""
    fn, params = model(form)
    ids = jax.random.randint(KEY, (BATCH, LENGTH), 0, VOCAB)
    if method.virtual:
        ids = jpeft.prepend_virtual_tokens(ids, N, vocab_size=VOCAB).ids
    adapted = method.make()(KEY, params)
    if method.finalize:
        adapted = jpeft.finalize(adapted)
    trainable, frozen = jpeft.partition(adapted)
    args = noisy(trainable, 0.1), frozen, ids
    apply, twin = jpeft.adapt(fn), method.twin(form)

    def program(run):
        loss = lambda t, f, ids: jnp.mean(jnp.square(run(jpeft.combine(t, f), ids)))
        lowered = jax.jit(jax.value_and_grad(loss)).lower(*args)
        return lowered.compile(compiler_options=KEEP_BARRIERS)

    return program(apply), program(lambda p, ids: twin(written(p), ids)), args


def cost(program):
    """(FLOPs, temporary bytes)."""
    temporary = program.memory_analysis().temp_size_in_bytes
    return program.cost_analysis()["flops"], temporary


# Each method with and without a scan, with and without remat: half of the methods in
# two of the forms, half in the others.
PAIRS = (("plain", "scan+remat"), ("remat", "scan"))
CASES = [(name, form) for k, name in enumerate(METHODS) for form in PAIRS[k % 2]]
# These differ from LoRA and from prompts in a number, or in what makes the prompt.
ALIKE = ("rslora", "p_tuning_mlp", "p_tuning finalized")
QUICK = [
    (name, PAIRS[k % 2][1]) for k, name in enumerate(METHODS) if name not in ALIKE
][::2]


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", slow_but(QUICK, CASES), ids=" ".join)
def test_computes_the_same_as_by_hand_and_costs_no_more(case):
    name, form = case
    ours, hand, args = compiled(METHODS[name], form)
    (value, gradients), (expected, of_hand) = ours(*args), hand(*args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for mine, theirs in zip(*map(jax.tree.leaves, (gradients, of_hand)), strict=True):
        largest = float(jnp.max(jnp.abs(theirs)))
        assert largest > 0
        # float32, sums of some hundred terms in another order
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4 * largest)
    (flops, temporary), (flops_by_hand, temporary_by_hand) = cost(ours), cost(hand)
    assert 0 < flops <= ROOM * flops_by_hand
    assert 0 < temporary <= ROOM * temporary_by_hand


class Merged(Model):
    """LoRA added to the weight in the forward pass."""

    def dense(self, w, x, name):
        k = w["kernel"]
        return x @ (k["w"] + SCALE * (k["a"] @ k["b"])) + w["bias"][None, None]


@pytest.mark.slow
@pytest.mark.parametrize("form", slow_but(["scan+remat"], ["plain", "scan+remat"]))
def test_a_weight_that_is_made_would_show(form):
    method = dataclasses.replace(METHODS["rslora"], twin=Merged)
    ours, merged, _ = compiled(method, form)
    assert cost(merged)[0] > 1.1 * cost(ours)[0]
