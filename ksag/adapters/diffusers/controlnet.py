"""A UNet together with the ControlNet that steers it."""

from typing import Any

from torch import Tensor, nn


class ControlledUNet(nn.Module):
    """A diffusers UNet with its ControlNet, in the place of the UNet. `denoiser(pipe)` makes one of a pipeline with a ControlNet.

    Args:
        unet: a diffusers UNet.
        controlnet: a diffusers ControlNetModel, or several of them as a MultiControlNetModel.
    """

    def __init__(self, unet: nn.Module, controlnet: nn.Module):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet
        configs: list[Any] = [getattr(module, "config", None) for module in controlnet.modules()]
        self.channels = next(config.in_channels for config in configs if hasattr(config, "in_channels"))

    def forward(
        self, x: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, controlnet_cond: Any = None,
        conditioning_scale: Any = 1.0, added_cond_kwargs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What the UNet predicts at x (b, c, h, w) and timesteps t (b,), steered by the picture `controlnet_cond` (b, 3, H, W) in
        [0, 1] with the strength `conditioning_scale`; both are lists for several ControlNets. The others are the UNet's."""
        if controlnet_cond is None:
            raise TypeError(
                "This UNet has a ControlNet, whose picture is missing: conditioning(pipe, prompt, control=picture) adds it."
            )
        text = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
        steering = {"controlnet_cond": controlnet_cond, "conditioning_scale": conditioning_scale}
        down, middle = self.controlnet(x[:, : self.channels], t, **text, **steering, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction: tuple[Tensor, ...] = self.unet(x, t, **text, **kwargs, **residuals)
        return prediction
