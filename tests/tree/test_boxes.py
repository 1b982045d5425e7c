"""Boxes and containers: rewritten inside, wrapped again with the right axis names."""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft

KEY = jax.random.key(0)
X = jnp.ones((4, 8))


class Layer(nn.Module):
    partition: Any

    @nn.compact
    def __call__(self, x, _=None):
        init = self.partition(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return jnp.tanh(nn.Dense(8, kernel_init=init, name="dense")(x)), None


def test_codes_and_scales_in_boxes_have_the_weights_axes():
    w = jnp.linspace(-1, 1, 64 * 6).reshape(64, 6)
    t = jpeft.quantize("nf4", double=False)
    leaf = t(KEY, {"kernel": nn.Partitioned(w, ("in", "out"))})["kernel"]
    assert leaf.codes.names == ("in", "out") and leaf.scales.names == (None, "out")
    plain = t(KEY, {"kernel": w})["kernel"]
    np.testing.assert_array_equal(leaf.codes.value, plain.codes)
    np.testing.assert_array_equal(leaf.scales.value, plain.scales)
    assert jpeft.merge({"kernel": leaf})["kernel"].names == ("in", "out")


@pytest.mark.parametrize(
    "partition", [nn.with_partitioning, nn.with_logical_partitioning]
)
def test_linen_boxes_name_the_axes_of_new_arrays(partition):
    model = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(partition)
    boxed = model.init(KEY, X, None)["params"]
    fn = lambda p, x: model.apply({"params": p}, x, None)[0]
    uses = jpeft.find_uses(fn, boxed, X)
    assert uses["dense/kernel"].axes == "sio"
    params = jpeft.lora(rank=2)(KEY, boxed, uses=uses)
    leaf = params["dense"]["kernel"]
    assert leaf.a.names == ("layers", "embed", None)
    assert leaf.b.names == ("layers", None, "mlp")
    assert leaf.base.names == ("layers", "embed", "mlp")
    specs = nn.get_partition_spec(params)
    assert specs["dense"]["kernel"].a == P("layers", "embed", None)
    params["dense"]["kernel"] = leaf.replace(b=leaf.b.replace_boxed(leaf.b.value + 0.1))
    got = jax.jit(jpeft.adapt(fn))(params, X)
    merged = jpeft.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(boxed)
    np.testing.assert_allclose(got, fn(merged, X), rtol=1e-5, atol=1e-5)
    trainable, frozen = jpeft.partition(params)
    state = optax.adam(1e-3).init(trainable)
    assert len(jax.tree.leaves(state)) == 1 + 2 * 2
    assert jax.tree.structure(jpeft.combine(trainable, frozen)) == (
        jax.tree.structure(params)
    )


def test_nnx_variables_name_the_axes_of_new_arrays(tmp_path):
    mesh = jax.make_mesh((2, 4), ("d", "m"))
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("d", "m"))
        model = nnx.Linear(8, 8, kernel_init=init, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        peft = jpeft.lora(rank=2)
        params = peft(KEY, state)
        leaf = params["kernel"]
        assert isinstance(leaf.a, nnx.Param)
        assert tuple(leaf.a.get_metadata()["out_sharding"]) == ("d", None)
        assert tuple(leaf.b.get_metadata()["out_sharding"]) == (None, "m")
        assert leaf.a.value.sharding.spec == P("d", None)
    jpeft.save(tmp_path / "a", params, peft)
    again = jpeft.load(tmp_path / "a", state)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert again["kernel"].a.value.sharding.spec == P("d", None)


def test_nnx_state_with_other_variables():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.drop(self.norm(x))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    params = jpeft.lora(rank=2)(KEY, state)
    assert jpeft.summary(params).count("LowRank") == 2
    assert "layers/1/kernel" in jpeft.summary(params)

    def fn(state, x):
        model = nnx.merge(graph, state)
        y = model(x)
        return y, nnx.state(model, nnx.BatchStat)

    y, stats = jax.jit(jpeft.adapt(fn))(params, X)
    assert y.shape == X.shape and len(jax.tree.leaves(stats)) == 2


def test_a_state_that_is_returned_stays_adapted():
    graph, state = nnx.split(nnx.Linear(8, 5, rngs=nnx.Rngs(0)))
    params = jpeft.lora(rank=2)(KEY, state)

    def fn(state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.state(model)

    y, again = jpeft.adapt(fn)(params, X)
    assert y.shape == (4, 5)
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_frozen_dicts_and_mutable_collections_and_rngs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.Dense(7)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    model = Model()
    variables = flax.core.freeze(model.init(KEY, X, train=False))
    params = jpeft.lora(rank=2)(KEY, variables["params"])
    assert isinstance(params, flax.core.FrozenDict)
    tree = {"params": params, "batch_stats": variables["batch_stats"]}
    apply = jpeft.adapt(model.apply)
    y, changed = jax.jit(
        lambda t: apply(
            t, X, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
        )
    )(tree)
    want, _ = model.apply(
        variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": KEY}
    )
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    assert set(changed) == {"batch_stats"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    weight: jax.Array
    bias: jax.Array
    activation: Any = dataclasses.field(metadata={"static": True}, default=jnp.tanh)

    def __call__(self, x):
        return self.activation(
            jnp.einsum("oi,bi->bo", self.weight, x) + self.bias[None]
        )


def test_dataclass_models():
    model = [
        Dense(jnp.ones((5, 8)), jnp.zeros(5)),
        Dense(jnp.ones((3, 5)), jnp.zeros(3)),
    ]

    def fn(model, x):
        for layer in model:
            x = layer(x)
        return x

    uses = jpeft.find_uses(fn, model, X)
    assert uses["0/weight"].axes == "oi"
    assert uses["0/bias"].kind == "bias"
    adapted = jpeft.lora(rank=2)(KEY, model, uses=uses)
    assert adapted[0].weight.a.shape == (8, 2)
    np.testing.assert_allclose(jpeft.adapt(fn)(adapted, X), fn(model, X), rtol=1e-6)


def test_functions_among_the_leaves_are_left_alone():
    params = {"w": {"kernel": jnp.ones((8, 5))}, "activation": jnp.tanh, "n": 3}
    fn = lambda p, x: p["activation"](x @ p["w"]["kernel"]) * p["n"]
    adapted = jpeft.lora(rank=2)(KEY, params)
    np.testing.assert_allclose(jpeft.adapt(fn)(adapted, X), fn(params, X), rtol=1e-6)


def test_leaves_anywhere_in_the_arguments():
    leaf = jpeft.lora(rank=2)(KEY, {"kernel": jnp.ones((8, 5))})["kernel"]
    fn = lambda x, *more, w=None, mode="sum": (
        {"y": getattr(jnp, mode)(x @ w), "mode": mode},
        more,
    )
    out, more = jpeft.adapt(fn)(X, 3, w=leaf, mode="mean")
    assert out["mode"] == "mean" and more == (3,)
    np.testing.assert_allclose(out["y"], 8.0)


def test_adapters_are_made_beside_their_sharded_base():
    mesh = jax.make_mesh(
        (2, 4), ("d", "m"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    kernel = jax.device_put(jnp.ones((8, 12)), NamedSharding(mesh, P("d", "m")))
    params = jpeft.lora(rank=2)(KEY, {"kernel": kernel})
    assert params["kernel"].a.sharding.spec == P("d", None)
    assert params["kernel"].b.sharding.spec == P(None, "m")
    shapes = jax.eval_shape(lambda p: jpeft.lora(rank=2)(KEY, p), {"kernel": kernel})
    found = jpeft.sharding.shardings(shapes, {"kernel": kernel.sharding})
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert found["kernel"].b == NamedSharding(mesh, P(None, "m"))
    fn = lambda p, x: x @ p["kernel"]
    x = jax.device_put(X, NamedSharding(mesh, P(None, "d")))
    np.testing.assert_allclose(
        jax.jit(jpeft.adapt(fn))(params, x),
        fn(params | {"kernel": kernel}, X),
        rtol=1e-6,
    )


def test_a_row_parallel_weight_on_an_explicit_mesh():
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=kinds)
    with jax.set_mesh(mesh):
        kernel = jax.device_put(jnp.ones((8, 6)), P("m", None))
        x = jax.device_put(X, P("d", "m"))
        params = jpeft.lora(rank=2)(KEY, {"kernel": kernel})
        leaf = params["kernel"]
        params = {"kernel": leaf.replace(b=leaf.b + 0.1)}
        fn = lambda p, x: jnp.einsum(
            "bf,fd->bd", x, p["kernel"], out_sharding=P("d", None)
        )
        got = jax.jit(jpeft.adapt(fn))(params, x)
        assert got.sharding.spec == P("d", None)
        np.testing.assert_allclose(got, fn(jpeft.merge(params), x), rtol=1e-5)
        loss = lambda p: jnp.sum(jpeft.adapt(fn)(p, x) ** 2)
        _, grads = jax.jit(jpeft.value_and_grad(loss))(params)
        assert grads["kernel"].a.shape == (8, 2)
