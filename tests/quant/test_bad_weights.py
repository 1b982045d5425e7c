"""Bad input to `jpeft.quantize`: the leaf, what was expected, what to type instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

KEY = jax.random.key(0)
X = jnp.ones((3, 7))


def tree(dtype="float32", **more):
    kernel = jnp.ones((7, 5), dtype)
    return {"up": {"kernel": kernel}, "down": {"kernel": jnp.ones((5, 7))}, **more}


def fn(params, x):
    return x @ params["up"]["kernel"] @ params["down"]["kernel"]


def nf4(params, **options):
    return jpeft.quantize("nf4", **options)(KEY, params)


def spoilt(value):
    params = tree()
    params["up"]["kernel"] = params["up"]["kernel"].at[2, 3].set(value)
    return params


def raises(kind, parts, call):
    with pytest.raises(kind) as error:
        call()
    for part in parts:
        assert part in str(error.value), str(error.value)


FACTORY = {
    "format": ({"format": "nf5"}, ["format='nf5': did you mean 'nf4'?", "Known: nf4,"]),
    "format of another case": ({"format": "NF4"}, ["did you mean 'nf4'?"]),
    "no format": ({"format": None}, ["format=None", "Known: nf4,"]),
    "block size": (
        {"block_size": 48},
        ["block_size=48 does not fit", "32, 64", "'channel' or 'tensor'"],
    ),
    "block size 0": ({"block_size": 0}, ["block_size=0 does not fit"]),
    "block size 64.0": ({"block_size": 64.0}, ["block_size=64.0 does not fit"]),
    "true block size": ({"block_size": True}, ["block_size=True does not fit"]),
    "block size by name": ({"block_size": "row"}, ["block_size='row' does not fit"]),
    "double is 1": ({"double": 1}, ["double=1: expected True or False"]),
    "double is text": ({"double": "yes"}, ["double='yes': expected True or False"]),
    "compute dtype": (
        {"compute_dtype": "int8"},
        ["'int8': expected a floating-point dtype"],
    ),
    "compute dtype of no name": (
        {"compute_dtype": "floaty"},
        ["'floaty': expected a floating-point dtype"],
    ),
    "formats in a list": ({"format": ["nf4"]}, ["format=['nf4']", "Known: nf4,"]),
    "where": ({"where": 3}, ["expected one of ('attention'"]),
}


@pytest.mark.parametrize("what", FACTORY)
def test_the_factory_checks_its_arguments_at_once(what):
    options, parts = FACTORY[what]
    raises(ValueError, parts, lambda: jpeft.quantize(**options))


TREES = {
    "quantised by the same": (
        lambda: nf4(nf4(tree())),
        ["down/kernel: this very quantize transform is already applied"],
    ),
    "quantised by another": (
        lambda: jpeft.quantize("int8")(KEY, nf4(tree())),
        ["already quantised (nf4)", "exclude=", "jpeft.merge(params)"],
    ),
    "quantised below LoRA": (
        lambda: jpeft.quantize("int8")(KEY, jpeft.lora(rank=2)(KEY, nf4(tree()))),
        ["down/kernel: carries an adapter (LowRank)", "quantise first"],
    ),
    "carries an adapter": (
        lambda: nf4(jpeft.lora(rank=2)(KEY, tree())),
        [
            "carries an adapter (LowRank)",
            "quantise first and adapt then",
            "jpeft.chain(jpeft.quantize(...), jpeft.lora(...))",
        ],
    ),
    "integers": (
        lambda: nf4(tree("int8")),
        ["up/kernel: quantize needs a real floating-point weight", "int8", "exclude="],
    ),
    "complex": (lambda: nf4(tree("complex64")), ["up/kernel", "complex64"]),
    "no elements": (
        lambda: nf4(tree(gone={"kernel": jnp.ones((0, 5))})),
        ["gone/kernel: a weight of shape (0, 5) has nothing", "exclude='gone/kernel'"],
    ),
    "NaN": (
        lambda: nf4(spoilt(jnp.nan)),
        ["up/kernel: the base holds NaN or infinity", "how the weights were loaded"],
    ),
    "infinity": (lambda: nf4(spoilt(-jnp.inf)), ["up/kernel: the base holds NaN or"]),
    "nothing matches": (
        lambda: nf4(tree(), where=".*quary.*"),
        ["quantize: where='.*quary.*' matches nothing", "up/kernel"],
    ),
    "a bias": (
        lambda: nf4(tree(bias=jnp.ones(5)), where=".*bias"),
        ["which quantize cannot act on (bias is a bias)", "jpeft.bitfit"],
    ),
    "training whole what is quantised": (
        lambda: jpeft.full(".*up.*")(KEY, nf4(tree())),
        ["up/kernel: already carries Quantized", "exclude="],
    ),
    "nothing to train": (
        lambda: jpeft.value_and_grad(lambda p: jnp.sum(jpeft.adapt(fn)(p, X)))(
            nf4(tree())
        ),
        ["nothing in this tree is trainable", "jpeft.lora("],
    ),
}


@pytest.mark.parametrize("what", TREES)
def test_a_tree_that_does_not_fit_is_named_by_its_leaf(what):
    call, parts = TREES[what]
    raises(ValueError, parts, call)


def test_codes_have_no_gradient():
    """Of the whole tree: JAX's own error, which names the dtype."""
    loss = lambda p: jnp.sum(jpeft.adapt(fn)(p, X))
    params = jpeft.lora(rank=2)(KEY, nf4(tree()))
    with pytest.raises(TypeError, match="grad requires real- or complex-valued.*uint8"):
        jax.grad(loss)(params)
    # Of what trains, there is one, and the library's own function takes it.
    _, grads = jpeft.value_and_grad(loss)(params)
    assert float(jnp.abs(grads["up"]["kernel"].b).max()) > 0


@pytest.mark.parametrize(
    "use",
    [
        lambda w: X @ w,
        lambda w: jnp.sum(w),
        lambda w: jnp.dot(X, w),
    ],
)
def test_a_leaf_outside_adapt_is_no_array(use):
    leaf = nf4(tree())["up"]["kernel"]
    parts = ["a Quantized (7, 5) was used as an array", "jpeft.adapt(fn)"]
    raises(TypeError, [*parts, "jpeft.merge(params)"], lambda: use(leaf))


def test_what_has_no_cheap_form_names_the_leaf_and_the_line():
    square = {"up": {"kernel": jnp.eye(5)}}
    call = lambda: jpeft.adapt(lambda p, x: jnp.linalg.inv(p["up"]["kernel"]))(
        nf4(square), X
    )
    parts = ["up/kernel: Quantized (5, 5) reaches `lu`", "test_bad_weights.py:"]
    raises(jpeft.DensifyError, [*parts, 'materialize="allow"'], call)


def test_nan_under_jit_stays_nan():
    made = jax.jit(nf4)(spoilt(jnp.nan))
    w = jpeft.merge(made)["up"]["kernel"]
    assert bool(jnp.isnan(w[:, 3]).all())


CONFIG = jpeft.quantize("int8").to_config()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"blok_size": 64}, ["unknown key 'blok_size'", "'block_size'?", "double"]),
        ({"format": "nf5"}, ["format='nf5'", "'nf4'"]),
        ({"double": "yes"}, ["double='yes'"]),
        ({"method": "quantise"}, ["quantise", "quantize"]),
    ],
)
def test_a_configuration_is_checked_as_the_factory_is(change, parts):
    raises(ValueError, parts, lambda: jpeft.from_config({**CONFIG, **change}))


def test_a_configuration_says_all():
    t = jpeft.quantize(
        "int4", False, 128, ".*up.*", exclude=".*x", compute_dtype=np.float16
    )
    assert jpeft.from_config(t.to_config()) == t
