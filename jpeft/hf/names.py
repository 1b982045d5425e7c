"""Name maps: what a tree's weights are called in torch's files, and in GGUF's.

A map is data, a list of rules; the first whose path fits the whole path counts:

    Rule(r"layers(?:[_/](?P<layer>\\d+))?/mlp/(?P<part>gate|up)/kernel",
         "model.layers.{layer}.mlp.gate_up_proj.weight", "in out", ("gate", "up"))

- what the expression's named groups found goes into the tensor's name
- a group that found nothing counts the tensors of a stack: `layers/mlp/...` is the
  stack of `model.layers.0.mlp...`, `model.layers.1.mlp...`, along its first axis
- axes says what the leaf's axes are; torch keeps linear weights as (out, in), so
  "in out" is transposed, and a leaf may have several axes where torch has one
- parts: the tensor holds the rows of several leaves, those whose path has these words
  in place of the group `part`, one after the other
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jpeft.checks import check_regex, shown
from jpeft.quant.exchange import KERNEL, TABLE, TORCH
from jpeft.tree.paths import suggest

# What is taken as it is: a bias, a scale.
PLAIN = "features"
AXES = (KERNEL, TORCH, TABLE, PLAIN)


class Rule(NamedTuple):
    """See above.  path: a regular expression.  torch: a name with {group} in it.

    >>> import jpeft
    >>> path = r"layer_(?P<layer>\\d+)/up/kernel"
    >>> rule = jpeft.hf.Rule(path, "model.{layer}.up.weight", axes="in out")
    >>> rule.torch.format(layer=3), rule.parts
    ('model.3.up.weight', ())
    """

    path: str
    torch: str
    axes: str = PLAIN
    parts: tuple[str, ...] = ()


NameMap = Sequence[Rule]

_IN_LAYER = r"layers(?:[_/](?P<layer>\d+))?"
_OF_LAYER = "model.layers.{layer}"
# Llama, Mistral, SmolLM; Qwen2 has biases too, Qwen3 norms of queries and keys.
LLAMA = (
    Rule("embed/embedding", "model.embed_tokens.weight", TABLE),
    Rule("norm/scale", "model.norm.weight"),
    Rule("lm_head/kernel", "lm_head.weight", KERNEL),
    Rule(
        rf"{_IN_LAYER}/attn/(?P<which>[qkvo])/kernel",
        f"{_OF_LAYER}.self_attn.{{which}}_proj.weight",
        KERNEL,
    ),
    Rule(
        rf"{_IN_LAYER}/attn/(?P<which>[qkvo])/bias",
        f"{_OF_LAYER}.self_attn.{{which}}_proj.bias",
    ),
    Rule(
        rf"{_IN_LAYER}/attn/(?P<which>[qk])_norm/scale",
        f"{_OF_LAYER}.self_attn.{{which}}_norm.weight",
    ),
    Rule(rf"{_IN_LAYER}/attn_norm/scale", f"{_OF_LAYER}.input_layernorm.weight"),
    Rule(
        rf"{_IN_LAYER}/mlp_norm/scale",
        f"{_OF_LAYER}.post_attention_layernorm.weight",
    ),
    Rule(
        rf"{_IN_LAYER}/mlp/(?P<which>gate|up|down)/kernel",
        f"{_OF_LAYER}.mlp.{{which}}_proj.weight",
        KERNEL,
    ),
)

# By config.json's model_type and GGUF's general.architecture.
MAPS: dict[str, NameMap] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}

HEAD, TOKENS = "lm_head.weight", "model.embed_tokens.weight"
# What files hold and a forward pass computes by itself.
COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")

# --- GGUF ----------------------------------------------------------------------------

# (GGUF's name, torch's), as expressions and what they become.
GGUF = (
    (r"token_embd\.weight", "model.embed_tokens.weight"),
    (r"output_norm\.weight", "model.norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    (r"blk\.(\d+)\.attn_norm\.(\w+)", r"model.layers.\1.input_layernorm.\2"),
    (r"blk\.(\d+)\.ffn_norm\.(\w+)", r"model.layers.\1.post_attention_layernorm.\2"),
    (r"blk\.(\d+)\.attn_([qkv])\.(\w+)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_([qk])_norm\.(\w+)", r"model.layers.\1.self_attn.\2_norm.\3"),
    (r"blk\.(\d+)\.attn_output\.(\w+)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.(\w+)", r"model.layers.\1.mlp.\2_proj.\3"),
)
# Architectures whose rows of queries and keys llama.cpp has in another order: the two
# halves that rotary positions turn into each other are interleaved.
INTERLEAVED = ("llama",)
_QUERIES, _KEYS = r"blk\.(\d+)\.attn_q\.\w+", r"blk\.(\d+)\.attn_k\.\w+"


def from_gguf(name: str) -> str:
    """Torch's name of a tensor of a GGUF file; its own where the table has none."""
    for pattern, torch in GGUF:
        if match := re.fullmatch(pattern, name):
            return match.expand(torch)
    return name


def interleaved_heads(name: str, metadata: Mapping[str, object]) -> int:
    """How many heads the rows of this GGUF tensor are interleaved in; 0: they are not.

    Raises ValueError where the metadata does not say how many heads there are.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in INTERLEAVED:
        return 0
    queries, keys = re.fullmatch(_QUERIES, name), re.fullmatch(_KEYS, name)
    if not queries and not keys:
        return 0
    key = f"{architecture}.attention.head_count"
    found = metadata.get(key)
    if keys:
        found = metadata.get(f"{key}_kv", found)
    match = queries or keys
    assert match is not None
    if isinstance(found, list) and int(match[1]) < len(found):
        found = found[int(match[1])]
    if type(found) is not int or found < 1:
        raise ValueError(
            f"{name!r} has rows in llama.cpp's order, and {key!r}, by which they are "
            f"put back, is {shown(found)}"
        )
    return found


# --- which tensors a leaf is made of -------------------------------------------------


class Wanted(NamedTuple):
    """What a leaf is made of.

    tensors: torch's names, of a stack in its order.
    before: of tensors that hold several leaves, the shapes of those that come first;
    last: whether none comes after this one.
    """

    path: str
    tensors: tuple[str, ...]
    stacked: bool
    axes: str
    shape: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    last: bool

    @property
    def own(self) -> tuple[int, ...]:
        """The shape without the stack's axis."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def label(self) -> str:
        """The tensors, as one name for messages."""
        first, *others = self.tensors
        return f"{first} ... {others[-1]}" if others else first

    def rows(self, tensor: Sequence[int]) -> tuple[int, int]:
        """(first, count) of this leaf's rows in a tensor of that shape."""
        features = max(1, math.prod(tensor[1:]))
        first = sum(math.prod(s) // features for s in self.before)
        return first, math.prod(self.own) // features

    def sizes(self, tensor: Sequence[int]) -> tuple[int, ...] | None:
        """What of such a tensor is the leaf's, in the order of the leaf's axes, one or
        more of which make up each; None if it does not fit."""
        if not tensor:
            return () if self.own == () else None
        first, count = self.rows(tensor)
        fits = first + count == tensor[0] if self.last else first + count <= tensor[0]
        sizes = (count, *tensor[1:])
        sizes = sizes[::-1] if self.axes == KERNEL else sizes
        return sizes if fits and grouped(self.own, sizes) is not None else None


def wanted(
    rules: NameMap, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Wanted], list[str]]:
    """({path: what it is made of}, paths without a rule)."""
    compiled = [(re.compile(r.path), r) for r in rules]
    found, without = {}, []
    for path, shape in shapes.items():
        for pattern, rule in compiled:
            if match := pattern.fullmatch(path):
                found[path] = _wanted(rule, match, shape, shapes)
                break
        else:
            without.append(path)
    return found, without


def _wanted(
    rule: Rule,
    match: re.Match[str],
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> Wanted:
    path, groups = match.string, match.groupdict()
    counted = [g for g, x in groups.items() if x is None and f"{{{g}}}" in rule.torch]
    if len(counted) > 1 or (counted and len(shape) < 2):
        raise ValueError(
            f"{path}: the map's rule {rule.path!r} leaves {counted} open, and a leaf "
            f"of shape {shape} is no stack along its first axis"
            + (f" for {len(counted)} of them" if len(counted) > 1 else "")
        )
    if counted:
        each = [{**groups, counted[0]: str(k)} for k in range(shape[0])]
    else:
        each = [groups]
    before: list[tuple[int, ...]] = []
    if rule.parts:
        start, end = match.span("part")
        for other in rule.parts[: rule.parts.index(groups["part"])]:
            beside = path[:start] + other + path[end:]
            if beside not in shapes:
                raise ValueError(
                    f"{path}: its rows come after those of {beside!r}, says the map, "
                    f"and like= has no such leaf; near: {suggest(list(shapes), beside)}"
                )
            before.append(shapes[beside][1:] if counted else shapes[beside])
    return Wanted(
        path,
        tuple(rule.torch.format_map(g) for g in each),
        bool(counted),
        rule.axes,
        shape,
        tuple(before),
        not rule.parts or groups["part"] == rule.parts[-1],
    )


def check_map(given: object) -> NameMap:
    """The rules of a map; raises ValueError for what is none."""
    if isinstance(given, str):
        if given not in MAPS:
            raise ValueError(
                f"hf.load_base: map={given!r}: there are maps for "
                f"{', '.join(MAPS)}; pass one of these, or rules of your own"
            )
        return MAPS[given]
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(
            f"hf.load_base: map={shown(given)}: expected a list of hf.Rule(path, "
            f"torch's name, axes), or the name of a map: {', '.join(MAPS)}"
        )
    return tuple(_check_rule(x) for x in given)


def _check_rule(given: object) -> Rule:
    expected = (
        f"hf.load_base: map= holds {shown(given)}; expected hf.Rule(path, torch's "
        f"name, axes), where path is a regular expression and axes one of "
        f"{', '.join(map(repr, AXES))}"
    )
    if not isinstance(given, (tuple, list)) or not 2 <= len(given) <= 4:
        raise ValueError(expected)
    rule = Rule(*given)
    words = all(isinstance(x, str) for x in rule[:3])
    if not words or rule.axes not in AXES:
        raise ValueError(expected)
    try:
        check_regex(rule.path)
        groups = re.compile(rule.path).groupindex
        rule.torch.format_map(dict.fromkeys(groups, ""))
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{expected} ({error})") from None
    if rule.parts and "part" not in groups:
        raise ValueError(f"{expected}; with parts it has a group (?P<part>...)")
    return rule._replace(parts=tuple(rule.parts))


def grouped(shape: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...] | None:
    """How many axes of `shape` make up each of `sizes`; None if they do not."""
    counts, at = [], 0
    for size in sizes:
        start, have = at, 1
        while at < len(shape) and (have < size or at == start):
            have *= shape[at]
            at += 1
        if have != size:
            return None
        counts.append(at - start)
    return tuple(counts) if at == len(shape) else None
