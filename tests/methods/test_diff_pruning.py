"""Gates, the expected L0 norm, and the projection onto a sparse difference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forms import FORMS
from speed import slow_but

import jpeft
from jpeft.leaf import is_leaf, layers
from jpeft.methods.diff_pruning import (
    GatedDelta,
    SparseDelta,
    hard_concrete,
    largest,
    open_probability,
)
from jpeft.tree.paths import slots

KEY = jax.random.key(0)
sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))


def setting(name="scan", **options):
    f = FORMS[name]()
    uses = jpeft.find_uses(f.fn, f.params, *f.args)
    transform = jpeft.diff_pruning(alpha=0.6, **options)
    params = transform(KEY, f.params, uses=uses)
    trainable, frozen = jpeft.partition(params)
    flat, treedef = jax.tree.flatten(trainable)
    rng = np.random.default_rng(3)
    flat = [x + jnp.float32(rng.normal(0, 0.5, x.shape)) for x in flat]
    return f, transform, jpeft.combine(jax.tree.unflatten(treedef, flat), frozen)


def gates_by_numpy(x):
    return np.clip(sigmoid(x) * 3.0 - 1.5, 0, 1)


@pytest.mark.sample(1)
@pytest.mark.parametrize("structured", [False, True])
def test_the_weight_is_the_formula(structured):
    f, _, params = setting(structured=structured)
    base, merged = (
        dict(slots(f.params).items()),
        dict(slots(jpeft.merge(params)).items()),
    )
    for path, leaf in slots(params).items():
        z = gates_by_numpy(leaf.alpha)
        if structured:
            assert leaf.group.shape == tuple(
                3 if k == 0 and "kernel" in path and "layers" in path else 1
                for k in range(leaf.ndim)
            )
            z = z * gates_by_numpy(leaf.group)
        want = base[path] + z * np.float64(leaf.delta)
        np.testing.assert_allclose(merged[path], want, rtol=1e-6, atol=1e-6)


@pytest.mark.sample(2)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("structured", [False, True])
def test_the_expected_l0_norm_is_its_closed_form(structured, temperature):
    options = {"low": -0.2, "high": 1.3, "temperature": temperature}
    _, _, params = setting(structured=structured, **options)
    shift = temperature * np.log(0.2 / 1.3)
    want = 0.0
    for _, leaf in slots(params).items():
        p = sigmoid(np.float64(leaf.alpha) - shift)
        if structured:
            p = p * sigmoid(np.float64(leaf.group) - shift)
        want += p.sum()
    np.testing.assert_allclose(jpeft.expected_l0(params), want, rtol=1e-5)
    trainable, _ = jpeft.partition(params)
    np.testing.assert_allclose(jpeft.expected_l0(trainable), want, rtol=1e-5)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 2.0])
def test_gates_are_open_as_often_as_they_should_be(alpha):
    how = {"low": -0.4, "high": 1.2, "temperature": 0.7}
    z = hard_concrete(jnp.full(40_000, alpha), KEY, **how)
    assert float(z.min()) == 0.0 and float(z.max()) == 1.0
    p = float(open_probability(jnp.asarray(alpha), **how))
    # Four standard errors of 40,000 draws are 1%.
    assert abs(float(jnp.mean(z > 0)) - p) < 0.01
    fully = 1 - sigmoid(0.7 * np.log((1 + 0.4) / (1.2 - 1)) - alpha)
    assert abs(float(jnp.mean(z == 1)) - fully) < 0.01


@pytest.mark.slow
def test_gates_are_random_only_with_a_key():
    f, _, params = setting("unrolled", structured=True)
    run = lambda key: jax.jit(lambda p, x: jpeft.adapt(f.fn, key=key)(p, x))(
        params, *f.args
    )
    plain = run(None)
    np.testing.assert_array_equal(plain, run(None))
    np.testing.assert_allclose(
        plain, jax.jit(f.fn)(jpeft.merge(params), *f.args), rtol=2e-5, atol=2e-5
    )
    one, two = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert np.abs(one - plain).max() > 1e-3 and np.abs(one - two).max() > 1e-3


def test_alpha_learns_through_the_noise():
    """At the paper's start, where gates without noise are all open."""
    params = jpeft.diff_pruning(alpha=2.0)(KEY, {"w": jnp.ones((7, 5))})
    trainable, frozen = jpeft.partition(params)

    @jax.jit
    def step(t, key):
        def loss(t):
            w = jpeft.adapt(lambda p: p["w"] + 0, key=key)(jpeft.combine(t, frozen))
            return jnp.sum(jnp.square(w[:, :2] - 3.0)) + 2.0 * jpeft.expected_l0(t)

        g = jax.grad(loss)(t)
        return jax.tree.map(lambda x, d: x - 0.05 * d, t, g)

    for k in range(200):
        trainable = step(trainable, jax.random.key(k))
    leaf = jpeft.combine(trainable, frozen)["w"]
    # The two columns that the loss needs stay open, the others close.
    assert np.all(np.asarray(leaf.alpha)[:, :2] > np.asarray(leaf.alpha)[:, 2:].max())
    assert np.all(sigmoid(leaf.alpha)[:, 2:] < 0.5)


def two():
    rng = np.random.default_rng(6)
    base = {n: jnp.ones(s) for n, s in (("one", (7, 5)), ("two", (3, 4)))}
    params = jpeft.diff_pruning(alpha=0.6)(KEY, base)
    trainable, frozen = jpeft.partition(params)
    draw = lambda x: jnp.float32(rng.normal(size=x.shape))
    return jpeft.combine(jax.tree.map(draw, trainable), frozen)


def test_gates_of_a_matrix_are_drawn_with_a_key_alone():
    params = two()
    run = lambda key: jpeft.adapt(lambda p: p["one"] + 0, key=key)(params)
    np.testing.assert_allclose(run(None), jpeft.merge(params)["one"], rtol=1e-6)
    one, two_ = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert np.abs(one - run(None)).max() > 1e-3 and np.abs(one - two_).max() > 1e-3


def test_of_two_matrices_the_largest_changes_stay():
    params = two()
    changes = {n: np.asarray(x.change()) for n, x in params.items()}
    flat = np.abs(np.concatenate([x.ravel() for x in changes.values()]))
    least = np.sort(flat)[-9]  # a fifth of 47, rounded
    small = jpeft.sparsify(params, 0.2)
    for n, x in jpeft.merge(small).items():
        want = 1 + np.where(np.abs(changes[n]) >= least, changes[n], 0)
        np.testing.assert_array_equal(x, np.float32(want))
    assert jpeft.count(small).trainable == 9


@pytest.mark.slow
@pytest.mark.parametrize("structured", slow_but([False], [False, True]))
def test_the_projection_keeps_the_largest_of_all_leaves(structured, tmp_path):
    f, transform, params = setting(structured=structured)
    changes = {p: np.asarray(x.change()) for p, x in slots(params).items()}
    total = sum(x.size for x in changes.values())
    count = round(0.1 * total)
    threshold = np.sort(np.abs(np.concatenate([*map(np.ravel, changes.values())])))[
        -count
    ]
    small = jpeft.sparsify(params, 0.1)
    merged, base = (
        dict(slots(jpeft.merge(small)).items()),
        dict(slots(f.params).items()),
    )
    left = 0
    for path, slot in slots(small).items():
        want = np.where(np.abs(changes[path]) >= threshold, changes[path], 0)
        np.testing.assert_array_equal(merged[path], base[path] + want)
        left += int((want != 0).sum())
        assert is_leaf(slot) == bool(want.any())  # nothing kept, no leaf kept
    assert left == count == jpeft.count(small).trainable
    got = jax.jit(jpeft.adapt(f.fn))(small, *f.args)
    want = jax.jit(f.fn)(jpeft.merge(small), *f.args)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)

    jpeft.save(tmp_path / "a", small, transform)
    again = jpeft.load(tmp_path / "a", f.params)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    np.testing.assert_array_equal(jax.jit(jpeft.adapt(f.fn))(again, *f.args), got)
    unloaded = jax.tree.leaves(jpeft.unload(small))
    for x, y in zip(unloaded, jax.tree.leaves(f.params), strict=True):
        np.testing.assert_array_equal(x, y)
    off = jax.jit(jpeft.adapt(f.fn))(jpeft.disable(small), *f.args)
    np.testing.assert_allclose(off, jax.jit(f.fn)(f.params, *f.args), rtol=1e-6)


@pytest.mark.slow
def test_training_goes_on_at_the_fixed_places():
    f, _, params = setting()
    small = jpeft.sparsify(params, 0.1)
    trainable, frozen = jpeft.partition(small)
    apply, tx = jpeft.adapt(f.fn), optax.adam(1e-2)
    loss = lambda t: jnp.mean(
        jnp.square(apply(jpeft.combine(t, frozen), *f.args) - 1.0)
    )
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        state = tx.init(trainable)
        first, grads = jax.jit(jax.value_and_grad(loss))(trainable)
        updates, _ = tx.update(grads, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    assert jax.jit(loss)(trainable) < first
    old, new = slots(small), slots(jpeft.combine(trainable, frozen))
    for x, y in zip(old.values, new.values, strict=True):
        if isinstance(x, SparseDelta):
            np.testing.assert_array_equal(x.indices, y.indices)
            assert np.all(np.asarray(x.values) != np.asarray(y.values))


def test_other_adapters_and_boxes_stay():
    from flax import linen as nn

    box = nn.Partitioned(jnp.ones((7, 5)), ("in", "out"))
    params = jpeft.chain(
        jpeft.lora(2, where="kernel"), jpeft.diff_pruning(where="(kernel|bias)")
    )(KEY, {"kernel": box, "bias": jnp.zeros(5)})
    outer = params["kernel"]
    assert isinstance(outer, GatedDelta) and outer.alpha.names == ("in", "out")
    moved = jax.tree.map(lambda x: x.at[2, 3].set(1.0), outer.delta)
    params = {**params, "kernel": outer.replace(delta=moved)}
    small = jpeft.sparsify(params, 0.5)
    kinds = [type(x).__name__ for x in layers(small["kernel"])]
    assert kinds == ["SparseDelta", "LowRank"]
    assert small["kernel"].indices.value.tolist() == [13]
    assert not is_leaf(small["bias"])
    assert jpeft.merge(small)["kernel"].value[2, 3] == 2.0


def test_the_largest_by_number_and_ties():
    arrays = [np.array([0.0, -3.0, 1.0]), np.array([2.0]), np.array([0.0, -2.5])]
    places = lambda n: [x.tolist() for x in largest(arrays, n)]
    assert places(1) == [[1], [], []]
    assert places(3) == [[1], [0], [1]]
    assert places(6) == [[1, 2], [0], [1]]  # zeros are no differences
    assert places(0) == [[], [], []]


def test_messages():
    with pytest.raises(ValueError, match="low=0.0: expected below 0"):
        jpeft.diff_pruning(low=0.0)
    with pytest.raises(ValueError, match="high=1.0: expected above 1"):
        jpeft.diff_pruning(high=1.0)
    with pytest.raises(ValueError, match="temperature=0: expected a number above 0"):
        jpeft.diff_pruning(temperature=0)
    lora = jpeft.lora(2)(KEY, {"kernel": jnp.ones((7, 5))})
    with pytest.raises(ValueError, match="expected_l0: this tree has no gated"):
        jpeft.expected_l0(lora)
    with pytest.raises(ValueError, match="sparsify: this tree has no gated"):
        jpeft.sparsify(lora, 0.1)
    fresh = jpeft.diff_pruning()(KEY, {"kernel": jnp.ones((7, 5))})
    with pytest.raises(ValueError, match="keeps no difference that is not zero"):
        jpeft.sparsify(fresh, 0.1)
    with pytest.raises(ValueError, match="density=0: expected above 0, up to 1"):
        jpeft.sparsify(fresh, 0)
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.jit(lambda p: jpeft.sparsify(p, 0.1))(fresh)
