"""No two places of a tree have one path."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.tree.paths import slots, spelled

KEY = jax.random.key(0)


def drawn(seed, shape=(8, 6)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def alike():
    """Two layers that read `encoder/linear`, in Haiku's spelling and in nested dicts.

    Only the first has a bias, which must not be taken for that of the second.
    """
    return {
        "encoder/linear": {"w": drawn(0), "b": drawn(1, (6,))},
        "encoder": {"linear": {"w": drawn(2)}},
    }


def model(p, x):
    one = x @ p["encoder/linear"]["w"] + p["encoder/linear"]["b"][None]
    return one - x @ p["encoder"]["linear"]["w"]


def test_a_slash_within_a_key_is_marked_where_two_paths_would_read_alike():
    assert slots(alike()).paths == (
        "encoder/linear/w",
        "encoder/%/linear/b",
        "encoder/%/linear/w",
    )


def test_other_paths_are_spelled_as_their_keys_are():
    """A leaf beside a module of its name is told apart by what follows."""
    tree = {"a/b": {"w": 1.0, "%": 1.0}, "a": {"b": 1.0, "c/d%": 1.0}, "": 1.0}
    assert slots(tree).paths == ("", "a/b", "a/c/d%", "a/b/%", "a/b/w")


def test_a_bias_is_not_found_beside_the_kernel_of_a_layer_that_reads_alike():
    tree = {"a/b": {"kernel": drawn(0)}, "a": {"b": {"bias": drawn(1, (6,))}}}
    assert slots(tree).paths == ("a/b/bias", "a/%/b/kernel")
    params = jpeft.bitfit(where=None, add="linear")(KEY, tree)
    assert jpeft.count(params).trainable == 6


@pytest.mark.parametrize(
    "keys",
    [
        [("a/b", "c"), ("a", "b/c"), ("a", "b", "c"), ("a/b/c",)],
        [("a", "b"), ("a/b",), ("a/%/b",), ("a", "%", "b"), ("a/%", "b")],
        [("a/", "b"), ("a", "/b"), ("a//b",), ("a", "", "b")],
        [("%", "/"), ("%//",), ("%%", "", ""), ("%", "", "")],
    ],
)
def test_no_two_places_are_spelled_alike(keys):
    assert len(set(spelled(keys))) == len(keys)


def test_keys_that_read_alike_are_numbered():
    tree = OrderedDict({1: {"w": drawn(0)}, "1": {"b": drawn(1), "w": drawn(2)}})
    assert slots(tree).paths == ("1/w", "1%2/b", "1%2/w")


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["lora", "vera", "full", "nf4", "bitfit"])
def test_two_weights_that_read_alike_stay_two(name, tmp_path):
    quantize = jpeft.quantize("nf4", compute_dtype=None)
    transform = {
        "lora": jpeft.lora(rank=2, init="pissa"),
        "vera": jpeft.vera(rank=2),
        "full": jpeft.full(".*"),
        "nf4": jpeft.chain(quantize, jpeft.lora(rank=2)),
        "bitfit": jpeft.bitfit(add="linear"),
    }[name]
    base, x = alike(), drawn(3, (4, 8))
    params = transform(KEY, base, uses=jpeft.find_uses(model, base, x))
    if name != "nf4":
        got = jpeft.adapt(model)(params, x)
        np.testing.assert_allclose(got, model(base, x), rtol=1e-5, atol=1e-5)
        plain = jpeft.unload(params)
        for a, b in zip(*map(jax.tree.leaves, (plain, base)), strict=True):
            np.testing.assert_array_equal(a, b)
    if name == "bitfit":  # the bias of the one layer, and one that the other lacked
        assert jpeft.count(params).trainable == 12
    trainable, frozen = jpeft.partition(params)
    moved = jax.tree.map(lambda x: x + drawn(x.size, x.shape), trainable)
    params = jpeft.combine(moved, frozen)
    jpeft.save(tmp_path / "a", params, transform)
    again = jpeft.load(tmp_path / "a", base)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(*map(jax.tree.leaves, (again, params)), strict=True):
        np.testing.assert_array_equal(a, b)
