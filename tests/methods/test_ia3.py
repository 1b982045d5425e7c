"""IA3: the formula with its biases, what the defaults find, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import map_slots, slots

KEY = jax.random.key(0)
X = normal(1, 3, 7)


def n(*shape, k=0):
    return jax.random.normal(jax.random.key(k), shape)


def dense(i, o, k):
    return {"kernel": n(i, o, k=k), "bias": n(o, k=k + 50)}


def bert(layers=2):
    def layer(k):
        return {
            "attention": {
                "self": {name: dense(6, 6, k) for name in ("query", "key", "value")},
                "output": {"dense": dense(6, 6, k + 1)},
            },
            "intermediate": {"dense": dense(6, 8, k + 2)},
            "output": {"dense": dense(8, 6, k + 3)},
        }

    return {"layer": {str(k): layer(10 * k) for k in range(layers)}}


def moved(params):
    one = lambda p, x: (
        x.replace(scale=x.scale + 0.3 * n(*x.scale.shape, k=3))
        if is_leaf(x) and hasattr(x, "link") and not x.is_value
        else x
    )
    return map_slots(one, params)


def test_it_is_the_papers_formula():
    params = {"value": dense(7, 5, 0), "down": dense(5, 4, 1)}
    params = moved(
        jpeft.ia3(where="value/kernel", feedforward="down/kernel")(KEY, params)
    )

    def model(p, x):
        v = x @ p["value"]["kernel"] + p["value"]["bias"][None]
        return jnp.tanh(v) @ p["down"]["kernel"] + p["down"]["bias"][None]

    base = jax.tree.map(np.float64, jpeft.unload(params))
    l_v, l_ff = (np.float64(params[k]["kernel"].scale) for k in ("value", "down"))
    v = l_v * (np.float64(X) @ base["value"]["kernel"] + base["value"]["bias"])
    want = (l_ff * np.tanh(v)) @ base["down"]["kernel"] + base["down"]["bias"]
    got = jax.jit(jpeft.adapt(model))(params, X)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(
        model(jpeft.merge(params), X), want, rtol=2e-6, atol=2e-6
    )


def test_the_bias_trains_its_weights_vector():
    params = jpeft.ia3(where="value/kernel", feedforward=())(
        KEY, {"value": dense(7, 5, 0)}
    )
    assert jpeft.count(params).trainable == 5
    trainable, frozen = jpeft.partition(params)
    f = lambda p, x: jnp.sum(x @ p["value"]["kernel"] + p["value"]["bias"][None])
    grad = jax.grad(lambda t: jpeft.adapt(f)(jpeft.combine(t, frozen), X))(trainable)
    value = jpeft.unload(params)["value"]
    want = jnp.sum(X @ value["kernel"] + value["bias"][None], 0)
    np.testing.assert_allclose(grad["value"]["kernel"].scale, want, rtol=1e-5)


def test_by_default_keys_values_and_what_enters_the_last_weight():
    params = jpeft.ia3()(KEY, bert())
    kinds = {p: type(x).__name__ for p, x in slots(params).items() if is_leaf(x)}
    for k in range(2):
        at = f"layer/{k}"
        for name in ("key", "value"):
            assert kinds.pop(f"{at}/attention/self/{name}/kernel") == "ScaledOutput"
            assert kinds.pop(f"{at}/attention/self/{name}/bias") == "ScaledBias"
        assert kinds.pop(f"{at}/output/dense/kernel") == "ScaledInput"
    assert not kinds
    assert jpeft.count(params).trainable == 2 * (6 + 6 + 8)


def test_equal_layers_stay_equal_to_the_compiler():
    """What names a layer's vector is gone before anything is traced."""
    params = jpeft.ia3()(KEY, bert())

    @jax.jit
    def block(p, x):
        return jnp.tanh(x @ p["key"]["kernel"] + p["key"]["bias"][None])

    def model(p, x):
        for k in range(2):
            x = block(p["layer"][str(k)]["attention"]["self"], x)
        return x

    program = jax.make_jaxpr(jpeft.adapt(model))(params, n(3, 6))
    inner = [e for e in program.eqns if e.params.get("name") == "block"]
    assert len(inner) == 2
    assert inner[0].params["jaxpr"] is inner[1].params["jaxpr"]


def test_small_changes_survive_bfloat16():
    w = jnp.eye(8, dtype=jnp.bfloat16)
    params = jpeft.ia3(where="w", feedforward=())(KEY, {"w": w})
    leaf = params["w"]
    assert leaf.scale.dtype == jnp.float32
    # 1.003 rounds to 1 in bfloat16, but 1.5 * 1.003 does not round to 1.5.
    x = jnp.full((1, 8), 1.5, jnp.bfloat16)
    leaf = leaf.replace(scale=jnp.full(8, 1.003))
    y = jpeft.adapt(lambda p, x: x @ p["w"])({"w": leaf}, x)
    np.testing.assert_array_equal(y.astype(jnp.float32), 1.5078125)


def raises(f, *parts):
    with pytest.raises(ValueError) as error:
        f()
    for part in parts:
        assert part in str(error.value), error.value


def test_what_it_refuses():
    tree = {"value": dense(7, 5, 0)}
    raises(
        lambda: jpeft.ia3()(KEY, tree), "keys and values of an attention", "where=()"
    )
    raises(
        lambda: jpeft.ia3(where="value/kernel")(KEY, tree),
        "last weight of a feed-forward",
        "feedforward=()",
    )
    raises(lambda: jpeft.ia3(where=(), feedforward=()), "leave nothing to train")
    raises(
        lambda: jpeft.ia3(where="value/kernel", feedforward=".*kernel")(KEY, tree),
        "value/kernel: ia3: selected by where=",
    )
    raises(
        lambda: jpeft.ia3(where="valeu/kernel", feedforward=())(KEY, tree),
        "where='valeu/kernel' matches nothing",
    )


def test_a_bias_without_its_weight_or_of_another_shape():
    t = jpeft.ia3(where="value/kernel", feedforward=())
    params = t(KEY, {"value": dense(7, 5, 0)})
    raises(
        lambda: jpeft.merge({"value": {"bias": params["value"]["bias"]}}),
        "value/bias: this bias is rescaled",
        "'value/kernel'",
    )
    odd = {"value": {"kernel": n(7, 5), "bias": n(1, 5)}}
    raises(lambda: jpeft.merge(t(KEY, odd)), "value/bias", "(1, 5)", "(5,)")


def test_norm_tuning_takes_the_norms_alone():
    tree = {
        "ln_1": {"scale": n(6), "bias": n(6)},
        "attn": dense(6, 6, 0),
        "norm": {"weight": n(6)},
    }
    params = jpeft.norm_tuning()(KEY, tree)
    adapted = {p for p, x in slots(params).items() if is_leaf(x)}
    assert adapted == {"ln_1/scale", "ln_1/bias", "norm/weight"}
    leaf = params["norm"]["weight"].replace(delta=n(6, k=4))
    params = {**params, "norm": {"weight": leaf}}
    scale = lambda p, x: x * p["norm"]["weight"][None]
    got = jpeft.adapt(scale)(params, X[:, :6])
    weight = np.float64(tree["norm"]["weight"]) + np.float64(n(6, k=4))
    want = np.float64(X[:, :6]) * weight
    np.testing.assert_allclose(got, want, rtol=1e-6)
    raises(
        lambda: jpeft.norm_tuning(where="attn/bias")(KEY, tree),
        "attn/bias",
        "norm_tuning cannot act on",
    )
    raises(
        lambda: jpeft.norm_tuning()(KEY, {"attn": dense(6, 6, 0)}),
        "where='norm' matches nothing",
    )


def test_a_bias_by_another_name_is_rescaled_too():
    """Trees without modules: wk, bk beside each other."""
    params = {"attn": {k + c: n(6, 6, k=ord(c)) for c in "qkvo" for k in "w"}}
    params["attn"] |= {"b" + c: n(6, k=ord(c) + 50) for c in "qkv"}

    def model(p, x, by=(1.0, 1.0)):
        a = p["attn"]
        q, k, v = (x @ a["w" + c] + a["b" + c][None, None] for c in "qkv")
        s = jax.nn.softmax(q @ jnp.swapaxes(k * by[0], 1, 2))
        return x + s @ (v * by[1]) @ a["wo"]

    x = n(2, 3, 6, k=5)
    known = jpeft.find_uses(model, params, x)
    for uses in (None, known):
        tree = moved(jpeft.ia3(feedforward=())(KEY, params, uses=uses))
        by = [tree["attn"]["w" + c].scale[None, None] for c in "kv"]
        want = model(params, x, by)
        got = jpeft.adapt(model)(tree, x)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert isinstance(jpeft.merge(tree)["attn"]["bk"], jax.Array)
    bare = jpeft.bitfit(where=None, add="linear")(KEY, params, uses=known)["attn"]
    assert [k for k, x in bare.items() if is_leaf(x)] == ["wo"]


def test_a_refusal_names_weights_of_this_tree():
    params = {"a": {"kernel": n(6, 6)}, "b": {"kernel": n(6, 6)}}
    with pytest.raises(ValueError, match=r"where='[ab]/kernel', feedforward=\(\)$"):
        jpeft.ia3()(KEY, params)  # one sentence for both
    with pytest.raises(ValueError, match=r"where='([^']*)', or .* where=\(\)") as e:
        jpeft.ia3(feedforward=())(KEY, params)
    typed = str(e.value).split("where='")[1].split("'")[0]
    assert is_leaf(jpeft.ia3(where=typed, feedforward=())(KEY, params)["a"]["kernel"])
