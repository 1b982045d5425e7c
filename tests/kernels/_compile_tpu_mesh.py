"""Compiles a QLoRA step for four TPUs; prints a line of JSON for each way to cut it.

    python tests/kernels/_compile_tpu_mesh.py

A process of its own, as `_compile_tpu.py`.  Nothing runs: what is looked at is whether
it compiles, and what the chips send each other.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _tpu_compiler  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jpeft  # noqa: E402

LAYERS, WIDTH, HIDDEN, CLASSES, BATCH, TOKENS = 3, 512, 1024, 128, 8, 512
TOPOLOGY = _tpu_compiler.TOPOLOGIES["v5e"]
# Where to cut (up, down), the mesh (data, model), the mesh axis of the batch.
CUTS = {
    "fully sharded": ((P(None, "data"), P(None, "data")), (4, 1)),
    "tensor parallel": ((P(None, None, "model"), P(None, "model")), (1, 4)),
    "both": ((P(None, "data", "model"), P(None, "model", "data")), (2, 2)),
}


def init(key):
    normal = lambda k, *s: jax.random.normal(
        jax.random.fold_in(key, k), s, jnp.bfloat16
    )
    return {
        "layers": {
            "up": normal(0, LAYERS, WIDTH, HIDDEN),
            "down": normal(1, LAYERS, HIDDEN, WIDTH),
        },
        "head": normal(2, WIDTH, CLASSES),
    }


def model(params, x, place=lambda x: x):
    def layer(x, w):
        x = place(x)
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
    return x @ params["head"]


def arguments(mesh, specs):
    """(adapted params, x): shapes, and where they are."""
    transform = jpeft.chain(
        jpeft.quantize(where=r"layers/.*"), jpeft.lora(rank=8, where=r"layers/.*")
    )
    of = lambda spec: NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.bfloat16)
    uses = jpeft.find_uses(model, jax.eval_shape(init, jax.random.key(0)), x)
    make = lambda key: transform(key, init(key), uses=uses)
    params = jax.eval_shape(make, jax.random.key(0))
    base = {"layers": {"up": of(specs[0]), "down": of(specs[1])}, "head": of(P())}
    put = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    shardings = jpeft.sharding.shardings(params, base)
    return jax.tree.map(put, params, shardings), put(x, of(P("data")))


def compiled(cut, kind, declared):
    specs, shape = CUTS[cut]
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    types = (getattr(AxisType, kind),) * 2
    mesh = Mesh(np.array(chips).reshape(shape), ("data", "model"), axis_types=types)
    params, x = arguments(mesh, specs)

    def place(x):
        if kind == "Explicit":
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))

    def loss(params, x):
        adapted = jpeft.adapt(lambda params, x: model(params, x, place))
        return jnp.mean(adapted(params, x).astype(jnp.float32) ** 2)

    about = contextlib.nullcontext()
    if declared:
        about = jpeft.sharding.declare(params, batch="data")
    step = jax.jit(jpeft.value_and_grad(loss))
    with about, jax.set_mesh(mesh):
        return step.lower(params, x).compile().as_text()


def sent(text, kind="all-gather"):
    """dtype[shape] of each such operation."""
    made = re.findall(rf" = (\(?[^=]*?) {kind}(?:-start)?\(", text)
    return sorted({a for m in made for a in re.findall(r"\w+\[[\d,]*\]", m)})


if __name__ == "__main__":
    # Minutes of scheduling would change nothing that is looked at.
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    jax.config.update("jax_memory_fitting_effort", -1.0)
    for cut, kind, declared in (
        *((cut, "Auto", True) for cut in CUTS),
        *((cut, "Auto", False) for cut in CUTS),
        ("fully sharded", "Explicit", False),
    ):
        line = {"cut": cut, "kind": kind, "declared": declared}
        try:
            text = compiled(cut, kind, declared)
            line["gathered"] = sent(text)
            line["kernels"] = text.count("tpu_custom_call")
        except Exception as error:  # told to the test, which fails
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
        print(json.dumps(line), flush=True)
