"""Optimisers, on Optax."""

from jpeft.optim.freeze import freeze as freeze
from jpeft.optim.freeze import value_and_grad as value_and_grad
from jpeft.optim.offload import offload as offload
