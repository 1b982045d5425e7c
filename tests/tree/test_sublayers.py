"""Sub-layers by the names of their weights, in the conventions of public models."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from forms import FORMS

import jpeft
from jpeft.tree.paths import slots
from jpeft.tree.sublayers import SubLayer, parts_of, sublayers

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import zoo

D, F, LAYERS = 8, 12, 3


def tree(shapes, above=""):
    """{"a/b": (7, 5)} as a nested tree of shapes."""
    out = {}
    for path, shape in shapes.items():
        *parents, name = (above + path).split("/")
        at = out
        for p in parents:
            at = at.setdefault(p, {})
        at[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return out


def kernels(names, shapes):
    return {f"{n}/kernel": s for n, s in zip(names, shapes, strict=True)}


def found(shapes, above="layers/0/"):
    return {s.path: s for s in sublayers(slots(tree(shapes, above)))}


SQUARE = [(D, D)] * 4
ATTENTIONS = {
    "flax": (("attn/query", "attn/key", "attn/value", "attn/out"), "attn"),
    "bert": (
        (
            "attention/self/query",
            "attention/self/key",
            "attention/self/value",
            "attention/output/dense",
        ),
        "attention",
    ),
    "vit": (
        (
            "attention/attention/query",
            "attention/attention/key",
            "attention/attention/value",
            "attention/output/dense",
        ),
        "attention",
    ),
    "albert": (
        ("attention/query", "attention/key", "attention/value", "attention/dense"),
        "attention",
    ),
    "t5": (
        (
            "SelfAttention/q",
            "SelfAttention/k",
            "SelfAttention/v",
            "SelfAttention/o",
        ),
        "SelfAttention",
    ),
    "llama": (
        (
            "self_attn/q_proj",
            "self_attn/k_proj",
            "self_attn/v_proj",
            "self_attn/o_proj",
        ),
        "self_attn",
    ),
    "in the layer itself": (("q", "k", "v", "o"), "attention"),
    "llama as published": (
        ("attention/wq", "attention/wk", "attention/wv", "attention/wo"),
        "attention",
    ),
}
MLPS = {
    "bert": (("intermediate/dense",), "output/dense", "mlp"),
    "albert": (("ffn",), "ffn_output", "mlp"),
    "bart": (("fc1",), "fc2", "mlp"),
    "gpt-j": (("mlp/fc_in",), "mlp/fc_out", "mlp"),
    "gpt-neox": (("mlp/dense_h_to_4h",), "mlp/dense_4h_to_h", "mlp"),
    "t5": (("DenseReluDense/wi",), "DenseReluDense/wo", "DenseReluDense"),
    "t5 gated": (
        ("DenseReluDense/wi_0", "DenseReluDense/wi_1"),
        "DenseReluDense/wo",
        "DenseReluDense",
    ),
    "llama": (("mlp/gate_proj", "mlp/up_proj"), "mlp/down_proj", "mlp"),
    "llama as published": (
        ("feed_forward/w1", "feed_forward/w3"),
        "feed_forward/w2",
        "feed_forward",
    ),
    "vit": (("MlpBlock_0/Dense_0",), "MlpBlock_0/Dense_1", "MlpBlock_0"),
    "sequential": (("mlp/layers/0",), "mlp/layers/3", "mlp"),
    "in the layer itself": (("up",), "down", "mlp"),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of_public_models(name):
    names, path = ATTENTIONS[name]
    shapes = {**kernels(names, SQUARE), f"{names[-1]}/bias": (D,)}
    q, k, v, o = (f"layers/0/{n}/kernel" for n in names)
    assert found(shapes) == {
        f"layers/0/{path}": SubLayer(
            "attention",
            f"layers/0/{path}",
            query=(q,),
            key=(k,),
            value=(v,),
            first=(q, k, v),
            last=o,
            last_bias=o.replace("kernel", "bias"),
            width=D,
        )
    }


@pytest.mark.parametrize("name", MLPS)
def test_feed_forward_of_public_models(name):
    first, last, path = MLPS[name]
    shapes = {**kernels(first, [(D, F)] * len(first)), f"{last}/kernel": (F, D)}
    assert found(shapes) == {
        f"layers/0/{path}": SubLayer(
            "mlp",
            f"layers/0/{path}",
            first=tuple(f"layers/0/{n}/kernel" for n in first),
            last=f"layers/0/{last}/kernel",
            width=F,
        )
    }


def test_one_layer_holds_both():
    """BERT's attention output and feed-forward output are both `output/dense`."""
    names = ATTENTIONS["bert"][0] + ("intermediate/dense", "output/dense")
    got = found(kernels(names, [*SQUARE, (D, F), (F, D)]))
    assert {s.kind: s.last for s in got.values()} == {
        "attention": "layers/0/attention/output/dense/kernel",
        "mlp": "layers/0/output/dense/kernel",
    }


def test_an_inner_attention_is_not_taken_for_that_of_the_layer():
    """ALBERT's attention with a `dense` of its own, in a layer with `output/dense`."""
    names = ATTENTIONS["albert"][0] + ("intermediate/dense", "output/dense")
    got = found(kernels(names, [*SQUARE, (D, F), (F, D)]))
    assert got["layers/0/attention"].last == "layers/0/attention/dense/kernel"
    assert got["layers/0/mlp"].last == "layers/0/output/dense/kernel"


@pytest.mark.parametrize("name", ["encoder_attn", "EncDecAttention", "cross_attn"])
def test_in_cross_attention_the_query_alone_reads_the_input(name):
    names = [f"{name}/{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")]
    (got,) = found(kernels(names, [(D, D), (F, D), (F, D), (D, D)])).values()
    assert got.kind == "cross_attention"
    assert got.first == got.query


def test_streams_are_named_where_there_are_two():
    names = [f"self_attn/{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")]
    one = tree(kernels(names, SQUARE), "encoder/layers/0/")
    two = {**one, **tree(kernels(names, SQUARE), "decoder/layers/0/")}
    assert {s.stream for s in sublayers(slots(one))} == {""}
    assert [s.stream for s in sublayers(slots(two))] == ["decoder", "encoder"]


# --- fused kernels -------------------------------------------------------------------


def fused(names, shapes):
    (got,) = found(kernels(names, shapes)).values()
    return got


def columns(got, shape, **kwargs):
    return [got.features(r, shape, **kwargs) for r in ("query", "key", "value")]


def test_gpt2_puts_queries_keys_and_values_in_blocks():
    got = fused(["attn/c_attn", "attn/c_proj"], [(D, 3 * D), (D, D)])
    assert got.query == got.key == got.value == got.first
    for k, part in enumerate(columns(got, (3 * D,))):
        assert np.flatnonzero(part).tolist() == list(range(k * D, k * D + D))


def test_grouped_queries_make_a_larger_block():
    got = fused(["self_attn/qkv_proj", "self_attn/o_proj"], [(D, D + 4), (D, D)])
    q, k, v = columns(got, (D + 4,))
    assert [int(x.sum()) for x in (q, k, v)] == [D, 2, 2]
    assert np.flatnonzero(v).tolist() == [D + 2, D + 3]


def test_gpt_neox_puts_the_three_of_a_head_together():
    names = ["attention/query_key_value", "attention/dense"]
    got = fused(names, [(D, 3 * D), (D, D)])
    key = got.features("key", (3 * D,), heads=2)
    # heads of 4: q q q q k k k k v v v v, twice
    assert np.flatnonzero(key).tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    assert (got.features("key", (2, 3 * D // 2)) == key.reshape(2, -1)).all()
    with pytest.raises(ValueError, match="pass heads="):
        got.features("key", (3 * D,))
    with pytest.raises(ValueError, match="equal parts for each of 5 heads"):
        got.features("key", (3 * D,), heads=5)


def test_gemma_keeps_keys_and_values_in_one_einsum():
    shapes = {
        "attn/q_einsum/w": (4, D, 6),
        "attn/kv_einsum/w": (2, 2, D, 6),
        "attn/attn_vec_einsum/w": (4, 6, D),
        "mlp/gating_einsum": (2, D, F),
        "mlp/linear": (F, D),
    }
    got = found(shapes)
    attention, mlp = got["layers/0/attn"], got["layers/0/mlp"]
    assert attention.fused == "blocks kv"
    assert attention.key == attention.value == ("layers/0/attn/kv_einsum/w",)
    assert attention.features("query", (4, 6)).all()
    value = attention.features("value", (2, 2, 6))
    assert value[1].all() and not value[0].any()
    assert (mlp.first, mlp.last) == (
        ("layers/0/mlp/gating_einsum",),
        "layers/0/mlp/linear",
    )
    assert mlp.last_bias is None


def test_kernels_stored_the_other_way_round_are_found_by_name():
    got = fused(["attn/c_attn", "attn/c_proj"], [(3 * D, D), (D, D)])
    assert got.fused == "blocks qkv" and not got.doubt


# --- models --------------------------------------------------------------------------


def test_a_scanned_stack_is_one_sub_layer():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            x = x + nn.MultiHeadDotProductAttention(2)(x)
            return x + nn.Dense(D, name="fc2")(nn.gelu(nn.Dense(F, name="fc1")(x))), _

    stack = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
    )
    model, x = stack(), jnp.ones((1, 3, D))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, None))["params"]
    uses = jpeft.find_uses(lambda p: model.apply({"params": p}, x, None), params)
    paths = [("MultiHeadDotProductAttention_0", D), ("mlp", F)]
    for known in (None, uses):
        got = sublayers(slots(params), known)
        assert [(s.path, s.width) for s in got] == paths


def test_nnx_attention():
    attention = nnx.MultiHeadAttention(2, in_features=D, decode=False, rngs=nnx.Rngs(0))
    (got,) = sublayers(slots(nnx.state({"attn": attention}, nnx.Param)))
    assert got.path == "attn"
    assert got.last == "attn/out/kernel" and got.last_bias == "attn/out/bias"


@pytest.mark.parametrize("name", FORMS)
def test_small_models_of_the_tests(name):
    form = FORMS[name]()
    uses = jpeft.find_uses(form.fn, form.params, *form.args)
    got = sublayers(slots(form.params), uses)
    by_name = sublayers(slots(form.params))
    assert [s.weights for s in got] == [s.weights for s in by_name]
    stacked = name in ("scan", "scan_remat", "plain")
    assert [s.kind for s in got] == ["mlp"] * (1 if stacked else 3)
    assert all(s.last_bias for s in got)


# (attention, cross-attention, feed-forward) of the models at two layers
IN_ZOO = {
    "gpt2": (2, 0, 2),
    "llama": (2, 0, 2),
    "t5": (4, 2, 4),
    "bert_remat": (2, 0, 2),
    "jimm_vit": (1, 0, 1),
    "jimm_dinov3": (1, 0, 1),
    "bert": (2, 0, 2),
    "roberta": (2, 0, 2),
    "albert": (1, 0, 1),
    "gptj": (2, 0, 2),
    "bloom": (2, 0, 2),
    "mistral": (2, 0, 2),
    "gemma": (2, 0, 2),
    "bart": (4, 2, 4),
    "vit": (2, 0, 2),
    "clip": (4, 0, 4),
    "whisper": (4, 2, 4),
    "wav2vec2": (2, 0, 2),
    "jimm_dinov2": (1, 0, 1),
    "gemma2_linen": (2, 0, 2),
    "gemma2_linen_fused": (2, 0, 2),
    "tunix_llama3": (2, 0, 2),
    "tunix_gemma2": (2, 0, 2),
}
DEFAULT = list(IN_ZOO)[:6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in IN_ZOO],
)
def test_public_models(name):
    try:
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
        ):
            subject = {**zoo.LINEN, **zoo.NNX}[name]()
            uses = jpeft.find_uses(subject.fn, subject.params, *subject.args)
    except ImportError as error:
        pytest.skip(f"{zoo.REQUIRES[name]} is not installed: {error}")
    flat = slots(subject.params)
    for known in (None, uses):
        got = sublayers(flat, known)
        assert not [s.doubt for s in got if s.doubt]
        kinds = [s.kind for s in got]
        counts = tuple(map(kinds.count, ("attention", "cross_attention", "mlp")))
        assert counts == IN_ZOO[name]
        assert all(s.last for s in got)
    # what find_uses saw: the first weights put out what the last one takes in
    for s in got:
        assert s.width == np.prod(uses[s.last].sizes("i"))
        if not s.fused:
            assert s.width == np.prod(uses[s.first[0]].sizes("o"))


# --- the choice ----------------------------------------------------------------------

BART = {
    **kernels([f"self_attn/{n}_proj" for n in ("q", "k", "v", "out")], SQUARE),
    **kernels(["fc1", "fc2"], [(D, F), (F, D)]),
}


def choose(where, exclude=(), shapes=BART, **kwargs):
    flat = slots(tree(shapes, "layers/0/"))
    return [s.path for s in parts_of(flat, None, where, exclude, "adapter", **kwargs)]


def test_presets_patterns_callables_and_lists_choose():
    attention, mlp = "layers/0/self_attn", "layers/0/mlp"
    assert choose("attention") == [attention]
    assert choose("mlp") == [mlp]
    assert choose("all") == [mlp, attention]
    assert choose(".*/self_attn") == [attention]
    assert choose(lambda path, s: s.width == F) == [mlp]
    assert choose(["mlp", ".*attn"]) == [mlp, attention]
    assert choose("all", "attention") == [mlp]
    assert choose("all", "layers/0/fc2/kernel") == [attention]  # by its weight


@pytest.mark.parametrize(
    ("where", "exclude", "message"),
    [
        ("self_attn", (), r"must match the whole path.*'\.\*self_attn\.\*'"),
        (".*fc2/kernel", (), "chosen by its own path.*layers/0/mlp"),
        ("nothing", (), "Sub-layers found:.*layers/0"),
        ("all", ".*/mpl", "matches no sub-layer; nearest:.*layers/0/mlp"),
        ("mlp", "all", "leaves nothing"),
    ],
)
def test_what_matches_nothing_says_what_is_there(where, exclude, message):
    with pytest.raises(ValueError, match=message):
        choose(where, exclude)


ODD = {
    "attn/a/kernel": (D, D),
    "attn/b/kernel": (D, D),
    "attn/c/kernel": (D, D),
    "attn/d/kernel": (D, D),
    "mlp/inner/kernel": (D, F),
    "mlp/outer/kernel": (F, D),
}


def test_names_that_say_nothing_are_refused_with_what_to_type():
    with pytest.raises(ValueError, match=r"do not say which read.*where='mlp: \(\.\*"):
        choose("mlp", shapes=ODD)
    with pytest.raises(ValueError, match="exclude='layers/0/attn'"):
        choose("attention", shapes=ODD)
    with pytest.raises(ValueError, match="names in this tree show none"):
        choose("all", shapes={"a/kernel": (D, D), "b/kernel": (D, D)})


def test_weights_named_in_full():
    where = [
        r"mlp: (.*)/inner/kernel -> \1/outer/kernel",
        r"attention: (.*)/a/kernel \1/b/kernel \1/c/kernel -> \1/d/kernel",
    ]
    assert choose(where, shapes=ODD) == ["layers/0/attn", "layers/0/mlp"]
    flat = slots(tree(ODD, "layers/0/"))
    mlp, attention = (parts_of(flat, None, w, (), "adapter")[0] for w in where)
    assert attention.value == ("layers/0/attn/c/kernel",)
    assert attention.first == attention.query + attention.key + attention.value
    assert (mlp.kind, mlp.first, mlp.last) == (
        "mlp",
        ("layers/0/mlp/inner/kernel",),
        "layers/0/mlp/outer/kernel",
    )


def test_a_fused_weight_named_in_full():
    shapes = {"attn/abc/kernel": (D, 3 * D), "attn/d/kernel": (D, D)}
    where = r"attention(heads qkv): (.*)/abc/kernel -> \1/d/kernel"
    flat = slots(tree(shapes))
    (got,) = parts_of(flat, None, where, (), "prefix", needs=("key", "value"))
    key = got.features("key", (3 * D,), heads=2)
    assert np.flatnonzero(key)[:5].tolist() == [4, 5, 6, 7, 16]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (r"mlp: (.*)/inner/kernel ->", "expected the form"),
        (r"mlp: (.*)/inner/kernel -> \1/otter/kernel", "no linear weight.*outer"),
        (r"attention: (.*)/a/kernel -> \1/d/kernel", "expected 3 weights before"),
        (r"mlp: (.*)/innner/kernel -> \1/outer/kernel", "matches no sub-layer"),
    ],
)
def test_a_wrong_full_name_is_one_clear_sentence(where, message):
    with pytest.raises(ValueError, match=message):
        choose(where, shapes=ODD)


def test_a_weight_in_two_sub_layers_is_refused():
    where = ["mlp", r"mlp: (.*)/fc1/kernel -> \1/self_attn/out_proj/kernel"]
    with pytest.raises(ValueError, match="is asked for it twice"):
        choose(where)


def test_an_attention_without_a_known_output_serves_who_needs_none():
    shapes = kernels(["attn/q_proj", "attn/k_proj", "attn/v_proj"], SQUARE[:3])
    assert choose("attention", shapes=shapes, needs=("key", "value"))
    with pytest.raises(ValueError, match="which weight makes the output"):
        choose("attention", shapes=shapes)
    with pytest.raises(ValueError, match="needs key, which a sub-layer of kind 'mlp'"):
        choose("mlp", needs=("key",))


# --- sizes, names, and what a refusal shows ------------------------------------------


def test_values_may_be_of_another_width_than_keys():
    names = [f"attn/{n}_proj" for n in ("q", "k", "v", "o")]
    (got,) = found(kernels(names, [(D, 12), (D, 12), (D, 6), (6, D)])).values()
    assert got.width == 6 and not got.doubt and got.last.endswith("o_proj/kernel")
    # Shared by groups of queries.
    (got,) = found(kernels(names, [(D, 12), (D, 4), (D, 4), (12, D)])).values()
    assert got.width == 12


def test_sizes_that_do_not_fit_are_named():
    names = [f"attn/{n}_proj" for n in ("q", "k", "v", "o")]
    shapes = kernels(names, [(D, 12), (D, 12), (D, 5), (6, D)])
    with pytest.raises(ValueError, match="v_proj/kernel puts out 5 features and .* 6"):
        choose("attention", shapes=shapes)


def test_haiku_makes_a_feed_forward_in_a_module_called_tilde():
    shapes = {"mlp/~/linear_0/w": (D, F), "mlp/~/linear_0/b": (F,)}
    shapes |= {"mlp/~/linear_1/w": (F, D), "mlp/~/linear_1/b": (D,)}
    (got,) = found(shapes, "net/").values()
    assert (got.kind, got.path) == ("mlp", "net/mlp")
    assert (got.last, got.last_bias) == (
        "net/mlp/~/linear_1/w",
        "net/mlp/~/linear_1/b",
    )


def test_experts_mapped_over_are_a_feed_forward():
    def fn(p, x):
        one = lambda e: (x @ e["up_proj"]) @ e["down_proj"]
        return jax.vmap(one)(p["experts"])

    params = {
        "experts": {"up_proj": jnp.ones((3, D, F)), "down_proj": jnp.ones((3, F, D))}
    }
    uses = jpeft.find_uses(fn, params, jnp.ones((2, D)))
    (got,) = sublayers(slots(params), uses)
    assert got.kind == "mlp" and got.last == "experts/down_proj" and not got.doubt


SHOWN = {
    "names that say nothing": ("attention", {k: ODD[k] for k in list(ODD)[:4]}),
    "no sub-layer": ("all", {"a/kernel": (D, D), "b/kernel": (D, D)}),
    "the other kind": ("mlp", kernels(["up", "down"], [(D, F), (F, D)])),
    "the other kind alone": ("attention", kernels(["up", "down"], [(D, F), (F, D)])),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_refusal_shows_a_form_that_the_method_accepts(name):
    where, shapes = SHOWN[name]
    for needs, roles in (
        (("key", "value"), ("query", "key", "value", "out")),
        (("last",), ("inner", "outer")),
    ):
        if needs == ("last",) and "other kind" in name:
            continue
        with pytest.raises(ValueError, match="in the form where=") as e:
            choose(where, shapes=shapes, needs=needs)
        form = str(e.value).split("where='")[-1].split("'")[0]
        if needs == ("last",) and where == "attention":
            roles = ("query", "key", "value", "out")
        own = kernels(roles, [(D, D)] * len(roles))
        # Typed as it is shown, with an r before it or without.
        for typed in (form, eval(f"'{form}'")):
            assert len(choose(typed, shapes=own, needs=needs)) == 1
