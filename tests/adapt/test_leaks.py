"""Nothing traced outlives its trace: `jax.checking_leaks`, as people debug with it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from speed import slow_but

import jpeft

KEY = jax.random.key(3)
BASE = {"up": {"kernel": jnp.ones((64, 5))}, "bias": jnp.zeros(5)}
X = jnp.ones((2, 64))
FN = lambda p, x: {"y": x @ p["up"]["kernel"] + p["bias"][None], "p": p}
TRANSFORMS = {
    "lora": jpeft.lora(rank=2, dropout=0.1),
    "qlora": jpeft.chain(jpeft.quantize("nf4"), jpeft.lora(rank=2)),
    "bitfit": jpeft.bitfit(),
    "vera": jpeft.vera(rank=2),
    "dora": jpeft.dora(rank=2),
}


def calls(transform):
    uses = jpeft.find_uses(FN, BASE, X)
    params = transform(KEY, BASE, uses=uses)
    apply, drawing = jpeft.adapt(FN), jpeft.adapt(FN, key=KEY)
    loss = lambda p: jnp.sum(apply(p, X)["y"])
    return {
        "find_uses": lambda: jpeft.find_uses(FN, BASE, X),
        "attach": lambda: jax.eval_shape(lambda k: transform(k, BASE, uses=uses), KEY),
        "adapt": lambda: apply(params, X),
        "jit": lambda: jax.eval_shape(jax.jit(drawing), params, X),
        "value_and_grad": lambda: jax.eval_shape(jpeft.value_and_grad(loss), params),
        "disable": lambda: jax.eval_shape(lambda p: apply(jpeft.disable(p), X), params),
        "unload": lambda: jax.eval_shape(jpeft.unload, params),
    }


@pytest.mark.parametrize("name", slow_but(("lora",), TRANSFORMS))
def test_no_tracer_is_left_behind(name):
    for what, call in calls(TRANSFORMS[name]).items():
        with jax.checking_leaks():
            try:
                call()
            except Exception as error:  # names the call
                raise AssertionError(what) from error


def test_a_merged_tree_and_an_nnx_model_leave_none_either():
    params = jpeft.lora(rank=2)(KEY, BASE)
    model = nnx.Linear(64, 5, rngs=nnx.Rngs(0))
    forward = lambda m, x: m(x)
    with jax.checking_leaks():
        jax.eval_shape(jpeft.merge, params)
        uses = jpeft.find_uses(forward, model, X)
        adapted = jpeft.lora(rank=2)(KEY, model, uses=uses)
        jax.eval_shape(jpeft.adapt(forward), adapted, X)
