"""Models nobody wrote for jpeft: every linear weight adapted, or an error names it.

LoRA with random A and B on all that `find_uses` calls linear; the output must be that
of the merged model, the gradient too, and nothing may be densified.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import map_slots, slots

sys.path.insert(0, str(Path(__file__).parent))
import zoo

SUBJECTS = {**zoo.LINEN, **zoo.NNX}
# What a plain `pytest` tries.
DEFAULT = ["gpt2", "llama", "bert_remat"]


def noisy_b(params):
    def one(path, x):
        if not is_leaf(x):
            return x
        key = jax.random.key(len(path))
        noise = lambda b: 0.05 * jax.random.normal(key, b.shape, b.dtype)
        return x.replace(b=jax.tree.map(noise, x.b))

    return map_slots(one, params)


def total(tree):
    return sum(
        jnp.mean(jnp.sin(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    )


def check(name):
    # These models were not written for our strict settings.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        compare(name)


def compare(name):
    subject = SUBJECTS[name]()
    uses = jpeft.find_uses(subject.fn, subject.params, *subject.args)
    doubtful = [p for p, u in uses.items() if u.kind == "linear" and u.doubt]
    peft = jpeft.lora(rank=1, alpha=1, where="linear", exclude=doubtful)
    if doubtful:
        with pytest.raises(ValueError, match="cannot tell input from output"):
            jpeft.lora(rank=1)(jax.random.key(0), subject.params, uses=uses)
    params = noisy_b(peft(jax.random.key(0), subject.params, uses=uses))
    linear = [p for p, u in uses.items() if u.kind == "linear" and not u.doubt]
    adapted = [p for p, x in slots(params).items() if is_leaf(x)]
    assert adapted == linear
    apply = jpeft.adapt(subject.fn)
    trainable, frozen = jpeft.partition(params)

    def loss(t):
        return total(apply(jpeft.combine(t, frozen), *subject.args))

    def reference(t):
        merged = jpeft.merge(jpeft.combine(t, frozen))
        return total(subject.fn(merged, *subject.args))

    got, g = jax.jit(jax.value_and_grad(loss))(trainable)
    want, h = jax.jit(jax.value_and_grad(reference))(trainable)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    squares = lambda t: sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(t))
    error = squares(jax.tree.map(jnp.subtract, g, h)) ** 0.5
    assert error < 1e-4 * squares(h) ** 0.5
    return uses


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT)
def test_public_model_equals_its_merged_self(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SUBJECTS if n not in DEFAULT])
def test_further_public_model_equals_its_merged_self(name):
    package = zoo.REQUIRES[name]
    try:
        check(name)
    except ImportError as error:
        pytest.skip(f"{package} is not installed: {error}")
