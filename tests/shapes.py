"""The shapes in jpeft's signatures are checked wherever a test calls the function.

Only there: a function of trees or of Python's own types says in its own words what it
was given, and to check those too takes half as much time again.
"""

import ast
import functools
import importlib.machinery
import sys
from pathlib import Path

import beartype
from jaxtyping import config as config
from jaxtyping import jaxtyped

# An int may be given where a float is asked for.
checker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def checked(function):
    """Made at the first call: it takes ten milliseconds, and most are never called."""
    made = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal made
        made = made or jaxtyped(function, typechecker=checker)
        return made(*args, **kwargs)

    return call


HERE = __name__
DECORATOR = ast.parse(f"__import__('sys').modules[{HERE!r}].checked", mode="eval").body


class Loader(importlib.machinery.SourceFileLoader):
    """Decorates the functions with a shape in their signature, innermost."""

    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.parse(data)
        kinds = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
            for alias in node.names
        }
        for node in ast.walk(tree) if kinds else ():
            if isinstance(node, ast.FunctionDef) and kinds & names(node):
                node.decorator_list.append(DECORATOR)
        return compile(ast.fix_missing_locations(tree), path, "exec")

    def path_stats(self, path):
        raise OSError  # so that what is made of the source is not kept as its bytecode


def names(function):
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    every += filter(None, (function.args.vararg, function.args.kwarg))
    found = filter(None, [*(x.annotation for x in every), function.returns])
    inside = (node for x in found for node in ast.walk(x))
    return {node.id for node in inside if isinstance(node, ast.Name)} - {"Array"}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "jpeft":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and spec.origin and b"jaxtyping" in Path(spec.origin).read_bytes():
            spec.loader = Loader(name, spec.origin)
        return spec


def check():
    assert "jpeft" not in sys.modules
    sys.meta_path.insert(0, Finder())
