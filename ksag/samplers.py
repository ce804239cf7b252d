"""k-diffusion's samplers under one call, reproducible sample by sample."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ksag.denoiser import GuidedDenoiser

SAMPLERS = (
    "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip
"""The names that `sample` takes, each a `K.sampling.sample_NAME`."""


def sample(
    sampler: str,
    model: nn.Module,
    shape: Sequence[int],
    sigmas: Tensor,
    seeds: Sequence[int],
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Samples one image for each seed; the same seed gives the same image in any batch, to rounding.

    (`dpm_adaptive` alone chooses its steps by the error of the whole batch.)

    Args:
        sampler: one of `SAMPLERS`, that is `K.sampling.sample_{sampler}`.
        model: a denoiser, guided or not. Of a `ksag.GuidedDenoiser` its `run()` is sampled, so that its other runs are not
            affected.
        shape: (c, *spatial) of a sample.
        sigmas: (steps + 1,) noise levels, at least 2 steps, from the highest to 0, on the model's device. `dpm_fast` makes as
            many model calls as there are steps, and `dpm_adaptive` uses only the highest and the lowest above 0. These two and
            `lms` stop at the lowest above 0, and one more model call takes the last step to 0.
        seeds: one for each sample.
        extra_args: passed to the model at every call.
        callback: k-diffusion's, called at every step with a dict of `x`, `denoised`, `sigma`, `i` and more.
        start: (1 or len(seeds), c, *spatial), the latent that the first noise is added to, on the model's device; zeros by
            default. For image to image, pass the picture's latent here, and only the last sigmas.

    Returns:
        (len(seeds), c, *spatial), on the device and of the dtype of `sigmas`.

    Raises:
        AttributeError: k-diffusion has no such sampler.

    >>> import k_diffusion as K
    >>> import ksag.zoo
    >>> guided = ksag.SAGDenoiser(ksag.zoo.load(), sag_scale=2.0)
    >>> sigmas = K.sampling.get_sigmas_karras(2, 0.1, 80.0)
    >>> both = sample("euler_ancestral", guided, (3, 32, 32), sigmas, seeds=[7, 8])
    >>> second = sample("euler_ancestral", guided, (3, 32, 32), sigmas, seeds=[8])
    >>> torch.allclose(both[1:], second, atol=1e-4)
    True
    """
    import k_diffusion as K  # here, because it takes seconds, and the names above are needed without it

    function = getattr(K.sampling, f"sample_{sampler}")
    parameters = inspect.signature(function).parameters
    if isinstance(model, GuidedDenoiser):
        model = model.run()
    for module in model.modules():
        if isinstance(module, GuidedDenoiser):
            module.reset()  # an earlier run may have been given up
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # so that noise does not depend on the batch or the device

    def noise() -> Tensor:
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(sigmas.device)

    x = noise() * sigmas[0]
    if start is not None:
        x = x + start
    options: dict[str, Any] = {"extra_args": extra_args, "callback": callback, "disable": True}
    if sampler.endswith("sde"):
        # a little wider than the sigmas, which come back from their logarithms rounded
        low, high = float(sigmas[-2]) * 0.99, float(sigmas[0]) * 1.01
        tree = K.sampling.BrownianTreeNoiseSampler(x.cpu(), low, high, seed=list(seeds))
        options["noise_sampler"] = lambda sigma, sigma_next: tree(sigma.cpu(), sigma_next.cpu()).to(x)
    elif "noise_sampler" in parameters:
        options["noise_sampler"] = lambda sigma, sigma_next: noise()
    if sampler == "lms":
        x = function(model, x, sigmas[:-1], **options)  # a step to 0 would extrapolate far beyond the levels before it
    elif "sigmas" in parameters:
        return function(model, x, sigmas, **options)  # type: ignore[no-any-return]
    else:
        if "n" in parameters:
            options["n"] = len(sigmas) - 2
        x = function(model, x, float(sigmas[-2]), float(sigmas[0]), **options)
    with torch.no_grad():
        return model(x, sigmas[-2].expand(len(x)), **(extra_args or {}))  # type: ignore[no-any-return]
