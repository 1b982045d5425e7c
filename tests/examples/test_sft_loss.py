"""The loss of instruction tuning does not depend on how tokens are laid out."""

import dataclasses

import _lm
import _loop
import _rows
import _stages
import jax
import llm
import numpy as np
import optax
import pytest
import sft
from test_llm import METHODS, SMALL, adapted

import jpeft

# Float32 sums over some 60 tokens; losses are about 4.
TOLERANCE = 1e-5
LANGUAGE = _lm.Language(None, SMALL, llm.Decoder(SMALL), None, None)


def documents(virtual):
    rng = np.random.default_rng(0)
    front = np.arange(37, 37 + virtual)
    made = []
    for size in (9, 4, 12, 7, 5, 11):
        ids = np.concatenate([front, rng.integers(0, 37, size)]).astype(np.int32)
        counted = np.arange(len(ids)) >= virtual + size // 2
        made.append(_rows.Document(ids, counted))
    return made


def batch_of(rows):
    return {"ids": rows.ids, "segments": rows.segments, "counted": rows.counted}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", METHODS)
def test_packed_and_unpacked_losses_agree(name):
    params, virtual = adapted(name)
    loss = jax.jit(sft.make_loss(LANGUAGE))
    packed = _rows.pack(documents(virtual), 28, pad=2)
    apart = _rows.one_each(documents(virtual), 28, pad=2)
    assert len(packed) < len(apart)
    one, other = (loss(params, batch_of(r)) for r in (packed, apart))
    assert float(one.count) == float(other.count)
    np.testing.assert_allclose(one.mean(), other.mean(), rtol=0, atol=TOLERANCE)


def test_parts_of_a_batch_do_not_matter():
    """Parts with one counted token and with many; and one with none."""
    params, _ = adapted("lora")
    trainable, frozen = jpeft.partition(params)
    rows = _rows.one_each(documents(0), 16, pad=2)
    counted = rows.counted.copy()
    counted[0], counted[1, 3:] = False, False
    batch = batch_of(dataclasses.replace(rows, counted=counted))
    found = []
    for parts in (1, 6):
        optimizer = _loop.optimizer(sft.Settings(schedule="constant"))
        step = sft.make_step(LANGUAGE, _stages.Stage(1, optimizer), parts)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
            state = optimizer.init(trainable)
            copied = jax.tree.map(np.array, trainable)
            moved, _, metrics = step(copied, state, frozen, batch, jax.random.key(0))
        found.append((metrics, moved))
    for metrics, _ in found[1:]:
        for name in ("loss", "grad_norm", "counted_tokens"):
            np.testing.assert_allclose(metrics[name], found[0][0][name], rtol=1e-6)


def test_a_penalty_counts_once_however_many_the_parts():
    params, _ = adapted("lora")
    trainable, frozen = jpeft.partition(params)
    batch = batch_of(_rows.one_each(documents(0), 16, pad=2))
    sgd, moved = optax.sgd(1.0), []
    for penalty in (None, lambda t: 0.5 * optax.tree.norm(t, squared=True)):
        step = sft.make_step(LANGUAGE, _stages.Stage(1, sgd, penalty), 3)
        copied = jax.tree.map(np.array, trainable)
        state = sgd.init(trainable)
        moved.append(step(copied, state, frozen, batch, jax.random.key(0))[0])
    # The gradient of the penalty are the parameters themselves.
    for start, without, with_it in zip(
        *map(jax.tree.leaves, (trainable, *moved)), strict=True
    ):
        largest = float(np.abs(start).max()) + 1e-6
        np.testing.assert_allclose(
            without - with_it, start, rtol=0, atol=1e-6 * largest + 1e-6
        )
