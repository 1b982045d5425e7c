"""Every test: CPU with eight devices, strict dtypes and ranks.

The tests trace and compile much and compute little: most of what is set here is for the
time that this takes.
"""

import collections
import gc
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

# The modules beside the scripts, as the scripts see them.
sys.path[1:1] = [str(Path(__file__).parents[1] / r) for r in ("benchmarks", "examples")]

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Both workers, the processes that tests start, and the next run find compiled what one
# of them has compiled.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
CACHE_BYTES = 2**29  # more than a run of all tests writes
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Nobody reads where in the source an operation of a test's compiled program is from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import jax  # noqa: E402  reads the variables above, those below at its first use
import pytest  # noqa: E402
import shapes  # noqa: E402

shapes.check()


@pytest.fixture
def unchecked(monkeypatch):
    """For a test of what a function itself says of a wrong argument."""
    monkeypatch.setattr(shapes.config, "jaxtyping_disable", True)


# Without optimisation, by one thread, and by the older way to generate code (jax 0.12
# has no such flag), a program compiles in a third of the time.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
for flag in FLAGS:
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_sessionstart(session):
    """The process that starts the workers empties a cache that grew too large."""
    if hasattr(session.config, "workerinput") or not CACHE.is_dir():
        return
    if sum(file.stat().st_size for file in CACHE.iterdir()) > CACHE_BYTES:
        shutil.rmtree(CACHE)


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(items):
    mark_slow(items)
    skip_float16(items)


def mark_slow(items):
    """Of a test marked `sample(n)`, a plain run takes n cases, the others are slow.

    The n are spread evenly, from a beginning that differs from test to test.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for name, own in cases.items():
        if mark := own[0].get_closest_marker("sample"):
            n = min(*mark.args, len(own))
            first = zlib.crc32(name.encode())
            taken = {(first + k * len(own) // n) % len(own) for k in range(n)}
            for k in set(range(len(own))) - taken:
                own[k].add_marker("slow")


def skip_float16(items):
    """jaxlib converts float16 by an instruction that SSE4.2 lacks, or not at all."""
    if "max_isa=SSE4" not in os.environ.get("XLA_FLAGS", ""):
        return
    skip = pytest.mark.skip(reason="jaxlib has no float16 without F16C")
    for item in items:
        # GGUF's formats have their scales in float16.
        named = re.search(r"(?<!b)float16|\bq[48]_[01]\b", item.name)
        if named or item.get_closest_marker("float16"):
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs a file, or what a table's file has of one method.

    So it traces once what the tests of a file share.  (The marks that xdist has for
    this do nothing under pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, case = nodeid.partition("::")
            method = case.partition("[")[2].partition("-")[0].rstrip("]")
            return f"{file}[{method}]" if file.endswith("/test_laws.py") else file

    # Not by the number of tests: a file of few may take the longest.
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_finish():
    """What the imports made is no garbage, and a trace makes objects by the million."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_sessionfinish():
    """Nor need anything be collected at the end of a process: pytest does so often."""
    gc.freeze()


_programs = 0
MANY = 650  # programs of tests take about a megabyte each


@jax.monitoring.register_event_duration_secs_listener
def _count(event, seconds, **_):
    global _programs
    _programs += event == "/jax/core/compile/backend_compile_duration"


def pytest_runtest_teardown():
    """Compiled programs are given back now and then, so that a worker stays small."""
    global _programs
    if _programs > MANY:
        _programs = 0
        jax.clear_caches()
        gc.collect()
