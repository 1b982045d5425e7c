"""Tiny models of the Llama family: their tensors, their files, and our tree of them."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

V, D, F, H, KV, HD, L = 11, 64, 96, 4, 2, 16, 2
ROWS = {"q": H * HD, "k": KV * HD, "v": KV * HD, "o": D, "gate": F, "up": F, "down": D}
COLUMNS = {"q": D, "k": D, "v": D, "o": H * HD, "gate": D, "up": D, "down": F}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensors(kind="llama", tied=True, dtype=np.float32):
    """What torch would save, by its names."""
    rng = np.random.default_rng(0)
    n = lambda *shape: rng.standard_normal(shape).astype(dtype)
    found = {"model.embed_tokens.weight": n(V, D), "model.norm.weight": n(D)}
    if not tied:
        found["lm_head.weight"] = n(V, D)
    for k in range(L):
        at = f"model.layers.{k}"
        found[f"{at}.input_layernorm.weight"] = n(D)
        found[f"{at}.post_attention_layernorm.weight"] = n(D)
        for p in "qkvo":
            found[f"{at}.self_attn.{p}_proj.weight"] = n(ROWS[p], COLUMNS[p])
        for p in "qkv" if kind == "qwen2" else "":
            found[f"{at}.self_attn.{p}_proj.bias"] = n(ROWS[p])
        for p in "qk" if kind == "qwen3" else "":
            found[f"{at}.self_attn.{p}_norm.weight"] = n(HD)
        for p in ("gate", "up", "down"):
            found[f"{at}.mlp.{p}_proj.weight"] = n(ROWS[p], COLUMNS[p])
    return found


def tree(found, stacked=True):
    """The same as our decoder has it, written out by hand."""

    def layer(k):
        at = f"model.layers.{k}"
        attn = {
            p: {"kernel": found[f"{at}.self_attn.{p}_proj.weight"].T} for p in "qkvo"
        }
        for p in "qkv":
            if (bias := found.get(f"{at}.self_attn.{p}_proj.bias")) is not None:
                attn[p]["bias"] = bias
        for p in "qk":
            if (norm := found.get(f"{at}.self_attn.{p}_norm.weight")) is not None:
                attn[f"{p}_norm"] = {"scale": norm}
        return {
            "attn": attn,
            "attn_norm": {"scale": found[f"{at}.input_layernorm.weight"]},
            "mlp_norm": {"scale": found[f"{at}.post_attention_layernorm.weight"]},
            "mlp": {
                p: {"kernel": found[f"{at}.mlp.{p}_proj.weight"].T}
                for p in ("gate", "up", "down")
            },
        }

    layers = [layer(k) for k in range(L)]
    out = {
        "embed": {"embedding": found["model.embed_tokens.weight"]},
        "norm": {"scale": found["model.norm.weight"]},
    }
    if "lm_head.weight" in found:
        out["lm_head"] = {"kernel": found["lm_head.weight"].T}
    if stacked:
        return out | {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)}
    return out | {f"layers_{k}": x for k, x in enumerate(layers)}


def shapes(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def like(kind="llama", tied=True, stacked=True, dtype=jnp.float32):
    return shapes(tree(tensors(kind, tied), stacked), dtype)


def interleaved(w, heads):
    """What llama.cpp's converter does to rows of queries and keys."""
    pairs = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return pairs.swapaxes(1, 2).reshape(w.shape)


def gguf_name(name):
    for ours, torch in LAYER.items():
        if f".{torch}." in name:
            k = name.split(".")[2]
            return f"blk.{k}.{ours}.{name.rpartition('.')[2]}"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }.get(name, name)


def decoded(raw, kind):
    """GGUF's numbers, by its library."""
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])


def write_gguf(path, found, kind="llama", types=None, metadata=None):
    """A file of these tensors, and the tensors as they are after its rounding.

    types: {torch's name: "Q4_1", ...}; of matrices the rest is Q4_1, of vectors F32.
    """
    writer = gguf.GGUFWriter(path, kind)
    writer.add_head_count(H)
    writer.add_head_count_kv(KV)
    for add, key, value in metadata or []:
        getattr(writer, add)(key, value)
    rounded = {}
    for name, w in found.items():
        module = name.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": H, "k_proj": KV}.get(module, 0) if kind == "llama" else 0
        there = interleaved(w, heads) if heads else w
        type_ = (types or {}).get(name, "Q4_1" if w.ndim > 1 else "F32")
        number = gguf.GGMLQuantizationType[type_]
        raw = gguf.quants.quantize(np.ascontiguousarray(there), number)
        rounded[name] = decoded(
            gguf.quants.quantize(np.ascontiguousarray(w), number), type_
        ).astype(np.float32)
        shape = raw.shape if raw.dtype == np.uint8 else None
        writer.add_tensor(gguf_name(name), raw, raw_shape=shape, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def write_folder(path, found, shards=1, **config):
    """A folder as Hugging Face has it."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    names = list(found)
    files = {n: f"model-{k % shards}.safetensors" for k, n in enumerate(names)}
    for file in set(files.values()):
        own = {n: np.ascontiguousarray(found[n]) for n in names if files[n] == file}
        save_file(own, path / file)
    if shards > 1:
        index = path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))
    return path


def assert_same(got, want):
    """Bit for bit, of one structure and dtype."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(a, b, err_msg=where)
