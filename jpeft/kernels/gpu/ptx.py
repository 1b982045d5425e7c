"""What `few_rows` says to the GPU in its own terms: arithmetic, loads and stores,
tensor cores.

Each is an operation of MLIR or one instruction of PTX, inline, where neither Pallas nor
MLIR has a word for it or LLVM would take it apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    return ir.IntegerType.get_signless(64)


def word(value: int) -> Any:
    return mgpu.c(value - 2**32 if value >= 2**31 else value, i32())


def real(value: float) -> Any:
    return mgpu.c(value, ir.F32Type.get())


def _value(x: Any) -> Any:
    return word(x) if isinstance(x, int) else x


def add(a: Any, b: Any) -> Any:
    return arith.addi(_value(a), _value(b))


def mul(a: Any, b: Any) -> Any:
    return arith.muli(_value(a), _value(b))


def and_(a: Any, b: Any) -> Any:
    return arith.andi(_value(a), _value(b))


def shl(a: Any, b: Any) -> Any:
    return arith.shli(_value(a), _value(b))


def shr(a: Any, b: Any) -> Any:
    return arith.shrui(_value(a), _value(b))


def and_or(a: Any, mask: int, b: Any) -> Any:
    """a & mask | b, in one instruction, which LLVM would take apart."""
    text = "lop3.b32 $0, $1, $2, $3, 0xea;"
    return asm(i32(), [a, word(mask), b], text, "=r,r,n,r", False)


def offset(row: Any, stride: int, rest: Any) -> Any:
    """row * stride + rest, in 64 bits."""
    row, rest = (arith.extui(i64(), x) for x in (row, rest))
    return arith.addi(arith.muli(row, mgpu.c(stride, i64())), rest)


def after(address: Any, count: int) -> Any:
    return arith.addi(address, mgpu.c(count, i64()))


def as_float(x: Any) -> Any:
    return arith.bitcast(ir.F32Type.get(), x)


def address(ref: Any) -> Any:
    """Of an array: 64 bits in global memory, 32 in shared memory."""
    kind = i32() if mgpu.utils.is_smem_ref(ref) else i64()
    return llvm.ptrtoint(kind, mgpu.utils.memref_ptr(ref))


def asm(
    result: Any, operands: Sequence[Any], text: str, constraints: str, effects: bool
) -> Any:
    return llvm.inline_asm(
        result,
        list(operands),
        text,
        constraints,
        has_side_effects=effects,
        asm_dialect=0,
    )


def load(address: Any, words: int, *, stream: bool = False) -> list[Any]:
    """Words of four bytes from global memory, which nobody writes.

    stream: what is read once should not drive out what is read again.
    """
    keep = ".L1::no_allocate" if stream else ""
    names = ", ".join(f"${i}" for i in range(words))
    vector, names = (f".v{words}", f"{{{names}}}") if words > 1 else ("", names)
    text = f"ld.global.nc{keep}{vector}.b32 {names}, [${words}];"
    kind = i32() if words == 1 else llvm.StructType.get_literal([i32()] * words)
    # With no effects LLVM would be free to move it, next to its use.
    read = asm(kind, [address], text, "=r," * words + "l", True)
    if words == 1:
        return [read]
    return [llvm.extractvalue(i32(), read, [i]) for i in range(words)]


def store(address: Any, value: Any, dtype: Any) -> None:
    void = ir.Type.parse("!llvm.void")
    if jnp.dtype(dtype) == jnp.float32:
        asm(void, [address, value], "st.global.b32 [$0], $1;", "l,f", True)
        return
    kinds = {"bfloat16": "bf16", "float16": "f16"}
    packed = pack(real(0.0), value, kinds[jnp.dtype(dtype).name])
    short = arith.trunci(ir.IntegerType.get_signless(16), packed)
    asm(void, [address, short], "st.global.b16 [$0], $1;", "l,h", True)


def load_shared(address: Any, kind: Any) -> Any:
    to = "=f" if isinstance(kind, ir.F32Type) else "=r"
    return asm(kind, [address], "ld.shared.b32 $0, [$1];", f"{to},r", True)


def store_shared(address: Any, value: Any) -> None:
    void = ir.Type.parse("!llvm.void")
    asm(void, [address, value], "st.shared.b32 [$0], $1;", "r,f", True)


def barrier() -> None:
    """Of all warps of a block."""
    asm(ir.Type.parse("!llvm.void"), [], "bar.sync 0;", "~{memory}", True)


def pack(high: Any, low: Any, kind: str = "bf16") -> Any:
    text = f"cvt.rn.{kind}x2.f32 $0, $1, $2;"
    return asm(i32(), [high, low], text, "=r,f,f", False)


def halves(a: Any, b: Any, half: int) -> Any:
    """The lower (0) or upper (1) halves of two words, a's below b's."""
    text = f"prmt.b32 $0, $1, $2, {('0x5410', '0x7632')[half]};"
    return asm(i32(), [a, b], text, "=r,r,r", False)


def fma(a: Any, b: Any, c: Any) -> Any:
    text = "fma.rn.f32 $0, $1, $2, $3;"
    return asm(ir.F32Type.get(), [a, b, c], text, "=f,f,f,f", False)


def mma(left: Sequence[Any], right: Sequence[Any], sums: Sequence[Any]) -> list[Any]:
    """left @ right + sums, 16 x 16 by 16 x 8, in bfloat16 with float32 sums."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    four = llvm.StructType.get_literal([ir.F32Type.get()] * 4)
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    out = asm(four, [*left, *right, *sums], text, constraints, False)
    return [llvm.extractvalue(ir.F32Type.get(), out, [i]) for i in range(4)]
