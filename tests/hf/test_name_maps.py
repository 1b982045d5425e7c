"""Names in files: GGUF's and torch's."""

import gguf
import pytest

from jpeft.hf.names import GGUF, from_gguf, interleaved_heads


def test_every_name_of_the_table_is_one_that_llama_cpp_has():
    """gguf's own table from torch's names to its own, for the three architectures."""
    architectures = gguf.MODEL_ARCH
    known = [architectures.LLAMA, architectures.QWEN2, architectures.QWEN3]
    tables = [gguf.get_tensor_name_map(a, 2) for a in known]
    torch = ["model.embed_tokens", "model.norm", "lm_head"]
    for part in ("input_layernorm", "post_attention_layernorm"):
        torch.append(f"model.layers.1.{part}")
    torch += [f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"]
    torch += [f"model.layers.1.self_attn.{p}_norm" for p in "qk"]
    torch += [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    for name in torch:
        found = {t.get_name(name) for t in tables} - {None}
        assert len(found) == 1, name
        assert from_gguf(f"{found.pop()}.weight") == f"{name}.weight"
    assert len({pattern for pattern, _ in GGUF}) == len(GGUF)
    assert from_gguf("rope_freqs.weight") == "rope_freqs.weight"


def test_heads_by_which_rows_are_interleaved():
    about = {
        "general.architecture": "llama",
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": [3, 1],
    }
    assert interleaved_heads("blk.1.attn_q.weight", about) == 9
    assert interleaved_heads("blk.0.attn_k.bias", about) == 3
    assert interleaved_heads("blk.1.attn_k.weight", about) == 1
    assert interleaved_heads("blk.1.attn_v.weight", about) == 0
    del about["llama.attention.head_count_kv"]
    assert interleaved_heads("blk.1.attn_k.weight", about) == 9
    assert interleaved_heads("blk.1.attn_q.weight", {"general.architecture": "x"}) == 0
    about["llama.attention.head_count"] = 0
    with pytest.raises(ValueError, match="'llama.attention.head_count'.* is 0"):
        interleaved_heads("blk.1.attn_k.weight", about)
