"""CUDA graphs: a function of tensors, captured once for each signature of its arguments and replayed from then on.

graphs = CUDAGraphs(model, limit=8)
graphs(function, x, {"cond": c})  # what function(x, {"cond": c}) gives, in one launch
"""

import inspect
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ksag.model.conditioning import leaves, transform

CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
_capturing = threading.Lock()  # CUDA allows one capture at a time


def _signature(place: str, leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return place, tuple(leaf.shape), leaf.dtype, leaf.device
    if isinstance(leaf, CONSTANTS):
        return place, type(leaf), leaf
    raise TypeError(
        f"inner_model is given a {type(leaf).__name__} as {place}, and a CUDA graph would not see it change. Pass tensors, numbers "
        f"and strings, or sample without use_cuda_graphs()."
    )


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda


class _Lane:
    """Where the graphs of one thread and stream are captured. They share its memory, and it lives as long as one of them."""

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()


class _Captured:
    """One function at one signature: static inputs, the graph, and the outputs that every replay overwrites."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], lane: _Lane):
        self.lane = lane
        self.inputs: list[Tensor] = []

        def static(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            self.inputs.append(leaf.clone())
            return self.inputs[-1]

        self.graph = torch.cuda.CUDAGraph()
        inputs = transform(static, args)
        # Libraries set themselves up in a first run. It leaves lane.stream alone, because cuBLAS's workspace there has to come
        # from the graphs' own memory: any other would be freed under them by the next one who clears workspaces.
        function(*inputs)
        try:
            with torch.cuda.graph(self.graph, lane.pool, lane.stream, capture_error_mode="thread_local"):
                self.outputs = function(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"The model ran, but could not be captured as a CUDA graph: as a rule because it reads a tensor's value on the "
                f"host (.item(), .cpu(), an if), or is compiled with mode='reduce-overhead' already. Change that, or sample "
                f"without use_cuda_graphs(). CUDA says: {str(error).splitlines()[0]}"
            ) from error

    def replay(self, tensors: list[Tensor]) -> Any:
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.outputs


class _Kept(threading.local):
    """A thread's graphs, gone when it ends."""

    def __init__(self) -> None:
        self.captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self.lanes: weakref.WeakValueDictionary[Hashable, _Lane] = weakref.WeakValueDictionary()
        self.weights: list[Tensor] = []
        self.pointers: list[int] = []


class CUDAGraphs:
    """Replays functions of `model` instead of running them.

    Captures a function at its first call with a signature: the shapes, dtypes and devices of the tensors among its
    arguments (nested as conditionings are), the values of everything else, autocast, the thread and the stream. A replay
    copies the tensors in and returns the same output tensors each time: use or copy them before the next call.

    Runs the function as it is while gradients are enabled, and for tensors that are not on a CUDA device.

    Args:
        model: its weights may change in place; where one was moved, everything is captured again.
        limit: captures kept for each thread; one more drops the least recently used, with a warning.
    """

    def __init__(self, model: nn.Module, limit: int):
        self.model, self.limit = model, limit
        self._kept = _Kept()

    def __len__(self) -> int:
        return len(self._kept.captured)

    def __call__(self, function: Callable[..., Any], *args: Any, key: Hashable = None) -> Any:
        """`function(*args)`, the first of which is a tensor. Functions that have a key in common do the same."""
        if torch.is_grad_enabled() or not _on_cuda(args[0]):
            return function(*args)
        kept = self._kept
        if list(map(Tensor.data_ptr, kept.weights)) != kept.pointers:
            kept.captured.clear()
        device = args[0].device
        names = inspect.signature(function).parameters
        places = [(f"{name}{place}", leaf) for name, arg in zip(names, args, strict=True) for place, leaf in leaves(arg)]
        autocast = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        stream = device, torch.cuda.current_stream(device).cuda_stream
        key = key or function, stream, autocast, tuple(_signature(place, leaf) for place, leaf in places)
        captured = kept.captured.get(key)
        if captured is None:
            with _capturing:
                captured = kept.captured[key] = self._capture(function, args, stream, autocast)
            self._drop_oldest()
        kept.captured.move_to_end(key)
        return captured.replay([leaf for _, leaf in places if isinstance(leaf, Tensor)])

    def _capture(
        self, function: Callable[..., Any], args: tuple[Any, ...], stream: tuple[Any, int], autocast: tuple[torch.dtype, bool]
    ) -> _Captured:
        kept = self._kept
        if not kept.captured:
            kept.weights = [*self.model.parameters(), *self.model.buffers()]
            kept.pointers = list(map(Tensor.data_ptr, kept.weights))
        # Inference tensors could not be filled outside inference mode, and a cached cast would live in the graph's memory
        with torch.cuda.device(stream[0]), torch.inference_mode(False), torch.no_grad():
            lane = kept.lanes.get(stream) or _Lane()
            kept.lanes[stream] = lane
            with torch.autocast(stream[0].type, *autocast, cache_enabled=False):
                return _Captured(function, args, lane)

    def _drop_oldest(self) -> None:
        if len(self._kept.captured) > self.limit:
            self._kept.captured.popitem(last=False)
            warnings.warn(
                f"More than {self.limit} CUDA graphs were needed, and the least recently used one was dropped: capturing it again "
                f"takes time. Sample fewer different shapes and keywords, or raise the limit: use_cuda_graphs(limit=...).",
                stacklevel=2,
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return CUDAGraphs, (self.model, self.limit)
