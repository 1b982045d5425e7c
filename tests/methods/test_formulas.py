"""Every method that changes a weight, beside its paper's formula in float64 NumPy.

The laws compare a method with itself, merged and not; here stands what it should be.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import METHODS, form, trained

import jpeft
from jpeft.leaf import is_leaf
from jpeft.tree.paths import slots

FORM = "scan_remat"  # all weights of layers are stacks, kernels (layers, in, out)


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


MERGING = [name for name, method in METHODS.items() if method.merges]


@pytest.mark.parametrize("name", MERGING)
def test_a_merged_weight_is_the_formula(name):
    tree, before = trained(name, FORM), dict(slots(form(FORM).params).items())
    merged, acts = dict(slots(jpeft.merge(tree)).items()), []
    for path, x in slots(tree).items():
        if not is_leaf(x):
            continue
        want = value(x, tree)
        # float32 sums of at most 14 terms
        atol = 16 * np.finfo(np.float32).eps * np.abs(want).max()
        np.testing.assert_allclose(array(merged[path]), want, rtol=0, atol=atol)
        acts.append(not np.allclose(want, array(before[path]), atol=0.01))
    # A gate may be closed.
    assert np.mean(acts) > 0.5


# alpha is 3 and the rank 2 wherever a method has both.
SCALES = dict.fromkeys(("lora", "adalora", "pissa", "dora", "loha", "lokr"), 1.5)
SCALES |= {"qlora": 1.5, "loftq": 1.5, "rslora": 3 / math.sqrt(2)}


@pytest.mark.parametrize("name", SCALES)
def test_a_delta_is_scaled_by_alpha_over_the_rank(name):
    found = [x.scale for x in every(trained(name, FORM)) if hasattr(x, "scale")]
    found = [x for x in found if isinstance(x, float)]
    assert found and found == pytest.approx([SCALES[name]] * len(found))


def test_a_bias_that_the_model_lacks_is_added():
    fn = lambda p, x: jnp.tanh(x @ p["kernel"])
    w, x = np.eye(7, 5) + 0.25, np.linspace(-1, 1, 14).reshape(2, 7)
    bias = np.linspace(-0.5, 0.5, 5)
    single = lambda x: jnp.asarray(x, jnp.float32)
    transform = jpeft.bitfit(where=None, add="linear")
    tree = transform(jax.random.key(0), {"kernel": single(w)})
    tree = {"kernel": tree["kernel"].replace(bias=single(bias))}
    got = jax.jit(jpeft.adapt(fn))(tree, single(x))
    np.testing.assert_allclose(got, np.tanh(x @ w + bias), rtol=0, atol=1e-6)
