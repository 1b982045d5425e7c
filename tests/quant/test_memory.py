"""What a quantised base costs: no array of a weight's size, anywhere.

The decoder of `examples/_decoder.py` in its four forms.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from draws import normal
from speed import slow_but

import jpeft
from jpeft.formats.blocks import FORMATS as NUMBERS
from jpeft.quant import Quantized, quantize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from _decoder import (  # noqa: E402  the scripts' own modules
    ADAPTED,
    FORMS,
    SMALL,
    Sizes,
    Variant,
    adamw,
    decoder,
    next_token_loss,
    training_step,
)
from benchmark_hook import copied_weights, equations  # noqa: E402

# Large enough that weights are more than the kernels' tiles and XLA's small change.
MIDDLE = Sizes(
    layers=2, width=128, hidden=512, heads=4, vocab=256, batch=2, tokens=64, rank=8
)
NF4 = {"format": "nf4", "where": ADAPTED}


@functools.cache
def model(form, sizes):
    return decoder(form, sizes)


def fine_tuning(form, sizes, quantize=None, merged=False):
    """LoRA in the decoder, on its weights as they are or quantised.

    merged: the weights are decoded first, as one should not.
    """
    m = model(form, sizes)
    uses = jpeft.find_uses(m.apply, m.base, m.tokens[:, :-1])
    params = m.base
    if quantize is not None:
        params = jpeft.quantize(**quantize)(jax.random.key(0), params, uses=uses)
    lora = jpeft.lora(rank=sizes.rank, alpha=sizes.alpha, where=ADAPTED)
    params = lora(jax.random.key(2), params, uses=uses)
    apply = jpeft.adapt(m.apply)

    def loss(trainable, frozen, tokens):
        params = jpeft.combine(trainable, frozen)
        if merged:
            return next_token_loss(m.apply(jpeft.merge(params), tokens[:, :-1]), tokens)
        return next_token_loss(apply(params, tokens[:, :-1]), tokens)

    return Variant(loss, *jpeft.partition(params))


def weights_and_padded(base):
    """The base's arrays, and what whole groups of 64 rows would make of them."""

    def padded(w):
        *stack, k, n = w.shape
        return jax.ShapeDtypeStruct((*stack, -(-k // 64) * 64, n), w.dtype)

    arrays = [w for w in jax.tree.leaves(base) if w.ndim > 1]
    return arrays + [padded(w) for w in arrays]


# --- between forward and backward ----------------------------------------------------

OTHERS = [
    pytest.param({"format": "int8", "where": ADAPTED}, id="int8"),
    pytest.param({**NF4, "compute_dtype": None}, id="nf4-float32"),
    pytest.param({"format": "int4_asymmetric", "where": ADAPTED}, id="int4_asymmetric"),
]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_decoded_weight_waits_for_the_backward_pass(form):
    m = model(form, SMALL)
    variant = fine_tuning(form, SMALL, NF4)
    assert copied_weights(variant, m.tokens, weights_and_padded(m.base)) == []


@pytest.mark.slow
@pytest.mark.parametrize("quantize", OTHERS)
def test_nor_one_of_another_format(quantize):
    m = model("scan", SMALL)
    variant = fine_tuning("scan", SMALL, quantize)
    assert copied_weights(variant, m.tokens, weights_and_padded(m.base)) == []


@pytest.mark.slow
def test_decoding_first_would_show():
    m = model("scan", SMALL)
    variant = fine_tuning("scan", SMALL, NF4, merged=True)
    assert copied_weights(variant, m.tokens, weights_and_padded(m.base))


# --- the compiled step ---------------------------------------------------------------


@functools.cache
def memory_of(form, quantised, merged=False):
    variant = fine_tuning(form, MIDDLE, NF4 if quantised else None, merged)
    state = adamw().init(variant.trainable)
    step = jax.jit(training_step(variant.loss), donate_argnums=(0, 1))
    arguments = variant.trainable, state, variant.frozen, model(form, MIDDLE).tokens
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int and float
        return step.lower(*arguments).compile().memory_analysis()


@pytest.mark.slow
@pytest.mark.parametrize("form", slow_but(["scan", "scan + remat"], FORMS))
def test_qlora_takes_no_more_room_than_lora(form):
    """Its temporaries: below those of LoRA; a twentieth is for another XLA's choices.

    The level of optimisation that the tests run at does not change them.
    """
    lora, qlora = memory_of(form, False), memory_of(form, True)
    assert 0 < qlora.temp_size_in_bytes <= 1.05 * lora.temp_size_in_bytes
    saved = lora.argument_size_in_bytes - qlora.argument_size_in_bytes
    linear = MIDDLE.layers * (4 * 128 * 128 + 2 * 128 * 512)
    assert saved == pytest.approx(linear * (32 - 4.127) / 8, rel=0.01)
    assert qlora.output_size_in_bytes == lora.output_size_in_bytes


@pytest.mark.slow
def test_decoding_first_would_take_more_room():
    weights = 4 * MIDDLE.layers * (4 * 128 * 128 + 2 * 128 * 512)
    merged, lora = (memory_of("scan + remat", q, q) for q in (True, False))
    assert merged.temp_size_in_bytes > lora.temp_size_in_bytes + 0.5 * weights


# --- lookups and quantising ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"format": "nf4"},
        {"format": "nf4", "double": False},
        {"format": "int8", "block_size": "channel"},
        {"format": "int4_asymmetric"},
        {"format": "quantile4"},
        {"format": "q4_1"},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_a_lookup_decodes_its_rows_and_not_the_table(how):
    table = normal(0, 1000, 96)
    params, ids = {"embedding": table}, jnp.array([[1, 5, 2], [999, 0, 7]])
    fn = lambda p, ids: p["embedding"][ids]
    uses = jpeft.find_uses(fn, params, ids)
    transform = jpeft.quantize(where=".*", **how)
    params = transform(jax.random.key(0), params, uses=uses)
    assert isinstance(params["embedding"], Quantized)
    apply = jpeft.adapt(fn)
    program = jax.make_jaxpr(apply)(params, ids)
    # At most a scale for each row, of all 32-bit arrays.
    sizes = [
        v.aval.size
        for eqn in equations(program.jaxpr)
        for v in eqn.outvars
        if v.aval.dtype.itemsize > 1
    ]
    assert sizes and max(sizes) < 4000
    rows = apply(params, ids)
    assert bool(jnp.all(rows == jpeft.merge(params)["embedding"][ids]))
    memory = jax.jit(apply).lower(params, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < table.nbytes / 8


@pytest.mark.parametrize("double", [True, False])
def test_quantising_under_jit_gives_out_codes_and_scales(double):
    w = jax.ShapeDtypeStruct((512, 384), "float32")
    run = jax.jit(lambda w: jpeft.quant.quantize(w, "nf4", double=double, axis=0))
    memory = run.lower(w).compile().memory_analysis()
    bits = 8 * memory.output_size_in_bytes / (512 * 384)
    assert bits == pytest.approx(4.127 if double else 4.5, abs=0.01)
    # A float32 copy or two on the way, and no table of distances to sixteen values.
    assert memory.temp_size_in_bytes < 3 * 4 * 512 * 384


@pytest.mark.sample(3)
@pytest.mark.parametrize("format", [*NUMBERS])
def test_quantising_needs_little_more_than_the_weight(format):
    x = jnp.zeros((512, 768))
    double = format != "int8_asymmetric"
    size = 32 if NUMBERS[format].of_gguf else 64
    leaf = jax.jit(lambda x: quantize(x, format, double=double, block_size=size))
    found = leaf.lower(x).compile().memory_analysis().temp_size_in_bytes
    # The weight over the largest of each block, where a book is learned from it.
    assert found <= 1.3 * x.nbytes
