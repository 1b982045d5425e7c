"""DPO and its kin: pinned values, and gradients against float64."""

import functools

import float64
import jax
import numpy as np
import pytest
from draws import normal
from float64 import log_sigmoid as ls
from float64 import sigmoid as s

from jpeft.objectives import (
    kto,
    kto_divergence,
    preference_loss,
    sequence_log_probs,
)
from jpeft.objectives.preference import LOSSES

B = 0.1
one = lambda x: np.float32([x])
# Chosen: log p -10 over 5 tokens, reference -11; rejected: -12 over 8, reference -11.5.
RATIOS, SUMS, TOKENS = (1.0, -0.5), (-10.0, -12.0), (5, 8)


def log_odds(a):
    return a - np.log1p(-np.exp(a))


# name: (arguments of the pin, options, pin, the formula in float64)
ROWS = {
    "dpo": (RATIOS, {}, 0.62095705, lambda c, d: -ls(B * (c - d))),
    "dpo, smoothed": (
        RATIOS,
        {"label_smoothing": 0.1},
        0.63595705,
        lambda c, d: -0.9 * ls(B * (c - d)) - 0.1 * ls(-B * (c - d)),
    ),
    "robust_dpo": (
        RATIOS,
        {"label_smoothing": 0.1},
        0.60220705,
        lambda c, d: (-0.9 * ls(B * (c - d)) + 0.1 * ls(-B * (c - d))) / 0.8,
    ),
    "hinge": (RATIOS, {}, 0.85, lambda c, d: np.maximum(0, 1 - B * (c - d))),
    "ipo": (
        (*RATIOS, *TOKENS),
        {},
        22.44390625,
        lambda c, d, m, n: (c / m - d / n - 0.5 / B) ** 2,
    ),
    "ipo_summed": (RATIOS, {}, 12.25, lambda c, d: (c - d - 0.5 / B) ** 2),
    "normalised_dpo": (
        (*RATIOS, *TOKENS),
        {},
        0.68010831,
        lambda c, d, m, n: -ls(B * (c / m - d / n)),
    ),
    "nca": (
        RATIOS,
        {},
        1.35082481,
        lambda c, d: -ls(B * c) - 0.5 * ls(-B * c) - 0.5 * ls(-B * d),
    ),
    "bco": (RATIOS, {}, 1.31285631, lambda c, d: -ls(B * c) - ls(-B * d)),
    "bco, delta": (
        RATIOS,
        {"delta": 0.3},
        None,
        lambda c, d: -ls(B * c - 0.3) - ls(0.3 - B * d),
    ),
    "sppo": (
        RATIOS,
        {},
        36.25,
        lambda c, d: (c - 0.5 / B) ** 2 + (d + 0.5 / B) ** 2,
    ),
    "apo_zero": (RATIOS, {}, 0.96252342, lambda c, d: 1 - s(B * c) + s(B * d)),
    "apo_down": (RATIOS, {}, 0.98754934, lambda c, d: s(B * c) + 1 - s(B * (c - d))),
    "exo": (
        RATIOS,
        {},
        2.50551656,
        lambda c, d: (
            s(B * (c - d)) * (ls(B * (c - d)) - np.log(0.999))
            + s(B * (d - c)) * (ls(B * (d - c)) - np.log(0.001))
        ),
    ),
    "discopop": (
        RATIOS,
        {},
        0.84933758,
        lambda c, d: (
            -ls(B * (c - d)) * (1 - s(B * (c - d) / 0.05))
            + np.exp(-B * (c - d)) * s(B * (c - d) / 0.05)
        ),
    ),
    "f_dpo": (
        RATIOS,
        {},
        0.63115438,
        lambda c, d: -ls(B * (-np.exp(-c) + np.exp(-d))),
    ),
    "f_dpo, js": (
        RATIOS,
        {"divergence": "js"},
        0.66065216,
        lambda c, d: -ls(B * (ls(c) - ls(d))),
    ),
    "cpo": (SUMS, {}, 0.59813887, lambda c, d: -ls(B * (c - d))),
    "simpo": (
        (*SUMS, *TOKENS),
        {},
        2.12692801,
        lambda c, d, m, n: -ls(2 * (c / m - d / n) - 1),
    ),
    "orpo": (
        (*SUMS, *TOKENS),
        {},
        1.04205781,
        lambda c, d, m, n: -ls(log_odds(c / m) - log_odds(d / n)),
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_the_loss_and_its_gradient(case):
    args, options, pin, formula = ROWS[case]
    name, counts = case.split(",")[0], [np.array([5, 2, 7]), np.array([8, 3, 4])]
    of_pairs = len(args) == 2
    counts = [] if of_pairs else counts
    chosen, rejected = normal(0, 3), normal(1, 3)
    if args[:2] == SUMS:
        chosen, rejected = -np.exp(chosen), -np.exp(rejected)
    run = functools.partial(preference_loss, name, **options)
    ours = lambda c, d: run(c, d, *counts).mean()
    float64.assert_same(
        ours, lambda c, d: np.mean(formula(c, d, *counts)), chosen, rejected
    )
    if pin is not None:
        got = run(*map(one, args[:2]), *([n] for n in args[2:])).mean()
        np.testing.assert_allclose(got, pin, rtol=1e-6)


def test_every_loss_has_a_row():
    assert {case.split(",")[0] for case in ROWS} == set(LOSSES)


def test_orpo_whole():
    nll, odds = 10 / 5, preference_loss("orpo", *map(one, SUMS), [5], [8]).mean()
    np.testing.assert_allclose(nll + 0.1 * odds, 2.10420578, rtol=1e-6)


def test_orpo_of_a_certain_answer_is_finite():
    f = lambda c: preference_loss("orpo", c, one(-3.0), [5], [8]).mean()
    value, grad = jax.jit(jax.value_and_grad(f))(one(0.0))
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_ipo_averages_over_tokens_unless_summed_is_asked_for():
    averaged = preference_loss("ipo", *map(one, RATIOS), [5], [8]).mean()
    summed = preference_loss("ipo_summed", *map(one, RATIOS)).mean()
    assert np.isclose(averaged, 22.44390625) and np.isclose(summed, 12.25)
    with pytest.raises(TypeError, match="'ipo' with 2 arrays .*'chosen_tokens'"):
        preference_loss("ipo", *map(one, RATIOS))


# --- KTO -----------------------------------------------------------------------------

KTO = jax.jit(lambda c, good, z: kto(c, good, z).mean())


def test_kto_pins():
    got = KTO(one(1.0), np.array([True]), 0.2), KTO(one(-0.5), np.array([False]), 0.2)
    np.testing.assert_allclose(got, [0.48001066, 0.48250714], rtol=1e-6)


def test_kto_and_its_gradient():
    good = np.array([True, False, False, True])
    c = normal(2, 4)
    weights = np.where(good, 1.5, 0.5)
    ours = lambda c: kto(
        c, good, 0.2, desirable_weight=1.5, undesirable_weight=0.5
    ).mean()
    want = lambda c: np.mean(
        weights * np.where(good, 1 - s(B * (c - 0.2)), 1 - s(B * (0.2 - c)))
    )
    float64.assert_same(ours, want, c)


def test_ktos_divergence_is_not_negative_and_has_no_gradient():
    good, c = np.array([True, False]), np.float32([0.3, -0.2])
    assert KTO(c, good, -5.0) == KTO(c, good, 0.0) != KTO(c, good, 0.5)
    f = lambda m: kto(c, good, kto_divergence(m).mean()).mean()
    value, grad = jax.jit(jax.value_and_grad(f))(np.float32([0.5, 0.7]))
    assert np.all(grad == 0) and np.isclose(value, KTO(c, good, 0.6))


# --- sums, weights, messages ---------------------------------------------------------


def test_sums_over_answers():
    log_probs, mask = -np.abs(normal(3, 3, 5)), float64.ragged(3, 5, seed=6)
    mask[1] = False
    hidden = np.where(mask, log_probs, np.float32(np.nan))
    total, count = jax.jit(sequence_log_probs)(hidden, mask)
    want = np.where(mask, np.float64(log_probs), 0).sum(-1)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert count.tolist() == mask.sum(-1).tolist()


def test_what_is_no_pair_may_be_nan():
    c, d = np.float32([1, np.nan, 0.5]), np.float32([-0.5, 2, 0])
    weight = np.array([1, 0, 1])
    f = jax.jit(
        jax.value_and_grad(
            lambda c, d: preference_loss("dpo", c, d, weight=weight).mean(), (0, 1)
        )
    )
    value, grads = f(c, d)
    want, _ = f(np.float32([1, 0, 0.5]), d)
    assert value == want and np.isfinite(grads).all()


def test_messages():
    with pytest.raises(ValueError, match="loss='simop': expected one of .*'simpo'"):
        preference_loss("simop", one(1.0), one(0.0))
    with pytest.raises(TypeError, match=r"options \['gamma'\]: .* of options \('beta'"):
        preference_loss("dpo", one(1.0), one(0.0), gamma=1)
    with pytest.raises(ValueError, match=r"dpo: rejected has shape \(2,\)"):
        preference_loss("dpo", one(1.0), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="label_smoothing=0.5: expected from 0 up to"):
        preference_loss("robust_dpo", one(1.0), one(0.0), label_smoothing=0.5)
    with pytest.raises(ValueError, match="divergence='kl': expected one of"):
        preference_loss("f_dpo", one(1.0), one(0.0), divergence="kl")
    with pytest.raises(ValueError, match="divergence has shape .*kto_divergence"):
        kto(np.zeros(2, np.float32), [True, False], np.zeros(2, np.float32))
