"""Quantised weights on several devices: the same numbers, and only codes are sent."""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from speed import every_nth

import jpeft
from jpeft.formats import codebooks
from jpeft.kernels import four_bit
from jpeft.sharding import plan
from jpeft.sharding.plan import Dim, Operation
from jpeft.sharding.specs import whole_shards

BOOK = jnp.asarray(codebooks.NF4)
BATCH, TOKENS, WIDTH, HIDDEN, LAYERS = 4, 8, 128, 256, 2
# Two orders of a float32 sum, of up to 512 terms here, as a part of the largest sum.
CLOSE = 512 * float(np.finfo(np.float32).eps)


def mesh(data=4, model=2, kind="Auto"):
    types = (getattr(AxisType, kind),) * 2
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), types, devices=devices)


def placed(on, arrays, specs):
    """Each array by its specification; scales of few blocks whole, as `jpeft` does."""
    specs = [
        whole_shards(spec, x.shape, on) for x, spec in zip(arrays, specs, strict=True)
    ]
    return [
        jax.device_put(x, NamedSharding(on, s))
        for x, s in zip(arrays, specs, strict=True)
    ]


def collectives(f, *arguments):
    """(operation, dtype, shape) of what devices send each other."""
    text = jax.jit(f).lower(*arguments).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf" = (\(?[^=]*?) (?:{kinds})(?:-start)?\(", text)
    arrays = [a for made in found for a in re.findall(r"(\w+)\[([\d,]*)\]", made)]
    return [(d, tuple(int(n) for n in s.split(",") if n)) for d, s in arrays]


def off(a, b):
    """The largest difference, as a part of the largest value."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / np.max(np.abs(y)))
        for x, y in pairs
    )


# --- one product ---------------------------------------------------------------------


def both_ways(block_size=64):
    """x @ W, and the gradient for x."""

    def f(x, codes, scales):
        product = lambda x: four_bit.matmul(
            x, codes, scales, BOOK, block_size=block_size
        )
        y, back = jax.vjp(product, x)
        return y, back(y)[0]

    return f


def weight(k, n, block_size=64, seed=0):
    w = normal(seed, k, n)
    return four_bit.quantize(w, block_size=block_size)


def activation(m, k):
    return normal(9, m, k)


ROWS, COLUMNS = P("data"), P(None, "model")
OF_X = [ROWS, COLUMNS, P(("data", "model"))]
OF_W = [COLUMNS, P("model"), ROWS, P("data", "model"), P(("data", "model"))]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "of_x, of_w, block_size",
    every_nth(
        3,
        [
            *itertools.product(OF_X, OF_W, [64]),
            *itertools.product([P(), ROWS], [ROWS, P("model")], [32, 256, 4096]),
        ],
    ),
    ids=str,
)
def test_a_product_is_the_same_however_it_is_cut(of_x, of_w, block_size):
    f, arrays, made = on_one_device(block_size)
    cut = placed(mesh(), arrays, (of_x, of_w, of_w))
    assert off(jax.jit(f)(*cut), made) < CLOSE


@functools.cache
def on_one_device(block_size):
    f = both_ways(block_size)
    arrays = (activation(16, 512), *weight(512, 24, block_size))
    return f, arrays, jax.jit(f)(*arrays)


def test_columns_of_one_shard_need_nothing_from_another():
    x, codes, scales = activation(16, 128), *weight(128, 64)
    cut = placed(mesh(), (x, codes, scales), (P("data"), *[P(None, "model")] * 2))
    assert collectives(lambda *a: four_bit.matmul(*a, BOOK), *cut) == []


def test_rows_of_one_shard_make_a_part_of_the_sum():
    x, codes, scales = activation(16, 256), *weight(256, 64)
    cut = placed(mesh(), (x, codes, scales), (P(None, "model"), *[P("model")] * 2))
    sent = collectives(lambda *a: four_bit.matmul(*a, BOOK), *cut)
    assert sent == [("f32", (16, 64))]


@pytest.mark.parametrize("of_w", [P("data"), P(None, "data")])
def test_codes_are_gathered_and_never_values(of_w):
    x, codes, scales = activation(1024, 512), *weight(512, 64)
    cut = placed(mesh(), (x, codes, scales), (P("data"), of_w, of_w))
    sent = collectives(lambda *a: four_bit.matmul(*a, BOOK), *cut)
    assert sorted(sent) == [("f32", (8, 64)), ("u8", (256, 64))]


def test_a_handful_of_tokens_is_sent_rather_than_the_codes():
    x, codes, scales = activation(4, 512), *weight(512, 512)
    cut = placed(mesh(), (x, codes, scales), (P("data"), P("data"), P("data")))
    sent = collectives(lambda *a: four_bit.matmul(*a, BOOK), *cut)
    assert all(dtype != "u8" for dtype, _ in sent)
    assert sum(math.prod(shape) for _, shape in sent) < codes.size


@pytest.mark.sample(1)
@pytest.mark.parametrize("k, n, m", [(192, 5, 7), (64, 1, 1), (320, 6, 3)])
def test_sizes_that_do_not_divide_are_gathered(k, n, m):
    arrays = (activation(m, k), *weight(k, n))
    spec = P("data") if (k // 2) % 4 == 0 else P()
    cut = placed(mesh(), arrays, (P(), spec, P()))
    assert off(jax.jit(both_ways())(*cut), both_ways()(*arrays)) < CLOSE


def test_one_device_compiles_what_it_would_without_a_mesh():
    x, codes, scales = activation(16, 128), *weight(128, 64)
    whole = NamedSharding(jax.make_mesh((1,), ("data",), (AxisType.Auto,)), P())
    for place in (lambda a: a, lambda a: jax.device_put(a, whole)):
        arrays = map(place, (x, codes, scales))
        lowered = jax.jit(lambda *a: four_bit.matmul(*a, BOOK)).lower(*arrays)
        assert "custom_call" not in lowered.as_text()


def test_decoding_and_encoding_stay_where_they_are():
    w = normal(0, 512, 24)
    (cut,) = placed(mesh(), (w,), (P("data", "model"),))

    def there_and_back(w):
        codes, scales = four_bit.quantize(w)
        return codes, four_bit.dequantize(codes, scales, BOOK, dtype=jnp.float32)

    assert collectives(there_and_back, cut) == []
    for a, b in zip(jax.jit(there_and_back)(cut), there_and_back(w), strict=True):
        np.testing.assert_array_equal(a, b)


# --- vmap ----------------------------------------------------------------------------


def experts(count=4):
    x = normal(3, count, 16, 128)
    w = normal(4, count, 128, 24)
    return x, *jax.vmap(four_bit.quantize)(w)


@pytest.mark.slow
def test_experts_work_where_their_weights_are():
    arrays = experts()
    cut = placed(mesh(), arrays, [P("data")] * 3)
    f = jax.vmap(both_ways())
    assert collectives(f, *cut) == []
    assert off(jax.jit(f)(*cut), f(*arrays)) < CLOSE


@pytest.mark.slow
def test_a_batch_of_x_alone_is_more_tokens():
    x, codes, scales = experts()
    f = jax.vmap(both_ways(), (0, None, None))
    arrays = (x, codes[0], scales[0])
    cut = placed(mesh(), arrays, (P("data"), P(None, "model"), P(None, "model")))
    assert off(jax.jit(f)(*cut), f(*arrays)) < CLOSE
    jaxpr = str(jax.make_jaxpr(f)(*arrays))
    assert f"f32[{4 * 16},128]" in jaxpr and "f32[4,128,24]" not in jaxpr


@pytest.mark.slow
def test_a_batch_of_batches_of_experts():
    x, codes, scales = experts()
    f = jax.vmap(jax.vmap(both_ways()), (0, None, None))
    arrays = (jnp.stack([x, 2 * x, 3 * x]), codes, scales)
    cut = placed(mesh(), arrays, (P(None, "data"), P("data"), P("data")))
    assert off(jax.jit(f)(*cut), f(*arrays)) < CLOSE


# --- shard_map of the caller ---------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("checked", [True, False])
def test_inside_shard_map_a_kernel_sees_one_shard(checked):
    arrays = (activation(16, 128), *weight(128, 24))
    specs = (P("data"), P(None, "model"), P(None, "model"))
    one = lambda x, c, s: four_bit.matmul(x, c, s, BOOK)
    sharded = jax.shard_map(
        one,
        mesh=mesh(),
        in_specs=specs,
        out_specs=P("data", "model"),
        check_vma=checked,
    )
    gradient = lambda f: jax.grad(lambda x: jnp.sum(f(x, *arrays[1:]) ** 2))
    assert off(jax.jit(sharded)(*arrays), one(*arrays)) < CLOSE
    assert off(jax.jit(gradient(sharded))(arrays[0]), gradient(one)(arrays[0])) < CLOSE


def test_shard_map_over_some_of_the_axes():
    arrays = (activation(16, 128), *weight(128, 24))
    one = lambda x, c, s: four_bit.matmul(x, c, s, BOOK)
    some = jax.shard_map(
        one,
        mesh=mesh(),
        in_specs=(P("data"), P(), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    cut = placed(mesh(), arrays, (P(), P("model"), P("model")))
    assert off(jax.jit(some)(*cut), one(*arrays)) < CLOSE


# --- a model -------------------------------------------------------------------------


def init(key):
    keys = jax.random.split(key, 3)
    normal = lambda k, *s: jax.random.normal(k, s) * s[-2] ** -0.5
    return {
        "layers": {
            "up": normal(keys[0], LAYERS, WIDTH, HIDDEN),
            "down": normal(keys[1], LAYERS, HIDDEN, WIDTH),
        },
        "head": normal(keys[2], WIDTH, 12),
    }


def model(params, x):
    def layer(x, w):
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return x @ params["head"]


PLACES = {
    "columns, then rows": (P(None, None, "model"), P(None, "model"), P(None, "model")),
    "fully sharded": (P(None, "data"), P(None, "data"), P("data")),
    "fully sharded by columns": (P(None, None, "data"), P(None, None, "data"), P()),
    "both": (P(None, "data", "model"), P(None, "model", "data"), P(None, "model")),
    "layers": (P("model"), P("model"), P()),
}


def loss(params, x):
    return jnp.mean(jpeft.adapt(model)(params, x) ** 2)


step = jpeft.value_and_grad(loss)


@functools.cache
def on_one(double=True, **how):
    """(adapted params, x, what a step makes of them)."""
    base = init(jax.random.key(0))
    x = normal(1, BATCH, TOKENS, WIDTH)
    # Rounded to bfloat16, sums in another order would differ visibly.
    how = {"compute_dtype": "float32", "double": double, **how}
    transform = jpeft.chain(
        jpeft.quantize(where=r"layers/.*", **how),
        jpeft.lora(rank=2, where=r"layers/.*"),
    )
    uses = jpeft.find_uses(model, base, x)
    params = transform(jax.random.key(2), base, uses=uses)
    # An adapter that is zero would have no gradient for one of its factors.
    train, rest = jpeft.partition(params)
    params = jpeft.combine(jax.tree.map(lambda a: a + 0.01, train), rest)
    return params, x, jax.jit(step)(params, x)


def there(place, kind="Auto", **how):
    """The same params and x on a mesh."""
    params, x, _ = on_one(**how)
    on = mesh(kind=kind)
    up, down, head = PLACES[place]
    specs = {"layers": {"up": up, "down": down}, "head": head}
    shardings = jax.tree.map(
        lambda s: NamedSharding(on, s), specs, is_leaf=lambda s: isinstance(s, P)
    )
    params = jax.device_put(params, jpeft.sharding.shardings(params, shardings))
    return params, jax.device_put(x, NamedSharding(on, P("data")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, double",
    every_nth(2, [*((place, True) for place in PLACES), ("both", False)]),
)
def test_a_step_is_the_same_wherever_the_weights_are(place, double):
    made = jax.jit(step)(*there(place, double=double))
    assert off(made, on_one(double=double)[2]) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, block_size",
    every_nth(
        4,
        [
            ("int8", 256),
            ("quantile4", 64),
            ("int4_asymmetric", "channel"),
            ("dynamic8", "tensor"),
            ("q4_1", 32),
        ],
    ),
)
def test_formats_without_a_kernel_are_cut_alike(format, block_size):
    how = {"format": format, "block_size": block_size, "double": False}
    assert off(jax.jit(step)(*there("both", **how)), on_one(**how)[2]) < CLOSE


@pytest.mark.slow
def test_a_table_is_multiplied_where_its_rows_are():
    table = normal(0, 16, 128)
    x = normal(1, 8, 128)
    logits = lambda params, x: x @ params["embed"][jnp.arange(16)].T @ params["embed"]
    tied = lambda params, x: x @ params["embed"].T
    uses = jpeft.find_uses(lambda p, i: p["embed"][i], {"embed": table}, jnp.arange(3))
    how = {"where": "embed", "compute_dtype": "float32", "double": False}
    params = jpeft.quantize(**how)(jax.random.key(2), {"embed": table}, uses=uses)
    on = mesh()
    where = jpeft.sharding.shardings(
        params, {"embed": NamedSharding(on, P("model", None))}
    )
    there = jax.device_put(params, where)
    f = jpeft.adapt(tied)
    assert collectives(f, there, *placed(on, (x,), (P("data"),))) == []
    assert off(jax.jit(f)(there, x), f(params, x)) < CLOSE
    f = jpeft.adapt(logits, materialize="allow")
    assert off(jax.jit(f)(there, x), f(params, x)) < CLOSE


def test_quantised_on_the_mesh_it_stays_on_the_mesh():
    on = mesh()
    base = {"w": placed(on, (jnp.ones((256, 6)),), (P("data", "model"),))[0]}
    uses = jpeft.find_uses(lambda p, x: x @ p["w"], base, jnp.ones((3, 256)))
    leaf = jpeft.quantize()(jax.random.key(0), base, uses=uses)["w"]
    assert leaf.codes.sharding.spec == P("data", "model")
    assert leaf.scales.sharding.spec == P("data", "model")
    assert leaf.nested.sharding.is_fully_replicated
    assert leaf.sharding.spec == P("data", "model")


def test_scales_of_few_blocks_are_whole_on_every_device():
    on = mesh()
    make = lambda: jpeft.quantize(block_size=128, double=False)(
        jax.random.key(0), {"w": jnp.ones((256, 6))}
    )
    abstract = jax.eval_shape(make)
    found = jpeft.sharding.shardings(abstract, {"w": NamedSharding(on, P("data"))})
    assert found["w"].codes.spec == P("data", None)
    assert found["w"].scales.spec == P(None, None)
    jax.device_put(make(), found)


# --- known while the program is traced -----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("place", ["fully sharded", "both", "layers"])
def test_what_is_declared_changes_no_number(place):
    params, x = there(place)
    with jpeft.sharding.declare(params, batch="data"):
        traced = jax.jit(step).trace(params, x)
        made = traced.lower().compile()(params, x)
    assert "shard_map" in str(traced.jaxpr)
    assert off(made, on_one()[2]) < CLOSE


@pytest.mark.slow
def test_a_wrong_declaration_changes_no_number():
    other, _ = there("fully sharded by columns")
    with jpeft.sharding.declare(other, batch=("model", "data")):
        made = jax.jit(step)(*there("both"))
    assert off(made, on_one()[2]) < CLOSE


@pytest.mark.slow
def test_a_declaration_made_again_compiles_nothing_new():
    params, x = there("both")
    traced = []
    f = jax.jit(lambda *a: (traced.append(1), loss(*a))[1])
    for _ in range(2):
        with jpeft.sharding.declare(params, batch="data"):
            f(params, x)
    assert len(traced) == 1


def test_a_declaration_names_what_it_lacks():
    with pytest.raises(ValueError, match="no quantised weight of params is on a mesh"):
        jpeft.sharding.declare(on_one()[0], batch="data")
    with pytest.raises(ValueError, match=r"batch='fsdp'.*\('data', 'model'\)"):
        jpeft.sharding.declare(there("both")[0], batch="fsdp")


@pytest.mark.sample(1)
@pytest.mark.parametrize("double", [True, False])
def test_shardings_may_be_part_of_the_types(double):
    arrays = there("fully sharded", kind="Explicit", double=double)
    assert off(jax.jit(step)(*arrays), on_one(double=double)[2]) < CLOSE


TYPED = {  # weight, activation, result
    "columns": (P(None, "model"), P("data"), P("data", "model")),
    "rows": (P("model"), P("data", None, "model"), P("data")),
    "fully sharded": (P("data", "model"), P("data"), P("data", "model")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, double, lora",
    every_nth(12, list(itertools.product(TYPED, (True, False), (True, False)))),
)
def test_the_model_may_say_where_a_product_goes(place, double, lora):
    """Quantised where it is, and multiplied with an `out_sharding`."""
    of_w, of_x, of_y = TYPED[place]
    equation = "bsi,ihd->bhsd"
    w = normal(0, 512, 4, 16)
    x = normal(1, 8, 3, 512)
    how = {"where": ".*", "compute_dtype": "float32", "double": double}
    chain = [jpeft.quantize(**how), jpeft.lora(2, where=".*", init="gaussian")]
    peft = jpeft.chain(*chain[: 1 + lora])

    def model(params, x, **where):
        return jnp.einsum(equation, x, params["w"], **where)

    def loss(x, params, **where):
        y = jpeft.adapt(functools.partial(model, **where))(params, x)
        return jnp.sum(jnp.square(y)), y

    uses = jpeft.find_uses(model, {"w": w}, x)
    step = jax.value_and_grad(loss, has_aux=True)
    (_, expected), expected_dx = step(x, peft(jax.random.key(2), {"w": w}, uses=uses))
    on = mesh(kind="Explicit")
    with jax.set_mesh(on):
        there = {"w": jax.device_put(w, of_w)}
        params = peft(jax.random.key(2), there, uses=uses)
        given = jax.device_put(x, of_x)
        (_, y), dx = jax.jit(functools.partial(step, out_sharding=of_y))(given, params)
        merged = jpeft.merge(params) if lora else params["w"].materialize()
    assert tuple(y.sharding.spec)[:2] == (*of_y, None)[:2]
    assert jax.typeof(dx) == jax.typeof(given)
    assert off(y, expected) < CLOSE and off(dx, expected_dx) < CLOSE
    assert jax.typeof(merged["w"] if lora else merged).sharding.spec == P(
        *of_w, *(None,) * (3 - len(of_w))
    )


def test_a_mesh_of_two_kinds_is_refused():
    kinds = (AxisType.Explicit, AxisType.Auto)
    on = jax.make_mesh((4, 2), ("data", "model"), kinds)
    arrays = placed(on, (activation(16, 128), *weight(128, 8)), [P()] * 3)
    with pytest.raises(
        ValueError, match="expected all of one kind; make the mesh with"
    ):
        four_bit.matmul(*arrays, BOOK)


# --- the parts -----------------------------------------------------------------------


def operation(m, k, n, block_size=64):
    return Operation(
        operands=(
            (Dim("m"), Dim("k")),
            (Dim("k", 2), Dim("n")),
            (Dim("k", block_size), Dim("n")),
            (Dim(None),),
        ),
        results=((Dim("m"), Dim("n")),),
        sizes={"m": m, "k": k, "n": n},
        units={"k": 64},
        summed="k",
        weights=3,
    )


def chosen(of_x, of_w, m=4096, sizes=(1 << 22, 1 << 19, 1 << 14, 64), **more):
    specs = [of_x, of_w, of_w, ((),)]
    axes = {"data": 4, "model": 2}
    return plan.choose(operation(m, 512, 256, **more), axes, specs, sizes, [])


def test_tokens_keep_their_axis_where_the_codes_are_cheaper_to_send():
    on_data = (("data",), ())
    assert chosen(on_data, on_data) == {"m": ("data",)}
    assert chosen(on_data, on_data, sizes=(1 << 10, 1 << 19, 1 << 14, 64)) == {
        "k": ("data",)
    }
    both = (("data",), ("model",))
    assert chosen(on_data, both) == {"m": ("data",), "n": ("model",)}


def test_no_part_is_less_than_a_group_or_a_piece_of_a_block():
    whole, on_both = ((), ()), (("data", "model"), ())
    assert chosen(whole, on_both) == {"k": ("data", "model")}
    assert chosen(whole, on_both, block_size=4096) == {"k": ("data", "model")}
    tall = operation(6, 3 * 192, 7, block_size=256)
    specs = [whole, on_both, on_both, ((),)]
    # Three parts of 192 rows are not whole blocks of 256, nor each inside one.
    assert plan.choose(tall, {"data": 3, "model": 1}, specs, [1] * 4, []) == {}


def test_the_rule_leaves_out_what_the_mesh_would_cut_in_half():
    shapes = [(6, 512), (256, 10), (2, 10), (16,)]
    rule, sizes = plan.sharding_rule(
        operation(6, 512, 10, block_size=256), shapes, {"data": 4}
    )
    assert rule == "m o0, (k o1) n, o2 n, o3 -> m n"
    assert sizes == {"k": 8, "o1": 32}
    rule, sizes = plan.sharding_rule(operation(6, 64, 10), shapes, {"data": 4})
    assert rule == "m o0, o1 n, o2 n, o3 -> m n" and sizes == {}


def test_an_axis_cut_by_half_of_a_mesh_axis_counts_as_whole():
    on = mesh()
    halves = jax.make_mesh((2, 2, 2), ("a", "b", "c"), (AxisType.Auto,) * 3)
    spec = lambda *entries: NamedSharding(halves, P(*entries))
    read = lambda s: plan.spec_of(_Nameless(s), (8, 8), on)
    assert read(spec(("a", "b"), "c")) == (("data",), ("model",))
    assert read(spec("c", ("a", "b"))) == (("model",), ("data",))
    assert read(spec(("c", "a", "b"))) == (("model", "data"), ())
    assert read(spec("a", "c")) == ((), ("model",))
    assert read(spec()) == ((), ())


class _Nameless:
    """A sharding as the compiler gives it: without a mesh."""

    def __init__(self, sharding):
        self._sharding = sharding
        self.is_fully_replicated = sharding.is_fully_replicated
        self.devices_indices_map = sharding.devices_indices_map


@pytest.mark.sample(2)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("format", [None, "nf4", "int8", "quantile4"])
def test_a_step_inside_shard_map_with_its_checks(format, own):
    """JAX itself says there that a weight varies with the activation (`pvary`).

    own: each device takes the gradient of its own examples, and they are averaged.
    """
    layers = jpeft.lora(rank=3)
    if format is not None:
        layers = jpeft.chain(jpeft.quantize(format, compute_dtype=None), layers)
    w = normal(0, 64, 5)
    params = layers(jax.random.key(1), {"kernel": w})
    trainable, frozen = jpeft.partition(params)
    x = normal(2, 8, 64)
    apply = jpeft.adapt(lambda p, x: x @ p["kernel"])
    loss = lambda t, f, x: jnp.mean(apply(jpeft.combine(t, f), x) ** 2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mean = lambda x: jax.lax.pmean(x, "data")
    step = jax.value_and_grad(lambda t, f, x: mean(loss(t, f, x)))

    def apart(t, f, x):
        t = jax.tree.map(lambda a: jax.lax.pcast(a, "data", to="varying"), t)
        return mean(jax.value_and_grad(loss)(t, f, x))

    step = jax.shard_map(
        apart if own else step,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
    )
    got = jax.jit(step)(trainable, frozen, x)
    want = jax.value_and_grad(loss)(trainable, frozen, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Where the weight is cut; blocks run down its rows.
GATHERED = [
    *itertools.product(["nf4", "int8", "int4_asymmetric", "quantile4"], [0, 1], [64]),
    *itertools.product(["nf4", "int8"], [1], ["channel", "tensor"]),
    ("q4_1", 0, 32),
]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "axis", "block_size"), every_nth(2, GATHERED))
def test_a_weight_gathered_for_its_use_is_sent_as_codes(format, axis, block_size):
    """Fully sharded data parallelism, written by hand."""
    layers = jpeft.chain(
        jpeft.quantize(format, block_size=block_size, compute_dtype=None),
        jpeft.lora(rank=3),
    )
    base = {"kernel": normal(0, 512, 8)}
    params = layers(jax.random.key(1), base)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape)
    trainable, frozen = jpeft.partition(params)
    trainable = jax.tree.map(noise, trainable)
    x = normal(2, 8, 512)
    on = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    plain = lambda p, x: jnp.tanh(x @ p["kernel"])

    def cut(p, x):
        gather = lambda w: jax.lax.all_gather(w, "data", axis=axis, tiled=True)
        return jax.shard_map(
            lambda w, x: plain({"kernel": gather(w)}, x),
            mesh=on,
            in_specs=(P(*[None] * axis, "data"), P("data")),
            out_specs=P("data"),
        )(p["kernel"], x)

    def gradient(fn):
        loss = lambda t, x: jnp.mean(jpeft.adapt(fn)(jpeft.combine(t, frozen), x) ** 2)
        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    assert off(gradient(cut)(trainable, x), gradient(plain)(trainable, x)) < CLOSE
    sent = collectives(gradient(cut), trainable, x)
    assert {d for d, shape in sent if math.prod(shape) >= 512 * 8 // 2} <= {"u8", "s8"}
    assert any(d in ("u8", "s8") for d, _ in sent)


def test_shards_with_a_scale_of_their_own_are_not_put_together():
    on = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def f(w, x):
        params = jpeft.quantize("int8", block_size="tensor")(
            jax.random.key(0), {"kernel": w}
        )
        gather = lambda w: jax.lax.all_gather(w, "data", axis=1, tiled=True)
        return jpeft.adapt(lambda p, x: x @ gather(p["kernel"]))(params, x)

    w, x = jnp.ones((64, 8)), jnp.ones((8, 64))
    specs = (P(None, "data"), P("data"))
    with pytest.raises(jpeft.DensifyError, match="kernel"):
        jax.shard_map(f, mesh=on, in_specs=specs, out_specs=P("data"))(w, x)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_model_that_reads_its_types_sees_those_of_the_weight(lora):
    """On an explicit mesh: in a scan's carry, in a branch, at `shard_map`'s door."""
    on = mesh(2, 2, "Explicit")
    put = lambda x, *names: jax.device_put(x, NamedSharding(on, P(*names)))
    draw = lambda k, *shape: 0.2 * jax.random.normal(jax.random.key(k), shape)
    base = {
        "stack": put(draw(1, 3, 64, 64), None, None, "model"),
        "up": put(draw(2, 64, 256), None, "model"),
        "down": put(draw(3, 256, 64), "model", None),
    }
    x = put(draw(4, 8, 64), "data", "model")

    def one(p, a, x):
        return jax.lax.psum(jnp.tanh(x @ p) @ a, "model")

    def fn(p, x):
        rows = lambda x: jax.sharding.reshard(x, P("data", None))
        step = lambda c, w: (jnp.tanh(rows(c) @ w), None)
        x = jax.lax.scan(step, x, p["stack"])[0]
        x = jax.lax.cond(x.sum() > 0, lambda x: rows(x) @ p["stack"][0], lambda x: x, x)
        specs = (P(None, "model"), P("model", None), P("data", None))
        run = jax.shard_map(one, in_specs=specs, out_specs=P("data", None))
        return run(p["up"], p["down"], rows(x))

    with jax.set_mesh(on):
        uses = jpeft.find_uses(fn, base, x)
        transform = jpeft.quantize("nf4", compute_dtype=None)
        if lora:
            transform = jpeft.chain(transform, jpeft.lora(rank=3))
        params = transform(jax.random.key(0), base, uses=uses)
        got = jax.jit(jpeft.adapt(fn))(params, x)
        assert off(got, jax.jit(fn)(jpeft.merge(params), x)) < CLOSE
