"""Inputs of every length, and batches of none, against the dequantised weight."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import linen as nn
from flax import nnx
from jax import export
from speed import every_nth

import jpeft
from jpeft.formats.blocks import FORMATS

LENGTHS = (7, 65, 96, 322)


def close(got, want):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("format", "block_size"),
    every_nth(
        2,
        [
            # Those with a kernel and one without have both.
            (format, size)
            for format, size in itertools.product(FORMATS, [32, "channel"])
            if size == 32 or format in ("nf4", "fp4", "int8")
        ],
    ),
)
def test_product_and_gradient(format, block_size):
    quantize = jpeft.quantize(format, block_size=block_size, compute_dtype=None)
    f = lambda p, x: x @ p["dense"]["kernel"]
    both = lambda f: jax.value_and_grad(lambda x, p: jnp.sum(f(p, x) ** 2))
    for k in LENGTHS if block_size == 32 else (7, 130):
        w = normal(k, k, 3)
        q = quantize(jax.random.key(0), {"dense": {"kernel": w}})
        x = normal(1, 2, k)
        got = both(jpeft.adapt(f))(x, q)
        want = both(f)(x, jpeft.merge(q))
        for a, b in zip(got, want, strict=True):
            close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "int8", "dynamic8"])
def test_table_read_forwards(format):
    """Its features are what blocks run along, and here also what comes out."""
    quantize = jpeft.quantize(
        format, block_size=32, where="embedding", compute_dtype=None
    )
    f = lambda p, x: x @ p["embedding"]
    for k in (7, 65, 130):
        w = normal(k, 7, k)
        q = quantize(jax.random.key(0), {"embedding": w})
        x = normal(1, 2, 7)
        close(jpeft.adapt(f)(q, x), f(jpeft.merge(q), x))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["quantile4", "quantile8"])
def test_each_expert_has_a_learned_book(format):
    f = lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["experts"]["kernel"])
    w = normal(0, 3, 65, 7)
    params = {"experts": {"kernel": w * jnp.array([1.0, 2.0, 3.0])[:, None, None] ** 3}}
    x = normal(1, 3, 2, 65)
    quantize = jpeft.quantize(format, compute_dtype=None)
    q = quantize(jax.random.key(0), params, uses=jpeft.find_uses(f, params, x))
    close(jpeft.adapt(f)(q, x), f(jpeft.merge(q), x))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_empty_batch(format):
    f = jpeft.adapt(lambda p, x: x @ p["dense"]["kernel"])
    params = {"dense": {"kernel": jnp.ones((65, 5))}}
    layers = jpeft.chain(jpeft.quantize(format), jpeft.lora(rank=3))
    q, x = layers(jax.random.key(0), params), jnp.ones((2, 0, 65))
    assert f(q, x).shape == (2, 0, 5)
    assert jax.grad(lambda x: f(q, x).sum())(x).shape == x.shape


def linen_layer():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = nn.Dense(6, kernel_init=init)
    return layer.init(jax.random.key(0), jnp.ones((1, 64)))["params"]


def nnx_layer():
    return nnx.split(nnx.Linear(64, 6, rngs=nnx.Rngs(0)))[1]


@pytest.mark.sample(1)
@pytest.mark.parametrize("layer", [linen_layer, nnx_layer])
def test_a_boxed_leaf_on_its_own(layer):
    params = layer()
    q = jpeft.quantize("nf4")(jax.random.key(0), params)
    value = jpeft.quant.dequantize(q["kernel"])
    plain = jax.tree.leaves(jpeft.merge(q)["kernel"])[0]
    np.testing.assert_array_equal(value, plain)
    state = jpeft.quant.to_bitsandbytes(q["kernel"])
    again = jpeft.quant.from_bitsandbytes(state, transpose=True)
    np.testing.assert_array_equal(jpeft.quant.dequantize(again), plain)


def test_what_is_no_floating_dtype():
    w = jnp.ones((64, 3))
    params = jpeft.quantize()(jax.random.key(0), {"dense": {"kernel": w}})
    with pytest.raises(ValueError, match="compute_dtype='int8'"):
        jpeft.quant.quantize(w, compute_dtype="int8")
    with pytest.raises(ValueError, match="double='no'"):
        jpeft.quant.quantize(w, double="no")
    with pytest.raises(ValueError, match="merge: dtype='bf16'"):
        jpeft.merge(params, dtype="bf16")
    with pytest.raises(ValueError, match="merge: dtype="):
        jpeft.merge(params, dtype=jnp.int8)
    with pytest.raises(ValueError, match="give one of the two"):
        jpeft.quant.rounding(params, dtype=jnp.bfloat16, requantize=True)


def test_config_without_compute_dtype_reads_back():
    t = jpeft.from_config({"method": "quantize", "compute_dtype": None})
    assert jpeft.from_config(t.to_config()) == t == jpeft.quantize(compute_dtype=None)
    t = jpeft.from_config({"method": "loftq", "rank": 3, "compute_dtype": None})
    assert jpeft.from_config(t.to_config()) == t == jpeft.loftq(3, compute_dtype=None)


def test_the_first_step_of_a_process_compiles_once():
    """What is imported late must not make JAX forget what it has traced."""
    program = """
import jax, jax.numpy as jnp, jpeft
k = jax.random.key(0)
layers = jpeft.chain(jpeft.quantize("nf4"), jpeft.lora(rank=3))
t, f = jpeft.partition(layers(k, {"kernel": jax.random.normal(k, (64, 5))}))
apply = jpeft.adapt(lambda p, x: x @ p["kernel"])
loss = lambda t, x: jnp.mean(apply(jpeft.combine(t, f), x) ** 2)
step = jax.jit(lambda t, x: jax.tree.map(jnp.subtract, t, jax.grad(loss)(t, x)))
for _ in range(3):
    t = step(t, jnp.ones((2, 64)))
print(step._cache_size())
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "platforms"),
    [
        ("nf4", None),
        ("nf4", ("tpu",)),
        ("quantile4", ("cpu", "cuda")),
        ("int4_asymmetric", ("tpu",)),
        ("int8", None),
    ],
)
def test_a_program_is_exported_for_any_number_of_tokens(format, platforms):
    layers = jpeft.chain(jpeft.quantize(format, compute_dtype=None), jpeft.lora(rank=3))
    base = {"kernel": normal(0, 96, 7)}
    trainable, frozen = jpeft.partition(layers(jax.random.key(1), base))
    apply = jpeft.adapt(lambda p, x: x @ p["kernel"])
    loss = lambda t, x: jnp.mean(apply(jpeft.combine(t, frozen), x) ** 2)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    tokens = export.symbolic_shape("b, 4, 96")
    x = jax.ShapeDtypeStruct(tokens, jnp.float32)
    made = export.export(step, platforms=platforms)(trainable, x)
    if platforms == ("tpu",):
        return  # it cannot be run here
    for many in (1, 5):
        x = normal(many, many, 4, 96)
        for a, b in zip(
            jax.tree.leaves(made.call(trainable, x)),
            jax.tree.leaves(step(trainable, x)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
