"""Writes tunix_golden.npz: what tunix computes of a few random arrays.

    pip install --no-deps google-tunix==0.1.7 && pip install -e '.[test]'
    python tests/data/make_tunix_golden.py

tunix takes models; here the function that asks one for log-probabilities gives arrays
instead, so that losses and their gradients are those of the arrays.  Its packages are
imported without what their `__init__` asks for.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

[FOLDER] = importlib.util.find_spec("tunix").submodule_search_locations
for name in ("", ".rl", ".sft", ".sft.dpo", ".generate"):
    package = types.ModuleType(f"tunix{name}")
    package.__path__ = [FOLDER + name.replace(".", "/")]
    sys.modules[package.__name__] = package
for unused in ("sentencepiece", "tunix.sft.peft_trainer"):
    sys.modules[unused] = types.ModuleType(unused)
# Classes that the module of DPO derives its own from.
sys.modules["tunix.sft.peft_trainer"].__dict__.update(
    {name: object for name in ("PeftTrainer", "TrainingConfig", "TrainingInput")}
)

common = importlib.import_module("tunix.rl.common")
core = importlib.import_module("tunix.rl.algo_core")

ROWS, TOKENS = 6, 7
RNG = np.random.default_rng(0)
found = {}


def normal(*shape, by=1.0):
    return (by * RNG.standard_normal(shape)).astype(np.float32)


class Nothing(nnx.Module):
    """Stands for a model."""


def keep(name, f, x):
    """The loss of x and its gradient."""
    value, grad = jax.value_and_grad(f)(jnp.asarray(x))
    found[name], found[f"{name}/grad"] = np.asarray(value), np.asarray(grad)


# --- answers: (rows, tokens), ragged, two groups of three -----------------------------

lengths = np.array([7, 4, 1, 6, 5, 3])
given = {
    "mask": np.arange(TOKENS) < lengths[:, None],
    "new": -np.abs(normal(ROWS, TOKENS)),
    "values": normal(ROWS, TOKENS),
    "old_values": normal(ROWS, TOKENS),
    "rewards": normal(ROWS, TOKENS),
    "scores": normal(ROWS),
    "sums": -8 + normal(ROWS),
    "reference_sums": -8 + normal(ROWS),
}
given["old"] = given["new"] + normal(ROWS, TOKENS, by=0.3)
given["reference"] = given["new"] + normal(ROWS, TOKENS, by=0.5)
mask = jnp.asarray(given["mask"])

advantages, returns = core.compute_gae_advantages(
    given["rewards"], given["values"], mask, 0.9, 0.95
)
found["whitened"], found["returns"] = np.asarray(advantages), np.asarray(returns)
found["group"] = core.compute_advantages(given["scores"], 3)
found["rloo"] = np.asarray(core.compute_rloo_advantages(given["scores"], 3))
for kind in ("kl", "mse_kl", "low_var_kl"):
    found[kind] = np.asarray(
        common.compute_kl_divergence(given["new"], given["reference"], kind)
    )

current = {}
logits = jnp.zeros((ROWS, TOKENS, 2))
common.compute_per_token_logps = lambda *_, **__: (current["new"], logits)


def example(**more):
    return SimpleNamespace(
        prompt_ids=None,
        completion_ids=jnp.zeros((ROWS, TOKENS), int),
        completion_mask=mask,
        **more,
    )


def of(loss_fn, *args):
    def run(new):
        current["new"] = new
        return loss_fn(Nothing(), *args)[0]

    return run


how = SimpleNamespace(epsilon_low=0.2, epsilon_high=0.28, entropy_coef=0.0)
batch = example(
    advantages=advantages,
    old_per_token_logps=given["old"],
    ref_per_token_logps=None,
)
keep("ppo", of(core.ppo_policy_loss_fn, batch, how, 0, 1), given["new"])


def value_loss(values):
    # A score at every token; the value of one is that of the token before it.
    batch = example(old_values=given["old_values"], returns=returns)
    common.compute_score = lambda *_, **__: jnp.pad(values, ((0, 0), (0, 1)))
    return core.ppo_value_loss_fn(Nothing(), batch, 0.2, 0, 1)[0]


keep("value", value_loss, given["values"])
for name, mode, kind in (
    ("dapo", "token-mean", "grpo"),
    ("grpo", "sequence-mean-token-mean", "grpo"),
    ("dr_grpo", "sequence-mean-token-scale", "grpo"),
    ("gspo", "sequence-mean-token-mean", "gspo-token"),
):
    how = SimpleNamespace(
        beta=0.04,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_algo=kind,
        loss_agg_mode=mode,
        temperature=1.0,
        kl_loss_mode="low_var_kl",
        kl_clamp_value=None,
    )
    batch = example(
        advantages=jnp.asarray(found["group"]),
        old_per_token_logps=given["old"],
        ref_per_token_logps=given["reference"],
    )
    keep(name, of(core.grpo_loss_fn, batch, how, 0, 1), given["new"])

# --- pairs ---------------------------------------------------------------------------

trainer = importlib.import_module("tunix.sft.dpo.dpo_trainer")
half = ROWS // 2
trainer.compute_logps = lambda *_, **__: (current["new"][:half], current["new"][half:])
pairs = SimpleNamespace(
    **dict.fromkeys(
        ("input_ids", "positions", "attention_mask", "logits_to_keep", "images")
    ),
    completion_mask=mask,
    ref_chosen_logps=given["reference_sums"][:half],
    ref_rejected_logps=given["reference_sums"][half:],
)
for name, smoothing in (("dpo", 0.0), ("dpo_smoothed", 0.1)):
    keep(
        name, of(trainer.dpo_loss_fn, pairs, "dpo", 0.1, 0.1, smoothing), given["sums"]
    )

found |= {f"given/{name}": x for name, x in given.items()}
np.savez_compressed(Path(__file__).parent / "tunix_golden.npz", **found)
