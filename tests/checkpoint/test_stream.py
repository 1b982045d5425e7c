"""A stored model becomes the quantised tree that its loaded weights would become."""

import json
import os
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
import safetensors.numpy
from draws import normal
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft.checkpoint.stream import load_quantized

KEY = jax.random.key(0)


def base(dtype=jnp.float32):
    keys = iter(jax.random.split(KEY, 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)
    return {
        "embed": {"embedding": draw(11, 70)},
        "layers_0": {
            "up": {"kernel": draw(70, 5), "bias": draw(5)},
            "norm": {"scale": draw(70)},
        },
        "attn": {"out": {"kernel": draw(5, 14, 7), "bias": draw(7)}},
        "head": {"kernel": draw(130, 3)},
        "steps": jnp.int32(4),
    }


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def flat_names(tree, sep="."):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {sep.join(k.key for k in p): x for p, x in flat}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.array_equal(x, y)


def write(path, tree, sep="."):
    # float8 aside, the library's Flax side writes all that JAX has.
    safetensors.flax.save_file(flat_names(tree, sep), path)
    return path


def write_orbax(path, tree):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ocp.StandardCheckpointer() as writer:
            writer.save(path, tree)
    return path


def refused(error, parts, *args, **kwargs):
    with pytest.raises(error) as raised:
        load_quantized(*args, **kwargs)
    for part in parts:
        assert part in str(raised.value), str(raised.value)


# --- the same bits -------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sep", [".", "/"])
def test_a_safetensors_file_gives_the_bits_of_quantize(tmp_path, dtype, sep):
    params = base(dtype)
    file = write(tmp_path / "model.safetensors", params, sep)
    transform = jpeft.quantize("nf4")
    loaded = load_quantized(file, transform, abstract(params))
    assert_same(loaded, transform(KEY, params))
    assert loaded["head"]["kernel"].format == "nf4"


@pytest.mark.sample(1)
@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_one_model(tmp_path, with_index):
    params, transform = base(), jpeft.quantize("nf4")
    names = flat_names(params)
    parts = [dict(list(names.items())[k::2]) for k in range(2)]
    files = [f"model-0000{k}.safetensors" for k in range(2)]
    for file, part in zip(files, parts, strict=True):
        safetensors.flax.save_file(part, tmp_path / file)
    if with_index:
        # A file that the index does not name is no part of the model.
        safetensors.flax.save_file(parts[0], tmp_path / "consolidated.safetensors")
        index = {n: f for f, part in zip(files, parts, strict=True) for n in part}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (tmp_path / "model.safetensors.index.json").write_text(text)
    expected = transform(KEY, params)
    assert_same(load_quantized(tmp_path, transform, abstract(params)), expected)
    if with_index:
        index = tmp_path / "model.safetensors.index.json"
        assert_same(load_quantized(index, transform, abstract(params)), expected)


def test_an_orbax_tree_gives_the_bits_of_quantize(tmp_path):
    params = base()
    params["mixed"] = [{"w": params["head"]["kernel"]}, (jnp.ones(3), jnp.zeros(2))]
    params["layers_0"]["up"] = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), params["layers_0"]["up"]
    )
    transform = jpeft.quantize("int8", where=".*(kernel|w)")
    folder = write_orbax(tmp_path / "saved", params)
    loaded = load_quantized(folder, transform, abstract(params))
    assert_same(loaded, transform(KEY, params))


def test_steps_of_a_manager_and_of_the_new_api_are_read(tmp_path):
    params, transform = base(), jpeft.quantize("nf4")
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        manager.save(3, args=ocp.args.StandardSave(params))
    expected = transform(KEY, params)
    step = tmp_path / "manager" / "3"
    assert_same(load_quantized(step, transform, abstract(params)), expected)
    refused(
        jpeft.CheckpointError,
        ["holds 1 steps; pass one, such as", repr(str(step))],
        tmp_path / "manager",
        transform,
        abstract(params),
    )
    new = pytest.importorskip("orbax.checkpoint.experimental.v1")
    save = getattr(new, "save", None) or new.save_pytree
    save(tmp_path / "new", params)
    assert_same(load_quantized(tmp_path / "new", transform, abstract(params)), expected)


def test_formats_mix_in_a_chain(tmp_path):
    params = base()
    transform = jpeft.chain(
        jpeft.quantize("int8", False, "channel", where="head/.*"),
        jpeft.chain(
            jpeft.quantize("nf4", where=".*up.*"),
            jpeft.quantize("quantile8", where="embedding", block_size=32),
        ),
    )
    file = write(tmp_path / "model.safetensors", params)
    loaded = load_quantized(file, transform, abstract(params))
    assert_same(loaded, transform(KEY, params))
    assert loaded["embed"]["embedding"].format == "quantile8"


def test_axes_may_be_told_by_the_uses_of_the_model(tmp_path):
    params = {"proj": {"kernel": jax.random.normal(KEY, (5, 14, 7))}}
    file = write(tmp_path / "model.safetensors", params)
    model = file, jpeft.quantize("nf4"), abstract(params)
    refused(ValueError, ["proj/kernel: quantize cannot tell input from output"], *model)
    fn = lambda p, x: jnp.einsum("bij,ijo->bo", x, p["proj"]["kernel"])
    uses = jpeft.find_uses(fn, params, jnp.ones((2, 5, 14)))
    loaded = load_quantized(*model, uses=uses)
    assert_same(loaded, jpeft.quantize("nf4")(KEY, params, uses=uses))
    assert loaded["proj"]["kernel"].inner == (5, 14)


def test_weights_are_cast_to_the_dtype_of_like(tmp_path):
    stored, transform = base(jnp.bfloat16), jpeft.quantize("nf4")
    file = write(tmp_path / "model.safetensors", stored)
    params = jax.tree.map(lambda x: x.astype(jnp.float32) if x.ndim else x, stored)
    loaded = load_quantized(file, transform, abstract(params))
    assert_same(loaded, transform(KEY, params))
    assert loaded["head"]["kernel"].dtype == jnp.float32


def test_double_precision_on_disk_is_rounded_once(tmp_path):
    w = np.random.default_rng(0).normal(size=(64, 3))
    safetensors.numpy.save_file({"kernel": w}, tmp_path / "a.safetensors")
    like = {"kernel": jax.ShapeDtypeStruct((64, 3), jnp.float32)}
    transform = jpeft.quantize("int8")
    loaded = load_quantized(tmp_path, transform, like)
    assert_same(loaded, transform(KEY, {"kernel": jnp.asarray(w, jnp.float32)}))


def test_what_was_loaded_does_not_change_with_the_file(tmp_path):
    params = {"kernel": jnp.ones((64, 4)), "offset": jnp.ones((4096, 16))}
    file = tmp_path / "model.safetensors"
    for k in range(64):
        safetensors.flax.save_file(params, file, metadata={"pad": "x" * k})
        data = file.stat().st_size - 4 * (64 * 4 + 4096 * 16)
        if data % 64 == 0:  # where JAX would take the file's memory for its own
            break
    assert data % 64 == 0
    transform = jpeft.quantize("nf4", where=".*kernel")
    loaded = load_quantized(file, transform, abstract(params))
    with file.open("r+b") as f:
        f.seek(data)
        f.write(bytes(file.stat().st_size - data))
    assert not safetensors.numpy.load_file(file)["offset"].any()
    assert np.array_equal(loaded["offset"], params["offset"])
    assert np.array_equal(jpeft.merge(loaded)["kernel"], params["kernel"])


# --- trees of other kinds ------------------------------------------------------------


def test_linen_boxes_keep_their_names(tmp_path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
            return nn.Dense(5, kernel_init=init, name="up")(x)

    model, x = Model(), jnp.ones((2, 70))
    like = jax.eval_shape(model.init, KEY, x)["params"]
    params, transform = model.init(KEY, x)["params"], jpeft.quantize("nf4")
    file = write(tmp_path / "model.safetensors", nn.meta.unbox(params))
    loaded = load_quantized(file, transform, like)
    assert_same(loaded, transform(KEY, params))
    assert loaded["up"]["kernel"].codes.names == ("embed", "mlp")
    # Orbax keeps the box as one more level of the tree.
    folder = write_orbax(tmp_path / "saved", params)
    assert_same(load_quantized(folder, transform, like), loaded)


def test_an_nnx_state_comes_back_as_one(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(70, 5, rngs=rngs) for _ in range(2)])

    make = lambda: nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    params, like = make(), nnx.eval_shape(make)
    transform = jpeft.quantize("nf4")
    folder = write_orbax(tmp_path / "saved", params)
    loaded = load_quantized(folder, transform, like)
    assert_same(loaded, transform(KEY, params))
    assert isinstance(loaded, nnx.State)
    names = {
        f"layers.{k}.{n}": np.asarray(params["layers"][k][n][...])
        for k in range(2)
        for n in ("kernel", "bias")
    }
    safetensors.numpy.save_file(names, tmp_path / "model.safetensors")
    assert_same(load_quantized(tmp_path / "model.safetensors", transform, like), loaded)


def test_a_random_key_in_like_is_no_weight(tmp_path):
    params = {"kernel": jnp.ones((64, 3)), "rngs": jnp.zeros(2, jnp.uint32)}
    file = write(tmp_path / "model.safetensors", params)
    like = abstract(params | {"rngs": KEY})
    parts = ["rngs: like= holds a random key here", "nnx.state(model, nnx.Param)"]
    refused(ValueError, parts, file, jpeft.quantize("nf4"), like)


def test_what_is_no_array_stays(tmp_path):
    params = {"kernel": jnp.ones((64, 3)), "act": nn.gelu, "rate": 0.5}
    file = write(tmp_path / "model.safetensors", {"kernel": params["kernel"]})
    loaded = load_quantized(file, jpeft.quantize("nf4"), params)
    assert loaded["act"] is nn.gelu and loaded["rate"] == 0.5
    assert loaded["kernel"].format == "nf4"


@pytest.mark.sample(1)
@pytest.mark.parametrize("spec", [("data", "model"), (None, "model"), (("data",),)])
def test_each_weight_lands_where_it_was_to_be(tmp_path, spec):
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    params = {"a": {"kernel": jax.random.normal(KEY, (512, 6))}, "b": jnp.ones((8, 3))}
    shardings = {
        "a": {"kernel": NamedSharding(mesh, PartitionSpec(*spec))},
        "b": NamedSharding(mesh, PartitionSpec("data")),
    }
    transform = jpeft.quantize("nf4", where="linear")
    expected = transform(KEY, jax.device_put(params, shardings))
    for saved in (
        write(tmp_path / "model.safetensors", params),
        write_orbax(tmp_path / "saved", params),
    ):
        loaded = load_quantized(saved, transform, abstract(params), shardings=shardings)
        assert_same(loaded, expected)
        for x, y in zip(
            jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True
        ):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert loaded["b"].sharding == shardings["b"]
    replicated = NamedSharding(mesh, PartitionSpec())
    loaded = load_quantized(saved, transform, abstract(params), shardings=replicated)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(loaded))


# --- names ---------------------------------------------------------------------------


def as_torch(params):
    """As PyTorch would have saved `base`, under "model."."""
    up, out = params["layers_0"]["up"], params["attn"]["out"]
    return {
        "model.embed.weight": params["embed"]["embedding"],
        "model.layers.0.up.weight": up["kernel"].T,
        "model.layers.0.up.bias": up["bias"],
        "model.layers.0.norm.weight": params["layers_0"]["norm"]["scale"],
        "model.attn.out.weight": out["kernel"].reshape(70, 7).T,
        "model.attn.out.bias": out["bias"],
        "model.head.a": params["head"]["kernel"][:64].T,
        "model.head.b": params["head"]["kernel"][64:].T,
        "model.rotary.inv_freq": jnp.ones(3),
        "steps": params["steps"],
    }


def torch_names():
    return {
        "attn/out/kernel": (
            "model.attn.out.weight",
            lambda w: w.T.reshape(5, 14, 7),
        ),
        "head/kernel": (
            ["model.head.a", "model.head.b"],
            lambda a, b: np.concatenate([a.T, b.T]),
        ),
        r"layers_(\d+)/(.*)/kernel": (r"model/layers/\1/\2/weight", np.transpose),
        r"layers_(?P<k>\d+)/(.*)/scale": r"model/layers/\g<k>/\2/weight",
        r"layers_(\d+)/(.*)": r"model.layers.\1.\2",
        r"(.*)/embedding": r"model.\1.weight",
        "attn/.*bias": "model.attn.out.bias",
    }


def by_function(path):
    if path == "steps":
        return None
    if path == "attn/out/kernel":
        return "model.attn.out.weight", lambda w: jnp.transpose(w).reshape(5, 14, 7)
    if path == "head/kernel":
        return ("model.head.a", "model.head.b"), lambda a, b: np.hstack([a, b]).T
    last = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    *before, name = path.replace("_", "/").split("/")
    stored = ".".join(["model", *before, last.get(name, name)])
    return (stored, np.transpose) if name == "kernel" else stored


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "names", [torch_names(), by_function], ids=["dict", "function"]
)
def test_names_may_be_told_and_arrays_turned(tmp_path, dtype, names):
    params, transform = base(dtype), jpeft.quantize("nf4")
    file = tmp_path / "model.safetensors"
    safetensors.flax.save_file(as_torch(params), file)
    loaded = load_quantized(file, transform, abstract(params), names=names)
    assert_same(loaded, transform(KEY, params))
    # The same names, in a tree that Orbax saved.
    tree = {}
    for name, x in as_torch(params).items():
        *before, last = name.split(".")
        node = tree
        for part in before:
            node = node.setdefault(part, {})
        node[last] = x
    folder = write_orbax(tmp_path / "saved", tree)
    assert_same(
        load_quantized(folder, transform, abstract(params), names=names), loaded
    )


# --- refusals ------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    params = base()
    file = write(tmp_path / "model.safetensors", params)
    return file, jpeft.quantize("nf4"), abstract(params)


def test_only_quantize_is_taken(model):
    file, quantize, like = model
    qlora = jpeft.chain(quantize, jpeft.lora(rank=2))
    refused(
        ValueError,
        ["lora is not quantize; apply it to what was loaded", "jpeft.lora(...)"],
        file,
        qlora,
        like,
    )
    refused(
        ValueError,
        ["'nf4' is no transform; pass jpeft.quantize(...)"],
        file,
        "nf4",
        like,
    )
    refused(
        ValueError,
        ["head/kernel: int8 and nf4 both select it; exclude='head/kernel'"],
        file,
        jpeft.chain(quantize, jpeft.quantize("int8", where="head/.*")),
        like,
    )
    refused(
        ValueError,
        ["like= carries adapters or quantised weights"],
        file,
        quantize,
        quantize(KEY, base()),
    )


def test_a_missing_weight_is_named_with_what_is_near(model):
    file, quantize, like = model
    like["layers_0"]["down"] = like["layers_0"]["up"]
    refused(
        jpeft.CheckpointError,
        [
            "layers_0/down/bias: ",
            "model.safetensors has no 'layers_0/down/bias' and 1 more",
            "nearest: [",
            "'layers_0.up.bias'",
            "say where it is in names=",
        ],
        file,
        quantize,
        like,
    )


def test_a_level_above_is_recognised(model):
    file, quantize, like = model
    refused(
        jpeft.CheckpointError,
        [
            "norm/scale: ",
            "it has 'layers_0.norm.scale': names={'(.*)': r'layers_0.\\1'}",
        ],
        file,
        quantize,
        like["layers_0"],
    )
    loaded = load_quantized(
        file, quantize, like["layers_0"], names={"(.*)": r"layers_0.\1"}
    )
    assert_same(loaded, quantize(KEY, base()["layers_0"]))


def test_pytorch_is_recognised_by_its_names(tmp_path):
    params = {"up": {"kernel": jax.random.normal(KEY, (64, 5)), "bias": jnp.ones(5)}}
    params["norm"] = {"scale": jnp.ones(5)}
    state = {
        "up.weight": params["up"]["kernel"].T,
        "up.bias": params["up"]["bias"],
        "norm.weight": params["norm"]["scale"],
    }
    safetensors.flax.save_file(state, tmp_path / "model.safetensors")
    model = tmp_path, jpeft.quantize("nf4"), abstract(params)
    with pytest.raises(jpeft.CheckpointError, match="PyTorch wrote it") as raised:
        load_quantized(*model)
    advice = str(raised.value).partition("names=")[2]
    loaded = load_quantized(*model, names=eval(advice, {"numpy": np}))
    assert_same(loaded, model[1](KEY, params))


# What a training saves beside its weights, under their names and in their shapes.
BESIDE = {
    "moments": lambda p: {"opt_state": optax.adam(1e-3).init(p)},
    "moments alone": lambda p: {"mu": p, "nu": p},
    "a chain": lambda p: {"opt_state": optax.chain(optax.trace(0.9)).init(p)},
    "PyTorch's": lambda p: {"optimizer": {"exp_avg": p, "exp_avg_sq": p}},
    "an average": lambda p: {"ema": p, "ema_params": p, "params_ema": p},
    "gradients": lambda p: {"grads": p, "acc_grads": p},
}


@pytest.mark.parametrize("level", ["params", "model/params", "zmodel"])
@pytest.mark.parametrize("what", BESIDE)
def test_the_weights_are_advised_and_not_what_is_saved_beside_them(
    tmp_path, what, level
):
    params = {"dense": {"kernel": jax.random.normal(KEY, (64, 4))}}
    tree = params
    for name in reversed(level.split("/")):
        tree = {name: tree}
    zero = jax.tree.map(jnp.zeros_like, params)
    tree = {"step": jnp.int32(5)} | tree | BESIDE[what](zero)
    names = {jax.tree_util.keystr(k, simple=True, separator="/"): x
             for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]}  # fmt: skip
    safetensors.flax.save_file(names, tmp_path / "a.safetensors")
    model = tmp_path / "a.safetensors", jpeft.quantize("nf4"), abstract(params)
    assert_same(as_advised(*model), model[1](KEY, params))


def as_advised(*model):
    """What the names= of the refusal load."""
    with pytest.raises(jpeft.CheckpointError) as raised:
        load_quantized(*model)
    return load_quantized(*model, names=eval(str(raised.value).partition("names=")[2]))


def test_moments_alone_are_not_advised(tmp_path):
    params = {"dense": {"kernel": jnp.ones((64, 4))}}
    folder = write_orbax(tmp_path / "a", {"opt_state": optax.adam(1e-3).init(params)})
    refused(
        jpeft.CheckpointError,
        ["has no 'dense/kernel'; nearest: nothing; say where it is in names="],
        *(folder, jpeft.quantize("nf4"), abstract(params)),
    )


def test_a_training_state_of_orbax_advises_its_weights(tmp_path):
    params = {"dense": {"kernel": jax.random.normal(KEY, (64, 4))}}
    state = {"opt_state": optax.adam(1e-3).init(params), "params": params, "step": 5}
    model = write_orbax(tmp_path / "a", state), jpeft.quantize("nf4"), abstract(params)
    refused(jpeft.CheckpointError, [r"names={'(.*)': r'params/\1'}"], *model)
    assert_same(as_advised(*model), model[1](KEY, params))


def test_where_some_paths_are_there_as_they_are_the_advice_is_of_the_others(tmp_path):
    params = {"dense": {"kernel": jax.random.normal(KEY, (64, 4))}, "s": jnp.ones(3)}
    flat = {"params.dense.kernel": params["dense"]["kernel"], "s": params["s"]}
    safetensors.flax.save_file(flat, tmp_path / "a.safetensors")
    model = tmp_path / "a.safetensors", jpeft.quantize("nf4"), abstract(params)
    with pytest.raises(jpeft.CheckpointError) as raised:
        load_quantized(*model)
    advice = str(raised.value).partition("names=")[2]
    assert advice == "{'dense/kernel': 'params.dense.kernel', ...}"
    names = eval(advice.replace(", ...", ""))
    assert_same(load_quantized(*model, names=names), model[1](KEY, params))


def test_a_weight_that_is_called_value_is_found(tmp_path):
    params = {
        "dense": {"kernel": jax.random.normal(KEY, (64, 4))},
        "scale": {"value": jnp.ones(64)},
        "value": {"kernel": jax.random.normal(KEY, (64, 4))},
    }
    quantize, like = jpeft.quantize("nf4"), abstract(params)
    made = quantize(KEY, params)
    folder = write_orbax(tmp_path / "plain", params)
    assert_same(load_quantized(folder, quantize, like), made)
    boxed = jax.tree.map(lambda x: {"value": x}, params)
    folder = write_orbax(tmp_path / "boxed", boxed)
    assert_same(load_quantized(folder, quantize, like), made)
    folder = write_orbax(tmp_path / "below", {"params": params})
    assert_same(as_advised(folder, quantize, like), made)


def test_two_arrays_whose_paths_read_alike_stay_two(tmp_path):
    w = jax.random.normal(KEY, (64, 4))
    tree = {"a/b": {"kernel": w}, "a": {"b": {"kernel": 2 * w}}}
    model = write_orbax(tmp_path / "a", tree), jpeft.quantize("nf4"), abstract(tree)
    assert_same(load_quantized(*model), model[1](KEY, tree))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ({"layer_0/.*": "x"}, ["key 'layer_0/.*' matches no path", "layers_0/up"]),
        ({"(head": "x"}, ["key '(head' is neither a path nor a regular expression"]),
        ({"head/.*": r"\1"}, [r"gives '\\1'", "does not fit", "'head/.*'"]),
        ({"head/.*": 3}, ["head/kernel: names= gives 3; expected a name, (name,"]),
        (lambda p: ["a", "b"], ["names= gives ['a', 'b']; expected"]),
    ],
)
def test_names_that_fit_nothing_are_refused(model, names, parts):
    refused(ValueError, parts, *model, names=names)


def test_a_function_that_fails_is_named(model):
    names = {"head/kernel": ("head.kernel", lambda w: w.reshape(3))}
    refused(
        ValueError,
        ["head/kernel: the function in names= failed on 'head.kernel'", "(130, 3)"],
        *model,
        names=names,
    )


@pytest.mark.parametrize(
    ("shape", "want", "advice"),
    [
        ((3, 130), (130, 3), "it is stored transposed: names={'conv/kernel': "
         "('conv.kernel', numpy.transpose)}"),
        ((7, 3, 5, 2), (5, 2, 3, 7), "lambda w: w.transpose(2, 3, 1, 0)"),
        ((3, 10), (5, 2, 3), "it is stored transposed and flat: names={'conv/kernel': "
         "('conv.kernel', lambda w: w.T.reshape(5, 2, 3))}"),
        ((10, 3), (5, 2, 3), "lambda w: w.reshape(5, 2, 3)"),
        ((7, 5), (3, 4), "pass the like= of the model that was saved"),
    ],
)  # fmt: skip
def test_another_shape_comes_with_what_to_write(tmp_path, shape, want, advice):
    file = write(tmp_path / "a.safetensors", {"conv": {"kernel": jnp.ones(shape)}})
    refused(
        jpeft.CheckpointError,
        [f"conv/kernel: expected shape {want}, found {shape} in 'conv.kernel'", advice],
        file,
        jpeft.quantize("nf4", where=".*kernel"),
        {"conv": {"kernel": jax.ShapeDtypeStruct(want, jnp.float32)}},
    )


def test_the_functions_result_is_checked(model):
    names = {"head/kernel": ("head.kernel", np.transpose)}
    refused(
        jpeft.CheckpointError,
        ["expected shape (130, 3), found (3, 130)", "function in names= made it of"],
        *model,
        names=names,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("writer", ["safetensors", "orbax"])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, bad, writer):
    params = base()
    params["head"]["kernel"] = params["head"]["kernel"].at[7, 1].set(bad)
    save = write if writer == "safetensors" else write_orbax
    saved = save(tmp_path / "model.safetensors", params)
    refused(
        jpeft.CheckpointError,
        ["head/kernel: 'head", "holds NaN or infinity in float32"],
        saved,
        jpeft.quantize("nf4"),
        abstract(params),
    )
    # Where it is not quantised it is the model's own affair.
    transform = jpeft.quantize("nf4", exclude="head/.*")
    loaded = load_quantized(saved, transform, abstract(params))
    assert not np.isfinite(loaded["head"]["kernel"][7, 1])


def test_codes_are_not_taken_for_weights(tmp_path):
    codes = np.ones((64, 3), np.int8)
    safetensors.numpy.save_file({"kernel": codes}, tmp_path / "a.safetensors")
    like = {"kernel": jax.ShapeDtypeStruct((64, 3), jnp.float32)}
    refused(
        jpeft.CheckpointError,
        ["kernel: expected float32, found int8", "give the function that decodes"],
        tmp_path,
        jpeft.quantize("nf4"),
        like,
    )
    transform = jpeft.quantize("nf4")
    names = {"kernel": ("kernel", lambda c: c.astype(np.float32) / 2)}
    loaded = load_quantized(tmp_path, transform, like, names=names)
    assert_same(loaded, transform(KEY, {"kernel": jnp.full((64, 3), 0.5)}))


@pytest.mark.float16
def test_a_scale_beside_8_bit_floats_is_not_forgotten(tmp_path):
    w = jnp.arange(128.0).reshape(64, 2).astype(jnp.float8_e4m3fn)
    state = {"w/kernel": w, "w/kernel_scale_inv": jnp.float32(0.25)}
    safetensors.flax.save_file(state, tmp_path / "a.safetensors")
    like = {"w": {"kernel": jax.ShapeDtypeStruct((64, 2), jnp.float32)}}
    transform = jpeft.quantize("int8")
    refused(
        jpeft.CheckpointError,
        ["float8_e4m3fn with a scale beside it", "['w/kernel', 'w/kernel_scale_inv']"],
        tmp_path,
        transform,
        like,
    )
    names = {
        "w/kernel": (list(state), lambda w, s: w.astype(np.float32) * np.float32(s))
    }
    loaded = load_quantized(tmp_path, transform, like, names=names)
    expected = {"w": {"kernel": w.astype(jnp.float32) * 0.25}}
    assert_same(loaded, transform(KEY, expected))


def test_integers_that_do_not_fit_are_refused(tmp_path):
    state = {"kernel": np.ones((64, 3), np.float32), "ids": np.int64([1, 2**40])}
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    like = {
        "kernel": jax.ShapeDtypeStruct((64, 3), jnp.float32),
        "ids": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    refused(
        jpeft.CheckpointError,
        ["ids: 'ids' of", "holds numbers that int32 does not"],
        tmp_path,
        jpeft.quantize("nf4"),
        like,
    )


def test_shardings_must_fit(model):
    file, quantize, like = model
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    one = NamedSharding(mesh, PartitionSpec("x"))
    refused(
        ValueError,
        ["shardings= has 1 leaves (NamedSharding) for 8 weights"],
        file,
        quantize,
        like,
        shardings=[one],
    )
    refused(
        ValueError,
        [": shardings= does not fit: "],
        file,
        quantize,
        like,
        shardings=one,
    )


# --- damaged and strange folders -----------------------------------------------------


def test_a_damaged_file_is_refused_and_not_mapped(model):
    file, quantize, like = model
    whole = file.read_bytes()
    for data, part in (
        (whole[:-5], "truncated: 'layers_0.up.kernel' ends at byte 8928"),
        (whole[:20], "truncated, or no safetensors file"),
        (b"", "truncated, or no safetensors file"),
        (b"\x05" + bytes(7) + b"[1,2]", "damaged, or no safetensors file"),
        (whole.replace(b'"I32"', b'"X32"'), "'steps' has dtype X32; known are BOOL"),
        (whole.replace(b"[130,3]", b"[131,3]"), "'head.kernel' of shape (131, 3)"),
    ):
        file.write_bytes(data)
        refused(jpeft.CheckpointError, [str(file), part], file, quantize, like)


def test_a_damaged_orbax_folder_is_refused(tmp_path):
    params, quantize = base(), jpeft.quantize("nf4")
    folder = write_orbax(tmp_path / "saved", params)
    for data in folder.rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    refused(
        jpeft.CheckpointError,
        [str(folder), "cannot be read; the folder is truncated or damaged"],
        folder,
        quantize,
        abstract(params),
    )
    (folder / "_METADATA").write_text("{")
    refused(
        jpeft.CheckpointError,
        [str(folder), "the arrays cannot be read", "(none is described)"],
        folder,
        quantize,
        abstract(params),
    )


def test_folders_that_say_too_little_are_refused(model, tmp_path):
    file, quantize, like = model
    folder = tmp_path / "folder"
    refused(jpeft.CheckpointError, ["no such file or folder"], folder, quantize, like)
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    refused(
        jpeft.CheckpointError,
        ["expected *.safetensors, or a folder that Orbax", "pytorch_model.bin"],
        folder,
        quantize,
        like,
    )
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(file.read_bytes())
    refused(
        jpeft.CheckpointError,
        ["is in a.safetensors and in b.safetensors; pass the one file"],
        folder,
        quantize,
        like,
    )
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "c.safetensors"}}')
    refused(
        jpeft.CheckpointError,
        ["1 of 1 shards are missing: c.safetensors"],
        folder,
        quantize,
        like,
    )
    index.write_text('{"weight_map": 3}')
    refused(jpeft.CheckpointError, ["damaged"], folder, quantize, like)
    (folder / "other.safetensors.index.json").touch()
    refused(
        jpeft.CheckpointError,
        ["2 models in one folder; pass the index of one"],
        folder,
        quantize,
        like,
    )


def test_of_several_orbax_items_one_must_be_said(tmp_path):
    params, quantize = base(), jpeft.quantize("nf4")
    for name in ("params", "state"):
        write_orbax(tmp_path / "step" / name, params)
    refused(
        jpeft.CheckpointError,
        ["holds params, state; pass one of these folders, such as"],
        tmp_path / "step",
        quantize,
        abstract(params),
    )


# --- bitsandbytes --------------------------------------------------------------------


@pytest.fixture
def four_bit(tmp_path):
    """A model whose linear weights bitsandbytes has quantised, (out, in)."""
    params = {
        "up": {"kernel": jax.random.normal(KEY, (128, 128)), "bias": jnp.ones(128)},
        "down": {"kernel": jax.random.normal(KEY, (64, 6))},
    }
    transform = jpeft.quantize("nf4")
    made = transform(KEY, params)
    state = {"up.bias": np.ones(128, np.float32)}
    for name in params:
        state |= jpeft.quant.to_bitsandbytes(made[name]["kernel"], f"{name}.weight")
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    return tmp_path, transform, abstract(params), made


NAMES = {r"(.*)/kernel": (r"\1.weight", np.transpose)}


@pytest.mark.slow
def test_codes_of_bitsandbytes_are_taken_over(four_bit):
    *model, made = four_bit
    loaded = load_quantized(*model, names=NAMES)
    assert_same(jpeft.merge(loaded), jpeft.merge(made))
    for name in ("up", "down"):
        x, y = loaded[name]["kernel"], made[name]["kernel"]
        assert x.origin == y.origin and x.compute_dtype == y.compute_dtype
        assert np.array_equal(x.codes, y.codes)
    # Two axes of one length: a transposition that is told of is one that is done.
    names = {"up/kernel": "up.weight", "down/kernel": ("down.weight", jnp.transpose)}
    other = load_quantized(*model, names=names)
    assert np.array_equal(
        jpeft.merge(other)["up"]["kernel"], jpeft.merge(made)["up"]["kernel"].T
    )


def as_json(change):
    def changed(state, key="up.weight.quant_state.bitsandbytes__nf4"):
        text = change(bytes(state[key]))
        return state | {key: np.frombuffer(text, np.uint8)}

    return changed


BROKEN = {
    "a letter of its dtype": (
        as_json(lambda x: x.replace(b"float32", b"floet32", 1)),
        "dtype='floet32': expected a floating-point dtype",
    ),
    "cut": (as_json(lambda x: x[:-5]), "is damaged"),
    "integers for scales": (
        lambda s: s | {"up.weight.nested_absmax": np.ones(1, np.int32)},
        "nested_absmax' is int32, expected float32",
    ),
    "no book": (
        lambda s: {k: x for k, x in s.items() if k != "up.weight.quant_map"},
        "lacks up.weight.quant_map",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_state_of_bitsandbytes_names_weight_and_file(four_bit, what):
    folder, transform, like, _ = four_bit
    change, told = BROKEN[what]
    file = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)
    refused(
        jpeft.CheckpointError,
        ["up/kernel: ", f"'up.weight' of {folder}", told],
        *(folder, transform, like),
        names=NAMES,
    )


@pytest.mark.slow
def test_codes_of_bitsandbytes_may_be_computed_with_in_the_activations_dtype(four_bit):
    folder, _, like, made = four_bit
    loaded = load_quantized(
        folder, jpeft.quantize("nf4", compute_dtype=None), like, names=NAMES
    )
    assert loaded["up"]["kernel"].compute_dtype is None
    assert_same(jpeft.merge(loaded), jpeft.merge(made))


def test_codes_of_bitsandbytes_and_a_function_that_fails(four_bit):
    names = {"up/kernel": ("up.weight", lambda w: w.T.reshape(128, 8, 9)), **NAMES}
    with pytest.raises(ValueError, match="up/kernel: the function in names= failed"):
        load_quantized(*four_bit[:3], names=names)


def test_codes_of_bitsandbytes_go_on_a_mesh_and_into_boxes(four_bit):
    folder, transform, like, made = four_bit
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    like["up"]["kernel"] = nn.Partitioned(like["up"]["kernel"], names=("in", "out"))
    place = {
        "up": {
            "kernel": NamedSharding(mesh, PartitionSpec(None, "x")),
            "bias": NamedSharding(mesh, PartitionSpec()),
        },
        "down": {"kernel": NamedSharding(mesh, PartitionSpec())},
    }
    loaded = load_quantized(folder, transform, like, names=NAMES, shardings=place)
    codes = loaded["up"]["kernel"].codes
    assert codes.names == ("in", "out")
    assert codes.value.sharding.shard_shape(codes.value.shape) == (64, 16)
    assert np.array_equal(codes.value, made["up"]["kernel"].codes)


@pytest.mark.parametrize(
    ("transform", "names", "parts"),
    [
        (
            jpeft.quantize("nf4", exclude="up/.*"),
            NAMES,
            ["up/kernel: 'up.weight' of", "but quantize does not select it"],
        ),
        (
            jpeft.quantize("int8"),
            NAMES,
            [
                "stored by bitsandbytes in nf4 with block_size=64",
                "quantize asks for int8 with block_size=64",
            ],
        ),
        (
            jpeft.quantize("nf4"),
            {r"(.*)/kernel": r"\1.weight"},
            ["down/kernel: expected shape (64, 6), found (6, 64)", "numpy.transpose"],
        ),
        (
            jpeft.quantize("nf4"),
            {r"(.*)/kernel": (r"\1.weight", lambda w: w[::-1].T)},
            ["can be transposed but nothing else"],
        ),
        (
            jpeft.quantize("nf4"),
            {r"(.*)/kernel": (["up.weight", "down.weight"], lambda a, b: a)},
            ["cannot put such codes together"],
        ),
    ],
)
def test_codes_of_bitsandbytes_that_do_not_fit_are_refused(
    four_bit, transform, names, parts
):
    folder, _, like, _ = four_bit
    refused(jpeft.CheckpointError, parts, folder, transform, like, names=names)


# --- memory --------------------------------------------------------------------------

COUNT, SHAPE = 10, (1024, 4096)  # 16 MB each in float32
MEASURE = """
import gc, sys
from pathlib import Path
import jax, jax.numpy as jnp
import jpeft
from jpeft.checkpoint.stream import load_quantized

def megabytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024

path, small, whole = sys.argv[1:]
one = {{"w0": {{"kernel": jax.ShapeDtypeStruct({shape}, jnp.float32)}}}}
like = {{f"w{{k}}": one["w0"] for k in range({count})}}
transform = jpeft.quantize("nf4")
load_quantized(small, transform, one)  # compiles, and starts Orbax
gc.collect()
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
if whole == "whole":
    zeros = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), like)
    params = transform(jax.random.key(0), zeros)
else:
    params = load_quantized(path, transform, like)
result = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**20
print(megabytes("VmHWM") - before, result)
"""


def measured(path, small, whole=""):
    """(growth of the process at its peak, size of the result), in megabytes."""
    code = textwrap.dedent(MEASURE).format(shape=SHAPE, count=COUNT)
    command = [sys.executable, "-c", code, str(path), str(small), whole]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    # What is alive is to be measured, not what the allocator keeps: glibc's keeps freed
    # blocks below some 32 MB, which ours are, to be quick.
    environment |= {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return map(float, done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("writer", ["safetensors", "orbax"])
def test_the_peak_is_the_result_and_a_few_copies_of_one_weight(tmp_path, writer):
    save = write if writer == "safetensors" else write_orbax
    params = {f"w{k}": {"kernel": normal(k, *SHAPE)} for k in range(COUNT)}
    path = save(tmp_path / "model.safetensors", params)
    small = save(tmp_path / "small.safetensors", {"w0": params["w0"]})
    leaf = SHAPE[0] * SHAPE[1] * 4 / 2**20
    peak, result = measured(path, small)
    print(f"{writer}: peak {peak:.0f} MB, result {result:.0f} MB, leaf {leaf:.0f} MB")
    # The weight and the copies at work on it, or it in the file and on its way.
    assert peak < result + 4 * leaf
    if writer == "safetensors":  # and the same measurement sees all weights at once
        peak, _ = measured(path, small, "whole")
        assert peak > (COUNT - 2) * leaf
