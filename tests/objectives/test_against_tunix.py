"""What tunix computes of the same arrays: `tests/data/make_tunix_golden.py`."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jpeft.objectives import (
    estimate_kl,
    gae,
    group_relative,
    grpo_loss,
    leave_one_out,
    policy_loss,
    preference_loss,
    value_loss,
    whiten,
)

FILE = np.load(Path(__file__).parents[1] / "data" / "tunix_golden.npz")
GIVEN = {k.partition("/")[2]: FILE[k] for k in FILE.files if k.startswith("given/")}
MASK = GIVEN["mask"]


def assert_close(got, want):
    """Both sides are float32: some dozens of roundings of 6e-8 of numbers up to ten."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def assert_same(name, loss, x):
    """The value and the gradient of a loss."""
    value, grad = jax.jit(jax.value_and_grad(lambda x: loss(x).mean()))(x)
    assert_close(value, FILE[name])
    assert_close(grad, FILE[f"{name}/grad"])


def test_advantages():
    f = jax.jit(lambda r, v: gae(r, v, MASK, gamma=0.9, lam=0.95))
    raw, returns = f(GIVEN["rewards"], GIVEN["values"])
    assert_close(whiten(raw, MASK), FILE["whitened"] * MASK)
    assert_close(returns, FILE["returns"] * MASK)


def test_advantages_of_groups():
    scores = GIVEN["scores"].reshape(-1, 3)
    # tunix adds 1e-6 to the deviation, as the first code of GRPO did; here it is 1e-4.
    got, want = group_relative(scores), FILE["group"].reshape(-1, 3)
    np.testing.assert_allclose(got, want, rtol=3e-4)
    assert_close(leave_one_out(scores), FILE["rloo"].reshape(-1, 3))


@pytest.mark.parametrize(
    ("estimator", "name"),
    [("k1", "kl"), ("k2", "mse_kl"), ("k3", "low_var_kl")],
)
def test_estimators_of_kl(estimator, name):
    got = estimate_kl(GIVEN["new"], GIVEN["reference"], estimator=estimator)
    assert_close(got, FILE[name])


def test_ppo():
    def loss(new):
        advantages = FILE["whitened"]
        return policy_loss(
            new, GIVEN["old"], advantages, MASK, clip=0.2, clip_high=0.28
        )

    assert_same("ppo", loss, GIVEN["new"])
    old = GIVEN["old_values"], FILE["returns"], MASK
    assert_same("value", lambda v: value_loss(v, *old, clip=0.2), GIVEN["values"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dapo", {}),
        ("grpo", {"aggregation": "grpo"}),
        ("dr_grpo", {"aggregation": "dr_grpo", "longest": MASK.shape[1]}),
        ("gspo", {"aggregation": "grpo", "level": "sequence"}),
    ],
)
def test_grpo(name, options):
    def loss(new):
        return grpo_loss(
            *(new, FILE["group"], MASK),
            old=GIVEN["old"],
            reference=GIVEN["reference"],
            clip=0.2,
            clip_high=0.28,
            beta=0.04,
            **options,
        )

    assert_same(name, loss, GIVEN["new"])


@pytest.mark.parametrize(("name", "smoothing"), [("dpo", 0.0), ("dpo_smoothed", 0.1)])
def test_dpo(name, smoothing):
    def loss(sums):
        chosen, rejected = np.split(np.arange(len(GIVEN["sums"])), 2)
        ratios = sums - GIVEN["reference_sums"]
        return preference_loss(
            "dpo",
            *(ratios[chosen], ratios[rejected]),
            beta=0.1,
            label_smoothing=smoothing,
        )

    assert_same(name, loss, GIVEN["sums"])
