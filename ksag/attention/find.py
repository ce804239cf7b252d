"""Where a UNet keeps its self-attention: every layer that ksag supports, and the one that `attention=` names."""

import difflib
import re
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ksag.attention import families, table
from ksag.attention.families import Family
from ksag.attention.families.family import Grid, Place
from ksag.attention.families.refused import refusal
from ksag.model.parameters import described

WATCHERS: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]]" = weakref.WeakKeyDictionary()
"""The open taps on each layer, for what they have seen of it."""


class AttentionLayer(NamedTuple):
    """A self-attention layer, or in a model where ksag knows none, a module that looks like one."""

    path: str
    """Where it is in `inner_model`; `SAGDenoiser(inner_model, attention=path)` looks at it."""
    family: str
    """The way of writing attention that it follows, or that ksag knows none."""
    heads: int | None
    """None where ksag does not know how the layer holds it."""
    grid: Grid | None
    """The sides of the grid of tokens, such as (h', w'), that an open wrapper last saw; None before."""
    checked: bool
    """Whether an open wrapper found that what it reads is what the layer applies."""


class AttentionLayers(list[AttentionLayer]):
    """A list of `AttentionLayer` that shows as a table.

    >>> AttentionLayers([AttentionLayer("mid_block.attn1", "diffusers Attention", 8, (8, 8), True)])
    path             family               heads  grid  checked
    mid_block.attn1  diffusers Attention  8      8×8   yes
    """

    def _cells(self) -> list[tuple[str, ...]]:
        rows = []
        for path, family, heads, grid, checked in self:
            rows.append((path, family, f"{heads or '?'}", "×".join(map(str, grid or "?")), "yes" if checked else "no"))
        return [AttentionLayer._fields, *rows]

    def __repr__(self) -> str:
        if not self:
            return "no attention found"
        return table.as_text(self._cells())

    def _repr_html_(self) -> str:
        return table.as_html(self._cells())


def list_attention(inner_model: nn.Module) -> AttentionLayers:
    """Every self-attention layer of `inner_model` that ksag supports, in the order of `inner_model.named_modules()`.

    Each `path` can be given to `SAGDenoiser(inner_model, attention=path)`. In a model of no family that ksag knows, it
    lists what looks like attention by the name of its class. Whether such a module is supported shows when it runs: ksag
    then looks for its call of `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        inner_model: a k-diffusion denoiser, or the UNet in it; nothing of it runs.

    Returns:
        A list of `AttentionLayer`, empty where nothing looks like attention. The grid (h', w'), in tokens, and whether the
            reading was checked, are what an open `SAGDenoiser` on this model saw.

    >>> import ksag.zoo
    >>> ksag.list_attention(ksag.zoo.load())  # doctest: +ELLIPSIS
    path                            family                       heads  grid  checked
    inner_model.u_net.d_blocks.2.2  k-diffusion SelfAttention2d  2      ?     no
    ...
    """
    layers = [
        AttentionLayer(path, family.name, getattr(layer, family.heads, getattr(layer, "num_heads", None)), *_seen(layer))
        for path, layer, family in supported_layers(inner_model)
    ]
    return AttentionLayers(layers or [_of_no_family(path, module) for path, module in named_like_attention(inner_model)])


def supported_layers(inner_model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    """The path, the module and the family of every layer that ksag supports."""
    for path, layer in inner_model.named_modules():
        if family := families.family_of(layer, path, _parent(inner_model, path)):
            yield path, layer, family


def named_like_attention(inner_model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The path and the module of everything whose class has attention in its name."""
    for path, module in inner_model.named_modules():
        if re.search("att", type(module).__name__, re.I):
            yield path, module


def _parent(inner_model: nn.Module, path: str) -> nn.Module:
    return inner_model.get_submodule(path.rpartition(".")[0])


def _of_no_family(path: str, module: nn.Module) -> AttentionLayer:
    reason = refusal(module, None)
    how = f"not supported: {reason}" if reason else "by path, if it calls scaled_dot_product_attention"
    heads = (getattr(module, name, None) for name in sorted({family.heads for family in families.FAMILIES}))
    known = next((n for n in heads if isinstance(n, int)), None)
    return AttentionLayer(path, f"unknown {type(module).__name__}: {how}", known, *_seen(module))


def _seen(layer: nn.Module) -> tuple[Grid | None, bool]:
    taps = WATCHERS.get(layer, ())
    return next((tap.grid for tap in taps if tap.grid), None), any(tap.checker.status == "checked" for tap in taps)


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
        ValueError: there is none, or it is no self-attention that ksag supports; the message lists what there is.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32, 32, 32, 32), norm_num_groups=8, layers_per_block=1)
    >>> path, layer, family = find_attention(unet, "middle")
    >>> path, family.name
    ('mid_block.attentions.0', 'diffusers Attention')
    """
    if isinstance(attention, nn.Module):
        path = next((path for path, module in inner_model.named_modules() if module is attention), None)
        if path is None:
            raise ValueError(
                f"attention= is a {type(attention).__name__}, and not part of inner_model. Give a module of the model "
                f"that is wrapped, or its path. {hint(inner_model)}"
            )
    elif not isinstance(attention, str):
        raise ValueError(f"attention= is 'middle', a path in inner_model, or a module of it, got {described(attention)}.")
    else:
        path = middle(inner_model) if attention == "middle" else _whole_path(inner_model, attention)
    layer = inner_model.get_submodule(path)
    family = families.family_of(layer, path, _parent(inner_model, path))
    if reason := refusal(layer, family):
        raise ValueError(f"attention={path!r} ({type(layer).__name__}) is refused: {reason}. {hint(inner_model, path)}")
    if family is None and any(inside.startswith(f"{path}." if path else "") for inside, *_ in supported_layers(inner_model)):
        raise ValueError(
            f"attention={path!r} ({type(layer).__name__}) is no self-attention layer that ksag supports. {hint(inner_model, path)}"
        )
    return path, layer, family


def middle(inner_model: nn.Module) -> str:
    """The path of the first self-attention in the middle of a UNet, or else of its deepest level; of a stack's middle block.

    Raises:
        ValueError: there is none, or more than one UNet.
    """
    paths: dict[Any, list[str]] = {}
    for path, _, family in supported_layers(inner_model):
        paths.setdefault(family.middle, []).append(path)
    places: list[Place] = [place for find, found in paths.items() for place in find(inner_model, found)]
    # A ControlNet only goes down, and half a VAE only down or only up
    candidates = [place.path for place in places if place.whole] or [place.path for place in places]
    if not candidates:
        raise ValueError(f"No self-attention found in the middle of {type(inner_model).__name__}. {hint(inner_model)}")
    if len(candidates) > 1:
        names = ", ".join(map(repr, candidates))
        raise ValueError(f"{type(inner_model).__name__} holds more than one UNet: give attention= one of {names}.")
    return candidates[0]


def _whole_path(inner_model: nn.Module, path: str) -> str:
    known = [name for name, _ in inner_model.named_modules()]
    matches = [path] if path in known else [name for name in known if name.endswith(f".{path}")]
    if not matches:
        raise ValueError(f"attention={path!r} does not exist in {type(inner_model).__name__}. {hint(inner_model, path)}")
    if len(matches) > 1:
        raise ValueError(f"attention={path!r} could be any of {', '.join(matches)}. Give one of these.")
    return matches[0]


def hint(inner_model: nn.Module, path: str = "") -> str:
    """What to give as attention=: the layers nearest to `path` that are supported, or the modules that look like attention.

    >>> from diffusers import UNet2DModel
    >>> unet = UNet2DModel(block_out_channels=(32, 32, 32, 32), norm_num_groups=8, layers_per_block=1)
    >>> hint(unet, "mid_block")
    "Name one of its 10 self-attention layers as attention=, for example 'mid_block.attentions.0'."
    """
    if supported := [path for path, *_ in supported_layers(inner_model)]:
        inside = [p for p in supported if path and p.startswith(f"{path}.")]
        nearest = inside or difflib.get_close_matches(path, supported, n=5, cutoff=0.0)
        examples = ", ".join(map(repr, nearest[:5]))
        return f"Name one of its {len(supported)} self-attention layers as attention=, for example {examples}."
    similar = [f"{layer.path!r} ({layer.family})" for layer in list_attention(inner_model)]
    candidates = f"These look like attention: {', '.join(similar[:5])}. " if similar else ""
    return (
        f"It has no layer of a family that ksag knows. {candidates}"
        f"A module that calls torch.nn.functional.scaled_dot_product_attention once can be named with attention='dotted.path'."
    )
