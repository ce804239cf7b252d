"""Every direction, alone and combined, and a tiny model on which each takes milliseconds.

Tests of what every direction must do are parametrised by `FORMS`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import ksag
from tests.models import SpatialTransformer, randomise
from tests.own_directions import PerturbTokens, SkipBlock

LAYERS = ("middle_block.0.attn1", "middle_block.1.attn1")
BLOCK = "middle_block.1"


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(b, ...) with dimensions of length 1 at the end, as many as `like` has."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))


class Tiny(nn.Module):
    """A denoiser with two self-attention layers of a family that ksag knows; it compiles in a second."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.conv = convolution(3, 16, 3, padding=1)
        self.condition = nn.Linear(4, 16)
        self.middle_block = nn.ModuleList([SpatialTransformer(16), SpatialTransformer(16)])
        self.out = convolution(16, 3, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        sigma = per_sample(sigma, x)
        scale = (sigma**2 + 1).rsqrt()
        h = self.conv(x * scale)
        if cond is not None:
            h = h + per_sample(self.condition(cond), x)
        for block in self.middle_block:
            h = block(h)
        return x * scale**2 + self.out(h) * sigma * scale


def tiny(seed: int = 0, dims: int = 2) -> Tiny:
    torch.manual_seed(seed)
    model = Tiny(dims)
    for block in model.middle_block:
        for projection in (block.attn1.to_q, block.attn1.to_k):
            projection.weight.data.mul_(4)  # so that the attention chooses
    randomise(model)
    return model


def sag(**settings: object) -> ksag.SAG:
    return ksag.SAG(0.8, 1.5, **{"blur_kernel_size": 5, "attention": LAYERS[0], **settings})


FORMS: dict[str, Callable[[], Sequence[ksag.Direction]]] = {
    "SAG": lambda: [sag()],
    "SAG in one pass": lambda: [sag(one_pass=True)],
    "SAG, every 2nd call": lambda: [sag(every=2)],
    "PAG": lambda: [ksag.PAG(0.7, LAYERS[0])],
    "PAG on two layers": lambda: [ksag.PAG(0.7, LAYERS)],
    "SEG": lambda: [ksag.SEG(0.9, attention=LAYERS[1])],
    "SEG, blurred": lambda: [ksag.SEG(0.9, 1.0, LAYERS[0])],
    "SAG and PAG": lambda: [sag(), ksag.PAG(0.7, LAYERS[0])],
    "SAG in one pass, PAG and SEG": lambda: [sag(one_pass=True), ksag.PAG(0.7, LAYERS[0]), ksag.SEG(0.9, 1.0, LAYERS)],
    "a user's own": lambda: [SkipBlock(0.5, BLOCK), PerturbTokens(0.6, LAYERS[0])],
}
"""By name, what makes the directions anew."""


def wrap(form: str, model: nn.Module | None = None, **options: object) -> ksag.GuidedDenoiser:
    return ksag.GuidedDenoiser(tiny() if model is None else model, FORMS[form](), **options)


def latents(batch: int = 2, size: tuple[int, ...] = (6, 8), seed: int = 1) -> tuple[Tensor, dict[str, object]]:
    """x, and the conditionings, of samples that differ in everything."""
    generator = torch.Generator().manual_seed(seed)
    x, cond = torch.randn(batch, 3, *size, generator=generator), torch.randn(batch, 4, generator=generator)
    return x, {"cond": cond, "uncond": torch.zeros(batch, 4), "cond_scale": 2.0}


SIGMAS = (4.0, 3.0, 2.5, 1.5)
"""Of the calls of a run."""


def run(
    guided: Callable[..., Tensor], batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32, 
    size: tuple[int, ...] = (6, 8),
    **options: object,
) -> Tensor:  # fmt: skip
    """(calls, b, c, h, w): the calls of a run, each at the same picture with other noise."""
    x, args = latents(batch, size, seed)
    noise = torch.randn(len(SIGMAS), *x.shape, generator=torch.Generator().manual_seed(seed + 1))
    args = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in args.items()} | options
    return torch.stack(
        [guided((x + n * s).to(dtype), torch.full((batch,), s, dtype=dtype), **args) for n, s in zip(noise, SIGMAS, strict=True)]
    )


def plain(guided: ksag.GuidedDenoiser, **options: object) -> Tensor:
    """The same without any direction."""
    with ksag.GuidedDenoiser(guided.inner_model, [], cfg_rule=guided.cfg_rule) as without:
        return run(without, **options)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
