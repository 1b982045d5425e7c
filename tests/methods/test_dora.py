"""DoRA: the formula, what its gradient takes as constant, what is never made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax

import jpeft
from jpeft.leaf import is_leaf
from jpeft.methods.dora import change_of_norm, norm_of

KEY = jax.random.key(0)
X = normal(1, 3, 7)


def n(*shape, k=0):
    return jax.random.normal(jax.random.key(k), shape)


def apply(p, x):
    return x @ p["w"]["kernel"] + p["w"]["bias"][None]


def attached(w, **options):
    params = {"w": {"kernel": w, "bias": n(w.shape[-1], k=9)}}
    params = jpeft.dora(2, 3, **options)(KEY, params)
    leaf = params["w"]["kernel"]
    leaf = leaf.replace(b=0.5 * n(*leaf.b.shape, k=2), m=leaf.m + 0.3)
    return {"w": {**params["w"], "kernel": leaf}}


def test_it_is_the_papers_formula():
    params = attached(n(7, 5))
    leaf, bias = params["w"]["kernel"], params["w"]["bias"]
    w, a, b, m = (np.float64(x) for x in (leaf.base, leaf.a, leaf.b, leaf.m))
    v = w + 1.5 * a @ b
    want = m * v / np.sqrt(np.sum(v**2, axis=0))
    got = jpeft.adapt(apply)(params, X)
    np.testing.assert_allclose(
        got, np.float64(X) @ want + np.float64(bias), rtol=2e-6, atol=2e-6
    )
    np.testing.assert_allclose(
        jpeft.merge(params)["w"]["kernel"], want, rtol=2e-6, atol=1e-6
    )
    np.testing.assert_allclose(leaf.norm, np.sqrt(np.sum(w**2, axis=0)), rtol=1e-6)


@pytest.mark.sample(3)
@pytest.mark.parametrize("axes", ["io", "oi", "sio", "oso", "ioo", "iio", "isi"])
def test_the_change_of_the_norm_is_exact(axes):
    sizes = (7, 5, 3)[: len(axes)]
    w = n(*sizes)
    of = {g: [m for m, c in zip(sizes, axes, strict=True) if c == g] for g in "sio"}
    a, b = n(*of["s"], *of["i"], 2, k=3), n(*of["s"], 2, *of["o"], k=4)
    letters = {k: "xyz"[k] for k in range(len(axes))}
    pick = lambda g: "".join(letters[k] for k, c in enumerate(axes) if c == g)
    s, i, o = map(pick, "sio")
    ab = np.einsum(
        f"{s}{i}r,{s}r{o}->{''.join(letters.values())}", np.float64(a), np.float64(b)
    )
    v = np.float64(w) + 0.7 * ab
    square = lambda x: np.einsum(
        f"{''.join(letters.values())}->{s}{o}", np.square(np.float64(x))
    )
    got = change_of_norm(w, a, b, axes, 0.7)
    np.testing.assert_allclose(got, square(v) - square(w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm_of(w, axes), np.sqrt(square(w)), rtol=1e-6)


@pytest.mark.slow
def test_the_norm_is_a_constant_to_the_gradient():
    params = attached(n(7, 5))
    trainable, frozen = jpeft.partition(params)

    def by_hand(t):
        leaf = jpeft.combine(t, frozen)["w"]["kernel"]
        v = leaf.base + 1.5 * leaf.a @ leaf.b
        norm = lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, 0)))
        y = X @ (v * (leaf.m / norm)[None])
        return jnp.sum(jnp.sin(y + frozen["w"]["bias"][None]))

    got = jax.grad(
        lambda t: jnp.sum(jnp.sin(jpeft.adapt(apply)(jpeft.combine(t, frozen), X)))
    )(trainable)
    want = jax.grad(by_hand)(trainable)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def programs(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for p in e.params.values():
            for inner in jax.tree.leaves(
                p, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from programs(inner)


def test_nothing_of_the_weights_size_is_made():
    w = n(70, 50)
    params = attached(w)
    trainable, frozen = jpeft.partition(params)
    loss = lambda t: jnp.sum(
        jpeft.adapt(apply)(jpeft.combine(t, frozen), jnp.ones((3, 70)))
    )
    program = jax.make_jaxpr(jax.grad(loss))(trainable)
    made = [v.aval.size for e in programs(program.jaxpr) for v in e.outvars]
    assert len(made) > 20
    assert max(made) < w.size / 2, max(made)


def test_attached_it_is_exactly_its_base():
    params = {"w": {"kernel": n(7, 5), "bias": n(5)}}
    with_dora = jpeft.dora(2, 3)(KEY, params)
    np.testing.assert_array_equal(
        jpeft.adapt(apply)(with_dora, X), apply(params, X), strict=True
    )


def test_a_column_of_zeros_stays_zero_and_gives_no_nan():
    w = n(7, 5).at[:, 2].set(0.0)
    params = jpeft.dora(2)(KEY, {"w": {"kernel": w, "bias": jnp.zeros(5)}})
    trainable, frozen = jpeft.partition(params)
    f = lambda t: jpeft.adapt(apply)(jpeft.combine(t, frozen), X)
    np.testing.assert_array_equal(f(trainable)[:, 2], 0.0)
    grads = jax.grad(lambda t: jnp.sum(jnp.sin(f(t))))(trainable)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(jpeft.merge(params)["w"]["kernel"], w)


def test_dropout_acts_on_what_enters_a_alone():
    params = attached(n(7, 5), dropout=0.5)
    leaf = params["w"]["kernel"]
    zero = {"w": {**params["w"], "kernel": leaf.replace(b=jnp.zeros_like(leaf.b))}}
    drop = jpeft.adapt(apply, key=jax.random.key(5))
    np.testing.assert_array_equal(drop(zero, X), jpeft.adapt(apply)(zero, X))
    got, plain = drop(params, X), jpeft.adapt(apply)(params, X)
    assert float(jnp.max(jnp.abs(got - plain))) > 0.01
    # g * (x W + s (x' A) B), with x' some rows of x doubled and the others zero
    g = leaf.m / jnp.sqrt(jnp.sum((leaf.base + 1.5 * leaf.a @ leaf.b) ** 2, 0))
    inside = (got - plain) / g[None]
    basis = leaf.a @ leaf.b
    solved = np.linalg.lstsq(np.float64(basis).T, np.float64(inside).T, rcond=None)
    np.testing.assert_allclose(
        basis.T @ jnp.asarray(solved[0], jnp.float32), inside.T, atol=1e-4
    )


def test_it_is_refused_over_what_trains_and_with_other_first_values():
    params = {"w": {"kernel": n(7, 5)}}
    with pytest.raises(ValueError, match="w/kernel: dora needs the norm of a weight"):
        jpeft.chain(jpeft.lora(2), jpeft.dora(2))(KEY, params)
    both = jpeft.chain(jpeft.dora(2), jpeft.lora(2))(KEY, params)
    assert is_leaf(both["w"]["kernel"].base)
    with pytest.raises(ValueError, match="dora: init='pissa': expected one of"):
        jpeft.dora(2, init="pissa")
    with pytest.raises(ValueError, match="dora: rank=0: expected an integer"):
        jpeft.dora(0)


@pytest.mark.slow
def test_a_refusal_of_stacked_weights_names_all_of_them():
    def fn(p, x):
        stack = lambda name: jnp.stack([p[name][k]["kernel"] for k in "012"])
        h = jax.nn.relu(jnp.einsum("tef,edf->ted", x, stack("up")))
        return jnp.einsum("ted,edf->tf", h, stack("down"))

    experts = lambda i, o: {k: {"kernel": n(i, o, k=int(k))} for k in "012"}
    params = {"up": experts(5, 7), "down": experts(5, 4)}
    x = n(3, 3, 7)
    uses = jpeft.find_uses(fn, params, x)
    with pytest.raises(jpeft.DensifyError, match="down/0/kernel.*down/2/kernel") as e:
        jpeft.adapt(fn)(jpeft.dora(2)(KEY, params, uses=uses), x)
    typed = str(e.value).split("exclude='")[1].split("'")[0]
    rest = jpeft.dora(2, exclude=typed)(KEY, params, uses=uses)
    assert not any(map(is_leaf, (rest["down"][k]["kernel"] for k in "012")))
    assert jpeft.adapt(fn)(rest, x).shape == (3, 4)
