"""diffusers' image transformers, tiny and with random weights, each called with a spatial latent as its pipeline calls it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from tests.models import seeded

TEXT = 7
"""Tokens of text."""


class Kind(NamedTuple):
    options: dict[str, Any]
    """Of the class."""
    call: Callable[[Any, Tensor, Tensor, Tensor], Any]
    """(transformer, x, t, text) → what it returns for the latent."""
    middle: str
    """The path of the middle layer, in the transformer."""
    start: int
    """Where the image's tokens begin in its attention."""
    channels: int = 16
    size: tuple[int, int] = (8, 12)
    """Of the latent."""
    first: str = ""
    """The path of the first layer in which image and text attend together, if all of the image's tokens have attended before."""
    widest: torch.dtype = torch.float64
    """The widest dtype that it can compute in."""
    breaks: str = ""
    """What keeps the bare model from being compiled in one graph."""
    reads: str = ""
    """What it does on the host, so that CUDA graphs cannot capture it."""


class Model(nn.Module):
    """A denoiser around a transformer."""

    patch_size = 2

    def __init__(self, transformer: nn.Module, call: Callable[[Any, Tensor, Tensor, Tensor], Any]):
        super().__init__()
        self.transformer, self.call = transformer, call

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        output = self.call(self.transformer, x, sigma / (1 + sigma), cond)
        return output if isinstance(output, Tensor) else output[0]


def packed(call):
    """For a transformer that is given patches of 2 × 2 pixels: call(m, tokens, t, text, h, w)."""

    def unpacked(m, x, t, text):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        output = call(m, tokens, t, text, h, w)[0]
        return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)

    return unpacked


def ids(h, w, axes=3):
    rows, columns = torch.meshgrid(torch.arange(float(h)), torch.arange(float(w)), indexing="ij")
    places = torch.zeros(h, w, axes)
    places[..., 1], places[..., 2] = rows, columns
    return places.flatten(0, 1)


def pooled(text):
    return text.mean(1)


def flux_like(pool=True, axes=3, **kwargs):
    def call(m, x, t, text, h, w):
        more = {"pooled_projections": pooled(text)} if pool else {}
        return m(
            x, encoder_hidden_states=text, timestep=t, img_ids=ids(h, w, axes), txt_ids=torch.zeros(text.shape[1], axes),
            return_dict=False, **more, **kwargs,
        )  # fmt: skip

    return packed(call)


ROTARY = {
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), "in_channels": 64,
}  # fmt: skip
HEADS = {"attention_head_dim": 8, "num_attention_heads": 4}


def crops(text):
    size = torch.full((len(text), 2), 64.0)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(len(text), 2)}


def hunyuan_dit(m, x, t, text):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    h, w = x.shape[2] // 2, x.shape[3] // 2
    b = len(x)
    return m(
        x, t * 1000, encoder_hidden_states=text, text_embedding_mask=torch.ones(b, TEXT), encoder_hidden_states_t5=text,
        text_embedding_mask_t5=torch.ones(b, TEXT), image_meta_size=torch.full((b, 6), 64.0),
        style=torch.zeros(b, dtype=torch.long), return_dict=False,
        image_rotary_emb=get_2d_rotary_pos_embed(8, ((0, 0), (h, w)), (h, w), output_type="pt"),
    )[0][:, : x.shape[1]]  # fmt: skip


def lumina_next(m, x, t, text):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    rotary = get_2d_rotary_pos_embed_lumina(8, 64, 64)
    return m(x, t, text, torch.ones(len(x), TEXT), rotary, {}, return_dict=False)[0][:, : x.shape[1]]


def sd3(m, x, t, text):
    return m(x, text, pooled(text), t * 1000, return_dict=False)


def lumina2(m, x, t, text):
    return m(x, 1 - t, text, torch.ones(text.shape[:2], dtype=torch.int64), return_dict=False)


def z_image(m, x, t, text):
    return torch.stack(m(list(x[:, :, None]), 1 - t, list(text), return_dict=False)[0])[:, :, 0]


def qwen_image(m, x, t, text, h, w):
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    mask[:, -1] = False
    shapes = [[(1, h, w)]] * len(x)
    return m(x, text, encoder_hidden_states_mask=mask, timestep=t, img_shapes=shapes, return_dict=False)


def nucleus(m, x, t, text, h, w):
    return m(x, [(1, h, w)] * len(x), encoder_hidden_states=text, timestep=t, return_dict=False)


def krea2(m, x, t, text, h, w):
    places = torch.cat([torch.zeros(text.shape[1], 3), ids(h, w)])
    return m(x, text[:, :, None].expand(-1, -1, 2, -1), t, places, return_dict=False)


def glm_image(m, x, t, text):
    n = (x.shape[2] // 2) * (x.shape[3] // 2)
    prior = torch.arange(n).expand(len(x), n) % 16
    return m(
        x, text, prior, torch.zeros(len(x), dtype=torch.bool), t * 1000, target_size=torch.full((len(x), 2), 64.0),
        crop_coords=torch.zeros(len(x), 2), return_dict=False,
    )  # fmt: skip


def omnigen(m, x, t, text):
    n = 1 + TEXT + (x.shape[2] // 2) * (x.shape[3] // 2)
    words = (text.mean(-1) * 100).long().abs() % 64
    return m(x, t, words, [], {}, torch.ones(len(x), n, n, dtype=torch.long), torch.arange(n).expand(len(x), n), return_dict=False)


def hidream(m, x, t, text):
    return m(
        x, timesteps=t * 1000, encoder_hidden_states_t5=text, encoder_hidden_states_llama3=text[None].expand(2, -1, -1, -1),
        pooled_embeds=pooled(text), return_dict=False,
    )  # fmt: skip


def kandinsky5(m, x, t, text):
    h, w = x.shape[2] // 2, x.shape[3] // 2
    frames = x.permute(0, 2, 3, 1)[:, None]
    places = [torch.arange(1), torch.arange(h), torch.arange(w)]
    output = m(frames, text, t * 1000, pooled(text), places, torch.arange(text.shape[1]), return_dict=False)
    return output[:, 0].permute(0, 3, 1, 2)


def ernie(m, x, t, text):
    return m(x, t * 1000, text, torch.full((len(text),), text.shape[1]), return_dict=False)


KINDS: dict[str, Kind] = {
    "AuraFlowTransformer2DModel": Kind(
        {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 3, **HEADS, "joint_attention_dim": 32,
         "caption_projection_dim": 32, "pos_embed_max_size": 64, "in_channels": 16, "out_channels": 16},
        lambda m, x, t, text: m(x, text, t, return_dict=False), "single_transformer_blocks.1.attn", 8 + TEXT,
    ),
    "BriaTransformer2DModel": Kind(
        {**ROTARY, "num_layers": 1, "num_single_layers": 1}, flux_like(pool=False), "single_transformer_blocks.0.attn", TEXT
    ),
    "BriaFiboTransformer2DModel": Kind(
        {**ROTARY, "num_layers": 1, "num_single_layers": 1, "text_encoder_dim": 16},
        packed(lambda m, x, t, text, h, w: m(
            x, encoder_hidden_states=text, text_encoder_layers=[text[..., :16]] * 2, timestep=t, img_ids=ids(h, w),
            txt_ids=torch.zeros(TEXT, 3), return_dict=False,
        )),
        "single_transformer_blocks.0.attn", TEXT,
    ),
    "ChromaTransformer2DModel": Kind(
        {**ROTARY, "num_layers": 2, "num_single_layers": 1, "approximator_num_channels": 16, "approximator_hidden_dim": 32,
         "approximator_layers": 1},
        flux_like(pool=False), "transformer_blocks.1.attn", TEXT,
    ),
    "CogView3PlusTransformer2DModel": Kind(
        {**HEADS, "num_layers": 3, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 4, "pos_embed_max_size": 16,
         "sample_size": 8},
        lambda m, x, t, text: m(x, text, t * 1000, return_dict=False, **crops(text)), "transformer_blocks.1.attn1", TEXT,
    ),
    "CogView4Transformer2DModel": Kind(
        {**HEADS, "num_layers": 3, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 4, "sample_size": 8,
         "rope_axes_dim": (16, 16)},
        lambda m, x, t, text: m(x, text, t * 1000, return_dict=False, **crops(text)), "transformer_blocks.1.attn1", TEXT,
    ),
    "DiTTransformer2DModel": Kind(
        {**HEADS, "in_channels": 16, "out_channels": 16, "num_layers": 3, "norm_num_groups": 8, "sample_size": 8},
        lambda m, x, t, text: m(x, timestep=t * 1000, class_labels=text[:, 0, 0].abs().long(), return_dict=False),
        "transformer_blocks.1.attn1", 0, size=(8, 8),
    ),
    "ErnieImageTransformer2DModel": Kind(
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 64, "in_channels": 16,
         "out_channels": 16, "patch_size": 2, "text_in_dim": 32, "rope_axes_dim": (4, 6, 6)},
        ernie, "layers.1.self_attention", 0,
    ),
    "FluxTransformer2DModel": Kind(
        {**ROTARY, "num_layers": 2, "num_single_layers": 1, "pooled_projection_dim": 32}, flux_like(), "transformer_blocks.1.attn",
        TEXT,
    ),
    "Flux2Transformer2DModel": Kind(
        {**ROTARY, "axes_dims_rope": (4, 4, 4, 4), "num_layers": 1, "num_single_layers": 2, "timestep_guidance_channels": 16,
         "guidance_embeds": False},
        flux_like(pool=False, axes=4), "single_transformer_blocks.0.attn", TEXT,
    ),
    "Flux3Transformer2DModel": Kind(
        {**ROTARY, "cond_in_channels": 64, "axes_dims_rope": (4, 4, 4, 4), "num_layers": 1, "num_single_layers": 3,
         "timestep_channels": 16},
        flux_like(pool=False, axes=4), "single_transformer_blocks.1.attn", TEXT, first="single_transformer_blocks.0.attn",
    ),
    "GlmImageTransformer2DModel": Kind(
        {**HEADS, "num_layers": 3, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 4,
         "prior_vq_quantizer_codebook_size": 16},
        glm_image, "transformer_blocks.1.attn1", TEXT, reads="reads which samples leave out the prior",
    ),
    "HiDreamImageTransformer2DModel": Kind(
        {**HEADS, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 2,
         "caption_channels": [32, 32], "text_emb_dim": 32, "axes_dims_rope": (4, 2, 2), "max_resolution": (16, 16),
         "llama_layers": [0, 1], "num_routed_experts": 2, "num_activated_experts": 1, "force_inference_output": True},
        hidream, "single_stream_blocks.0.block.attn1", 0, breaks="how many tokens each expert gets depends on the data",
        reads="reads how many tokens each expert gets",
    ),
    "HunyuanDiT2DModel": Kind(
        {**HEADS, "in_channels": 16, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "num_layers": 4,
         "cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16, "text_len": TEXT,
         "text_len_t5": TEXT},
        hunyuan_dit, "blocks.2.attn1", 0,
    ),
    "HunyuanImageTransformer2DModel": Kind(
        {**HEADS, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 1, "num_refiner_layers": 1,
         "patch_size": (2, 2), "text_embed_dim": 32, "rope_axes_dim": (4, 4)},
        lambda m, x, t, text: m(x, t * 1000, text, torch.ones(text.shape[:2]), return_dict=False), "transformer_blocks.1.attn",
        0,
    ),
    "Kandinsky5Transformer3DModel": Kind(
        {"in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 16, "model_dim": 32,
         "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6)},
        kandinsky5, "visual_transformer_blocks.1.self_attention", 0, widest=torch.float32,
    ),
    "Krea2Transformer2DModel": Kind(
        {"in_channels": 64, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
         "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 32, "num_text_layers": 2,
         "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 32,
         "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6)},
        packed(krea2), "transformer_blocks.1.attn", TEXT,
    ),
    "LongCatImageTransformer2DModel": Kind(
        {**ROTARY, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 32}, flux_like(pool=False),
        "single_transformer_blocks.0.attn", TEXT,
    ),
    "LuminaNextDiT2DModel": Kind(
        {"sample_size": 8, "in_channels": 16, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4, "num_kv_heads": 2,
         "multiple_of": 8, "cross_attention_dim": 32},
        lumina_next, "layers.1.attn1", 0,
    ),
    "Lumina2Transformer2DModel": Kind(
        {"sample_size": 8, "hidden_size": 32, "num_layers": 3, "num_refiner_layers": 1, "num_attention_heads": 4,
         "num_kv_heads": 2, "multiple_of": 8, "axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32), "cap_feat_dim": 32},
        lumina2, "layers.1.attn", TEXT, first="layers.0.attn", breaks="reads the lengths of the texts",
        reads="reads the lengths of the texts",
    ),
    "NucleusMoEImageTransformer2DModel": Kind(
        {**ROTARY, "out_channels": 16, "num_layers": 3, "num_key_value_heads": 1, "moe_enabled": False},
        packed(nucleus), "transformer_blocks.1.attn", 0,
    ),
    "OmniGenTransformer2DModel": Kind(
        {"in_channels": 16, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32,
         "num_layers": 3, "pad_token_id": 0, "vocab_size": 64, "pos_embed_max_size": 16, "time_step_dim": 16,
         "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "type": "su"}},
        omnigen, "layers.1.self_attn", TEXT + 1, breaks="compares the last position with a length",
        reads="reads the last position", widest=torch.float32,
    ),
    "OvisImageTransformer2DModel": Kind(
        {**ROTARY, "out_channels": 64, "num_layers": 1, "num_single_layers": 1}, flux_like(pool=False),
        "single_transformer_blocks.0.attn", TEXT,
    ),
    "PixArtTransformer2DModel": Kind(
        {**HEADS, "in_channels": 16, "out_channels": 16, "num_layers": 3, "norm_num_groups": 8, "sample_size": 8,
         "cross_attention_dim": 32, "caption_channels": 32},
        lambda m, x, t, text: m(
            x, text, t * 1000, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False
        ),
        "transformer_blocks.1.attn1", 0,
    ),
    "PRXTransformer2DModel": Kind(
        {"in_channels": 16, "context_in_dim": 32, "hidden_size": 32, "num_heads": 4, "depth": 3, "axes_dim": [4, 4]},
        lambda m, x, t, text: m(x, t, text, return_dict=False), "blocks.1.attention", TEXT,
    ),
    "QwenImageTransformer2DModel": Kind(
        {**ROTARY, "out_channels": 16, "num_layers": 3}, packed(qwen_image), "transformer_blocks.1.attn", TEXT
    ),
    "SD3Transformer2DModel": Kind(
        {"sample_size": 8, "num_layers": 3, **HEADS, "joint_attention_dim": 32, "caption_projection_dim": 32,
         "pooled_projection_dim": 32, "pos_embed_max_size": 16, "qk_norm": "rms_norm"},
        sd3, "transformer_blocks.1.attn", 0,
    ),
    "ZImageTransformer2DModel": Kind(
        {"dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [4, 6, 6],
         "axes_lens": [128, 32, 32]},
        z_image, "layers.1.attention", 0, first="layers.0.attention",
    ),
}  # fmt: skip


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "BriaFibo2Transformer2DModel": (
        {"in_channels": 16, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 32,
         "injection_layer_ids": (1,), "perceiver_num_layers": 1, "axes_dims": (4, 6, 6), "axes_lens": (32, 32, 32)},
        "the order of its image and text tokens depends on the batch",
    ),
    "Ideogram4Transformer2DModel": (
        {"in_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 32,
         "adaln_dim": 16, "llm_features_dim": 32, "mrope_section": (4, 2, 2)},
        "only a table that the model is given says which tokens are the image's",
    ),
    "QwenImage21Transformer2DModel": (
        {"in_channels": 64, "out_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "context_in_dim": 32, "axes_dims_rope": (4, 6, 6)},
        "it attends in several calls, each for some of the tokens",
    ),
    "SanaTransformer2DModel": (
        {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 32,
         "sample_size": 8},
        "linear attention has no softmax, so that nothing says how much attention a token receives",
    ),
}  # fmt: skip
"""The class → its options, and why it is refused."""


def transformer(name: str, **options: Any) -> nn.Module:
    """Skips the test if the installed diffusers has no such class."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return seeded(lambda: getattr(diffusers, name)(**options))


def build(name: str) -> Model:
    return Model(transformer(name, **KINDS[name].options), KINDS[name].call)


def inputs(name: str, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x, sigma and text."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, KINDS[name].channels, *KINDS[name].size, generator=generator)
    text = torch.randn(batch, TEXT, 32, generator=generator)
    return x * 2, torch.full((batch,), 2.0), text
