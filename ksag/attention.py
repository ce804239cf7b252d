"""Where a UNet keeps its self-attention, and forward hooks that catch one layer's queries and keys as it runs.

tap = AttentionTap(inner_model, "middle", reduce=saliency)
with tap.recording(rows=x.shape[0]) as seen:
    inner_model(x, sigma)
seen.map()                                                     # (b, h', w')
"""

import contextlib
import difflib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ksag.families import Family, family_of

Reduce: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""q and k (b, heads, tokens, dim) and the layer's scale → (b, tokens)."""


# Where a UNet keeps its layers


class AttentionLayer(NamedTuple):
    """A self-attention layer that ksag can read."""

    path: str
    family: str
    heads: int


def list_attention(inner_model: nn.Module) -> list[AttentionLayer]:
    """Every self-attention layer of `inner_model` that ksag can read, in the order of `inner_model.named_modules()`.

    Each `path` can be given to `SAGDenoiser(inner_model, attention=path)`.

    >>> import ksag.zoo
    >>> ksag.list_attention(ksag.zoo.load())[0]
    AttentionLayer(path='inner_model.u_net.d_blocks.1.2', family='k-diffusion SelfAttention2d', heads=2)
    """
    return [
        AttentionLayer(path, family.name, getattr(layer, family.heads))
        for path, layer in inner_model.named_modules()
        if (family := family_of(layer, path))
    ]


def find_attention(inner_model: nn.Module, attention: str | nn.Module) -> tuple[str, nn.Module, Family]:
    """The layer that `attention` names: "middle", a dotted path in `inner_model` or in a UNet it holds, or the module.

    Raises:
        ValueError: there is none, or it is no self-attention that ksag can read; the message lists what there is.
    """
    if isinstance(attention, nn.Module):
        path = next((path for path, module in inner_model.named_modules() if module is attention), None)
        if path is None:
            raise ValueError(
                f"attention= is a {type(attention).__name__} that is not part of inner_model. Give a module of the model "
                f"that is wrapped, or its path. {_hint(inner_model)}"
            )
    elif attention == "middle":
        path = _middle(inner_model)
    else:
        path = _resolve(inner_model, attention)
    layer = inner_model.get_submodule(path)
    family = family_of(layer, path)
    if family is None:
        raise ValueError(
            f"attention={path!r} is a {type(layer).__name__}, not a self-attention layer that ksag can read. "
            f"{_hint(inner_model, path)}"
        )
    return path, layer, family


def _middle(inner_model: nn.Module) -> str:
    """The first self-attention of the UNet's middle block; k-diffusion's own UNet has its deepest level instead."""
    paths = [layer.path for layer in list_attention(inner_model)]
    for path in paths:
        if re.search(r"(^|\.)(middle_block|mid_block)\.", path):
            return path
    levels = [(int(level[1]), path) for path in paths if (level := re.search(r"(?:^|\.)d_blocks\.(\d+)\.", path))]
    if not levels:
        raise ValueError(f"No self-attention found in the middle of {type(inner_model).__name__}. {_hint(inner_model)}")
    deepest = max(level for level, _ in levels)
    return next(path for level, path in levels if level == deepest)


def _resolve(inner_model: nn.Module, path: str) -> str:
    known = [name for name, _ in inner_model.named_modules()]
    matches = [path] if path in known else [name for name in known if name.endswith(f".{path}")]
    if not matches:
        raise ValueError(f"attention={path!r} does not exist in {type(inner_model).__name__}. {_hint(inner_model, path)}")
    if len(matches) > 1:
        raise ValueError(f"attention={path!r} could be any of {', '.join(matches)}. Give one of these.")
    return matches[0]


def _hint(inner_model: nn.Module, path: str = "") -> str:
    """What to give as attention=: the nearest readable layers, or the modules that look like attention."""
    readable = [layer.path for layer in list_attention(inner_model)]
    if readable:
        inside = [p for p in readable if path and p.startswith(f"{path}.")]
        nearest = inside or difflib.get_close_matches(path, readable, n=5, cutoff=0.0)
        examples = ", ".join(map(repr, nearest[:5]))
        return f"Name one of its {len(readable)} self-attention layers as attention=, for example {examples}."
    similar = [f"{p!r} ({type(m).__name__})" for p, m in inner_model.named_modules() if re.search("att", type(m).__name__, re.I)]
    candidates = f"These look like attention in a form that it cannot read: {', '.join(similar[:5])}. " if similar else ""
    return (
        f"ksag reads layers with to_q, to_k and heads (CompVis, SGM, diffusers) or qkv_proj and n_head (k-diffusion), and found "
        f"none. {candidates}A layer of one of these forms can be named with attention='dotted.path'."
    )


def check_not_compiled(inner_model: nn.Module, path: str) -> None:
    """Raises a RuntimeError if a module around or inside the layer is compiled: hooks set from now on may never run."""
    layer = inner_model.get_submodule(path)
    around = [inner_model.get_submodule(".".join(path.split(".")[:i])) for i in range(len(path.split(".")))]
    for module in (*around, *layer.modules()):
        compiled_forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None or compiled_forward:
            raise RuntimeError(
                f"The {type(module._modules.get('_orig_mod', module)).__name__} that holds {path!r} was compiled before it was "
                f"wrapped, and a compiled model does not run hooks that are set later. Wrap first, compile afterwards: "
                f"guided = ksag.SAGDenoiser(denoiser); denoiser.inner_model = torch.compile(unet). "
                f"(The model as it was is torch.compile's result's ._orig_mod.)"
            )


# Catching a layer's queries and keys while it runs


class Recording:
    """What a tap has seen so far of the first `rows` samples that went through the layer."""

    def __init__(self, rows: int, path: str):
        self.rows = rows
        self.path = path
        self.grid: tuple[int, int] | None = None
        self.outputs: dict[str, Tensor] = {}
        self.maps: list[Tensor] = []

    @property
    def missing(self) -> int:
        return self.rows - sum(m.shape[0] for m in self.maps)

    def map(self) -> Tensor:
        """(rows, h', w'): what `reduce` made of the layer's queries and keys."""
        if self.missing:
            raise RuntimeError(
                f"{self.path!r} ran for {self.rows - self.missing} of the latent's {self.rows} samples while inner_model ran, so "
                f"there is nothing to guide by. Is the layer part of this forward? Was the model compiled before it was "
                f"wrapped, or were its projections fused since? Then wrap it anew, and compile afterwards."
            )
        return torch.cat(self.maps) if len(self.maps) > 1 else self.maps[0]


class AttentionTap:
    """Forward hooks on one self-attention layer, set once and idle outside `with tap.recording(...)`.

    While recording, the queries and keys of the first rows of the batch are reduced as soon as the layer has run, so
    that neither outlives it. Each thread records for itself. The hooks replace nothing: the layer runs as it always does.

    Args:
        inner_model: the denoiser that holds the layer.
        attention: as in `find_attention`.
        reduce: q, k (b, heads, tokens, dim) and scale → (b, tokens).
    """

    def __init__(self, inner_model: nn.Module, attention: str | nn.Module, reduce: Reduce):
        self.path, self.layer, self.family = find_attention(inner_model, attention)
        check_not_compiled(inner_model, self.path)
        self.reduce = reduce
        self._sources = {name: self.layer.get_submodule(name) for name in self.family.sources}
        self._by_thread: dict[int, Recording] = {}
        self._traced: Recording | None = None
        names = self.path.split(".")
        ancestors = [inner_model.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]
        self._handles = [module.register_forward_pre_hook(self._see_grid, with_kwargs=True) for module in ancestors]
        for name, module in self._sources.items():
            self._handles.append(module.register_forward_hook(functools.partial(self._see_output, name)))
        self._handles.append(self.layer.register_forward_hook(self._see_layer))

    @property
    def closed(self) -> bool:
        return not self._handles

    def close(self) -> None:
        """Removes every hook. Calling it twice does no harm."""
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def recording(self, rows: int) -> Iterator[Recording]:
        """Records the first `rows` samples that go through the layer, until the block is left, however it is left."""
        for name, module in self._sources.items() if rows else ():
            if getattr(self.layer, name) is not module:
                raise RuntimeError(f"{self.path}.{name} was replaced since it was wrapped (by a LoRA?). Wrap the model anew.")
        recording = self._traced = Recording(rows, self.path)
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        self._by_thread[thread] = recording
        try:
            yield recording
        finally:
            self._traced = None
            del self._by_thread[thread]

    def _current(self) -> Recording | None:
        # Dynamo cannot trace get_ident, so a compiled forward finds the recording in a plain attribute.
        recording = self._traced if torch.compiler.is_compiling() else self._by_thread.get(threading.get_ident())
        return recording if recording is not None and recording.missing else None

    def _see_grid(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # The pre-hooks run from the outermost module inwards, so the last spatial input is the nearest one.
        if recording := self._current():
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.ndim == 4:
                    recording.grid = (value.shape[2], value.shape[3])
                    break

    def _see_output(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if recording := self._current():
            recording.outputs[name] = output.detach()

    def _see_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        recording = self._current()
        if recording is None or len(recording.outputs) < len(self.family.sources):
            return
        rows = recording.missing
        outputs = [recording.outputs.pop(name)[:rows] for name in self.family.sources]
        q, k, scale = self.family.read(layer, *outputs)
        grid = recording.grid
        if grid is None or q.shape[2] != grid[0] * grid[1] or k.shape[2] != grid[0] * grid[1]:
            raise ValueError(
                f"{self.path!r} attends from {q.shape[2]} to {k.shape[2]} tokens, which is not its input's grid of "
                f"{grid}: it is no self-attention over the image. Name another layer; ksag.list_attention shows them."
            )
        recording.maps.append(self.reduce(q, k, scale).unflatten(1, grid))
