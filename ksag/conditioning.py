"""cond and uncond, in any nesting of dicts, lists and tuples of tensors ↔ one batch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Conditioning: TypeAlias = Any
"""A tensor, batch first, or any nesting of dicts, lists and tuples of such tensors."""


def concatenate(uncond: Conditioning, cond: Conditioning) -> Conditioning:
    """[uncond, cond] as one batch, with the nesting of both: (b, ...) and (b, ...) → (2b, ...), uncond first.

    Raises:
        ValueError: the two differ in nesting, or in a leaf that is no tensor; the message names the place.

    >>> both = concatenate({"c_crossattn": [torch.zeros(2, 77, 768)]}, {"c_crossattn": [torch.ones(2, 77, 768)]})
    >>> both["c_crossattn"][0].shape
    torch.Size([4, 77, 768])
    """
    return _zip(lambda place, u, c: torch.cat([u, c]), "", uncond, cond)


def batchable(uncond: Conditioning, cond: Conditioning) -> bool:
    """Whether every pair of tensors agrees in all but the batch, so that `concatenate` can join them.

    Raises:
        ValueError: the two differ in nesting, or in a leaf that is no tensor.

    >>> batchable(torch.zeros(1, 77, 768), torch.zeros(1, 154, 768))
    False
    """
    shapes_agree = []
    _zip(lambda place, u, c: shapes_agree.append(u.shape[1:] == c.shape[1:]), "", uncond, cond)
    return all(shapes_agree)


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

    def check_batch(place: str, u: Tensor, c: Tensor) -> None:
        for name, tensor in ("cond", c), ("uncond", u):
            if tensor.ndim == 0 or tensor.shape[0] != batch:
                raise ValueError(
                    f"{name}{place} has shape {tuple(tensor.shape)}, but the latent is a batch of {batch}: a conditioning "
                    f"has one row for each sample. One prompt for all of them is tensor.expand({batch}, ...)."
                )

    _zip(check_batch, "", uncond, cond)


def repeat(kwargs: dict[str, Any], batch: int) -> dict[str, Any]:
    """`kwargs` for a batch of [uncond, cond]: what has one row for each sample is doubled, all else is left as it is.

    >>> kwargs = repeat({"mask": torch.zeros(2, 1, 8, 8), "strength": 0.5}, batch=2)
    >>> kwargs["mask"].shape, kwargs["strength"]
    (torch.Size([4, 1, 8, 8]), 0.5)
    """

    def double(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch else leaf

    return transform(double, kwargs)


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf, all that is neither dict, list nor tuple, and before it the place where it is.

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


def transform(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `fn(leaf)` in place of every leaf, in the order of `leaves`.

    >>> transform(lambda leaf: leaf * 2, {"c_crossattn": [1.0], "scale": 2.0})
    {'c_crossattn': [2.0], 'scale': 4.0}
    """
    if isinstance(tree, Mapping):
        return {key: transform(fn, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [transform(fn, value) for value in tree]
        return tuple(values) if isinstance(tree, tuple) else values
    return fn(tree)


def _zip(fn: Callable[[str, Tensor, Tensor], Any], place: str, u: Any, c: Any) -> Any:
    """`fn(place, u, c)` for each pair of tensors, in the nesting that both share."""
    if isinstance(u, Tensor) and isinstance(c, Tensor):
        return fn(place, u, c)
    if isinstance(u, Mapping) and isinstance(c, Mapping):
        if u.keys() != c.keys():
            raise ValueError(f"uncond{place} has the keys {sorted(u)}, cond{place} has {sorted(c)}: they must be the same.")
        return {key: _zip(fn, f"{place}[{key!r}]", u[key], c[key]) for key in u}
    if isinstance(u, (list, tuple)) and isinstance(c, (list, tuple)):
        if len(u) != len(c):
            raise ValueError(f"uncond{place} has {len(u)} entries, cond{place} has {len(c)}: they must be as many.")
        pairs = [_zip(fn, f"{place}[{i}]", u[i], c[i]) for i in range(len(u))]
        return tuple(pairs) if isinstance(u, tuple) else pairs
    if isinstance(u, Tensor) or isinstance(c, Tensor) or (u is not c and u != c):
        raise ValueError(
            f"uncond{place} is {_describe(u)}, cond{place} is {_describe(c)}: tensors pair with tensors, and anything else "
            f"must be the same on both sides."
        )
    return u


def _describe(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
