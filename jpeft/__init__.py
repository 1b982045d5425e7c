"""jpeft: parameter-efficient fine-tuning of any JAX model."""

from jpeft.adapt.entry import adapt as adapt
from jpeft.adapt.uses import find_uses as find_uses
from jpeft.leaf import AdaptedLeaf as AdaptedLeaf
from jpeft.methods.bitfit import bitfit as bitfit
from jpeft.methods.full import full as full
from jpeft.methods.lora import lora as lora
from jpeft.transform import Transform as Transform
from jpeft.transform import chain as chain
from jpeft.tree.split import combine as combine
from jpeft.tree.split import count as count
from jpeft.tree.split import disable as disable
from jpeft.tree.split import merge as merge
from jpeft.tree.split import partition as partition
from jpeft.tree.split import summary as summary
from jpeft.tree.split import trainable_mask as trainable_mask
from jpeft.tree.split import unload as unload
from jpeft.types import DensifyError as DensifyError
from jpeft.types import DensifyWarning as DensifyWarning
