"""jpeft: parameter-efficient fine-tuning of any JAX model."""

import importlib
from typing import TYPE_CHECKING, Any

from jpeft import config as config
from jpeft import extend as extend
from jpeft import quant as quant
from jpeft import sharding as sharding
from jpeft.adapt.entry import adapt as adapt
from jpeft.adapt.uses import find_uses as find_uses
from jpeft.config import from_config as from_config
from jpeft.leaf import AdaptedLeaf as AdaptedLeaf
from jpeft.methods.adalora import adalora as adalora
from jpeft.methods.adalora import compact as compact
from jpeft.methods.adalora import orthogonality as orthogonality
from jpeft.methods.adapter import adapter as adapter
from jpeft.methods.bitfit import bitfit as bitfit
from jpeft.methods.diff_pruning import diff_pruning as diff_pruning
from jpeft.methods.diff_pruning import expected_l0 as expected_l0
from jpeft.methods.diff_pruning import sparsify as sparsify
from jpeft.methods.dora import dora as dora
from jpeft.methods.full import full as full
from jpeft.methods.gated import gated as gated
from jpeft.methods.hira import hira as hira
from jpeft.methods.ia3 import ia3 as ia3
from jpeft.methods.loftq import loftq as loftq
from jpeft.methods.loha import loha as loha
from jpeft.methods.lokr import lokr as lokr
from jpeft.methods.lora import lora as lora
from jpeft.methods.mam import mam as mam
from jpeft.methods.norm_tuning import norm_tuning as norm_tuning
from jpeft.methods.p_tuning import p_tuning as p_tuning
from jpeft.methods.prefix import p_tuning_v2 as p_tuning_v2
from jpeft.methods.prefix import prefix as prefix
from jpeft.methods.prefix_text import prefix_from_text as prefix_from_text
from jpeft.methods.prompt import prompt as prompt
from jpeft.methods.quantize import quantize as quantize
from jpeft.methods.unipelt import unipelt as unipelt
from jpeft.methods.vera import vera as vera
from jpeft.transform import Transform as Transform
from jpeft.transform import chain as chain
from jpeft.tree.change import cast as cast
from jpeft.tree.change import disable as disable
from jpeft.tree.change import select as select
from jpeft.tree.describe import count as count
from jpeft.tree.describe import summary as summary
from jpeft.tree.filter import trainable_filter as trainable_filter
from jpeft.tree.merge import finalize as finalize
from jpeft.tree.merge import merge as merge
from jpeft.tree.merge import unload as unload
from jpeft.tree.partition import combine as combine
from jpeft.tree.partition import partition as partition
from jpeft.tree.partition import trainable_mask as trainable_mask
from jpeft.types import CheckpointError as CheckpointError
from jpeft.types import CheckpointWarning as CheckpointWarning
from jpeft.types import DamagedError as DamagedError
from jpeft.types import DensifyError as DensifyError
from jpeft.types import DensifyWarning as DensifyWarning
from jpeft.types import DerivativeError as DerivativeError
from jpeft.types import PromiseError as PromiseError
from jpeft.types import __version__ as __version__
from jpeft.virtual import VirtualTokens as VirtualTokens
from jpeft.virtual import prepend_virtual_tokens as prepend_virtual_tokens
from jpeft.virtual import strip_virtual_tokens as strip_virtual_tokens
from jpeft.virtual import virtual_template as virtual_template

# Rooms that a program may never enter would take an eighth of this import's time, so
# they are imported with the first name that is asked of them.
if TYPE_CHECKING:
    from jpeft import checkpoint as checkpoint
    from jpeft import hf as hf
    from jpeft import objectives as objectives
    from jpeft import optim as optim
    from jpeft import plot as plot
    from jpeft.checkpoint.adapter import load as load
    from jpeft.checkpoint.adapter import read_transform as read_transform
    from jpeft.checkpoint.adapter import save as save
    from jpeft.checkpoint.manager import CheckpointManager as CheckpointManager
    from jpeft.checkpoint.stream import load_quantized as load_quantized
    from jpeft.optim.freeze import freeze as freeze
    from jpeft.optim.freeze import value_and_grad as value_and_grad

_LATE = {
    "checkpoint": "jpeft.checkpoint",
    "hf": "jpeft.hf",
    "objectives": "jpeft.objectives",
    "optim": "jpeft.optim",
    "plot": "jpeft.plot",
    "load": "jpeft.checkpoint.adapter",
    "read_transform": "jpeft.checkpoint.adapter",
    "save": "jpeft.checkpoint.adapter",
    "CheckpointManager": "jpeft.checkpoint.manager",
    "load_quantized": "jpeft.checkpoint.stream",
    "freeze": "jpeft.optim.freeze",
    "value_and_grad": "jpeft.optim.freeze",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = importlib.import_module(_LATE[name])
    value = room if _LATE[name] == f"{__name__}.{name}" else getattr(room, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE} - {"Any", "TYPE_CHECKING", "importlib"})
