"""What the hook costs: LoRA through `jpeft.adapt` beside LoRA written into the model.

    python benchmarks/benchmark_hook.py [--small] [--peers none|all] [--markdown FILE]

A six-layer decoder in four forms (see `_decoder.py`), LoRA on every linear kernel of
its layers, AdamW on A and B.  All LoRA variants start from the same W, A and B, so they
must reach the same loss.  The figures, beside their ratio to the hand-written twin:

    FLOPs, temporaries, outputs   of the compiled training step, as XLA states them;
        the same in every run.  XLA counts the body of a scan once, so under scan the
        FLOPs are not those of a whole step; the ratio is of like things.
    loss        after three steps
    trace       CPU time of `jax.make_jaxpr(step)` with JAX's caches cleared, the median
        of several, taken in turns with the other variants; varies by about a tenth
    compiled    how many programs the second step compiled
    copies      weight-shaped arrays that the traced forward pass makes and saves for
        the backward pass.  The base itself is needed there and is no copy.  Outside a
        scan XLA may still find that a copy is one; inside it, the memory is spent.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import jax
import jax.numpy as jnp
from _decoder import (
    ADAPTED,
    FORMS,
    SMALL,
    Decoder,
    PyTree,
    Sizes,
    Variant,
    adamw,
    attached,
    decoder,
    full_fine_tuning,
    is_adapted,
    jitted_layers,
    layer_kernels,
    merged_in_forward,
    name_of,
    next_token_loss,
    quantized,
    training_step,
    with_jpeft,
)
from flax import linen as nn
from flax import nnx, traverse_util

import jpeft

HAND, JPEFT, QLORA = "LoRA by hand", "jpeft", "jpeft, QLoRA"
MIB = 2**20


# --- what is measured ----------------------------------------------------------------


@dataclasses.dataclass
class Cost:
    """Of one training step; `trace_s` is filled in later, in turns with the others."""

    flops: float
    temp_bytes: int
    output_bytes: int
    loss: float
    compiled: int
    copies: int
    trace_s: float = float("nan")


def cost(variant: Variant, tokens: jax.Array, weights: PyTree) -> Cost:
    """Compiles the step, runs it and reads what XLA says of it.

    weights: the base, whose shapes tell a copied weight among the residuals.
    """
    step = jax.jit(training_step(variant.loss), donate_argnums=(0, 1))
    # The step donates its first two arguments; the variant's own arrays are kept.
    trainable = jax.tree.map(jnp.copy, variant.trainable)
    state = adamw().init(trainable)
    trainable, state, _ = step(trainable, state, variant.frozen, tokens)
    before = programs_compiled()
    trainable, state, _ = step(trainable, state, variant.frozen, tokens)
    compiled = programs_compiled() - before
    program = step.lower(trainable, state, variant.frozen, tokens).compile()
    memory = program.memory_analysis()
    trainable, state, _ = step(trainable, state, variant.frozen, tokens)
    _, _, loss = step(trainable, state, variant.frozen, tokens)  # of the step before
    return Cost(
        flops=program.cost_analysis()["flops"],
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        loss=float(loss),
        compiled=compiled,
        copies=len(copied_weights(variant, tokens, weights)),
    )


_compilations: list[str] = []


def programs_compiled() -> int:
    """How many programs XLA has compiled since the first call of this function."""

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            _compilations.append(event)

    if not programs_compiled.__dict__.get("listens"):
        jax.monitoring.register_event_duration_secs_listener(listen)
        programs_compiled.__dict__["listens"] = True
    return len(_compilations)


def copied_weights(
    variant: Variant, tokens: jax.Array, weights: PyTree
) -> list[tuple[int, ...]]:
    """Shapes of the residuals that are as large as a weight but are not the base.

    A backward pass needs the base for the gradient of the activations.  It should be
    the array that came in: then it is an input of the forward program.  An output of
    that program with a weight's shape, stacked over the layers or not, is a copy.  So
    is what a scan inside it stacks to that shape.
    """
    shapes = {w.shape for w in jax.tree.leaves(weights) if w.ndim > 1}
    shapes |= {shape[1:] for shape in shapes if len(shape) == 3}

    def residuals(trainable: PyTree, frozen: PyTree, tokens: jax.Array) -> list[Any]:
        _, pull = jax.vjp(lambda t: variant.loss(t, frozen, tokens), trainable)
        return jax.tree.leaves(pull)

    args = variant.trainable, variant.frozen, tokens
    forward = jax.make_jaxpr(residuals)(*args).jaxpr
    given = set(map(id, forward.invars))
    found = [v.aval.shape for v in forward.outvars if id(v) not in given]
    for eqn in equations(forward):
        if eqn.primitive.name == "scan":
            # The values a scan stacks have one axis more than in its body.
            body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
            found += [
                v.aval.shape
                for v, inner in zip(eqn.outvars, body.outvars, strict=True)
                if v.aval.ndim > inner.aval.ndim
            ]
    return [shape for shape in found if shape in shapes]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program and of the programs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def trace_times(
    variants: dict[str, Variant], tokens: jax.Array, repeats: int
) -> dict[str, float]:
    """Median CPU seconds to trace each one's training step, taken in turns."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    made = {
        name: (training_step(v.loss), v.trainable, adamw().init(v.trainable), v.frozen)
        for name, v in variants.items()
    }
    for _ in range(repeats + 1):
        for name, (step, trainable, state, frozen) in made.items():
            jax.clear_caches()
            gc.collect()
            start = time.process_time()
            jax.make_jaxpr(step)(trainable, state, frozen, tokens)
            taken[name].append(time.process_time() - start)
    # The first round imports modules and fills caches that JAX does not clear.
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def inner_functions(sizes: Sizes, count: int = 12) -> dict[str, tuple[int, int]]:
    """How often a layer jitted once and called `count` times stands in the program.

    For the twin and for jpeft: (in the forward pass, in value and gradient).
    """
    layers = list(layer_kernels(sizes, count))
    x = jnp.ones((sizes.batch, sizes.tokens, sizes.width))
    plain = jitted_layers(sizes, twin=False)
    adapted = jpeft.adapt(plain)
    twin = jitted_layers(sizes, twin=True)
    trainable, frozen = jpeft.partition(attached(plain, layers, x, sizes))

    def by_hand(params: PyTree, x: jax.Array) -> jax.Array:
        triple = lambda w: (w.base, w.a, w.b) if is_adapted(w) else w
        return twin(jax.tree.map(triple, params, is_leaf=is_adapted), x)

    def count_layers(f: Callable[..., Any]) -> int:
        text = jax.jit(f).lower(trainable, frozen, x).as_text()
        return len(re.findall(r"func\.func private @\w*one_layer\w*\(", text))

    def counts(apply: Callable[..., jax.Array]) -> tuple[int, int]:
        forward = lambda t, f, x: apply(jpeft.combine(t, f), x)
        total = lambda t, f, x: forward(t, f, x).sum()
        return count_layers(forward), count_layers(jax.value_and_grad(total))

    return {HAND: counts(by_hand), JPEFT: counts(adapted)}


# --- other libraries -----------------------------------------------------------------


class Inapplicable(Exception):
    """The library has nothing for this form; the message says why."""


def with_qwix(model: Decoder) -> Variant:
    """qwix: rewrites the module, whose tree then holds the factors."""
    import qwix

    sizes, ids = model.sizes, model.tokens[:, :-1]
    # qwix matches module paths, without the `kernel` at their end.
    provider = qwix.LoraProvider(
        module_path=ADAPTED.removesuffix("/kernel"), rank=sizes.rank, alpha=sizes.alpha
    )
    if isinstance(model.model, nn.Module):
        rewritten = qwix.apply_lora_to_model(model.model, provider)
        flat = traverse_util.flatten_dict(rewritten.init(jax.random.key(0), ids))
        mine = {k[1:] for k in flat if "lora" in k[-1]}
        factors = {}
        for path, (a, b) in model.factors().items():
            module = tuple(path.split("/"))[:-1]
            factors[(*module, "kernel_lora_a")] = a
            factors[(*module, "kernel_lora_b")] = b
        _expect_same("qwix", mine, set(factors))

        def loss(factors: PyTree, base: PyTree, tokens: jax.Array) -> jax.Array:
            flat = {**traverse_util.flatten_dict(base), **factors}
            params = {"params": traverse_util.unflatten_dict(flat)}
            return next_token_loss(rewritten.apply(params, tokens[:, :-1]), tokens)

        return Variant(loss, factors, model.base)

    rewritten = qwix.apply_lora_to_model(model.model, provider, ids, rngs=nnx.Rngs(0))
    graph, lora, rest = nnx.split(rewritten, nnx.LoRAParam, ...)
    mine = {name_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(lora)}
    factors = {}
    for path, (a, b) in model.factors().items():
        factors[path.replace("kernel", "kernel_lora_a")] = a
        factors[path.replace("kernel", "kernel_lora_b")] = b
    _expect_same("qwix", mine, set(factors))
    lora = jax.tree_util.tree_map_with_path(lambda p, _: factors[name_of(p)], lora)

    def nnx_loss(lora: PyTree, rest: PyTree, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, lora, rest)(tokens[:, :-1])
        return next_token_loss(logits, tokens)

    return Variant(nnx_loss, lora, rest)


def with_quax(model: Decoder) -> Variant:
    """quax: array-like leaves and a tracer of its own; LoRA is an example it ships."""
    import equinox
    import quax
    from quax.examples.lora import LoraArray

    remat = "remat" in model.form
    apply = quax.quaxify(model.apply)

    def loss(factors: PyTree, base: PyTree, tokens: jax.Array) -> jax.Array:
        def adapted(path: Any, w: jax.Array) -> Any:
            if name_of(path) not in factors:
                return w
            a, b = factors[name_of(path)]
            leaf = LoraArray(
                w, rank=a.shape[-1], key=jax.random.key(0), allow_materialise=remat
            )
            # It has no scale of its own.
            b = b * jnp.asarray(model.sizes.scale, b.dtype)
            return equinox.tree_at(lambda x: (x.a, x.b), leaf, (a, b))

        params = jax.tree_util.tree_map_with_path(adapted, base)
        return next_token_loss(apply(params, tokens[:, :-1]), tokens)

    return Variant(loss, model.factors(), model.base)


def _expect_same(library: str, made: set[Any], wanted: set[Any]) -> None:
    if made != wanted:
        difference = sorted(made ^ wanted)[:3]
        raise Inapplicable(f"{library} adapts other kernels, such as {difference}")


@dataclasses.dataclass(frozen=True)
class Peer:
    build: Callable[[Decoder], Variant]
    modules: tuple[str, ...]
    install: str

    def installed(self) -> bool:
        return all(importlib.util.find_spec(m) for m in self.modules)


OWN: dict[str, Callable[[Decoder], Variant]] = {
    HAND: lambda model: model.twin,
    JPEFT: with_jpeft,
    QLORA: quantized,
    "merge in forward": merged_in_forward,
    "full fine-tuning": full_fine_tuning,
}
PEERS = {
    "qwix": Peer(with_qwix, ("qwix",), "pip install qwix"),
    "quax": Peer(with_quax, ("quax", "equinox"), "pip install quax equinox"),
}


# --- the table -----------------------------------------------------------------------

HEAD = (
    "form",
    "variant",
    "GFLOP",
    "temporaries MiB",
    "outputs MiB",
    "loss",
    "trace ms",
    "compiled",
    "copies",
)


def measure(
    form: str, sizes: Sizes, peers: bool, repeats: int
) -> tuple[dict[str, Cost], dict[str, str]]:
    """Variant -> its cost, and variant -> why it has none."""
    model = decoder(form, sizes)
    costs: dict[str, Cost] = {}
    failed: dict[str, str] = {}
    variants: dict[str, Variant] = {}
    builders = dict(OWN)
    for name, peer in PEERS.items() if peers else ():
        if peer.installed():
            builders[name] = peer.build
        else:
            failed[name] = f"not installed ({peer.install})"
    for name, build in builders.items():
        try:
            variant = build(model)
            costs[name] = cost(variant, model.tokens, model.base)
            variants[name] = variant
        except Exception as error:
            if name in OWN:
                raise
            failed[name] = f"{type(error).__name__}: {first_line(error)}"
    for name, seconds in trace_times(variants, model.tokens, repeats).items():
        costs[name].trace_s = seconds
    return costs, failed


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    line = lines[0].replace("|", "/")
    return line if len(line) <= 100 else line[:99] + "…"


def rows(
    form: str, costs: dict[str, Cost], failed: dict[str, str]
) -> Iterator[tuple[str, ...]]:
    hand = costs[HAND]
    ratio = lambda x, y: f"({x / y:.2f}x)"
    for name, c in costs.items():
        yield (
            form,
            f"**{name}**" if name == JPEFT else name,
            f"{c.flops / 1e9:.4g} {ratio(c.flops, hand.flops)}",
            f"{c.temp_bytes / MIB:.2f} {ratio(c.temp_bytes, hand.temp_bytes)}",
            f"{c.output_bytes / MIB:.2f}",
            f"{c.loss:.6f}",
            f"{c.trace_s * 1e3:.0f} {ratio(c.trace_s, hand.trace_s)}",
            str(c.compiled),
            str(c.copies),
        )
    for name, why in failed.items():
        yield (form, name, why, *[""] * (len(HEAD) - 3))


def markdown(table: list[tuple[str, ...]]) -> str:
    lines = [HEAD, tuple("---" for _ in HEAD), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(sizes: Sizes, peers: bool, repeats: int) -> str:
    table = []
    for form in FORMS:
        costs, failed = measure(form, sizes, peers, repeats)
        table += rows(form, costs, failed)
    inner = inner_functions(sizes)
    counts = ", ".join(
        f"{name} {forward} in the forward pass and {both} in value and gradient"
        for name, (forward, both) in inner.items()
    )
    return "\n\n".join(
        [
            f"{sizes.layers} layers, width {sizes.width}, hidden {sizes.hidden}, "
            f"{sizes.heads} heads, {sizes.vocab} words, batch {sizes.batch} x "
            f"{sizes.tokens} tokens, LoRA of rank {sizes.rank}; jax {jax.__version__}, "
            f"{jax.devices()[0].platform}.",
            markdown(table),
            f"Programs that twelve equal layers of one `jax.jit` become: {counts}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--small", action="store_true", help="small sizes: a minute")
    parser.add_argument("--peers", choices=("none", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=7, help="traces of each variant")
    parser.add_argument("--markdown", metavar="FILE", help="write the report there too")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    text = report(SMALL if args.small else Sizes(), args.peers == "all", args.repeats)
    print(text)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
