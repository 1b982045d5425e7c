"""The device that programs are traced for, where it is said.

Apart from the kernels, which are imported when they are first needed: a new context
makes JAX forget every program that it has traced.  So does the import of Pallas for
TPUs, since JAX 0.11.
"""

import importlib

import jax

# "v4", "v5e" ... of a TPU; (major, minor) of a GPU; None where nothing was said.
generation = jax.make_user_context(None)
capability = jax.make_user_context(None)


def prepare() -> None:
    """Imports Pallas for TPUs, a tenth of the time of `import jax, flax`.

    For whoever makes a weight that kernels decode: so JAX forgets what it has traced
    before the first program with such a weight is traced, and not after it.
    """
    importlib.import_module("jax.experimental.pallas.tpu")
