"""bitsandbytes' serialised 4-bit weights: read them as they are, write them.  And
GGUF's blocks, to read.

    weight                                  uint8 (n / 2, 1), two neighbours a byte
    weight.absmax                           float32, or uint8 if nested
    weight.quant_map                        float32 (16,)
    weight.nested_absmax, .nested_quant_map float32, if nested
    weight.quant_state.bitsandbytes__nf4    JSON as uint8: type, block size, shape, ...

    Q4_0    a block of 32 is d, float16, and 16 bytes     w = d * (code - 8)
    Q4_1                     d, m, and 16 bytes           w = d * code + m
    Q8_0                     d, and 32 int8               w = d * code

In GGUF's 16 bytes the low nibbles are the first 16 codes; blocks run along rows, which
are a linear weight's outputs.

Codes are moved, never decoded, so nothing is lost either way.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.checks import (
    check_flag,
    check_float,
    check_floating,
    check_number,
    read_json,
    shown,
)
from jpeft.formats import codebooks, double, packing
from jpeft.formats.blocks import BLOCK_SIZES, FORMATS, GGUF_BLOCK
from jpeft.leaf import unboxed
from jpeft.quant.leaf import Layout, Quantized, arrangement, as_it_is, nested_order
from jpeft.tree.layout import EMBEDDING, LINEAR

STATE = ".quant_state.bitsandbytes__"
TYPES = ("nf4", "fp4")
# The code of zero, which fills up what has no element.
ZERO = {"nf4": 7, "fp4": 0}


def from_bitsandbytes(
    state: Mapping[str, Any],
    name: str | None = None,
    *,
    transpose: bool = False,
    compute_dtype: Any = None,
) -> Quantized:
    """The weight that a state dict of bitsandbytes holds, code for code.

    state: {name: array}, as in a safetensors file.  name: of the weight, such as
    "model.layers.0.mlp.up_proj.weight"; None if the state has one only.
    transpose: False gives torch's shape (out, in), True a Flax kernel (in, out).
    compute_dtype: of products; default the wider of the activation's and the weight's.

    Raises ValueError for missing keys, a type other than nf4 and fp4, sizes that do not
    fit together, or a code book that is not bitsandbytes' own.

    >>> import jax.numpy as jnp, jpeft
    >>> q = jpeft.quant.quantize(jnp.ones((5, 64)), "nf4", double=False)
    >>> state = jpeft.quant.to_bitsandbytes(q)  # or of a safetensors file
    >>> jpeft.quant.from_bitsandbytes(state).shape
    (5, 64)
    """
    check_float("from_bitsandbytes", compute_dtype, "compute_dtype")
    check_flag("from_bitsandbytes", "transpose", transpose)
    name = _only(state) if name is None else name
    described = [k for k in state if k.startswith(name + STATE)]
    if len(described) > 1:
        raise ValueError(
            f"from_bitsandbytes: {' and '.join(map(repr, described))} both say what "
            f"{name!r} is; the state is put together from two"
        )
    if not described:
        near = difflib.get_close_matches(name, list(state), 3, cutoff=0.3)
        raise ValueError(
            f"from_bitsandbytes: {name + STATE + 'nf4'!r} is missing: {name!r} is no "
            f"4-bit weight of bitsandbytes; nearest keys: {near}"
        )
    info = _info(described[0], state[described[0]])
    nested = "nested_blocksize" in info or name + ".nested_absmax" in state
    wanted = [name, name + ".absmax", name + ".quant_map"]
    wanted += [f"{name}.nested_{k}" for k in ("absmax", "quant_map") if nested]
    missing = [k for k in wanted if k not in state]
    fields = ["quant_type", "blocksize", "dtype", "shape"]
    fields += ["nested_blocksize", "nested_offset"] if nested else []
    missing += [f"{described[0]}: {k}" for k in fields if k not in info]
    if missing:
        raise ValueError(
            f"from_bitsandbytes: the state of {name!r} lacks {', '.join(missing)}; it "
            "must hold everything that QuantState.as_dict(packed=True) gives"
        )
    told = described[0][len(name + STATE) :]
    if told != info["quant_type"] and info["quant_type"] in TYPES:
        raise ValueError(
            f"from_bitsandbytes: {described[0]!r} describes a weight in "
            f"{info['quant_type']!r}; the state is put together from two"
        )
    arrays = {k: np.asarray(state[k]) for k in wanted[1:]}
    arrays[name] = _bytes_of(state[name])
    return _read(name, arrays, info, transpose, compute_dtype)


def _info(key: str, text: Any) -> dict[str, Any]:
    """What is written beside the arrays."""
    try:
        info = read_json(np.asarray(text).astype(np.uint8).tobytes())
        if not isinstance(info, dict):
            raise ValueError(f"it says {shown(info)}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"from_bitsandbytes: {key!r} is damaged: it is not the JSON object that "
            f"bitsandbytes writes ({error})"
        ) from error
    return info


def _bytes_of(x: Any) -> np.ndarray:
    """Codes, which bitsandbytes may keep as numbers of any kind (`quant_storage`)."""
    if "bfloat16" in str(getattr(x, "dtype", "")) and not isinstance(
        x, (np.ndarray, jax.Array)
    ):
        x = jnp.from_dlpack(x)  # a tensor of numbers that numpy does not have
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def _only(state: Mapping[str, Any]) -> str:
    names = sorted({k[: k.index(STATE)] for k in state if STATE in k})
    if not names:
        raise ValueError(
            f"from_bitsandbytes: no key of the state ends in {STATE + 'nf4'!r} or "
            f"{STATE + 'fp4'!r}, which says what a 4-bit weight is; there are "
            f"{list(state)[:4]}"
        )
    if len(names) != 1:
        raise ValueError(
            f"from_bitsandbytes: the state holds {len(names)} 4-bit weights"
            f" ({', '.join(names[:3])}, ...): say which, name="
        )
    return names[0]


def _read(
    name: str,
    arrays: Mapping[str, np.ndarray],
    info: Mapping[str, Any],
    transpose: bool,
    compute_dtype: Any,
) -> Quantized:
    kind, size, shape = info["quant_type"], info["blocksize"], info["shape"]
    if kind not in TYPES or type(size) is not int or size not in BLOCK_SIZES:
        raise ValueError(
            f"from_bitsandbytes: {name!r} is {shown(kind)} in blocks of {shown(size)}; "
            f"expected {' or '.join(TYPES)} in blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))}"
        )
    whole = isinstance(shape, list) and all(type(k) is int and k > 0 for k in shape)
    if not whole or not shape:
        raise ValueError(
            f"from_bitsandbytes: {name!r} has the shape {shown(shape)}; expected whole "
            "numbers above 0"
        )
    shape = tuple(shape)
    check_floating(f"from_bitsandbytes: {name!r}", "dtype", info["dtype"])
    n = math.prod(shape)
    count = -(-n // size)
    packed, absmax = arrays[name].reshape(-1), arrays[name + ".absmax"].reshape(-1)
    if packed.shape[0] != (n + 1) // 2 or absmax.shape[0] != count:
        raise ValueError(
            f"from_bitsandbytes: {name!r} of shape {shape} in blocks of {size} needs "
            f"{(n + 1) // 2} bytes and {count} scales, the state has "
            f"{packed.shape[0]} and {absmax.shape[0]}"
        )
    _same_book(name, arrays[name + ".quant_map"], codebooks.CODEBOOKS[kind])
    codes = packing.from_pairs(jnp.asarray(packed, jnp.uint8), n)
    if len(shape) == 2 and shape[1] % size == 0:  # blocks within rows: a matrix
        layout = Layout((0, 1) if transpose else (1, 0), 0, 0, 1)
        codes = codes.reshape(shape).T
        fit = lambda s: s.reshape(shape[0], -1).T
        inner = (shape[1],)
    else:
        order = tuple(reversed(range(len(shape)))) if transpose else None
        layout = as_it_is(len(shape))._replace(order=order or tuple(range(len(shape))))
        fit, inner = (lambda s: s), shape
    if transpose and len(shape) != 2:
        raise ValueError(f"from_bitsandbytes: {name!r} of shape {shape} is no matrix")
    fill = packing.padded(codes.shape[0]) - codes.shape[0]
    pads = [(0, fill)] + [(0, 0)] * (codes.ndim - 1)
    more: dict[str, Any] = {}
    if name + ".nested_absmax" in arrays:
        if info["nested_blocksize"] != double.NESTED_BLOCK:
            raise ValueError(
                f"from_bitsandbytes: {name!r} has nested blocks of "
                f"{info['nested_blocksize']}, expected {double.NESTED_BLOCK}"
            )
        _same_book(name, arrays[name + ".nested_quant_map"], codebooks.dynamic_map())
        groups = arrays[name + ".nested_absmax"].reshape(-1)
        if groups.shape[0] != -(-count // double.NESTED_BLOCK):
            raise ValueError(
                f"from_bitsandbytes: {name!r} has {count} scales in groups of "
                f"{double.NESTED_BLOCK}, for which {groups.shape[0]} scales of their "
                "own were found; the state is truncated"
            )
        offset = check_number(
            f"from_bitsandbytes: {name!r}", "nested_offset", info["nested_offset"]
        )
        if groups.dtype != np.float32:
            raise ValueError(
                f"from_bitsandbytes: {name + '.nested_absmax'!r} is {groups.dtype}, "
                "expected float32"
            )
        more["nested"] = jnp.asarray(groups, jnp.float32)
        more["offset"] = jnp.asarray(offset, jnp.float32)
        if not all(np.all(np.isfinite(x)) for x in more.values()):
            raise ValueError(
                f"from_bitsandbytes: what the scales of {name!r} were quantised by "
                "holds NaN or infinity, so that nothing of the weight is left"
            )
    expected = np.dtype(np.uint8 if more else np.float32)
    if absmax.dtype != expected:
        raise ValueError(
            f"from_bitsandbytes: {name + '.absmax'!r} is {absmax.dtype}, expected "
            f"{expected}, for scales that are{'' if more else ' not'} quantised "
            "themselves"
        )
    scales = jnp.asarray(absmax)
    return Quantized(
        codes=packing.pack(jnp.pad(codes, pads, constant_values=ZERO[kind]), 0),
        scales=fit(scales),
        format=kind,
        block_size=size,
        order=layout.order,
        stack=0,
        lead=0,
        inner=inner,
        element=jnp.dtype(info["dtype"]).name,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype).name,
        **more,
    )


def _same_book(name: str, found: np.ndarray, own: np.ndarray) -> None:
    same = found.shape == own.shape and found.dtype == own.dtype
    # NaN is within no bounds.
    if not same or not np.abs(found - own).max() <= 1e-6:
        raise ValueError(
            f"from_bitsandbytes: {name!r} comes with a code book of its own, which "
            "jpeft cannot keep; dequantise it with bitsandbytes and quantise it anew"
        )


def to_bitsandbytes(q: Quantized, name: str = "weight") -> dict[str, np.ndarray]:
    """What bitsandbytes would serialise for this weight; the other way round.

    A kernel (in, out) or (in, heads, features) becomes torch's (out, in), a table stays
    as it is.  Raises ValueError for a format that bitsandbytes does not have, and where
    blocks are not bitsandbytes' blocks: an input that is no multiple of the block size,
    or a stack (write its rows one by one).

    >>> import jax.numpy as jnp, jpeft
    >>> q = jpeft.quant.quantize(jnp.ones((5, 64)), "nf4", double=False)
    >>> state = jpeft.quant.to_bitsandbytes(q, "up.weight")
    >>> state["up.weight"].shape, state["up.weight.absmax"].shape
    ((160, 1), (5,))
    """
    if not isinstance(q, Quantized):
        raise TypeError(
            f"to_bitsandbytes: expected a quantised weight, got {type(q).__name__}; "
            "merge adapters first, or save them beside it"
        )
    q = unboxed(q)  # type: ignore[assignment]
    if q.format not in TYPES or not isinstance(q.block_size, int):
        raise ValueError(
            f"to_bitsandbytes: {q.format} with block_size={q.block_size!r}: "
            f"bitsandbytes has {' and '.join(TYPES)} in blocks of a number"
        )
    if q.stack:
        raise ValueError(
            f"to_bitsandbytes: a stack of shape {q.shape}; give one matrix at a time, "
            "such as a row of it quantised on its own"
        )
    size, length = q.block_size, q.length
    flat = q.codes.ndim == 1
    if not flat and length % size:
        raise ValueError(
            f"to_bitsandbytes: the input has {length} elements, no multiple of the "
            f"block size {size}, where bitsandbytes' blocks run on into the next row; "
            "quantise with jpeft.quant.quantize(w.T), which cuts as it does"
        )
    codes = packing.unpack(q.codes, q.lead)
    codes = codes.reshape(*codes.shape[: q.lead], -1, *codes.shape[q.lead + 2 :])
    codes = jnp.moveaxis(codes, q.lead, -1)[..., :length]
    sizes = [q.shape[k] for k in q.order]
    if flat:
        shape = tuple(sizes)
    else:
        others = sizes[: q.lead] + sizes[q.after :]
        shape = (math.prod(others), length)
    absmax = nested_order(q.scales, q.lead)
    info: dict[str, Any] = {
        "quant_type": q.format,
        "blocksize": size,
        "dtype": q.element,
        "shape": list(shape),
    }
    out = {
        name: packing.pairs(codes.reshape(-1), ZERO[q.format]).reshape(-1, 1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": codebooks.CODEBOOKS[q.format],
    }
    if q.nested is not None:
        out[f"{name}.nested_absmax"] = q.nested
        out[f"{name}.nested_quant_map"] = codebooks.dynamic_map()
        info |= {
            "nested_blocksize": double.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(q.offset),
        }
    text = json.dumps(info).encode()
    out[f"{name}{STATE}{q.format}"] = np.frombuffer(text, np.uint8)
    return {k: np.asarray(v) for k, v in out.items()}


# --- GGUF's blocks -------------------------------------------------------------------

# What a weight's axes are: a Flax kernel, a linear weight as torch has it, a table.
KERNEL, TORCH, TABLE = "in out", "out in", "vocab features"
# The bytes of a block, and how many of them are float16.
BLOCK_BYTES = {"q4_0": (18, 1), "q4_1": (20, 2), "q8_0": (34, 1)}


def from_gguf(
    data: Any,
    type: Any,
    shape: Sequence[int],
    *,
    axes: str = KERNEL,
    stack: int = 0,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
) -> Quantized:
    """The weight that blocks of a GGUF file hold, code for code.

    data: its bytes, or uint8 (*stack, rows, bytes of a row) as gguf.GGUFReader has
        them.  Rows are outputs, or a table's.
    type: "Q4_0", "Q4_1" or "Q8_0"; gguf's own member of its enumeration will do.
    shape: of the weight.  axes: what its axes are: "in out", a Flax kernel; "out in",
        torch's; "vocab features", a table whose rows are looked up.  Inputs, outputs
        and features may each be several axes; then data must have its rows apart.
    stack: how many axes in front count matrices.
    dtype: of the weight.  compute_dtype: of products; default the wider of the
        activation's and the weight's.

    Raises ValueError for another type, sizes that do not fit together, or scales that
    are NaN or infinite.

    >>> import jpeft, numpy as np
    >>> block = np.float16([0.5]).tobytes() + np.arange(32, dtype=np.int8).tobytes()
    >>> q = jpeft.quant.from_gguf(block, "Q8_0", (32, 1))
    >>> jpeft.quant.dequantize(q)[:3, 0].tolist()
    [0.0, 0.5, 1.0]
    """
    check_floating("from_gguf", "dtype", dtype)
    check_float("from_gguf", compute_dtype, "compute_dtype")
    format = str(getattr(type, "name", type)).lower()
    if format not in BLOCK_BYTES:
        raise ValueError(
            f"from_gguf: type={shown(type)}: codes of {', '.join(BLOCK_BYTES)} can be "
            "taken over; decode another with gguf.quants.dequantize"
        )
    if axes not in (KERNEL, TORCH, TABLE):
        raise ValueError(
            f"from_gguf: axes={shown(axes)}: expected {KERNEL!r}, {TORCH!r} or "
            f"{TABLE!r}"
        )
    shape = tuple(shape)
    if not 0 <= stack <= len(shape) - 2 or 0 in shape:
        raise ValueError(
            f"from_gguf: shape={shape} with stack={stack}: expected two axes or more "
            "beside those of the stack, none of them empty"
        )
    raw = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if raw.dtype != np.uint8:
        raise ValueError(
            f"from_gguf: data is {raw.dtype}; expected bytes, or uint8 as they are in "
            "the file"
        )
    own, size = shape[stack:], BLOCK_BYTES[format][0]
    row = raw.shape[-1] if raw.ndim > 1 else 0
    if raw.ndim == 1 and len(own) == 2:
        row = own[0 if axes == KERNEL else 1] // GGUF_BLOCK * size
    n = gguf_inputs(own, axes, row // size * GGUF_BLOCK) if row else None
    rows = math.prod(own) // max(1, row // size * GGUF_BLOCK)
    if n is None or row % size or raw.size != math.prod(shape[:stack]) * rows * row:
        raise ValueError(
            f"from_gguf: {format.upper()} of shape {shape}, axes={axes!r}, needs rows "
            f"of whole blocks, each {GGUF_BLOCK} elements in {size} bytes; data has "
            f"{raw.size} bytes" + (f" in rows of {row}" if raw.ndim > 1 else "")
        )
    matrices = raw.reshape(-1, rows, row)
    arrays = [gguf_arrays(m, format, axes) for m in matrices]
    joined = {k: np.stack([x[k] for x in arrays]) for k in arrays[0]}
    leaf = gguf_leaf(joined, format, axes, shape, stack, n, dtype, compute_dtype)
    return jax.device_put(leaf)


def gguf_inputs(shape: Sequence[int], axes: str, n: int) -> int | None:
    """How many axes of a weight of this shape make up rows of n elements; None if they
    do not."""
    for k in range(1, len(shape)):
        ins = shape[:k] if axes == KERNEL else shape[len(shape) - k :]
        if math.prod(ins) == n and (axes != TABLE or k == len(shape) - 1):
            return k
    return None


def gguf_arrays(raw: np.ndarray, format: str, axes: str) -> dict[str, np.ndarray]:
    """Codes, scales (and least values) of rows of blocks, uint8 (rows, bytes of a row),
    laid out as a `Quantized` matrix or table has them."""
    size, floats = BLOCK_BYTES[format]
    rows = raw.shape[0]
    blocks = raw.reshape(rows, -1, size)
    halves = np.ascontiguousarray(blocks[..., : 2 * floats]).view(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError(
            "a scale is NaN or infinite, so that nothing of its block is left; the "
            "file is damaged"
        )
    codes = blocks[..., 2 * floats :]
    if FORMATS[format].packed:
        codes = np.concatenate([codes & 15, codes >> 4], -1)
        # In whole groups of two blocks; see `jpeft.formats.packing`.
        odd = codes.shape[1] % 2
        book = FORMATS[format].book
        zero = 0 if book is None else int(np.argmin(np.abs(book())))
        codes = np.pad(codes, ((0, 0), (0, odd), (0, 0)), constant_values=zero)
        codes = codes.reshape(rows, -1, 2, packing.GROUP // 2)
        codes = codes[:, :, 0] | codes[:, :, 1] << 4
    else:
        codes = codes.view(np.int8)
    found = {"codes": codes.reshape(rows, -1), "scales": halves[..., 0]}
    if floats == 2:
        found["zeros"] = halves[..., 1]
    return found if axes == TABLE else {k: x.T for k, x in found.items()}


def gguf_leaf(
    arrays: Mapping[str, np.ndarray],
    format: str,
    axes: str,
    shape: tuple[int, ...],
    stack: int,
    inputs: int,
    dtype: Any,
    compute_dtype: Any = None,
) -> Quantized:
    """A weight of these arrays of NumPy, which it keeps, each (matrices of the stack,
    rows, columns); `inputs` of its axes make up a row of blocks."""
    others = len(shape) - stack - inputs
    sides = "i" * inputs + "o" * others, "o" * others + "i" * inputs
    labels = "s" * stack + sides[0 if axes == KERNEL else 1]
    if axes == TABLE:
        labels = "s" * stack + "i" + "o" * inputs
    layout = arrangement(labels, EMBEDDING if axes == TABLE else LINEAR)
    sizes = [shape[k] for k in layout.order]
    after = layout.lead + layout.blocked
    before, beyond = sizes[: layout.lead], sizes[after:]
    laid = {k: x.reshape(*before, -1, *beyond) for k, x in arrays.items()}
    return Quantized(
        codes=laid["codes"],
        scales=laid["scales"],
        zeros=laid.get("zeros"),
        format=format,
        block_size=GGUF_BLOCK,
        order=layout.order,
        stack=layout.stack,
        lead=layout.lead,
        inner=tuple(sizes[layout.lead : after]),
        element=jnp.dtype(dtype).name,
        compute_dtype=None if compute_dtype is None else jnp.dtype(compute_dtype).name,
    )
