"""Virtual tokens in front of texts and among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

V, N = 11, 3
IDS = np.array([[4, 5, 6, 0], [7, 0, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.int32)
PLACES = np.array([[0, 1, 2, 3], [0, 1, 2, 3]], np.int32)
KINDS = pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])


def prepend(ids, n=N, **kwargs):
    return jpeft.prepend_virtual_tokens(ids, n, vocab_size=V, **kwargs)


@KINDS
def test_ids_mask_labels_and_positions_grow_together(kind):
    out = prepend(kind(IDS), mask=kind(MASK), labels=kind(IDS), positions=kind(PLACES))
    np.testing.assert_array_equal(out.ids[0], [11, 12, 13, 4, 5, 6, 0])
    np.testing.assert_array_equal(out.mask[1], [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(out.labels[1], [-100, -100, -100, 7, 0, 0, 0])
    np.testing.assert_array_equal(out.positions[0], range(7))
    for x, given in zip(out, (IDS, MASK, IDS, PLACES), strict=True):
        assert isinstance(x, jax.Array) == (kind is not np.asarray)
        assert x.dtype == given.dtype and x.shape == (2, 7)


def test_what_was_not_given_is_none():
    assert prepend(IDS)[1:] == (None, None, None)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_masks_keep_their_dtype(dtype):
    mask = prepend(IDS, mask=MASK.astype(dtype)).mask
    assert mask.dtype == dtype and mask[:, :N].all()


def test_any_batch_axes():
    np.testing.assert_array_equal(prepend(IDS[0]).ids, prepend(IDS).ids[0])
    deep = np.broadcast_to(IDS, (5, 2, 4))
    np.testing.assert_array_equal(prepend(deep).ids[3], prepend(IDS).ids)


def test_left_padded_texts_get_them_before_the_padding():
    """The positions given close the gap: the first word follows the last of them."""
    mask = np.array([[0, 0, 1, 1]])
    places = np.array([[0, 0, 0, 1]])
    out = prepend(np.array([[0, 0, 4, 5]]), mask=mask, positions=places)
    np.testing.assert_array_equal(out.mask, [[1, 1, 1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(out.positions, [[0, 1, 2, 3, 3, 3, 4]])


@KINDS
def test_each_example_may_have_its_own_task(kind):
    out = prepend(kind(IDS), task=kind(np.array([2, 0])))
    np.testing.assert_array_equal(out.ids[:, :N], [[17, 18, 19], [11, 12, 13]])
    np.testing.assert_array_equal(prepend(IDS, task=1).ids[1, :N], [14, 15, 16])


def test_works_under_jit_and_vmap():
    f = lambda ids, mask, task: prepend(
        ids, mask=mask, labels=ids, positions=ids, task=task
    )
    task = jnp.array([1, 0])
    want = f(IDS, MASK, np.array([1, 0]))
    jitted = jax.jit(f)(IDS, MASK, task)
    mapped = jax.vmap(f)(jnp.asarray(IDS), jnp.asarray(MASK), task)
    for got in (jitted, mapped):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)


@KINDS
def test_strip_takes_off_what_prepend_put_on(kind):
    out = prepend(kind(IDS), mask=kind(MASK))
    np.testing.assert_array_equal(jpeft.strip_virtual_tokens(out.ids, N), IDS)
    logits = kind(np.arange(2 * 7 * 5.0).reshape(2, 7, 5))
    np.testing.assert_array_equal(jpeft.strip_virtual_tokens(logits, N), logits[:, N:])
    np.testing.assert_array_equal(
        jpeft.strip_virtual_tokens(logits[0], N, axis=0), logits[0, N:]
    )
    cut = jax.jit(lambda x: jpeft.strip_virtual_tokens(x, N))(logits)
    np.testing.assert_array_equal(cut, logits[:, N:])


# --- templates -----------------------------------------------------------------------


@KINDS
def test_a_template_puts_words_between_virtual_tokens(kind):
    template = jpeft.virtual_template(2, [5, 6], ..., [9], 1, vocab_size=V)
    assert (template.length, template.before, template.after) == (3, 4, 2)
    out = template(
        kind(IDS),
        mask=kind(MASK),
        labels=kind(IDS),
        positions=kind(PLACES),
        task=kind(np.array([0, 1])),
    )
    np.testing.assert_array_equal(
        out.ids, [[11, 12, 5, 6, 4, 5, 6, 0, 9, 13], [14, 15, 5, 6, 7, 0, 0, 0, 9, 16]]
    )
    np.testing.assert_array_equal(out.mask[1], [1, 1, 1, 1, 1, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(out.labels[0], [-100] * 4 + [4, 5, 6, 0] + [-100] * 2)
    # Behind a text of three words and a pad the fourth position comes next.
    np.testing.assert_array_equal(out.positions[0], [0, 1, 2, 3, 4, 5, 6, 7, 7, 8])
    np.testing.assert_array_equal(out.positions[1], [0, 1, 2, 3, 4, 5, 6, 7, 5, 6])
    np.testing.assert_array_equal(template.strip(out.ids), IDS)


def test_templates_are_values():
    make = lambda n: jpeft.virtual_template(n, [5], ..., vocab_size=V)
    assert make(2) == make(2) != make(3)
    assert hash(make(2)) == hash(make(2))


def test_a_template_under_jit_keeps_positions():
    template = jpeft.virtual_template(..., 2, vocab_size=V)
    got = jax.jit(lambda *a: template(a[0], mask=a[1], positions=a[2]))(
        IDS, MASK, PLACES
    )
    want = template(IDS, mask=MASK, positions=PLACES)
    for x, y in zip(got, want, strict=True):
        if y is not None:
            np.testing.assert_array_equal(x, y)


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prepend(IDS, 0), "n=0: expected an integer of at least 1"),
        (lambda: prepend(IDS, 2.0), "n=2.0"),
        (lambda: prepend(IDS, True), "n=True"),
        (
            lambda: jpeft.prepend_virtual_tokens(IDS, 2, vocab_size=0),
            "vocab_size=0: expected",
        ),
        (lambda: prepend(prepend(IDS).ids), "go up to 13.*prepended already"),
        (lambda: prepend(IDS * 1.0), "expected integer ids"),
        (lambda: prepend(np.int32(3)), "expected integer ids"),
        (lambda: prepend(IDS, mask=MASK[:, :2]), r"mask has shape \(2, 2\)"),
        (lambda: prepend(IDS, mask=MASK[:, None, None]), "build an attention mask"),
        (lambda: prepend(IDS, labels=IDS[:, 0]), "labels of whole texts"),
        (lambda: prepend(IDS, positions=PLACES[:1]), "positions has shape"),
        (lambda: prepend(IDS, mask=MASK - 1.0), "to add to scores"),
        (lambda: prepend(IDS, task=np.array([1, 2, 3])), r"task has shape \(3,\)"),
        (lambda: prepend(IDS, task=-1), "expected integers from 0"),
        (lambda: prepend(IDS, task=0.5), "expected integers from 0"),
        (
            lambda: jpeft.prepend_virtual_tokens(
                IDS.astype(np.int8), 9, vocab_size=120
            ),
            "last id is 128, which int8 cannot hold",
        ),
        (lambda: jpeft.strip_virtual_tokens(IDS, 5), "no 5 virtual tokens"),
        (lambda: jpeft.strip_virtual_tokens(IDS[0], 2), "say which axis"),
        (lambda: jpeft.strip_virtual_tokens(IDS, -1), "n=-1"),
        (lambda: jpeft.virtual_template(3, vocab_size=V), "expected one `...`"),
        (lambda: jpeft.virtual_template(..., [2], vocab_size=V), "at least one number"),
        (lambda: jpeft.virtual_template(2, ..., ..., vocab_size=V), "expected one"),
        (lambda: jpeft.virtual_template(2, [V], ..., vocab_size=V), "ids below 11"),
        (lambda: jpeft.virtual_template(2, "x", ..., vocab_size=V), "a piece='x'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
