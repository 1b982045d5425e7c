"""Imports go down only, one outside library is met in one room, and the names of
primitives in one file."""

import ast
import sys
from pathlib import Path

import jax  # noqa: F401  whose modules are looked through
import jax.extend.core as jex
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
    "jpeft.sharding.explicit": 2,
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
    "jpeft.extend": 11,
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
STANDARD = set(sys.stdlib_module_names) - set(ROOMS)


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


# --- what a primitive is called ------------------------------------------------------

# The only files in which a primitive's name is a string.
NAMED_IN = {"jpeft.adapt.equations", "jpeft.adapt.control", "jpeft.compat"}


@pytest.fixture(scope="module")
def primitives():
    """The names of all that JAX has."""
    modules = [m for n, m in sorted(sys.modules.items()) if n.startswith("jax.")]
    values = [x for m in modules for x in vars(m).values()]
    names = frozenset(x.name for x in values if isinstance(x, jex.Primitive))
    assert {"add", "jit", "scatter-add", "random_bits", "pvary"} <= names
    return names


def sees_equations(tree):
    """Whether a file holds equations: what it compares with "gather" may be one."""
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ("primitive", "eqns"))
        or (isinstance(node, ast.ImportFrom) and node.module.startswith("jpeft.adapt"))
        for node in ast.walk(tree)
    )


def words_of(node):
    """The strings that an expression lists: one alone, in a collection, split apart."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return [w for x in node.elts for w in words_of(x) or [None]]
    if isinstance(node, ast.Dict):
        return [w for x in node.keys for w in words_of(x) or [None]]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "split":
            return [w for text in words_of(node.func.value) for w in text.split()]
        if node.func.attr in ("startswith", "endswith"):
            return [w for x in node.args for w in words_of(x)]
    return []


def primitives_named(source, names):
    """(line, name) of each primitive that a file compares with, or lists among others
    of its kind."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if sees_equations(tree) else ():
        if isinstance(node, ast.Compare):
            words = [w for x in (node.left, *node.comparators) for w in words_of(x)]
            found = [w for w in words if w in names]
        elif isinstance(node, ast.MatchValue):
            found = [w for w in words_of(node.value) if w in names]
        else:
            value = node.value if isinstance(node, ast.Assign) else node
            listed = not isinstance(value, ast.Constant) or value is not node
            words = words_of(value) if listed else []
            found = words if {*words} <= names else []
        yield from ((node.lineno, w) for w in found)


@pytest.mark.parametrize("module", FILES)
def test_a_primitive_is_named_where_equations_are_read(module, primitives):
    found = set(primitives_named(FILES[module].read_text(), primitives))
    assert module in NAMED_IN or not found, (
        f"{module} names primitives, {sorted(found)}; ask what jpeft.adapt.equations."
        "read makes of the equation"
    )


@pytest.mark.parametrize(
    "line",
    [
        'if eqn.primitive.name == "gather": pass',
        'if eqn.primitive.name in ("add", "other"): pass',
        'if "jit" != eqn.primitive.name: pass',
        'SAME = frozenset("copy stop_gradient".split())',
        'RANDOM = frozenset({"random_bits"})',
        'JOINS = {"reduce_sum": 1, "reduce_max": 2}',
        'JIT = "jit"',
        'edits = eqn.primitive.name.startswith("scatter")',
        'match eqn.primitive.name:\n    case "dot_general": pass',
    ],
)
def test_a_name_of_a_primitive_is_seen(line, primitives):
    assert list(primitives_named("eqn.primitive\n" + line, primitives))


@pytest.mark.parametrize(
    "line",
    [
        'ACTIVATIONS = {"relu": 1, "tanh": 2}',
        'print(f"`{eqn.primitive.name}` comes before the gather")',
        'label = eqn.params.get("name")',
        'if kind == "embedding": pass',
    ],
)
def test_a_word_that_names_no_primitive_is_none(line, primitives):
    assert not list(primitives_named("eqn.primitive\n" + line, primitives))


def test_a_file_without_equations_may_use_the_words(primitives):
    assert not list(primitives_named('if how == "gather": pass', primitives))
