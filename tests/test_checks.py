"""What is typed is checked once, by a call and from a file alike."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jpeft
from jpeft import checks
from jpeft.transform import METHODS

LORA = jpeft.lora(rank=2)
# What each method cannot do without.
NEEDS = {
    "full": {"where": ".*"},
    "gated": {"transform": LORA},
    "chain": {"transforms": (LORA,)},
    "bitfit": {"add": ".*"},
    **dict.fromkeys(
        ["lora", "dora", "adalora", "vera", "loha", "lokr", "hira"], {"rank": 2}
    ),
    **dict.fromkeys(["prefix", "p_tuning", "p_tuning_v2", "prompt"], {"length": 2}),
    "loftq": {"rank": 2},
}
HELD = {"transforms"}  # fields that hold other transforms
PATTERNS = [
    3,
    [4],
    [],
    [["a", 2]],
    "a",
    {"(a": 2},
    {3: 2},
    {"a": "2"},
    {"a": np.inf},
    {"a": True},
]
REFUSED = {
    "flag": ["false", "true", "", 0, 1, 0.0, None, [True]],
    "number": ["2", "inf", True, np.inf, -np.inf, np.nan, 10**400, 1e39, [2], {}, 1j],
    "word": [3, True, 2.5, ["lora"], {"a": 1}, "no such word"],
    "dtype": ["floaty", "int8", "(", "4f4", "float128", 3.5, 7, True, ["float32"]],
    "where": [3, {"a": 1}, b"a", "(a", ["a", ["b"]], [3], "(" * 999, "a{99999999999}"],
    "pattern": PATTERNS,
    "layers": ["01", 3, [True], [0.5], ["0"], [], {0: 1}],
    "transform": [3, None, "lora", [], jpeft.ia3()],
    "ids": [3, "no such word", [0.5], [True], [[1]], [[1], 2], [], {1: 2}],
}


def kind_of(method, name):
    """By the field's name, apart from the library's own table of types."""
    if name in ("where", "exclude", "add", "feedforward"):
        return "where"
    if name in ("projections", "attention", "mlp"):
        return "where"
    if name.endswith("dtype"):
        return "dtype"
    if name.endswith("_pattern"):
        return "pattern"
    if name in ("layers", "transform"):
        return name
    if (method, name) == ("prompt", "init"):
        return "ids"
    default = getattr(made(method), name)
    if isinstance(default, bool):
        return "flag"
    words = ("init", "activation", "reparametrization", "format", "encoder", "mode")
    return "word" if name in words or name == "placement" else "number"


def made(method):
    return METHODS[method](**NEEDS.get(method, {}))


FIELDS = [
    (method, f.name)
    for method in METHODS
    for f in dataclasses.fields(METHODS[method])
    if f.name not in HELD
]


def factory(method):
    return getattr(jpeft, method)


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_what_a_field_cannot_hold_is_refused_by_name(method, name):
    """By the call and by a configuration, in one sentence that names the field."""
    needs = {k: v for k, v in NEEDS.get(method, {}).items() if k != name}
    values = REFUSED[kind_of(method, name)]
    config = {"method": method, **needs}
    if "transform" in config:
        config["transform"] = LORA.to_config()
    for value in values:
        for make in (
            lambda v=value: factory(method)(**needs, **{name: v}),
            lambda v=value: jpeft.from_config({**config, name: v}),
        ):
            if value is None and make is not None and name == "layers":
                continue
            with pytest.raises(ValueError) as error:
                make()
            told = str(error.value)
            assert told.startswith(f"{method}: ") and name in told, (value, told)
            assert len(told) < 1000


@pytest.mark.parametrize("method", [m for m in METHODS if m != "chain"])
def test_every_field_declares_its_check(method):
    """A field whose type says nothing would take anything."""
    names = {f.name for f in dataclasses.fields(METHODS[method])} - HELD
    assert names == set(checks.declared(METHODS[method]))


# Of each number there is, one of a kind that arithmetic gives.
NUMBERS = {
    "np.int64": np.int64(2),
    "np.uint8": np.uint8(2),
    "np.float32": np.float32(2),
    "np.float16": np.float16(2),
    "bfloat16": ml_dtypes.bfloat16(2),
    "np 0-d": np.array(2),
    "jnp.int32": jnp.int32(2),
    "jnp.float32": jnp.float32(2),
    "jnp.bfloat16": jnp.bfloat16(2),
}


@pytest.mark.parametrize(("method", "name"), FIELDS)
def test_numbers_of_numpy_and_jax_go_where_a_number_goes(method, name):
    kind = kind_of(method, name)
    if kind not in ("number", "flag", "pattern", "layers", "ids"):
        return
    needs = {k: v for k, v in NEEDS.get(method, {}).items() if k != name}
    # An integer where one is needed, else also fractions; the first that is taken.
    whole = name not in ("alpha", "std", "d_initial", "dropout", "scale", "reduction")
    whole &= name not in ("low", "high", "temperature", "alpha_pattern")
    if kind == "flag":
        pairs = [(x(v), v) for x in (np.bool_, jnp.bool_) for v in (True, False)]
    elif name == "block_size":
        pairs = [(x(64), 64) for x in (np.int64, jnp.int32, np.array)]
    elif name in ("dropout", "low"):
        sign = -1 if name == "low" else 1
        pairs = [(x(sign * 0.5), sign * 0.5) for x in (np.float32, jnp.float32)]
    else:
        pairs = [
            (x, 2)
            for x in NUMBERS.values()
            if not whole or jnp.issubdtype(x.dtype, jnp.integer)
        ]
    for given, plain in pairs:
        wrap = {
            "pattern": lambda x: {".*": x},
            "layers": lambda x: [x],
            "ids": lambda x: [x],
        }.get(kind, lambda x: x)
        got = factory(method)(**needs, **{name: wrap(given)})
        want = factory(method)(**needs, **{name: wrap(plain)})
        assert got == want and hash(got) == hash(want)
        assert json.dumps(got.to_config()) and got.origin() == want.origin()
        assert jpeft.from_config(got.to_config()) == got


def test_a_number_that_jax_traces_is_none():
    with pytest.raises(ValueError, match="lora: rank=.*expected an integer"):
        jax.jit(lambda rank: jpeft.lora(rank)(jax.random.key(0), {}))(2)


def test_other_numbers_of_numpy_and_jax():
    x = jnp.ones((4, 64))
    for axis in (np.int64(1), jnp.int32(1), [np.int8(1)]):
        q = jpeft.quant.quantize(x, block_size=np.int64(32), axis=axis)
        assert (q.block_size, q.order) == (32, (0, 1))
    template = jpeft.virtual_template(jnp.int32(2), ..., vocab_size=np.int64(9))
    assert template == jpeft.virtual_template(2, ..., vocab_size=9)
    with pytest.raises(ValueError, match="ratio=True: expected a number above 0"):
        jpeft.optim.lora_plus(None, ratio=True)
    with pytest.raises(ValueError, match="vectors='no': expected True or False"):
        jpeft.optim.lora_plus(None, vectors="no")
    with pytest.raises(ValueError, match="axis='0': expected an integer"):
        jpeft.quant.quantize(x, axis="0")


@pytest.mark.parametrize("value", ["false", 1, None])
def test_a_switch_of_a_function_is_true_or_false(value):
    quantised = {"kernel": jpeft.quant.quantize(jnp.ones((64, 2)))}
    calls = {
        "requantize": lambda: jpeft.merge(quantised, requantize=value),
        "transpose": lambda: jpeft.quant.from_bitsandbytes({}, transpose=value),
        "double": lambda: jpeft.quant.quantize(jnp.ones((64, 2)), double=value),
        "vectors": lambda: jpeft.optim.lora_plus(None, vectors=value),
        "overwrite": lambda: jpeft.save("a", {}, jpeft.lora(2), overwrite=value),
        "statistics": lambda: jpeft.save("a", {}, jpeft.lora(2), statistics=value),
        "has_aux": lambda: jpeft.value_and_grad(jnp.sum, has_aux=value),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}={value!r}: expected True or Fal"):
            call()


def test_a_set_of_paths_has_one_order():
    paths = {f"layers/{k}/kernel" for k in range(9)}
    assert jpeft.lora(2, where=paths).where == tuple(sorted(paths))


def test_a_dropout_that_float32_rounds_to_one_is_refused():
    """1 - rate would be 0, and what is left divided by it NaN."""
    with pytest.raises(ValueError, match="dropout=0.99999999999"):
        jpeft.lora(2, dropout=0.99999999999)


def test_no_alpha_is_beyond_what_float32_holds():
    for alpha in (1e39, 1e-46):
        with pytest.raises(ValueError, match="above 0 that float32 holds"):
            jpeft.lora(2, alpha=alpha)
