"""Tiny random Stable Diffusion pipelines: diffusers' and transformers' own classes, saved to disk and loaded back."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.models import randomise


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
        80, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
        transformer_layers_per_block=(1, 2), use_linear_projection=True, attention_head_dim=(2, 4),
    )  # fmt: skip


def vae(latent_channels=4, **options):
    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 16), norm_num_groups=8, latent_channels=latent_channels, sample_size=16, **options,
    )  # fmt: skip
    return randomise(model)


def controlnet(model=None):
    torch.manual_seed(3)
    return randomise(ControlNetModel.from_unet(model or unet(), conditioning_embedding_out_channels=(16, 32)))


def t2i_adapter():
    torch.manual_seed(4)
    return randomise(T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=2))


def ip_adapter(model, picture_dim=16):
    """The weights of an IP-Adapter for this UNet, in the form of its files: four tokens of the picture's embedding."""
    torch.manual_seed(5)
    width = model.config.cross_attention_dim
    cross = [module for name, module in model.named_modules() if name.endswith("attn2")]
    tokens = {
        f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(attn.inner_dim, width) for i, attn in enumerate(cross) for part in "kv"
    }
    projection = {"proj.weight": torch.randn(4 * width, picture_dim), "proj.bias": torch.randn(4 * width)}
    norm = {"norm.weight": torch.rand(width), "norm.bias": torch.randn(width)}
    return {"image_proj": projection | norm, "ip_adapter": tokens}


def text_encoder(cls=CLIPTextModel, **options):
    torch.manual_seed(2)
    config = CLIPTextConfig(
        **{
            "vocab_size": 54, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "max_position_embeddings": 16, "projection_dim": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **options,
        }
    )  # fmt: skip
    return cls(config).eval().requires_grad_(False)


def open_clip(cls=CLIPTextModel):
    """OpenCLIP's, as in Stable Diffusion 2.x and XL."""
    return text_encoder(cls, hidden_act="gelu", hidden_size=48)


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


def stable_diffusion(folder, unet_options=None, scheduler_options=None, cls=StableDiffusionPipeline, text=None, **parts):
    pipe = cls(
        vae=vae(), text_encoder=text or text_encoder(), tokenizer=tokenizer(folder / "words"), unet=unet(**(unet_options or {})),
        scheduler=scheduler(**(scheduler_options or {})), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


def stable_diffusion_2(folder):
    return stable_diffusion(folder, {"cross_attention_dim": 48}, {"prediction_type": "v_prediction"}, text=open_clip())


def stable_diffusion_inpainting(folder):
    return stable_diffusion(folder, {"in_channels": 9}, cls=StableDiffusionInpaintPipeline)


def stable_diffusion_with_controlnet(folder):
    return stable_diffusion(folder, cls=StableDiffusionControlNetPipeline, controlnet=controlnet())


def stable_diffusion_with_t2i_adapter(folder):
    return stable_diffusion(folder, cls=StableDiffusionAdapterPipeline, adapter=t2i_adapter())


def stable_diffusion_with_ip_adapter(folder):
    pipe = stable_diffusion(folder)
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    return pipe


def stable_diffusion_xl(folder, vae_options=None):
    words = tokenizer(folder / "words")
    pipe = StableDiffusionXLPipeline(
        vae=vae(**(vae_options or {})), text_encoder=text_encoder(), text_encoder_2=open_clip(CLIPTextModelWithProjection),
        tokenizer=words, tokenizer_2=words, unet=sdxl_unet(), scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip
    return through_disk(pipe, folder / "pipe")


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def at_timesteps_of(schedule, denoiser, latents, steps):
    """k-diffusion's x and sigmas for DDIM latents and timesteps: x = latents / sqrt(alphas_cumprod)."""
    schedule.set_timesteps(steps)
    sigmas = torch.cat([denoiser.sigmas[schedule.timesteps], denoiser.sigmas[:1]])  # set_alpha_to_one=False ends at timestep 0
    return latents * (1 + sigmas[0] ** 2).sqrt(), sigmas
