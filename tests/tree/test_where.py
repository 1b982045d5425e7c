"""`where` and `exclude`: what the model does not use, presets by the weights beside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.tree.paths import slots

KEY = jax.random.key(0)
X = jnp.ones((3, 6))


def w(*shape):
    return {"kernel": jnp.ones(shape)}


def chosen(method, params, uses=None):
    return list(method.targets(slots(params), uses))


# --- what the traced call does not use -----------------------------------------------

TWO = {
    "text": w(6, 4),
    "vision": {"proj": w(6, 4), "norm": {"scale": jnp.ones(6)}, **w(6, 4)},
    "head": {**w(4, 5), "spare": jnp.ones((2, 2))},
}


def text_only(p, x):
    return x @ p["text"]["kernel"] @ p["head"]["kernel"]


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("(text|vision)/kernel", "vision/kernel"),
        (["text/kernel", "vision/.*kernel"], "vision/kernel, vision/proj/kernel"),
        (".*", "head/spare, vision/kernel, vision/proj/kernel"),
        (lambda path, x: "kernel" in path, "vision/kernel, vision/proj/kernel"),
        ("vision/proj/kernel", "vision/proj/kernel"),
    ],
)
def test_a_named_weight_that_the_call_does_not_use_is_an_error(where, named):
    uses = jpeft.find_uses(text_only, TWO, X)
    with pytest.raises(ValueError, match=f" names {named}, .* does not use") as e:
        jpeft.lora(rank=2, where=where)(KEY, TWO, uses=uses)
    assert "jpeft.find_uses(fn, params, *args), or" in str(e.value)
    everything = lambda p, x: text_only(p, x) + jnp.sum(x @ p["vision"]["kernel"])
    if where == "(text|vision)/kernel":  # as it says
        uses = jpeft.find_uses(everything, TWO, X)
        got = chosen(jpeft.lora(rank=2, where=where), TWO, uses)
        assert got == ["text/kernel", "vision/kernel"]


def test_what_a_refusal_excludes_is_what_the_call_does_not_use():
    uses = jpeft.find_uses(text_only, TWO, X)
    for where in ("(text|vision)/kernel", ".*"):
        with pytest.raises(ValueError, match="exclude=") as e:
            jpeft.lora(rank=2, where=where)(KEY, TWO, uses=uses)
        typed = eval(str(e.value).split("exclude=")[1])
        got = chosen(jpeft.lora(rank=2, where=where, exclude=typed), TWO, uses)
        assert got == [p for p in ("head/kernel", "text/kernel") if p in got] != []
    with pytest.raises(ValueError, match="or take it out of where="):
        jpeft.lora(rank=2, where="vision/kernel")(KEY, TWO, uses=uses)


def test_a_preset_and_what_a_method_does_not_act_on_name_nothing():
    uses = jpeft.find_uses(text_only, TWO, X)
    assert chosen(jpeft.lora(rank=2), TWO, uses) == ["head/kernel", "text/kernel"]
    # The norm that is not used is no weight for lora, used or not.
    out = jpeft.lora(rank=2, where=".*", exclude=["vision/.*kernel", "head/spare"])
    assert chosen(out, TWO, uses) == ["head/kernel", "text/kernel"]
    with pytest.raises(ValueError, match="names vision/norm/scale"):
        jpeft.norm_tuning(where=".*")(KEY, TWO, uses=uses)
    with pytest.raises(ValueError, match="names vision/kernel"):
        jpeft.full("(text|vision)/kernel")(KEY, TWO, uses=uses)


def test_a_named_sub_layer_that_the_call_does_not_use_is_an_error():
    mlp = lambda: {"up": w(6, 9), "down": w(9, 6)}
    params = {"text": {"mlp": mlp()}, "vision": {"mlp": mlp()}}

    def fn(p, x):
        p = p["text"]["mlp"]
        return jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]

    uses = jpeft.find_uses(fn, params, X)
    with pytest.raises(ValueError, match="names vision/mlp, whose weights") as e:
        jpeft.adapter(2, where="(text|vision)/mlp")(KEY, params, uses=uses)
    typed = str(e.value).split("exclude='")[1].split("'")[0]
    method = jpeft.adapter(2, where="(text|vision)/mlp", exclude=typed)
    assert chosen(method, params, uses) == ["text/mlp/down/kernel"]
    full = r"mlp: (vision)/mlp/up/kernel -> \1/mlp/down/kernel"
    with pytest.raises(ValueError, match="not used by the call that jpeft.find_uses"):
        jpeft.adapter(2, where=full)(KEY, params, uses=uses)


# --- presets -------------------------------------------------------------------------

META = {"wq": w(8, 8), "wk": w(8, 8), "wv": w(8, 8), "wo": w(8, 8)}
META |= {"w1": w(8, 12), "w2": w(12, 8), "w3": w(8, 12)}
LAYOUTS = {
    "in one module": (
        {"layers": [META], "output": w(8, 11)},
        ["layers/0/wk", "layers/0/wo", "layers/0/wq", "layers/0/wv"],
        ["layers/0/w1", "layers/0/w2", "layers/0/w3"],
    ),
    "BERT": (
        {
            "attention": {
                "self": {n: w(8, 8) for n in ("query", "key", "value")},
                "output": {"dense": w(8, 8)},
            },
            "intermediate": {"dense": w(8, 12)},
            "output": {"dense": w(12, 8)},
            "lm_head": w(8, 11),
        },
        [
            "attention/output/dense",
            *(f"attention/self/{n}" for n in ("key", "query", "value")),
        ],
        ["intermediate/dense", "output/dense"],
    ),
    "T5 in one module": (
        {**{n: w(8, 8) for n in "qkvo"}, "wi": w(8, 12), "wo": w(12, 8)},
        ["k", "o", "q", "v"],
        ["wi", "wo"],
    ),
    "a fused projection": (
        {"qkv": w(8, 24), "proj": w(8, 8), "fc1": w(8, 12), "fc2": w(12, 8)},
        ["proj", "qkv"],
        ["fc1", "fc2"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_weights_beside_it_say_which_part_a_weight_is_of(name):
    params, *want = LAYOUTS[name]
    for preset, paths in zip(("attention", "mlp"), want, strict=True):
        got = chosen(jpeft.lora(rank=2, where=preset), params)
        assert got == [f"{p}/kernel" for p in paths]


# --- what acts instead ---------------------------------------------------------------


def test_a_refusal_says_what_the_weight_is_and_what_acts_on_it():
    conv = {"conv": {"kernel": jnp.ones((3, 3, 4, 5)), "bias": jnp.ones(5)}}
    for method in (jpeft.lokr(rank=2), jpeft.vera(rank=2, where="conv/.*")):
        with pytest.raises(
            ValueError, match="conv/kernel is a convolution.*jpeft.lo"
        ) as e:
            method(KEY, conv)
        assert "find_uses" not in str(e.value)
    for method in (jpeft.lora, jpeft.dora, jpeft.loha):  # as it says
        assert chosen(method(rank=2, where="conv/kernel"), conv)
    with pytest.raises(ValueError, match="add='linear'"):
        jpeft.bitfit()(KEY, w(6, 4))
    assert chosen(jpeft.bitfit(where=None, add="linear")._added(), w(6, 4))
    skip = {"norm": {"scale": jnp.ones(6)}, "D": jnp.ones(6)}
    with pytest.raises(ValueError, match="D is none by its name.*jpeft.full"):
        jpeft.norm_tuning(where="D")(KEY, skip)
    assert chosen(jpeft.full("D"), skip) == ["D"]


def test_a_complex_weight_is_not_to_be_cast():
    with pytest.raises(ValueError, match="complex64; exclude='w'$"):
        jpeft.lora(rank=2, where="w")(KEY, {"w": jnp.ones((4, 5), jnp.complex64)})


def test_a_path_that_is_no_pattern_names_itself():
    params = {"a+b": w(6, 4), "c": w(6, 4)}
    assert chosen(jpeft.lora(rank=2, where="a+b/kernel"), params) == ["a+b/kernel"]
    assert chosen(jpeft.lora(rank=2, exclude="a+b/kernel"), params) == ["c/kernel"]


def test_weights_in_doubt_are_named_in_one_refusal():
    """With 64 experts the refusals would be 64, one after the other."""
    experts = {k: {"up": jnp.ones((3, 6, 4))} for k in "012"}
    params = {"experts": experts, "head": w(4, 5)}
    with pytest.raises(ValueError, match="experts/0/up: lora cannot tell") as e:
        jpeft.lora(rank=2)(KEY, params)
    assert "pass uses=jpeft.find_uses(fn, params, *args)" in str(e.value)
    typed = eval(str(e.value).split("exclude=")[1])
    assert chosen(jpeft.lora(rank=2, exclude=typed), params) == ["head/kernel"]

    def fn(p, x):
        out = [x @ jnp.tanh(e["up"][0]) for e in p["experts"].values()]
        return sum(out[1:], out[0]) @ p["head"]["kernel"]

    uses = jpeft.find_uses(fn, params, X)
    with pytest.raises(ValueError, match="name it in where=") as e:
        jpeft.lora(rank=2)(KEY, params, uses=uses)
    typed = eval(str(e.value).split("exclude=")[1].split(", or name")[0])
    assert len(chosen(jpeft.lora(rank=2, exclude=typed), params, uses)) == 1
    assert len(chosen(jpeft.lora(rank=2, where=".*"), params, uses)) == 4
    # What has no full value cannot take the weight's place, named or not.
    with pytest.raises(ValueError, match="exclude=") as e:
        jpeft.bitfit(where=None, add="experts/0/up")(KEY, params, uses=uses)
    assert "materialize" not in str(e.value)
    assert chosen(jpeft.prompt(2, where="wte"), {"wte": jnp.ones((11, 4))}) == ["wte"]


def test_a_refusal_never_asks_again_for_uses_that_were_passed():
    base = {"w": w(6, 4), "norm": {"scale": jnp.ones(6)}}
    uses = jpeft.find_uses(lambda p, x: x @ p["w"]["kernel"], base, X)
    none = jpeft.find_uses(lambda p, x: x, base, X)
    methods = (jpeft.prompt(2), jpeft.lokr(rank=2, where="norm/scale"), jpeft.bitfit())
    methods += (jpeft.prefix(2, mode="tokens"), jpeft.lora(rank=2), jpeft.ia3())
    for known in (uses, none):
        for method in methods:
            try:
                method(KEY, base, uses=known)
            except ValueError as error:
                assert "pass uses" not in str(error), error
