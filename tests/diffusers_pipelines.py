"""Tiny random Stable Diffusion pipelines: diffusers' and transformers' own classes, saved to disk and loaded back."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.conftest import randomise


def scheduler(**options):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **options,
    )


def unet(cross_attention_dim=32, **options):
    torch.manual_seed(0)
    return randomise(
        UNet2DConditionModel(
            **{
                "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
                "cross_attention_dim": cross_attention_dim, "attention_head_dim": 4,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                **options,
            }
        )
    )  # fmt: skip


def sdxl_unet():
    return unet(
        64, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 2), use_linear_projection=True, attention_head_dim=(2, 4),
    )  # fmt: skip


def vae():
    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, sample_size=16,
    )  # fmt: skip
    return randomise(model)


def text_encoder(cls=CLIPTextModel):
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return cls(config).eval().requires_grad_(False)


def tokenizer(folder):
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def through_disk(pipe, folder):
    pipe.save_pretrained(folder)
    pipe = type(pipe).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(folder, unet_options=None, scheduler_options=None, cls=StableDiffusionPipeline):
    pipe = cls(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(folder / "words"), unet=unet(**(unet_options or {})),
        scheduler=scheduler(**(scheduler_options or {})), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


def stable_diffusion_inpainting(folder):
    return stable_diffusion(folder, {"in_channels": 9}, cls=StableDiffusionInpaintPipeline)


def stable_diffusion_xl(folder):
    words = tokenizer(folder / "words")
    pipe = StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_encoder(), text_encoder_2=text_encoder(CLIPTextModelWithProjection), tokenizer=words,
        tokenizer_2=words, unet=sdxl_unet(), scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")
