"""Prompt tuning: rows of the table for ids beyond it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax import linen as nn
from speed import slow_but
from text_forms import IDS, LENGTH, TEXT_FORMS, VOCAB, WIDTH, Lm, N, linen_text

import jpeft
from jpeft.tree.paths import slots

KEY = jax.random.key(3)
E = normal(0, VOCAB, WIDTH)
P = normal(1, 2 * N, WIDTH)
W = normal(2, WIDTH, WIDTH)
BIG = jnp.concatenate([E, P])
VIRTUAL = jpeft.prepend_virtual_tokens(IDS, N, vocab_size=VOCAB).ids


def table(prompt=P, base=E, **kwargs):
    """{"embedding": a prompted table}."""
    params = {"embedding": base}
    params = jpeft.prompt(len(prompt), **kwargs)(KEY, params)
    leaf = params["embedding"]
    return {"embedding": leaf.replace(prompt=prompt.astype(leaf.prompt.dtype))}


def prompted(params, rows, path="token_embed"):
    """A tree with a prompt of these rows."""
    params = jpeft.prompt(len(rows), where=f"{path}/embedding")(KEY, params)
    leaf = params[path]["embedding"]
    return {**params, path: {"embedding": leaf.replace(prompt=rows)}}


# --- every way to look up ------------------------------------------------------------


def scanned(e, ids):
    return jax.lax.map(lambda row: e[row], ids)


def sliced(e, ids):
    one = lambda i: jax.lax.dynamic_index_in_dim(e, i, keepdims=False)
    return jnp.stack([jnp.stack([one(i) for i in row]) for row in ids])


LOOKUPS = {
    "take_fill": lambda e, i: jnp.take(e, i, axis=0),
    "take_clip": lambda e, i: jnp.take(e, i, axis=0, mode="clip"),
    "promise": lambda e, i: e.at[i].get(mode="promise_in_bounds"),
    "index": lambda e, i: e[i],
    "unique": lambda e, i: e.at[i].get(unique_indices=True, mode="fill"),
    "vmap": lambda e, i: jax.vmap(lambda row: e[row])(i),
    "vmap_twice": lambda e, i: jax.vmap(jax.vmap(lambda j: e[j]))(i),
    "jit": lambda e, i: jax.jit(lambda e, i: jnp.take(e, i, axis=0))(e, i),
    "remat": lambda e, i: jax.checkpoint(lambda e, i: jnp.take(e, i, axis=0))(e, i),
    "scan": scanned,
    "dynamic_slice": sliced,
    "transposed": lambda e, i: jnp.take(e.T, i, axis=1).transpose(1, 2, 0),
    "twice_transposed": lambda e, i: e.T.T[i],
    "constrained": lambda e, i: jax.lax.with_sharding_constraint(
        e, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )[i],
    "heads": lambda e, i: e.reshape(VOCAB, 2, 3)[i].reshape(*i.shape, WIDTH),
    "some_features": lambda e, i: jnp.concatenate(
        [e[:, 2:][i], jnp.split(e, [2], axis=1)[0][i]], -1
    )[..., jnp.array([4, 5, 0, 1, 2, 3])],
    "padded": lambda e, i: jnp.pad(e, ((0, 5), (0, 0)))[i],
    "negative": lambda e, i: e[jnp.where(i == 4, 4 - VOCAB, i)],
    "small_ids": lambda e, i: jnp.take(e, i.astype(jnp.uint8), axis=0),
}


def test_every_lookup_reads_the_prompt_for_virtual_ids():
    """In one program, which compiles sooner than many."""

    @jax.jit
    def run(params, ids):
        run = lambda f: jpeft.adapt(lambda p, i: f(p["embedding"], i))(params, ids)
        return {how: run(f) for how, f in LOOKUPS.items()}

    for how, got in run(table(), VIRTUAL).items():
        np.testing.assert_array_equal(got, BIG[VIRTUAL], err_msg=how)


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", LOOKUPS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_lookup_reads_the_prompt_for_virtual_ids(how, jit):
    fn = jpeft.adapt(lambda p, i: LOOKUPS[how](p["embedding"], i))
    got = (jax.jit(fn) if jit else fn)(table(), VIRTUAL)
    np.testing.assert_array_equal(got, BIG[VIRTUAL])


def test_real_ids_keep_their_bits_and_their_mode():
    """NaN beyond the prompt, NaN or the last row below zero, as the model has it."""
    fn = jax.jit(jpeft.adapt(lambda p, i: jnp.take(p["embedding"], i, axis=0)))
    ids = jnp.arange(-VOCAB - 2, VOCAB)
    np.testing.assert_array_equal(fn(table(), ids), jnp.take(E, ids, axis=0))
    assert jnp.isnan(fn(table(), jnp.array([VOCAB + 2 * N]))).all()


def test_a_cast_table_casts_the_prompt():
    fn = jpeft.adapt(lambda p, i: p["embedding"].astype(jnp.bfloat16)[i])
    got = fn(table(), VIRTUAL)
    np.testing.assert_array_equal(got, BIG.astype(jnp.bfloat16)[VIRTUAL])


@pytest.mark.parametrize(
    "scale",
    [lambda e: e * 3.0, lambda e: e / 3.0, lambda e: e * (1.0 + jnp.arange(6.0))[None]],
    ids=["times", "over", "features"],
)
def test_a_scaled_table_scales_the_prompt(scale):
    fn = jpeft.adapt(lambda p, i: scale(p["embedding"])[i])
    want = scale(BIG)[VIRTUAL]
    np.testing.assert_allclose(fn(table(), VIRTUAL), want, rtol=1e-6)


def test_a_tied_head_sees_real_tokens_alone():
    def fn(p, ids):
        return (p["embedding"][ids] @ W) @ p["embedding"].T

    got = jax.jit(jpeft.adapt(fn))(table(), VIRTUAL)
    assert got.shape == (*VIRTUAL.shape, VOCAB)
    np.testing.assert_allclose(got, (BIG[VIRTUAL] @ W) @ E.T, rtol=1e-5, atol=1e-5)


ONE_HOT = {
    "matmul": lambda e, i: jax.nn.one_hot(i, VOCAB) @ e,
    "einsum": lambda e, i: jnp.einsum("vd,bsv->bsd", e, jax.nn.one_hot(i, VOCAB)),
    "left": lambda e, i: (e.T @ jax.nn.one_hot(i, VOCAB, axis=1)).transpose(0, 2, 1),
}


@pytest.mark.parametrize("how", ["matmul", "einsum"])
def test_one_hot_rows_of_zeros_are_virtual_on_request(how):
    fn = jpeft.adapt(lambda p, i: ONE_HOT[how](p["embedding"], i))
    with pytest.raises(jpeft.DensifyError, match="one_hot=True"):
        fn(table(), VIRTUAL)
    got = jax.jit(fn)(table(P[:N], one_hot=True), VIRTUAL)
    np.testing.assert_allclose(got, BIG[VIRTUAL], rtol=1e-6)


def test_gradients_are_those_of_an_enlarged_table():
    weights = normal(9, *VIRTUAL.shape, WIDTH)
    fn = jpeft.adapt(lambda p, i: jnp.take(p["embedding"], i, axis=0))

    leaf = table()["embedding"]

    def loss(prompt, base):
        mine = {"embedding": leaf.replace(prompt=prompt, base=base)}
        return jnp.sum(weights * fn(mine, VIRTUAL) ** 2)

    got = jax.grad(loss, (0, 1))(P, E)
    want = jax.grad(lambda big: jnp.sum(weights * jnp.take(big, VIRTUAL, axis=0) ** 2))
    big = want(BIG)
    np.testing.assert_allclose(got[0], big[VOCAB:], rtol=1e-6)
    np.testing.assert_allclose(got[1], big[:VOCAB], rtol=1e-6)


# --- whole models --------------------------------------------------------------------


@functools.cache
def text(name):
    return TEXT_FORMS[name]()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", slow_but(["text_scan_remat"], ["text_unrolled", "text_scan_remat"])
)
def test_a_model_acts_as_one_with_more_words(name):
    f = text(name)
    scan = "scan" in name
    twin = Lm(vocab=VOCAB + N, scan=scan, remat=scan)

    def ours(rows):
        leaf = params["token_embed"]["embedding"].replace(prompt=rows)
        mine = {**params, "token_embed": {"embedding": leaf}}
        return jpeft.adapt(f.fn)(mine, VIRTUAL)

    def theirs(rows):
        e = jnp.concatenate([f.params["token_embed"]["embedding"], rows])
        params = {**f.params, "token_embed": {"embedding": e}}
        return twin.apply({"params": params}, VIRTUAL)[..., :VOCAB]

    rows, params = P[:N], prompted(f.params, P[:N])
    close = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order
    np.testing.assert_allclose(jax.jit(ours)(rows), jax.jit(theirs)(rows), **close)
    loss = lambda f: jax.jit(jax.grad(lambda r: jnp.mean(jnp.square(f(r)))))
    np.testing.assert_allclose(loss(ours)(rows), loss(theirs)(rows), **close)
    bare = jax.jit(f.fn)(f.params, IDS)
    assert float(jnp.max(jnp.abs(jax.jit(ours)(rows)[:, N:] - bare))) > 0.1


def test_nnx():
    f = text("text_nnx")
    params = jpeft.prompt(N)(KEY, f.params)
    got = jax.jit(jpeft.adapt(f.fn))(params, VIRTUAL)
    rows = jax.tree.leaves(jpeft.partition(params)[0])[0]
    old = f.params["embed"]["embedding"][...]
    big = jax.tree.map(
        lambda x: jnp.concatenate([x, rows]) if x.shape == old.shape else x, f.params
    )
    np.testing.assert_allclose(got, jax.jit(f.fn)(big, VIRTUAL), rtol=1e-5, atol=1e-5)


def test_a_batch_may_mix_tasks():
    """Each row of the batch is what its task gives alone, and what one prompt gives."""
    f = text("text_unrolled")
    params = prompted(f.params, P)
    leaf = params["token_embed"]["embedding"]
    apply = jax.jit(jpeft.adapt(f.fn))
    ids = functools.partial(jpeft.prepend_virtual_tokens, IDS, N, vocab_size=VOCAB)
    mixed = apply(params, ids(task=jnp.array([1, 0])).ids)
    for row, task in enumerate((1, 0)):
        alone = apply(params, ids(task=task).ids)
        np.testing.assert_allclose(mixed[row], alone[row], rtol=1e-6, atol=1e-6)
        one = prompted(f.params, leaf.prompt[task * N :][:N])
        single = apply(one, ids().ids)
        np.testing.assert_allclose(mixed[row], single[row], rtol=1e-6, atol=1e-6)


class Twice(nn.Module):
    """An encoder and a decoder over one table."""

    vocab: int = VOCAB

    @nn.compact
    def __call__(self, ids, targets):
        embed = nn.Embed(self.vocab, WIDTH, name="shared")
        told = nn.Dense(WIDTH)(embed(ids)).mean(1, keepdims=True)
        right = jnp.zeros_like(targets).at[:, 1:].set(targets[:, :-1])
        return embed.attend(nn.Dense(WIDTH)(embed(right) + told))


@pytest.mark.slow
def test_encoder_and_decoder_share_a_table():
    module = Twice()
    params = module.init(KEY, IDS, IDS)["params"]
    fn = lambda p, *args: module.apply({"params": p}, *args)
    uses = jpeft.find_uses(fn, params, IDS, IDS)
    assert uses["shared/embedding"].lookup == "direct"
    mine = jpeft.prompt(N)(KEY, params, uses=uses)
    got = jax.jit(jpeft.adapt(fn))(mine, VIRTUAL, IDS)
    big = jnp.concatenate(
        [params["shared"]["embedding"], mine["shared"]["embedding"].prompt]
    )
    enlarged = {**params, "shared": {"embedding": big}}
    want = Twice(VOCAB + N).apply({"params": enlarged}, VIRTUAL, IDS)[..., :VOCAB]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_over_quantised_and_low_rank_tables():
    def build(*below):
        made = jpeft.chain(*below, jpeft.prompt(N))(KEY, {"embedding": E})
        under = jpeft.chain(*below)(KEY, {"embedding": E})
        fn = jpeft.adapt(lambda p, i: jnp.take(p["embedding"], i, axis=0))
        got = fn(made, VIRTUAL)
        np.testing.assert_array_equal(got[:, N:], fn(under, IDS))
        np.testing.assert_array_equal(got[0, :N], made["embedding"].prompt)

    build(jpeft.lora(rank=2, where="embedding"))
    build(jpeft.quantize("int8", block_size="channel", double=False, where="embedding"))


# --- how it starts -------------------------------------------------------------------


def start(length=5, params=None, **kwargs):
    params = {"embedding": E} if params is None else params
    return np.asarray(jpeft.prompt(length, **kwargs)(KEY, params)["embedding"].prompt)


def test_ways_to_begin():
    drawn = start(4000)
    assert -0.5 <= drawn.min() < -0.49 and 0.49 < drawn.max() <= 0.5
    assert abs(start(4000, init="normal").std() - 1.0) < 0.02
    rows = start(init="vocab")
    found = [int(np.argmin(np.abs(np.asarray(E) - r).sum(1))) for r in rows]
    np.testing.assert_array_equal(rows, E[np.array(found)])
    assert len(set(found)) == 5
    np.testing.assert_array_equal(start(init=[7, 2]), E[np.array([7, 2, 7, 2, 7])])
    twice = start(3, init=np.array([7, 2, 4]), tasks=2)
    np.testing.assert_array_equal(twice, E[np.array([7, 2, 4] * 2)])


def test_a_text_is_read_from_a_quantised_table():
    quantised = jpeft.quantize(
        "int8", block_size="channel", double=False, where="embedding"
    )
    params = quantised(KEY, {"embedding": E})
    want = jpeft.merge(params)["embedding"][np.array([7, 2])]
    np.testing.assert_array_equal(start(2, params, init=[7, 2]), want)


# --- which table ---------------------------------------------------------------------


def tree(*names):
    return {n: {"embedding": E} for n in names}


def adapted(params):
    flat = jpeft.trainable_mask(params)
    return [n for n, x in flat.items() if any(jax.tree.leaves(x))]


def test_the_token_embedding_is_found_by_name():
    for names in (
        ("word_embeddings", "position_embeddings", "token_type_embeddings"),
        ("wte", "wpe"),
        ("shared", "relative_attention_bias"),
        ("embed", "pos_embed"),
    ):
        assert adapted(jpeft.prompt(2)(KEY, tree(*names))) == [names[0]]


def test_the_token_embedding_is_found_by_use():
    def fn(p, ids):
        places = jnp.arange(ids.shape[1])
        return p["Embed_1"]["embedding"][ids] + p["Embed_0"]["embedding"][places][None]

    params = tree("Embed_0", "Embed_1")
    with pytest.raises(ValueError, match="which of .* is the token embedding"):
        jpeft.prompt(2)(KEY, params)
    uses = jpeft.find_uses(fn, params, IDS)
    assert uses["Embed_0/embedding"].lookup == "constant"
    assert adapted(jpeft.prompt(2)(KEY, params, uses=uses)) == ["Embed_1"]
    left = jpeft.prompt(2, exclude="Embed_0/.*")(KEY, params)
    assert adapted(left) == ["Embed_1"]


def test_no_token_embedding_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"where=.*uses=.*prefix\(length, mode=.kv"):
        jpeft.prompt(2)(KEY, {"dense": {"kernel": jnp.ones((5, 3))}})


# --- models that lose virtual ids ----------------------------------------------------

LOSSES = {
    "clips": lambda e, i: e[jnp.clip(i, 0, VOCAB - 1)],
    "clips ": lambda e, i: e[jnp.minimum(i, VOCAB - 1)],
    "wraps": lambda e, i: e[i % VOCAB],
    "replaces": lambda e, i: e[jnp.where(i < VOCAB, i, 3)],
    "shifts": lambda e, i: e[i + 1],
    "clips inside": lambda e, i: jax.jit(
        lambda e, j: jax.vmap(lambda k: e[jnp.clip(k, 0, VOCAB - 1)])(j)
    )(e, i),
}
KEEPS = {
    **LOOKUPS,
    "masked": lambda e, i: e[jnp.where(i >= 0, i, 0)],
    "times_mask": lambda e, i: e[i * (i > 0).astype(i.dtype)],
    "shift_right": lambda e, i: e[jnp.zeros_like(i).at[:, 1:].set(i[:, :-1])],
}


@pytest.mark.parametrize("how", LOSSES)
def test_a_model_that_loses_virtual_ids_is_refused_by_name(how):
    fn = lambda p, i: LOSSES[how](p["embedding"], i)
    uses = jpeft.find_uses(fn, {"embedding": E}, IDS)
    with pytest.raises(ValueError, match=f"embedding: the model {how.split()[0]}.*.py"):
        jpeft.prompt(2)(KEY, {"embedding": E}, uses=uses)


def test_a_wrapping_lookup_is_refused():
    fn = lambda p, i: jnp.take(p["embedding"], i, axis=0, mode="wrap")
    uses = jpeft.find_uses(fn, {"embedding": E}, IDS)
    with pytest.raises(ValueError, match="wraps token ids around the vocabulary"):
        jpeft.prompt(2)(KEY, {"embedding": E}, uses=uses)


@pytest.mark.parametrize("how", KEEPS)
def test_a_model_that_keeps_them_is_not(how):
    if how in ("scan", "dynamic_slice", "heads"):
        pytest.skip("in a loop, of one row or of matrices it is not recognised")
    fn = lambda p, i: KEEPS[how](p["embedding"], i)
    uses = jpeft.find_uses(fn, {"embedding": E}, IDS)
    assert uses["embedding"].lookup == "direct"


def test_a_lookup_of_a_part_of_the_table_is_refused():
    for cut in (lambda e: e[:5], lambda e: e[1:], lambda e: e[::-1]):
        with pytest.raises(jpeft.DensifyError):
            jpeft.adapt(lambda p, i, cut=cut: cut(p["embedding"])[i])(table(), VIRTUAL)


# --- ids without virtual tokens ------------------------------------------------------


@pytest.mark.slow
def test_ids_without_virtual_tokens_are_an_error_where_they_can_be_seen():
    fn = jpeft.adapt(lambda p, i: p["embedding"][i])
    with pytest.raises(jpeft.PromiseError, match=r"prepend_virtual_tokens.*=11\)"):
        fn(table(), IDS)
    with pytest.raises(ValueError, match="id 17 is beyond the 6 virtual tokens 11 to"):
        fn(table(), VIRTUAL.at[0, 0].set(17))
    # One position at a time is generation: the prompt went before.
    fn(table(), IDS[:, :1])


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpeft.prompt(0), "length=0: expected an integer of at least 1"),
        (lambda: jpeft.prompt(2.5), "length=2.5"),
        (lambda: jpeft.prompt(2, tasks=0), "tasks=0"),
        (lambda: jpeft.prompt(2, init="zeros"), "init='zeros': expected one of"),
        (lambda: jpeft.prompt(2, init=[1, 2, 3]), "3 tokens, longer than the prompt"),
        (lambda: jpeft.prompt(2, init=[]), "init=.*list of integers"),
        (lambda: jpeft.prompt(2, init=[0.5]), "init=.*list of integers"),
        (lambda: jpeft.prompt(2, dtype=jnp.int32), "floating-point dtype"),
        (
            lambda: table(init=[1, VOCAB]),
            "the id 11, and the table has",
        ),
        (lambda: table(init=[-1]), "the id -1"),
        (
            lambda: jpeft.prompt(3)(KEY, table()),
            "prompt adds 3 virtual tokens, and Prompt",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prompt_has_no_merged_value():
    with pytest.raises(TypeError, match="no merged value"):
        jpeft.merge(table())


def test_logits_without_the_prompt_line_up_with_the_text():
    f = linen_text(Lm())
    logits = jax.jit(jpeft.adapt(f.fn))(prompted(f.params, P[:N]), VIRTUAL)
    assert jpeft.strip_virtual_tokens(logits, N).shape == (2, LENGTH, VOCAB)


def test_a_transform_says_how_many_virtual_tokens_texts_need():
    full = jpeft.full("head/.*")
    assert jpeft.chain(jpeft.prompt(3, tasks=2), full).virtual_tokens() == 3
    assert jpeft.p_tuning(4).virtual_tokens() == 4
    assert jpeft.prefix(5, mode="tokens").virtual_tokens() == 5
    assert jpeft.chain(jpeft.prefix(5), full).virtual_tokens() == 0


# --- a second table of the same ids --------------------------------------------------


def two_tables(look):
    def fn(p, ids):
        h = look(p["embed_tokens"]["embedding"], ids)
        e = look(p["embed_tokens_per_layer"]["embedding"], ids)
        return h + (jnp.tanh(h @ p["gate"]) * e) @ p["gate"].T

    table = lambda k, f: {"embedding": jax.random.normal(jax.random.key(k), (VOCAB, f))}
    params = {"embed_tokens": table(1, WIDTH), "embed_tokens_per_layer": table(2, 4)}
    return fn, {**params, "gate": jnp.ones((WIDTH, 4))}


@pytest.mark.parametrize("how", ["index", "take_fill"])
@pytest.mark.parametrize("method", [jpeft.prompt, jpeft.p_tuning])
def test_tables_of_the_same_ids_get_rows_together(how, method):
    """One of them alone would read a real token's row of the other, or NaN."""
    fn, params = two_tables(LOOKUPS[how])
    uses = jpeft.find_uses(fn, params, IDS)
    both = ["embed_tokens/embedding", "embed_tokens_per_layer/embedding"]
    for where in (None, both[0], both[1]):
        with pytest.raises(ValueError, match="by the same ids") as e:
            method(N, where=where)(KEY, params, uses=uses)
        assert f"where={both!r}" in str(e.value)
    tree = method(N, where=both)(KEY, params, uses=uses)
    if method is jpeft.prompt:
        rows = [tree[p.split("/")[0]]["embedding"].prompt for p in both]
        got = jpeft.adapt(fn)(tree, VIRTUAL)[:, :N]
        want = (
            rows[0] + (jnp.tanh(rows[0] @ params["gate"]) * rows[1]) @ params["gate"].T
        )
        np.testing.assert_allclose(
            got, np.stack([want] * len(IDS)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("how", ["index", "take_fill", "jit"])
def test_without_uses_the_call_refuses_a_second_table(how):
    fn, params = two_tables(LOOKUPS[how])
    tree = jpeft.prompt(N, where="embed_tokens/embedding")(KEY, params)
    with pytest.raises(ValueError, match="by the same ids") as e:
        jpeft.adapt(fn)(tree, VIRTUAL)
    typed = eval(str(e.value).split("where=")[1])
    tree = jpeft.prompt(N, where=typed)(KEY, params)
    assert bool(jnp.isfinite(jpeft.adapt(fn)(tree, VIRTUAL)).all())


def test_tables_of_other_ids_are_no_concern():
    def fn(p, ids, kinds):
        at = jnp.arange(ids.shape[1])
        return p["wte"][ids] + p["types"][kinds] + p["wpe"][at][None]

    params = {n: jnp.ones((VOCAB, WIDTH)) for n in ("wte", "types", "wpe")}
    uses = jpeft.find_uses(fn, params, IDS, jnp.zeros_like(IDS))
    assert list(jpeft.prompt(N).targets(slots(params), uses)) == ["wte"]
    tree = jpeft.prompt(N)(KEY, params, uses=uses)
    kinds = jnp.zeros_like(VIRTUAL)
    assert jpeft.adapt(fn)(tree, VIRTUAL, kinds).shape == (*VIRTUAL.shape, WIDTH)
