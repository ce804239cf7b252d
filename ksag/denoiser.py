"""SAGDenoiser: Self-Attention Guidance for any k-diffusion sampler."""

import contextlib
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ksag.attention import table
from ksag.attention.tap import AttentionTap
from ksag.guidance.blur import attention_mask
from ksag.guidance.cfg import Rule, name_of, plain
from ksag.guidance.runs import Calls, Run, ended_by_errors
from ksag.guidance.sag import overlap, self_attention_guidance, take_away
from ksag.guidance.trace import Trace, TraceStep
from ksag.model import checks, keywords
from ksag.model.conditioning import Conditioning
from ksag.model.graphs import CUDAGraphs
from ksag.model.parameters import PARAMETERS, finite, flag
from ksag.model.passes import Passes
from ksag.model.threads import PerThread


def only(acts: bool | Tensor, t: Tensor) -> Tensor:
    """t (b, c, h, w) where SAG acts on the sample, and zeros elsewhere."""
    return torch.where(acts[:, None, None, None], t, 0) if isinstance(acts, Tensor) else t


OWN = ("tap", "_passes", "_delta", "_direction", "_calls", "_warned", "_traces")
"""What a copy of a SAGDenoiser does not take over: its hooks, and what it keeps from call to call."""


def of_inner_model(name: str) -> Any:
    return property(lambda self: getattr(self.inner_model, name), doc=f"`inner_model.{name}`, where it has one.")


class SAGDenoiser(nn.Module):
    """Wraps a k-diffusion denoiser with Self-Attention Guidance and classifier-free guidance.

    The result samples like any k-diffusion denoiser:

        guided = ksag.SAGDenoiser(denoiser, sag_scale=0.5, blur_sigma=2.0)
        K.sampling.sample_euler(guided, x, sigmas, extra_args={"cond": c, "uncond": uc, "cond_scale": 7.5})

    Forward hooks on one self-attention layer see what the model attends to; nothing in `inner_model` is replaced or
    altered, and `close()`, leaving a `with` block, or dropping the wrapper removes them. Compile `inner_model` after
    wrapping it, not before. The parameters are attributes that may be assigned later, but for `attention` and `check_attention`.

    At the first guided call, and when the layer is seen to attend in another way, what the hooks read is checked against what
    the layer computed.

    Hong et al., "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", ICCV 2023, arXiv:2210.00939.

    Args:
        inner_model: maps (x, sigma, **conditioning) to the denoised latent, as k-diffusion's denoisers do.
        sag_scale: strength s; 0 is plain classifier-free guidance. The paper's `guide_scale` is 1 + s. A tensor (b,), on the
            latent's device, is a strength for each sample.
        blur_sigma: standard deviation of the Gaussian blur, in latent pixels; 0 is no blur.
        blur_kernel_size: odd number of latent pixels that the blur spans. A latent with a side of at most half of it
            cannot be reflected at its border, and is not guided.
        mask_threshold: tokens that receive more than this many times the average attention are blurred.
        attention: the layer to look at: "middle", a dotted path in `inner_model` or in the UNet it holds, or the module.
            `ksag.list_attention(inner_model)` lists them.
        sigma_range: (lowest, highest) sigma, in the units of the sampler's sigmas, at which SAG acts on a sample; elsewhere its
            result is plain classifier-free guidance. Reads sigma from the device once a call if set.
        one_pass: blur away at each call what the model attended to at the call before, so that one pass of the model serves all:
            SAG for little more than the price of plain guidance. A run's first call is not guided.
        every: compute SAG's direction at one of so many calls of a run, and keep it in between, as a difference of noise
            predictions. Reads sigma from the device once a call if more than 1.
        cfg_rule: what becomes of the predictions for uncond and cond: a function of (u, g, cond_scale, x, sigma), such as those
            in `ksag.cfg`. SAG's direction is added to what it returns.
        cond_key: the keyword under which `inner_model` takes its conditioning; None if cond is a dict of keywords.
        batch_cond: evaluate uncond and cond in one batch where their shapes allow it; False takes two passes and half
            the activation memory.
        shared_kwargs: keywords whose tensors all samples share. In a batch of uncond and cond, any other keyword's tensor with
            as many rows as there are samples is doubled.
        check_attention: whether to check what is read.

    Raises:
        TypeError: `inner_model` is no nn.Module.
        ValueError: a parameter out of its range, or no such self-attention layer.
        RuntimeError: `inner_model` was compiled before it was wrapped.
    """

    def __init__(
        self,
        inner_model: nn.Module,
        sag_scale: float | Tensor = 0.5,
        blur_sigma: float = 2.0,
        *,
        blur_kernel_size: int = 9,
        mask_threshold: float = 1.0,
        attention: str | nn.Module = "middle",
        sigma_range: tuple[float, float] = (0.0, math.inf),
        one_pass: bool = False,
        every: int = 1,
        cfg_rule: Rule = plain,
        cond_key: str | None = "cond",
        batch_cond: bool = True,
        shared_kwargs: Sequence[str] = (),
        check_attention: bool = True,
    ):
        super().__init__()
        self.inner_model = checks.inner_model(inner_model)
        self.sag_scale = sag_scale
        self.blur_sigma = blur_sigma
        self.blur_kernel_size = blur_kernel_size
        self.mask_threshold = mask_threshold
        self.sigma_range = sigma_range
        self.one_pass = one_pass
        self.every = every
        self.cfg_rule = cfg_rule
        self.cond_key = cond_key
        self.batch_cond = batch_cond
        self.shared_kwargs = shared_kwargs
        self._look_at(attention, flag("check_attention")(check_attention))

    def _look_at(self, attention: str | nn.Module, check: bool) -> None:
        """Hooks the layer, and begins with nothing kept."""
        self.tap = AttentionTap(self.inner_model, attention, check)
        self._passes = Passes(self.tap)
        self._delta, self._direction, self._calls = Run(), Run(), Calls()
        self._warned: set[str] = set()
        self._traces: PerThread[tuple[Trace, ...]] = PerThread(())
        weakref.finalize(self, self.tap.close)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: all but what belongs to this wrapper alone."""
        state = {name: value for name, value in vars(self).items() if name not in OWN}
        return state | {"_modules": dict(state["_modules"]), "_layer": (self.tap.path, self.tap.check, self.tap.closed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path, check, closed = state.pop("_layer")
        super().__setstate__(state)
        self._look_at(path, check)
        if closed:
            self.tap.close()

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks the parameters, here and wherever they are assigned later."""
        if name in ("attention", "check_attention"):
            raise AttributeError(f"{name} is chosen when a SAGDenoiser is made: make a new one, and close() this one.")
        super().__setattr__(name, PARAMETERS[name].check(value) if name in PARAMETERS else value)
        if name in ("one_pass", "every") and hasattr(self, "_calls"):
            self._end_run()  # what the other form kept is none of this one's

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Conditioning = None,
        uncond: Conditioning = None,
        cond_scale: float = 1.0,
        *,
        sag_scale: float | Tensor | None = None,
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
        cond_scale = finite("cond_scale", cond_scale)
        checks.call(x, sigma, cond, uncond, cond_scale, self.cond_key, kwargs)
        sag_scale = self.sag_scale if sag_scale is None else PARAMETERS["sag_scale"].check(sag_scale)
        blur_sigma = self.blur_sigma if blur_sigma is None else PARAMETERS["blur_sigma"].check(blur_sigma)
        mask_threshold = self.mask_threshold if mask_threshold is None else PARAMETERS["mask_threshold"].check(mask_threshold)
        blur: dict[str, Any] = {
            "blur_sigma": blur_sigma,
            "blur_kernel_size": self.blur_kernel_size,
            "mask_threshold": mask_threshold,
        }
        strength = checks.for_each_sample("sag_scale", sag_scale, x)
        base = cond if uncond is None else uncond
        parts = [(x, base)] if uncond is None else [(x, uncond), (x, cond)]
        acts = self._acts(x, sigma, sag_scale)
        looks, asks = self._plan(x, sigma, acts)

        with ended_by_errors(self.reset), keywords.explained(self.inner_model, cond, self.cond_key):
            # 1. The predictions, and what the model attends to on the unconditional half
            if asks and self.one_pass:
                delta = self._delta.last(sigma, x)
                parts.append((x - delta, base))
            predictions, saliency = self._ask(parts, sigma, kwargs, record=looks)
            u, g = predictions[0], predictions[0 if uncond is None else 1]

            # 2. Classifier-free guidance
            cfg = u if uncond is None else checks.guided(self.cfg_rule(u, g, cond_scale, x, sigma), x)
            if uncond is None or self.cfg_rule is not plain:
                cfg = cfg.clone()  # it may be u or g, which the next pass may overwrite
            if acts is False:
                return cfg

            # 3. to 6. Where the model looks, that taken away, and what the model makes of it under the same noise
            if asks:
                seen = self._copies(sigma, saliency, u)
                if self.one_pass:
                    d, r = u - delta.to(u.dtype), predictions[-1]
                else:
                    _, d, r = self_attention_guidance(u, x, saliency, lambda x: self._ask([(x, base)], sigma, kwargs)[0][0], **blur)
                self._keep_step(seen, d, r, mask_threshold)
                direction = only(acts, d - r)
            else:
                direction = only(acts, self._direction.last(sigma, u, with_sigma=True))

            # In one pass, what is taken away now: it weighs the direction, and the next call takes it over
            if looks and self.one_pass:
                now = u - take_away(u, saliency, **blur)[1]
                if asks:
                    direction = direction * overlap(delta, now).to(direction.dtype)
                self._delta.keep(sigma, only(acts, now).to(x.dtype))
            if self.every > 1:
                self._direction.keep(sigma, direction)

            # 7. Away from it
            return cfg + (direction * strength).to(cfg.dtype)

    def _plan(self, x: Tensor, sigma: Tensor, acts: bool | Tensor) -> tuple[bool, bool]:
        """Whether this call sees what the model attends to, and whether it asks for the direction, or goes on with the last one."""
        if acts is False:
            self._end_run()
            return False, False
        n = self._calls.number(sigma, x) if self.every > 1 else 0
        asks = (n - self.one_pass) % self.every == 0  # in one pass, the call after one that looks
        return n % self.every == 0 or asks, asks

    def _ask(self, parts: list, sigma: Tensor, kwargs: dict[str, Any], record: bool = False) -> tuple[list[Tensor], Any]:
        """The prediction for each part, and the saliency of the first if it was recorded."""
        return self._passes(
            self.inner_model, parts, sigma, kwargs,
            cond_key=self.cond_key, batched=self.batch_cond, shared=self.shared_kwargs, record=record,
        )  # fmt: skip

    def _acts(self, x: Tensor, sigma: Tensor, sag_scale: float | Tensor) -> bool | Tensor:
        """Whether SAG acts, or on which samples, (b,)."""
        if not isinstance(sag_scale, Tensor) and sag_scale == 0:
            return False
        if self.tap.closed:
            raise RuntimeError("This SAGDenoiser was closed, so it no longer sees what the model attends to. Make a new one.")
        if min(x.shape[2:]) <= self.blur_kernel_size // 2:  # the blur reflects at every border
            self._warn_once(
                f"A latent of {x.shape[2]} × {x.shape[3]} is left without SAG: blur_kernel_size={self.blur_kernel_size} "
                f"reflects at every border. Give a blur_kernel_size of at most {2 * min(x.shape[2:]) - 1}."
            )
            return False
        if self.tap.layer.training:
            self._warn_once("inner_model is in train mode, so that its dropout, if it has any, is active: call inner_model.eval().")
        low, high = self.sigma_range
        if (low, high) == (0.0, math.inf):
            return True
        inside = (low <= sigma) & (sigma <= high)
        return inside if bool(inside.any()) else False

    # what k-diffusion's users ask of a denoiser
    sigmas = of_inner_model("sigmas")
    get_sigmas = of_inner_model("get_sigmas")
    sigma_min = of_inner_model("sigma_min")
    sigma_max = of_inner_model("sigma_max")
    sigma_data = of_inner_model("sigma_data")
    sigma_to_t = of_inner_model("sigma_to_t")
    t_to_sigma = of_inner_model("t_to_sigma")

    def reset(self) -> None:
        """Begins a run at this thread's next call, for `one_pass`, `every`, and a `cfg_rule` that keeps something between calls.

        A run begins by itself where sigma rises to more than 1.5 times its last value, at another shape, dtype or device, and after
        an error inside a call. One that was given up between two calls cannot be seen from inside.
        """
        self._end_run()
        if hasattr(self.cfg_rule, "reset"):
            self.cfg_rule.reset()

    def _end_run(self) -> None:
        for kept in self._delta, self._direction, self._calls:
            kept.reset()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and not torch.compiler.is_dynamo_compiling():
            self._warned.add(message)
            warnings.warn(message, stacklevel=6)  # at the call of this wrapper

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Keeps what every guided call of this thread computes inside the block.

            with guided.trace() as steps:
                K.sampling.sample_euler(guided, x, sigmas)
            steps[0].mask

        A call that is not guided (`sag_scale` 0, outside `sigma_range`), or that goes on with a kept direction (`every`), leaves no
        step. In one pass, a step's saliency and mask are this call's, and what is degraded is what the call before looked at.
        """
        before, steps = self._traces.get(), Trace()
        self._traces.set((*before, steps))
        try:
            yield steps
        finally:
            self._traces.set(before)

    def _copies(self, *values: Tensor) -> list[Tensor]:
        return [value.detach().to("cpu", copy=True) for value in values] if self._traces.get() else []

    def _keep_step(self, seen: list[Tensor], d: Tensor, r: Tensor, mask_threshold: float) -> None:
        if traces := self._traces.get():
            sigma, saliency, u = seen
            mask = attention_mask(saliency, mask_threshold, (u.shape[2], u.shape[3])).float()
            for steps in traces:
                steps.append(TraceStep(sigma, saliency, mask, u, *self._copies(d, r)))

    def use_cuda_graphs(self, limit: int = 8) -> "SAGDenoiser":
        """From now on, replays the model's passes as CUDA graphs: the step is no longer bound by the host's kernel launches.

            guided = ksag.SAGDenoiser(denoiser).use_cuda_graphs()
            K.sampling.sample_euler(guided, x, sigmas, extra_args=extra_args)

        The first call with new shapes, dtypes or keywords captures its passes, in about a second (a compiled model compiles
        first); every later one replays them, under any sampler, `sigma_range` and `trace()`. cond_scale, sag_scale,
        blur_sigma and mask_threshold may change freely. Conditionings are copied in only when they change. Weights may
        change in place; after any other change to the model (a LoRA, another attention processor), call this again. A call with
        gradients enabled, or on the CPU, runs as without. Each thread captures for itself. `close()` frees the graphs and their
        memory.

        Args:
            limit: graphs kept for each thread. A guided step takes two, or one in one pass; one or two more where `sigma_range`,
                `every` or `sag_scale` 0 leave SAG out; the least recently used beyond that are dropped, with a warning.

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
        self._passes.graphs = CUDAGraphs(self.inner_model, limit)
        return self

    def close(self) -> None:
        """Removes every hook from `inner_model`. What is left still does plain guidance at `sag_scale` 0."""
        self.tap.close()
        self._passes.graphs = None

    def __enter__(self) -> "SAGDenoiser":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _settings(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in PARAMETERS}
        return {"attention": self.tap.path, **settings, "cfg_rule": name_of(self.cfg_rule)}

    def _state(self) -> str:
        return "closed" if self.tap.closed else "checked" if self.tap.checked else "not checked yet"

    def __repr__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"SAGDenoiser({type(self.inner_model).__name__}, {parameters}; attention {self._state()})"

    def _repr_html_(self) -> str:
        cells = {"inner_model": type(self.inner_model).__name__, **self._settings()}
        rows = ([name, value if isinstance(value, str) else repr(value)] for name, value in cells.items())
        return table.as_html([["SAGDenoiser", f"attention {self._state()}"], *rows])
