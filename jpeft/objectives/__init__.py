"""Losses and estimators of instruction tuning and RLHF: pure functions of arrays.

Losses return `Weighted`, a sum and a count, which add up exactly over micro-batches and
devices; `.mean()` is the loss.  All is computed in float32.
"""

from jpeft.objectives.advantages import gae as gae
from jpeft.objectives.advantages import group_relative as group_relative
from jpeft.objectives.advantages import leave_one_out as leave_one_out
from jpeft.objectives.advantages import masked_mean as masked_mean
from jpeft.objectives.advantages import masked_variance as masked_variance
from jpeft.objectives.advantages import place_scores as place_scores
from jpeft.objectives.advantages import place_scores_after_end as place_scores_after_end
from jpeft.objectives.advantages import whiten as whiten
from jpeft.objectives.grpo import grpo_loss as grpo_loss
from jpeft.objectives.kl import adapt_coefficient as adapt_coefficient
from jpeft.objectives.kl import clipped_share as clipped_share
from jpeft.objectives.kl import estimate_kl as estimate_kl
from jpeft.objectives.linear_ce import linear_cross_entropy as linear_cross_entropy
from jpeft.objectives.masks import answer_mask as answer_mask
from jpeft.objectives.masks import truncated as truncated
from jpeft.objectives.ppo import clip_fraction as clip_fraction
from jpeft.objectives.ppo import explained_variance as explained_variance
from jpeft.objectives.ppo import policy_loss as policy_loss
from jpeft.objectives.ppo import value_loss as value_loss
from jpeft.objectives.preference import apo_down as apo_down
from jpeft.objectives.preference import apo_zero as apo_zero
from jpeft.objectives.preference import bco as bco
from jpeft.objectives.preference import cpo as cpo
from jpeft.objectives.preference import discopop as discopop
from jpeft.objectives.preference import dpo as dpo
from jpeft.objectives.preference import exo as exo
from jpeft.objectives.preference import f_dpo as f_dpo
from jpeft.objectives.preference import hinge as hinge
from jpeft.objectives.preference import ipo as ipo
from jpeft.objectives.preference import ipo_summed as ipo_summed
from jpeft.objectives.preference import kto as kto
from jpeft.objectives.preference import kto_divergence as kto_divergence
from jpeft.objectives.preference import nca as nca
from jpeft.objectives.preference import normalised_dpo as normalised_dpo
from jpeft.objectives.preference import orpo as orpo
from jpeft.objectives.preference import preference_loss as preference_loss
from jpeft.objectives.preference import robust_dpo as robust_dpo
from jpeft.objectives.preference import sequence_log_probs as sequence_log_probs
from jpeft.objectives.preference import simpo as simpo
from jpeft.objectives.preference import sppo as sppo
from jpeft.objectives.reward import accuracy as accuracy
from jpeft.objectives.reward import bradley_terry as bradley_terry
from jpeft.objectives.reward import last_token_scores as last_token_scores
from jpeft.objectives.reward import margin as margin
from jpeft.objectives.tokens import entropy as entropy
from jpeft.objectives.tokens import log_probs as log_probs
from jpeft.objectives.tokens import next_token_loss as next_token_loss
from jpeft.objectives.tokens import shift_labels as shift_labels
from jpeft.objectives.weighted import Weighted as Weighted
from jpeft.objectives.weighted import (
    accumulated_value_and_grad as accumulated_value_and_grad,
)
