"""Libraries that are imported when something of them is first used.

Orbax alone takes an eighth of the time of `import jax, flax`, for a `save` that may
never come.  What is written where the import would be:

    if TYPE_CHECKING:
        import orbax.checkpoint as ocp
    else:
        ocp = Late("orbax.checkpoint")
"""

from __future__ import annotations

import importlib
from typing import Any


class Late:
    """Stands for a module of this name, whose attributes are its own."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
