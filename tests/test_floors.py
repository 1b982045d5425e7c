"""Imports go down only, and one outside library is met in one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jpeft"
# The longest prefix counts.  A module may import modules of lower floors, and of its
# own floor only within its own folder.
FLOORS = {
    "jpeft": 13,
    "jpeft.types": 0,
    "jpeft.compat": 0,
    "jpeft.checks": 0,
    "jpeft.late": 0,
    "jpeft.conventions": 0,
    "jpeft.boxes": 1,
    "jpeft.finite": 1,
    "jpeft.serialization": 2,
    "jpeft.virtual": 1,
    "jpeft.formats": 1,
    "jpeft.sharding.plan": 1,
    "jpeft.kernels": 2,
    "jpeft.leaf": 3,
    "jpeft.sharding.specs": 4,
    "jpeft.tree": 5,
    "jpeft.adapt": 6,
    "jpeft.transform": 7,
    "jpeft.attach": 8,
    "jpeft.quant": 8,
    "jpeft.leaves": 9,
    "jpeft.methods": 10,
    "jpeft.objectives": 11,
    "jpeft.optim": 11,
    "jpeft.plot": 11,
    "jpeft.checkpoint": 11,
    "jpeft.sharding": 11,
    "jpeft.config": 11,
    "jpeft.hf": 12,
}
EVERYWHERE = {"jax", "jaxtyping", "numpy"}
ROOMS = {
    "flax": {"jpeft.boxes", "jpeft.serialization"},
    "optax": {"jpeft.optim"},
    "matplotlib": {"jpeft.plot"},
    "orbax": {"jpeft.checkpoint._orbax"},
    # What Orbax itself is made of: its paths and its store of arrays.
    "etils": {"jpeft.checkpoint.folder"},
    "tensorstore": {"jpeft.checkpoint._orbax"},
    "safetensors": {"jpeft.checkpoint._safetensors"},
    "gguf": {"jpeft.hf._gguf"},
    # The instructions that no Pallas primitive stands for.
    "jaxlib": {"jpeft.kernels.gpu"},
    "tomllib": {"jpeft.config"},
}
STANDARD = set(__import__("sys").stdlib_module_names) - set(ROOMS)


def name_of(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(f): f for f in sorted(ROOT.rglob("*.py"))}


def room(module):
    found = [p for p in FLOORS if module == p or module.startswith(p + ".")]
    return max(found, key=len)


def imports(file):
    """Every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for a in node.names:
                whole = f"{node.module}.{a.name}"
                yield whole if whole in FILES else node.module


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    for target in imports(FILES[module]):
        top = target.split(".")[0]
        if top == "jpeft":
            here, there = room(module), room(target)
            assert FLOORS[there] < FLOORS[here] or here == there, (module, target)
        elif top in ROOMS:
            assert any(module.startswith(r) for r in ROOMS[top]), (module, target)
        else:
            assert top in EVERYWHERE | STANDARD | {"__future__"}, (module, target)
        assert not target.startswith("jax._src"), (module, target)


def test_semi_public_jax_is_met_in_one_file():
    for module, file in FILES.items():
        if module != "jpeft.compat":
            for name in ("jax.extend", "version_info", "inspect.signature"):
                assert name not in file.read_text(), (module, name)
