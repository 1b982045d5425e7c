"""What leaves make of a weight: the formulas of the papers, in float64 NumPy.

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


def dora(x, w, tree):
    turned = w + x.scale * array(x.a) @ array(x.b)
    length = np.sqrt(np.sum(turned**2, axis=-2, keepdims=True))
    return turned / length * array(x.m)[..., None, :]


def low_rank(x, w, tree):
    return w + x.scale * array(x.a) @ array(x.b)


def shifted(x, w, tree):
    return w + x.scale * (array(x.a) @ array(x.b) - array(x.a0) @ array(x.b0))


def triplets(x, w, tree):
    return w + x.scale * (array(x.p) * array(x.lam)[..., None, :]) @ array(x.q)


def hadamard(x, w, tree):
    one, two = array(x.a1) @ array(x.b1), array(x.a2) @ array(x.b2)
    return w + x.scale * one * two


def hira(x, w, tree):
    return w * (1 + x.scale * array(x.a) @ array(x.b))


def lokr(x, w, tree):
    return w + x.scale * kronecker(factor(x, "w1"), factor(x, "w2"))


def added(x, w, tree):
    return w + array(x.delta)


def gated(x, w, tree):
    return w + gate(x.alpha) * array(x.delta)


def gated_in_groups(x, w, tree):
    return w + gate(x.alpha) * gate(x.group) * array(x.delta)


def vera(x, w, tree):
    [shared] = [y for y in every(tree) if getattr(y, "shared_a", None) is not None]
    a, b = array(shared.shared_a), array(shared.shared_b)
    inputs, outputs = w.shape[-2:]
    a = a[:inputs] * array(x.d)[..., None, :]
    return w + a @ (b[:, :outputs] * array(x.b)[..., None, :])


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


def value(x, tree, table):
    """table: class of a leaf -> its formula, (the leaf, its base's value, the tree, of
    which what others lend)."""
    if not is_leaf(x):
        return array(x)
    if type(x).__name__ == "Quantized":  # tests/formats pin what codes stand for
        return array(x.materialize(np.float32))
    return table[type(x).__name__](x, value(x.base, tree, table), tree)
