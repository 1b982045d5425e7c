"""What TRL computes of the same arrays; `tests/data/make_trl_golden.py` asked it."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jpeft.objectives import (
    bradley_terry,
    estimate_kl,
    gae,
    group_relative,
    grpo_loss,
    kto,
    kto_divergence,
    leave_one_out,
    linear_cross_entropy,
    log_probs,
    next_token_loss,
    place_scores_after_end,
    policy_loss,
    preference_loss,
    sequence_log_probs,
    shift_labels,
    value_loss,
    whiten,
)

FILE = np.load(Path(__file__).parents[1] / "data" / "trl_golden.npz")
SETTINGS = json.loads(bytes(FILE["settings"]))


def room(name):
    return {k[len(name) + 1 :]: FILE[k] for k in FILE.files if k.startswith(name + "/")}


def assert_close(got, want):
    """Both sides are float32: some dozens of roundings of 6e-8 of numbers up to ten."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


PAIRS = room("pairs")
ANSWERS, GROUPS, PPO, SFT = map(room, ("answers", "groups", "ppo", "sft"))
BETA = SETTINGS["beta"]


def answers_log_probs(logits, ids, completion_mask):
    labels, mask = shift_labels(ids, completion_mask)
    return sequence_log_probs(log_probs(logits, labels), mask)


BY_TRL = {
    "sigmoid": ("dpo", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "exo_pair": ("exo", {}),
    "nca_pair": ("nca", {}),
    "robust": ("robust_dpo", {"label_smoothing": SETTINGS["label_smoothing"]}),
    "bco_pair": ("bco", {}),
    "sppo_hard": ("sppo", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}),
    "sigmoid_norm": ("normalised_dpo", {}),
    "forward_kl": ("f_dpo", {"divergence": "forward_kl"}),
    "js_divergence": ("f_dpo", {"divergence": "js"}),
}


@pytest.mark.parametrize("loss", BY_TRL)
def test_pairs_from_logits_with_gradients(loss):
    name, options = BY_TRL[loss]

    def ours(logits):
        sums, tokens = answers_log_probs(logits, PAIRS["ids"], PAIRS["completion_mask"])
        c, d = sums[:3] - PAIRS["ref_chosen"], sums[3:] - PAIRS["ref_rejected"]
        counts = (tokens[:3], tokens[3:]) if name in ("ipo", "normalised_dpo") else ()
        return preference_loss(name, c, d, *counts, beta=BETA, **options).mean()

    value, grad = jax.jit(jax.value_and_grad(ours))(PAIRS["logits"])
    assert_close(value, PAIRS[loss])
    assert_close(grad, PAIRS[f"{loss}/grad"])


def test_pairs_without_a_reference():
    sums = PAIRS["sums_chosen"], PAIRS["sums_rejected"]
    tokens = PAIRS["tokens_chosen"], PAIRS["tokens_rejected"]
    losses = jax.jit(
        lambda: [
            preference_loss("cpo", *sums, beta=BETA).mean(),
            preference_loss("simpo", *sums, *tokens, beta=2.0, gamma=1.0).mean(),
            preference_loss("orpo", *sums, *tokens).mean(),
        ]
    )
    want = [PAIRS[name].mean() for name in ("cpo", "simpo", "orpo")]
    assert_close(losses(), want)


def test_kto():
    given = room("kto")

    def ours(logits):
        sums, _ = answers_log_probs(
            logits, given["input_ids"], given["completion_mask"]
        )
        others, _ = answers_log_probs(
            given["other_logits"], given["KL_input_ids"], given["KL_completion_mask"]
        )
        z = kto_divergence(others - given["ref_KL_logps"]).mean()
        loss = kto(
            sums - given["ref_logps"],
            given["label"],
            z,
            beta=BETA,
            desirable_weight=1.5,
            undesirable_weight=0.5,
        )
        return loss.mean(), z

    f = jax.jit(jax.value_and_grad(ours, has_aux=True))
    (value, z), grad = f(given["logits"])
    assert z > 0.1  # else the test would not see it
    assert_close(z, given["kl"])
    assert_close(value, given["loss"])
    assert_close(grad, given["grad"])


def test_reward():
    given = room("reward")
    chosen, rejected = np.split(given["rewards"], 2)
    f = lambda c, r, m: bradley_terry(c, r, margin=m, centre=0.01).mean()
    assert_close(jax.jit(f)(chosen, rejected, given["margin"]), given["loss"])


OPTIONS = {
    "grpo": {"aggregation": "grpo"},
    "bnpo": {"aggregation": "bnpo"},
    "dapo": {},
    "dr_grpo": {"aggregation": "dr_grpo", "longest": 6},
    "clip_higher": {"clip": 0.1, "clip_high": 0.4},
    "two_sided": {"most": 1.3},
    "gspo": {"level": "sequence", "aggregation": "grpo"},
    "cispo": {"kind": "cispo", "cap": 1.1},
    "kl": {"beta": 0.3},
    "kl_corrected": {"beta": 0.3, "corrected": True},
}


def test_every_loss_of_the_file_is_tried():
    assert set(OPTIONS) == set(SETTINGS["answers"])
    assert set(BY_TRL) == {k.removesuffix("/grad") for k in PAIRS if "/grad" in k}


@pytest.mark.parametrize("loss", OPTIONS)
def test_answers_with_gradients(loss):
    options = dict(OPTIONS[loss])
    if "beta" in options:
        options["reference"] = ANSWERS["ref"]

    def ours(new):
        return grpo_loss(
            new, ANSWERS["advantages"], ANSWERS["mask"], old=ANSWERS["old"], **options
        ).mean()

    value, grad = jax.jit(jax.value_and_grad(ours))(ANSWERS["new"])
    assert_close(value, ANSWERS[loss])
    assert_close(grad, ANSWERS[f"{loss}/grad"])


@pytest.mark.parametrize("scale", ["group", "none", "batch", "rloo"])
def test_advantages_of_groups(scale):
    scored = np.isfinite(GROUPS["rewards"])
    f = leave_one_out if scale == "rloo" else partial(group_relative, scale=scale)
    got = jax.jit(lambda r: f(r, scored=scored))(GROUPS["rewards"])
    # Of the group whose rewards are all 0.1 there may be a rounding left in TRL, times
    # 1 / eps: up to 1e-8 / 1e-4.
    np.testing.assert_allclose(got, GROUPS[scale], rtol=1e-5, atol=1e-4)
    assert np.all(got[2] == 0)


def test_ppo_in_trls_layout():
    last = PPO["last"][:, None]
    mask = np.arange(6) <= last

    @jax.jit
    def advantages():
        kl = estimate_kl(PPO["logprobs"], PPO["ref"], estimator="k1")
        rewards, longer = place_scores_after_end(-0.05 * kl, PPO["scores"], mask)
        raw, returns = gae(rewards, PPO["values"], longer, gamma=0.9, lam=0.95)
        return rewards, whiten(raw, mask), returns, longer

    rewards, whitened, returns, longer = advantages()
    assert_close(rewards, PPO["rewards"])
    assert_close(whitened, PPO["advantages"])
    assert_close(returns, PPO["returns"])

    @jax.jit
    def losses(new, values):
        old, old_values = PPO["logprobs"], PPO["values"]
        policy = lambda new: policy_loss(new, old, whitened, mask).mean()
        value = lambda v: value_loss(v, old_values, returns, longer).mean()
        return jax.value_and_grad(policy)(new), jax.value_and_grad(value)(values)

    policy, value = losses(PPO["new"], PPO["new_values"])
    assert_close(policy[0], PPO["policy_loss"])
    assert_close(policy[1], PPO["policy_grad"])
    assert_close(value[0], PPO["value_loss"])
    assert_close(value[1], PPO["value_grad"])


def supervised():
    labels = SFT["labels"]
    return shift_labels(np.maximum(labels, 0), labels != -100)


def test_chunked_supervised_loss_with_gradients():
    def ours(hidden, head, bias):
        return linear_cross_entropy(
            hidden, head, *supervised(), tied=True, bias=bias, chunk=4, soft_cap=3.0
        ).mean()

    args = SFT["hidden"], SFT["head"], SFT["bias"]
    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*args)
    assert_close(value, SFT["chunked_nll"])
    for name, grad in zip(("hidden", "head", "bias"), grads, strict=True):
        assert_close(grad, SFT[f"{name}_grad"])


def test_dft():
    dft = lambda z: next_token_loss(z, *supervised(), kind="dft").mean()
    got = jax.jit(dft)(SFT["hidden"] @ SFT["head"].T)
    assert_close(got, SFT["dft"])
