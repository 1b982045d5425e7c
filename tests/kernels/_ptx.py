"""Runs PTX, NVIDIA's assembly, on a CPU: what a kernel computes, without a GPU.

All threads of a block step together, each a column of NumPy arrays; blocks follow each
other.  So it shows wrong numbers and accesses outside the operands, and no race.  Only
what our kernels use is there: anything else raises NotImplementedError.  Reciprocals
are rounded where a GPU's `rcp.approx` and `div.full` may be off by one or two units.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
WIDTHS = {"%p": 1, "%rs": 16, "%r": 32, "%f": 32, "%rd": 64}
WARP = 32


def launch(ptx: str, grid: Sequence[int], *operands: np.ndarray) -> list[np.ndarray]:
    """The kernel's operands, results included, as they are after it ran."""
    starts, end = [], 256
    for x in operands:
        starts.append(end)
        end += -(-x.nbytes // 256) * 256 + 256
    # Strange bytes between operands and in results, to be seen if they get anywhere.
    memory = np.full(end, 0xCD, np.uint8)
    for start, x in zip(starts, operands, strict=True):
        memory[start : start + x.nbytes] = np.frombuffer(x.tobytes(), np.uint8)
    kernel = Kernel(ptx)
    pointers = starts + [0] * (len(kernel.parameters) - len(starts))
    for place in np.ndindex(*reversed(tuple(grid))):
        block = (*reversed(place), 0, 0)[:3]
        Block(
            kernel, memory, dict(zip(kernel.parameters, pointers, strict=True)), block
        )
    cut = lambda start, x: memory[start : start + x.nbytes].view(x.dtype)
    return [
        cut(start, x).reshape(x.shape)
        for start, x in zip(starts, operands, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    text: str
    predicate: str | None
    negated: bool
    words: list[str]  # "ld.global.v2.b32", apart
    arguments: list[str]


class Kernel:
    def __init__(self, ptx: str):
        head, body = ptx[ptx.index(".entry") :].split("{", 1)
        self.parameters = re.findall(r"\.param\s[^,)]*?(\w+)\s*[,)\n]", head)
        self.threads = int(re.search(r"\.(?:reqn|maxn)tid (\d+)", head)[1])
        body = re.sub(r"//.*", "", body[: body.rindex("}")])
        body = re.sub(r"^\s*\.(loc|file|section|pragma)\b.*$", "", body, flags=re.M)
        body = re.sub(r"\.(reg|shared) [^;]*;", "", body)
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for text in body.split(";"):
            text = " ".join(text.split()).lstrip("{} ")
            while found := re.match(r"(\$?\w+):\s*", text):
                self.labels[found[1]] = len(self.instructions)
                text = text[found.end() :].lstrip("{} ")
            if not text:
                continue
            not_, predicate, name, rest = re.match(
                r"(?:@(!?)(%\w+) )?(\S+) ?(.*)", text
            ).groups()
            arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*", rest)
            self.instructions.append(
                Instruction(
                    text,
                    predicate,
                    bool(not_),
                    name.split("."),
                    [a.strip() for a in arguments],
                )
            )


class Block:
    def __init__(
        self,
        kernel: Kernel,
        memory: np.ndarray,
        pointers: dict[str, int],
        place: tuple[int, ...],
    ):
        self.memory, self.shared = memory, np.zeros(228 * 1024, np.uint8)
        self.pointers, self.place, self.threads = pointers, place, kernel.threads
        self.lane = np.arange(self.threads) % WARP
        self.registers: dict[str, np.ndarray] = {}
        at = 0
        while at < len(kernel.instructions):
            do = kernel.instructions[at]
            at += 1
            self.on = np.ones(self.threads, bool)
            if do.predicate:
                self.on = self.registers[do.predicate] ^ do.negated
            if do.words[0] in ("bra", "ret"):
                if self.on.all() and do.words[0] == "ret":
                    return
                if self.on.all():
                    at = kernel.labels[do.arguments[0]]
                elif self.on.any():
                    raise NotImplementedError(f"threads part: {do.text}")
                continue
            try:
                self.step(do.words, do.arguments)
            except Exception as error:
                raise RuntimeError(f"{do.text}: {error!r}") from error

    # --- registers and memory

    def value(self, name: str, bits: int, kind: str = "u") -> np.ndarray:
        n = self.threads
        if name in self.registers:
            x = self.registers[name]
        elif name == "%tid.x":
            x = np.arange(n, dtype=np.uint32)
        elif name.startswith("%tid"):
            x = np.zeros(n, np.uint32)
        elif name == "%laneid":
            x = self.lane.astype(np.uint32)
        elif name.startswith("%ctaid"):
            x = np.full(n, self.place["xyz".index(name[-1])], np.uint32)
        elif name.startswith("0f"):
            x = np.full(n, int(name[2:], 16), np.uint32)
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", name):
            x = np.full(n, int(name.rstrip("U"), 0) % 2**64, np.uint64)
        elif re.match(r"[A-Za-z_]", name):
            x = np.zeros(n, np.uint64)  # the one array in shared memory
        else:
            raise KeyError(name)
        x = x.astype(UNSIGNED[bits])
        if kind == "f":
            return x.view({32: np.float32, 16: np.float16}[bits])
        return x.view(SIGNED[bits]) if kind == "s" else x

    def put(self, name: str, x: np.ndarray) -> None:
        x = np.broadcast_to(x, (self.threads,))
        if x.dtype != bool:
            x = np.ascontiguousarray(x).view(UNSIGNED[8 * x.dtype.itemsize])
            x = x.astype(UNSIGNED[WIDTHS[re.match(r"%[a-z]+", name)[0]]])
        old = self.registers.get(name, np.zeros_like(x))
        self.registers[name] = np.where(self.on, x, old)

    def addresses(self, argument: str) -> np.ndarray:
        name, offset = re.fullmatch(
            r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+)\s*)?\]", argument
        ).groups()
        return self.value(name, 64).astype(np.int64) + int(offset or 0)

    def bytes_of(self, words: list[str]) -> np.ndarray:
        return self.shared if "shared" in words else self.memory

    # --- instructions

    def step(self, words: list[str], arguments: list[str]) -> None:
        name, kind = words[0], words[-1]
        if name in ("bar", "fence", "griddepcontrol"):
            return  # the threads are in step
        special: Callable[..., None] | None = getattr(self, f"_{name}", None)
        if special is not None:
            special(words, arguments)
            return
        bits = int(re.search(r"\d+", kind)[0]) if kind != "pred" else 1
        signed = kind[0] if kind[0] in "sf" else "u"
        if kind == "pred":
            get = lambda i: self.registers[arguments[i]]
        else:
            get = lambda i, as_=signed: self.value(arguments[i], bits, as_)
        plain = lambda i: get(i, "u") if signed == "s" else get(i)
        count = lambda: self.value(arguments[2], 32)
        shift = lambda: np.minimum(count(), bits - 1).astype(get(1).dtype)
        results: dict[str, Callable[[], np.ndarray]] = {
            "and": lambda: get(1) & get(2),
            "or": lambda: get(1) | get(2),
            "xor": lambda: get(1) ^ get(2),
            "not": lambda: ~get(1),
            "add": lambda: plain(1) + plain(2),
            "sub": lambda: plain(1) - plain(2),
            "mul": lambda: plain(1) * plain(2),
            "mad": lambda: plain(1) * plain(2) + plain(3),
            "neg": lambda: -get(1) if signed == "f" else 0 - plain(1),
            "abs": lambda: np.abs(get(1)),
            "div": lambda: get(1) / get(2),
            "rcp": lambda: np.float32(1) / get(1),
            # One rounding: a product of float32 is exact in float64.
            "fma": lambda: (get(1).astype(np.float64) * get(2) + get(3)).astype(
                np.float32
            ),
            "shl": lambda: np.where(count() < bits, get(1) << shift(), 0 * get(1)),
            "shr": lambda: np.where(
                (count() < bits) | (signed == "s"), get(1) >> shift(), 0 * get(1)
            ),
            "max": lambda: (np.maximum if "NaN" in words else np.fmax)(get(1), get(2)),
            "min": lambda: (np.minimum if "NaN" in words else np.fmin)(get(1), get(2)),
        }
        if "wide" in words:
            twice = lambda i: self.value(arguments[i], bits, signed).astype(
                (SIGNED if signed == "s" else UNSIGNED)[2 * bits]
            )
            self.put(arguments[0], twice(1) * twice(2))
        elif name in results:
            with np.errstate(all="ignore"):
                self.put(arguments[0], results[name]())
        else:
            raise NotImplementedError(name)

    def _elect(self, words: list[str], arguments: list[str]) -> None:
        lane, chosen = arguments[0].split("|")
        self.put(lane, np.uint32(0))
        self.put(chosen, self.lane == 0)

    def _cvta(self, words: list[str], arguments: list[str]) -> None:
        self.put(arguments[0], self.value(arguments[1], 64))

    def _ld(self, words: list[str], arguments: list[str]) -> None:
        if words[1].startswith("param"):
            pointer = self.pointers[arguments[1].strip("[] ")]
            return self.put(arguments[0], np.uint64(pointer))
        size, memory = int(words[-1][1:]) // 8, self.bytes_of(words)
        start = np.where(self.on, self.addresses(arguments[1]), 0)
        for i, name in enumerate(_names(arguments[0])):
            at = start[:, None] + i * size + np.arange(size)
            x = np.ascontiguousarray(memory[at]).view(UNSIGNED[8 * size])[:, 0]
            self.put(name, x)

    def _st(self, words: list[str], arguments: list[str]) -> None:
        size, memory = int(words[-1][1:]) // 8, self.bytes_of(words)
        start = self.addresses(arguments[0])[self.on]
        for i, name in enumerate(_names(arguments[1])):
            x = self.value(name, 8 * size)[self.on]
            at = start[:, None] + i * size + np.arange(size)
            memory[at] = x[:, None].copy().view(np.uint8)

    def _mov(self, words: list[str], arguments: list[str]) -> None:
        to, from_ = arguments
        if words[-1] == "pred":
            x = self.registers.get(from_)
            return self.put(to, np.bool_(int(from_)) if x is None else x)
        bits = int(words[-1][1:])
        if to.startswith("{"):
            x, parts = self.value(from_, bits), _names(to)
            part = bits // len(parts)
            for i, name in enumerate(parts):
                piece = x >> UNSIGNED[bits](i * part)
                self.put(name, piece.astype(UNSIGNED[part]))
        elif from_.startswith("{"):
            parts = _names(from_)
            x, part = np.zeros(self.threads, UNSIGNED[bits]), bits // len(parts)
            for i, name in enumerate(parts):
                piece = self.value(name, part).astype(UNSIGNED[bits])
                x |= piece << UNSIGNED[bits](i * part)
            self.put(to, x)
        else:
            self.put(to, self.value(from_, bits))

    def _bfe(self, words: list[str], arguments: list[str]) -> None:
        start, size = int(arguments[2], 0), int(arguments[3], 0)
        x = self.value(arguments[1], 32) << np.uint32(32 - start - size)
        x = x.view(np.int32) if words[-1][0] == "s" else x
        self.put(arguments[0], x >> x.dtype.type(32 - size))

    def _lop3(self, words: list[str], arguments: list[str]) -> None:
        """Any function of three bits: bit 4 a + 2 b + c of the last argument."""
        a, b, c = (self.value(x, 32) for x in arguments[1:4])
        table, out = int(arguments[4], 0), np.zeros(self.threads, np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (
                    (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
                )
        self.put(arguments[0], out)

    def _prmt(self, words: list[str], arguments: list[str]) -> None:
        both = [
            self.value(a, 32)[:, None].copy().view(np.uint8) for a in arguments[1:3]
        ]
        eight, choice = np.concatenate(both, axis=1), self.value(arguments[3], 32)
        out = np.zeros((self.threads, 4), np.uint8)
        for i in range(4):
            nibble = (choice >> np.uint32(4 * i)) & 15
            byte = eight[np.arange(self.threads), nibble & 7]
            out[:, i] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
        self.put(arguments[0], out.view(np.uint32)[:, 0])

    def _setp(self, words: list[str], arguments: list[str]) -> None:
        kind = words[-1][0] if words[-1][0] in "sf" else "u"
        x, y = (self.value(a, int(words[-1][1:]), kind) for a in arguments[1:3])
        found = {
            "gt": np.greater,
            "lt": np.less,
            "ge": np.greater_equal,
            "le": np.less_equal,
            "eq": np.equal,
            "ne": np.not_equal,
        }[words[1]](x, y)
        self.put(arguments[0], found)

    def _selp(self, words: list[str], arguments: list[str]) -> None:
        x, y = (self.value(a, int(words[-1][1:])) for a in arguments[1:3])
        self.put(arguments[0], np.where(self.registers[arguments[3]], x, y))

    def _cvt(self, words: list[str], arguments: list[str]) -> None:
        to, from_ = words[-2:]
        if from_ == "f32" and to in ("bf16x2", "f16x2"):
            narrow = _to_bf16 if to == "bf16x2" else _to_f16
            high, low = (narrow(self.value(a, 32, "f")) for a in arguments[1:])
            x = (high.astype(np.uint32) << np.uint32(16)) | low
        elif to == "f32" and from_ in ("bf16", "f16"):
            x = _WIDEN[from_](self.value(arguments[1], 16))
        elif to[0] in "us" and from_[0] in "us":
            x = self.value(arguments[1], int(from_[1:]), from_[0])
            x = x.astype((SIGNED if from_[0] == "s" else UNSIGNED)[int(to[1:])])
        else:
            raise NotImplementedError(f"{from_} to {to}")
        self.put(arguments[0], x)

    def _shfl(self, words: list[str], arguments: list[str]) -> None:
        x, by = self.value(arguments[1], 32), self.value(arguments[2], 32)
        lane = {"idx": by & 31, "bfly": self.lane ^ by}[words[2]] % WARP
        warp = np.arange(self.threads) // WARP * WARP
        self.put(arguments[0], x[warp + lane.astype(np.int64)])

    def _ldmatrix(self, words: list[str], arguments: list[str]) -> None:
        at = self.addresses(arguments[1]).reshape(-1, WARP)
        for i, name in enumerate(_names(arguments[0])):
            rows = at[:, 8 * i : 8 * i + 8, None] + np.arange(16)
            matrix = np.ascontiguousarray(self.shared[rows]).view(np.uint16)
            if "trans" in words:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            self.put(name, matrix.view(np.uint32).reshape(-1))

    def _stmatrix(self, words: list[str], arguments: list[str]) -> None:
        at = self.addresses(arguments[0]).reshape(-1, WARP)
        for i, name in enumerate(_names(arguments[1])):
            x = self.value(name, 32).reshape(-1, 8, 4).copy().view(np.uint16)
            if "trans" in words:
                x = np.ascontiguousarray(x.transpose(0, 2, 1))
            self.shared[at[:, 8 * i : 8 * i + 8, None] + np.arange(16)] = x.view(
                np.uint8
            )

    def _mma(self, words: list[str], arguments: list[str]) -> None:
        """D = A @ B + C, with fragments as in the PTX manual, 9.7.14 (m16n8k16)."""
        if words[3] != "m16n8k16" or words[-2] not in _WIDEN:
            raise NotImplementedError(".".join(words))
        warps, row, pair = (
            self.threads // WARP,
            self.lane[:WARP] // 4,
            self.lane[:WARP] % 4,
        )
        halves = lambda name: _WIDEN[words[-2]](
            self.value(name, 32).copy().view(np.uint16)
        ).reshape(warps, WARP, 2)
        a = np.zeros((warps, 16, 16))
        b, c = np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
        for e in range(2):
            for i, name in enumerate(_names(arguments[1])):
                a[:, row + i % 2 * 8, 2 * pair + e + i // 2 * 8] = halves(name)[..., e]
            for i, name in enumerate(_names(arguments[2])):
                b[:, 2 * pair + e + i * 8, row] = halves(name)[..., e]
        at = lambda i: (slice(None), row + i // 2 * 8, 2 * pair + i % 2)
        for i, name in enumerate(_names(arguments[3])):
            c[at(i)] = self.value(name, 32, "f").reshape(warps, WARP)
        d = (a @ b + c).astype(np.float32)
        for i, name in enumerate(_names(arguments[0])):
            self.put(name, d[at(i)].reshape(-1))


def _names(argument: str) -> list[str]:
    return [name.strip() for name in argument.strip("{} ").split(",")]


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> (
        np.uint64(16)
    )
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


_WIDEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32),
    "f16": lambda x: x.view(np.float16).astype(np.float32),
}
