"""Public Flax models from PyPI, at tiny random size, as test subjects.

Each function returns a `Subject` whose ``fn(params, *args)`` is the package's own
model as a pure function of its parameters, in float32 and without dropout. Packages
are imported inside the functions, so that a missing one is an `ImportError` of its
own subjects only. `LINEN` and `NNX` map names to functions, `REQUIRES` names to the
package and version that each was run with. Nothing downloads weights.

All subjects run on Python 3.11 with jax 0.10.2 and flax 0.12.8, and on Python 3.13
with jax 0.12.0 and flax 0.12.12. None needs torch or tensorflow. Downloads besides
jax and flax (where nothing else is said, with the packages' own requirements)::

    # 22 MB; the last transformers with Flax models, all of them Linen
    pip install transformers==4.57.6
    # 4 MB, NNX; newer tokamax asks for xprof and with it for 80 MB more
    pip install jax-image-models==0.4.0 tokamax==0.0.12
    # 0.6 MB, NNX; its own requirements include tensorflow_datasets and numba
    pip install --no-deps google-tunix==0.1.7 && pip install jaxtyping
    # 0.3 MB, NNX; its own requirements are plots, samplers, and jax < 0.10
    pip install --no-deps gensbi==0.3.4 && pip install einops jaxtyping
    # 0.1 MB, Linen; its own requirements include kauldron and so tensorflow
    pip install --no-deps gemma==2.0.2
    # 1.1 MB plus transformers, Linen
    pip install --no-deps clip-jax==0.0.6 einshape aqtp

What does not run, and why:

- gemma 3: its ``gm`` models (with ``nn.jit``) import kauldron, whose array types
  import tensorflow; gemma 2.0.2 still has the plain ``gemma.transformer``.
- T5 of transformers as it is: it calls ``jnp.clip(a_max=...)``, see `t5`.
- BLOOM of transformers with a number of heads that is no power of two: ``jnp.cat``.
- jimmy-vision 0.0.7: imports ``flax.nnx.nnx``, which newer flax does not have.
- jaxnn 0.2.0 requires torch. bonsai and jimm on PyPI are not model packages; the
  module ``jimm`` is in jax-image-models.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model: ``fn(params, *args)`` returns an array or a tuple of arrays."""

    name: str
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


def add_noise(params: Any, std: float = 0.1, seed: int = 0) -> Any:
    """Return `params` with N(0, std) noise, the same each time, on every float leaf.

    Without it zero-initialised kernels and all-one scales hide errors.
    """
    leaves, treedef = jax.tree.flatten(params)
    # NumPy draws, so that no leaf costs one compilation of jax.random per shape.
    rng = np.random.default_rng(seed)
    noisy = []
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            noise = np.asarray(std * rng.standard_normal(leaf.shape), leaf.dtype)
            leaf = jax.device_put(np.asarray(leaf) + noise, leaf.sharding)
        noisy.append(leaf)
    return jax.tree.unflatten(treedef, noisy)


def random_like(shapes: Any) -> Any:
    """Return parameters for a tree of shapes: 1 for scales, 0 for the rest, plus noise.

    Running the initialisers of the larger models one operation at a time takes
    seconds each, and nothing the tests look at depends on their values.
    """

    def start(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        names = [str(getattr(key, "key", key)) for key in path]
        is_scale = "scale" in names or "weight_g" in names
        is_scale |= "weight" in names and len(leaf.shape) == 1
        return jnp.asarray(np.full(leaf.shape, float(is_scale)), leaf.dtype)

    return add_noise(jax.tree_util.tree_map_with_path(start, shapes))


def _import_without_init(name: str, unused: str | None = None) -> Any:
    """Import module `name` without running the ``__init__`` of its top package.

    For packages whose ``__init__`` loads trainers, loggers and data pipelines with
    heavy requirements of their own, where the module with the model needs none.
    `unused` is one more module that may be absent: an empty one stands in for it
    during the import, and only then.
    """
    top = name.partition(".")[0]
    if top not in sys.modules:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"no package {top!r}", name=top)
        package = types.ModuleType(top)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[top] = package
    if unused is None or unused in sys.modules:
        return importlib.import_module(name)
    sys.modules[unused] = types.ModuleType(unused)
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[unused]


def _ids(shape: tuple[int, ...], vocab: int, seed: int = 1) -> jax.Array:
    """Token ids from 3 up, clear of the usual padding, begin and end ids."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(3, vocab, shape), jnp.int32)


def _normal(shape: tuple[int, ...], seed: int = 2) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


# --- Linen: transformers ------------------------------------------------------


def _huggingface(
    name: str,
    model: Any,
    args: tuple[Any, ...],
    keys: tuple[str, ...] = (),
    out: str = "logits",
) -> Subject:
    """Wrap one of the Flax models of transformers through its own ``__call__``.

    That call is ``module.apply({"params": params}, ...)`` with ``train=False``, plus
    the default masks and position ids. `keys` names the inputs after the first, and
    `out` the field of the result.
    """

    def fn(params: Any, first: Any, *others: Any) -> Any:
        named = dict(zip(keys, others, strict=True))
        return getattr(model(first, **named, params=params, train=False), out)

    return Subject(name, fn, random_like(model.params_shape_tree), args)


def _bert_config(**extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": 53,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 19,
        **extra,
    }


def _tokens() -> tuple[jax.Array]:
    return (_ids((2, 7), 53),)


def bert() -> Subject:
    """Masked-language BERT: tied decoder, norms after the residual, all biases."""
    from transformers import BertConfig, FlaxBertForMaskedLM

    model = FlaxBertForMaskedLM(BertConfig(**_bert_config()), _do_init=False)
    return _huggingface("bert", model, _tokens())


def bert_remat() -> Subject:
    """BERT with ``nn.remat`` around each layer, and a pooled classifier."""
    from transformers import BertConfig, FlaxBertForSequenceClassification

    model = FlaxBertForSequenceClassification(
        BertConfig(**_bert_config(num_labels=5)),
        gradient_checkpointing=True,
        _do_init=False,
    )
    return _huggingface("bert_remat", model, _tokens())


def roberta() -> Subject:
    """RoBERTa with a token-classification head."""
    from transformers import FlaxRobertaForTokenClassification, RobertaConfig

    config = RobertaConfig(**_bert_config(num_labels=5, pad_token_id=1))
    model = FlaxRobertaForTokenClassification(config, _do_init=False)
    return _huggingface("roberta", model, _tokens())


def albert() -> Subject:
    """ALBERT: one layer's parameters used three times, factored embedding."""
    from transformers import AlbertConfig, FlaxAlbertForSequenceClassification

    config = AlbertConfig(
        **_bert_config(embedding_size=10, num_hidden_layers=3, num_labels=5)
    )
    model = FlaxAlbertForSequenceClassification(config, _do_init=False)
    return _huggingface("albert", model, _tokens())


def _gpt_config() -> dict[str, Any]:
    return {
        "vocab_size": 53,
        "n_positions": 19,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_inner": 40,
    }


def gpt2() -> Subject:
    """GPT-2: fused qkv, kernels stored ``(out, in)`` and transposed on use, tied."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    model = FlaxGPT2LMHeadModel(GPT2Config(**_gpt_config()), _do_init=False)
    return _huggingface("gpt2", model, _tokens())


def gptj() -> Subject:
    """GPT-J: attention and MLP in parallel, partial rotary embedding, untied."""
    from transformers import FlaxGPTJForCausalLM, GPTJConfig

    config = GPTJConfig(**_gpt_config(), rotary_dim=4)
    model = FlaxGPTJForCausalLM(config, _do_init=False)
    return _huggingface("gptj", model, _tokens())


def bloom() -> Subject:
    """BLOOM: fused qkv interleaved per head, ALiBi, tied."""
    from transformers import BloomConfig, FlaxBloomForCausalLM

    # A power of two: for other numbers of heads its ALiBi calls a function that
    # jax.numpy does not have.
    config = BloomConfig(vocab_size=53, hidden_size=24, n_layer=2, n_head=4)
    model = FlaxBloomForCausalLM(config, _do_init=False)
    return _huggingface("bloom", model, _tokens())


def _llama_config(**extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": 53,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 19,
        **extra,
    }


def llama() -> Subject:
    """Llama: grouped queries, RMSNorm, SwiGLU, no biases, untied."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    model = FlaxLlamaForCausalLM(LlamaConfig(**_llama_config()), _do_init=False)
    return _huggingface("llama", model, _tokens())


def mistral() -> Subject:
    """Mistral: as Llama, with a sliding window shorter than the input."""
    from transformers import FlaxMistralForCausalLM, MistralConfig

    config = MistralConfig(**_llama_config(sliding_window=4))
    model = FlaxMistralForCausalLM(config, _do_init=False)
    return _huggingface("mistral", model, _tokens())


def gemma() -> Subject:
    """Gemma of transformers: one key head, head size free of the width, tied."""
    from transformers import FlaxGemmaForCausalLM, GemmaConfig

    config = GemmaConfig(
        **_llama_config(num_key_value_heads=1),
        head_dim=6,
        hidden_activation="gelu_pytorch_tanh",
    )
    model = FlaxGemmaForCausalLM(config, _do_init=False)
    return _huggingface("gemma", model, _tokens())


class _OlderNumpy:
    """``jax.numpy`` whose ``clip`` still takes ``a_min`` and ``a_max``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: Any, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return jnp.clip(x, a_min, a_max)


def t5() -> Subject:
    """T5: encoder and decoder, relative position bias, gated, shared and tied."""
    from transformers import FlaxT5ForConditionalGeneration, T5Config
    from transformers.models.t5 import modeling_flax_t5

    # The only change to any model here: newer jax dropped those keywords. The name
    # is replaced in this one module, so that jax.numpy itself stays as it is.
    modeling_flax_t5.jnp = _OlderNumpy()
    config = T5Config(
        vocab_size=53,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
    )
    model = FlaxT5ForConditionalGeneration(config, _do_init=False)
    args = (_ids((2, 7), 53), _ids((2, 5), 53, seed=3))
    return _huggingface("t5", model, args, keys=("decoder_input_ids",))


def bart() -> Subject:
    """BART: encoder and decoder, learned positions, one embedding for both, tied."""
    from transformers import BartConfig, FlaxBartForConditionalGeneration

    config = BartConfig(
        vocab_size=53,
        max_position_embeddings=19,
        encoder_layers=2,
        encoder_ffn_dim=40,
        encoder_attention_heads=3,
        decoder_layers=2,
        decoder_ffn_dim=40,
        decoder_attention_heads=3,
        d_model=24,
    )
    model = FlaxBartForConditionalGeneration(config, _do_init=False)
    args = (_ids((2, 7), 53), _ids((2, 5), 53, seed=3))
    return _huggingface("bart", model, args, keys=("decoder_input_ids",))


def vit() -> Subject:
    """ViT of transformers: strided patch convolution, class token, classifier."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=12,
        patch_size=4,
        num_labels=5,
    )
    model = FlaxViTForImageClassification(config, _do_init=False)
    # Channels first: the model transposes its images.
    return _huggingface("vit", model, (_normal((2, 3, 12, 12)),))


def clip() -> Subject:
    """CLIP: a text and an image tower, projections, a learned temperature."""
    from transformers import CLIPConfig, FlaxCLIPModel

    tower = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    text = {
        "vocab_size": 53,
        "max_position_embeddings": 19,
        # With this id the text is pooled at the largest token.
        "eos_token_id": 2,
    }
    config = CLIPConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": 12, "patch_size": 4},
        projection_dim=10,
    )
    model = FlaxCLIPModel(config, _do_init=False)
    # The largest token last, or the earlier queries and keys would not matter.
    ids = _ids((2, 7), 52).at[:, -1].set(52)
    args = (ids, _normal((3, 3, 12, 12)))
    return _huggingface(
        "clip", model, args, keys=("pixel_values",), out="logits_per_text"
    )


def _whisper(name: str, gradient_checkpointing: bool) -> Subject:
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    config = WhisperConfig(
        vocab_size=53,
        num_mel_bins=9,
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_layers=2,
        decoder_attention_heads=3,
        decoder_ffn_dim=40,
        max_source_positions=8,
        max_target_positions=19,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = FlaxWhisperForConditionalGeneration(
        config,
        input_shape=(1, 9, 16),
        gradient_checkpointing=gradient_checkpointing,
        _do_init=False,
    )
    args = (_normal((2, 9, 16)), _ids((2, 5), 53))
    return _huggingface(name, model, args, keys=("decoder_input_ids",))


def whisper() -> Subject:
    """Whisper: 1-D convolutions (one strided), encoder and decoder, tied."""
    return _whisper("whisper", gradient_checkpointing=False)


def whisper_remat() -> Subject:
    """Whisper with ``nn.remat`` around each layer."""
    return _whisper("whisper_remat", gradient_checkpointing=True)


def wav2vec2() -> Subject:
    """Wav2Vec2: convolutions, one of them grouped and with weight normalisation."""
    from transformers import FlaxWav2Vec2ForCTC, Wav2Vec2Config

    config = Wav2Vec2Config(
        vocab_size=53,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        conv_dim=(16, 20),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=3,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    model = FlaxWav2Vec2ForCTC(config, input_shape=(1, 90), _do_init=False)
    return _huggingface("wav2vec2", model, (_normal((2, 90)),))


# --- Linen: other packages ------------------------------------------------------


def _decoder_inputs(batch: int = 2, length: int = 7) -> tuple[jax.Array, ...]:
    """Token ids, positions and causal mask as the Gemma-like models take them."""
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = jnp.broadcast_to(
        jnp.tril(jnp.ones((length, length), bool)), (batch, length, length)
    )
    return _ids((batch, length), 53), positions, mask


def _gemma2(name: str, num_kv_heads: int, transposed: bool) -> Subject:
    from gemma import modules
    from gemma import transformer as gemma_transformer

    local, full = modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL
    model = gemma_transformer.Transformer(
        gemma_transformer.TransformerConfig(
            num_layers=2,
            num_embed=53,
            embed_dim=24,
            hidden_dim=40,
            num_heads=4,
            head_dim=6,
            num_kv_heads=num_kv_heads,
            final_logit_softcap=30.0,
            attn_logits_soft_cap=50.0,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attention_types=(local, full),
            sliding_window_size=4,
            transpose_gating_einsum=transposed,
        )
    )
    args = _decoder_inputs()

    def fn(params: Any, ids: Any, positions: Any, mask: Any) -> Any:
        return model.apply({"params": params}, ids, positions, None, mask)[0]

    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), args[0], args[1], None, args[2])
    )
    return Subject(name, fn, random_like(shapes["params"]), args)


def gemma2_linen() -> Subject:
    """Gemma 2 of the gemma package: everything an einsum, key and value fused.

    ``q_einsum`` is ``(heads, in, head)``, ``kv_einsum`` has a leading axis of two,
    and so has ``gating_einsum``; the embedding is tied.
    """
    return _gemma2("gemma2_linen", num_kv_heads=2, transposed=False)


def gemma2_linen_fused() -> Subject:
    """The same with query, key and value in one weight, and gating ``(2, out, in)``."""
    return _gemma2("gemma2_linen_fused", num_kv_heads=4, transposed=True)


def clip_jax_text() -> Subject:
    """Text tower of clip-jax: ``nn.scan`` of ``nn.remat`` over boxed parameters.

    Kernels of the two layers are stacked, and each leaf is inside an
    ``nn.LogicallyPartitioned``.
    """
    modeling = _import_without_init("clip_jax.modeling", unused="wandb")
    model = modeling.CLIPTextTransformer(
        hidden_size=24,
        vocab_size=53,
        max_length=7,
        position_embedding_type="learnt",
        num_layers=2,
        use_rmsnorm=True,
        ln_type="normformer",
        num_heads=3,
        use_causal_mask=False,
        mlp_dim=40,
        activations=("gelu", "linear"),
        use_bias=True,
        unroll=1,
        remat_policy="full",
        eos_token_id=2,
        pool_type="map",
    )
    ids = _tokens()[0]
    mask = jnp.ones_like(ids)

    def fn(params: Any, ids: Any) -> Any:
        return model.apply({"params": params}, ids, mask)["pooled_output"]

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, mask))
    return Subject("clip_jax_text", fn, random_like(shapes["params"]), (ids,))


# --- NNX ------------------------------------------------------------------------


def _nnx(
    name: str, model: Any, call: Callable[..., Any], args: tuple[Any, ...]
) -> Subject:
    """Wrap an NNX model as a function of the state of its ``nnx.Param`` leaves."""
    from flax import nnx

    # A no-op for models without dropout; those draw no random numbers afterwards.
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: Any, *inputs: Any) -> Any:
        # New variables each time: nnx.scan refuses those made outside of the trace,
        # and none of them can carry a change from one call to the next.
        own = jax.tree.map(lambda leaf: leaf, rest)
        return call(nnx.merge(graphdef, params, own), *inputs)

    return Subject(name, fn, add_noise(params), args)


def _jimm(name: str, cls: str, **extra: Any) -> Subject:
    import jimm
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from jimm.common.sharding import NoSharding

    # Its forward pass reshards values to the sharding of others, which jax refuses
    # outside of an explicit mesh: so parameters and images are on one, of one device.
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        model = getattr(jimm, cls)(
            img_size=12,
            patch_size=4,
            num_layers=2,
            num_heads=3,
            mlp_dim=40,
            hidden_size=24,
            rngs=nnx.Rngs(0),
            sharding=NoSharding(),
            **extra,
        )
    whole = NamedSharding(mesh, PartitionSpec(None, None, None, None))
    images = jax.device_put(_normal((2, 12, 12, 3)), whole)
    return _nnx(name, model, lambda m, x: m(x), (images,))


def jimm_vit() -> Subject:
    """ViT of jimm: layers stacked by ``nnx.vmap`` and run by ``nnx.scan``.

    Its leaf ``vision_position_ids`` is an ``nnx.Param`` holding a float ``arange``
    that nothing uses.
    """
    return _jimm("jimm_vit", "VisionTransformer", num_classes=5)


def jimm_dinov2() -> Subject:
    """DINOv2 of jimm: layer scale, and ``jax.checkpoint`` inside ``nnx.scan``."""
    return _jimm("jimm_dinov2", "DINOv2Model", use_gradient_checkpointing=True)


def jimm_dinov3() -> Subject:
    """DINOv3 of jimm: rotary embedding, register tokens, gated MLP, no key bias."""
    return _jimm("jimm_dinov3", "DINOv3Model", use_gated_mlp=True)


def tunix_llama3() -> Subject:
    """Llama 3 of tunix: einsum projections ``(in, heads, head)``, ``nnx.Linear`` MLP.

    With ``nnx.remat`` around each layer; layers in a list, so integer keys.
    """
    from flax import nnx

    module = _import_without_init("tunix.models.llama3.model")
    config = module.ModelConfig(
        num_layers=2,
        vocab_size=53,
        embed_dim=24,
        hidden_dim=40,
        num_heads=4,
        head_dim=6,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-5,
        remat_config=module.RematConfig.DECODER,
    )
    model = module.Llama3(config, rngs=nnx.Rngs(0))
    return _nnx(
        "tunix_llama3",
        model,
        lambda m, ids, positions, mask: m(ids, positions, None, mask)[0],
        _decoder_inputs(),
    )


def tunix_gemma2() -> Subject:
    """Gemma 2 of tunix: fused key and value, tied embedding, soft caps."""
    from flax import nnx

    module = _import_without_init("tunix.models.gemma.model")
    local, full = module.AttentionType.LOCAL_SLIDING, module.AttentionType.GLOBAL
    config = module.ModelConfig(
        num_layers=2,
        num_embed=53,
        embed_dim=24,
        hidden_dim=40,
        num_heads=4,
        head_dim=6,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(local, full),
        sliding_window_size=4,
    )
    model = module.Gemma(config, rngs=nnx.Rngs(0))
    return _nnx(
        "tunix_gemma2",
        model,
        lambda m, ids, positions, mask: m(ids, positions, None, mask)[0],
        _decoder_inputs(),
    )


def tunix_qwen3_moe() -> Subject:
    """Qwen 3 of tunix with experts: weights ``(expert, in, out)`` sliced in turn."""
    from flax import nnx

    module = _import_without_init("tunix.models.qwen3.model")
    config = module.ModelConfig(
        num_layers=2,
        vocab_size=53,
        embed_dim=24,
        hidden_dim=40,
        num_heads=4,
        head_dim=6,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
        num_experts=3,
        num_experts_per_tok=2,
    )
    model = module.Qwen3(config, rngs=nnx.Rngs(0))
    return _nnx(
        "tunix_qwen3_moe",
        model,
        lambda m, ids, positions, mask: m(ids, positions, None, mask)[0],
        _decoder_inputs(),
    )


def gensbi_flux1() -> Subject:
    """Flux of GenSBI: two streams then one, modulation, qkv and MLP in one weight."""
    from flax import nnx
    from gensbi.models import Flux1, Flux1Params

    params = Flux1Params(
        in_channels=2,
        vec_in_dim=None,
        context_in_dim=3,
        mlp_ratio=2,
        num_heads=3,
        depth=1,
        depth_single_blocks=2,
        qkv_bias=True,
        rngs=nnx.Rngs(0),
        dim_obs=4,
        dim_cond=5,
        axes_dim=[8],
        param_dtype=jnp.float32,
    )
    ids = jnp.arange(4).reshape(1, 4, 1), jnp.arange(5).reshape(1, 5, 1)
    args = (_normal((2,), 4), _normal((2, 4, 2)), _normal((2, 5, 3), 5))

    def call(model: Any, t: Any, obs: Any, cond: Any) -> Any:
        return model(t, obs, ids[0], cond, ids[1])

    return _nnx("gensbi_flux1", Flux1(params), call, args)


def gensbi_simformer() -> Subject:
    """Simformer of GenSBI: ``nnx.MultiHeadAttention`` and parameters used directly."""
    from flax import nnx
    from gensbi.models import Simformer, SimformerParams

    params = SimformerParams(
        rngs=nnx.Rngs(0, cond=1),
        in_channels=2,
        val_emb_dim=10,
        id_emb_dim=8,
        cond_emb_dim=6,
        dim_joint=7,
        num_heads=3,
        depth=2,
        fourier_features=12,
    )
    ids = jnp.arange(7).reshape(1, 7)
    condition = (jnp.arange(7) % 3 == 0).reshape(1, 7, 1)
    args = (_normal((2,), 4), _normal((2, 7, 2)))

    def call(model: Any, t: Any, obs: Any) -> Any:
        return model(t, obs, ids, condition)

    return _nnx("gensbi_simformer", Simformer(params), call, args)


TRANSFORMERS = "transformers==4.57.6"
JIMM = "jax-image-models==0.4.0"
TUNIX = "google-tunix==0.1.7"
GENSBI = "gensbi==0.3.4"
GEMMA = "gemma==2.0.2"
CLIP_JAX = "clip-jax==0.0.6"

LINEN: dict[str, Callable[[], Subject]] = {
    f.__name__: f
    for f in (
        bert,
        bert_remat,
        roberta,
        albert,
        gpt2,
        gptj,
        bloom,
        llama,
        mistral,
        gemma,
        t5,
        bart,
        vit,
        clip,
        whisper,
        whisper_remat,
        wav2vec2,
        gemma2_linen,
        gemma2_linen_fused,
        clip_jax_text,
    )
}

NNX: dict[str, Callable[[], Subject]] = {
    f.__name__: f
    for f in (
        jimm_vit,
        jimm_dinov2,
        jimm_dinov3,
        tunix_llama3,
        tunix_gemma2,
        tunix_qwen3_moe,
        gensbi_flux1,
        gensbi_simformer,
    )
}

# What each subject needs, as pip takes it; see the top of this file for the flags.
REQUIRES: dict[str, str] = {
    **dict.fromkeys(LINEN, TRANSFORMERS),
    "gemma2_linen": GEMMA,
    "gemma2_linen_fused": GEMMA,
    "clip_jax_text": CLIP_JAX,
    **{
        name: {"jimm": JIMM, "tunix": TUNIX, "gensbi": GENSBI}[name.partition("_")[0]]
        for name in NNX
    },
}
