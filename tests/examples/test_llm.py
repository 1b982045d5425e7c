"""The decoder of the Llama family against transformers, and against itself."""

import dataclasses
import functools
import json
from pathlib import Path

import _lm
import _tokenizer
import jax
import jax.numpy as jnp
import llm
import numpy as np
import pytest

import jpeft

DATA = Path(__file__).parents[1] / "data"
MODELS = ("llama", "smollm", "llama3", "linear", "yarn", "mistral", "qwen2", "qwen3")
# Sums of 20 products in float32, two layers deep, on logits of size 5.
TOLERANCE = 2e-5
SMALL = llm.Config(
    vocab=37,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=20,
    context=64,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "llama_golden.npz") as file:
        return dict(file)


def folder_of(golden, name, path):
    """The model as `save_pretrained` writes it."""
    from safetensors.numpy import save_file

    path.mkdir()
    (path / "config.json").write_text(str(golden[f"{name}/config"]))
    start = f"{name}/weights/"
    weights = {
        k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)
    }
    save_file(weights, path / "model.safetensors")
    return path


@functools.cache
def applied(config):
    """model.apply of a configuration, compiled once."""
    return jax.jit(llm.Decoder(config).apply, static_argnames="logits_from")


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(golden, tmp_path, name):
    folder = folder_of(golden, name, tmp_path / name)
    config = llm.read_config(folder, scan=name != "llama")
    params = jpeft.hf.load_base(folder, like=llm.shapes(llm.Decoder(config)))
    ids, mask = golden[f"{name}/ids"], golden[f"{name}/mask"].astype(bool)
    logits = applied(config)({"params": params}, ids, mask).logits
    expected = golden[f"{name}/logits"]
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_smollm2_is_that_of_transformers():
    """The real model, from the few bits of its file; float32 noise on logits up to 40
    is about 1e-4."""
    with np.load(DATA / "smollm2_golden.npz") as file:
        golden = dict(file)
    path = _lm.default_base()
    tokenizer = _tokenizer.load(path)
    assert tokenizer.encode(str(golden["text"])) == golden["ids"].tolist()
    config = llm.read_config(path)
    params = jpeft.hf.load_base(path, like=llm.shapes(llm.Decoder(config)))
    logits = applied(config)({"params": params}, golden["ids"][None]).logits[0]
    np.testing.assert_allclose(logits[:, ::97], golden["some"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.max(1), golden["largest"], rtol=0, atol=1e-4)
    assert np.argmax(logits, 1).tolist() == golden["best"].tolist()


# --- forms of one model --------------------------------------------------------------


@functools.cache
def base(config=SMALL):
    """Parameters far from their start."""
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype) + (s.ndim < 3)
    return jax.tree.map(draw, llm.shapes(llm.Decoder(dataclasses.replace(config))))


def ids_of(batch=2, tokens=9):
    return np.random.default_rng(1).integers(0, 37, (batch, tokens), np.int32)


def test_layers_apart_and_stacked_are_one_model():
    apart = dataclasses.replace(SMALL, scan=False)
    params = base()
    layers = [jax.tree.map(lambda x, k=k: x[k], params["layers"]) for k in range(2)]
    unrolled = {k: v for k, v in params.items() if k != "layers"}
    unrolled.update({f"layers_{k}": x for k, x in enumerate(layers)})
    ids = ids_of()
    one = applied(SMALL)({"params": params}, ids).logits
    other = applied(apart)({"params": unrolled}, ids).logits
    np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    again = applied(dataclasses.replace(SMALL, remat=True))({"params": params}, ids)
    np.testing.assert_allclose(one, again.logits, rtol=0, atol=TOLERANCE)


def padded(ids, left, right):
    pads = ((0, 0), (left, right))
    return np.pad(ids, pads, constant_values=7), np.pad(np.ones(ids.shape, bool), pads)


METHODS = {
    "plain": None,
    "lora": jpeft.lora(rank=3, where="linear"),
    "qlora": jpeft.chain(
        jpeft.quantize("nf4", compute_dtype=None), jpeft.lora(rank=3, where="linear")
    ),
    "prefix": jpeft.prefix(length=3),
    "prompt": jpeft.prompt(length=3),
}


@functools.cache
def adapted(name):
    """(params, virtual tokens) whose adapters are not where they start."""
    peft, params = METHODS[name], base()
    if peft is None:
        return params, 0
    forward = lambda p, ids: llm.Decoder(SMALL).apply({"params": p}, ids).logits
    uses = jpeft.find_uses(forward, params, ids_of())
    params = peft(jax.random.key(0), params, uses=uses)
    trainable, frozen = jpeft.partition(params)
    rng = np.random.default_rng(2)
    moved = jax.tree.map(
        lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), trainable
    )
    return jpeft.combine(moved, frozen), peft.virtual_tokens()


@functools.cache
def forward(name):
    return jax.jit(jpeft.adapt(llm.Decoder(SMALL).apply), static_argnames="logits_from")


def logits_of(name, ids, mask=None):
    params, virtual = adapted(name)
    ids, mask = with_virtual(ids, mask, virtual)
    return forward(name)({"params": params}, ids, mask).logits[:, virtual:]


def with_virtual(ids, mask, count):
    mask = np.ones(ids.shape, bool) if mask is None else mask
    if not count:
        return ids, mask
    return jpeft.prepend_virtual_tokens(ids, count, vocab_size=37, mask=mask)[:2]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", METHODS)
def test_padding_on_either_side_changes_nothing(name):
    ids = ids_of()
    expected = logits_of(name, ids)
    if name != "plain":
        assert np.abs(expected - logits_of("plain", ids)).max() > 0.1
    for left, right in ((4, 0), (0, 4)):
        found = logits_of(name, *padded(ids, left, right))
        found = found[:, left : left + ids.shape[1]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", METHODS)
def test_cached_and_uncached_logits_agree(name):
    """The first five tokens at once, padded on the left, then one by one."""
    params, virtual = adapted(name)
    ids = ids_of()
    expected = logits_of(name, ids)
    first, mask = padded(ids[:, :5], 3, 0)
    first, mask = with_virtual(first, mask, virtual)
    cache = llm.empty_cache(SMALL, 2, 20)
    out = forward(name)({"params": params}, first, mask, cache=cache)
    found = [out.logits[:, -5:]]
    for k in range(5, 9):
        out = forward(name)({"params": params}, ids[:, k : k + 1], cache=out.cache)
        found.append(out.logits)
    assert int(out.cache.length) == first.shape[1] + 4
    np.testing.assert_allclose(
        np.concatenate(found, 1), expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", METHODS)
def test_packed_documents_do_not_see_each_other(name):
    """Two documents and padding in one row; each as if it were alone."""
    params, virtual = adapted(name)
    a, b = ids_of(1, 6)[0], ids_of(1, 9)[0][::-1]
    front = np.arange(37, 37 + virtual, dtype=np.int32)
    docs = [np.concatenate([front, x]) for x in (a, b)]
    row = np.concatenate([*docs, np.full(3, 2, np.int32)])[None]
    numbers = np.repeat([1, 2, 0], [len(docs[0]), len(docs[1]), 3])[None]
    out = forward(name)({"params": params}, row, segments=numbers.astype(np.int32))
    start = virtual
    for x in (a, b):
        found = out.logits[0, start : start + len(x)]
        expected = logits_of(name, x[None])[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        start += len(x) + virtual


def test_positions_start_again_at_every_document():
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 1, 1, 2, 3]])
    found = llm.count_positions(segments)
    assert found.tolist() == [[0, 0, 0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 2, 3, 0, 0]]


def test_rows_of_nothing_but_padding_are_finite():
    logits = applied(SMALL)({"params": base()}, ids_of(), np.zeros((2, 9), bool)).logits
    assert np.isfinite(logits).all()


def test_a_scored_text_has_one_number_a_token():
    config = dataclasses.replace(SMALL, head="score")
    params = {**base(), "score": {"kernel": np.ones((16, 1), np.float32)}}
    out = applied(config)({"params": params}, ids_of())
    assert out.logits.shape == (2, 9)
    np.testing.assert_allclose(out.logits, out.hidden.sum(-1), rtol=0, atol=TOLERANCE)


# --- configurations ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gemma2"}, "'gemma2'; this decoder knows llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"num_key_value_heads": 3}, "no multiple of kv_heads=3"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused(golden, change, says):
    data = json.loads(str(golden["llama/config"]))
    with pytest.raises(ValueError, match=says):
        llm.from_hugging_face({**data, **change})


def test_a_gguf_file_says_its_sizes_and_what_is_not_known_is_refused():
    about = {
        "general.architecture": "qwen2",
        "qwen2.embedding_length": 16,
        "qwen2.block_count": 2,
        "qwen2.attention.head_count": 4,
        "qwen2.feed_forward_length": 20,
        "qwen2.context_length": 64,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.tokens": ["a"] * 37,
    }
    config = llm.from_gguf(about, ["output.weight"])
    assert (config.vocab, config.kv_heads, config.head_dim) == (37, 4, 4)
    assert config.qkv_bias and config.head == "untied"
    assert llm.from_gguf(about, []).head == "tied"
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        llm.from_gguf(about, ["rope_freqs.weight"])
    with pytest.raises(ValueError, match=r"no qwen2\.block_count"):
        llm.from_gguf({k: v for k, v in about.items() if "block" not in k}, [])
    with pytest.raises(ValueError, match="'gemma'; this decoder knows"):
        llm.from_gguf({"general.architecture": "gemma"}, [])


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        llm.read_config(tmp_path)
