"""Pretrained files into a tree: GGUF, and Hugging Face's folders of safetensors."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import assert_same, like, shapes, tensors, tree, write_folder, write_gguf

import jpeft
from jpeft.hf import Rule, load_base
from jpeft.leaf import is_leaf

KEY = jax.random.key(0)
# GGUF's blocks have scales in float16.
float16 = pytest.mark.float16


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """(a GGUF file of Q4_1, its tensors as they are after that rounding)."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path, tensors())


# --- GGUF ----------------------------------------------------------------------------


@float16
@pytest.mark.parametrize("stacked", [True, False])
def test_a_gguf_file_is_the_tree_that_torch_would_give(file, stacked):
    path, rounded = file
    got = load_base(path, like(stacked=stacked))
    assert_same(got, tree(rounded, stacked))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))


@float16
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_architectures_have_their_rows_as_they_are(tmp_path, kind):
    found = tensors(kind, tied=False)
    rounded = write_gguf(tmp_path / "a.gguf", found, kind)
    got = load_base(tmp_path / "a.gguf", like(kind, tied=False))
    assert_same(got, tree(rounded))


@float16
def test_every_type_is_decoded_and_the_report_says_what_was_stored(tmp_path):
    types = {
        "model.embed_tokens.weight": "Q8_0",
        "model.layers.0.mlp.up_proj.weight": "F16",
        "model.layers.1.mlp.up_proj.weight": "BF16",
        "model.layers.0.mlp.down_proj.weight": "Q4_0",
        "model.layers.1.mlp.down_proj.weight": "Q5_1",
        "model.norm.weight": "F16",
    }
    rounded = write_gguf(tmp_path / "a.gguf", tensors(), types=types)
    reports = []
    got = load_base(
        tmp_path / "a.gguf", like(), dtype=jnp.bfloat16, report=reports.append
    )
    want = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree(rounded))
    assert_same(got, want)
    (report,) = reports
    assert report.unused == () and report.decoded == {}
    assert report.stored["embed/embedding"] == "Q8_0"
    assert report.stored["layers/mlp/up/kernel"] == "F16, BF16"
    assert report.stored["layers/mlp/down/kernel"] == "Q4_0, Q5_1"
    assert report.cast["layers/mlp/down/kernel"] == ("float32", "bfloat16")
    assert report.cast["layers/mlp/up/kernel"] == ("float16, bfloat16", "bfloat16")


# --- as it is stored -----------------------------------------------------------------


@float16
@pytest.mark.parametrize("stacked", [True, False])
def test_stored_codes_have_the_values_of_the_decoded_file(file, stacked):
    path, rounded = file
    reports = []
    got = load_base(
        path, like(stacked=stacked), transform="stored", report=reports.append
    )
    assert_same(jax.tree.map(jnp.asarray, jpeft.merge(got)), tree(rounded, stacked))
    leaves = jpeft.tree.paths.slots(got)
    kept = {p: x for p, x in leaves.items() if is_leaf(x)}
    matrices = {p for p, x in leaves.items() if p.endswith(("kernel", "embedding"))}
    assert kept.keys() == matrices
    assert {x.format for x in kept.values()} == {"q4_1"}
    table = kept["embed/embedding"]
    assert table.bits_per_parameter == 5 and not table.is_matrix
    assert reports[0].decoded == {} and "embed/embedding" not in reports[0].cast


@float16
def test_stored_unrolled_layers_are_what_quantize_makes_of_the_weights(tmp_path):
    """llama.cpp's blocks of the numbers themselves, but for the interleaved rows."""
    found = tensors("qwen2")
    write_gguf(tmp_path / "a.gguf", found, "qwen2")
    how = like("qwen2", stacked=False)
    got = load_base(tmp_path / "a.gguf", how, transform="stored")
    plain = jax.tree.map(jnp.asarray, tree(found, stacked=False))
    t = jpeft.quantize("q4_1", where=["linear", "embedding"], compute_dtype=None)
    bare = lambda x: x.replace(origin="") if is_leaf(x) else x
    want = jax.tree.map(bare, t(KEY, plain), is_leaf=is_leaf)
    assert_same(got, want)


@float16
def test_what_cannot_stay_codes_is_decoded_and_reported(tmp_path):
    types = {
        "model.layers.0.mlp.up_proj.weight": "Q8_0",
        "model.layers.0.mlp.gate_proj.weight": "F32",
        "model.layers.1.mlp.gate_proj.weight": "F32",
        **{f"model.layers.{k}.mlp.down_proj.weight": "Q5_0" for k in range(2)},
        **{f"model.layers.{k}.self_attn.o_proj.weight": "Q4_0" for k in range(2)},
    }
    rounded = write_gguf(tmp_path / "a.gguf", tensors(), types=types)
    reports = []
    got = load_base(
        tmp_path / "a.gguf", like(), transform="stored", report=reports.append
    )
    assert_same(jpeft.merge(got), tree(rounded))
    assert reports[0].decoded == {
        "layers/mlp/up/kernel": "Q8_0 and Q4_1 in one stack",
        "layers/mlp/down/kernel": "jpeft has no format for Q5_0",
    }
    assert got["layers"]["attn"]["o"]["kernel"].format == "q4_0"
    assert not is_leaf(got["layers"]["mlp"]["gate"]["kernel"])


@pytest.mark.slow
@float16
def test_an_adapter_over_stored_codes_is_saved_and_found_again(file, tmp_path):
    path, _ = file
    base = load_base(path, like(stacked=False), transform="stored")
    lora = jpeft.lora(rank=2)
    params = lora(KEY, base)
    jpeft.save(tmp_path / "a", params, lora)
    again = jpeft.load(tmp_path / "a", base)
    assert_same(again, params)

    def model(p, ids):
        x = p["embed"]["embedding"][ids]
        x = x @ p["layers_0"]["mlp"]["up"]["kernel"]
        x = jnp.tanh(x) @ p["layers_0"]["mlp"]["down"]["kernel"]
        return x @ p["embed"]["embedding"].T

    ids = jnp.arange(5)
    got = jpeft.adapt(model)(again, ids)
    want = model(jpeft.merge(again), ids)
    # float32, sums of up to 96 products in another order
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


# --- Hugging Face's folders ----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shards", "dtype"),
    [("qwen2", 3, jnp.bfloat16), ("mistral", 1, np.float32), ("qwen3", 1, np.float32)],
)
def test_a_folder_is_the_tree_of_its_tensors(tmp_path, kind, shards, dtype):
    found = tensors(kind, tied=False, dtype=dtype)
    folder = write_folder(tmp_path, found, shards, model_type=kind)
    got = load_base(folder, like(kind, tied=False, dtype=dtype))
    assert_same(got, tree(found))
    wide = load_base(folder, like(kind, tied=False, stacked=False, dtype=dtype))
    assert_same(wide, tree(found, stacked=False))


def test_what_a_model_computes_or_ties_is_no_tensor_left_over(tmp_path):
    found = tensors()
    extra = {
        "lm_head.weight": found["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    folder = write_folder(tmp_path, found | extra, tie_word_embeddings=True)
    assert_same(load_base(folder, like()), tree(found))  # and without a warning


def test_tensors_that_no_leaf_takes_are_named_or_reported(tmp_path):
    found = tensors("qwen2", tied=False)
    folder = write_folder(tmp_path, found, model_type="qwen2")
    with pytest.warns(jpeft.CheckpointWarning, match="lm_head.weight.* and 4 more"):
        got = load_base(folder, like())
    assert_same(got, tree(tensors("qwen2")) | {"layers": got["layers"]})
    reports = []
    load_base(folder, like(), report=reports.append)
    biases = {
        f"model.layers.{k}.self_attn.{p}_proj.bias" for k in (0, 1) for p in "qkv"
    }
    assert set(reports[0].unused) == biases | {"lm_head.weight"}


def test_one_file_has_the_config_beside_it_or_a_map(tmp_path):
    found = tensors()
    file = write_folder(tmp_path, found) / "model-0.safetensors"
    assert_same(load_base(file, like()), tree(found))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json beside it.*llama, mistral"):
        load_base(file, like())
    assert_same(load_base(file, like(), map="llama"), tree(found))


# --- what is done on the way ---------------------------------------------------------


@float16
def test_a_transform_gives_the_bits_it_gives_on_the_loaded_tree(file):
    path, _ = file
    how = like(stacked=False, dtype=jnp.bfloat16)
    t = jpeft.chain(
        jpeft.quantize("nf4", where=".*/mlp/.*"),
        jpeft.quantize("q8_0", where="embedding"),
    )
    assert_same(load_base(path, how, transform=t), t(KEY, load_base(path, how)))


def test_of_a_stack_a_transform_asks_for_uses(tmp_path):
    found = tensors()
    folder = write_folder(tmp_path, found)
    t = jpeft.quantize("int8", where=".*/up/kernel")
    with pytest.raises(ValueError, match="layers/mlp/up/kernel.*find_uses"):
        load_base(folder, like(), transform=t)

    def model(p, x):
        step = lambda x, w: (x + jnp.tanh(x @ w)[:, : tiny.D], None)
        return jax.lax.scan(step, x, p["layers"]["mlp"]["up"]["kernel"])[0]

    params = load_base(folder, like())
    uses = jpeft.find_uses(model, params, jnp.ones((2, tiny.D)))
    got = load_base(folder, like(), transform=t, uses=uses)
    assert_same(got, t(KEY, params, uses=uses))


@float16
def test_leaves_go_to_their_places_and_into_their_boxes(file):
    path, rounded = file
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    spec = {1: P(), 2: P(None, "b"), 3: P(None, None, "b")}
    places = jax.tree.map(lambda x: NamedSharding(mesh, spec[len(x.shape)]), like())
    plain = load_base(path, like(), shardings=places)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(s)), plain, places)
    assert_same(plain, tree(rounded))
    stored = load_base(path, like(), shardings=places, transform="stored")
    up = stored["layers"]["mlp"]["up"]["kernel"]
    for x in (up.codes, up.scales, up.zeros):
        assert x.sharding.spec == P(None, None, "b")
    assert_same(jpeft.merge(stored), tree(rounded))
    boxed = like()
    boxed["norm"]["scale"] = nn.Partitioned(boxed["norm"]["scale"], ("d",))
    boxed["embed"]["embedding"] = nn.Partitioned(
        boxed["embed"]["embedding"], ("v", "d")
    )
    got = load_base(path, boxed, transform="stored")
    assert got["norm"]["scale"].names == ("d",)
    assert got["embed"]["embedding"].codes.names == ("v", "d")


@float16
def test_a_large_table_is_decoded_part_by_part(tmp_path, monkeypatch):
    found = tensors()
    rounded = write_gguf(tmp_path / "a.gguf", found)
    monkeypatch.setattr(jpeft.hf._gguf, "_CHUNK", 3 * tiny.D)
    got = load_base(tmp_path / "a.gguf", like())
    assert_same(got, tree(rounded))


@float16
def test_a_stack_is_filled_layer_by_layer(tmp_path):
    """Sixteen layers, and not more than the leaf and a few of them decoded."""
    rng = np.random.default_rng(0)
    layers, shape = 16, (128, 256)
    each = rng.standard_normal((layers, *shape)).astype(np.float32)
    found = {f"w.{k}.weight": each[k] for k in range(layers)}
    write_gguf(tmp_path / "a.gguf", found)
    how = {"w": {"kernel": jax.ShapeDtypeStruct((layers, *shape[::-1]), jnp.float32)}}
    rules = [Rule(r"w(?:/(?P<n>\d+))?/kernel", "w.{n}.weight", "in out")]
    load_base(tmp_path / "a.gguf", how, map=rules)  # what is imported and compiled once
    tracemalloc.start()
    load_base(tmp_path / "a.gguf", how, map=rules)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # gguf decodes with some copies of the one tensor, 1/16 of the leaf each.
    assert each.nbytes < peak < 1.5 * each.nbytes


# --- maps of one's own ---------------------------------------------------------------


def test_a_map_of_rules_transposes_stacks_and_splits(tmp_path):
    """Queries, keys and values in one tensor, of several heads, and biases so."""
    rng = np.random.default_rng(0)
    n = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    found = {"out.weight": n(3, 6), "emb": n(5, 6)}
    for k in range(2):
        found[f"h.{k}.qkv.weight"], found[f"h.{k}.qkv.bias"] = n(8 + 4 + 4, 6), n(16)
    folder = write_folder(tmp_path, found, model_type="mine")
    part = r"h(?:/(?P<k>\d+))?/(?P<part>[qkv])"
    rules = [
        Rule(f"{part}/kernel", "h.{k}.qkv.weight", "in out", ("q", "k", "v")),
        Rule(f"{part}/bias", "h.{k}.qkv.bias", "features", ("q", "k", "v")),
        Rule("out/weight", "out.weight", "out in"),
        Rule("emb", "emb", "vocab features"),
    ]
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    heads = {"q": 4, "k": 2, "v": 2}
    how = {
        "h": {
            p: {"kernel": shape(2, 6, h, 2), "bias": shape(2, h, 2)}
            for p, h in heads.items()
        },
        "out": {"weight": shape(3, 2, 3)},
        "emb": shape(5, 6),
    }
    got = load_base(folder, how, map=rules)
    first = {"q": 0, "k": 8, "v": 12}
    for p, h in heads.items():
        rows = slice(first[p], first[p] + 2 * h)
        for k in range(2):
            w, b = found[f"h.{k}.qkv.weight"][rows], found[f"h.{k}.qkv.bias"][rows]
            np.testing.assert_array_equal(got["h"][p]["kernel"][k].reshape(6, -1), w.T)
            np.testing.assert_array_equal(got["h"][p]["bias"][k].reshape(-1), b)
    np.testing.assert_array_equal(
        got["out"]["weight"].reshape(3, 6), found["out.weight"]
    )
    np.testing.assert_array_equal(got["emb"], found["emb"])
    with pytest.raises(
        jpeft.CheckpointError, match=r"h/v/bias.*\(16,\).*rows 12 to 14"
    ):
        how["h"]["v"] = {"kernel": shape(2, 6, 1, 2), "bias": shape(2, 1, 2)}
        load_base(folder, how, map=rules)


@float16
def test_parts_of_a_stored_tensor_keep_their_codes(tmp_path):
    found = {"qkv.weight": tensors()["model.layers.0.mlp.up_proj.weight"]}
    rounded = write_gguf(tmp_path / "a.gguf", found)["qkv.weight"]
    sizes = {"q": 64, "k": 32}
    how = {p: jax.ShapeDtypeStruct((tiny.D, n), jnp.float32) for p, n in sizes.items()}
    rules = [Rule("(?P<part>[qk])", "qkv.weight", "in out", ("q", "k"))]
    got = load_base(tmp_path / "a.gguf", how, map=rules, transform="stored")
    assert got["k"].format == "q4_1"
    np.testing.assert_array_equal(got["q"].materialize(), rounded[:64].T)
    np.testing.assert_array_equal(got["k"].materialize(), rounded[64:].T)


# --- what is refused -----------------------------------------------------------------


def without(tree, *path):
    """The tree with one node less."""
    first, *rest = path
    below = {} if not rest else {first: without(tree[first], *rest)}
    return {k: v for k, v in tree.items() if k != first} | below


def bad_map(*rules):
    return lambda folder: load_base(folder, like(), map=list(rules))


CALLS = {
    "missing": (
        lambda folder: load_base(folder, like("qwen2")),
        jpeft.CheckpointError,
        ["layers/attn/k/bias: ", "has no 'model.layers.0.self_attn.k_proj.bias' and 5"],
    ),
    "head": (
        lambda folder: load_base(folder, like(tied=False)),
        jpeft.CheckpointError,
        [
            "lm_head/kernel: ",
            "its head is the embedding",
            "'model.embed_tokens.weight'",
        ],
    ),
    "shape": (
        lambda folder: load_base(
            folder, like() | {"norm": {"scale": jax.ShapeDtypeStruct((63,), "float32")}}
        ),
        jpeft.CheckpointError,
        ["norm/scale: expected shape (63,), found (64,) in 'model.norm.weight'"],
    ),
    "kernel": (
        lambda folder: load_base(
            folder,
            {"lm": jax.ShapeDtypeStruct((tiny.D, 12), "float32")},
            map=[Rule("lm", "model.embed_tokens.weight", "in out")],
        ),
        jpeft.CheckpointError,
        ["lm: expected shape (64, 12) (transposed), found (11, 64) in 'model.embed"],
    ),
    "dtype": (
        lambda folder: load_base(folder, shapes(like(), jnp.int32)),
        jpeft.CheckpointError,
        ["embed/embedding: 'model.embed_tokens.weight'", "float32, expected int32"],
    ),
    "no rule": (
        lambda folder: load_base(folder, {"model": like()}),
        ValueError,
        ["model/embed/embedding: the map has no rule for it and 10 more", "hf.Rule("],
    ),
    "transform": (
        lambda folder: load_base(folder, like(), transform=jpeft.lora(rank=2)),
        ValueError,
        ["hf.load_base: lora is not quantize", "jpeft.lora(...)"],
    ),
    "no transform": (
        lambda folder: load_base(folder, like(), transform="store"),
        ValueError,
        ["hf.load_base: 'store' is no transform"],
    ),
    "stored": (
        lambda folder: load_base(folder, like(), transform="stored"),
        ValueError,
        ["transform='stored' keeps the codes of a .gguf file"],
    ),
    "map's name": (
        lambda folder: load_base(folder, like(), map="lama"),
        ValueError,
        ["map='lama': there are maps for llama, mistral, qwen2, qwen3"],
    ),
    "report": (
        lambda folder: load_base(folder, like(), report=[]),
        ValueError,
        ["hf.load_base: report=[]: expected a function", "reports.append"],
    ),
    "no map": (
        lambda folder: load_base(folder, like(), map={"a": "b"}),
        ValueError,
        ["map={'a': 'b'}: expected a list of hf.Rule("],
    ),
    "axes": (
        bad_map(("a", "b", "io")),
        ValueError,
        ["holds ('a', 'b', 'io')", "'in out'"],
    ),
    "regex": (bad_map(("(", "b")), ValueError, ["holds ('(', 'b')", "regular"]),
    "group": (bad_map(("a", "b.{k}")), ValueError, ["holds ('a', 'b.{k}')", "('k')"]),
    "part": (
        bad_map(("a", "b", "in out", ("q", "k"))),
        ValueError,
        ["with parts it has a group (?P<part>...)"],
    ),
    "beside": (
        lambda folder: load_base(
            folder,
            {"k": jax.ShapeDtypeStruct((tiny.D, 4), "float32")},
            map=[Rule("(?P<part>[qk])", "model.norm.weight", "in out", ("q", "k"))],
        ),
        ValueError,
        ["k: its rows come after those of 'q'", "like= has no such leaf"],
    ),
    "shardings": (
        lambda folder: load_base(folder, like(), shardings={"a": P()}),
        ValueError,
        ["hf.load_base: shardings= has"],
    ),
    "like": (
        lambda folder: load_base(
            folder, jpeft.quantize()(KEY, {"kernel": jnp.ones((64, 3))})
        ),
        ValueError,
        ["hf.load_base: like= carries adapters or quantised weights"],
    ),
    "nothing there": (
        lambda folder: load_base(folder / "no", like()),
        jpeft.CheckpointError,
        ["no: no such file or folder"],
    ),
    "no model": (
        lambda folder: load_base(folder / "config.json", like()),
        jpeft.CheckpointError,
        ["expected a folder with config.json and *.safetensors", "'config.json'"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("hf"), tensors())


@pytest.mark.parametrize("what", CALLS)
def test_a_wrong_call_is_answered_with_the_right_one(what, folder):
    call, kind, parts = CALLS[what]
    with pytest.raises(kind) as error:
        call(folder)
    for part in parts:
        assert part in str(error.value)


def test_folders_that_hold_no_model_are_told_apart(tmp_path):
    empty, ggufs, other = (tmp_path / n for n in ("empty", "ggufs", "other"))
    for path in (empty, ggufs):
        path.mkdir()
    (ggufs / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(jpeft.CheckpointError, match="there is nothing"):
        load_base(empty, like())
    with pytest.raises(jpeft.CheckpointError, match="a.gguf: pass one such file"):
        load_base(ggufs, like())
    write_folder(other, tensors(), model_type="gpt2")
    with pytest.raises(
        ValueError, match="architecture is 'gpt2'.*llama, mistral.*map="
    ):
        load_base(other, like())
    for text in ("{", '{"model_type": 3}', "[]"):
        (other / "config.json").write_text(text)
        with pytest.raises(jpeft.CheckpointError, match="config.json: damaged"):
            load_base(other, like())


def test_a_quantised_folder_is_refused(tmp_path):
    name = "model.norm.weight"
    found = tensors() | {name: np.ones(64, np.uint8)}
    with pytest.raises(jpeft.CheckpointError, match="uint8, expected float32.*codes"):
        load_base(write_folder(tmp_path, found), like())
    found[name] = np.ones(64, jnp.float8_e4m3fn)
    assert load_base(write_folder(tmp_path, found), like())["norm"]["scale"][0] == 1
    found[f"{name}_scale_inv"] = np.ones(1, np.float32)
    with pytest.raises(jpeft.CheckpointError, match="float8.* with a scale beside it"):
        load_base(write_folder(tmp_path, found), like())


def test_one_file_of_several_is_refused(tmp_path):
    write_gguf(
        tmp_path / "a.gguf",
        {"w": np.ones((2, 32), "f4")},
        types={"w": "F32"},
        metadata=[("add_uint16", "split.count", 3)],
    )
    with pytest.raises(jpeft.CheckpointError, match="one of 3 files.*--merge"):
        load_base(tmp_path / "a.gguf", like())


@float16
def test_metadata_of_another_model_is_refused(tmp_path):
    """Two heads of pairs, into which thirty rows do not go."""
    write_gguf(tmp_path / "a.gguf", {"blk.0.attn_k.weight": np.ones((30, 64), "f4")})
    how = {"k": jax.ShapeDtypeStruct((64, 30), jnp.float32)}
    rules = [Rule("k", "model.layers.0.self_attn.k_proj.weight", "in out")]
    for transform in (None, "stored"):
        with pytest.raises(jpeft.CheckpointError, match="30 rows for 2 heads of pairs"):
            load_base(tmp_path / "a.gguf", how, map=rules, transform=transform)
