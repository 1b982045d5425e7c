"""A method is in every table, or a test says what is missing."""

import tomllib
from pathlib import Path

import pytest
from every_method import FORMULAS, METHODS

import jpeft
from jpeft import transform
from jpeft.leaf import KINDS, AdaptedLeaf

ROOT = Path(__file__).parents[2]
# Made of other methods, or of no use without one.
WRAPPERS = {"chain", "gated", "quantize"}
CALLED = {"p_tuning_v2", *transform.METHODS} - WRAPPERS


def made(peft):
    """Names of the methods in a transform."""
    inner = getattr(peft, "transform", None)
    return {peft.name, *(n for t in peft.parts() if t is not peft for n in made(t))} | (
        set() if inner is None else made(inner)
    )


def test_each_meets_the_laws():
    assert CALLED <= set().union(*(made(m.make()) for m in METHODS.values()))


@pytest.mark.parametrize("method", sorted(CALLED))
def test_each_is_at_the_roof_in_the_documents_and_has_a_recipe(method):
    assert callable(getattr(jpeft, method))
    for page in ("README.md", "docs/methods.md"):
        assert f"`{method}(" in (ROOT / page).read_text(), page
    assert f"::: jpeft.{method}\n" in (ROOT / "docs/api.md").read_text()
    used = set()
    for file in (ROOT / "configs").rglob("*.toml"):
        parts = tomllib.loads(file.read_text()).get("peft", [])
        used |= {p["method"] for p in (parts if isinstance(parts, list) else [parts])}
    assert method in used


# What VeRA's leaves are in a call, and what `jpeft.sparsify` makes; see their tests.
MADE_OF_OTHERS = {"SharedLowRank", "SparseDelta"}


def test_each_leaf_that_changes_a_weight_has_a_formula():
    own = {n: k for n, k in KINDS.items() if k.__module__.startswith("jpeft.methods")}
    changes = {n for n, k in own.items() if k.effective is not AdaptedLeaf.effective}
    assert changes - MADE_OF_OTHERS <= set(FORMULAS)
