"""Flax's serialisation and checkpoints, and its modules called without `adapt`."""

from __future__ import annotations

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.training import checkpoints
from flax.training.train_state import TrainState
from speed import slow_but

import jpeft

KEY = jax.random.key(3)
BASE = {"up": {"kernel": jnp.ones((64, 5)), "bias": jnp.zeros(5)}}
LORA = jpeft.lora(rank=2)
QLORA = jpeft.chain(jpeft.quantize("nf4", block_size=32), LORA)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def train_state(key):
    apply = jpeft.adapt(lambda p, x: x @ p["up"]["kernel"] + p["up"]["bias"][None])
    return TrainState.create(
        apply_fn=apply, params=QLORA(key, BASE), tx=jpeft.freeze(optax.adam(1e-3))
    )


def test_a_train_state_goes_through_bytes_and_acts_again():
    state, fresh = (train_state(jax.random.key(k)) for k in (1, 2))
    again = serialization.from_bytes(fresh, serialization.to_bytes(state))
    assert bits(again) == bits(state) != bits(fresh)
    assert jax.tree.structure(again.params) == jax.tree.structure(state.params)
    x = jnp.ones((2, 64))
    want = state.apply_fn(state.params, x)
    np.testing.assert_array_equal(again.apply_fn(again.params, x), want)
    raw = serialization.msgpack_restore(serialization.to_bytes(state.params))
    assert sorted(raw["up"]["kernel"]) == ["a", "b", "base"]
    assert bits(serialization.from_state_dict(fresh.params, raw)) == bits(state.params)


@pytest.mark.parametrize("by_orbax", slow_but((False,), (False, True)))
def test_flax_checkpoints_hold_a_train_state(by_orbax, tmp_path):
    state, fresh = (train_state(jax.random.key(k)) for k in (1, 2))
    before = flax.config.flax_use_orbax_checkpointing
    flax.config.update("flax_use_orbax_checkpointing", by_orbax)
    try:
        checkpoints.save_checkpoint(tmp_path / "run", state, step=1)
        again = checkpoints.restore_checkpoint(tmp_path / "run", fresh)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", before)
    assert bits(again) == bits(state)


def test_boxes_are_kept():
    box = lambda x: nn.Partitioned(x, (None,) * x.ndim)
    params, fresh = (QLORA(jax.random.key(k), jax.tree.map(box, BASE)) for k in (1, 2))
    again = serialization.from_bytes(fresh, serialization.to_bytes(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert bits(again) == bits(params)


def test_a_state_of_another_transform_is_refused():
    params = LORA(KEY, BASE)
    data = serialization.to_bytes(params)
    with pytest.raises(ValueError, match="up/kernel: the target has a LowRank") as e:
        serialization.from_bytes(params, serialization.to_bytes(BASE))
    assert "the state has an array" in str(e.value)
    with pytest.raises(ValueError, match="up/kernel: the target has a Triplets"):
        serialization.from_bytes(jpeft.adalora(rank=2)(KEY, BASE), data)
    with pytest.raises(ValueError, match=r"up/kernel/a: .*float32\[64, 3\], the state"):
        serialization.from_bytes(jpeft.lora(rank=3)(KEY, BASE), data)
    int8 = jpeft.quantize("int8", block_size=32, double=False)(KEY, BASE)
    uint8 = jpeft.quantize("int8_asymmetric", block_size=32, double=False)(KEY, BASE)
    state = serialization.to_state_dict(uint8)
    del state["up"]["kernel"]["zeros"]
    with pytest.raises(ValueError, match=r"codes: the target has int8\[64, 5\]"):
        serialization.from_state_dict(int8, state)
    # What the message says to do.
    again = serialization.from_bytes(LORA(jax.random.key(9), BASE), data)
    assert bits(again) == bits(params)


@pytest.mark.parametrize("transform", [LORA, QLORA])
def test_an_nnx_model_called_without_adapt_says_so(transform):
    model, x = nnx.Linear(64, 5, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
    uses = jpeft.find_uses(lambda m, x: m(x), model, x)
    adapted = transform(KEY, model, uses=uses)
    with pytest.raises(TypeError, match=r"Call the model through jpeft.adapt\(fn\)"):
        adapted(x)
    graph, state = nnx.split(model)
    state = transform(KEY, state, uses=uses)
    with pytest.raises(TypeError, match=r"Call the model through jpeft.adapt\(fn\)"):
        nnx.merge(graph, state)(x)


OPERATIONS = {
    "matmul": lambda w, x: x @ w,
    "matmul of NumPy": lambda w, x: np.ones((2, 64), np.float32) @ w,
    "sum": lambda w, x: w + 1.0,
    "product": lambda w, x: 2.0 * w,
    "row": lambda w, x: w[0],
    "difference": lambda w, x: w - w,
    "array": lambda w, x: np.asarray(w),
    "loop": lambda w, x: list(w),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_adapted_leaf_used_as_an_array_says_so(name):
    leaf, x = LORA(KEY, BASE)["up"]["kernel"], jnp.ones((2, 64))
    with pytest.raises(TypeError, match=r"Call the model through jpeft.adapt\(fn\)"):
        OPERATIONS[name](leaf, x)
