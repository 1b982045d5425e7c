"""The device that programs are traced for, where it is said.

Apart from the kernels, which are imported when they are first needed: a new context
makes JAX forget every program that it has traced.  So does the import of Pallas for
TPUs, since JAX 0.11, which is why it is here.
"""

import jax
import jax.experimental.pallas.tpu  # noqa: F401

# "v4", "v5e" ... of a TPU; (major, minor) of a GPU; None where nothing was said.
generation = jax.make_user_context(None)
capability = jax.make_user_context(None)
