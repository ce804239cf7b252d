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


def refuse(modules: Iterable[nn.Module], path: str) -> None:
    """Raises a RuntimeError if one of them is compiled: hooks that are set on it, or inside it, from now on may never run."""
    for module in modules:
        if is_compiled(module):
            raise RuntimeError(
                f"The {type(module._modules.get('_orig_mod', module)).__name__} that holds {path!r} was compiled before it was "
                f"wrapped, and a compiled model does not run hooks that are set later. Wrap first, compile afterwards: "
                f"guided = ksag.SAGDenoiser(denoiser); denoiser.inner_model = torch.compile(unet). "
                f"(The model as it was is torch.compile's result's ._orig_mod.)"
            )


def one_at_a_time(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Has threads take turns with compiled models: hooks in them cannot tell threads apart, and Dynamo does not support several."""
    return _turns if wanted and not torch.compiler.is_dynamo_compiling() else contextlib.nullcontext()


def eagerly(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Runs compiled code as the Python it was compiled from: for the whole process, so use it inside `one_at_a_time`."""
    wanted = wanted and not torch.compiler.is_dynamo_compiling()
    return torch.compiler.set_stance("force_eager") if wanted else contextlib.nullcontext()
