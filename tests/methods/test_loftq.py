"""LoftQ: nearer to the weight than quantising alone, and made again on loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS

import jpeft

KEY = jax.random.key(0)
W = jax.random.normal(jax.random.key(1), (192, 70))


def error(params):
    return float(jnp.linalg.norm(jpeft.merge(params)["kernel"] - W))


def test_each_step_comes_nearer_to_the_weight():
    plain = error(jpeft.quantize("nf4")(KEY, {"kernel": W}))
    found = [error(jpeft.loftq(rank=8, steps=n)(KEY, {"kernel": W})) for n in (1, 2, 5)]
    assert plain > found[0] > found[1] > found[2]


def test_one_step_is_the_best_correction_of_the_quantised_weight():
    params = jpeft.loftq(rank=8, alpha=16)(KEY, {"kernel": W})
    q = jpeft.quantize("nf4")(KEY, {"kernel": W})
    np.testing.assert_array_equal(params["kernel"].base.codes, q["kernel"].codes)
    rest = np.linalg.svd(np.asarray(W - jpeft.merge(q)["kernel"], np.float64))[1][8:]
    # Eckart-Young: what is left is the singular values beyond the rank.
    assert error(params) == pytest.approx(np.sqrt(np.sum(rest**2)), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_checkpoint_finds_its_base_again_from_the_plain_one(steps, tmp_path):
    t = jpeft.loftq(rank=4, steps=steps)
    params = t(KEY, {"kernel": W})
    jpeft.save(tmp_path / "a", params, t)
    for base in ({"kernel": W}, jpeft.unload(params)):
        again = jpeft.load(tmp_path / "a", base)
        assert jax.tree.structure(again) == jax.tree.structure(params)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(x, y)


def test_it_trains_in_a_scanned_model_and_round_trips_as_a_configuration():
    f = FORMS["scan"]()
    t = jpeft.loftq(rank=2, steps=2, compute_dtype=None)
    assert jpeft.from_config(t.to_config()) == t
    params = t(KEY, f.params, uses=jpeft.find_uses(f.fn, f.params, *f.args))
    got = jax.jit(jpeft.adapt(f.fn))(params, *f.args)
    want = f.fn(jpeft.merge(params), *f.args)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    loss = lambda p: jnp.mean(jnp.square(jpeft.adapt(f.fn)(p, *f.args)))
    _, grads = jax.jit(jpeft.value_and_grad(loss))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_what_is_quantised_or_adapted_is_refused():
    params = jpeft.quantize("nf4")(KEY, {"kernel": W})
    with pytest.raises(ValueError, match="kernel: already quantised"):
        jpeft.loftq(rank=2)(KEY, params)
    params = jpeft.lora(rank=2)(KEY, {"kernel": W})
    with pytest.raises(ValueError, match="kernel: carries an adapter"):
        jpeft.loftq(rank=2)(KEY, params)
    with pytest.raises(ValueError, match="rank 71 is larger"):
        jpeft.loftq(rank=71)(KEY, {"kernel": W})
    with pytest.raises(ValueError, match="did you mean 'nf4'"):
        jpeft.loftq(rank=2, format="nf5")
