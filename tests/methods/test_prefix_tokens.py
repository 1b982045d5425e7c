"""Prefix tuning in mode "tokens": virtual tokens with learned keys and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import linen as nn
from models import attention as A
from speed import slow_but

import jpeft
from jpeft.leaves.token_rows import TokenRows
from jpeft.tree.paths import slots

LENGTH, KEY = 5, jax.random.key(0)
GROUPED = ("jax", "repeat")
# (kind, style) of tests/models/attention.py; windows and position biases know where a
# token stands, so there a virtual one is no free-standing key.
CASES = [
    ("jax", "half"),
    ("repeat", "interleaved"),
    ("folded", "rotate_half"),
    ("norms", ""),
    ("fused", "rotate_half"),
    ("fused_flat", "half"),
    ("fused_heads", "rotate_half"),
]


def prepended(ids=A.IDS, mask=None, n=LENGTH, vocab=A.VOCAB, **kwargs):
    return jpeft.prepend_virtual_tokens(ids, n, vocab_size=vocab, mask=mask, **kwargs)


def learned(kind, length=LENGTH):
    """(keys, values), (layers, length, heads, head) each."""
    groups = A.GROUPS if kind in GROUPED else A.HEADS
    shape = (A.LAYERS, length, groups, A.HEAD)
    return tuple(jax.random.normal(jax.random.fold_in(KEY, k), shape) for k in (1, 2))


def interleaved(kind, keys, values):
    """Rows of keys and values as a kernel of `kind` orders its features."""
    if kind == "fused_heads":
        both = jnp.stack([keys, values], -2)  # (..., heads, 2, head)
        return both.reshape(*both.shape[:-3], -1)
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    return jnp.concatenate([flat(keys), flat(values)], -1)


def put(params, prefix, kind=""):
    """The tree with these learned keys and values."""
    flat = slots(params)

    def one(path, x):
        if not isinstance(x, TokenRows):
            return x
        layer = None if path.startswith("layers/") else int(path[len("layer_")])
        keys, values = (p if layer is None else p[layer] for p in prefix)
        if "/key/" in path or "/value/" in path:
            rows = keys if "/key/" in path else values
            rows = rows.reshape(*rows.shape[:-2], -1)
        else:
            rows = interleaved(kind, keys, values)
        assert rows.shape == x.rows.shape
        return x.replace(rows=rows)

    return flat.rebuild(one(p, x) for p, x in flat.items())


def turned(kind, style, params, prefix):
    """What the model makes of learned keys: it normalises or rotates them too.

    A virtual token t stands at t - LENGTH as the text counts.
    """
    keys, values = prefix
    if kind == "norms":

        def normed(k, layer):
            p = params[f"layer_{layer}"]["attention"]["k_norm"]
            return nn.LayerNorm().apply({"params": p}, k)

        return jnp.stack([normed(k, n) for n, k in enumerate(keys)]), values
    places = jnp.broadcast_to(jnp.arange(-LENGTH, 0)[None], keys.shape[:2])
    return A.rotary(keys, places, style), values


@functools.cache
def both(kind, style, mode):
    """(ours, by hand): functions of (keys, values), at the text's positions."""
    module, params = A.model(kind, style, mode)
    heads = A.HEADS if kind == "fused_heads" else None
    adapted = jpeft.prefix(LENGTH, mode="tokens", heads=heads)(KEY, params)
    text = prepended(mask=A.PAD)
    apply = lambda p, *args: module.apply({"params": p}, *args)

    def ours(prefix):
        out = jpeft.adapt(apply)(put(adapted, prefix, kind), text.ids, text.mask)
        return jpeft.strip_virtual_tokens(out, LENGTH)

    def hand(prefix):
        return apply(params, A.IDS, A.PAD, turned(kind, style, params, prefix))

    return ours, hand


def value_and_grads(f, prefix):
    def loss(p):
        out = f(p)
        return jnp.sum(jnp.square(out) * A.PAD[..., None]), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(prefix)
    return out, grads


def assert_same(got, want):
    real = np.asarray(A.PAD) > 0
    np.testing.assert_allclose(got[0][real], want[0][real], atol=3e-5, rtol=1e-4)
    for g, w in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(g, w, atol=3e-5 * float(jnp.max(jnp.abs(w))))


QUICK = {("jax", "half", "scan remat"), ("fused", "rotate_half", "")}
EVERY = [
    (*c, "scan remat" if k % 3 == 0 and c[0] != "norms" else "")
    for k, c in enumerate(CASES)
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", slow_but(QUICK, EVERY))
def test_equals_keys_and_values_put_before_the_real_ones(case):
    kind, style, mode = case
    ours, hand = both(kind, style, mode)
    prefix = learned(kind)
    assert_same(value_and_grads(ours, prefix), value_and_grads(hand, prefix))


# --- what the text looks like --------------------------------------------------------


def attached(kind="jax", style="half", mode="", length=LENGTH, **kwargs):
    module, params = A.model(kind, style, mode)
    made = jpeft.prefix(length, mode="tokens", **kwargs)(KEY, params)
    prefix = learned(kind, length * kwargs.get("tasks", 1))
    apply = jax.jit(jpeft.adapt(lambda p, *args: module.apply({"params": p}, *args)))
    return apply, put(made, prefix), params


def test_real_tokens_alone_see_no_prefix():
    apply, made, params = attached()
    module, _ = A.model("jax", "half", "")
    want = jax.jit(module.apply)({"params": params}, A.IDS)
    np.testing.assert_allclose(apply(made, A.IDS), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_in_bfloat16_it_is_the_float32_one_rounded():
    apply, made, params = attached()
    text = prepended(mask=A.PAD)

    def off(params, ids, mask):
        """How far the model in bfloat16 is from itself in float32."""
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix dtypes
            got, want = apply(half, ids, mask), apply(wide, ids, mask)
        assert got.dtype == jnp.bfloat16
        return jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)

    plain = off(params, A.IDS, A.PAD)
    assert 0 < off(made, text.ids, text.mask) < 1.5 * plain + 0.01


@pytest.mark.slow
def test_a_batch_may_mix_tasks():
    apply, made, _ = attached(tasks=2)
    text = functools.partial(prepended, mask=A.PAD)
    mixed = text(task=jnp.array([1, 0]))
    got = apply(made, mixed.ids, mixed.mask)
    for row, task in enumerate((1, 0)):
        alone = text(task=task)
        want = apply(made, alone.ids, alone.mask)
        np.testing.assert_allclose(got[row], want[row], rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(want[0] - got[0]))) > 0.1  # the tasks differ


def test_left_padding_and_templates_place_the_rows_by_their_ids():
    """A text padded on the left gives what the text alone gives."""
    apply, made, _ = attached()
    ids = A.IDS[:1]
    short = apply(made, prepended(ids[:, :5]).ids)
    left = jnp.concatenate([jnp.zeros((1, 2), ids.dtype), ids[:, :5]], 1)
    mask = jnp.array([[0.0] * 2 + [1.0] * 5])
    # After the padding, not before it: the model counts places by itself.
    template = jpeft.virtual_template(LENGTH, ..., vocab_size=A.VOCAB)
    new = template(ids[:, :5]).ids
    text = jnp.concatenate([left[:, :2], new], 1)
    mask = jnp.concatenate([jnp.zeros((1, 2)), jnp.ones(new.shape)], 1)
    padded = apply(made, text, mask)[:, 2:]
    np.testing.assert_allclose(padded, short, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_time_major_activations():
    """Ids and activations (length, batch)."""
    w = jax.random.normal(KEY, (A.VOCAB, 6))
    k = normal(1, 6, 6)
    params = {
        "embed": {"embedding": w},
        "attn": {n: {"kernel": k} for n in ("query", "key", "value", "out")},
    }

    def fn(p, ids):
        x = p["embed"]["embedding"][ids]
        q, k, v = (x @ p["attn"][n]["kernel"] for n in ("query", "key", "value"))
        scores = jax.nn.softmax(jnp.einsum("qbd,kbd->bqk", q, k))
        return jnp.einsum("bqk,kbd->qbd", scores, v) @ p["attn"]["out"]["kernel"]

    made = jpeft.prefix(LENGTH, mode="tokens", init="unit")(KEY, params)
    ids = prepended().ids
    got = jpeft.adapt(fn)(made, ids.T)
    want = jpeft.adapt(jax.vmap(lambda p, i: fn(p, i[:, None])[:, 0], (None, 0)))(
        made, ids
    )
    np.testing.assert_allclose(got, want.swapaxes(0, 1), rtol=1e-5, atol=1e-5)


def test_a_prompt_gives_the_same_tokens_embeddings():
    """In either order of the two transforms."""
    module, params = A.model("jax", "half", "")
    prefix = jpeft.prefix(LENGTH, mode="tokens", init="unit")
    prompt = jpeft.prompt(LENGTH, init="normal")
    k1, k2 = jax.random.split(KEY)
    one = prompt(k2, prefix(k1, params))
    two = prefix(k1, prompt(k2, params))
    apply = jax.jit(jpeft.adapt(lambda p, i: module.apply({"params": p}, i)))
    ids = prepended().ids
    np.testing.assert_allclose(apply(one, ids), apply(two, ids), rtol=1e-5, atol=1e-5)
    alone = apply(prefix(k1, params), ids)
    assert float(jnp.max(jnp.abs(apply(one, ids) - alone))) > 0.1
    with pytest.raises(ValueError, match="make the lengths equal"):
        jpeft.prefix(3, mode="tokens")(k1, prompt(k2, params))
    with pytest.raises(ValueError, match="prompt adds 3 virtual tokens"):
        jpeft.prompt(3)(k2, prefix(k1, params))


# --- several texts -------------------------------------------------------------------

WIDE = 6


def attention(p, x, y):
    q, k, v = (t @ p[n]["kernel"] for n, t in (("query", x), ("key", y), ("value", y)))
    return jax.nn.softmax(q @ k.transpose(0, 2, 1)) @ v @ p["out"]["kernel"]


def encoder_decoder(p, ids, targets):
    e = p["shared"]["embedding"][ids]
    e = e + attention(p["encoder"]["attn"], e, e)
    d = p["shared"]["embedding"][targets]
    d = d + attention(p["decoder"]["attn"], d, d)
    return d + attention(p["decoder"]["cross_attn"], d, e)


def two_texts():
    draw = lambda n, *s: jax.random.normal(jax.random.fold_in(KEY, n), s)
    attn = lambda n: {
        name: {"kernel": draw(10 * n + k, WIDE, WIDE)}
        for k, name in enumerate(("query", "key", "value", "out"))
    }
    return {
        "shared": {"embedding": draw(1, A.VOCAB, WIDE)},
        "encoder": {"attn": attn(1)},
        "decoder": {"attn": attn(2), "cross_attn": attn(3)},
    }


def overwritten_by_hand(made, p, ids, targets):
    """The same model, keys and values of virtual tokens overwritten one by one."""

    def attended(name, x, y, text):
        stream, part = name
        leaves = made[stream][part]
        weights = p[stream][part]

        def projected(n):
            out = y @ weights[n]["kernel"]
            for b, t in np.argwhere(np.asarray(text) >= A.VOCAB):
                number = int(text[b, t]) - A.VOCAB
                out = out.at[b, t].set(leaves[n]["kernel"].rows[number])
            return out

        q = x @ weights["query"]["kernel"]
        scores = jax.nn.softmax(q @ projected("key").transpose(0, 2, 1))
        return scores @ projected("value") @ weights["out"]["kernel"]

    def embedded(text):
        rows = p["shared"]["embedding"][jnp.minimum(text, A.VOCAB - 1)]
        return jnp.where((text < A.VOCAB)[..., None], rows, 0.0)

    e, d = embedded(ids), embedded(targets)
    e = e + attended(("encoder", "attn"), e, e, ids)
    d = d + attended(("decoder", "attn"), d, d, targets)
    return d + attended(("decoder", "cross_attn"), d, e, ids)


@pytest.mark.sample(1)
@pytest.mark.parametrize("lengths", [(7, 4), (5, 5)], ids=["differ", "equal"])
def test_each_attention_of_an_encoder_decoder_takes_its_own_text(lengths):
    params = two_texts()
    made = jpeft.prefix(2, mode="tokens", init="unit")(KEY, params)
    ids, targets = (
        prepended(jax.random.randint(jax.random.key(n), (2, n), 0, A.VOCAB), n=2).ids
        for n in lengths
    )
    got = jax.jit(jpeft.adapt(encoder_decoder))(made, ids, targets)
    want = overwritten_by_hand(made, params, ids, targets)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_texts_that_cannot_be_told_apart_are_refused():
    params = {n: x for n, x in two_texts().items() if n != "decoder"}

    def twins(p, a, b):
        a, b = (p["shared"]["embedding"][i] for i in (a, b))
        return attention(p["encoder"]["attn"], a, a) + attention(
            p["encoder"]["attn"], b, b
        )

    made = jpeft.prefix(2, mode="tokens")(KEY, params)
    ids = prepended(n=2).ids
    with pytest.raises(jpeft.PromiseError, match=r"which of 2 texts of shape \(2, 9\)"):
        jpeft.adapt(twins)(made, ids, ids)


def test_without_ids_the_message_says_mode_kv():
    params = {n: x for n, x in two_texts().items() if n != "decoder"}
    made = jpeft.prefix(2, mode="tokens")(KEY, params)
    apply = jpeft.adapt(lambda p, x: attention(p["encoder"]["attn"], x, x))
    with pytest.raises(jpeft.PromiseError, match=r"no ids were looked up.*mode='kv'"):
        apply(made, jnp.ones((2, 3, WIDE)))

    def pooled(p, ids):
        x = p["shared"]["embedding"][ids].mean(1, keepdims=True)
        x = jnp.concatenate([x, x, x], 1)
        return attention(p["encoder"]["attn"], x, x)

    with pytest.raises(jpeft.PromiseError, match=r"positions \(2, 3\).*not the text"):
        jpeft.adapt(pooled)(made, prepended(n=2).ids)


def test_a_network_for_the_prefix_belongs_to_mode_kv():
    with pytest.raises(ValueError, match="exclude each other"):
        jpeft.prefix(2, mode="tokens", reparametrization="mlp")


def test_one_text_looked_up_in_two_tables_is_one_text():
    def fn(p, ids):
        h, e, a = (
            p["embed"]["embedding"][ids],
            p["embed_2"]["embedding"][ids],
            p["attn"],
        )
        q, k, v = (h @ a[n]["kernel"] for n in ("query", "key", "value"))
        o = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
        return (h + o @ a["out"]["kernel"]) * e

    names = ("query", "key", "value", "out")
    params = {"attn": {n: {"kernel": jnp.ones((8, 8))} for n in names}}
    params |= {n: {"embedding": jnp.ones((11, 8))} for n in ("embed", "embed_2")}
    ids = jnp.array([[3, 1, 4, 1, 5]])
    text = jpeft.prepend_virtual_tokens(ids, 2, vocab_size=11).ids
    prefix = jpeft.prefix(2, mode="tokens")
    uses = jpeft.find_uses(fn, params, ids)
    got = jpeft.adapt(fn)(prefix(KEY, params, uses=uses), text)
    assert got.shape == (1, 7, 8) and bool(jnp.isfinite(got).all())
    with pytest.raises(jpeft.PromiseError, match=r"pass uses=jpeft.find_uses"):
        jpeft.adapt(fn)(prefix(KEY, params), text)
    other = {**params, "scale_of": {"table": params["embed_2"]["embedding"]}}
    fn_ = lambda p, ids: fn(
        {**p, "embed_2": {"embedding": p["scale_of"]["table"]}}, ids
    )
    with pytest.raises(ValueError, match=r"scale_of/table.* pass uses=jpeft.find_uses"):
        jpeft.adapt(fn_)(prefix(KEY, other), text)
