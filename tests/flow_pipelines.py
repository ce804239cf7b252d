"""Tiny random pipelines trained by flow matching: diffusers' and transformers' own classes, saved to disk and loaded back."""

import copy
import functools
import json
import tempfile
from pathlib import Path

from diffusers import (
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.diffusers_pipelines import open_clip, sdxl_unet, text_encoder, through_disk, tokenizer, vae
from tests.models import seeded

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
ROTARY = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def t5(width=32):
    return seeded(lambda: T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)))


def t5_tokenizer():
    """A token for each letter, and one for the beginning of a word."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    tokens = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokens, extra_ids=0)  # transformers 5 takes a vocabulary, 4 does not


def flux_vae():
    return vae(16, scaling_factor=0.36, shift_factor=0.12)


def sd3_transformer():
    return seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=80, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
        )
    )  # fmt: skip


def stable_diffusion_3(folder, **scheduler):
    words = tokenizer(folder / "words")
    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}), vae=flux_vae(),
        text_encoder=text_encoder(CLIPTextModelWithProjection), text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        text_encoder_3=t5(80), tokenizer=words, tokenizer_2=words, tokenizer_3=t5_tokenizer(),
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


def flux_transformer(**options):
    return seeded(
        lambda: FluxTransformer2DModel(
            **{"in_channels": 64, "num_single_layers": 2, "pooled_projection_dim": 32, **ROTARY, **options}
        )
    )


def flux(folder, guidance_embeds=True, **scheduler):
    """Flux dev; schnell without `guidance_embeds`."""
    pipe = FluxPipeline(
        transformer=flux_transformer(guidance_embeds=guidance_embeds),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **scheduler}), vae=flux_vae(),
        text_encoder=text_encoder(), text_encoder_2=t5(), tokenizer=tokenizer(folder / "words"), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


def chroma(folder):
    transformer = seeded(
        lambda: ChromaTransformer2DModel(
            in_channels=64, num_single_layers=2, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
            **ROTARY,
        )
    )  # fmt: skip
    pipe = ChromaPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=flux_vae(),
        text_encoder=t5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


def qwen_tokenizer(folder):
    """A token for each byte that the pipeline's template has."""
    folder.mkdir()
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*alphabet, *special])}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    words = Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    words.add_special_tokens({"additional_special_tokens": special[1:]})
    return words


def qwen_image(folder):
    text = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    transformer = seeded(lambda: QwenImageTransformer2DModel(in_channels=64, out_channels=16, **ROTARY))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_start_token_id=1)
    encoder = seeded(lambda: Qwen2_5_VLForConditionalGeneration(config))
    pipe = QwenImagePipeline(
        transformer=transformer, scheduler=scheduler, vae=qwen_image_vae(), text_encoder=encoder,
        tokenizer=qwen_tokenizer(folder / "words"),
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


def qwen_image_vae():
    return seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1] * 16,
            latents_std=[1.5] * 16,
        )
    )  # fmt: skip


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """With the two names that the pipelines of UNets ask of a scheduler besides."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample, timestep):
        return sample


def flow_sdxl(folder, **scheduler):
    """SDXL's architecture, trained further by flow matching."""
    words = tokenizer(folder / "words")
    pipe = StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_encoder(), text_encoder_2=open_clip(CLIPTextModelWithProjection), tokenizer=words,
        tokenizer_2=words, unet=sdxl_unet(), scheduler=FlowMatchEulerDiscreteScheduler(shift=2.5), add_watermarker=False,
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


@functools.cache
def _made(make):
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder))


def made(make, **scheduler):
    """A copy of a pipeline that is made once, with other options of its scheduler."""
    pipe = copy.copy(_made(make))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **scheduler)
    return pipe


def schnell(folder):
    return flux(folder, guidance_embeds=False)


SIZE = {"height": 16, "width": 24}


def pack(latents):
    """(b, c, h, w) → the tokens that Flux's and Qwen-Image's pipelines work with."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens):
    """The latents (b, c, 8, 12) of pictures of `SIZE`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (4, 6)), 2)
