"""Which small faults in the formulas and rules does the default run see?

    python tests/mutants.py --count 200 --seed 0 --log mutants.jsonl
    python tests/mutants.py --again mutants.jsonl        those that survived, once more

Of all places where a small fault can be made (a sign, a comparison, a number, two
arguments swapped ...) it draws some, makes each in a copy of the repository and runs
the tests most likely to see it, then wider sets.  The libraries are imported once: each
run is a fork.
"""

import argparse
import ast
import collections
import compileall
import copy
import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = """
    jpeft/methods/*.py jpeft/leaves/*.py jpeft/formats/*.py jpeft/objectives/*.py
    jpeft/optim/*.py jpeft/tree/*.py jpeft/quant/rules.py jpeft/quant/product.py
    jpeft/quant/arrays.py jpeft/quant/leaf.py jpeft/adapt/labels.py
    jpeft/adapt/equations.py jpeft/adapt/interpreter.py jpeft/adapt/control.py
    jpeft/adapt/uses.py
""".split()
LAWS = "tests/methods/test_laws.py"
COST = "tests/methods/test_cost.py"
IDIOMS = "tests/adapt/test_idioms.py"
DELTAS = "tests/leaves/test_weight_deltas.py"
PREFIX = "tests/methods/test_prefix.py"
INPUT = "tests/methods/test_bad_input.py"
# A file or folder of jpeft -> tests by which its faults are likely to be seen, after
# the file's own; "file -k word" runs a part.  All that fit count, in this order.
LIKELY = {
    "methods/adapter": ["tests/leaves/test_bottleneck.py", f"{LAWS} -k adapter"],
    "methods/lora": ["tests/leaves/test_first_factors.py"],
    "methods/quantize": ["tests/quant/test_bad_weights.py", f"{LAWS} -k qlora"],
    "methods/prefix_text": ["tests/methods/test_prefix_tokens.py"],
    "methods/": [COST, INPUT, DELTAS],
    "leaves/attention": ["tests/methods/test_prefix_rows.py", PREFIX],
    "leaves/bottleneck": [f"{LAWS} -k adapter"],
    "leaves/embedding": ["tests/methods/test_prompt.py", f"{LAWS} -k prompt"],
    "leaves/gate": [
        "tests/methods/test_diff_pruning.py",
        "tests/methods/test_gated.py",
    ],
    "leaves/low_rank": [f"{IDIOMS} -k each_idiom_acts", DELTAS, COST, IDIOMS],
    "leaves/networks": ["tests/methods/test_p_tuning.py"],
    "leaves/scaled": [DELTAS, "tests/methods/test_ia3.py", f"{LAWS} -k ia3", COST],
    "leaves/first_factors": [f"{LAWS} -k pissa"],
    "leaves/prefix": [f"{LAWS} -k prefix"],
    "leaves/projections": [PREFIX],
    "leaves/token_rows": ["tests/methods/test_prefix_tokens.py", PREFIX],
    "leaves/token_tables": ["tests/methods/test_prompt.py", f"{LAWS} -k p_tuning"],
    "objectives/": ["tests/objectives"],
    "formats/": ["tests/quant/test_arrays.py"],
    "quant/": ["tests/quant/test_arrays.py", f"{LAWS} -k qlora"],
    "optim/allocator": ["tests/optim/test_adalora_allocator.py"],
    "optim/": [f"{LAWS} -k frozen"],
    "adapt/": [f"{IDIOMS} -k each_idiom_acts", DELTAS, COST, IDIOMS],
    "tree/layout": ["tests/adapt/test_uses.py"],
    "tree/merge": [f"{LAWS} -k merged"],
    "tree/change": ["tests/quant/test_cast.py"],
    "tree/": [INPUT, "tests/tree", IDIOMS, LAWS],
}
# Of a folder, what a mutant runs through last.
WIDE = {
    "methods": "tests/leaves tests/methods tests/adapt tests/models",
    "leaves": "tests/leaves tests/methods tests/adapt tests/models",
    "formats": "tests/formats tests/kernels/test_plain.py tests/quant",
    "objectives": "tests/objectives tests/examples",
    "optim": "tests/optim tests/methods tests/examples/test_finetune.py",
    "tree": "tests/tree tests/optim tests/quant tests/leaves tests/hf tests/checkpoint",
    "quant": "tests/quant tests/methods tests/checkpoint",
    "adapt": "tests/adapt tests/models tests/leaves tests/methods tests/quant",
}
NO_SWAP = """isinstance issubclass getattr setattr hasattr zip range max min print dict
    partial replace suppress TypeVar namedtuple tree_map map filter cast""".split()
SPARED = ("__repr__", "__str__", "title", "instead")


@dataclasses.dataclass
class Mutant:
    path: str
    line: int
    operator: str
    before: str  # the lines it changes
    after: str
    state: str = ""
    by: str = ""

    def name(self):
        return f"{self.path}:{self.line} [{self.operator}]"

    def place_in_line(self, seed):
        """By chance, but the same whatever else changes in the sources."""
        text = f"{seed} {self.path} {self.operator} {self.before} {self.after}"
        return hashlib.sha256(text.encode()).hexdigest()

    def diff(self):
        lines = lambda mark, text: "".join(f"  {mark}{x}\n" for x in text.splitlines())
        return lines("-", self.before) + lines("+", self.after)


# --- faults --------------------------------------------------------------------------

SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
NO_NUMBERS = (ast.Tuple, ast.List, ast.ListComp, ast.JoinedStr, ast.Starred)


def number(x):
    return not isinstance(x, NO_NUMBERS) and not (
        isinstance(x, ast.Constant) and isinstance(x.value, (str, bytes))
    )


def faults(node):
    """(operator, what stands in its place)"""
    new = copy.deepcopy(node)
    match node:
        case ast.BinOp() if type(node.op) in SWAPPED:
            if number(node.left) and number(node.right):
                new.op = SWAPPED[type(node.op)]()
                yield "arithmetic", new
        case ast.Compare() if type(node.ops[0]) in SWAPPED:
            new.ops[0] = SWAPPED[type(node.ops[0])]()
            yield "comparison", new
        case ast.BoolOp():
            new.op = SWAPPED[type(node.op)]()
            yield "and/or", new
        case ast.UnaryOp(op=ast.Not()):
            yield "not", new.operand
        case ast.UnaryOp(op=ast.USub()):
            yield "minus", new.operand
        case ast.Constant(value=value) if type(value) in (int, float):
            new.value = value + 1 if isinstance(value, int) else 2 * value or 1.0
            yield "number", new
        case ast.Call(args=[one, two, *_]) if called(node) not in NO_SWAP:
            if not any(isinstance(x, (ast.Starred, ast.Lambda)) for x in (one, two)):
                if ast.dump(one) != ast.dump(two):
                    new.args[:2] = new.args[1::-1]
                    yield "arguments", new
        case ast.IfExp():
            new.test = ast.UnaryOp(ast.Not(), new.test)
            yield "condition", new


def called(node):
    return ast.unparse(node.func).rpartition(".")[2]


class Places(ast.NodeVisitor):
    """Every (node, operator, what stands in its place), in the order of the file."""

    def __init__(self):
        self.found = []

    def visit(self, node):
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Call) and called(node) in ("warn", "TypeVar"):
            return
        if isinstance(node, ast.FunctionDef):
            return self.function(node)
        if isinstance(node, ast.AnnAssign):
            return node.value and self.visit(node.value)
        self.found += [(node, *x) for x in faults(node)]
        if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            test = ast.UnaryOp(ast.Not(), node.test)
            self.found.append((node.test, "condition", test))
        self.generic_visit(node)

    def function(self, node):
        if node.name in SPARED:
            return
        arguments = [x.arg for x in node.args.args if x.arg not in ("self", "cls")]
        for x in node.args.defaults + [y for y in node.args.kw_defaults if y]:
            self.visit(x)
        for x in node.body:
            self.visit(x)
        for x in node.body:  # the last word of the function itself
            if isinstance(x, ast.Return) and x.value and arguments:
                if ast.unparse(x.value) != arguments[0]:
                    first = ast.Name(arguments[0])
                    self.found.append((x.value, "first argument", first))


def mutants(path):
    source = (ROOT / path).read_text()
    places = Places()
    places.visit(ast.parse(source))
    lines = source.splitlines(keepends=True)
    for node, operator, new in places.found:
        first, last = node.lineno - 1, node.end_lineno
        before = "".join(lines[first:last])
        head = lines[first].encode()[: node.col_offset].decode()
        tail = lines[last - 1].encode()[node.end_col_offset :].decode()
        text = ast.unparse(ast.fix_missing_locations(new))
        yield Mutant(path, node.lineno, operator, before, f"{head}({text}){tail}")


# --- runs ----------------------------------------------------------------------------


def prepare(copied):
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (copied / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, copied / file)
    os.chdir(copied)
    os.environ["PYTHONPATH"] = str(copied)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for room in ("jpeft", "tests"):
        compileall.compile_dir(room, quiet=2)
    cache = ROOT / ".pytest_cache" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    sys.path = [x for x in sys.path if x not in ("", str(ROOT), str(ROOT / "tests"))]
    sys.path[:0] = [str(copied), str(copied / "tests")]
    importlib.import_module("conftest")  # what it tells JAX
    libraries = """chex flax flax.linen flax.nnx optax orbax.checkpoint pytest
        jax.experimental.pallas jax.experimental.shard_map hypothesis transformers
        safetensors gguf""".split()
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError:
            print("without", library)
    assert not any(x.partition(".")[0] == "jpeft" for x in sys.modules)


CPU_SECONDS = 200  # four times what the longest of LIKELY takes


def run(tests, output):
    """(pytest's code or minus a signal, what it said)"""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 3
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            os.setpgid(0, 0)
            to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            import pytest

            words = ["-x", "-q", "-n0", "--tb=no", "--assert=plain"]
            code = int(pytest.main([*words, "-p", "no:cacheprovider", *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text()


def stages(path, args):
    """What is run, one after the other."""
    _, room, file = path.split("/")
    stem = file.removesuffix(".py").strip("_")
    own = [
        str(x.relative_to(ROOT))
        for x in sorted((ROOT / "tests").glob(f"*/test_*{stem}*.py"))
        if x.parent.name == room or (room, x.parent.name) == ("leaves", "methods")
    ]
    if room == "methods":
        own.append(f"{LAWS} -k {stem}")
    likely = [x for prefix, x in LIKELY.items() if path[6:].startswith(prefix)]
    every = dict.fromkeys(own + sum(likely, []))
    narrow = [x.split(maxsplit=2) for x in args.tests or [*every][: args.stages]]
    return narrow + [WIDE[room].split()] * args.wide


def judge(mutant, copied, args):
    file = copied / mutant.path
    source = file.read_text()
    at = sum(map(len, source.splitlines(keepends=True)[: mutant.line - 1]))
    if source[at:].startswith(mutant.before):
        changed = source[:at] + source[at:].replace(mutant.before, mutant.after, 1)
    elif source.count(mutant.before) == 1:  # the file was edited since
        changed = source.replace(mutant.before, mutant.after)
    else:
        mutant.state = "gone"
        return
    mutant.state, mutant.by = "survived", ""
    file.write_text(changed)
    for tests in stages(mutant.path, args):
        code, said = run(tests, copied / "output")
        if code == 4:
            sys.exit(said)
        if code not in (0, 5):  # 5: the default run has none of these
            failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.M)
            mutant.state = "timeout" if code == -signal.SIGXCPU else "killed"
            mutant.by = failed[1] if failed else " ".join(tests)
            break
    file.write_text(source)


def table(done):
    rows = collections.defaultdict(collections.Counter)
    for x in done:
        for name in (x.path, "all"):
            rows[name]["mutants"] += 1
            rows[name]["killed"] += x.state in ("killed", "timeout")
    print(f"\n{'file':40} mutants killed")
    for name, row in sorted(rows.items()):
        print(f"{name:40} {row['mutants']:7} {row['killed']:6}")
    for x in done:
        if x.state not in ("killed", "timeout"):
            print(f"\n{x.state}: {x.name()}\n{x.diff()}", end="")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="mutants done before")
    parser.add_argument("--only", default="", help="regular expression of files")
    parser.add_argument("--log", type=pathlib.Path, help="a line of JSON for each")
    parser.add_argument("--again", type=pathlib.Path, help="a log, whose survivors run")
    parser.add_argument("--stages", type=int, default=99, help="parts of LIKELY to run")
    parser.add_argument("--tests", action="append", help="these in place of LIKELY")
    parser.add_argument("--wide", action="store_true", help="all tests of the folder")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.again:
        drawn = [Mutant(**json.loads(x)) for x in args.again.read_text().splitlines()]
        drawn = [x for x in drawn if x.state == "survived"]
    else:
        paths = sorted(str(x.relative_to(ROOT)) for p in FILES for x in ROOT.glob(p))
        every = [x for p in paths for x in mutants(p)]
        every.sort(key=lambda x: x.place_in_line(args.seed))
        drawn = [x for x in every if re.search(args.only, x.path)][: args.count]
        print(f"{len(drawn)} of {len(every)}")
    drawn = drawn[args.skip :]
    if args.list:
        return print("".join(f"{x.name()}\n{x.diff()}" for x in drawn))
    start = time.time()
    log = args.log and args.log.resolve()
    with tempfile.TemporaryDirectory() as folder:
        copied = pathlib.Path(folder).resolve()
        prepare(copied)
        for n, x in enumerate(drawn):
            judge(x, copied, args)
            print(f"{n:3} {time.time() - start:5.0f} {x.state:8} {x.name()} {x.by}")
            sys.stdout.flush()
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(x)) + "\n")
        table(drawn)
        killers = sorted({x.by for x in drawn if "::" in x.by})
        code, said = run(killers, copied / "output") if killers else (0, "")
        print("\nWithout a fault they fail:\n" + said if code else "")
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
