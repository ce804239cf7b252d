"""How the model is asked: what is batched, recorded, and replayed as a graph."""

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ksag.attention.tap import AttentionTap
from ksag.model import checks, compiled
from ksag.model.conditioning import Conditioning, join, joinable, repeat, unshared
from ksag.model.graphs import CUDAGraphs
from ksag.model.threads import PerThread


class Pass:
    """One call of the model, for one or more latents of the same shape and their conditionings, in one batch.

    Args:
        inner_model, cond_key, shared: as for `Passes`.
        tap: what records the attention.
        record: whether to record what the model attends to on the first latent.
    """

    def __init__(self, inner_model: nn.Module, cond_key: str | None, shared: Sequence[str], tap: AttentionTap, record: bool):
        self.inner_model, self.cond_key, self.shared, self.tap, self.record = inner_model, cond_key, shared, tap, record

    @property
    def key(self) -> tuple:
        """What is the same for two passes that do the same."""
        return self.inner_model, self.cond_key, self.shared, self.record

    def __call__(
        self, sigma: Tensor, latents: Sequence[Tensor], conds: Sequence[Conditioning], kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor | None]:
        """The denoised latents, and the saliency of the first, (b, h', w')."""
        b, n = sigma.shape[0], len(latents)
        x, sigma, cond = latents[0], sigma, conds[0]
        if n > 1:
            x, sigma, cond = torch.cat(list(latents)), torch.cat([sigma] * n), join(*conds)
            kwargs = repeat(kwargs, b, n, self.shared)
        if not self.record:
            return list(self.denoise(x, sigma, cond, kwargs).chunk(n)), None
        with self.tap.recording(rows=b) as seen:
            denoised = self.denoise(x, sigma, cond, kwargs)
        return list(denoised.chunk(n)), seen.saliency()

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning, kwargs: dict[str, Any]) -> Tensor:
        conditioning = {} if cond is None else cond if self.cond_key is None else {self.cond_key: cond}
        # with containers of its own, because some models pop from the lists they are given
        return checks.denoised(self.inner_model(x, sigma, **unshared(conditioning), **unshared(kwargs)), x)


class Passes:
    """Asks a model for several predictions at once: in one batch where their conditionings can be batched.

    Args:
        tap: what records the attention.
    """

    def __init__(self, tap: AttentionTap):
        self.tap = tap
        self.graphs: CUDAGraphs | None = None
        self._asking = PerThread(False)

    def __call__(
        self,
        inner_model: nn.Module,
        parts: Sequence[tuple[Tensor, Conditioning]],
        sigma: Tensor,
        kwargs: dict[str, Any],
        *,
        cond_key: str | None,
        batched: bool = True,
        shared: Sequence[str] = (),
        record: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The prediction for each part: a noisy latent (b, c, h, w) and its conditioning.

        Args:
            inner_model: what is asked.
            parts: at least one.
            sigma: (b,) noise levels of each part.
            kwargs: what else goes to every call, for b samples.
            cond_key: the keyword for the conditioning; None if it is keywords itself.
            batched: False asks for one part after the other.
            shared: names of `kwargs` that all samples share.
            record: whether to record what the model attends to on the first part.

        Returns:
            The predictions, in order, and the saliency of the first, (b, h', w'), or None. The next call may overwrite them.
        """
        predictions: dict[int, Tensor] = {}
        saliency = None
        for group in _groups([cond for _, cond in parts]) if batched else [[i] for i in range(len(parts))]:
            model_pass = Pass(inner_model, cond_key, shared, self.tap, record and 0 in group)
            latents, conds = zip(*(parts[i] for i in group), strict=True)
            denoised, seen = self._ask(model_pass, sigma, latents, conds, kwargs)
            if len(group) < len(parts):  # the next group's pass may overwrite them, as CUDA graphs do
                denoised, seen = [d.clone() for d in denoised], None if seen is None else seen.clone()
            saliency = seen if saliency is None else saliency
            predictions.update(zip(group, denoised, strict=True))
        return [predictions[i] for i in range(len(parts))], saliency

    def _ask(self, model_pass: Pass, *args: Any) -> tuple[list[Tensor], Tensor | None]:
        if self._asking.get() and _is_running(self):
            raise RuntimeError("A SAGDenoiser was called from inside its own inner_model. Wrap the model once, and from outside.")
        to_check = model_pass.record and self.tap.to_check
        try:
            self._asking.set(True)
            with compiled.turn(to_check or self.tap.is_compiled(model_pass.inner_model)):
                if self.graphs is None or to_check:
                    with compiled.eagerly(to_check):
                        answer = model_pass(*args)
                return answer if self.graphs is None else self.graphs(model_pass, *args, key=model_pass.key)
        finally:
            self._asking.set(False)


def _is_running(passes: Passes) -> bool:
    """Whether they wait for a model further up the stack. (A flag alone would stay set if Ctrl-C hits where it is taken down.)"""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is Passes._ask.__code__ and frame.f_locals.get("self") is passes:
            return True
        frame = frame.f_back
    return False


def _groups(conds: Sequence[Conditioning]) -> list[list[int]]:
    """The numbers of the parts, those together that can be batched."""
    groups: list[list[int]] = []
    for i, cond in enumerate(conds):
        for group in groups:
            if joinable(conds[group[0]], cond):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
