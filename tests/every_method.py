"""One table of methods: what is in it meets every law, every form of a model, every way
to use a weight, and a twin written by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import formulas as f
import jax
import numpy as np
import twins
from draws import moved
from forms import FORMS
from text_forms import TEXT_FORMS, WORD_FORMS, N
from twins import RANK, SCALE, Cost

import jpeft


@dataclasses.dataclass(frozen=True)
class Alone:
    """A method on one weight `w`; refused: ways to use `w` that it has no form for
    (see tests/leaves/test_weight_deltas.py)."""

    make: Callable[[], jpeft.Transform]
    refused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Method:
    """make: as the laws have it, on the models of tests/forms.py.

    formula: class of a leaf -> (leaf, its base's value, tree) -> W', in float64 NumPy.
    alone: the method on one weight, in every way that a model may use it.
    costs: beside twins written by hand, in the sizes of tests/twins.py.
    """

    make: Callable[[], jpeft.Transform]
    merges: bool = True  # the effective weight exists
    quantizes: bool = False  # the base itself is stored in another format
    kept: bool = True  # attached, it leaves the output as it is
    forms: str = ""  # "text_": with virtual tokens; "words_": texts of real tokens
    formula: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    alone: Mapping[str, Alone] = dataclasses.field(default_factory=dict)
    costs: Mapping[str, Cost] = dataclasses.field(default_factory=dict)


def alone(make, *refused):
    return {"": Alone(make, refused)}


def cost(make, twin, *more):
    return {"": Cost(make, twin, *more)}


# Ways to use a weight, as tests/leaves/test_weight_deltas.py names them.
TABLES = "table, tied", "table, out of range"
CONVS = "convolution", "convolution in groups"
BESIDE = "beside a plain one", "stacked", "padded"

METHODS = {
    "lora": Method(
        lambda: jpeft.lora(rank=2, alpha=3),
        formula={"LowRank": f.low_rank},
        alone=alone(lambda: jpeft.lora(rank=2, alpha=3)),
        costs={
            "table": Cost(
                lambda: jpeft.lora(RANK, SCALE * RANK, where="embed/.*"),
                twins.LowRankTable,
            )
        },
    ),
    "rslora": Method(
        lambda: jpeft.lora(rank=2, alpha=3, rank_stabilized=True),
        costs=cost(
            lambda: jpeft.lora(RANK, SCALE * RANK**0.5, rank_stabilized=True),
            twins.LowRank,
        ),
    ),
    "adalora": Method(
        lambda: jpeft.adalora(rank=2, alpha=3),
        formula={"Triplets": f.triplets},
        alone=alone(lambda: jpeft.adalora(rank=2, alpha=3)),
        costs=cost(lambda: jpeft.adalora(RANK, SCALE * RANK), twins.Triplets),
    ),
    "bitfit": Method(
        lambda: jpeft.bitfit(),
        formula={"Delta": f.added},
        costs=cost(jpeft.bitfit, twins.Added),
    ),
    "bitfit_added": Method(lambda: jpeft.bitfit(add="linear"), merges=False),
    # Gates that start half open, so that alpha moves without the noise too.
    "diff_pruning": Method(
        lambda: jpeft.diff_pruning(alpha=0.8),
        formula={"GatedDelta": f.gated},
        costs=cost(lambda: jpeft.diff_pruning(alpha=0.8), twins.Pruned),
    ),
    "diff_pruning_structured": Method(
        lambda: jpeft.diff_pruning(structured=True, alpha=0.8),
        formula={"GroupedDelta": f.gated_in_groups},
    ),
    "full": Method(
        lambda: jpeft.full(".*"), formula={"Whole": lambda x, w, _: f.array(x.value)}
    ),
    "lora_and_head": Method(
        lambda: jpeft.chain(
            jpeft.lora(rank=2, alpha=2, where=".*up/(kernel|w)"),
            jpeft.full(".*(head|down)/.*"),
        )
    ),
    "pissa": Method(
        lambda: jpeft.lora(rank=2, alpha=3, init="pissa"),
        formula={"ShiftedLowRank": f.shifted},
        alone=alone(lambda: jpeft.lora(rank=2, alpha=3, init="pissa")),
    ),
    "pissa_niter": Method(lambda: jpeft.lora(rank=2, alpha=3, init="pissa_niter_2")),
    "olora": Method(lambda: jpeft.lora(rank=2, alpha=3, init="olora")),
    "lora_on_pissa": Method(
        lambda: jpeft.chain(
            jpeft.lora(rank=2, init="pissa"), jpeft.lora(rank=1, alpha=1)
        )
    ),
    "qlora": Method(
        # In the model's own dtype, so that merged and unmerged differ by sums alone.
        lambda: jpeft.chain(
            jpeft.quantize("nf4", compute_dtype=None), jpeft.lora(rank=2, alpha=3)
        ),
        quantizes=True,
    ),
    "qlora_int8": Method(
        lambda: jpeft.chain(
            jpeft.quantize("int8", block_size=32, double=False, compute_dtype=None),
            jpeft.lora(rank=2, alpha=3),
        ),
        quantizes=True,
    ),
    "loftq": Method(
        lambda: jpeft.loftq(rank=2, alpha=3, compute_dtype=None),
        quantizes=True,
        kept=False,
    ),
    "lora_on_lora": Method(
        lambda: jpeft.chain(jpeft.lora(rank=2, alpha=3), jpeft.lora(rank=1, alpha=1))
    ),
    "dora": Method(
        lambda: jpeft.dora(rank=2, alpha=3),
        formula={"DoRALeaf": f.dora},
        alone=alone(lambda: jpeft.dora(rank=2, alpha=3)),
        costs=cost(lambda: jpeft.dora(RANK, SCALE * RANK), twins.Dora),
    ),
    "ia3": Method(
        lambda: jpeft.ia3(
            where=".*(up|head)/(kernel|w)", feedforward=".*down/(kernel|w)"
        ),
        formula={
            "ScaledOutput": lambda x, w, _: w * f.array(x.scale)[..., None, :],
            "ScaledInput": lambda x, w, _: w * f.array(x.scale)[..., :, None],
            "ScaledBias": lambda x, w, tree: w * f.lent(x, tree),
        },
        alone={
            "output": Alone(lambda: jpeft.ia3(where="w", feedforward=())),
            # Each matrix of a free stack rescales the activation in its own way, and
            # what is put beside a row would be rescaled with it.
            "input": Alone(
                lambda: jpeft.ia3(where=(), feedforward="w"),
                ("a stack, free", *BESIDE, *CONVS),
            ),
        },
        costs=cost(jpeft.ia3, twins.Rescaled),
    ),
    "hira": Method(
        lambda: jpeft.hira(rank=2, alpha=3),
        formula={"HadamardLowRank": f.hira},
        alone=alone(lambda: jpeft.hira(rank=2, alpha=3), *BESIDE[:2]),
        costs=cost(lambda: jpeft.hira(RANK, SCALE * RANK), twins.HadamardLowRank),
    ),
    "loha": Method(
        lambda: jpeft.loha(rank=2, alpha=3),
        formula={"Hadamard": f.hadamard},
        alone=alone(lambda: jpeft.loha(rank=2, alpha=3)),
        costs={
            "": Cost(lambda: jpeft.loha(4, SCALE * 4), twins.HadamardAsProduct),
            "wide": Cost(lambda: jpeft.loha(16, SCALE * 16), twins.Hadamard),
        },
    ),
    "adapter_houlsby": Method(
        lambda: jpeft.adapter(bottleneck=3, init="near_identity"), merges=False
    ),
    "adapter_pfeiffer": Method(
        lambda: jpeft.adapter(2, placement="pfeiffer", scale="learned"), merges=False
    ),
    "adapter_parallel": Method(
        lambda: jpeft.adapter(2, placement="parallel"), merges=False
    ),
    "adapter_gated": Method(
        lambda: jpeft.adapter(2, placement="parallel", gate=True, activation="tanh"),
        merges=False,
    ),
    "lokr": Method(
        lambda: jpeft.lokr(rank=2, alpha=3),
        formula={"Kronecker": f.lokr},
        # A part of a Kronecker product is none.
        alone=alone(
            lambda: jpeft.lokr(rank=1, alpha=1.5),
            *("experts, gathered", "sliced outputs", "sliced inputs", *BESIDE),
            *(*TABLES, *CONVS, "shards by rows"),
        ),
        costs=cost(lambda: jpeft.lokr(2, SCALE * 2), twins.Kronecker),
    ),
    "vera": Method(
        lambda: jpeft.vera(rank=6),
        formula={"VeRALeaf": f.vera},
        alone=alone(lambda: jpeft.vera(rank=4)),
        costs=cost(lambda: jpeft.vera(64), twins.Vera),
    ),
    "norm_tuning": Method(
        lambda: jpeft.norm_tuning(), costs=cost(jpeft.norm_tuning, twins.Added)
    ),
    "prompt": Method(
        lambda: jpeft.prompt(N),
        merges=False,
        forms="text_",
        costs=cost(lambda: jpeft.prompt(twins.N), twins.Prompted, True),
    ),
    "p_tuning": Method(
        lambda: jpeft.p_tuning(N),
        merges=False,
        forms="text_",
        costs={
            "": Cost(lambda: jpeft.p_tuning(twins.N), twins.PromptedByLstm, True),
            "finalized": Cost(
                lambda: jpeft.p_tuning(twins.N), twins.Prompted, True, True
            ),
        },
    ),
    "p_tuning_mlp": Method(
        lambda: jpeft.p_tuning(N, encoder="mlp"),
        merges=False,
        forms="text_",
        costs=cost(
            lambda: jpeft.p_tuning(twins.N, encoder="mlp"), twins.PromptedByMlp, True
        ),
    ),
    "prefix_tokens": Method(
        lambda: jpeft.prefix(N, mode="tokens"),
        merges=False,
        forms="text_",
        costs=cost(
            lambda: jpeft.prefix(twins.N, mode="tokens"), twins.Overwritten, True
        ),
    ),
    # Learned keys take their share of the attention from the start.
    "prefix": Method(
        lambda: jpeft.prefix(N, init="unit"),
        merges=False,
        kept=False,
        forms="words_",
        costs=cost(lambda: jpeft.prefix(twins.N, init="unit"), twins.Prefixed),
    ),
    "prefix_mlp": Method(
        lambda: jpeft.prefix(N, reparametrization="mlp", width=4),
        merges=False,
        kept=False,
        forms="words_",
    ),
    "p_tuning_v2": Method(
        lambda: jpeft.p_tuning_v2(N, layers=[-1], init="unit"),
        merges=False,
        kept=False,
        forms="words_",
    ),
    "mam": Method(
        lambda: jpeft.mam(prefix_length=N, bottleneck=2),
        merges=False,
        kept=False,
        forms="words_",
        costs=cost(lambda: jpeft.mam(twins.N, RANK), twins.MixAndMatch),
    ),
    "unipelt": Method(
        lambda: jpeft.unipelt(prefix_length=N, bottleneck=2, rank=2),
        merges=False,
        kept=False,
        forms="words_",
        costs=cost(
            lambda: jpeft.unipelt(RANK, twins.N, RANK, alpha=SCALE * RANK),
            twins.UniPelt,
        ),
    ),
}
FORMULAS = {k: of for m in METHODS.values() for k, of in m.formula.items()}
KEY = jax.random.key(3)
# A delta of zero is exact, but XLA fuses and so rounds the two programs differently.
ONE_ULP = {"rtol": 1e-6, "atol": 1e-7}
# A quantised product is summed in tiles.
TILES = {"rtol": 1e-5, "atol": 1e-5}


def room(method):
    return TILES if METHODS[method].quantizes else ONE_ULP


@functools.cache
def form(name):
    return (FORMS | TEXT_FORMS | WORD_FORMS)[name]()


def forms_of(method, names=FORMS):
    return [METHODS[method].forms + n for n in names]


def bare(f):
    """Arguments on which a method that has learned nothing does nothing."""
    return f.args if f.bare is None else f.bare


@functools.cache
def uses(name):
    f = form(name)
    return jpeft.find_uses(f.fn, f.params, *f.args)


@functools.cache
def plain(name):
    """The form's function, compiled once for all laws."""
    return jax.jit(form(name).fn)


@functools.cache
def adapted(name):
    """The same of adapted parameters."""
    return jax.jit(jpeft.adapt(form(name).fn))


@functools.cache
def attached(method, name):
    return METHODS[method].make()(KEY, form(name).params, uses=uses(name))


@functools.cache
def trained(method, name):
    """As if it had learned: every trainable array is somewhere else."""
    return moved(attached(method, name))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


# Of arguments without a default.
NEEDED = {"rank": 2, "length": 2, "where": ".*", "transform": jpeft.lora(2)}


def needed(transform):
    """What a transform's class cannot do without."""
    fields = dataclasses.fields(transform)
    return {f.name: NEEDED[f.name] for f in fields if f.default is dataclasses.MISSING}
