"""How a diffusers UNet or transformer is called: its dtype, its device, and the keywords that it cannot do without."""

from typing import Any

import torch
from torch import Tensor, nn


def call_network(model: nn.Module, x: Tensor, t: Tensor, concat: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The model's prediction without a learned variance, shaped like x (b, c, h, w) and of its dtype, at timesteps t (b,).

    `concat` (b, c', h, w) are the further channels of an inpainting model. A missing keyword that the model silently does without
    is a TypeError.
    """
    _check_keywords(_config_of(model), kwargs)
    both = x if concat is None else torch.cat([x, concat.to(x.dtype)], dim=1)
    # Copies, because diffusers takes a T2I-Adapter's residuals out of the list that it is given.
    kwargs = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    prediction: Tensor = model(both.to(computing_dtype(model)), t, return_dict=False, **kwargs)[0]
    return prediction[:, : x.shape[1]].to(x.dtype)


def _config_of(model: nn.Module) -> Any:
    """The network's, also if the model is a module around it."""
    for module in model.modules():
        if hasattr(module, "config"):
            return module.config
    return None


def _check_keywords(config: Any, kwargs: dict[str, Any]) -> None:
    size = getattr(config, "time_cond_proj_dim", None)
    if size and kwargs.get("timestep_cond") is None:
        raise TypeError(
            f"This UNet takes its guidance scale as an input, which is missing: give cond and uncond a timestep_cond, (b, {size}), "
            f"from pipe.get_guidance_scale_embedding(torch.full((b,), guidance_scale - 1), {size})."
        )
    if getattr(config, "guidance_embeds", False) and kwargs.get("guidance") is None:
        raise TypeError(
            "This transformer takes its guidance scale as an input, which is missing: conditioning(pipe, prompt, guidance=3.5) "
            "adds it, as a tensor (b,) with the key 'guidance'."
        )
    ip_adapter = getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj"
    if ip_adapter and "image_embeds" not in (kwargs.get("added_cond_kwargs") or {}):
        raise TypeError(
            "This UNet has an IP-Adapter, whose picture is missing. Give cond and uncond added_cond_kwargs={'image_embeds': [...]} "
            "from pipe.prepare_ip_adapter_image_embeds(picture, None, device, n, True), or call pipe.unload_ip_adapter()."
        )


def network_of(pipe: Any) -> Any:
    """A pipeline's UNet or transformer; None without one."""
    found = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    return next((model for model in found if isinstance(model, nn.Module)), None)


def multiple_of(pipe: Any) -> int:
    """What both sides of a picture, in pixels, must be multiples of."""
    patch = 1 if getattr(pipe, "transformer", None) is None else 2
    return int(pipe.vae_scale_factor) * patch


def trained_size(pipe: Any) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the model was trained on."""
    side = getattr(pipe, "default_sample_size", None) or network_of(pipe).config.sample_size
    return side * pipe.vae_scale_factor, side * pipe.vae_scale_factor


def computing_dtype(model: nn.Module) -> torch.dtype:
    """Of the layer that takes the latent: its weights', or what layerwise casting casts them to."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        casting = registry and registry.get_hook("layerwise_casting")
        if casting:
            dtype: torch.dtype = casting.compute_dtype
            return dtype
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():  # not a quantized weight
                return parameter.dtype
    raise TypeError(f"{type(model).__name__} has no weights.")


def execution_device(model: nn.Module) -> torch.device:
    """Where the model computes: not where its weights wait, if accelerate or diffusers offloads them."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device
