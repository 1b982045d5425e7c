"""4-bit matrices in NumPy, as the layout is defined and with no regard to speed."""

import numpy as np

from jpeft.formats.codebooks import CODEBOOKS, midpoints


def quantize(w, format, block):
    """(codes, scales)."""
    w, k = w.astype(np.float32), w.shape[0]
    starts = range(0, k, block)
    scales = np.stack([np.abs(w[i : i + block]).max(axis=0) for i in starts])
    inverse = np.float32(1) / np.maximum(scales, np.float32(1e-38))
    unit = np.clip(w * np.repeat(inverse, block, axis=0)[:k], -1, 1)
    if format == "int4":
        codes = (np.round(unit * np.float32(7)) + 8).astype(np.uint8)
    else:
        book = CODEBOOKS[format]
        order = np.argsort(book, kind="stable")
        codes = order[np.searchsorted(midpoints(book[order]), unit)].astype(np.uint8)
    low, high = codes.reshape(k // 64, 2, 32, -1).transpose(1, 0, 2, 3)
    return (low | high << 4).reshape(k // 2, -1), scales


def dequantize(codes, scales, book, block):
    """W in float32."""
    groups = codes.reshape(-1, 1, 32, codes.shape[1])
    codes = np.concatenate([groups & 15, groups >> 4], axis=1)
    codes = codes.reshape(-1, codes.shape[-1])
    return book[codes] * np.repeat(scales, block, axis=0)[: codes.shape[0]]
