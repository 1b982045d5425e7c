"""The allocator against a plain re-run of the algorithm in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forms import FORMS
from speed import slow_but

import jpeft
from jpeft.methods.adalora import triplets
from jpeft.optim.allocator import Entries, allocate, budget, drop_steps, triplet_scores
from jpeft.optim.allocator import _smoothed as learnt

KEY = jax.random.key(4)
STEPS, T_INIT, T_FINAL = 30, 6, 9
RATE, BETA1, BETA2 = 0.3, 0.8, 0.7

# Optax's own promotions need the standard rules.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def setting(name):
    f = FORMS[name]()
    uses = jpeft.find_uses(f.fn, f.params, *f.args)
    params = jpeft.adalora(3, std=0.3)(KEY, f.params, uses=uses)
    apply = jpeft.adapt(f.fn)

    def loss(trainable, frozen):
        y = apply(jpeft.combine(trainable, frozen), *f.args)
        return jnp.mean(jnp.square(y - 1.0)) + 0.1 * jpeft.orthogonality(trainable)

    return params, loss


def allocator(**options):
    return jpeft.optim.adalora_allocator(
        optax.sgd(RATE),
        target_rank=1.5,
        total_steps=STEPS,
        **{"t_init": T_INIT, "t_final": T_FINAL, "beta1": BETA1, "beta2": BETA2}
        | options,
    )


def matrices(tree):
    """[{p, lam, q} in float64], one a matrix of a stack."""
    out = []
    for leaf in triplets(tree):
        three = {n: np.float64(getattr(leaf, n)) for n in ("p", "lam", "q")}
        if leaf.stack_ndim:
            rows = range(leaf.lam.shape[0])
            out += [{n: x[k] for n, x in three.items()} for k in rows]
        else:
            out.append(three)
    return out


class Plain:
    """The algorithm as it is written, one matrix after the other."""

    def __init__(self, weights, variant, delta_t, target):
        self.variant, self.delta_t, self.target = variant, delta_t, target
        self.s = [{n: np.zeros_like(x) for n, x in m.items()} for m in weights]
        self.u = [{n: np.zeros_like(x) for n, x in m.items()} for m in weights]
        self.initial = sum(m["lam"].size for m in weights)
        self.kept = None

    def learn(self, weights, grads):
        for m, g, s, u in zip(weights, grads, self.s, self.u, strict=True):
            for n in m:
                importance = np.abs(m[n] * g[n])
                s[n] = BETA1 * s[n] + (1 - BETA1) * importance
                u[n] = BETA2 * u[n] + (1 - BETA2) * np.abs(importance - s[n])

    def scores(self):
        out = []
        for s, u in zip(self.s, self.u, strict=True):
            of = {n: s[n] * u[n] for n in s}
            out.append(of["lam"] + of["p"].mean(0) + of["q"].mean(1))
        return out

    def choose(self, t):
        n = STEPS - T_INIT - T_FINAL
        left = 1 - (t - T_INIT) / n
        b = int((self.initial - self.target) * left**3 + self.target)
        scores = self.scores()
        flat = np.concatenate(scores)
        if b == self.initial:
            threshold = -np.inf
        else:
            threshold = np.sort(flat)[self.initial - b - 1]
        return [x > threshold for x in scores]

    def step(self, t, before, grads, after):
        """lam after the step, of each matrix."""
        last = STEPS - T_FINAL
        if self.variant == "paper":
            self.learn(before, grads)
        elif t < last:
            self.learn(after, grads)
        if t == last or (T_INIT < t < last and t % self.delta_t == 0):
            self.kept = self.choose(t)
            prune = True
        else:
            prune = t > last
        if not prune:
            return [m["lam"] for m in after]
        pairs = zip(after, self.kept, strict=True)
        return [np.where(k, m["lam"], 0.0) for m, k in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("variant", slow_but(["paper"], ["paper", "peft"]))
@pytest.mark.parametrize(("name", "delta_t"), [("unrolled", 1), ("scan", 3)])
def test_thirty_steps_are_those_of_the_algorithm(name, delta_t, variant):
    params, loss = setting(name)
    trainable, frozen = jpeft.partition(params)
    tx = allocator(delta_t=delta_t, variant=variant)
    state = tx.init(trainable)

    grad = jax.jit(lambda t: jax.grad(loss)(t, frozen))
    step = stepper(tx, grad)
    start = matrices(trainable)
    target = round(1.5 * len(start))
    plain = Plain(start, variant, delta_t, target)
    ranks = []
    for t in range(1, STEPS + 1):
        before = matrices(trainable)
        grads = matrices(grad(trainable))
        trainable, state = step(trainable, state)
        after = [
            {n: m[n] - RATE * d[n] for n in m}
            for m, d in zip(before, grads, strict=True)
        ]
        want = plain.step(t, before, grads, after)
        got = [m["lam"] for m in matrices(trainable)]
        for x, y in zip(got, want, strict=True):
            assert (x != 0).tolist() == (y != 0).tolist(), t
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
        ranks.append(sum(int((x != 0).sum()) for x in got))
    assert step._cache_size() == 1  # ranks fall, nothing is compiled again
    assert ranks[T_INIT - 1] == 21 and ranks[-1] == target
    assert set(ranks[STEPS - T_FINAL - 1 :]) == {target}
    each = [int((m["lam"] != 0).sum()) for m in matrices(trainable)]
    assert len(set(each)) > 1  # the budget is spent unevenly
    assert int(state.step) == STEPS


def test_a_pruned_triplet_trains_until_the_next_allocation():
    params, loss = setting("scan")
    trainable, frozen = jpeft.partition(params)
    tx = allocator(delta_t=5)
    step = stepper(tx, lambda t: jax.grad(loss)(t, frozen))
    state, alive = tx.init(trainable), []
    for _ in range(STEPS):
        trainable, state = step(trainable, state)
        alive.append(sum(int((m["lam"] != 0).sum()) for m in matrices(trainable)))
    assert alive[9] < 21 and alive[10] == 21  # pruned at 10, back at 11
    assert alive[19] < alive[9] and alive[-1] == 10


def test_the_schedule_is_the_cubic_one_at_every_step():
    initial, target, total, t_init, t_final = 72, 48, 500, 60, 240
    drops = drop_steps(initial, target, total, t_init, t_final)
    got = jax.vmap(lambda t: budget(t, initial, drops))(jnp.arange(total + 1))
    n = total - t_init - t_final
    for t in range(total + 1):
        left = 1 - (t - t_init) / n
        want = int((initial - target) * left**3 + target)
        want = initial if t <= t_init else target if t > total - t_final else want
        assert int(got[t]) == want, t


def test_scores_are_those_of_the_algorithm():
    rng = np.random.default_rng(5)
    shapes = {"p": (2, 7, 3), "lam": (2, 3), "q": (2, 3, 5)}
    draw = lambda: {n: np.float32(rng.normal(size=s)) for n, s in shapes.items()}
    rows = lambda x: [{n: np.float64(y[k]) for n, y in x.items()} for k in range(2)]
    weights = draw()
    plain = Plain(rows(weights), "paper", 1, 1)
    s = u = Entries(**{n: jnp.zeros(x) for n, x in shapes.items()})
    for _ in range(3):
        grads = draw()
        plain.learn(rows(weights), rows(grads))
        s, u = learnt(Entries(**weights), Entries(**grads), s, u, BETA1, BETA2, True)
    np.testing.assert_allclose(triplet_scores(s, u), plain.scores(), rtol=1e-5)
    kept = learnt(Entries(**weights), Entries(**draw()), s, u, BETA1, BETA2, False)
    for x, y in zip(jax.tree.leaves(kept), jax.tree.leaves((s, u)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_ties_go_in_order_or_all_together():
    scores = [jnp.array([1.0, 2.0, 0.0]), jnp.array([[0.0, 0.0], [3.0, 0.0]])]
    flat = lambda x: np.concatenate([np.ravel(k) for k in x]).tolist()
    exactly = allocate(scores, 5)
    assert flat(exactly) == [True, True, True, True, False, True, False]
    assert exactly[1].shape == (2, 2)
    assert flat(allocate(scores, 5, ties=False)) == [True, True, *[False] * 3, True, 0]
    assert all(flat(allocate(scores, 7, ties=False)))


def stepper(tx, grad):
    @jax.jit
    def step(p, s):
        updates, s = tx.update(grad(p), s, p)
        return optax.apply_updates(p, updates), s

    return step


@pytest.mark.slow
@pytest.mark.parametrize("order", ["freeze(allocator)", "allocator(freeze)"])
def test_one_tree_and_freeze_in_either_order(order):
    params, loss = setting("scan")
    whole = lambda p: loss(*jpeft.partition(p))
    options = {"target_rank": 1.5, "total_steps": 8, "t_init": 1, "t_final": 3}
    make = jpeft.optim.adalora_allocator
    if order == "freeze(allocator)":
        tx = jpeft.freeze(make(optax.adam(0.05), **options))
    else:
        tx = make(jpeft.freeze(optax.adam(0.05)), **options)
    trainable, frozen = jpeft.partition(params)
    plain = make(optax.adam(0.05), **options)
    state, of_plain = tx.init(params), plain.init(trainable)
    one = stepper(tx, jax.grad(whole))
    two = stepper(plain, lambda t: jax.grad(loss)(t, frozen))
    for _ in range(8):
        params, state = one(params, state)
        trainable, of_plain = two(trainable, of_plain)
    for x, y in zip(triplets(params), triplets(trainable), strict=True):
        assert ((x.lam != 0) == (y.lam != 0)).all()
        np.testing.assert_allclose(x.lam, y.lam, rtol=1e-4, atol=1e-5)
    assert sum(int(jnp.sum(x.lam != 0)) for x in triplets(params)) == 10


def test_boxed_arrays_stay_boxed():
    from flax import linen as nn

    box = nn.Partitioned(jnp.ones((7, 5)), ("in", "out"))
    params = jpeft.adalora(3)(KEY, {"dense": {"kernel": box}})
    trainable, frozen = jpeft.partition(params)
    apply = jpeft.adapt(lambda p, x: x @ nn.unbox(p)["dense"]["kernel"])
    x = jnp.ones((2, 7))
    loss = lambda t: jnp.mean(jnp.square(apply(jpeft.combine(t, frozen), x)))
    tx = jpeft.optim.adalora_allocator(
        optax.sgd(0.1), target_rank=2, total_steps=4, t_init=1, t_final=1
    )
    state, step = tx.init(trainable), stepper(tx, jax.grad(loss))
    for _ in range(4):
        trainable, state = step(trainable, state)
    leaf = jpeft.combine(trainable, frozen)["dense"]["kernel"]
    assert isinstance(leaf.lam, nn.Partitioned) and leaf.lam.names == (None,)
    assert int(jnp.sum(leaf.lam.value != 0)) == 2
    small = jpeft.compact({"dense": {"kernel": leaf}})["dense"]["kernel"]
    assert isinstance(small.p, nn.Partitioned) and small.p.value.shape == (7, 2)


def test_messages():
    params, _ = setting("unrolled")
    make = lambda **options: jpeft.optim.adalora_allocator(
        optax.sgd(0.1), **{"target_rank": 2, "total_steps": 100} | options
    )
    with pytest.raises(
        ValueError, match="budget of 28 triplets, more than the 21 .* target_rank <= 3"
    ):
        make(target_rank=4).init(params)
    with pytest.raises(ValueError, match="leaves no triplet"):
        make(target_rank=0.01).init(params)
    with pytest.raises(ValueError, match="no AdaLoRA leaf"):
        make().init({"kernel": jnp.ones((7, 5))})
    with pytest.raises(ValueError, match="leave none of total_steps=100"):
        make(t_init=50, t_final=50)
    with pytest.raises(ValueError, match="t_final=-1: expected a number of updates"):
        make(t_final=-1)
    with pytest.raises(ValueError, match="beta1=1.0: expected between 0 and 1"):
        make(beta1=1.0)
    with pytest.raises(ValueError, match="variant='hf': expected 'paper' or 'peft'"):
        make(variant="hf")
    tx = make()
    state = tx.init(params)
    with pytest.raises(ValueError, match="update needs the parameters"):
        tx.update(params, state)
