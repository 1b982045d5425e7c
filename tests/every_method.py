"""One table of methods: what is in it meets every law and every form of a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from draws import moved
from forms import FORMS
from text_forms import TEXT_FORMS, WORD_FORMS, N

import jpeft


@dataclasses.dataclass(frozen=True)
class Method:
    make: Callable[[], jpeft.Transform]
    merges: bool = True  # the effective weight exists
    quantizes: bool = False  # the base itself is stored in another format
    kept: bool = True  # attached, it leaves the output as it is
    forms: str = ""  # "text_": with virtual tokens; "words_": texts of real tokens


METHODS = {
    "lora": Method(lambda: jpeft.lora(rank=2, alpha=3)),
    "rslora": Method(lambda: jpeft.lora(rank=2, alpha=3, rank_stabilized=True)),
    "adalora": Method(lambda: jpeft.adalora(rank=2, alpha=3)),
    "bitfit": Method(lambda: jpeft.bitfit()),
    "bitfit_added": Method(lambda: jpeft.bitfit(add="linear"), merges=False),
    # Gates that start half open, so that alpha moves without the noise too.
    "diff_pruning": Method(lambda: jpeft.diff_pruning(alpha=0.8)),
    "diff_pruning_structured": Method(
        lambda: jpeft.diff_pruning(structured=True, alpha=0.8)
    ),
    "full": Method(lambda: jpeft.full(".*")),
    "lora_and_head": Method(
        lambda: jpeft.chain(
            jpeft.lora(rank=2, alpha=2, where=".*up/(kernel|w)"),
            jpeft.full(".*(head|down)/.*"),
        )
    ),
    "pissa": Method(lambda: jpeft.lora(rank=2, alpha=3, init="pissa")),
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
    "dora": Method(lambda: jpeft.dora(rank=2, alpha=3)),
    "ia3": Method(
        lambda: jpeft.ia3(
            where=".*(up|head)/(kernel|w)", feedforward=".*down/(kernel|w)"
        )
    ),
    "loha": Method(lambda: jpeft.loha(rank=2, alpha=3)),
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
    "lokr": Method(lambda: jpeft.lokr(rank=2, alpha=3)),
    "vera": Method(lambda: jpeft.vera(rank=6)),
    "norm_tuning": Method(lambda: jpeft.norm_tuning()),
    "prompt": Method(lambda: jpeft.prompt(N), merges=False, forms="text_"),
    "p_tuning": Method(lambda: jpeft.p_tuning(N), merges=False, forms="text_"),
    "p_tuning_mlp": Method(
        lambda: jpeft.p_tuning(N, encoder="mlp"), merges=False, forms="text_"
    ),
    "prefix_tokens": Method(
        lambda: jpeft.prefix(N, mode="tokens"), merges=False, forms="text_"
    ),
    # Learned keys take their share of the attention from the start.
    "prefix": Method(
        lambda: jpeft.prefix(N, init="unit"), merges=False, kept=False, forms="words_"
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
    ),
    "unipelt": Method(
        lambda: jpeft.unipelt(prefix_length=N, bottleneck=2, rank=2),
        merges=False,
        kept=False,
        forms="words_",
    ),
}
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
