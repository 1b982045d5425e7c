"""Derivatives taken inside of an adapted function are right or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.jet import jet
from speed import slow_but

import jpeft

KEY = jax.random.key(0)


def draw(*shape, k=0):
    rng = np.random.default_rng(k)
    return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)


PARAMS = {
    "mlp": {
        "up": {"kernel": draw(5, 7, k=1), "bias": draw(7, k=2)},
        "down": {"kernel": draw(7, 5, k=3), "bias": draw(5, k=4)},
    }
}
X = draw(5, k=5)


def layer(p, x):
    u, d = p["mlp"]["up"], p["mlp"]["down"]
    h = jnp.tanh(x @ u["kernel"] + u["bias"])
    return x + h @ d["kernel"] + d["bias"]


def energy(p, x):
    return jnp.sum(jnp.sin(layer(p, x)))


def moved(transform, params=PARAMS):
    """As after a training: nothing learned is zero."""
    trainable, frozen = jpeft.partition(transform(KEY, params))
    flat, treedef = jax.tree.flatten(trainable)
    flat = [x + draw(*x.shape, k=k) for k, x in enumerate(flat)]
    return jpeft.combine(jax.tree.unflatten(treedef, flat), frozen)


@jax.custom_vjp
def own_rule(p, x):
    return energy(p, x)


own_rule.defvjp(
    lambda p, x: (energy(p, x), (p, x)),
    lambda kept, g: (
        jax.tree.map(jnp.zeros_like, kept[0]),
        g * (kept[1] @ kept[0]["mlp"]["up"]["kernel"])[:5],
    ),
)


def looped(p, x):
    step = jax.checkpoint(lambda c, _: (layer(p, c), None))
    return jnp.sum(lax.scan(step, x, None, length=2)[0])


def both_ways(f, x):
    """`f` and how it is differentiated, by reading `jax.fwd_and_bwd`'s neighbours."""
    y, back = jax.vjp(f, x)
    return back(jnp.ones_like(y))[0]


# (energy, v) -> a derivative, for `energy` a function of v alone
WAYS = {
    "grad": lambda f, x: jax.grad(f)(x),
    "value_and_grad": lambda f, x: jax.value_and_grad(f)(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x + 1,)),
    "vjp": both_ways,
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "jacrev": lambda f, x: jax.jacrev(f)(x),
    "hessian": lambda f, x: jax.hessian(f)(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x + 1),
    "grad of grad": lambda f, x: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))(x),
    "jvp of grad": lambda f, x: jax.jvp(jax.grad(f), (x,), (x + 1,))[1],
    "grad of checkpoint": lambda f, x: jax.grad(jax.checkpoint(f))(x),
    "checkpoint of grad": lambda f, x: jax.checkpoint(jax.grad(f))(x),
    "grad of jit": lambda f, x: jax.grad(jax.jit(f))(x),
    "jit of grad": lambda f, x: jax.jit(jax.grad(f))(x),
    "inlined": lambda f, x: jax.grad(jax.jit(f, inline=True))(x),
    "vmap of grad": lambda f, x: jax.vmap(jax.grad(f))(jnp.stack([x, x + 1])),
    "grad of vmap": lambda f, x: jax.grad(lambda x: jnp.sum(jax.vmap(f)(x)))(
        jnp.stack([x, x + 1])
    ),
    "grad in scan": lambda f, x: lax.scan(
        lambda c, _: (c - 0.1 * jax.grad(f)(c), None), x, None, length=2
    )[0],
    "grad in cond": lambda f, x: lax.cond(x[0] > 9, lambda x: x, jax.grad(f), x),
    "jet": lambda f, x: jet(f, (x,), ((x + 1, x),)),
}
# Each acts otherwise than a weight does: on a bias, on a weight, on its input.
ADAPTERS = {
    "on a bias": lambda: jpeft.adapter(3),
    "beside": lambda: jpeft.adapter(2, placement="parallel"),
    "gated": lambda: jpeft.gated(jpeft.lora(2)),
    "on a weight": lambda: jpeft.adapter(
        3, where=r"mlp: (.*)/down/kernel -> \1/up/kernel"
    ),
}


def inside(way, energy=energy, **options):
    f = lambda p, x: WAYS[way](lambda x: energy(p, x), x)
    return jpeft.adapt(f, **options)


def outside(way, energy=energy, **options):
    return lambda p, x: WAYS[way](lambda x: jpeft.adapt(energy, **options)(p, x), x)


def check_refused(f, params, what="", x=X):
    with pytest.raises(jpeft.DerivativeError, match="derivative outside of adapt") as e:
        jax.eval_shape(f, params, x)
    assert "test_derivatives.py" in str(e.value) and "mlp/" in str(e.value)
    assert what in str(e.value)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_in_a_derivative_is_refused_however_it_is_taken(way):
    check_refused(inside(way), moved(jpeft.adapter(3)), "Bottleneck")


@pytest.mark.parametrize("how", ADAPTERS)
@pytest.mark.parametrize("way", ["grad", "jvp"])
def test_wherever_an_adapter_stands_it_is_refused(way, how):
    check_refused(inside(way), moved(ADAPTERS[how]()))


def test_a_bias_given_to_a_weight_is_refused():
    bare = {"mlp": {"up": {"kernel": draw(5, 7)}, "down": {"kernel": draw(7, 5)}}}
    params = moved(jpeft.bitfit(where=None, add="linear"), bare)
    f = lambda p, x: jnp.sum(x @ p["mlp"]["up"]["kernel"] @ p["mlp"]["down"]["kernel"])
    # What it adds is constant, so that a tangent must not get it.
    check_refused(inside("jvp", f), params, "AddedBias")
    transposed = lambda p, x: jax.linear_transpose(lambda x: f(p, x), x)(1.0)
    check_refused(jpeft.adapt(transposed), params, "AddedBias")


@pytest.mark.parametrize("way", WAYS)
def test_dropout_in_a_derivative_is_refused_and_without_a_key_there_is_none(way):
    params = moved(jpeft.lora(rank=2, dropout=0.4))
    check_refused(inside(way, key=KEY), params, "dropout in LowRank")
    jax.eval_shape(inside(way), params, X)


@pytest.mark.parametrize("way", slow_but({"hessian", "jvp of grad"}, WAYS))
def test_changes_of_a_weight_are_exact_however_the_derivative_is_taken(way):
    chain = jpeft.chain(
        jpeft.dora(rank=2, where=".*down/kernel"),
        jpeft.lora(rank=2, where=".*up/kernel"),
        jpeft.bitfit(),
    )
    params = moved(chain)
    both = lambda p, x: (inside(way)(p, x), outside(way)(p, x))
    got, want = jax.jit(both)(params, X)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


def test_the_remedy_of_the_refusal_is_right():
    params = moved(jpeft.adapter(3))
    forces = jax.grad(jpeft.adapt(energy), 1)(params, X)
    step = 1e-2
    ahead, behind = (
        jpeft.adapt(energy)(params, X + s * jnp.eye(5)[0]) for s in (step, -step)
    )
    slope = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(forces[0], slope, atol=1e-3)  # of order step^2


@pytest.mark.parametrize("way", slow_but({"grad", "jet"}, WAYS))
def test_derivatives_of_adapted_functions_are_not_refused(way):
    jax.eval_shape(outside(way), moved(jpeft.adapter(3)), X)


@pytest.mark.parametrize("energy", [own_rule, looped])
def test_rules_of_the_users_own_and_loops_are_looked_into(energy):
    check_refused(inside("grad", energy), moved(jpeft.adapter(3)))
    params = moved(jpeft.lora(2))
    got = inside("grad", energy)(params, X)
    want = jax.grad(energy, 1)(jpeft.merge(params), X)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_a_layer_compiled_once_is_refused_inside_and_not_outside():
    once = jax.jit(layer)

    def f(p, x):
        y = once(p, x)
        return y, jax.grad(lambda x: jnp.sum(once(p, x)))(y)

    params = moved(jpeft.adapter(3))
    check_refused(jpeft.adapt(f), params)
    jax.eval_shape(jpeft.adapt(once), params, X)


def test_what_an_adapter_made_before_may_enter_a_derivative():
    """Its output is finished there, so that value and derivative are of one thing."""

    def f(p, x):
        y = layer(p, x)
        return jax.value_and_grad(lambda y: jnp.sum(jnp.sin(2.0 * y)))(y)

    params = moved(jpeft.adapter(3))
    y = jpeft.adapt(layer)(params, X)
    value, slope = jpeft.adapt(f)(params, X)
    np.testing.assert_allclose(value, jnp.sum(jnp.sin(2 * y)), rtol=1e-6)
    np.testing.assert_allclose(slope, 2 * jnp.cos(2 * y), rtol=1e-5, atol=1e-6)


def test_a_derivative_of_something_else_is_none_of_the_adapters():
    def f(p, x):
        x = x - 0.1 * jax.grad(lambda x: jnp.sum(x**4))(x)
        return layer(p, x) @ p["mlp"]["up"]["kernel"] @ p["mlp"]["up"]["kernel"].T

    params = moved(jpeft.adapter(3))
    nudged = X - 0.4 * X**3
    kernel = PARAMS["mlp"]["up"]["kernel"]
    want = jpeft.adapt(layer)(params, nudged) @ kernel @ kernel.T
    np.testing.assert_allclose(jpeft.adapt(f)(params, X), want, rtol=1e-5, atol=1e-6)


def attend(p, x):
    q, k, v = (x @ p["attn"][n]["kernel"] for n in ("query", "key", "value"))
    return jax.nn.softmax(q @ k.T) @ v @ p["attn"]["out"]["kernel"]


def test_a_prefix_in_a_derivative_is_refused_wherever_its_keys_were_made():
    names = ("query", "key", "value", "out")
    base = {"attn": {n: {"kernel": draw(4, 4, k=k)} for k, n in enumerate(names)}}
    x = draw(3, 4, k=9)
    params = moved(jpeft.prefix(2), base)
    with pytest.raises(jpeft.DerivativeError, match="attn/key/kernel: Prefix"):
        jpeft.adapt(lambda p, x: jax.jacfwd(lambda x: attend(p, x))(x))(params, x)

    def made_before(p, x):
        k, v = (x @ p["attn"][n]["kernel"] for n in ("key", "value"))
        found = lambda x: jax.nn.softmax(x @ p["attn"]["query"]["kernel"] @ k.T) @ v
        return jax.grad(lambda x: jnp.sum(found(x)))(x)

    with pytest.raises(jpeft.DerivativeError, match="a prefix owed by keys"):
        jpeft.adapt(made_before)(params, x)

    def scored_before(p, x):
        q, k, v = (x @ p["attn"][n]["kernel"] for n in ("query", "key", "value"))
        s = q @ k.T
        return jax.grad(lambda t: jnp.sum(jax.nn.softmax(t * s) @ v))(1.0)

    with pytest.raises(jpeft.DerivativeError, match="the scores of a prefix"):
        jpeft.adapt(scored_before)(params, x)


def test_a_prompt_in_a_derivative_is_refused():
    base = {"embed": {"embedding": draw(6, 4)}}
    ids = jpeft.prepend_virtual_tokens(jnp.array([[1, 2]]), 2, vocab_size=6).ids

    def f(p, t, ids):
        x = p["embed"]["embedding"].at[ids].get(mode="clip")
        return jnp.sum(jnp.sin(t * x))

    params = moved(jpeft.prompt(2), base)
    with pytest.raises(jpeft.DerivativeError, match="embed/embedding: Prompt"):
        jpeft.adapt(jax.grad(f, 1))(params, 1.0, ids)
