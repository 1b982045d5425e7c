"""Bad input: each message says which leaf, what was expected, what to type instead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_method import needed

import jpeft
from jpeft.attach import Ranked
from jpeft.transform import METHODS

KEY = jax.random.key(0)


def tree(**more):
    return {
        "layers": {
            "0": {
                "query": {"kernel": jnp.ones((7, 5)), "bias": jnp.zeros(5)},
                "mlp": {"up": {"kernel": jnp.ones((5, 7))}},
            }
        },
        "embed": {"embedding": jnp.ones((11, 5))},
        **more,
    }


def raises(match, f, kind=ValueError):
    with pytest.raises(kind) as error:
        f()
    message = str(error.value)
    for part in [match] if isinstance(match, str) else match:
        assert part in message, message


def test_a_pattern_that_matches_nothing_suggests_near_paths():
    raises(
        [
            "lora: where='layers/0/quary/kernel' matches nothing",
            "layers/0/query/kernel",
        ],
        lambda: jpeft.lora(rank=2, where="layers/0/quary/kernel")(KEY, tree()),
    )


def test_a_part_of_a_path_is_answered_with_the_whole_pattern():
    raises(
        ["A pattern must match the whole path", "'.*query.*'"],
        lambda: jpeft.lora(rank=2, where="query")(KEY, tree()),
    )


def test_a_preset_that_matches_nothing_names_find_uses():
    raises(
        ["where='attention' matches nothing", "jpeft.find_uses"],
        lambda: jpeft.lora(rank=2, where="attention")(
            KEY, {"dense": {"kernel": jnp.ones((7, 5))}}
        ),
    )


def test_where_nothing_can_be_adapted_the_message_says_what_there_is():
    message = "lora can act on no array of this tree; it has ['norm/scale']"
    norm = {"norm": {"scale": jnp.ones(5)}}
    raises(message, lambda: jpeft.lora(rank=2)(KEY, norm))
    raises(
        "Nearest paths: ['norm/scale']",
        lambda: jpeft.lora(rank=2, where="a")(KEY, norm),
    )


def test_a_preset_that_no_use_fits_does_not_ask_for_uses_again():
    base = {"table": jnp.ones((7, 5))}
    uses = jpeft.find_uses(lambda p, x: x @ p["table"], base, jnp.ones((3, 7)))
    raises(
        ["By how the model uses them", "['table']"],
        lambda: jpeft.lora(rank=2, where="attention")(KEY, base, uses=uses),
    )


def test_every_item_of_a_list_must_match():
    raises(
        "where='.*value.*' matches nothing",
        lambda: jpeft.lora(rank=2, where=["attention", ".*value.*"])(KEY, tree()),
    )


def test_a_pattern_of_what_cannot_be_adapted_says_so():
    raises(
        ["matches only ['layers/0/query/bias']", "cannot act on"],
        lambda: jpeft.lora(rank=2, where=".*/bias")(KEY, tree()),
    )


def test_an_exclude_that_matches_nothing():
    raises(
        ["exclude='.*nope' matches no path", "nearest"],
        lambda: jpeft.lora(rank=2, exclude=".*nope")(KEY, tree()),
    )


def test_a_callable_that_is_never_true():
    raises(
        "is true of no weight",
        lambda: jpeft.lora(rank=2, where=lambda path, leaf: False)(KEY, tree()),
    )


@pytest.mark.parametrize("where", [3, [], None])
def test_where_of_a_wrong_type(where):
    raises("expected one of ('attention'", lambda: jpeft.lora(rank=2, where=where))


def test_where_that_is_no_regular_expression():
    raises("nor a regular expression", lambda: jpeft.lora(rank=2, where="(a"))


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_rank_below_one(rank):
    raises(
        f"lora: rank={rank!r}: expected an integer of at least 1",
        lambda: jpeft.lora(rank=rank, alpha=1),
    )


def test_rank_larger_than_the_matrix():
    raises(
        [
            "layers/0/mlp/up/kernel: rank 6 is larger than the matrix 5 x 7",
            "use rank <= 5",
            "exclude=",
        ],
        lambda: jpeft.lora(rank=6)(KEY, tree()),
    )


def test_rank_pattern_that_matches_nothing():
    raises(
        ["rank_pattern key '.*qery.*' matches none", "layers/0/query/kernel"],
        lambda: jpeft.lora(rank=2, rank_pattern={".*qery.*": 3})(KEY, tree()),
    )


def test_rank_and_alpha_patterns():
    t = jpeft.lora(
        rank=2, alpha=2, rank_pattern={".*query.*": 3}, alpha_pattern={".*up.*": 8}
    )
    layer = t(KEY, tree())["layers"]["0"]
    assert layer["query"]["kernel"].a.shape == (7, 3)
    assert layer["query"]["kernel"].scale == pytest.approx(2 / 3)
    assert layer["mlp"]["up"]["kernel"].scale == 4.0


RANKED = [n for n, t in METHODS.items() if issubclass(t, Ranked) and n != "vera"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKED)
def test_without_alpha_the_scale_is_one_whatever_the_rank(name):
    t = getattr(jpeft, name)(rank=2, rank_pattern={".*query.*": 3})
    layer = t(KEY, tree())["layers"]["0"]
    assert layer["query"]["kernel"].scale == layer["mlp"]["up"]["kernel"].scale == 1.0


def test_singular_vectors_of_a_quantised_weight():
    t = jpeft.chain(jpeft.quantize("nf4"), jpeft.lora(rank=2, init="pissa"))
    raises(["stands a Quantized", "jpeft.loftq"], lambda: t(KEY, tree()))


def test_rank_stabilised_scale():
    t = jpeft.lora(rank=4, alpha=8, rank_stabilized=True)
    assert t(KEY, tree())["layers"]["0"]["query"]["kernel"].scale == 4.0


def test_a_transform_applied_twice():
    t = jpeft.lora(rank=2)
    raises(
        ["layers/0/mlp/up/kernel", "this very lora transform is already applied"],
        lambda: t(KEY, t(KEY, tree())),
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64])
def test_integer_and_complex_weights(dtype):
    params = tree(dense={"kernel": jnp.ones((7, 5), dtype)})
    raises(
        ["dense/kernel: lora needs a real floating-point weight", np.dtype(dtype).name],
        lambda: jpeft.lora(rank=2)(KEY, params),
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_the_base(value):
    params = tree(dense={"kernel": jnp.ones((7, 5)).at[3, 2].set(value)})
    raises(
        "dense/kernel: the base holds NaN or infinity",
        lambda: jpeft.lora(rank=2)(KEY, params),
    )


def test_axes_in_doubt_name_find_uses():
    params = {"stack": {"dense": {"kernel": jnp.ones((3, 7, 5))}}}
    raises(
        ["stack/dense/kernel", "cannot tell input from output axes", "jpeft.find_uses"],
        lambda: jpeft.lora(rank=2)(KEY, params),
    )


def test_unknown_names_are_refused_by_a_preset_and_taken_by_a_pattern():
    params = {"gating": jnp.ones((7, 5))}
    raises(
        ["gating: lora cannot tell", "jpeft.find_uses"],
        lambda: jpeft.lora(rank=2)(KEY, params),
    )
    assert jpeft.lora(rank=2, where="gating")(KEY, params)["gating"].axes == "io"


def test_kernels_of_several_axes_are_explained_by_their_bias():
    params = {
        "query": {"kernel": jnp.ones((7, 2, 3)), "bias": jnp.ones((2, 3))},
        "dense": {"kernel": jnp.ones((4, 7, 5)), "bias": jnp.ones((4, 5))},
    }
    out = jpeft.lora(rank=2)(KEY, params)
    assert out["query"]["kernel"].axes == "ioo"
    assert out["dense"]["kernel"].axes == "sio"
    assert out["dense"]["kernel"].a.shape == (4, 7, 2)
    assert out["dense"]["kernel"].b.shape == (4, 2, 5)


def test_an_empty_trainable_set():
    for f in (
        jpeft.partition,
        jpeft.trainable_mask,
        jpeft.freeze(optax.adam(1e-3)).init,
        jpeft.value_and_grad(lambda p: 0.0),
    ):
        raises("nothing in this tree is trainable", lambda f=f: f(tree()))


def test_uses_of_another_tree():
    uses = jpeft.find_uses(lambda p, x: x @ p["w"], {"w": jnp.ones((7, 5))}, X)
    raises(
        ["uses= says nothing of", "find_uses"],
        lambda: jpeft.lora(rank=2)(KEY, tree(), uses=uses),
    )
    raises(
        "uses= was found for shape (7, 5), the tree has (7, 3)",
        lambda: jpeft.lora(rank=2)(KEY, {"w": jnp.ones((7, 3))}, uses=uses),
    )


X = jnp.ones((3, 7))


def test_uses_found_one_level_above():
    fn = lambda v, x: x @ v["params"]["w"]
    params = {"w": jnp.ones((7, 5))}
    uses = jpeft.find_uses(fn, {"params": params}, X)
    assert jpeft.lora(rank=2)(KEY, params, uses=uses)["w"].axes == "io"


def test_a_custom_rule_on_the_weight_is_named_at_attach():
    @jax.custom_vjp
    def dot(x, w):
        return x @ w

    dot.defvjp(lambda x, w: (x @ w, (x, w)), lambda t, g: (g @ t[1].T, t[0].T @ g))
    params = {"w": jnp.ones((7, 5))}
    uses = jpeft.find_uses(lambda p, x: dot(x, p["w"]), params, X)
    raises(
        ["w: lora cannot tell", "gradient rule of the model's own", "exclude='w'"],
        lambda: jpeft.lora(rank=2)(KEY, params, uses=uses),
    )


def test_a_changed_weight_is_named_at_attach():
    params = {"w": jnp.ones((7, 5))}
    normed = lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))
    uses = jpeft.find_uses(normed, params, X)
    assert uses["w"].kind == "linear"
    raises(
        ["w: lora cannot tell", "the model changes it before `dot_general`"],
        lambda: jpeft.lora(rank=2)(KEY, params, uses=uses),
    )


CHANGED = {
    "normalised": lambda w: w / jnp.linalg.norm(w, axis=0, keepdims=True),
    "masked": lambda w: jnp.where(jnp.arange(70)[:, None] % 2 == 0, w, 0.0),
    "centred": lambda w: w - jnp.mean(w, 0, keepdims=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CHANGED)
def test_a_changed_weight_may_be_quantised(how):
    params = {"w": jax.random.normal(KEY, (70, 5))}
    fn = lambda p, x: x @ CHANGED[how](p["w"])
    x = jax.random.normal(KEY, (3, 70))
    uses = jpeft.find_uses(fn, params, x)
    made = jpeft.quantize(compute_dtype=None)(KEY, params, uses=uses)
    want = fn(jpeft.merge(made), x)
    np.testing.assert_allclose(jpeft.adapt(fn)(made, x), want, rtol=1e-5, atol=1e-5)


def test_a_function_of_each_value_waits_and_is_done_in_the_compute_dtype():
    params = {"w": jax.random.normal(KEY, (70, 5))}
    fn = lambda p, x: x @ jnp.exp(p["w"])
    x = jax.random.normal(KEY, (3, 70))
    made = jpeft.quantize()(KEY, params, uses=jpeft.find_uses(fn, params, x))
    want = fn(jpeft.merge(made), x)
    far = jnp.max(jnp.abs(jpeft.adapt(fn)(made, x) - want))
    assert far < 2**-7 * jnp.max(jnp.abs(want))  # factors of 8 bits


def test_a_change_of_a_quantised_weight_that_needs_its_value():
    params = {"w": jnp.ones((70, 5))}
    fn = lambda p, x: x @ jnp.sort(2 * p["w"], axis=0)
    uses = jpeft.find_uses(fn, params, jnp.ones((3, 70)))
    made = jpeft.quantize()(KEY, params, uses=uses)
    raises(
        ["w: changed Quantized (70, 5) reaches `sort`", 'materialize="allow"'],
        lambda: jpeft.adapt(fn)(made, jnp.ones((3, 70))),
        jpeft.DensifyError,
    )


def test_using_an_adapted_leaf_without_adapt():
    params = jpeft.lora(rank=2)(KEY, {"w": {"kernel": jnp.ones((7, 5))}})
    parts = ["was used as an array", "jpeft.adapt(fn)"]
    raises(parts, lambda: X @ params["w"]["kernel"], TypeError)
    raises(parts, lambda: np.asarray(params["w"]["kernel"]), TypeError)


def test_full_and_lora_on_one_weight():
    t = jpeft.chain(jpeft.full("embed/.*"), jpeft.lora(rank=2, where="embedding"))
    raises("embed/embedding: this leaf trains whole", lambda: t(KEY, tree()))
    t = jpeft.chain(jpeft.lora(rank=2, where="embedding"), jpeft.full("embed/.*"))
    raises("embed/embedding: already carries LowRank", lambda: t(KEY, tree()))


def test_bitfit_without_anything():
    raises("leave nothing to train", lambda: jpeft.bitfit(where=None))
    raises(
        "has a bias already",
        lambda: jpeft.bitfit(add=".*query/kernel")(KEY, tree()),
    )


def test_materialize_mode():
    raises('expected "refuse" or "allow"', lambda: jpeft.adapt(len, materialize="yes"))


def test_chain_of_something_else():
    raises("expected transforms", lambda: jpeft.chain("lora"), TypeError)
    raises("at least one transform", lambda: jpeft.chain())


def test_merging_what_is_not_adapted():
    for f in (jpeft.merge, jpeft.unload, jpeft.disable):
        raises("no leaf of this tree is adapted", lambda f=f: f(tree()))


def test_combining_trees_that_do_not_belong_together():
    trainable, _ = jpeft.partition(jpeft.lora(rank=2)(KEY, tree()))
    raises("both trees hold an array", lambda: jpeft.combine(trainable, trainable))
    raises("differ in structure", lambda: jpeft.combine(trainable, {"a": None}))


def test_half_of_a_partitioned_tree(tmp_path):
    t = jpeft.chain(jpeft.quantize("nf4"), jpeft.lora(rank=2))
    params = t(KEY, tree())
    halves = dict(zip(("Quantized", "LowRank"), jpeft.partition(params), strict=True))
    run = jpeft.adapt(lambda p, x: x @ p["embed"]["embedding"])
    for lacking, half in halves.items():
        for name, f in {
            "adapt": lambda x: run(x, jnp.ones((3, 11))),
            "merge": jpeft.merge,
            "unload": jpeft.unload,
            "disable": jpeft.disable,
            "finalize": jpeft.finalize,
            "summary": jpeft.summary,
            "quant.rounding": jpeft.quant.rounding,
            "save": lambda x: jpeft.save(tmp_path / "a", x, t),
        }.items():
            raises(
                [f"{name} needs the whole tree", f"the {lacking} has no", "combine("],
                lambda f=f, half=half: f(half),
            )


def test_a_key_that_is_none(unchecked):
    lora, chain = jpeft.lora(rank=2), jpeft.chain(jpeft.quantize())
    for t in (lora, chain, jpeft.vera(rank=2)):
        raises(["jax.random.key(0)", "came a int"], lambda t=t: t(0, tree()))
    raises("lora: the key comes first", lambda: lora(tree(), KEY))
    assert lora(jax.random.PRNGKey(0), tree())  # the older kind of key


def test_offload_of_a_name():
    raises(
        ["expected an Optax transformation", "got 'adam'"],
        lambda: jpeft.optim.offload("adam"),
    )


HAVE_A_DTYPE = [
    n for n, t in METHODS.items() if "dtype" in {f.name for f in dataclasses.fields(t)}
]


@pytest.mark.parametrize("dtype", ["floaty", "int8", 3.5])
@pytest.mark.parametrize("name", HAVE_A_DTYPE)
def test_a_dtype_that_is_none_or_not_floating(name, dtype):
    with pytest.raises(ValueError, match=r"dtype=.*: expected a floating-point dtype"):
        getattr(jpeft, name)(**needed(METHODS[name]), dtype=dtype)
