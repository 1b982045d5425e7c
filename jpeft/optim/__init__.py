"""Optimisers, on Optax."""

from jpeft.optim.allocator import adalora_allocator as adalora_allocator
from jpeft.optim.freeze import freeze as freeze
from jpeft.optim.freeze import value_and_grad as value_and_grad
from jpeft.optim.lora_plus import lora_plus as lora_plus
from jpeft.optim.offload import offload as offload
