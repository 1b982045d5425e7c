"""Two weights with leaves of different kinds in one equation: right or refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from speed import slow_but

import jpeft

N, KEY = 6, jax.random.key(0)
PARAMS = {name: {"kernel": normal(k, N, N)} for k, name in enumerate("ab")}
X = normal(2, 3, N)

KINDS = {
    "quantized": lambda w: jpeft.quantize("int8", where=w, compute_dtype="float32"),
    "lora": lambda w: jpeft.lora(2, 4, where=w),
    "dora": lambda w: jpeft.dora(2, 4, where=w),
    "full": jpeft.full,
    "loha": lambda w: jpeft.loha(2, where=w),
}
PAIRS = list(itertools.permutations(KINDS, 2))

# Each keeps the two weights apart, so that there is a form for leaves of any kinds.
JOINED = {
    "beside": lambda x, a, b: x @ jnp.concatenate([a, jnp.ones((N, 2)), b], 1),
    "below": lambda x, a, b: jnp.concatenate([x, x], 1) @ jnp.concatenate([a, b], 0),
    "stacked": lambda x, a, b: jnp.einsum("mi,sio->smo", x, jnp.stack([a, b])),
    "in a row": lambda x, a, b: x @ (a @ b),
}
MIXED = {
    "added": lambda x, a, b: x @ (a + b),
    "multiplied": lambda x, a, b: x @ (a * b),
    "chosen": lambda x, a, b: x @ jnp.where(jnp.arange(N) > 2, a, b),
    "written": lambda x, a, b: x @ jax.lax.dynamic_update_slice(a, b[:2], (1, 0)),
}


def adapted(first: str, second: str):
    chain = jpeft.chain(KINDS[first]("a/.*"), KINDS[second]("b/.*"))
    trainable, frozen = jpeft.partition(chain(KEY, PARAMS))
    shake = lambda y: y + 0.5 * jax.random.normal(KEY, y.shape, y.dtype)
    return jpeft.combine(jax.tree.map(shake, trainable), frozen)


def model(how):
    return lambda p, x: how(x, p["a"]["kernel"], p["b"]["kernel"])


def check(how, pair) -> bool:
    """Whether it was computed; then it is that of the merged weights."""
    params = adapted(*pair)
    try:
        found = jpeft.adapt(model(how))(params, X)
    except jpeft.DensifyError as error:
        assert "/kernel: " in str(error) and "Leave it out" in str(error)
        return False
    expected = model(how)(jpeft.merge(params), X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    return True


@pytest.mark.sample(2)
@pytest.mark.parametrize("how", JOINED)
@pytest.mark.parametrize("pair", slow_but(PAIRS[::3], PAIRS), ids="-".join)
def test_joined_weights_keep_what_each_has(pair, how):
    computed = check(JOINED[how], pair)
    # DoRA's magnitude is one a column, whatever lies below another weight.
    assert computed == (how != "below" or "dora" not in pair)


@pytest.mark.parametrize("how", MIXED)
@pytest.mark.parametrize("pair", slow_but(PAIRS[::7], PAIRS), ids="-".join)
def test_weights_that_mix_are_right_or_refused(pair, how):
    assert not (check(MIXED[how], pair) and set(pair) & {"lora", "dora", "loha"})
