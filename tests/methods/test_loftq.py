"""LoftQ: nearer to the weight than quantising alone, and made again on loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from forms import FORMS

import jpeft

KEY = jax.random.key(0)
W = normal(1, 192, 70)


def error(params):
    return float(jnp.linalg.norm(jpeft.merge(params)["kernel"] - W))


def test_the_first_step_is_the_best_correction_and_the_next_come_nearer():
    """Eckart-Young: what is left is the singular values beyond the rank."""
    base = {"kernel": W[:64, :7]}
    made = lambda t: np.asarray(jpeft.merge(t(KEY, base))["kernel"], np.float64)
    rest = np.asarray(base["kernel"], np.float64) - made(jpeft.quantize("nf4"))
    left = np.sqrt(np.sum(np.linalg.svd(rest)[1][3:] ** 2))
    found = [
        np.linalg.norm(made(jpeft.loftq(rank=3, alpha=6, steps=n)) - base["kernel"])
        for n in (1, 3)
    ]
    assert found[0] == pytest.approx(left, rel=1e-4)
    assert found[1] < 0.99 * found[0]


@pytest.mark.slow
def test_each_step_comes_nearer_to_the_weight():
    plain = error(jpeft.quantize("nf4")(KEY, {"kernel": W}))
    found = [error(jpeft.loftq(rank=8, steps=n)(KEY, {"kernel": W})) for n in (1, 2, 5)]
    assert plain > found[0] > found[1] > found[2]


@pytest.mark.slow
def test_one_step_is_the_best_correction_of_the_quantised_weight():
    params = jpeft.loftq(rank=8, alpha=16)(KEY, {"kernel": W})
    q = jpeft.quantize("nf4")(KEY, {"kernel": W})
    np.testing.assert_array_equal(params["kernel"].base.codes, q["kernel"].codes)
    rest = np.linalg.svd(np.asarray(W - jpeft.merge(q)["kernel"], np.float64))[1][8:]
    # Eckart-Young: what is left is the singular values beyond the rank.
    assert error(params) == pytest.approx(np.sqrt(np.sum(rest**2)), rel=1e-4)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_checkpoint_of_a_jitted_start_loads_on_the_plain_base(tmp_path):
    """The last bits of a decomposition differ between the two programs."""
    a = normal(2, 256, 128)
    base = {"a": {"kernel": a}, "b": {"kernel": a.T.astype(jnp.bfloat16)}}
    t = jpeft.loftq(rank=4, steps=5)
    params = jax.jit(lambda p: t(KEY, p))(base)
    jpeft.save(tmp_path / "a", params, t)
    again = jpeft.load(tmp_path / "a", base)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_codes_that_were_saved_stand_only_for_a_base_like_the_one_trained_on(tmp_path):
    t = jpeft.loftq(rank=4, steps=2)
    jpeft.save(tmp_path / "a", t(KEY, {"kernel": W}), t)
    other = {"kernel": jax.random.normal(jax.random.key(5), W.shape)}
    with pytest.raises(jpeft.CheckpointError, match="kernel is farther from the quant"):
        jpeft.load(tmp_path / "a", other)
    with pytest.raises(jpeft.CheckpointError, match="kernel has other values"):
        jpeft.load(tmp_path / "a", jpeft.unload(t(KEY, other)))
    jpeft.load(tmp_path / "a", other, check="structure")


@pytest.mark.slow
def test_codes_that_were_saved_are_placed_as_the_weight_is(tmp_path):
    mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    base = {"kernel": jax.device_put(W[:64, :8], place)}
    t = jpeft.loftq(rank=4, steps=2)
    params = t(KEY, base)
    jpeft.save(tmp_path / "a", params, t)
    again = jpeft.load(tmp_path / "a", base)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert x.sharding == y.sharding
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "jit"), [(1, False), (3, True)])
def test_a_weight_that_its_format_holds_exactly_starts_as_lora_does(steps, jit):
    exact = jpeft.merge(jpeft.quantize("nf4", double=False)(KEY, {"w": W}))["w"]
    low = exact.at[:, 5:].set(0.0)
    base = {"some": low, "stack": jnp.stack([exact, W, jnp.zeros_like(W)])}
    axes = {"some": "io", "stack": "sio"}
    t = jpeft.loftq(rank=4, steps=steps, double=False, compute_dtype=None)
    attach = lambda p: t(KEY, p, uses=jpeft.find_uses(model, p, x))
    x = normal(3, 3, 2, W.shape[0])
    model = lambda p, x: (x[0] @ p["some"], jax.vmap(jnp.dot)(x, p["stack"]))
    params = (jax.jit(attach) if jit else attach)(base)
    assert {n: leaf.axes for n, leaf in params.items()} == axes
    np.testing.assert_array_equal(jpeft.merge(params)["some"], low)
    stack = params["stack"]
    for k, drawn in ((0, True), (1, False), (2, True)):
        assert jnp.all(jnp.any(stack.a[k] != 0, 0))
        assert bool(jnp.any(stack.b[k] != 0)) is not drawn
    loss = lambda p: sum(jnp.mean(jnp.square(y - 1)) for y in jpeft.adapt(model)(p, x))
    _, grads = jpeft.value_and_grad(loss)(params)
    for leaf in jax.tree.leaves(grads, is_leaf=lambda g: hasattr(g, "b")):
        moved = jnp.abs(leaf.a).sum(-2) + jnp.abs(leaf.b).sum(-1)
        assert jnp.all(moved > 0)


def test_rank_and_alpha_are_chosen_by_pattern_and_stabilised():
    base = {"a": {"kernel": W}, "b": {"kernel": W + 1}}
    t = jpeft.loftq(
        rank=8,
        alpha=8,
        rank_stabilized=True,
        rank_pattern={"b/.*": 4},
        alpha_pattern={"a/.*": 16},
    )
    assert jpeft.from_config(t.to_config()) == t
    params = t(KEY, base)
    assert [params[n]["kernel"].rank for n in "ab"] == [8, 4]
    assert [params[n]["kernel"].scale for n in "ab"] == [16 / 8**0.5, 8 / 4**0.5]


@pytest.mark.slow
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
