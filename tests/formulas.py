"""What each leaf makes of a weight: its paper's formula, in float64 NumPy.

Of kernels (*stack, in, out), as those of Linen's layers are.
"""

import numpy as np

from jpeft.leaf import is_leaf
from jpeft.tree.paths import slots


def array(x):
    return np.asarray(x, np.float64)


def kronecker(one, two):
    """Of every matrix of a stack."""
    product = np.einsum("...ab,...cd->...acbd", one, two)
    *stack, a, c, b, d = product.shape
    return product.reshape(*stack, a * c, b * d)


def factor(leaf, name):
    whole = getattr(leaf, name)
    if whole is not None:
        return array(whole)
    return array(getattr(leaf, f"{name}_a")) @ array(getattr(leaf, f"{name}_b"))


def gate(alpha):
    """Hard concrete, stretched from -1.5 to 1.5 as in the paper, without chance."""
    return np.clip(3 / (1 + np.exp(-array(alpha))) - 1.5, 0, 1)


def dora(x, w):
    turned = w + x.scale * array(x.a) @ array(x.b)
    length = np.sqrt(np.sum(turned**2, axis=-2, keepdims=True))
    return turned / length * array(x.m)[..., None, :]


# Class of a leaf -> (the leaf, its base's value) -> W'.  Of `tree` what others lend.
FORMULAS = {
    "LowRank": lambda x, w, tree: w + x.scale * array(x.a) @ array(x.b),
    "ShiftedLowRank": lambda x, w, tree: (
        w + x.scale * (array(x.a) @ array(x.b) - array(x.a0) @ array(x.b0))
    ),
    "Triplets": lambda x, w, tree: (
        w + x.scale * (array(x.p) * array(x.lam)[..., None, :]) @ array(x.q)
    ),
    "DoRALeaf": lambda x, w, tree: dora(x, w),
    "Hadamard": lambda x, w, tree: (
        w + x.scale * (array(x.a1) @ array(x.b1)) * (array(x.a2) @ array(x.b2))
    ),
    "Kronecker": lambda x, w, tree: (
        w + x.scale * kronecker(factor(x, "w1"), factor(x, "w2"))
    ),
    "VeRALeaf": lambda x, w, tree: w + vera(x, w, tree),
    "ScaledOutput": lambda x, w, tree: w * array(x.scale)[..., None, :],
    "ScaledInput": lambda x, w, tree: w * array(x.scale)[..., :, None],
    "ScaledBias": lambda x, w, tree: w * lent(x, tree),
    "Delta": lambda x, w, tree: w + array(x.delta),
    "Whole": lambda x, w, tree: array(x.value),
    "GatedDelta": lambda x, w, tree: w + gate(x.alpha) * array(x.delta),
    "GroupedDelta": lambda x, w, tree: (
        w + gate(x.alpha) * gate(x.group) * array(x.delta)
    ),
    # What the codes stand for is pinned in tests/formats.
    "Quantized": lambda x, w, tree: array(x.materialize(np.float32)),
}


def vera(x, w, tree):
    [shared] = [y for y in every(tree) if getattr(y, "shared_a", None) is not None]
    a, b = array(shared.shared_a), array(shared.shared_b)
    inputs, outputs = w.shape[-2:]
    a = a[:inputs] * array(x.d)[..., None, :]
    return a @ (b[:, :outputs] * array(x.b)[..., None, :])


def lent(x, tree):
    scaled = [y for y in every(tree) if type(y).__name__ == "ScaledOutput"]
    [scale] = [y.scale for y in scaled if y.link == x.link]
    return array(scale)


def every(tree):
    """The leaves, and those that are their bases."""
    for x in slots(tree).values:
        while is_leaf(x):
            yield x
            x = getattr(x, "base", None)


def value(x, tree):
    if not is_leaf(x):
        return array(x)
    base = None if type(x).__name__ == "Quantized" else value(x.base, tree)
    return FORMULAS[type(x).__name__](x, base, tree)
