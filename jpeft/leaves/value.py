"""`MadeInUse`: the leaf of a method whose delta has no cheaper form than the weight.

    y = f(x, W')      W' = effective(W)

W' is made for the equation that uses it, and once more for that equation's gradient, so
that nothing of W's size is kept between the two.  The formula is all that a method has
to write; what moves the weight about moves the method's arrays.
"""

from __future__ import annotations

from typing import Any

import jax

from jpeft.adapt.equations import Consume, Contract, Verb, smaller_as_value
from jpeft.adapt.interpreter import Interpreter, acts
from jpeft.adapt.labels import Labelled
from jpeft.leaf import adapted_leaf, has_key, is_leaf, layers, merges, title


@adapted_leaf
class MadeInUse(Labelled):
    """A leaf whose `effective` weight is made where a model uses it."""


@acts(Consume, kind=MadeInUse)
def _use(it: Interpreter, verb: Verb, ins: list[Any]) -> Any:
    leaves = [k for k, x in enumerate(ins) if is_leaf(x)]
    if len(leaves) > 1:
        two = isinstance(verb, Contract)
        return it.bind(verb.eqn, smaller_as_value(ins)) if two else None
    side = leaves[0]
    leaf = ins[side]
    for below in layers(leaf.base):
        if not merges(below) or has_key(below):
            why = (
                f"where its weight is made and the {title(below)} below acts on "
                "activations; apply that one last"
            )
            return it.densify(leaf, verb.eqn, why)

    def f(leaf: Any, others: list[Any]) -> Any:
        whole = [*others[:side], leaf.materialize(), *others[side:]]
        return it.native(verb.eqn)(*whole)

    others = [*ins[:side], *ins[side + 1 :]]
    return jax.checkpoint(f, prevent_cse=False)(leaf.replace(key=None), others)
