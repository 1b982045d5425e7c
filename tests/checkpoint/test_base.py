"""Which base an adapter fits, and what a refusal says that one may do about it."""

import ast
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from speed import slow_but

import jpeft
from jpeft.boxes import PASSING, STATISTIC
from jpeft.checkpoint.sealed import seal
from jpeft.tree.paths import slots
from jpeft.tree.state import states

KEY = jax.random.key(0)


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def base(vocab=11):
    """A token embedding, a layer, a head; more rows keep the old ones."""
    table = np.concatenate([drawn(0, 11, 6), drawn(1, 9, 6)])[:vocab]
    head = np.concatenate([drawn(2, 6, 11), drawn(3, 6, 9)], 1)[:, :vocab]
    return {
        "embed": {"embedding": jnp.asarray(table)},
        "dense": {"kernel": jnp.asarray(drawn(4, 6, 6))},
        "head": {"kernel": jnp.asarray(head), "bias": jnp.arange(float(vocab))},
    }


def model(p, ids):
    x = p["embed"]["embedding"][ids]
    x = jnp.tanh(x @ p["dense"]["kernel"])
    return x @ p["head"]["kernel"] + p["head"]["bias"][None]


IDS = jnp.array([3, 1, 10])
LORA = jpeft.lora(rank=2, where="dense/kernel")


def trained(transform, tree, **how):
    params = transform(KEY, tree, **how)
    moving, still = jpeft.partition(params)
    moved = jax.tree.map(lambda x: x + 0.1 * drawn(x.size, *x.shape), moving)
    return jpeft.combine(moved, still)


def saved(folder, transform, tree, **how):
    params = trained(transform, tree, **how)
    jpeft.save(folder, params, transform)
    return params


def refusal(folder, tree, **how):
    with pytest.raises(jpeft.CheckpointError) as error:
        jpeft.load(folder, tree, **how)
    return str(error.value)


def remedied(folder, tree, **how):
    """What load gives with what its refusal says to pass."""
    text = refusal(folder, tree, **how)
    found = re.search(r"pass (allow|names)=('\w+'|\(.*?\)|\{.*?\})", text)
    assert found, text
    return jpeft.load(folder, tree, **how | {found[1]: ast.literal_eval(found[2])})


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


# --- what is no weight ---------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.memory = nnx.Cache(jnp.zeros((2, 6)))


def state(seed, mean=0.0):
    made = nnx.split(Net(nnx.Rngs(params=0, dropout=seed)))[1]
    made["norm"]["mean"] = made["norm"]["mean"].replace(jnp.full(6, mean))
    made["memory"] = made["memory"].replace(jnp.full((2, 6), mean))
    return made


def served(tree):
    """The state without what only the training needs."""
    return nnx.State({k: x for k, x in tree.items() if k not in ("dropout", "memory")})


def test_nnx_types_say_what_is_no_weight():
    assert states(slots(state(1))) == {
        "dropout/rngs/count": PASSING,
        "dropout/rngs/key": PASSING,
        "memory": PASSING,
        "norm/mean": STATISTIC,
        "norm/var": STATISTIC,
    }


def test_names_say_it_where_no_type_does():
    x, raw, n = jnp.ones(3), jnp.zeros(2, jnp.uint32), jnp.int32(0)
    tree = {
        "params": {
            "attn": {"key": x, "cache": {"kernel": x}, "cached_key": x},
            "dropout": {"rngs": {"key": KEY, "counts": raw}, "rng": raw, "seed": x},
            "moments": {"mean": x, "std": x},
            "bn": {"mean": x, "var": x, "scale": x},
            "torch": {"running_mean": x, "num_batches_tracked": n},
            "haiku/~/mean_ema": {"average": x, "hidden": x, "counter": n},
            "position_ids": jnp.arange(3),
            "initialized": jnp.bool_(False),
        },
        "batch_stats": {"bn": {"mean": x}},
        "cache": {"attn": {"index": n, "key": x}},
        "state": {"ema": x, "rng_state": raw},
        "constants": {"table": x},
    }
    found = states(slots(tree))
    assert sorted(p for p, kind in found.items() if kind == STATISTIC) == [
        "batch_stats/bn/mean",
        "params/bn/mean",
        "params/bn/var",
        "params/haiku/~/mean_ema/average",
        "params/haiku/~/mean_ema/counter",
        "params/haiku/~/mean_ema/hidden",
        "params/torch/num_batches_tracked",
        "params/torch/running_mean",
        "state/ema",
    ]
    assert sorted(p for p, kind in found.items() if kind == PASSING) == [
        "cache/attn/index",
        "cache/attn/key",
        "params/attn/cached_key",
        "params/dropout/rng",
        "params/dropout/rngs/counts",
        "params/dropout/rngs/key",
        "params/initialized",
        "state/rng_state",
    ]


def test_a_parameter_is_one_whatever_its_name():
    pair = {n: nnx.Param(jnp.ones(3)) for n in ("mean", "var", "running_mean")}
    assert not states(slots(nnx.State(pair)))


def test_parameters_alone_are_counted():
    """6 x 6 + 6 of the layer, 6 + 6 of the norm."""
    params = jpeft.lora(rank=2, where="dense/kernel")(KEY, state(1))
    assert jpeft.count(params) == (24, 54)
    last = jpeft.summary(params).splitlines()[-1]
    assert re.search(r"\b24 +54\b", last), last


def test_other_random_keys_caches_and_no_such_state_are_the_same_base(tmp_path):
    params = saved(tmp_path / "a", LORA, state(1))
    for here in (state(2), served(state(2)), nnx.to_pure_dict(state(3))):
        loaded = jpeft.load(tmp_path / "a", here)
        a = slots(loaded).values[slots(loaded).paths.index("dense/kernel")].a
        np.testing.assert_array_equal(
            *map(np.asarray, (a, params["dense"]["kernel"].a))
        )
    again = jpeft.load(tmp_path / "a", state(2))
    np.testing.assert_array_equal(
        *(
            jax.random.key_data(x["dropout"]["rngs"]["key"][...])
            for x in (again, state(2))
        )
    )


def test_statistics_come_back_as_they_were_saved(tmp_path):
    params = trained(LORA, state(1, mean=3.0))
    jpeft.save(tmp_path / "a", params, LORA)
    loaded = jpeft.load(tmp_path / "a", state(1))
    np.testing.assert_array_equal(loaded["norm"]["mean"][...], np.full(6, 3.0))
    np.testing.assert_array_equal(loaded["memory"][...], np.zeros((2, 6)))
    bare = served(state(1))
    del bare["norm"]["mean"]
    jpeft.load(tmp_path / "a", bare)


def test_statistics_stay_out_where_that_is_asked(tmp_path):
    jpeft.save(tmp_path / "a", trained(LORA, state(1, 3.0)), LORA, statistics=False)
    loaded = jpeft.load(tmp_path / "a", state(1))
    np.testing.assert_array_equal(loaded["norm"]["mean"][...], np.zeros(6))


def test_a_run_gets_its_statistics_back(tmp_path):
    manager = jpeft.CheckpointManager(tmp_path / "run", LORA)
    manager.save(0, trained(LORA, state(1)))
    manager.save(1, trained(LORA, state(1, mean=2.0)))
    loaded, _, _ = manager.restore(state(5))
    np.testing.assert_array_equal(loaded["norm"]["mean"][...], np.full(6, 2.0))


def test_linen_collections_beside_params_are_no_weights(tmp_path):
    def variables(n):
        return {
            "params": {"dense": {"kernel": jnp.ones((4, 4))}},
            "batch_stats": {"bn": {"mean": jnp.full(4, n), "var": jnp.ones(4)}},
            "cache": {"attn": {"k": jnp.full((1, 4), n), "index": jnp.int32(n)}},
        }

    t = jpeft.lora(rank=2, where="params/dense/kernel")
    jpeft.save(tmp_path / "a", trained(t, variables(1.0)), t)
    for more in ({}, {"batch_stats"}, {"batch_stats", "cache"}):
        here = {k: x for k, x in variables(2.0).items() if k in {"params", *more}}
        loaded = jpeft.load(tmp_path / "a", here)
        if more:
            assert float(loaded["batch_stats"]["bn"]["mean"][0]) == 1.0


def test_a_damaged_statistic_is_named(tmp_path):
    jpeft.save(tmp_path / "a", trained(LORA, state(1)), LORA)
    edit(tmp_path / "a", lambda m: m["statistics"]["norm/var"].update(digest="0" * 16))
    assert "norm/var" in refusal(tmp_path / "a", state(1))


def edit(folder, f):
    file = folder / "jpeft.json"
    about = json.loads(file.read_text())
    f(about)
    about.pop("sha256", None)
    file.write_text(seal(about))


def test_a_file_of_the_first_version_loads(tmp_path):
    """It held random keys and statistics as if they were weights."""
    digest = "0" * 16
    extra = {
        "dropout/rngs/key": ([], "key<fry>"),
        "dropout/rngs/count": ([], "uint32"),
        "memory": ([2, 6], "float32"),
    }
    folder, plain = tmp_path / "a", {k: x for k, x in state(1).items() if k == "dense"}
    saved(folder, LORA, nnx.State(plain))

    def older(about):
        about.pop("statistics"), about.pop("passing"), about.pop("sha256", None)
        about["version"] = 1
        about["base"] |= {
            p: {"shape": shape, "dtype": dtype, "digest": digest}
            for p, (shape, dtype) in extra.items()
        }

    edit(folder, older)
    here = {k: x for k, x in state(2).items() if k != "norm"}
    jpeft.load(folder, nnx.State(here))
    assert "memory is missing" in refusal(folder, nnx.State(plain))


# --- another dtype -------------------------------------------------------------------


def test_another_dtype_is_a_word(tmp_path):
    params = saved(tmp_path / "a", LORA, base())
    loaded = remedied(tmp_path / "a", cast(base(), jnp.bfloat16))
    assert loaded["dense"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        loaded["dense"]["kernel"].a, params["dense"]["kernel"].a
    )


def test_integers_of_another_width_are_a_word_and_other_kinds_are_not(tmp_path):
    tree = base() | {"positions": np.arange(4, dtype=np.int32)}
    saved(tmp_path / "a", LORA, tree)
    tree["positions"] = np.arange(4, dtype=np.int16)
    remedied(tmp_path / "a", tree)
    tree["positions"] = np.arange(4, dtype=np.float32)
    text = refusal(tmp_path / "a", tree, allow="dtype")
    assert "positions has dtype float32, saved was int32" in text
    assert "Pass the base it was trained on" in text


def test_a_wider_base_is_compared_by_rounding_it(tmp_path):
    saved(tmp_path / "a", LORA, cast(base(), jnp.bfloat16))
    jpeft.load(tmp_path / "a", base(), allow="dtype")
    other = base()
    other["head"]["bias"] = other["head"]["bias"] + 1
    text = refusal(tmp_path / "a", other, allow="dtype")
    assert "head/bias has other values" in text and 'check="structure"' in text


# --- quantised or not ----------------------------------------------------------------

NF4 = jpeft.quantize("nf4", where="dense/kernel")
QLORA = jpeft.chain(NF4, LORA)


def test_an_adapter_of_a_quantised_base_goes_onto_the_plain_one(tmp_path):
    params = saved(tmp_path / "a", QLORA, cast(base(), jnp.bfloat16))
    plain = cast(base(), jnp.bfloat16)
    loaded = jpeft.load(tmp_path / "a", plain, allow="quantization")
    leaf, before = loaded["dense"]["kernel"], params["dense"]["kernel"]
    assert leaf.base is plain["dense"]["kernel"]
    np.testing.assert_array_equal(leaf.a, before.a)
    np.testing.assert_array_equal(leaf.b, before.b)
    merged = jpeft.merge(loaded)["dense"]["kernel"]
    delta = np.asarray(before.a) @ np.asarray(before.b)
    want = (np.asarray(leaf.base, np.float32) + delta).astype(jnp.bfloat16)
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (merged, want)), rtol=2**-7, atol=2**-7
    )


def test_the_plain_base_is_still_compared(tmp_path):
    saved(tmp_path / "a", QLORA, base())
    other = base()
    other["dense"]["kernel"] = other["dense"]["kernel"] * 1.5
    text = refusal(tmp_path / "a", other, allow="quantization")
    assert "dense/kernel has other values" in text
    jpeft.load(tmp_path / "a", base(), allow="quantization")


def test_an_adapter_of_a_plain_base_goes_onto_a_quantised_one(tmp_path):
    saved(tmp_path / "a", LORA, base())
    here = NF4(KEY, base())
    leaf = remedied(tmp_path / "a", here)["dense"]["kernel"]
    assert leaf.base.format == "nf4"


def test_an_adapter_goes_onto_a_base_of_another_format(tmp_path):
    saved(tmp_path / "a", QLORA, base())
    here = jpeft.quantize("int8", where="dense/kernel")(KEY, base())
    leaf = remedied(tmp_path / "a", here)["dense"]["kernel"]
    assert leaf.base.format == "int8"


def test_a_wider_base_is_quantised_to_the_codes_of_the_training(tmp_path):
    params = saved(tmp_path / "a", QLORA, cast(base(), jnp.bfloat16))
    leaf = jpeft.load(tmp_path / "a", base(), allow="dtype")["dense"]["kernel"]
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf.base.codes, params["dense"]["kernel"].base.codes)


@pytest.mark.slow
def test_what_makes_up_for_searched_codes_stays_with_them(tmp_path):
    t = jpeft.loftq(rank=2, steps=2, where="dense/kernel")
    saved(tmp_path / "a", t, base())
    text = refusal(tmp_path / "a", base(), allow="quantization")
    assert "dense/kernel" in text and "leave 'quantization' out" in text
    jpeft.load(tmp_path / "a", base())


# --- a vocabulary that grew ----------------------------------------------------------


def test_a_longer_vocabulary_that_no_adapter_touches_is_a_word(tmp_path):
    params = saved(tmp_path / "a", LORA, base())
    text = refusal(tmp_path / "a", base(20))
    assert "embed/embedding has shape [20, 6], saved was [11, 6]" in text
    loaded = remedied(tmp_path / "a", base(20))
    got = jpeft.adapt(model)(loaded, IDS)
    want = jpeft.adapt(model)(params, IDS)
    # The products of one row are sums of six terms in another order at most.
    np.testing.assert_allclose(got[:, :11], want, rtol=1e-5, atol=1e-5)
    other = base(20)
    other["embed"]["embedding"] = other["embed"]["embedding"][::-1]
    text = refusal(tmp_path / "a", other, allow="vocabulary")
    assert "embed/embedding has other values" in text


BOTH = ["embed/.*", "head/kernel"]
LONGER = {
    "lora": jpeft.lora(rank=2, where=BOTH),
    "pissa": jpeft.lora(rank=2, where=BOTH, init="pissa"),
    "loha": jpeft.loha(rank=2, where="head/kernel"),
    "adalora": jpeft.adalora(rank=2, where=BOTH),
    "full": jpeft.full(["embed/.*", "head/.*"]),
    "bitfit": jpeft.bitfit(where="head/bias"),
    "diff_pruning": jpeft.diff_pruning(where=["embed/.*", "head/.*"]),
    "qlora": jpeft.chain(
        jpeft.quantize("nf4", where="head/kernel"),
        jpeft.lora(rank=2, where="head/kernel"),
    ),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", slow_but(["lora", "full", "qlora"], LONGER))
def test_an_adapter_changes_nothing_of_new_rows(name, tmp_path):
    params = saved(tmp_path / "a", LONGER[name], base())
    loaded = remedied(tmp_path / "a", base(20))
    old, new = map(jpeft.merge, (params, loaded))
    for path, x in slots(new).items():
        before = dict(slots(old).items())[path]
        plain = dict(slots(base(20)).items())[path]
        part = tuple(map(slice, before.shape))
        np.testing.assert_allclose(x[part], before, rtol=1e-6, atol=1e-6)
        if x.shape != before.shape and name != "qlora":
            axis = x.shape.index(20)
            rows = lambda y, axis=axis: np.moveaxis(np.asarray(y), axis, 0)[11:]
            np.testing.assert_array_equal(rows(x), rows(plain))


def test_virtual_tokens_begin_behind_the_new_rows(tmp_path):
    t = jpeft.prompt(2, where="embed/embedding")
    params = saved(tmp_path / "a", t, base())
    loaded = jpeft.load(tmp_path / "a", base(20), allow="vocabulary")
    embed = jpeft.adapt(lambda p, ids: p["embed"]["embedding"][ids])
    np.testing.assert_array_equal(
        embed(loaded, jnp.array([20, 21, 3])), embed(params, jnp.array([11, 12, 3]))
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", ["dora", "vera", "lokr"])
def test_what_cannot_be_made_longer_is_refused(method, tmp_path):
    t = getattr(jpeft, method)(rank=2, where="head/kernel")
    saved(tmp_path / "a", t, base())
    text = refusal(tmp_path / "a", base(20), allow="vocabulary")
    assert "head/kernel has grown along axis 1" in text and "jpeft.merge" in text
    jpeft.merge(jpeft.load(tmp_path / "a", base()))


def test_a_scale_that_new_rows_would_change_is_refused(tmp_path):
    """One scale for the whole matrix, whose largest weight is a new one."""
    t = jpeft.chain(
        jpeft.quantize("int8", block_size="tensor", where="head/kernel"),
        jpeft.lora(rank=2, where="head/kernel"),
    )
    saved(tmp_path / "a", t, base())
    here = base(20)
    here["head"]["kernel"] = here["head"]["kernel"].at[0, 19].set(100.0)
    text = refusal(tmp_path / "a", here, allow="vocabulary")
    assert "head/kernel has grown" in text and "codes of the old one" in text
    leaf = remedied(tmp_path / "a", here, allow="vocabulary")["head"]["kernel"]
    assert leaf.base.shape == leaf.shape == (6, 20)


def test_a_shorter_or_wider_model_is_another_one(tmp_path):
    saved(tmp_path / "a", LORA, base())
    text = refusal(tmp_path / "a", base(10), allow="vocabulary")
    assert "embed/embedding has shape [10, 6]" in text and "allow=" not in text


# --- other paths, other leaves -------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        {r"model/layers_0/(.*)": r"\1"},
        lambda p: p.removeprefix("model/layers_0/"),
    ],
)
def test_renamed_paths_are_told(names, tmp_path):
    params = saved(tmp_path / "a", LORA, base())
    loaded = jpeft.load(tmp_path / "a", {"model": {"layers_0": base()}}, names=names)
    same(loaded["model"]["layers_0"], params)


def test_a_refusal_says_how_paths_differ(tmp_path):
    params = saved(tmp_path / "a", LORA, base())
    same(remedied(tmp_path / "a", {"params": base()})["params"], params)
    t = jpeft.lora(rank=2, where="params/dense/kernel")
    params = saved(tmp_path / "b", t, {"params": base()})
    same(remedied(tmp_path / "b", base()), params["params"])
    other = {**base(), "layer": base()["dense"]}
    del other["dense"]
    text = refusal(tmp_path / "a", other)
    assert "dense/kernel is missing" in text and "['layer/kernel']" in text
    assert "allow=" not in text
    loaded = jpeft.load(tmp_path / "a", other, names={"layer/kernel": "dense/kernel"})
    assert jpeft.count(loaded).trainable == 24


def test_weights_that_are_others_are_told_apart_from_renamed_ones(tmp_path):
    """A model of one head that is loaded with another, which no adapter touches."""
    params = saved(tmp_path / "a", LORA, base())
    other = base() | {"score": {"kernel": jnp.ones((6, 2))}}
    del other["head"]
    text = refusal(tmp_path / "a", other)
    assert "pass allow=('extra', 'missing')" in text and "names={path here" in text
    same(remedied(tmp_path / "a", other)["dense"], params["dense"])


def test_names_that_fit_nothing_are_refused(tmp_path):
    saved(tmp_path / "a", LORA, base())
    with pytest.raises(ValueError, match="names key 'lay/.*' matches no path of base"):
        jpeft.load(tmp_path / "a", base(), names={"lay/.*": "dense"})
    with pytest.raises(ValueError, match="gives both dense/kernel and head/kernel"):
        jpeft.load(tmp_path / "a", base(), names={"(dense|head)/kernel": "head/kernel"})
    with pytest.raises(ValueError, match="a string"):
        jpeft.load(tmp_path / "a", base(), names={"dense/kernel": ("x", np.transpose)})


def test_leaves_more_or_less_are_words(tmp_path):
    params = saved(tmp_path / "a", LORA, base())
    more = base() | {"value_head": {"kernel": jnp.ones((6, 1))}}
    same(remedied(tmp_path / "a", more)["dense"], params["dense"])
    less = {k: x for k, x in base().items() if k != "head"}
    same(remedied(tmp_path / "a", less)["dense"], params["dense"])
    del less["dense"]
    text = refusal(tmp_path / "a", less, allow="missing")
    assert "dense/kernel is missing" in text and "allow=" not in text


def test_a_refusal_names_every_word_that_is_needed(tmp_path):
    saved(tmp_path / "a", LORA, base())
    here = cast(base(20), jnp.bfloat16) | {"more": jnp.ones(2)}
    text = refusal(tmp_path / "a", here, allow="extra")
    assert "allow=('dtype', 'vocabulary', 'extra')" in text
    remedied(tmp_path / "a", here, allow="extra")
    with pytest.raises(ValueError, match="allow='dtypes': expected some of 'dtype'"):
        jpeft.load(tmp_path / "a", here, allow="dtypes")


# --- shapes alone --------------------------------------------------------------------


@pytest.mark.parametrize("transform", [LORA, QLORA], ids=["lora", "qlora"])
def test_shapes_have_no_values_to_compare(transform, tmp_path):
    params = saved(tmp_path / "a", transform, base())
    shapes = jax.eval_shape(base)
    with pytest.raises(ValueError, match='is a ShapeDtypeStruct.*check="structure"'):
        jpeft.load(tmp_path / "a", shapes)
    loaded = jpeft.load(tmp_path / "a", shapes, check="structure")
    same(*(jpeft.partition(x)[0] for x in (loaded, params)))
    jax.eval_shape(jpeft.adapt(model), loaded, IDS)
