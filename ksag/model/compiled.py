"""Modules that torch.compile compiled, and threads that share them."""

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_turns = threading.RLock()


def is_compiled(module: nn.Module) -> bool:
    """
    >>> is_compiled(nn.Identity()), is_compiled(torch.compile(nn.Identity()))
    (False, True)
    """
    forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None or forward


class Around:
    """The modules from a model down to one of them that gets hooks, as they were when the hooks were set.

    Args:
        root: the model.
        path: the module's dotted path in it.
        inside: modules inside that one which get hooks too.

    Raises:
        RuntimeError: one of them is compiled already, so that hooks that are set from now on may never run.
    """

    def __init__(self, root: nn.Module, path: str, inside: Iterable[nn.Module] = ()):
        names = path.split(".") if path else []
        self.root, self.modules = root, [root.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
        self._all = [*self.modules, *inside]
        self._links = list(zip(self.modules[:-1], names, self.modules[1:], strict=True))
        for module in self._all:
            if is_compiled(module):
                raise RuntimeError(
                    f"The {type(module._modules.get('_orig_mod', module)).__name__} that holds {path!r} was compiled before it was "
                    f"wrapped, and a compiled model does not run hooks that are set later. Wrap first, compile afterwards: "
                    f"guided = ksag.SAGDenoiser(denoiser); denoiser.inner_model = torch.compile(unet). "
                    f"(The model as it was is torch.compile's result's ._orig_mod.)"
                )

    def is_compiled(self, inner_model: nn.Module) -> bool:
        """Whether `inner_model` now holds the module inside something that was compiled since."""
        replaced = any(parent._modules.get(name) is not child for parent, name, child in self._links)
        return replaced or inner_model is not self.root or any(map(is_compiled, self._all))


def one_at_a_time(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Has threads take turns with compiled models: hooks in them cannot tell threads apart, and Dynamo does not support several."""
    return _turns if wanted and not torch.compiler.is_dynamo_compiling() else contextlib.nullcontext()


def eagerly(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Runs compiled code as the Python it was compiled from: for the whole process, so use it inside `one_at_a_time`."""
    wanted = wanted and not torch.compiler.is_dynamo_compiling()
    return torch.compiler.set_stance("force_eager") if wanted else contextlib.nullcontext()
