"""Names shared by every floor: errors and warnings."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

PyTree = Any


class DensifyError(NotImplementedError):
    """An adapted weight reached an equation in which its delta has no cheap form.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> f = lambda params: jnp.sin(params["kernel"])
    >>> jpeft.adapt(f)(params)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    jpeft.types.DensifyError: kernel: LowRank (5, 3) reaches `sin` at ...
    """


class DensifyWarning(UserWarning):
    """`adapt(fn, materialize="allow")` used the full value of an adapted weight.

    >>> import warnings, jax, jax.numpy as jnp, jpeft
    >>> params = jpeft.lora(rank=2)(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> f = lambda params: jnp.sin(params["kernel"])
    >>> with warnings.catch_warnings(record=True, action="always") as given:
    ...     y = jpeft.adapt(f, materialize="allow")(params)
    >>> given[0].category.__name__
    'DensifyWarning'
    """


class CheckpointError(ValueError):
    """An adapter on disk is damaged, or does not belong to the given base.

    >>> import tempfile, jax, jax.numpy as jnp, jpeft
    >>> base, peft = {"kernel": jnp.ones((5, 3))}, jpeft.lora(rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     jpeft.save(f"{folder}/run", peft(jax.random.key(0), base), peft)
    ...     jpeft.load(f"{folder}/run", {"kernel": jnp.zeros((5, 3))})  # not its base
    Traceback (most recent call last):
        ...
    jpeft.types.CheckpointError: ...run: trained on another base: kernel has ...
    """


class DamagedError(CheckpointError):
    """The bits on disk are not those that were saved, or not all are there.

    >>> import pathlib, tempfile, jax, jax.numpy as jnp, jpeft
    >>> base, peft = {"kernel": jnp.ones((5, 3))}, jpeft.lora(rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
    ...     jpeft.save(f"{folder}/run", peft(jax.random.key(0), base), peft)
    ...     for file in pathlib.Path(folder).glob("run/*.json"):
    ...         _ = file.write_bytes(file.read_bytes()[:-9])
    ...     jpeft.load(f"{folder}/run", base)
    Traceback (most recent call last):
        ...
    jpeft.types.DamagedError: ...run/jpeft.json: damaged: it is no JSON...
    """


class CheckpointWarning(UserWarning):
    """A checkpoint was not used, or holds more than was asked for.

    To stop there instead of going on with an older step:

        with warnings.catch_warnings():
            warnings.simplefilter("error", jpeft.CheckpointWarning)
            params, state, metadata = manager.restore(base_params, state)
    """


class PromiseError(ValueError):
    """Something an adapter left to a later equation was never taken up.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> w = lambda *shape: {"kernel": jnp.ones(shape)}
    >>> attn = {n: w(8, 2, 4) for n in ("query", "key", "value")} | {"out": w(2, 4, 8)}
    >>> params = jpeft.prefix(length=5)(jax.random.key(0), attn)
    >>> keys = lambda params, x: jnp.tensordot(x, params["key"]["kernel"], 1)
    >>> jpeft.adapt(keys)(params, jnp.ones((2, 3, 8)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    jpeft.types.PromiseError: key/kernel: the prefix of this kernel reached no ...
    """


class DerivativeError(NotImplementedError):
    """The adapted function takes a derivative of itself that jpeft cannot follow.

    >>> import jax, jax.numpy as jnp, jpeft
    >>> slope = jax.grad(lambda x, params: jnp.sum(x @ params["kernel"]))
    >>> peft = jpeft.lora(rank=2, dropout=0.5)
    >>> params = peft(jax.random.key(0), {"kernel": jnp.ones((5, 3))})
    >>> f = jpeft.adapt(slope, key=jax.random.key(1))
    >>> f(jnp.ones((2, 5)), params)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    jpeft.types.DerivativeError: kernel: dropout in LowRank meets `dot_general` ...
    """
