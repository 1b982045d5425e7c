"""AdaLoRA's leaf, its penalty, and dropping what was pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS

import jpeft
from jpeft.leaf import layers
from jpeft.methods.adalora import Triplets, triplets
from jpeft.tree.paths import slots

KEY = jax.random.key(0)


def one(rank=3, **options):
    params = {"dense": {"kernel": jnp.arange(35.0).reshape(7, 5) / 10}}
    return jpeft.adalora(rank, **options)(KEY, params)


def random_triplets(params, seed=1, pruned=()):
    """The tree with random P, lam and Q; `pruned` are flat numbers of triplets."""
    rng, count = np.random.default_rng(seed), 0

    def change(leaf):
        nonlocal count
        if not isinstance(leaf, Triplets):
            return leaf
        p, lam, q = (rng.normal(size=x.shape) for x in (leaf.p, leaf.lam, leaf.q))
        flat = lam.reshape(-1)
        for k in range(flat.size):
            if count + k in pruned:
                flat[k] = 0.0
        count += flat.size
        return leaf.replace(p=jnp.float32(p), lam=jnp.float32(lam), q=jnp.float32(q))

    flat = slots(params)
    return flat.rebuild(map(change, flat.values))


def test_the_weight_is_the_formula():
    params = random_triplets(one(rank=3, alpha=6))
    leaf = params["dense"]["kernel"]
    p, lam, q = (np.float64(x) for x in (leaf.p, leaf.lam, leaf.q))
    want = np.arange(35.0).reshape(7, 5) / 10 + 2.0 * p @ np.diag(lam) @ q
    got = jpeft.merge(params)["dense"]["kernel"]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    x = np.random.default_rng(2).normal(size=(4, 7))
    y = jpeft.adapt(lambda p, x: x @ p["dense"]["kernel"])(params, jnp.float32(x))
    np.testing.assert_allclose(y, x @ want, rtol=1e-5, atol=1e-5)


def test_the_start_is_gaussian_with_lam_at_zero():
    params = {"kernel": jnp.ones((400, 300))}
    leaf = jpeft.adalora(50)(KEY, params)["kernel"]
    assert not np.any(leaf.lam)
    for x in (leaf.p, leaf.q):
        # 15,000 draws: the standard error of the deviation is 0.6%.
        np.testing.assert_allclose(np.std(x), 0.02, rtol=0.03)
        np.testing.assert_allclose(np.mean(x), 0.0, atol=1e-3)


def orthogonality_by_numpy(matrices):
    """[(squared norm for P, for Q)], one a matrix."""
    off = lambda x: np.sum((x.T @ x - np.eye(x.shape[1])) ** 2)
    return [(off(p), off(q.T)) for p, q in matrices]


def three(pruned=()):
    """Two matrices and a stack of two, of rank 3, with random triplets."""
    params = {"one": jnp.ones((7, 5)), "two": jnp.ones((4, 6)), "stack": jnp.ones((7,))}
    tree = jpeft.adalora(3, where="one|two")(KEY, params)
    x = np.ones((2, 7, 5), np.float32)
    arrays = {"p": x[..., :3], "lam": x[:, 0, :3], "q": x[:, :3]}
    stack = tree["one"].replace(base=jnp.asarray(x), axes="sio", **arrays)
    return random_triplets({**tree, "stack": stack}, pruned=pruned)


def test_the_penalty_of_two_matrices_and_a_stack():
    params, pairs = three(), []
    for leaf in triplets(params):
        p, q = np.float64(leaf.p), np.float64(leaf.q)
        pairs += zip(p, q, strict=True) if leaf.stack_ndim else [(p, q)]
    both = np.array(orthogonality_by_numpy(pairs))
    assert len(both) == 4
    np.testing.assert_allclose(jpeft.orthogonality(params), both.sum(), rtol=1e-5)
    norms = jpeft.orthogonality(params, form="mean_of_norms")
    np.testing.assert_allclose(norms, np.sqrt(both).mean(), rtol=1e-5)


def test_compact_keeps_every_weight():
    # Of the first matrix one is pruned, of the stack's two and one, of the last all.
    params = three(pruned={1, 3, 5, 7, 9, 10, 11})
    small = jpeft.compact(params)
    shapes = lambda x: (x.p.shape, x.lam.shape, x.q.shape)
    assert shapes(small["one"]) == ((7, 2), (2,), (2, 5))
    assert shapes(small["stack"]) == ((2, 7, 2), (2, 2), (2, 2, 5))
    assert isinstance(small["two"], jax.Array)
    for want, got in zip(*map(jax.tree.leaves, map(jpeft.merge, (params, small)))):  # noqa: B905
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unrolled", "scan"])
def test_the_penalty_is_that_of_every_matrix(name):
    f = FORMS[name]()
    uses = jpeft.find_uses(f.fn, f.params, *f.args)
    params = random_triplets(jpeft.adalora(2)(KEY, f.params, uses=uses))
    matrices = []
    for leaf in triplets(params):
        p, q = np.float64(leaf.p), np.float64(leaf.q)
        rows = zip(p, q, strict=True) if leaf.stack_ndim else [(p, q)]
        matrices += list(rows)
    assert len(matrices) == 7  # up and down in three layers, and the head
    both = np.array(orthogonality_by_numpy(matrices))
    np.testing.assert_allclose(jpeft.orthogonality(params), both.sum(), rtol=1e-5)
    norms = jpeft.orthogonality(params, form="mean_of_norms")
    np.testing.assert_allclose(norms, np.sqrt(both).mean(), rtol=1e-5)
    trainable, _ = jpeft.partition(params)
    np.testing.assert_array_equal(
        jpeft.orthogonality(trainable), jpeft.orthogonality(params)
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sum_of_squares", "mean_of_norms"])
def test_the_penalty_has_a_finite_gradient_where_it_is_zero(form):
    leaf = one(rank=3)["dense"]["kernel"]
    leaf = leaf.replace(p=jnp.eye(7, 3), q=jnp.eye(3, 5))
    value, grads = jax.value_and_grad(
        lambda p: jpeft.orthogonality({"k": leaf.replace(p=p)}, form=form)
    )(leaf.p)
    assert value == 0
    assert np.all(np.isfinite(grads))


@pytest.mark.slow
def test_compact_keeps_the_output_and_drops_the_rest():
    f = FORMS["unrolled"]()
    params = jpeft.adalora(3)(KEY, f.params)
    names = [p for p, x in slots(params).items() if isinstance(x, Triplets)]
    # Of the first matrix one of three, of the second all, of the third none.
    params = random_triplets(params, pruned={1, 3, 4, 5})
    small = jpeft.compact(params)
    at = dict(slots(small).items())
    assert at[names[0]].lam.shape == (2,) and at[names[0]].p.shape[-1] == 2
    assert not layers(at[names[1]])
    assert at[names[2]].lam.shape == (3,)
    want = jax.jit(jpeft.adapt(f.fn))(params, *f.args)
    got = jax.jit(jpeft.adapt(f.fn))(small, *f.args)
    # The same products, summed without the zeros.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert jpeft.count(small).trainable < jpeft.count(params).trainable
    np.testing.assert_array_equal(
        jpeft.unload(small)["head"]["kernel"], f.params["head"]["kernel"]
    )


@pytest.mark.slow
def test_compact_of_a_stack_pads_to_the_largest_rank(tmp_path):
    f = FORMS["scan"]()
    transform = jpeft.adalora(3, where="layers/.*")
    uses = jpeft.find_uses(f.fn, f.params, *f.args)
    params = transform(KEY, f.params, uses=uses)
    # (3 layers, rank 3): the layers keep 1, 2 and 0, then 3, 0, 1.
    pruned = {0, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17}
    params = random_triplets(params, pruned=pruned)
    small = jpeft.compact(params)
    first, second = triplets(small)
    assert first.lam.shape == (3, 2) and second.lam.shape == (3, 3)
    assert np.sum(np.asarray(first.lam) != 0, -1).tolist() == [1, 2, 0]
    assert np.sum(np.asarray(second.lam) != 0, -1).tolist() == [3, 0, 1]
    want = jax.jit(jpeft.adapt(f.fn))(params, *f.args)
    got = jax.jit(jpeft.adapt(f.fn))(small, *f.args)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    merged = jax.jit(f.fn)(jpeft.merge(small), *f.args)
    np.testing.assert_allclose(merged, got, rtol=2e-5, atol=2e-5)
    jpeft.save(tmp_path / "a", small, transform)
    again = jpeft.load(tmp_path / "a", f.params)
    np.testing.assert_array_equal(jax.jit(jpeft.adapt(f.fn))(again, *f.args), got)

    # What pads gets no gradient, so the ranks stay.
    apply = jpeft.adapt(f.fn)
    trainable, frozen = jpeft.partition(small)
    loss = lambda t: (
        jnp.mean(jnp.square(apply(jpeft.combine(t, frozen), *f.args)))
        + jpeft.orthogonality(t)
    )
    grads = triplets(jax.jit(jax.grad(loss))(trainable))[0]
    assert not np.any(grads.lam[2]) and not np.any(grads.p[2]) and np.any(grads.p[1])


def test_compact_finds_triplets_under_another_adapter():
    params = {"kernel": jnp.ones((7, 5))}
    params = jpeft.chain(jpeft.adalora(3), jpeft.lora(2))(KEY, params)
    below = params["kernel"].base.replace(lam=jnp.array([0.0, 2.0, 0.0]))
    params = {"kernel": params["kernel"].replace(base=below)}
    small = jpeft.compact(params)["kernel"]
    assert small.base.lam.tolist() == [2.0] and small.rank == 2


def test_messages():
    for f in (jpeft.orthogonality, jpeft.compact):
        with pytest.raises(ValueError, match="no AdaLoRA leaf"):
            f(jpeft.lora(2)(KEY, {"kernel": jnp.ones((7, 5))}))
    with pytest.raises(ValueError, match="every lam is zero"):
        jpeft.compact(one())
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.jit(jpeft.compact)(one())
    with pytest.raises(ValueError, match="form='squares': expected"):
        jpeft.orthogonality(one(), form="squares")
    with pytest.raises(ValueError, match="rank 6 is larger than the matrix 7 x 5"):
        one(rank=6)
    with pytest.raises(ValueError, match="adalora: std=0.0: expected"):
        jpeft.adalora(2, std=0.0)
    with pytest.raises(ValueError, match="adalora: dropout=1.0: expected"):
        jpeft.adalora(2, dropout=1.0)
