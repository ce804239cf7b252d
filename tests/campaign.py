"""A seeded campaign of random cases: model × shape × dtype × nesting × directions × settings × run, against float64.

Cases of one scene share the model, the latent and the conditionings. `tests/test_campaign.py` runs some, `scripts/campaign.py` as
many as you like. The attention is recorded and perturbed in a float64 copy of the model: the arguments of the layer's call of
`scaled_dot_product_attention`, or the result of its softmax.
"""

import contextlib
import copy
import functools
import math
import random
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import k_diffusion as K
import torch
from denoising_diffusion_pytorch import Unet, classifier_free_guidance
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from k_diffusion.models import flags
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import ksag
from ksag import cfg
from tests import reference
from tests.forms import Tiny, per_sample
from tests.image_transformers import ids, packed
from tests.models import conditional, ldm, randomise, unconditional

ldm_attention = ldm("attention")
UNetModel = ldm("diffusionmodules.openaimodel").UNetModel
GroupNorm32 = ldm("diffusionmodules.util").GroupNorm32

PER_SCENE = 10
"""How many cases share a scene."""

SIGMAS = (0.125, 0.5, 1.0, 2.5, 4.0, 8.0, 14.0)
"""Exact in every dtype, so that all of them ask the same."""

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative errors: some hundred roundings through three evaluations of a UNet, or a few in half precision."""


# The models


class Model(NamedTuple):
    build: Callable[[], nn.Module]
    call: Callable[[Any, Tensor, Tensor, Any], Tensor]
    """(model, x, sigma, conditioning) → (b, c, h, w)"""
    cond: tuple[int, ...] | None
    """The shape of one sample's conditioning; () is a class, None that the model takes none."""
    channels: int = 3
    multiple: int = 2
    """What both sides of the latent are multiples of."""
    size: int | None = None
    """The only size that it takes, if there is only one."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32, torch.float32, torch.float64)
    weight: int = 1
    """How often it is drawn."""
    attends_in_float32: bool = False
    dims: int = 2
    """How many spatial sides its latents have."""
    image: str = ""
    """Where the image's tokens are, if text attends with them: "first" or "last"."""

    @property
    def is_flow(self) -> bool:
        """Whether it predicts a velocity. Only the transformers do."""
        return bool(self.image)


def steps(sigma: Tensor) -> Tensor:
    """Timesteps for a UNet that rounds them to float32 inside: whole numbers, which are exact."""
    return (sigma * 64).round().long()


def ldm_call(m: Any, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
    # ldm's own cast of the queries would end a float64 reference
    with mock.patch.object(ldm_attention, "_ATTN_PRECISION", "any"):
        return m(x, steps(sigma), cond)


def transformer_call(m: Any, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
    # k-diffusion compiles functions of its own, which would take longer than all of the cases
    with mock.patch.object(flags.compile_wrap, "__call__", lambda wrap, *args, **kwargs: wrap.function(*args, **kwargs)):
        return m(x, sigma)


def k_diffusion_unet(channels: list[int], attention: list[bool]) -> nn.Module:
    return K.models.ImageDenoiserModelV1(3, 16, [1] * len(channels), channels, attention, mapping_cond_dim=4)


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip


def flux_call(m: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    def call(m: Any, tokens: Tensor, t: Tensor, text: Tensor, h: int, w: int) -> Any:
        return m(tokens, text, cond.mean(1), t, img_ids=ids(h, w), txt_ids=torch.zeros(text.shape[1], 3), return_dict=False)

    return packed(call)(m, x, t, cond)


def ldm_unet(**options: Any) -> nn.Module:
    return UNetModel(
        image_size=8,
        in_channels=4,
        out_channels=4,
        num_res_blocks=1,
        channel_mult=[1, 2],
        num_heads=2,
        model_channels=32,
        **options,
    )


ALL_DTYPES = (torch.float32,) * 5 + (torch.float64, torch.float16, torch.bfloat16)
MODELS = {
    "k-diffusion": Model(
        lambda: k_diffusion_unet([16, 128], [False, True]), lambda m, x, s, c: m(x, s, mapping_cond=c), (4,),
        dtypes=ALL_DTYPES, weight=4,
    ),
    "k-diffusion, one level": Model(
        lambda: k_diffusion_unet([64], [True]), lambda m, x, s, c: m(x, s, mapping_cond=c), (4,),
        multiple=1, dtypes=ALL_DTYPES, weight=4,
    ),
    "k-diffusion transformer v1": Model(
        lambda: K.models.ImageTransformerDenoiserModelV1(2, 128, 64, 3, 3, (2, 2)), transformer_call, None, weight=2
    ),
    "CompVis": Model(
        lambda: ldm_unet(attention_resolutions=[2], use_spatial_transformer=True, context_dim=16), ldm_call, (5, 16), 4
    ),
    "OpenAI, legacy order": Model(
        lambda: ldm_unet(attention_resolutions=[2]), lambda m, x, s, c: ldm_call(m, x, s, None), None, 4, attends_in_float32=True
    ),
    "OpenAI, new order": Model(
        lambda: ldm_unet(attention_resolutions=[2], use_new_attention_order=True), lambda m, x, s, c: ldm_call(m, x, s, None),
        None, 4, attends_in_float32=True,
    ),
    "diffusers": Model(
        lambda: conditional(cross_attention_dim=16), lambda m, x, s, c: m(x, steps(s), c).sample, (5, 16), 4, multiple=1
    ),
    "diffusers, unconditional": Model(unconditional, lambda m, x, s, c: m(x, steps(s)).sample, None),
    "diffusers, DiT": Model(
        lambda: DiTTransformer2DModel(2, 16, 4, num_layers=2, sample_size=12, num_embeds_ada_norm=10),
        lambda m, x, s, c: m(x, steps(s), c).sample, (), 4, size=12,
    ),
    "lucidrains": Model(
        lambda: Unet(16, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2), lambda m, x, s, c: m(x, s), None
    ),
    "lucidrains, flash": Model(
        lambda: Unet(16, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, flash_attn=True), lambda m, x, s, c: m(x, s), None
    ),
    "lucidrains, guided": Model(
        lambda: classifier_free_guidance.Unet(16, 10, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2),
        lambda m, x, s, c: m(x, s, c, cond_drop_prob=0.0), (),
    ),
    "sequences": Model(lambda: Tiny(1), lambda m, x, s, c: m(x, s, c), (4,), multiple=1, dtypes=ALL_DTYPES, dims=1),
    "videos": Model(lambda: Tiny(3), lambda m, x, s, c: m(x, s, c), (4,), multiple=1, dtypes=ALL_DTYPES, dims=3),
    "Stable Diffusion 3": Model(sd3, lambda m, x, t, c: m(x, c, c.mean(1), t * 1000).sample, (5, 16), 4, image="first"),
    "Flux": Model(flux, flux_call, (5, 16), 4, dtypes=(torch.float32,), image="last"),
}  # fmt: skip


class Adapter(nn.Module):
    """Between a denoiser and a network: unpacks the conditioning, and does with keywords what models are known to do."""

    def __init__(self, unet: nn.Module, model: Model):
        super().__init__()
        self.unet, self.model = unet, model

    def forward(self, x, sigma, cond=None, *, nesting=None, text=None, shift=None, residuals=(), table=None):
        value = cond if text is None else text
        value = None if value is None else NESTINGS[nesting].unpack(value)
        if self.model.cond is None and value is not None:  # it takes none, so that a bias of its channels stands in for one
            x = x + per_sample(value, x)
        y = self.model.call(self.unet, x, sigma, value)
        if shift is not None:
            y = y + shift
        if residuals:
            y = y + residuals.pop()  # as diffusers' UNet does with a T2I-Adapter's
        return y if table is None else y + per_sample(table.sum(0)[None], y)


class Flow(nn.Module):
    """The reference's denoiser around a velocity."""

    def __init__(self, inner_model: nn.Module):
        super().__init__()
        self.inner_model = inner_model

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        sigma = per_sample(sigma, x)
        t = sigma / (sigma + 1)
        return x * (1 - t) - t * self.inner_model(x * (1 - t), t.flatten(), **kwargs)


@functools.cache
def denoisers(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A small model in its dtype, for ksag, and its copy that computes in float64, for the reference."""
    model = MODELS[name]
    torch.manual_seed(0)
    unet = randomise(model.build())
    sharpen(unet)
    network = Adapter(to_dtype(unet, dtype), model)
    if model.is_flow:
        return ksag.FlowDenoiser(network).eval(), Flow(copy.deepcopy(network)).eval().apply(in_float64)
    own = K.layers.Denoiser(network, sigma_data=0.5)
    return own.eval(), copy.deepcopy(own).apply(in_float64)


def to_dtype(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in unet.modules():
        module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    return unet.apply(in_float64) if dtype == torch.float64 else unet


def in_float64(module: nn.Module) -> None:
    module._apply(lambda t: t.double() if t.is_floating_point() else t, recurse=False)
    if isinstance(module, GroupNorm32):  # which would go to float32 and back
        module.forward = functools.partial(nn.GroupNorm.forward, module)  # type: ignore[method-assign]
    if isinstance(module, UNetModel):
        module.dtype = torch.float64
        module.time_embed.register_forward_pre_hook(lambda _, args: args[0].double())


def sharpen(unet: nn.Module) -> None:
    """Makes queries and keys longer, so that the attention is far from uniform, as it is in a trained model."""
    for path, module in unet.named_modules():
        if path.rpartition(".")[2] in ("qkv", "qkv_proj", "to_qkv", "to_q", "to_k") and hasattr(module, "weight"):
            module.weight.mul_(2.5)


# Conditionings


class Nesting(NamedTuple):
    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]


class Text(NamedTuple):
    embedding: Tensor
    name: str


def unpack_deep(cond: Any) -> Tensor:
    assert type(cond) is dict and type(cond["a"]) is tuple and cond["a"][1:] == (None, 2.5)
    return cond["a"][0][0]["b"]


def unpack_twins(cond: Any) -> Tensor:
    assert torch.equal(cond[0], cond[1]["twin"])
    return cond[0]


def unpack_default_dict(cond: Any) -> Tensor:
    assert cond["missing"] == [] and cond["t"].ndim
    return cond["t"]


NESTINGS = {
    "tensor": Nesting(lambda t: t, lambda c: c),
    "dict of lists": Nesting(lambda t: {"c_crossattn": [t]}, lambda c: c["c_crossattn"][0]),
    "list that the model empties": Nesting(lambda t: [t], lambda c: c.pop()),
    "tuple": Nesting(lambda t: (t, "a constant"), lambda c: c[0]),
    "named tuple": Nesting(lambda t: Text(t, "a constant"), lambda c: c.embedding),
    "ordered dict": Nesting(lambda t: OrderedDict(b=t, a=1), lambda c: c.popitem(last=False)[1]),
    "default dict": Nesting(lambda t: defaultdict(list, t=t), unpack_default_dict),
    "diffusers' output": Nesting(lambda t: UNet2DOutput(sample=t), lambda c: c.sample),
    "read-only mapping": Nesting(lambda t: MappingProxyType({"t": t}), lambda c: c["t"]),
    "deep": Nesting(lambda t: {"a": ([{"b": t}], None, 2.5), 3: t}, unpack_deep),
    "twins": Nesting(lambda t: [t, {"twin": t}], unpack_twins),
}


# What cases share: the model, the latent and the conditionings


@dataclass(frozen=True)
class Scene:
    name: str
    dtype: torch.dtype
    x: Tensor
    sigma: Tensor
    cond: Tensor | None
    uncond: Tensor | None
    nesting: str
    keywords: dict[str, Any]
    """Others, and among them maybe `table`, which all samples share."""

    def arguments(self, cond: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
        """The keywords of a model call, made for each call, because a model may empty its containers."""
        keywords = {name: converted(value, dtype) for name, value in self.keywords.items()}
        if cond is None:
            return keywords
        return {**keywords, "nesting": self.nesting, "cond": NESTINGS[self.nesting].pack(converted(cond, dtype))}

    def denoise(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """The reference's prediction, in float64."""
        _, model = denoisers(self.name, self.dtype)
        return model(x.double(), self.sigma.double(), **self.arguments(cond, torch.float64))

    @property
    def base(self) -> Tensor | None:
        return self.cond if self.uncond is None else self.uncond

    @functools.cached_property
    def predictions(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """u, g, and the saliency of each layer by its path, all in float64."""
        _, model = denoisers(self.name, self.dtype)
        with watched(model, layers(self.name), MODELS[self.name].image) as received:
            u = self.denoise(self.x, self.base)
        g = u if self.uncond is None else self.denoise(self.x, self.cond)
        return u, g, {path: as_map(tokens, self.x.shape[2:]) for path, tokens in received.items()}

    @functools.cached_property
    def rounding(self) -> dict[str, float]:
        """By how much the saliency of each layer changes where the reference asks the model in the scene's dtype."""
        model, _ = denoisers(self.name, self.dtype)
        with watched(model, layers(self.name), MODELS[self.name].image) as received:
            model(self.x, self.sigma, **self.arguments(self.base, self.dtype))
        exact = self.predictions[2]
        return {path: float((as_map(received[path], self.x.shape[2:]) - exact[path]).abs().max()) for path in exact}

    @functools.cached_property
    def perturbed(self) -> Callable[[tuple[str, ...], str | float], Tensor]:
        """The prediction g with other attention in some layers, in float64."""
        _, model = denoisers(self.name, self.dtype)

        @functools.cache
        def prediction(paths: tuple[str, ...], how: str | float) -> Tensor:
            modules = [model.get_submodule(path) for path in paths]
            with Perturbed(modules, how, self.name, self.x.shape[2:]):
                return self.denoise(self.x, self.cond)

        return prediction

    def margin(self, path: str) -> Tensor:
        """How far a saliency may be from the exact one: 8 times the rounding of the reference, and that of float32 sums."""
        return 8 * self.rounding[path] + 1e-5 * (1 + self.predictions[2][path])


def converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [converted(v, dtype) for v in value]
    return value.to(dtype) if value.is_floating_point() else value


@functools.cache
def layers(name: str) -> tuple[str, ...]:
    model, _ = denoisers(name, torch.float32)
    return tuple(layer.path for layer in ksag.list_attention(model))


def image_of(joint: str, size: tuple[int, ...], tokens: int) -> slice:
    """Which of a layer's tokens are the image's, of a latent of this size; `joint` is a model's `image`."""
    if not joint:
        return slice(None)
    image = math.prod(side // 2 for side in size)
    return slice(0, image) if joint == "first" else slice(tokens - image, None)


def sdpa_arguments(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Any:
    return query, key, value, scale or query.shape[-1] ** -0.5


class Watch(TorchFunctionMode):
    """How much attention each token of the image receives, (b, tokens), while a layer runs, by the layer's path."""

    def __init__(self, joint: str) -> None:
        super().__init__()
        self.joint = joint
        self.form: tuple[int, ...] = ()
        """The latent's."""
        self.inside: str | None = None
        self.received: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside is not None and func is F.scaled_dot_product_attention:
            q, k, _, scale = sdpa_arguments(*args, **(kwargs or {}))
            self.add((q.double() @ k.double().mT * scale).softmax(-1))
        elif self.inside is not None and func in (torch.softmax, Tensor.softmax, F.softmax):
            self.add(result.double())
        return result

    def add(self, attention: Tensor) -> None:
        assert self.inside is not None and self.inside not in self.received
        tokens = attention.shape[-2]
        attention = attention.reshape(self.form[0], -1, *attention.shape[-2:]).mean(1)[:, :, -tokens:]  # behind lucidrains' memory
        image = image_of(self.joint, self.form[2:], tokens)
        received = attention[:, image, image].sum(1)
        self.received[self.inside] = received / received.mean(1, keepdim=True)


@contextlib.contextmanager
def watched(model: nn.Module, paths: Iterable[str], joint: str = "") -> Iterator[dict[str, Tensor]]:
    handles = []

    def enter(path: str | None) -> Callable:
        return lambda *_: setattr(watch, "inside", path)

    watch = Watch(joint)
    handles.append(model.register_forward_pre_hook(lambda module, args: setattr(watch, "form", tuple(args[0].shape))))
    for path in dict.fromkeys(paths):
        layer = model.get_submodule(path)
        handles += [layer.register_forward_pre_hook(enter(path)), layer.register_forward_hook(enter(None))]
    try:
        with watch:
            yield watch.received
    finally:
        for handle in handles:
            handle.remove()


class Perturbed(reference.Perturbed):
    """The same where text attends too: the image's queries alone are changed."""

    def __init__(self, modules: Sequence[nn.Module], how: str | float, name: str, size: tuple[int, ...]) -> None:
        super().__init__(modules, how, lambda tokens: grid_of(tokens, size))
        self.name, self.size = name, size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not MODELS[self.name].image:
            return super().__torch_function__(func, types, args, kwargs)
        output = func(*args, **(kwargs or {}))
        if self.inside and func is F.scaled_dot_product_attention:
            q, k, v, scale = sdpa_arguments(*args, **(kwargs or {}))
            image = image_of(MODELS[self.name].image, self.size, q.shape[-2])
            if self.how == "identity":
                output[..., image, :] = v[..., image, :]
            else:
                q = reference.blurred_queries(q[..., image, :], self.how, self.grid)
                output[..., image, :] = (q @ k.mT * scale).softmax(-1) @ v
        return output


def as_map(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """(b, *grid)"""
    return tokens.view(-1, *grid_of(tokens.shape[1], size))


def grid_of(tokens: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """The latent's size, halved and rounded up as often as the number of tokens says."""
    for level in range(4):
        grid = tuple(-(-side // 2**level) for side in size)
        if math.prod(grid) == tokens:
            return grid
    raise AssertionError(f"{tokens} tokens of a latent of {tuple(size)}")


@functools.lru_cache(maxsize=1)
def scene(seed: int, number: int) -> Scene:
    rng = random.Random(f"{seed} scene {number}")
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    name = rng.choices(list(MODELS), [model.weight for model in MODELS.values()])[0]
    model = MODELS[name]
    dtype, batch = rng.choice(model.dtypes), rng.choice((1, 2, 2, 3))
    largest = rng.choice((12, 12, 16, 24))
    size = [model.size or model.multiple * rng.randint(8 // model.multiple, largest // model.multiple) for _ in range(model.dims)]
    if model.dims == 3:
        size[0] = rng.randint(1, 6)  # frames
    sigma = torch.tensor([rng.choice(SIGMAS)] * batch if rng.random() < 0.5 else rng.choices(SIGMAS, k=batch))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def conditioning(longer: bool) -> Tensor:
        if model.cond == ():
            return torch.randint(10, (batch,), generator=generator)
        tokens, *width = model.cond or (model.channels,)
        return normal(batch, 2 * tokens if longer and width else tokens, *width)

    x = normal(batch, model.channels, *size) * per_sample((sigma.to(dtype).square() + 1).sqrt(), torch.empty(1, 1, *size))
    kind = rng.choice(("uncond and cond",) * 4 + ("cond alone", "none"))
    if kind == "none" and model.cond is not None and name not in OPTIONAL:
        kind = "cond alone"
    keywords: dict[str, Any] = {}
    if rng.random() < 0.3:
        keywords["shift"] = normal(batch, 1, *[1] * model.dims)
    if rng.random() < 0.3:
        keywords["residuals"] = [normal(batch, 1, *[1] * model.dims)]
    if rng.random() < 0.3:
        keywords["table"] = normal(rng.choice((batch, 5)), model.channels)
    return Scene(
        name,
        dtype,
        rng.choice(LAYOUTS if model.dims == 2 else LAYOUTS[:1])(x),
        sigma.to(dtype),
        cond=None if kind == "none" else conditioning(longer=rng.random() < 0.3),
        uncond=conditioning(longer=False) if kind == "uncond and cond" else None,
        nesting=rng.choice(list(NESTINGS)),
        keywords=keywords,
    )


OPTIONAL = ("k-diffusion", "k-diffusion, one level", "sequences", "videos")
"""Models that take a conditioning and can do without."""

LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    lambda x: x.to(memory_format=torch.channels_last),
    lambda x: F.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2],
)


# A case: directions and settings


class Drawn(NamedTuple):
    """A direction."""

    kind: str
    layers: tuple[str, ...]
    settings: dict[str, Any]

    def acts(self, sigma: Tensor) -> Tensor:
        low, high = self.settings["sigma_range"]
        return (sigma >= low) & (sigma <= high) & (self.settings["scale"] != 0)


KINDS: dict[str, Any] = {"SAG": ksag.SAG, "PAG": ksag.PAG, "SEG": ksag.SEG}
COMBINATIONS = {
    ("SAG",): 5, ("PAG",): 2, ("SEG",): 2, ("SAG", "PAG"): 2, ("PAG", "SEG"): 1, ("SEG", "SAG"): 1, ("PAG", "SEG", "SAG"): 2,
    (): 0.2,
}  # fmt: skip
"""And how often they are drawn."""


@dataclass(frozen=True)
class Case:
    seed: int
    number: int
    directions: tuple[Drawn, ...]
    settings: dict[str, Any]
    """Of the wrapper."""
    cond_scale: float
    rule: Callable
    """The reference's, for `settings["cfg_rule"]`."""
    given: str
    """How the directions get their settings."""
    calls: int
    """How many calls of a run there are, all at the same latent and sigma, so that they agree."""
    handle: str
    """Whether the wrapper is called itself, or a `run()` of it, or one beside another."""
    mode: str
    """The gradient mode."""

    @property
    def scene(self) -> Scene:
        return scene(self.seed, self.number // PER_SCENE)

    def __str__(self) -> str:
        s = self.scene
        settings = {**self.settings, "cfg_rule": cfg.shown(self.settings["cfg_rule"])}
        parts = {
            "model": s.name,
            "dtype": s.dtype,
            "x": tuple(s.x.shape),
            "sigma": s.sigma.tolist(),
            "uncond": s.uncond if s.uncond is None else tuple(s.uncond.shape),
            "cond": s.cond if s.cond is None else tuple(s.cond.shape),
            "nesting": s.nesting,
            "keywords": list(s.keywords),
            "cond_scale": self.cond_scale,
            "mode": self.mode,
            "calls": f"{self.calls}, {self.handle}",
            "settings": settings,
            f"directions, given {self.given}": [tuple(drawn) for drawn in self.directions],
        }
        return "; ".join(f"{name}: {value}" for name, value in parts.items())


def case(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed} case {number}")
    s = scene(seed, number // PER_SCENE)
    rule, reference_rule = RULES[rng.choice(list(RULES))](rng, MODELS[s.name].is_flow)
    kinds = rng.choices(list(COMBINATIONS), list(COMBINATIONS.values()))[0]
    directions = tuple(drawn(kind, rng, s.name) for kind in rng.sample(kinds, len(kinds)))
    return Case(
        seed,
        number,
        directions=directions,
        settings={
            "cfg_rule": rule,
            "cond_key": rng.choice(("cond", "text", None)),
            "batch_cond": rng.random() < 0.7,
            "shared_kwargs": ("table",),
        },
        cond_scale=1.0 if s.uncond is None else rng.choice((7.5, 1.0, 0.0, -1.5, rng.uniform(-2, 15))),
        rule=reference_rule,
        given=rng.choices(("at construction", "later", "per call"), (1, 4, 4))[0],
        calls=max(rng.choice((1, 1, 1, 2, 5)), *[1 + drawn.settings.get("one_pass", False) for drawn in directions], 1),
        handle=rng.choice(("direct", "direct", "run", "interleaved")),
        mode=rng.choice(list(MODES)),
    )


def drawn(kind: str, rng: random.Random, name: str) -> Drawn:
    level, paths = rng.choice(SIGMAS), layers(name)
    settings = {
        "scale": rng.choice((0.5, 0.5, 1.0, -2.0, 5.0, *[rng.uniform(-3, 5)] * 4, 0.0)),
        "sigma_range": rng.choice(((0.0, math.inf),) * 4 + ((0.0, level), (level, math.inf), (level, level))),
        "every": rng.choice((1, 1, 1, 3)),
    }
    if kind == "SAG":
        settings |= {
            "blur_sigma": rng.choice((2.0, 1.0, 0.0, 1e-20, 1e-160, 30.0, rng.uniform(0.2, 4))),
            "blur_kernel_size": rng.choices((9, 3, 5, 7, 1, 15, 31), (6, 2, 2, 2, 1, 1, 1))[0],
            "mask_threshold": rng.choice((1.0, 1.0, 1.0, 0.0, -1.0, 3.0, rng.uniform(0.5, 1.5))),
            "one_pass": rng.random() < 0.25,
        }
        if MODELS[name].dims == 3:
            settings["blur_time"] = rng.random() < 0.5
    if kind == "SEG":
        settings |= {"blur_sigma": rng.choice((math.inf, math.inf, 1.0, 0.0, 1e-20, 20.0, rng.uniform(0.2, 4)))}
    several = 1 if kind == "SAG" else min(len(paths), rng.choice((1, 1, 2)))
    return Drawn(kind, tuple(rng.sample(paths, several)), settings)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients": contextlib.nullcontext,
}


# The rules for step 2, by their papers' formulas


def plain_rule(u: Tensor, g: Tensor, scale: float, x: Tensor, sigma: Tensor, calls: int) -> Tensor:
    return (1 - scale) * u + scale * g


def rescaled_rule(phi: float, flow: bool) -> Callable:
    def rule(u: Tensor, g: Tensor, scale: float, x: Tensor, sigma: Tensor, calls: int) -> Tensor:
        sigma = per_sample(sigma, x)
        c_skip, c_out = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1).sqrt()
        if flow:
            c_skip, c_out = 1 / (sigma + 1), -sigma / (sigma + 1)
        v_u, v_g = (u - x * c_skip) / c_out, (g - x * c_skip) / c_out
        v = v_u + scale * (v_g - v_u)
        rescaled = v * per_sample(v_g.flatten(1).std(1) / v.flatten(1).std(1), v)
        return (phi * rescaled + (1 - phi) * v) * c_out + x * c_skip

    return rule


def projected_rule(eta: float, limit: float | None, momentum: float) -> Callable:
    def rule(u: Tensor, g: Tensor, scale: float, x: Tensor, sigma: Tensor, calls: int) -> Tensor:
        results = []
        for one_u, one_g in zip(u, g, strict=True):
            difference = (one_g - one_u) * sum(momentum**i for i in range(calls))
            if limit is not None and difference.norm() > limit:
                difference = difference / difference.norm() * limit
            parallel = (difference * one_g).sum() / (one_g * one_g).sum() * one_g
            results.append(one_g + (scale - 1) * (difference - parallel + eta * parallel))
        return torch.stack(results)

    return rule


def rescale(rng: random.Random, flow: bool) -> tuple[cfg.Rule, Callable]:
    phi = rng.choice((0.7, 0.0, 1.0, rng.random()))
    return cfg.rescale(phi, flow=flow), rescaled_rule(phi, flow)


def project(rng: random.Random, flow: bool) -> tuple[cfg.Rule, Callable]:
    eta, limit, momentum = rng.choice((0.0, 1.0, rng.random())), rng.choice((None, 1.0, 15.0)), rng.choice((-0.5, 0.0, 0.5))
    return cfg.apg(eta, limit, momentum), projected_rule(eta, limit, momentum)


def own_rule(u: Tensor, g: Tensor, scale: float, x: Tensor, sigma: Tensor) -> Tensor:
    """A user's: only where there is noise."""
    return torch.where(per_sample(sigma > 1, u), u + (g - u) * scale, g)


RULES: dict[str, Callable[[random.Random, bool], tuple[cfg.Rule, Callable]]] = {
    "plain": lambda rng, flow: (cfg.plain, plain_rule),
    "also plain": lambda rng, flow: (cfg.plain, plain_rule),
    "rescale": rescale,
    "apg": project,
    "own": lambda rng, flow: (own_rule, lambda *args: own_rule(*args[:-1])),
}


# ksag's image


@functools.lru_cache(maxsize=8)
def wrapper(name: str, dtype: torch.dtype, directions: tuple[tuple[str, tuple[str, ...]], ...]) -> ksag.GuidedDenoiser:
    model, _ = denoisers(name, dtype)
    return ksag.GuidedDenoiser(model, [KINDS[kind](attention=attention(kind, paths)) for kind, paths in directions])


def attention(kind: str, layers: Sequence[Any]) -> Any:
    return layers[0] if kind == "SAG" else layers


@contextlib.contextmanager
def wrapped(c: Case) -> Iterator[tuple[ksag.GuidedDenoiser, dict[str, Any]]]:
    """A wrapper, and what is left of the settings for the call."""
    s = c.scene
    if c.given == "at construction":
        model, _ = denoisers(s.name, s.dtype)
        directions = []
        for d in c.directions:
            layers = [model.get_submodule(path) for path in d.layers] if c.number % 2 else d.layers
            directions.append(KINDS[d.kind](**d.settings, attention=attention(d.kind, layers)))
        with ksag.GuidedDenoiser(model, directions, **c.settings) as guided:
            yield guided, {}
        return
    guided = wrapper(s.name, s.dtype, tuple((d.kind, d.layers) for d in c.directions))
    guided.reset()
    for name, value in c.settings.items():
        setattr(guided, name, value)
    per_call = {}
    for direction, d in zip(guided.directions, c.directions, strict=True):
        words = {name: word for word, name in direction.keywords.items()} if c.given == "per call" else {}
        for name, value in d.settings.items():
            setattr(direction, name, 9.75 if name in words else value)
        per_call |= {word: d.settings[name] for name, word in words.items()}
    yield guided, per_call


def image(c: Case) -> tuple[Tensor, ksag.Trace]:
    """The last call of the run, and the trace of all."""
    s = c.scene
    key = c.settings["cond_key"]

    def packed(cond: Tensor | None) -> Any:
        if cond is None:
            return None
        value = s.arguments(cond, s.dtype)["cond"]
        return value if key else {"text": value}

    with wrapped(c) as (guided, per_call), MODES[c.mode]():

        def call(denoiser: ksag.GuidedDenoiser, x: Tensor) -> Tensor:
            keywords = {**s.arguments(None, s.dtype), **({} if s.cond is None else {"nesting": s.nesting})}
            args = {"cond": packed(s.cond), "uncond": packed(s.uncond), "cond_scale": c.cond_scale, **per_call, **keywords}
            return denoiser(x, s.sigma, **args)

        denoiser = guided if c.handle == "direct" else guided.run()
        other = guided.run()
        traced = ksag.Trace()
        for _ in range(c.calls):
            if c.handle == "interleaved":
                call(other, s.x.flip(-1) * 2)
            with guided.trace() as steps:
                result = call(denoiser, s.x)
            traced += steps
        return result, traced


# The comparison


class Outcome(NamedTuple):
    kind: str
    error: float = 0.0
    """Relative to the sizes of the terms that the result is the sum of."""
    message: str = ""


FAILED = "failed"


@torch.no_grad()
def run(seed: int, number: int) -> Outcome:
    """One case: what came out, and where it failed, how and how to see it again."""
    c = case(seed, number)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "blur_(sigma|kernel_size)=. blurs nothing")
            if too_small(c):
                return refused(c)
            outcome = compared(c, *image(c))
    except Exception as error:
        outcome = Outcome(FAILED, math.inf, f"{type(error).__name__}: {error}")
    again = f"{outcome.message}\n  {c}\n  again: python scripts/campaign.py --seed {seed} --case {number}"
    return outcome._replace(message=again if outcome.kind == FAILED else "")


def too_small(c: Case) -> bool:
    """Whether the latent is too small for the blur of SAG, where it acts."""
    return any(
        d.kind == "SAG"
        and min(c.scene.x.shape[3 if d.settings.get("blur_time") is False else 2 :]) <= d.settings["blur_kernel_size"] // 2
        and bool(d.acts(c.scene.sigma).any())
        for d in c.directions
    )


def refused(c: Case) -> Outcome:
    try:
        image(c)
    except ValueError as error:
        if "too small for blur_kernel_size" in str(error):
            return Outcome("refused, the latent being too small for the blur")
    raise AssertionError("the latent is too small for the blur, and no error says so")


def compared(c: Case, result: Tensor, steps: ksag.Trace) -> Outcome:
    s = c.scene
    u, g, _ = s.predictions
    guided = c.rule(u, g, c.cond_scale, s.x.double(), s.sigma.double(), c.calls)
    terms = norms(u) * (1 + abs(c.cond_scale)) + norms(g) * abs(c.cond_scale)
    kinds = set()
    for d in c.directions:
        acts, of_it = d.acts(s.sigma), [step for step in steps if step.name == d.kind]
        if not acts.any():
            if of_it:
                return Outcome(FAILED, math.inf, f"{d.kind} was computed, where it does not act")
            continue
        if d.kind == "SAG":
            found = blurred_and_reevaluated(c, d, of_it[-1])
            if isinstance(found, Outcome):
                return found
            better, worse, at_threshold = found
            kinds |= {"with a token at the threshold"} if at_threshold else set()
        else:
            better, worse = g, s.perturbed(d.layers, "identity" if d.kind == "PAG" else d.settings["blur_sigma"])
        scale = d.settings["scale"]
        terms = torch.where(acts, terms + (norms(better) + norms(worse)) * abs(scale), terms)
        guided = torch.where(per_sample(acts, guided), guided + (better - worse) * scale, guided)
        kinds |= {d.kind, *([] if acts.all() else ["in part, by sigma"])}
    kind = ", ".join(sorted(kinds)) or "plain"
    error = float((norms(result.double() - guided) / terms).nan_to_num(math.inf).max())
    exact = torch.float32 if MODELS[s.name].attends_in_float32 and s.dtype == torch.float64 else s.dtype
    if result.dtype != s.dtype:
        return Outcome(FAILED, math.inf, f"the result is {result.dtype}")
    if not error <= TOLERANCE[exact]:
        return Outcome(FAILED, error, f"{kind}: relative error {error:.1e}")
    return Outcome(kind, error)


def blurred_and_reevaluated(c: Case, d: Drawn, step: ksag.TraceStep) -> Outcome | tuple[Tensor, Tensor, bool]:
    """d and r of the paper, and whether a token is at the threshold; or what is wrong with the saliency and the mask."""
    s, threshold, [path] = c.scene, d.settings["mask_threshold"], d.layers
    u, saliency, margin = s.predictions[0], s.predictions[2][path], s.margin(path)
    difference = (step.saliency - saliency).abs()
    if step.saliency.shape != saliency.shape or bool((difference > margin).any()):
        worst = float((difference / margin).max())
        return Outcome(FAILED, math.inf, f"the saliency differs by {worst:.1f} times what rounding explains")
    size = s.x.shape[2:]
    mask = reference.upsampled((saliency > threshold).double(), size)
    at_threshold = (saliency - threshold).abs() <= margin
    if bool(((step.mask != mask) & ~reference.upsampled(at_threshold, size)).any()):
        return Outcome(FAILED, math.inf, "the mask differs, and not at a token near the threshold")
    sigma, kernel_size = d.settings["blur_sigma"], d.settings["blur_kernel_size"]
    sigma = sigma if sigma > 0.02 else 0
    if d.settings.get("blur_time") is False and sigma:
        sigma = (0, sigma, sigma)
    mask = step.mask.double()  # a token at the threshold is on the side where rounding put it
    degraded = mask * reference.blurred(u, sigma, kernel_size) + (1 - mask) * u
    return degraded, s.denoise(degraded + (s.x.double() - u), s.base), bool(at_threshold.any())


def report(cases: Iterable[tuple[Case, Outcome]]) -> str:
    """How many cases came to each outcome, and the largest relative error in each dtype."""
    kinds: Counter[str] = Counter()
    errors: dict[torch.dtype, float] = {}
    for c, outcome in cases:
        kinds[outcome.kind] += 1
        errors[c.scene.dtype] = max(outcome.error, errors.get(c.scene.dtype, 0.0))
    counts = "".join(f"{count:6} {kind}\n" for kind, count in kinds.most_common())
    return f"{counts}largest relative error: " + ", ".join(
        f"{errors[dtype]:.1e} in {dtype}" for dtype in TOLERANCE if dtype in errors
    )


def norms(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1)
