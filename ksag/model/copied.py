"""The hooks that came along with a copy of a model, whose owner stayed behind."""

from typing import Any

from torch import nn


class Copied:
    """The owner of the hooks on a copied model, until they are removed: every method of it returns None."""

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
