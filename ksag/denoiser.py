"""SAGDenoiser: Self-Attention Guidance for any k-diffusion sampler."""

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ksag import checks, table
from ksag.conditioning import Conditioning, batchable, concatenate, repeat
from ksag.degrade import attention_mask, degrade
from ksag.graphs import CUDAGraphs
from ksag.saliency import saliency
from ksag.tap import AttentionTap
from ksag.trace import Trace, TraceStep


class SAGDenoiser(nn.Module):
    """Wraps a k-diffusion denoiser with Self-Attention Guidance and classifier-free guidance.

    The result samples like any k-diffusion denoiser:

        guided = ksag.SAGDenoiser(denoiser, sag_scale=0.5, blur_sigma=2.0)
        K.sampling.sample_euler(guided, x, sigmas, extra_args={"cond": c, "uncond": uc, "cond_scale": 7.5})

    Forward hooks on one self-attention layer see what the model attends to; nothing in `inner_model` is replaced or
    altered, and `close()`, leaving a `with` block, or dropping the wrapper removes them. Compile `inner_model` after
    wrapping it, not before.

    Hong et al., "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", ICCV 2023, arXiv:2210.00939.

    Args:
        inner_model: maps (x, sigma, **conditioning) to the denoised latent, as k-diffusion's denoisers do.
        sag_scale: strength s; 0 is plain classifier-free guidance. The paper's `guide_scale` is 1 + s.
        blur_sigma: standard deviation of the Gaussian blur, in latent pixels; 0 is no blur.
        blur_kernel_size: odd number of latent pixels that the blur spans. A latent with a side of at most half of it
            cannot be reflected at its border, and is not guided.
        mask_threshold: tokens that receive more than this many times the average attention are blurred.
        attention: the layer to look at: "middle", a dotted path in `inner_model` or in the UNet it holds, or the module.
            `ksag.list_attention(inner_model)` lists them.
        sigma_range: (lowest, highest) sigma, in the units of the sampler's sigmas, at which SAG acts; elsewhere the
            result is plain classifier-free guidance. Reads sigma from the device once a call if set.
        cond_key: the keyword under which `inner_model` takes its conditioning; None if cond is a dict of keywords.
        batch_cond: evaluate uncond and cond in one batch where their shapes allow it; False takes two passes and half
            the activation memory.

    Raises:
        TypeError: `inner_model` is no nn.Module.
        ValueError: a parameter out of its range, or no such self-attention layer.
        RuntimeError: `inner_model` was compiled before it was wrapped.
    """

    def __init__(
        self,
        inner_model: nn.Module,
        sag_scale: float = 0.5,
        blur_sigma: float = 2.0,
        *,
        blur_kernel_size: int = 9,
        mask_threshold: float = 1.0,
        attention: str | nn.Module = "middle",
        sigma_range: tuple[float, float] = (0.0, math.inf),
        cond_key: str | None = "cond",
        batch_cond: bool = True,
    ):
        super().__init__()
        self.inner_model = checks.inner_model(inner_model)
        self.sag_scale = checks.finite("sag_scale", sag_scale)
        self.blur_sigma = checks.blur_sigma(blur_sigma)
        self.blur_kernel_size = checks.blur_kernel_size(blur_kernel_size)
        self.mask_threshold = checks.finite("mask_threshold", mask_threshold)
        self.sigma_range = checks.sigma_range(sigma_range)
        self.cond_key = cond_key
        self.batch_cond = batch_cond
        self.tap = AttentionTap(inner_model, attention, reduce=saliency)
        self._traces: list[Trace] = []
        self._graphs: CUDAGraphs | None = None
        weakref.finalize(self, self.tap.close)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning = None,
        uncond: Conditioning = None,
        cond_scale: float = 1.0,
        *,
        sag_scale: float | None = None,
        blur_sigma: float | None = None,
        mask_threshold: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The guided denoised latent, (b, c, h, w).

        Args:
            x: noisy latent, (b, c, h, w).
            sigma: noise levels, (b,).
            cond, uncond: conditionings, batch first, of the same nesting. Without uncond, the guidance starts from the
                prediction for cond, or from the model's only one.
            cond_scale: classifier-free guidance scale; 1 is none.
            sag_scale, blur_sigma, mask_threshold: in place of the constructor's, for this call.
            **kwargs: passed on to every call of `inner_model`.

        Raises:
            ValueError, TypeError: input that does not fit together; the message says how.
            RuntimeError: the layer did not run, or the wrapper was closed.
        """
        sag_scale = self.sag_scale if sag_scale is None else checks.finite("sag_scale", sag_scale)
        blur_sigma = self.blur_sigma if blur_sigma is None else checks.blur_sigma(blur_sigma)
        mask_threshold = self.mask_threshold if mask_threshold is None else checks.finite("mask_threshold", mask_threshold)
        checks.call(x, sigma, cond, uncond, cond_scale, self.cond_key)

        acts = self._acts(x, sigma, sag_scale)

        # 1. The predictions, and what the model attends to on the unconditional half
        u, g, attended = self._run(self._predict, x, sigma, cond, uncond, kwargs, acts)

        # 2. Classifier-free guidance
        cfg = u + (g - u) * cond_scale
        if not acts:
            return cfg

        # 3., 4. Where the model looks
        mask = attention_mask(attended, mask_threshold, (x.shape[2], x.shape[3]))

        # 5., 6. That taken away, and what the model makes of it under the same noise
        d = degrade(u, mask, blur_sigma, self.blur_kernel_size)
        kept = self._copies(sigma, attended, mask, u, d)  # now, because a CUDA graph's next pass overwrites u
        r = self._run(self._denoise, d + (x - u), sigma, cond if uncond is None else uncond, kwargs)

        # 7. Away from it
        for steps in self._traces:
            steps.append(TraceStep(*kept, *self._copies(r)))
        return cfg + (d - r) * sag_scale

    def _run(self, model_pass: Callable, *args: Any) -> Any:
        return model_pass(*args) if self._graphs is None else self._graphs(model_pass, *args)

    def _acts(self, x: Tensor, sigma: Tensor, sag_scale: float) -> bool:
        """Whether this call is guided: an interval must hold all of sigma, and the blur reflect at every border."""
        if sag_scale == 0 or min(x.shape[2:]) <= self.blur_kernel_size // 2:
            return False
        if self.tap.closed:
            raise RuntimeError("This SAGDenoiser was closed, so it no longer sees what the model attends to. Make a new one.")
        low, high = self.sigma_range
        return (low, high) == (0.0, math.inf) or bool(((low <= sigma) & (sigma <= high)).all())

    def _predict(
        self, x: Tensor, sigma: Tensor, cond: Conditioning, uncond: Conditioning, kwargs: dict[str, Any], acts: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """u, g, and the saliency of u's pass if SAG acts. One batch if uncond and cond can be batched; without uncond, g is u."""
        b = x.shape[0]
        batched = uncond is not None and self.batch_cond and batchable(uncond, cond)
        with self.tap.recording(rows=b if acts else 0) as seen:
            if batched:
                both = self._denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), concatenate(uncond, cond), repeat(kwargs, b))
                u, g = both.chunk(2)  # the tap sees the first rows
            else:
                u = g = self._denoise(x, sigma, cond if uncond is None else uncond, kwargs)
        attended = seen.map() if acts else None
        if uncond is not None and not batched:
            # A CUDA graph's next pass overwrites what this one returned
            u, attended = u.clone(), None if attended is None else attended.clone()
            g = self._denoise(x, sigma, cond, kwargs)
        return u, g, attended

    def _denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning, kwargs: dict[str, Any]) -> Tensor:
        conditioning = {} if cond is None else cond if self.cond_key is None else {self.cond_key: cond}
        return checks.denoised(self.inner_model(x, sigma, **conditioning, **kwargs), x)

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Keeps what every guided call inside the block computes.

            with guided.trace() as steps:
                K.sampling.sample_euler(guided, x, sigmas)
            steps[0].mask

        A call that is not guided (`sag_scale` 0, outside `sigma_range`) leaves no step.
        """
        steps = Trace()
        self._traces.append(steps)
        try:
            yield steps
        finally:
            self._traces = [trace for trace in self._traces if trace is not steps]

    def _copies(self, *values: Tensor) -> list[Tensor]:
        return [value.detach().to("cpu", copy=True) for value in values] if self._traces else []

    def use_cuda_graphs(self, limit: int = 8) -> "SAGDenoiser":
        """From now on, replays the model's passes as CUDA graphs: the step is no longer bound by the host's kernel launches.

            guided = ksag.SAGDenoiser(denoiser).use_cuda_graphs()
            K.sampling.sample_euler(guided, x, sigmas, extra_args=extra_args)

        The first call with new shapes, dtypes or keywords captures its two passes, in about a second (a compiled model compiles
        first); every later one replays them, under any sampler, `sigma_range` and `trace()`. cond_scale, sag_scale,
        blur_sigma and mask_threshold may change freely. Conditionings are copied in only when they change. Weights may
        change in place; after any other change to the model (a LoRA, another attention processor, torch.compile), call this
        again. A call with gradients enabled, or on the CPU, runs as without. Each thread captures for itself. `close()`
        frees the graphs and their memory.

        Args:
            limit: graphs kept. A guided step takes two, one more where `sigma_range` or `sag_scale` 0 leave SAG out; the least
                recently used beyond that are dropped, with a warning.

        Returns:
            This wrapper.

        Raises:
            ValueError: a limit below 2.
            RuntimeError: from a call, where the model cannot be captured; the message says why.
            TypeError: from a call with a keyword whose changes a graph would not see: no tensor, number or string.
        """
        if limit < 2:
            raise ValueError(f"limit must be 2 or more, since a guided step replays two graphs, got {limit}.")
        if next((p.device.type for p in self.inner_model.parameters()), "cpu") != "cuda":
            warnings.warn("use_cuda_graphs: inner_model is not on a CUDA device, so it runs as without.", stacklevel=2)
        self._graphs = CUDAGraphs(self.inner_model, limit)
        return self

    def close(self) -> None:
        """Removes every hook from `inner_model`. What is left still does plain guidance at `sag_scale` 0."""
        self.tap.close()
        self._graphs = None

    def __enter__(self) -> "SAGDenoiser":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _settings(self) -> dict[str, Any]:
        names = ("sag_scale", "blur_sigma", "blur_kernel_size", "mask_threshold", "sigma_range", "cond_key", "batch_cond")
        return {"attention": self.tap.path, **{name: getattr(self, name) for name in names}}

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"SAGDenoiser({type(self.inner_model).__name__}, {parameters}{', closed' if self.tap.closed else ''})"

    def _repr_html_(self) -> str:
        title = ["SAGDenoiser", "closed" if self.tap.closed else ""]
        cells = {"inner_model": type(self.inner_model).__name__, **self._settings()}
        return table.as_html([title, *([name, str(value)] for name, value in cells.items())])
