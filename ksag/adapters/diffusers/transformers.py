"""diffusers' transformers as modules that map a spatial latent and its timestep, up to 1000, to the velocity."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn


class SpatialTransformer(nn.Module):
    """A diffusers transformer that takes latents as they are, such as Stable Diffusion 3's. The others derive from it."""

    timestep_scale = 1.0
    """The transformer's timesteps are this many times those from 0 to 1000."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, *, return_dict: bool = False, **kwargs: Any) -> tuple[Tensor, ...]:
        """The velocity (b, c, h, w) at x (b, c, h, w) and t (b,) from 0 to 1000, in a tuple; `kwargs` are the transformer's."""
        velocity: tuple[Tensor, ...] = self.transformer(x, timestep=t * self.timestep_scale, return_dict=False, **kwargs)
        return velocity


class AuraFlow(SpatialTransformer):
    timestep_scale = 1e-3


class Lumina2(SpatialTransformer):
    """Its time runs the other way, from noise at 0 to the image at 1."""

    def forward(self, x: Tensor, t: Tensor, *, return_dict: bool = False, **kwargs: Any) -> tuple[Tensor, ...]:
        (forwards,) = self.transformer(x, timestep=1 - t / 1000, return_dict=False, **kwargs)
        return (-forwards,)


class PackedTransformer(SpatialTransformer):
    """A transformer that takes 2 × 2 patches of the latent as tokens; diffusers packs them in the pipeline."""

    patch_size = 2
    timestep_scale = 1e-3

    def positions(self, h: int, w: int, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords that say where the h · w image tokens and the text tokens are."""
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, *, return_dict: bool = False, **kwargs: Any) -> tuple[Tensor, ...]:
        if x.shape[2] % 2 or x.shape[3] % 2:
            name, size = type(self.transformer).__name__, tuple(x.shape[2:])
            raise ValueError(f"{name} packs latents in patches of 2 × 2, so h and w must be even, got {size}.")
        h, w = x.shape[2] // 2, x.shape[3] // 2
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        (velocity,) = super().forward(tokens, t, **(kwargs | self.positions(h, w, x, kwargs)))
        return (rearrange(velocity, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2),)


class Flux(PackedTransformer):
    def positions(self, h: int, w: int, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        rows, columns = (torch.arange(n, dtype=torch.float32, device=x.device) for n in (h, w))
        image = torch.stack([torch.zeros(h, w, device=x.device), *torch.meshgrid(rows, columns, indexing="ij")], dim=-1)
        text = kwargs["encoder_hidden_states"].shape[1]
        return {"img_ids": image.flatten(0, 1), "txt_ids": torch.zeros(text, 3, device=x.device)}


class Chroma(Flux):
    """`attention_mask`, (b, text tokens), is extended over the image tokens."""

    def positions(self, h: int, w: int, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        places = super().positions(h, w, x, kwargs)
        if (mask := kwargs.get("attention_mask")) is not None:
            places["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), h * w)], dim=1)
        return places


class QwenImage(PackedTransformer):
    def positions(self, h: int, w: int, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"img_shapes": [[(1, h, w)]] * len(x)}


KINDS: dict[str, type[SpatialTransformer]] = {
    "SD3Transformer2DModel": SpatialTransformer,
    "AuraFlowTransformer2DModel": AuraFlow,
    "Lumina2Transformer2DModel": Lumina2,
    "FluxTransformer2DModel": Flux,
    "ChromaTransformer2DModel": Chroma,
    "QwenImageTransformer2DModel": QwenImage,
}
"""diffusers' class → the module around it."""


def spatial(transformer: nn.Module) -> SpatialTransformer:
    """The module around a diffusers transformer; a ValueError if there is none for this class."""
    name = type(transformer).__name__
    if name not in KINDS:
        raise ValueError(
            f"ksag does not support diffusers' {name}; it supports {', '.join(KINDS)}. For another flow matching model, write a "
            f"module that maps (x_t, t, **conditioning) to the velocity, and wrap it: ksag.FlowDenoiser(module)."
        )
    return KINDS[name](transformer)
