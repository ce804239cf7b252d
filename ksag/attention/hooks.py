"""Which submodules of a layer get a hook, what its arguments are, and the hooks that came along with a copy of a model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ksag.attention.families import Family
from ksag.attention.families.family import resolve


def described_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Which arguments a layer is given, and which options in a mapping among them."""
    given = (*enumerate(args), *sorted(kwargs.items()))
    return tuple((name, tuple(map(str, value)) if isinstance(value, Mapping) else "") for name, value in given if value is not None)


def sources(layer: nn.Module, family: Family | None) -> dict[str, nn.Module]:
    """The layer's submodules that get a hook, by name."""
    if family is None:
        return {}
    names = (*family.outputs, *family.inputs, *([family.projection] if family.projection else []))
    found = {name: resolve(layer, name) for name in names}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


class Copied:
    """The owner of the hooks on a copied model, until they are removed: whatever they ask of it is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any) -> None:
        return None


def copied() -> Copied:
    return Copied()


def remove_copied_hooks(root: nn.Module) -> None:
    """Removes the hooks that came with a copy of a model that had been tapped."""
    for module in root.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for i, hook in list(hooks.items()):
                method = getattr(hook, "func", hook)  # of a functools.partial
                if isinstance(getattr(method, "__self__", method), Copied):
                    del hooks[i]
                    flags.pop(i, None)
