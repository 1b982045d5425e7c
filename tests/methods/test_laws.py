"""Every law, over every method of the table and every form of a model."""

from __future__ import annotations

import itertools

import chex
import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from draws import moved
from every_method import (
    KEY,
    METHODS,
    adapted,
    attached,
    bare,
    bits,
    form,
    forms_of,
    plain,
    room,
    trained,
    uses,
)
from flax import linen as nn
from flax import nnx, serialization
from forms import FORMS
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from speed import slow_but

import jpeft
from jpeft.leaf import innermost, is_leaf
from jpeft.tree.lend import resolve
from jpeft.tree.paths import slots


def loss_of(name):
    f = form(name)
    apply = jpeft.adapt(f.fn)
    return lambda p: jnp.mean(jnp.square(apply(p, *f.args) - 1.0))


# Methods whose leaves the others share meet every form of model; the others these two.
# In a plain run of the tests all but LoRA meet one, by turns.
EVERYWHERE = {"lora", "prefix"}
TWO = ("scan_remat", "nnx")


def cases(names, *more):
    """(method, form, *one of each of `more`), the first of them beyond EVERYWHERE."""
    out = []
    for place, m in enumerate(METHODS):
        own = names if m in EVERYWHERE else [n for n in names if n in TWO]
        rests = list(itertools.product(*more))
        for k, n in enumerate(own):
            for rest in rests if m in EVERYWHERE else rests[:1]:
                first = k == place % len(own) and rest == rests[0]
                slow = [] if m == "lora" or first else [pytest.mark.slow]
                case = m, METHODS[m].forms + n, *rest
                out.append(pytest.param(*case, marks=slow))
    return out


QUICK = ("lora", "qlora", "dora", "unipelt")
# LoRA's leaf, or PiSSA's, with other numbers in it: its program is the same.
ALIKE = {"rslora", "pissa_niter", "olora"}
UNLIKE = [m for m in METHODS if m not in ALIKE]


every = pytest.mark.parametrize(("method", "name"), cases(FORMS))
LINEN = ("unrolled", "scan_remat")
in_linen = pytest.mark.parametrize(("method", "name"), cases(LINEN))


def base_of(method, name):
    """What `unload` gives back: the base, or the base as it was quantised."""
    t = METHODS[method].make()
    if not METHODS[method].quantizes:
        return form(name).params
    if method == "loftq":
        base = t.quantizer()(KEY, form(name).params, uses=uses(name))
        named = lambda x: x.replace(origin=t.origin()) if is_leaf(x) else x
        return jax.tree.map(named, base, is_leaf=is_leaf)
    first = t.transforms[0]
    return first(jax.random.fold_in(KEY, 0), form(name).params, uses=uses(name))


def output_of_base(method, name):
    f, base = form(name), base_of(method, name)
    weights = jpeft.merge(base) if METHODS[method].quantizes else base
    return plain(name)(weights, *bare(f))


@pytest.mark.sample(6)
@every
def test_unload_returns_the_base_bit_for_bit(method, name):
    base, params = base_of(method, name), attached(method, name)
    back = jpeft.unload(moved(params))
    chex.assert_trees_all_equal_structs(back, base)
    assert bits(back) == bits(base)


@pytest.mark.sample(6)
@in_linen
def test_output_is_kept_at_attach(method, name):
    f = form(name)
    got = adapted(name)(attached(method, name), *bare(f))
    if not METHODS[method].kept:  # the test of disabled adapters has the base
        assert float(jnp.max(jnp.abs(got - output_of_base(method, name)))) > 1e-4
        return
    np.testing.assert_allclose(got, output_of_base(method, name), **room(method))


@pytest.mark.sample(6)
@every
def test_merged_equals_unmerged(method, name):
    f, params = form(name), trained(method, name)
    got = adapted(name)(params, *f.args)
    base = plain(name)(f.params, *f.args)
    assert float(jnp.max(jnp.abs(got - base))) > 1e-2  # the adapter acts
    if not METHODS[method].merges:
        with pytest.raises(TypeError, match="no merged value"):
            jpeft.merge(params)
        return
    merged = jpeft.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(f.params)
    # float32 sums in another order
    np.testing.assert_allclose(got, plain(name)(merged, *f.args), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].merges])
def test_a_merged_weight_is_the_formula(method):
    """The other laws compare a method with itself."""
    tree = trained(method, "scan_remat")
    before = dict(slots(form("scan_remat").params).items())
    merged, acts = dict(slots(jpeft.merge(tree)).items()), []
    for path, leaf in slots(tree).items():
        if not is_leaf(leaf):
            continue
        want = formulas.value(leaf, tree)
        # float32, sums of at most 14 terms
        atol = 16 * np.finfo(np.float32).eps * np.abs(want).max()
        np.testing.assert_allclose(merged[path], want, rtol=0, atol=atol)
        acts.append(not np.allclose(want, before[path], atol=0.01))
    assert np.mean(acts) > 0.5  # a gate may be closed


# alpha is 3 and the rank 2 wherever a method has both.
SCALES = dict.fromkeys(("lora", "adalora", "pissa", "dora", "loha", "lokr"), 1.5)
SCALES |= {"qlora": 1.5, "loftq": 1.5, "rslora": 3 / 2**0.5}


@pytest.mark.parametrize("method", SCALES)
def test_a_delta_is_scaled_by_alpha_over_the_rank(method):
    leaves = formulas.every(attached(method, "scan_remat"))
    found = [x.scale for x in leaves if isinstance(getattr(x, "scale", None), float)]
    assert found and found == pytest.approx([SCALES[method]] * len(found))


def test_a_bias_that_the_model_lacks_is_added():
    fn = lambda p, x: jnp.tanh(x @ p["kernel"])
    w, x = np.eye(7, 5) + 0.25, np.linspace(-1, 1, 14).reshape(2, 7)
    bias = np.linspace(-0.5, 0.5, 5)
    single = lambda x: jnp.asarray(x, jnp.float32)
    tree = jpeft.bitfit(where=None, add="linear")(KEY, {"kernel": single(w)})
    tree = {"kernel": tree["kernel"].replace(bias=single(bias))}
    got = jax.jit(jpeft.adapt(fn))(tree, single(x))
    np.testing.assert_allclose(got, np.tanh(x @ w + bias), rtol=0, atol=1e-6)


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].merges])
def test_a_boxed_leaf_has_the_value_of_a_plain_one(method):
    name = METHODS[method].forms + "unrolled"
    box = lambda x: nn.Partitioned(x, (None,) * x.ndim)
    boxed = METHODS[method].make()(
        KEY, jax.tree.map(box, form(name).params), uses=uses(name)
    )
    merged = slots(jpeft.merge(attached(method, name)))
    found = dict(zip(slots(boxed).paths, resolve(slots(boxed).values), strict=True))
    leaves = {p: x for p, x in found.items() if is_leaf(x)}
    assert leaves
    for path, leaf in leaves.items():
        value = leaf.materialize()
        assert isinstance(value, jax.Array)
        np.testing.assert_allclose(value, dict(merged.items())[path], rtol=1e-6)


def waves(params, x):
    layer = params["layer_0"]
    x = jnp.fft.fft(x, axis=0) @ layer["up"]["kernel"] @ layer["down"]["kernel"]
    return jnp.abs(x @ params["head"]["kernel"])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "method",
    slow_but(QUICK, [m for m in UNLIKE if METHODS[m].merges and m != "bitfit"]),
)
def test_activations_may_be_complex(method):
    params, x = moved(attached(method, "unrolled")), form("unrolled").args[0]
    with jax.numpy_dtype_promotion("standard"):
        got = jax.jit(jpeft.adapt(waves))(params, x)
        want = jax.jit(waves)(jax.jit(jpeft.merge)(params), x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_experts_may_be_given_complex_tokens():
    x = jax.lax.complex(*jax.random.normal(KEY, (2, 6, 8)))
    groups = jnp.array([2, 4], jnp.int32)
    base = {"w": jax.random.normal(KEY, (2, 8, 4))}
    fn = lambda p, x: jnp.abs(jax.lax.ragged_dot(x, p["w"], groups))
    t = jpeft.lora(rank=2)
    params = moved(t(KEY, base, uses=jpeft.find_uses(fn, base, x)))
    want = fn(jpeft.merge(params), x)
    got = jpeft.adapt(fn)(params, x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", slow_but(QUICK, METHODS))
def test_a_base_may_be_closed_over_by_what_jax_traces(method):
    name = METHODS[method].forms + "unrolled"
    t, base = METHODS[method].make(), form(name).params
    shapes = jax.eval_shape(lambda key: t(key, base, uses=uses(name)), KEY)
    want = attached(method, name)
    chex.assert_trees_all_equal_structs(shapes, want)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, want)
    spoiled = jax.tree.map(lambda x: x * jnp.nan, base)
    with pytest.raises(ValueError, match="the base holds NaN"):
        jax.eval_shape(lambda key: t(key, spoiled, uses=uses(name)), KEY)


@pytest.mark.slow
@pytest.mark.parametrize("method", UNLIKE)
def test_an_exported_program_is_read_back_with_its_adapters(method):
    name = METHODS[method].forms + "unrolled"
    f, params, run = form(name), trained(method, name), adapted(name)
    file = export.export(run)(params, *f.args).serialize()
    got = export.deserialize(file).call(params, *f.args)
    assert np.asarray(got).tobytes() == np.asarray(run(params, *f.args)).tobytes()


@pytest.mark.sample(6)
@in_linen
def test_disabled_adapters_act_as_the_base(method, name):
    f, params = form(name), trained(method, name)
    off = jpeft.disable(params)
    assert jax.tree.structure(off) == jax.tree.structure(params)
    got = adapted(name)(off, *bare(f))
    np.testing.assert_allclose(got, output_of_base(method, name), **room(method))


def by_partition(loss, params, tx, steps):
    trainable, frozen = jpeft.partition(params)
    state = tx.init(trainable)

    @jax.jit
    def step(t, s, f):
        g = jax.grad(lambda t: loss(jpeft.combine(t, f)))(t)
        u, s = tx.update(g, s, t)
        return optax.apply_updates(t, u), s

    for _ in range(steps):
        trainable, state = step(trainable, state, frozen)
    assert step._cache_size() == 1  # the second step compiles nothing
    return jpeft.combine(trainable, frozen), state


def by_freeze(loss, params, tx, steps):
    return one_tree(jax.grad(loss), params, jpeft.freeze(tx), steps)


def by_value_and_grad(loss, params, tx, steps):
    grad = lambda p: jpeft.value_and_grad(loss)(p)[1]
    return one_tree(grad, params, jpeft.freeze(tx), steps)


def one_tree(grad, params, tx, steps):
    state = tx.init(params)

    @jax.jit
    def step(p, s):
        u, s = tx.update(grad(p), s, p)
        return optax.apply_updates(p, u), s

    for _ in range(steps):
        params, state = step(params, state)
    assert step._cache_size() == 1
    return params, state


WAYS = {
    "partition": by_partition,
    "freeze": by_freeze,
    "value_and_grad": by_value_and_grad,
}


@pytest.mark.sample(6)
@pytest.mark.parametrize(("method", "name", "way"), cases(LINEN, WAYS))
def test_frozen_leaves_do_not_move_and_trainable_ones_do(method, name, way):
    params = attached(method, name)
    if METHODS[method].quantizes and way == "freeze":
        with pytest.raises(TypeError, match="int"):  # codes have no gradient
            WAYS[way](loss_of(name), params, optax.adam(1e-2), 1)
        return
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        after, state = WAYS[way](loss_of(name), params, optax.adam(1e-2), 10)
    before_t, before_f = jpeft.partition(params)
    after_t, after_f = jpeft.partition(after)
    assert bits(before_f) == bits(after_f)
    for a, b in zip(bits(before_t), bits(after_t), strict=True):
        assert a != b
    shapes = sorted(x.shape for x in jax.tree.leaves(before_t) if jnp.ndim(x))
    moments = [x for x in jax.tree.leaves(state) if jnp.ndim(x)]
    assert sorted(x.shape for x in moments) == sorted(2 * shapes)


@pytest.mark.sample(6)
@every
def test_checkpoint_round_trip(method, name, tmp_path):
    params, transform = trained(method, name), METHODS[method].make()
    jpeft.save(tmp_path / "a", params, transform)
    again = jpeft.load(tmp_path / "a", form(name).params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert bits(again) == bits(params)


@pytest.mark.parametrize("method", METHODS)
def test_configuration_round_trip(method, tmp_path):
    transform = METHODS[method].make()
    again = jpeft.from_config(transform.to_config())
    assert again == transform and hash(again) == hash(transform)
    file = tmp_path / "recipe.toml"
    file.write_text(jpeft.config.to_toml(transform))
    assert jpeft.from_config(file) == transform


@in_linen
def test_applying_twice_is_refused(method, name):
    with pytest.raises(ValueError, match="already|trains whole"):
        METHODS[method].make()(KEY, attached(method, name), uses=uses(name))


@pytest.mark.sample(3)
@in_linen
def test_works_under_jit_and_vmap_and_eval_shape(method, name):
    f, transform = form(name), METHODS[method].make()
    make = lambda k, p: transform(k, p, uses=uses(name))
    jitted = jax.jit(make)(KEY, f.params)
    shapes = jax.eval_shape(make, KEY, f.params)
    assert jax.tree.structure(jitted) == jax.tree.structure(shapes)
    params = trained(method, name)
    xs = jnp.stack([f.args[0], f.other])
    got = jax.jit(jax.vmap(jpeft.adapt(f.fn), (None, 0)))(params, xs)
    want = [adapted(name)(params, x) for x in xs]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5, atol=1e-5)


@pytest.mark.sample(6)
@in_linen
def test_eight_devices_give_the_same(method, name):
    f, params = form(name), trained(method, name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.concatenate([f.args[0], f.other])
    want = adapted(name)(params, x)
    there = jax.device_put(params, NamedSharding(mesh, P()))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(adapted(name)(there, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", UNLIKE)
def test_no_residual_copies_a_base_weight(method):
    """Under scan, what the forward pass hands to the backward pass holds no weight."""
    (name,) = forms_of(method, ["scan"])
    params = trained(method, name)
    trainable, frozen = jpeft.partition(params)
    loss = loss_of(name)
    grad = jax.grad(lambda t, f: loss(jpeft.combine(t, f)))
    program = jax.make_jaxpr(grad)(trainable, frozen)
    scans = [e for e in program.eqns if e.primitive.name == "scan"]
    assert len(scans) >= 2
    base = {x.shape for x in jax.tree.leaves(jpeft.unload(params)) if len(x.shape) == 3}
    out = [v.aval.shape for v in scans[0].outvars]
    assert not base & set(out), (base, out)


@pytest.mark.parametrize(
    "method", slow_but({"diff_pruning", "vera", "p_tuning_mlp", "prefix_mlp"}, UNLIKE)
)
def test_parameters_that_a_function_hands_back_stay_adapted(method):
    f = form(METHODS[method].forms + "unrolled")
    params = attached(method, METHODS[method].forms + "unrolled")
    fn = lambda p, *args: (f.fn(p, *args), jax.jit(lambda p: p)(p))
    _, back = jax.eval_shape(jpeft.adapt(fn), params, *f.args)
    chex.assert_trees_all_equal_structs(back, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, params)


def differentiable(method, name):
    """(energy, v): a number of (params, v), where v is the batch or, of texts, the
    table of places, which nothing adapts."""
    f = form(name)
    if not METHODS[method].forms:
        return lambda p, v: jnp.sum(jnp.sin(f.fn(p, v))), f.args[0]
    places = lambda v: {"position_embed": {"embedding": v}}
    energy = lambda p, v: jnp.sum(jnp.sin(f.fn({**p, **places(v)}, *f.args)))
    return energy, f.params["position_embed"]["embedding"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "method",
    slow_but({"dora", "qlora", "adapter_houlsby", "bitfit_added", "mam"}, UNLIKE),
)
def test_a_derivative_taken_inside_is_that_taken_outside_or_refused(method):
    name = METHODS[method].forms + "unrolled"
    energy, v = differentiable(method, name)
    params = moved(attached(method, name))
    inside = jpeft.adapt(lambda p, v: jax.grad(energy, 1)(p, v))
    if not METHODS[method].merges:
        with pytest.raises(jpeft.DerivativeError, match="derivative outside of adapt"):
            jax.eval_shape(inside, params, v)
        return
    outside = lambda p, v: jax.grad(jpeft.adapt(energy), 1)(p, v)
    got, want = jax.jit(lambda p, v: (inside(p, v), outside(p, v)))(params, v)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.max(jnp.abs(want))))


def test_another_layer_changes_no_other_leaf():
    small = {"a": {"kernel": jnp.ones((7, 5))}}
    large = {**small, "b": {"kernel": jnp.ones((5, 3))}}
    t = jpeft.lora(rank=2)
    np.testing.assert_array_equal(
        t(KEY, small)["a"]["kernel"].a, t(KEY, large)["a"]["kernel"].a
    )


def test_negative_zero_stays_negative_zero():
    params = {"dense": {"kernel": -jnp.zeros((7, 5)), "bias": -jnp.zeros(5)}}
    params = jpeft.lora(rank=2)(KEY, params)
    tx = jpeft.freeze(optax.sgd(0.1))
    loss = lambda p: jnp.sum(jpeft.adapt(lambda p, x: x @ p["dense"]["kernel"])(p, X))
    X = jnp.ones((3, 7))
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert bits(jpeft.unload(after)) == bits(jpeft.unload(params))


def test_task_switching_swaps_adapters_over_one_base():
    f = form("unrolled")
    one, two = (
        moved(jpeft.lora(rank=2)(jax.random.key(k), f.params)) for k in range(2)
    )
    step = jax.jit(jpeft.adapt(f.fn))
    _, base = jpeft.partition(one)
    for params in (one, two):
        adapter, _ = jpeft.partition(params)
        got = step(jpeft.combine(adapter, base), *f.args)
        np.testing.assert_allclose(
            got, f.fn(jpeft.merge(params), *f.args), rtol=1e-5, atol=1e-5
        )
    assert step._cache_size() == 1
    assert all(
        innermost(a) is innermost(b)
        for a, b in zip(slots(one).values, slots(two).values, strict=True)
        if is_leaf(a)
    )


@pytest.mark.sample(8)
@pytest.mark.parametrize(("method", "name"), cases(("unrolled", "nnx")))
def test_flax_serializes_adapted_leaves(method, name):
    params, fresh = moved(attached(method, name)), attached(method, name)
    if name.endswith("nnx"):  # of an nnx.State Flax asks a pure dict
        params, fresh = map(nnx.to_pure_dict, (params, fresh))
    again = serialization.from_bytes(fresh, serialization.to_bytes(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert bits(again) == bits(params)
    state = serialization.to_state_dict(params)
    assert all(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves(state))
    assert bits(serialization.from_state_dict(fresh, state)) == bits(params)
