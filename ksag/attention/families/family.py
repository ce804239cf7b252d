"""What ksag has to know of a way of writing self-attention."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

Seen: TypeAlias = dict[str, list[Any]]
"""By the submodule's name, what it returned (a tensor), or was given (a list of tensors), at each of its calls while the layer ran
once. A submodule that did not run is missing.
"""


Grid: TypeAlias = tuple[int, ...]
"""The sides of a grid of tokens or of a latent: one to three of them."""

Tokens: TypeAlias = Literal["all", "first", "last"]
"""Which of the tokens belong to the image; the others are text, or learned keys."""


@dataclass(frozen=True)
class Attention:
    """What a layer attended with: its output is softmax(q kᵀ · scale + mask) v."""

    q: Tensor
    """(b, heads, queries, dim)"""
    k: Tensor
    """(b, heads, keys, dim)"""
    v: Tensor | None
    """(b, heads, keys, dim of the values); None if it was not seen, so that the output cannot be computed."""
    scale: float
    """The factor of q kᵀ, usually dim ** -0.5."""
    grid: Grid | None = None
    """(h', w') of the image's tokens; None if the layer sees a sequence, whose grid only the modules around it know."""
    tokens: Tokens = "all"
    """Which of the queries and keys are the image's."""
    mask: Tensor | None = None
    """As `F.scaled_dot_product_attention` takes it, of shape (b, heads, queries, keys)."""
    places: Tensor | None = None
    """(b, queries): where each query is in the layer's own sequence, if that has another order."""

    def rows(self, part: slice) -> "Attention":
        """The same for some samples of the batch."""
        q, k, v, mask, places = (x if x is None else x[part] for x in (self.q, self.k, self.v, self.mask, self.places))
        assert q is not None and k is not None
        return replace(self, q=q, k=k, v=v, mask=mask, places=places)

    def queries(self, part: slice) -> "Attention":
        """The same for some queries."""
        mask = self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, part]
        return replace(self, q=self.q[:, :, part], mask=mask, places=None if self.places is None else self.places[:, part])

    def of_image(self, length: int) -> slice:
        """Which of `length` queries or keys belong to the image; `grid` must be known."""
        assert self.grid is not None
        n = math.prod(self.grid)
        return slice(length - n, length) if self.tokens == "last" else slice(0, n)

    @property
    def image_queries(self) -> "Attention":
        """The same for the image's queries alone, which still attend to every key."""
        return self.queries(self.of_image(self.q.shape[2]))

    @property
    def image_values(self) -> Tensor:
        """(b, heads, tokens, dim): the values of the image's own tokens."""
        assert self.v is not None
        return self.v[:, :, self.of_image(self.v.shape[2])]

    def detach(self) -> "Attention":
        """The same without gradients."""
        q, k, v, mask = (x if x is None else x.detach() for x in (self.q, self.k, self.v, self.mask))
        assert q is not None and k is not None
        return replace(self, q=q, k=k, v=v, mask=mask)


Middle: TypeAlias = Callable[[nn.Module, Sequence[str]], "list[Place]"]
"""The model, and the paths of a family's layers in it → the layer in the middle of each UNet or stack of blocks that holds some."""


class Place(NamedTuple):
    """A layer in the middle of a UNet or of a stack of blocks."""

    path: str
    whole: bool
    """Whether what holds it goes down and up again, as a UNet does, and a ControlNet or half a VAE does not."""


@dataclass(frozen=True)
class Family:
    """How to know a self-attention layer, where its models have their middle, what to hook, and how to read q, k and v.

    The hooks see the outputs of `outputs` and the arguments of `inputs`, and `read` is asked as the layer calls its `projection`.
    """

    name: str
    """What `ksag.list_attention` shows."""
    matches: Callable[[Any, str, nn.Module], bool]
    """Whether the module at a path, in its parent, is such a layer."""
    middle: Middle
    """Where its models have their middle; `unet` and `stack` make such a function."""
    read: Callable[[Any, Seen], Attention | None] | None = None
    """The layer, and what the hooks saw → what it attended with; None if the submodules that it needs did not run. A family without
    this function is read through its layer's call of `F.scaled_dot_product_attention`."""
    tokens: Tokens = "all"
    """Then: which of that call's tokens are the image's."""
    ragged: bool = False
    """Then: whether the image's tokens begin where each sample's text ends, and a mask leaves out what follows them."""
    projection: str = ""
    """The submodule that is given the attention's output, (b, heads, image tokens, dim), rearranged as `merged` says."""
    merged: str = "b heads tokens d -> b tokens (heads d)"
    """An einops pattern, for which h and w are known."""
    outputs: tuple[str, ...] = ()
    """Submodules whose outputs hold queries, keys or values. A layer need not have, nor run, all of them."""
    inputs: tuple[str, ...] = ()
    """Submodules whose arguments hold them, likewise."""
    heads: str = "heads"
    """The layer's attribute that holds its number of heads."""
    dropout: str = ""
    """The submodule that says how much of the attention, or of its output, is dropped at random, if there is one."""
    drops_in_eval: bool = False
    """Whether it does so in evaluation mode too."""
    patch: tuple[str, ...] = ()
    """The attribute of a module around that holds the size of the patches of its input which are the tokens, if it has such: the
    first of these that is there."""
    packed: tuple[str, ...] = ()
    """The arguments of that module that may hold the image's tokens, (b, tokens, channels), instead of the latent."""
    computes_in: torch.dtype | None = None
    """The dtype in which the layer attends whatever the model's is, if there is one."""


def resolve(module: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def ran(seen: Seen, *names: str) -> bool:
    """Whether all of these submodules ran. (Dynamo does not know sets well enough for `<=`.)"""
    return all(name in seen for name in names)


def has_modules(layer: nn.Module, *names: str) -> bool:
    """Whether all of these are submodules of the layer."""
    return all(isinstance(getattr(layer, name, None), nn.Module) for name in names)


def from_image(qkv: Tensor, heads: int, order: str) -> Attention:
    """q, k, v in the channels of an image, (b, three heads d, h, w), in the given order; at the usual scale."""
    q, k, v = rearrange(qkv, f"b ({order}) h w -> three b heads (h w) d", three=3, heads=heads)
    return Attention(q, k, v, q.shape[-1] ** -0.5, grid=tuple(qkv.shape[2:]))


def reads_image(source: str, heads: str, order: str) -> Callable[[Any, Seen], Attention | None]:
    """The `read` of a family whose q, k and v are the channels of what the submodule `source` returned."""
    return lambda layer, seen: from_image(seen[source][0], getattr(layer, heads), order) if source in seen else None


def from_tokens(q: Tensor, k: Tensor, v: Tensor | None, heads: int, scale: float | None = None) -> Attention:
    """q, k, v as sequences, (b, tokens, heads d), or with the heads split off already, (b, heads, tokens, d).

    Keys and values may have fewer heads than the queries: each is then for several heads in a row (grouped-query attention).
    """
    d = q.shape[-1] if q.ndim == 4 else q.shape[-1] // heads

    def split(x: Tensor) -> Tensor:
        x = x if x.ndim == 4 else rearrange(x, "b tokens (heads d) -> b heads tokens d", d=d)
        return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)

    return Attention(split(q), split(k), None if v is None else split(v), d**-0.5 if scale is None else scale)


Level: TypeAlias = Callable[[nn.Module, str], int]
"""The way down, and the path of a layer in it → how deep the layer is."""


def numbered(down: nn.Module, path: str) -> int:
    """The path begins with the level's number."""
    return int(path.partition(".")[0])


def unet(*, down: str, up: str, middle: str = "(?!)", level: Level = numbered) -> Middle:
    """The first self-attention of the middle, or else of the deepest level on the way down that has one.

    Args:
        down, up: the names of the submodules that are the way down and the way up.
        middle: a regular expression for the path of the middle; the default matches none.
        level: how deep a layer on the way down is.

    >>> find = unet(down="downs", middle="mid", up="ups")
    >>> unet_without_middle = nn.ModuleDict({"downs": nn.Identity(), "ups": nn.Identity()})
    >>> find(unet_without_middle, ["downs.0.attn", "downs.1.attn", "ups.0.attn"])
    [Place(path='downs.1.attn', whole=True)]
    """

    def find(model: nn.Module, paths: Sequence[str]) -> list[Place]:
        in_middle, on_the_way_down = _by_owner(paths, middle), _by_owner(paths, down)
        places = []
        for owner in dict.fromkeys([*in_middle, *on_the_way_down]):
            module = model.get_submodule(owner)
            if owner in in_middle:
                path, _ = in_middle[owner][0]
            else:
                way_down = module.get_submodule(down)
                path, _ = max(on_the_way_down[owner], key=lambda layer: level(way_down, layer[1]))  # the first of the deepest
            places.append(Place(path, whole=has_modules(module, down, up)))
        return places

    return find


def _by_owner(paths: Sequence[str], part: str) -> dict[str, list[tuple[str, str]]]:
    """Paths that lead through a part, by the path of the module that has the part: each whole, and what is behind the part."""
    owners: dict[str, list[tuple[str, str]]] = {}
    for path in paths:
        if match := re.search(rf"(?:^|\.){part}(?:\.|$)", path):
            owners.setdefault(path[: match.start()], []).append((path, path[match.end() :]))
    return owners


def stack(blocks: str, inside: Callable[[nn.Module], bool] = lambda module: True) -> Middle:
    """The first self-attention of the middle one of a plain stack of blocks.

    Args:
        blocks: a regular expression for the names of the submodules that hold them, in their order.
        inside: whether a module that has such submodules counts.

    >>> stack("blocks")(nn.Module(), ["blocks.0.attn", "blocks.1.attn", "blocks.1.attn2", "blocks.2.attn"])
    [Place(path='blocks.1.attn', whole=True)]
    """

    def find(model: nn.Module, paths: Sequence[str]) -> list[Place]:
        places = []
        for owner, layers in _by_owner(paths, rf"(?:{blocks})\.\d+").items():
            first = {path.removesuffix(rest): path for path, rest in reversed(layers)}  # by the block
            if inside(model.get_submodule(owner)):
                places.append(Place([*reversed(first.values())][len(first) // 2], whole=True))
        return places

    return find
