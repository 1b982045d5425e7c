"""Blocks of GGUF files, made by its library, as weights: code for code."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import jpeft
from jpeft.leaf import array_fields
from jpeft.quant import from_gguf

KEY = jax.random.key(0)
KINDS = ("Q4_0", "Q4_1", "Q8_0")
pytestmark = pytest.mark.float16


def raw(w, kind):
    """GGUF's bytes of rows, (*stack, rows, bytes of a row)."""
    return gguf.quants.quantize(np.asarray(w), gguf.GGMLQuantizationType[kind])


def assert_same(a, b):
    """Every array and everything said of it, but where it came from."""
    a, b = a.replace(origin=""), b.replace(origin="")
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for n, x in array_fields(a).items():
        assert x.dtype == array_fields(b)[n].dtype
        np.testing.assert_array_equal(x, array_fields(b)[n], err_msg=n)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_what_quantize_makes_of_it(kind):
    """96 inputs: the last group of packed codes is half empty."""
    w = normal(0, 5, 96)  # as torch has it
    t = jpeft.quantize(kind.lower(), compute_dtype=None)
    made = t(KEY, {"dense": {"kernel": w.T}})["dense"]["kernel"]
    assert_same(from_gguf(raw(w, kind), kind, (96, 5)), made)
    assert_same(from_gguf(raw(w, kind).tobytes(), kind, (96, 5)), made)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_what_quantize_makes_of_it(kind):
    w = normal(0, 7, 96)
    t = jpeft.quantize(kind.lower(), where="embedding", compute_dtype=None)
    made = t(KEY, {"embedding": w})["embedding"]
    found = from_gguf(raw(w, kind), kind, (7, 96), axes="vocab features")
    assert_same(found, made)


def test_a_stack_is_its_matrices_one_by_one():
    w = normal(0, 2, 5, 64)
    kind = gguf.GGMLQuantizationType.Q4_1
    stack = from_gguf(raw(w, "Q4_1"), kind, (2, 64, 5), stack=1)
    assert stack.shape == (2, 64, 5) and stack.stack == 1
    for k in range(2):
        one = from_gguf(raw(w[k], "Q4_1"), kind, (64, 5))
        for n, x in array_fields(one).items():
            np.testing.assert_array_equal(array_fields(stack)[n][k], x)
    np.testing.assert_array_equal(stack.materialize()[1], one.materialize())


def test_axes_may_be_torchs_and_several():
    w = normal(0, 6, 64)
    bytes_ = raw(w, "Q8_0")
    want = from_gguf(bytes_, "Q8_0", (64, 6)).materialize()
    torch = from_gguf(bytes_, "Q8_0", (6, 64), axes="out in")
    np.testing.assert_array_equal(torch.materialize(), want.T)
    heads = from_gguf(bytes_, "Q8_0", (64, 3, 2), dtype=jnp.bfloat16)
    assert heads.dtype == jnp.bfloat16 and heads.inner == (64,)
    np.testing.assert_array_equal(
        heads.materialize(jnp.float32), want.reshape(64, 3, 2)
    )
    out = from_gguf(bytes_, "Q8_0", (4, 16, 6))  # an output layer's, of heads
    assert out.inner == (4, 16)
    np.testing.assert_array_equal(out.materialize(), want.reshape(4, 16, 6))


def damaged():
    bytes_ = raw(normal(0, 5, 64), "Q4_0").copy()
    bytes_[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
    return bytes_


BYTES = raw(normal(0, 5, 64), "Q4_0")
CALLS = {
    "type": (
        lambda: from_gguf(BYTES, "Q6_K", (64, 5)),
        ["type='Q6_K'", "q4_0, q4_1, q8_0", "gguf.quants.dequantize"],
    ),
    "axes": (
        lambda: from_gguf(BYTES, "Q4_0", (64, 5), axes="io"),
        ["expected 'in out'"],
    ),
    "turned": (
        lambda: from_gguf(BYTES, "Q4_0", (5, 64)),
        ["shape (5, 64)", "rows of 36"],
    ),
    "short": (lambda: from_gguf(BYTES[:4], "Q4_0", (64, 5)), ["data has 144 bytes"]),
    "no blocks": (lambda: from_gguf(bytes(90), "Q4_0", (48, 5)), ["data has 90 bytes"]),
    "vector": (lambda: from_gguf(BYTES, "Q4_0", (320,)), ["expected two axes or more"]),
    "stack": (lambda: from_gguf(BYTES, "Q4_0", (64, 5), stack=1), ["with stack=1"]),
    "floats": (
        lambda: from_gguf(np.ones((5, 64)), "Q4_0", (64, 5)),
        ["data is float64; expected bytes"],
    ),
    "damaged": (
        lambda: from_gguf(damaged(), "Q4_0", (64, 5)),
        ["a scale is NaN or infinite", "damaged"],
    ),
    "dtype": (
        lambda: from_gguf(BYTES, "Q4_0", (64, 5), dtype=int),
        ["dtype=", "float"],
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_wrong_call_is_answered_with_the_right_one(what):
    call, parts = CALLS[what]
    with pytest.raises(ValueError) as error:
        call()
    for part in parts:
        assert part in str(error.value)
