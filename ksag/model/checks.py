"""Bad input → an error that says what came, what was expected and what to do."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ksag.model import conditioning
from ksag.model.parameters import described, finite


def inner_model(value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"inner_model must be an nn.Module that maps (x, sigma) to the denoised latent, such as K.external.CompVisDenoiser "
            f"or K.layers.Denoiser, got {type(value).__name__}: a plain function has no layers to hook."
        )
    for module in value.modules():
        if {"uncond", "cond_scale"} <= set(_arguments(module.forward)):
            raise TypeError(
                f"inner_model holds a {type(module).__name__}, which does classifier-free guidance. ksag does that too, so the "
                f"samples would be guided twice. Wrap the model inside it, usually its .inner_model. (A notebook cell run twice?)"
            )
    return value


def _arguments(function: Any) -> tuple[str, ...]:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def call(x: Any, sigma: Any, cond: Any, uncond: Any, cond_scale: Any, cond_key: str | None, kwargs: dict[str, Any]) -> None:
    """Checks what a sampler passes to `SAGDenoiser.forward`; reads shapes only, never a tensor's values."""
    if not isinstance(x, Tensor) or x.ndim not in (3, 4, 5) or x.shape[0] == 0:
        raise ValueError(
            f"x must be a latent, a tensor of shape (b, c, n), (b, c, h, w) or (b, c, t, h, w) with b at least 1, "
            f"got {described(x)}."
        )
    batch = x.shape[0]
    if not isinstance(sigma, Tensor) or sigma.shape != (batch,):
        raise ValueError(
            f"sigma must be a tensor with one noise level for each of the {batch} samples, shape ({batch},), got "
            f"{described(sigma)}: pass sigma * x.new_ones([x.shape[0]])."
        )
    if cond is None and uncond is not None:
        raise ValueError("uncond came without cond. For an unconditional model give neither; else give both, or cond alone.")
    if uncond is None and finite("cond_scale", cond_scale) != 1:
        raise ValueError(
            f"cond_scale={cond_scale} guides cond away from uncond, and uncond is missing: pass uncond=..., or cond_scale=1."
        )
    if cond_key is None and cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"With cond_key=None, cond must be a dict of inner_model's keywords, got {described(cond)}.")
    if cond is not None:
        conditioning.check(cond if uncond is None else uncond, cond, batch)
        keywords = cond.keys() if cond_key is None else [cond_key]
        if odd := [name for name in keywords if not isinstance(name, str)]:
            raise TypeError(f"With cond_key=None, the keys of cond are inner_model's keywords, strings, got {described(odd[0])}.")
        if twice := [name for name in keywords if name in kwargs]:
            raise TypeError(f"{', '.join(twice)} came twice: in cond, and as a keyword of its own. Give it once.")


def for_each_sample(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one for each sample, (b, 1, ...)."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != x.shape[:1] or value.device != x.device:
        raise ValueError(
            f"{name} must be a number, or a tensor with one for each of the {x.shape[0]} samples, shape ({x.shape[0]},) on "
            f"{x.device}, got {described(value)} on {value.device}."
        )
    return value.reshape(-1, *[1] * (x.ndim - 1))


def rule(cfg_rule: Any, inner_model: nn.Module) -> None:
    """Asks a rule that depends on the kind of model whether it fits."""
    if (check := getattr(cfg_rule, "check_model", None)) is not None:
        check(inner_model)


def guided(value: Any, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != x.shape:
        raise TypeError(
            f"cfg_rule must return the guided prediction, shape {tuple(x.shape)}, got {described(value)}. It is a function of "
            f"(u, g, cond_scale, x, sigma), such as ksag.cfg.plain, ksag.cfg.rescale() or ksag.cfg.apg()."
        )
    return value


def denoised(value: Any, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"inner_model must return the denoised latent, shape {tuple(x.shape)}, got {got}. A UNet that predicts noise or v "
            f"needs a k-diffusion wrapper (K.external) around it first."
        )
    return value


def direction(value: Any, u: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != u.shape:
        raise TypeError(f"{name}.direction must return a tensor of shape {tuple(u.shape)}, as u has, got {described(value)}.")
    return value


def directions(value: Any, base: type) -> tuple[Any, ...]:
    listed = (value,) if isinstance(value, base) else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if wrong := [one for one in listed if not isinstance(one, base)]:
        hint = f": call it, {wrong[0].__name__}()" if isinstance(wrong[0], type) else ""
        raise TypeError(f"directions are objects such as ksag.SAG(0.5) or ksag.PAG(), in a list, got {described(wrong[0])}{hint}.")
    return listed
