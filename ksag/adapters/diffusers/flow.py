"""A diffusers network trained by flow matching, with its scheduler's noise levels, as a k-diffusion denoiser."""

import copy
import math
from typing import Any

import numpy as np
from torch import Tensor, nn

from ksag.adapters.diffusers.networks import call_network, execution_device, multiple_of, trained_size
from ksag.adapters.diffusers.transformers import PackedTransformer
from ksag.flow import FlowDenoiser


class ScheduledFlowDenoiser(FlowDenoiser):
    """A `ksag.FlowDenoiser` of a UNet or `SpatialTransformer`, whose `get_sigmas` spaces the noise levels as diffusers does."""

    def __init__(self, network: nn.Module, scheduler: Any, shift: float):
        super().__init__(network, shift)
        self.sigmas = self.sigmas.to(execution_device(network))
        self.scheduler, self.packed = scheduler, isinstance(network, PackedTransformer)

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """(n + 1,) noise levels from the highest to 0, as the pipeline spaces them; without n, all 1,000 and a 0."""
        scheduler = copy.deepcopy(self.scheduler)  # set_timesteps changes it
        if n is None or type(scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
            return super().get_sigmas(n)
        if scheduler.config.use_dynamic_shifting:
            mu = self.shift if _is_linear(scheduler) else math.log(self.shift)
        else:
            mu = None
            scheduler.set_shift(self.shift)
        # These pipelines give the scheduler their own levels, and the others leave the choice to it
        own = np.linspace(1, 1 / n, n) if self.packed else None
        scheduler.set_timesteps(n, sigmas=own, mu=mu)
        return self.t_to_sigma(scheduler.sigmas.to(self.sigmas))

    def velocity(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return call_network(self.inner_model, x, t * 1000, **kwargs)


def shift_of(scheduler: Any, tokens: int | None) -> float:
    """The factor by which a scheduler shifts sigma, for a picture of `tokens` tokens."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return getattr(scheduler, "shift", None) or config.get("shift") or config.get("flow_shift") or 1.0
    if tokens is None:
        raise ValueError(
            f"The shift of this {type(scheduler).__name__} depends on the size of the picture: give denoiser the pipeline and "
            f"size=(height, width), or shift=."
        )
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return mu if _is_linear(scheduler) else math.exp(mu)


def tokens_of(pipe: Any, size: tuple[int, int] | None) -> int:
    """How many tokens a picture of size (height, width) in pixels has; by default one of the size that the model was trained on."""
    height, width = size or trained_size(pipe)
    return (height // multiple_of(pipe)) * (width // multiple_of(pipe))


def _is_linear(scheduler: Any) -> bool:
    return bool(scheduler.config.get("time_shift_type") == "linear")
