"""Where a UNet keeps its self-attention: every layer that ksag can read, and the one that `attention=` names."""

import difflib
import re
from typing import NamedTuple

from torch import nn

from ksag import table
from ksag.families import FAMILIES, Family, family_of, is_cross_attention


class AttentionLayer(NamedTuple):
    """A self-attention layer, or in a model where ksag knows none, a module that looks like one."""

    path: str
    """Where it is in `inner_model`; `SAGDenoiser(inner_model, attention=path)` looks at it."""
    family: str
    """The way of writing attention that it follows, or that ksag knows none."""
    heads: int | None
    """None where ksag does not know how the layer holds it."""
    grid: tuple[int, int] | None
    """(h', w') that an open wrapper saw when it last looked at the layer; None before."""


class AttentionLayers(list[AttentionLayer]):
    """A list of `AttentionLayer` that shows as a table.

    >>> AttentionLayers([AttentionLayer("mid_block.attn1", "CompVis / SGM / diffusers", 8, (8, 8))])
    path             family                     heads  grid
    mid_block.attn1  CompVis / SGM / diffusers  8      8×8
    """

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(path, family, f"{heads or '?'}", "×".join(map(str, grid or "?"))) for path, family, heads, grid in self]
        return [AttentionLayer._fields, *rows]

    def __repr__(self) -> str:
        if not self:
            return "no attention found"
        return table.as_text(self._cells())

    def _repr_html_(self) -> str:
        return table.as_html(self._cells())


def list_attention(inner_model: nn.Module) -> AttentionLayers:
    """Every self-attention layer of `inner_model` that ksag can read, in the order of `inner_model.named_modules()`.

    Each `path` can be given to `SAGDenoiser(inner_model, attention=path)`. In a model of no family that ksag knows, it
    lists what looks like attention by the name of its class. Whether such a module can be read shows when it runs: ksag
    then looks for its call of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        inner_model: a k-diffusion denoiser, or the UNet in it; nothing of it runs.

    Returns:
        A list of `AttentionLayer`, empty where nothing looks like attention. The grid (h', w'), in tokens, is what a
            `SAGDenoiser` on this model last saw, None before.

    >>> import ksag.zoo
    >>> ksag.list_attention(ksag.zoo.load())  # doctest: +ELLIPSIS
    path                            family                       heads  grid
    inner_model.u_net.d_blocks.1.2  k-diffusion SelfAttention2d  2      ?
    ...
    """
    modules = list(inner_model.named_modules())
    readable = [
        AttentionLayer(path, family.name, getattr(layer, family.heads), _grid_seen(layer))
        for path, layer in modules
        if (family := family_of(layer, path))
    ]
    return AttentionLayers(readable or [_unknown(path, module) for path, module in modules if _looks_like_attention(module)])


def _looks_like_attention(module: nn.Module) -> bool:
    return re.search("att", type(module).__name__, re.I) is not None


def _unknown(path: str, module: nn.Module) -> AttentionLayer:
    how = "cannot be read" if _is_unreadable(module, path) else "by path, if it calls scaled_dot_product_attention"
    heads = (getattr(module, name, None) for name in sorted({family.heads for family in FAMILIES}))
    known = next((n for n in heads if isinstance(n, int)), None)
    return AttentionLayer(path, f"unknown {type(module).__name__}: {how}", known, _grid_seen(module))


def _is_unreadable(module: nn.Module, path: str) -> bool:
    """Whether no call of scaled_dot_product_attention in there could be seen, or be the image's own attention."""
    return type(module).__module__.startswith("torch.nn.") or is_cross_attention(module, path)


def _grid_seen(layer: nn.Module) -> tuple[int, int] | None:
    grids = (getattr(getattr(hook, "__self__", None), "grid", None) for hook in layer._forward_hooks.values())
    return next((grid for grid in grids if grid), None)


def find_attention(inner_model: nn.Module, attention: str | nn.Module) -> tuple[str, nn.Module, Family | None]:
    """The layer that `attention` names.

    Args:
        inner_model: the model to look in.
        attention: "middle" (the first self-attention of the middle block, or else of the deepest level), a dotted path in
            `inner_model` or in a UNet it holds, or the module itself.

    Returns:
        Its path in `inner_model`, the module, and its family: None if ksag knows none that fits, so that only the layer's
            call of scaled_dot_product_attention can tell.

    Raises:
        ValueError: there is none, or it is no self-attention that ksag can read; the message lists what there is.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32, 32, 32, 32), norm_num_groups=8, layers_per_block=1)
    >>> path, layer, family = find_attention(unet, "middle")
    >>> path, family.name
    ('mid_block.attentions.0', 'CompVis / SGM / diffusers')
    """
    if isinstance(attention, nn.Module):
        path = next((path for path, module in inner_model.named_modules() if module is attention), None)
        if path is None:
            raise ValueError(
                f"attention= is a {type(attention).__name__} that is not part of inner_model. Give a module of the model "
                f"that is wrapped, or its path. {hint(inner_model)}"
            )
    elif attention == "middle":
        path = _middle(inner_model)
    else:
        path = _resolve(inner_model, attention)
    layer = inner_model.get_submodule(path)
    family = family_of(layer, path)
    holds_readable = any(inside.startswith(f"{path}." if path else "") for inside in _readable(inner_model))
    if family is None and (holds_readable or _is_unreadable(layer, path)):
        raise ValueError(
            f"attention={path!r} is a {type(layer).__name__}, not a self-attention layer that ksag can read. "
            f"{hint(inner_model, path)}"
        )
    return path, layer, family


def _readable(inner_model: nn.Module) -> list[str]:
    return [path for path, layer in inner_model.named_modules() if family_of(layer, path)]


def _middle(inner_model: nn.Module) -> str:
    """The first self-attention of the UNet's middle, or else of its deepest level; a plain stack of blocks has its middle one."""
    paths = _readable(inner_model)
    for path in paths:
        if re.search(r"(^|\.)(middle_block|mid_block|mid_attn|mid_level|mids)(\.|$)", path):
            return path
    for level, deepest in (r"(?:d_blocks|downs)\.(\d+)", max), (r"(?:enc|dec)\.(\d+)x\d+_\w+", min):
        levels = [(int(match[1]), path) for path in paths if (match := re.search(rf"(?:^|\.){level}(?:\.|$)", path))]
        if levels:
            target = deepest(levels)[0]
            return next(path for number, path in levels if number == target)
    stack = [path for path in paths if re.search(r"(^|\.)blocks\.\d+\.", path)]
    if stack:
        return stack[len(stack) // 2]
    raise ValueError(f"No self-attention found in the middle of {type(inner_model).__name__}. {hint(inner_model)}")


def _resolve(inner_model: nn.Module, path: str) -> str:
    known = [name for name, _ in inner_model.named_modules()]
    matches = [path] if path in known else [name for name in known if name.endswith(f".{path}")]
    if not matches:
        raise ValueError(f"attention={path!r} does not exist in {type(inner_model).__name__}. {hint(inner_model, path)}")
    if len(matches) > 1:
        raise ValueError(f"attention={path!r} could be any of {', '.join(matches)}. Give one of these.")
    return matches[0]


def hint(inner_model: nn.Module, path: str = "") -> str:
    """What to give as attention=: the layers nearest to `path` that can be read, or the modules that look like attention.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32, 32, 32, 32), norm_num_groups=8, layers_per_block=1)
    >>> hint(unet, "mid_block")
    "Name one of its 10 self-attention layers as attention=, for example 'mid_block.attentions.0'."
    """
    if readable := _readable(inner_model):
        inside = [p for p in readable if path and p.startswith(f"{path}.")]
        nearest = inside or difflib.get_close_matches(path, readable, n=5, cutoff=0.0)
        examples = ", ".join(map(repr, nearest[:5]))
        return f"Name one of its {len(readable)} self-attention layers as attention=, for example {examples}."
    similar = [f"{layer.path!r} ({layer.family})" for layer in list_attention(inner_model)]
    candidates = f"These look like attention: {', '.join(similar[:5])}. " if similar else ""
    known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    return (
        f"It has no layer of a family that ksag knows ({known}). {candidates}"
        f"A module that calls torch.nn.functional.scaled_dot_product_attention once can be named with attention='dotted.path'."
    )
