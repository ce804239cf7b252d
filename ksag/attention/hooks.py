"""Which submodules of a layer get a hook, and what its arguments are."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ksag.attention.families import Family
from ksag.attention.families.family import resolve


def described_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Which arguments a layer is given, and which options in a mapping among them."""
    given = (*enumerate(args), *((name, kwargs[name]) for name in sorted(kwargs)))
    return tuple((name, tuple(map(str, value)) if isinstance(value, Mapping) else "") for name, value in given if value is not None)


def sources(layer: nn.Module, family: Family | None) -> dict[str, nn.Module]:
    """The layer's submodules that get a hook, by name."""
    if family is None:
        return {}
    names = (*family.outputs, *family.inputs, *([family.projection] if family.projection else []))
    found = {name: resolve(layer, name) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}
