"""Losses and estimators of instruction tuning and RLHF: pure functions of arrays."""

from jpeft.objectives.linear_ce import linear_cross_entropy as linear_cross_entropy
from jpeft.objectives.tokens import entropy as entropy
from jpeft.objectives.tokens import log_probs as log_probs
from jpeft.objectives.tokens import next_token_loss as next_token_loss
from jpeft.objectives.tokens import shift_labels as shift_labels
from jpeft.objectives.weighted import Weighted as Weighted
from jpeft.objectives.weighted import (
    accumulated_value_and_grad as accumulated_value_and_grad,
)
