"""Conditionings, any nesting of mappings, lists and tuples of tensors ↔ one batch."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ksag.model.parameters import described

Conditioning: TypeAlias = Any
"""A tensor, batch first, or any nesting of mappings, lists, tuples and named tuples of such tensors."""


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf (anything but a mapping, list or tuple) after its place.

    >>> list(leaves({"c_crossattn": [1.0], "scale": 2.0}))
    [("['c_crossattn'][0]", 1.0), ("['scale']", 2.0)]
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{place}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{place}[{i}]")
    else:
        yield place, tree


def transform(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`tree` with every leaf replaced by `fn(leaf, *others)`: `others` are the leaves at its place in trees of the same
    nesting; leaf by leaf in the order of `leaves`.

    >>> transform(lambda *leaves: sum(leaves), {"c_crossattn": [1.0], "scale": 2.0}, {"c_crossattn": [0.5], "scale": 1.0})
    {'c_crossattn': [1.5], 'scale': 3.0}
    """
    if isinstance(tree, Mapping):
        return _mapping(tree, {key: transform(fn, tree[key], *(other[key] for other in others)) for key in tree})
    if isinstance(tree, (list, tuple)):
        return _sequence(tree, [transform(fn, *values) for values in zip(tree, *others, strict=True)])
    return fn(tree, *others)


def _mapping(like: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(like) is dict:
        return values
    if not isinstance(like, MutableMapping):
        return type(like)(values)  # type: ignore[call-arg]
    new = copy.copy(like)  # a defaultdict or diffusers' ModelOutput keeps what else it is
    for key, value in values.items():
        new[key] = value
    return new


def _sequence(like: Sequence[Any], values: list[Any]) -> Sequence[Any]:
    if type(like) is list:
        return values
    return like._make(values) if hasattr(like, "_make") else type(like)(values)  # type: ignore[call-arg]


def unshared(tree: Any) -> Any:
    """A copy of `tree` with new containers and the same leaves, which a model may change."""
    return transform(lambda leaf: leaf, tree)


def join(*parts: Conditioning) -> Conditioning:
    """Conditionings of one nesting as one batch, in their order: n of (b, ...) → (n b, ...).

    >>> both = join({"c_crossattn": [torch.zeros(2, 77, 768)]}, {"c_crossattn": [torch.ones(2, 77, 768)]})
    >>> both["c_crossattn"][0].shape
    torch.Size([4, 77, 768])
    """
    return transform(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *parts)


def joinable(*parts: Conditioning) -> bool:
    """Whether the tensors at each place agree in all but the batch, so that `join` can take them.

    >>> joinable(torch.zeros(1, 77, 768), torch.zeros(1, 154, 768))
    False
    """
    shapes = [{place: leaf.shape[1:] for place, leaf in leaves(part) if isinstance(leaf, Tensor)} for part in parts]
    return all(shape == shapes[0] for shape in shapes)


def repeat(kwargs: dict[str, Any], batch: int, times: int, shared: Sequence[str] = ()) -> dict[str, Any]:
    """`kwargs` for a batch of several parts: a tensor of `batch` rows is repeated, all else is left as it is.

    Args:
        kwargs: tensors, or any nesting of them.
        batch: b, how many samples a part holds.
        times: how many parts there are.
        shared: names of `kwargs` that all samples share, and which are left unchanged for any shape.

    >>> kwargs = repeat({"mask": torch.zeros(2, 1, 8, 8), "table": torch.zeros(2, 9), "strength": 0.5}, 2, 3, shared=["table"])
    >>> kwargs["mask"].shape, kwargs["table"].shape, kwargs["strength"]
    (torch.Size([6, 1, 8, 8]), torch.Size([2, 9]), 0.5)
    """

    def repeated(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return torch.cat([leaf] * times) if has_rows else leaf

    return {name: value if name in shared else transform(repeated, value) for name, value in kwargs.items()}


def check(uncond: Conditioning, cond: Conditioning, batch: int) -> None:
    """Refuses conditionings that do not fit each other, or the latent's batch.

    Args:
        uncond: tensors (b, ...), in any nesting.
        cond: the same nesting.
        batch: b, how many samples the latent holds.

    Raises:
        ValueError: where they do not match; the message names the place.

    >>> check({"text": torch.zeros(2, 7)}, {"text": torch.zeros(1, 7)}, batch=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: cond['text'] has shape (1, 7), but the latent is a batch of 2: ...
    """
    sides = {"uncond": dict(leaves(uncond)), "cond": dict(leaves(cond))}
    for name, other in ("uncond", "cond"), ("cond", "uncond"):
        for place, leaf in sides[other].items():
            if place not in sides[name]:
                raise ValueError(
                    f"{other}{place} is {described(leaf)}, and {name} has nothing there: both must have the same nesting, with the "
                    f"same keys and lengths."
                )
    for place, u in sides["uncond"].items():
        c = sides["cond"][place]
        if isinstance(u, Tensor) != isinstance(c, Tensor) or not (isinstance(u, Tensor) or _same(u, c)):
            raise ValueError(
                f"uncond{place} is {described(u)}, cond{place} is {described(c)}: tensors pair with tensors, and anything else "
                f"must be the same on both sides."
            )
    for name, side in sides.items():
        for place, leaf in side.items():
            if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != batch):
                raise ValueError(
                    f"{name}{place} has shape {tuple(leaf.shape)}, but the latent is a batch of {batch}: a conditioning "
                    f"has one row for each sample. One prompt for all of them is tensor.expand({batch}, ...)."
                )


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except (ValueError, TypeError, RuntimeError):  # as NumPy has it for two arrays
        return False
