"""Meshes: where adapters go, given where their base is; how operations are cut up.

    specs      the sharding of each array of a leaf, from that of its weight
    plan       an operation on quantised matrices, one shard a device
    explicit   where a product goes, on meshes whose axes are part of types
    adapted    whole adapted trees, and shardings declared for a TPU's compiler

The last stands above the other rooms, which stand on the first three.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jpeft.sharding.adapted import declare as declare
    from jpeft.sharding.adapted import shardings as shardings

__all__ = ["declare", "shardings"]


def __getattr__(name: str) -> Any:
    # Not at the import: the kernels import `plan`, and `adapted` imports the kernels.
    if name in __all__:
        return getattr(importlib.import_module("jpeft.sharding.adapted"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
