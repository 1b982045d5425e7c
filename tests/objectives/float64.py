"""References in NumPy's float64: formulas as written, gradients by differences."""

import jax
import numpy as np

# Central differences of step h err by about h^2 f''' and by 1e-16 f / h: some 1e-9
# here, less than float32 rounds by.
STEP = 1e-5


def gradient(f, *args, at):
    """Of the scalar f(*args) for argument `at`."""
    args = [np.array(x, np.float64) for x in args]
    out = np.zeros_like(args[at])
    for k in np.ndindex(out.shape):
        ends = []
        for step in (STEP, -STEP):
            moved = [x.copy() for x in args]
            moved[at][k] += step
            ends.append(f(*moved))
        out[k] = (ends[0] - ends[1]) / (2 * STEP)
    return out


def assert_same(ours, reference, *args, rtol=1e-5, atol=1e-6):
    """The scalar and all its gradients.

    Float32 rounds each of some dozens of terms by 6e-8 of sizes near 1: so 1e-5 of the
    result, and 1e-6 where terms cancel.
    """
    numbers = tuple(range(len(args)))
    got, grads = jax.jit(jax.value_and_grad(ours, argnums=numbers))(*args)
    want = reference(*[np.asarray(x, np.float64) for x in args])
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
    for n, g in zip(numbers, grads, strict=True):
        np.testing.assert_allclose(
            g, gradient(reference, *args, at=n), rtol=rtol, atol=atol, err_msg=str(n)
        )


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def ragged(*shape, seed=0, least=1):
    """A bool mask whose rows have their own numbers of ones, from the left."""
    lengths = np.random.default_rng(seed).integers(least, shape[-1] + 1, shape[:-1])
    return np.arange(shape[-1]) < lengths[..., None]
