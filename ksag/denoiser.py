"""GuidedDenoiser: guidance for any k-diffusion sampler. The four steps of a call are in `forward`, the rest is around them."""

import contextlib
import copy
import functools
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ksag.attention import table
from ksag.attention.tap import AttentionTap
from ksag.guidance.cfg import Rule, plain, shown
from ksag.guidance.direction import Call, Direction
from ksag.guidance.hooks import Hooks
from ksag.guidance.plan import Plan, make_plan
from ksag.guidance.runs import RunState, ended_by_errors
from ksag.guidance.sag import SAG
from ksag.guidance.trace import Trace
from ksag.model import checks, keywords
from ksag.model.conditioning import Conditioning
from ksag.model.graphs import CUDAGraphs
from ksag.model.parameters import CHECKS, finite, flag
from ksag.model.passes import Found, Part, Passes
from ksag.model.threads import Fixed, PerThread

FIXED = ("directions", "attention", "check_attention")
OWN = ("_hooks", "_passes", "_runs", "_traces", "_origin", "_compiled_call_impl")
"""What a copy of a wrapper does not take over: its hooks, what it keeps from call to call, and what its compile() made."""


def of_inner_model(name: str) -> Any:
    return property(lambda self: getattr(self.inner_model, name), doc=f"`inner_model.{name}`, if it has one.")


class GuidedDenoiser(nn.Module):
    """Wraps a k-diffusion denoiser with classifier-free guidance and any number of further directions.

    The result samples like any k-diffusion denoiser:

        guided = ksag.GuidedDenoiser(denoiser, [ksag.SAG(0.7), ksag.PAG(1.0)])
        K.sampling.sample_euler(guided, x, sigmas, extra_args={"cond": c, "uncond": uc, "cond_scale": 7.5})

    Forward hooks read and change the self-attention of some layers, and check what they read against what the layer computed.
    Nothing in `inner_model` is replaced, and `close()`, leaving a `with` block, or dropping the wrapper removes the hooks. Compile
    `inner_model` after wrapping it, not before. All settings but the layers may be assigned later, as `guided.directions[0].scale`.

    Args:
        inner_model: maps (x, sigma, **conditioning) to the denoised latent, as k-diffusion's denoisers do.
        directions: one `ksag.SAG`, `ksag.PAG`, `ksag.SEG` or other `ksag.Direction`, or several. All predictions that they need in
            advance share one batch with u and g.
        cfg_rule: the rule for classifier-free guidance: a function of (u, g, cond_scale, x, sigma), such as those in `ksag.cfg`.
            The directions are added to its result.
        cond_key: the keyword under which `inner_model` takes its conditioning; None if cond is a dict of keywords.
        batch_cond: evaluate all predictions in one batch if their shapes allow it; False takes one pass for each, which needs the
            activation memory of one.
        shared_kwargs: keywords whose tensors all samples share. In a batch of several predictions, any other keyword's tensor
            with one row for each sample is repeated.
        check_attention: whether to check what is read.

    Raises:
        TypeError: `inner_model` is no nn.Module, or does classifier-free guidance itself.
        ValueError: a setting out of its range, or no such self-attention layer.
        RuntimeError: `inner_model` was compiled before it was wrapped.
    """

    def __init__(
        self, inner_model: nn.Module, directions: Direction | Sequence[Direction], *, cfg_rule: Rule = plain,
        cond_key: str | None = "cond", batch_cond: bool = True, shared_kwargs: Sequence[str] = (), check_attention: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.inner_model = checks.inner_model(inner_model)
        self.directions: tuple[Direction, ...] = checks.directions(directions, Direction)
        self.cfg_rule, self.cond_key, self.batch_cond, self.shared_kwargs = cfg_rule, cond_key, batch_cond, shared_kwargs
        self.check_attention = flag("check_attention")(check_attention)
        self._set_hooks()

    def _set_hooks(self) -> None:
        self._hooks = Hooks(self.inner_model, self.directions, self.check_attention)
        self._passes = Passes(self._hooks.all)
        self._runs: PerThread[RunState] | Fixed[RunState] = PerThread(functools.partial(RunState, self.directions))
        self._traces: PerThread[tuple[Trace, ...]] = PerThread(tuple)
        weakref.finalize(self, self._hooks.close)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and "_hooks" in self.__dict__:
            raise AttributeError(f"{name} is chosen when a {type(self).__name__} is made: make a new one, and close() this one.")
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # nn.Module would register an nn.Parameter
        else:
            super().__setattr__(name, CHECKS[name](value) if name in CHECKS else value)

    def forward(
        self, x: Tensor, sigma: Tensor, cond: Conditioning = None, uncond: Conditioning = None, cond_scale: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The guided denoised latent, (b, c, *spatial).

        Args:
            x: noisy latent, (b, c, *spatial) with one to three spatial dimensions.
            sigma: noise levels, (b,).
            cond, uncond: conditionings, batch first, of the same nesting. Without uncond, the guidance starts from the
                prediction for cond, or from the model's only one.
            cond_scale: classifier-free guidance scale; 1 is none.
            **kwargs: `sag_scale`, `pag_scale`, `seg_scale`, `blur_sigma` and `mask_threshold` replace the directions' settings for
                this call. All others are passed on to every call of `inner_model`.

        Raises:
            ValueError, TypeError: input that does not fit together; the message says how to fix it.
            RuntimeError: a layer did not run, or the wrapper was closed.
        """
        run = self._runs.get()
        with ended_by_errors(run.clear), keywords.explained(cond, self.cond_key):
            cond_scale = finite("cond_scale", cond_scale)
            checks.call(x, sigma, cond, uncond, cond_scale, self.cond_key, kwargs)
            checks.rule(self.cfg_rule, self.inner_model)
            base = cond if uncond is None else uncond
            plans, kwargs = self._begin(run, x, sigma, cond, base, kwargs)

            # 1. The predictions u and g, and those that the directions ask for in advance, in one batch
            parts = [Part(x, base)] if uncond is None else [Part(x, base), Part(x, cond)]
            asked = [plan.ask() for plan in plans]
            predictions, saliency = self._ask([*parts, *chain(*asked)], sigma, kwargs, plans)
            u, g, answers = predictions[0], predictions[len(parts) - 1], predictions[len(parts) :]

            # 2. Classifier-free guidance
            rule = run.rule(self.cfg_rule)
            guided = u if uncond is None else checks.guided(rule(u, g, cond_scale, x, sigma), x)
            if uncond is None or rule is not plain:
                guided = guided.clone()  # it may be u or g, which the next pass may overwrite

            # 3. Each direction, from these predictions; some ask the model once more
            directions = []
            for plan, asks in zip(plans, asked, strict=True):
                directions.append(plan.compute(u, g, saliency, answers[: len(asks)], self._traces.get()))
                answers = answers[len(asks) :]

            # 4. Their weighted sum
            for plan, direction in zip(plans, directions, strict=True):
                guided = guided + (direction * plan.strength).to(guided.dtype)
            return guided

    def _begin(
        self, run: RunState, x: Tensor, sigma: Tensor, cond: Conditioning, base: Conditioning, given: dict[str, Any]
    ) -> tuple[list[Plan], dict[str, Any]]:
        """What each acting direction does in this call, and the keywords that are the model's."""
        if run.begins(sigma):
            self._hooks.begin_run()
        words = {word for direction in self.directions for word in direction.keywords}
        kwargs = {name: value for name, value in given.items() if name not in words}
        given = {name: value for name, value in given.items() if name in words and value is not None}
        call = functools.partial(Call, x, sigma, cond, base, lambda x: self._ask([Part(x, base)], sigma, kwargs)[0][0])
        plans = []
        for of_one in zip(self.directions, run.tracks, self._hooks.of, strict=True):
            if (plan := make_plan(*of_one, call, given)) is not None:
                plans.append(plan)
        if plans and self._hooks.closed:
            raise RuntimeError(f"This {type(self).__name__} was closed, so its hooks are gone. Make a new one.")
        return plans, kwargs

    def _ask(
        self, parts: list[Part], sigma: Tensor, kwargs: dict[str, Any], plans: Sequence[Plan] = ()
    ) -> tuple[list[Tensor], Found]:
        """The predictions for the parts, and the saliency that the plans need of the first."""
        reads = list(dict.fromkeys(tap for plan in plans for tap in plan.reads))
        keep = len(plans) > 1 or bool(self._traces.get())  # a plan may ask the model again, which may overwrite what others need
        return self._passes(
            self.inner_model, parts, sigma, kwargs,
            cond_key=self.cond_key, batched=self.batch_cond, shared=self.shared_kwargs, reads=reads, keep=keep,
        )  # fmt: skip

    # Runs

    def run(self) -> "GuidedDenoiser":
        """A denoiser for a single sampling run: the same model, hooks and settings, but its own memory of earlier calls.

            K.sampling.sample_euler(guided.run(), x, sigmas, extra_args=extra_args)

        Runs may be interleaved, and a run may move between threads, one call at a time. A wrapper that is called directly has one
        run at a time for each thread: it ends where sigma rises to more than 1.5 times its last value, at another shape, dtype or
        device, and after an error. It cannot tell that a run was given up between two calls.
        """
        run = object.__new__(type(self))
        run.__dict__.update(self.__dict__, _runs=Fixed(RunState(self.directions)), _origin=self)  # the end of it ends the hooks
        run._compiled_call_impl = None  # which would call this wrapper, and go on with its run
        return run

    def reset(self) -> None:
        """Begins a run at the next call: of this thread, or of this `run()`."""
        self._runs.get().clear()

    @contextlib.contextmanager
    def trace(self) -> Iterator[Trace]:
        """Keeps what every direction computes in this thread inside the block, also in a `run()` of this wrapper.

            with guided.trace() as steps:
                K.sampling.sample_euler(guided, x, sigmas)
            steps[0].direction, steps[0].mask

        A direction leaves a step at each call in which it is computed: none at scale 0, outside its `sigma_range`, or where `every`
        reuses it.
        """
        before, steps = self._traces.get(), Trace()
        self._traces.set((*before, steps))
        try:
            yield steps
        finally:
            self._traces.set(before)

    # CUDA graphs, and the end

    def use_cuda_graphs(self, limit: int = 8) -> "GuidedDenoiser":
        """From now on, replays the model's passes as CUDA graphs, so that kernel launches no longer limit a step. Returns self.

        The first call with new shapes, dtypes or keywords captures its passes, in about a second; later calls replay them. Scales,
        conditionings and the values of weights may change; after any other change to the model (a LoRA, another attention
        processor), call this again. A call with gradients, or on the CPU, runs without graphs. Each thread captures for itself;
        while one does, no thread may call `torch.cuda.synchronize()`, which CUDA forbids.

        Args:
            limit: graphs kept for each thread; a warning says if more were needed. A step takes one, with exact SAG two; steps that
                leave a direction out take more. `close()` frees all.

        Raises:
            ValueError: a limit below 2.
            RuntimeError: from a call, if the model cannot be captured; the message says why.
            TypeError: from a call with a keyword whose changes a graph would not see: no tensor, number or string.
        """
        if limit < 2:
            raise ValueError(f"limit must be 2 or more, since a guided step may replay two graphs, got {limit}.")
        if next((p.device.type for p in self.inner_model.parameters()), "cpu") != "cuda":
            warnings.warn("use_cuda_graphs: inner_model is not on a CUDA device, so it runs without graphs.", stacklevel=2)
        self._passes.graphs = CUDAGraphs(self.inner_model, limit)
        return self

    def close(self) -> None:
        """Removes every hook from `inner_model`. At scale 0 the wrapper still does plain classifier-free guidance."""
        self._hooks.close()
        self._passes.graphs = None

    def __enter__(self) -> "GuidedDenoiser":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    sigmas, get_sigmas, sigma_min, sigma_max = map(of_inner_model, ("sigmas", "get_sigmas", "sigma_min", "sigma_max"))
    sigma_data, sigma_to_t, t_to_sigma = map(of_inner_model, ("sigma_data", "sigma_to_t", "t_to_sigma"))

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in OWN}
        directions = tuple(copy.copy(direction) for direction in self.directions)
        return state | {"directions": directions, "_modules": dict(state["_modules"]), "_closed": self._hooks.closed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        closed = state.pop("_closed")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_hooks()
        if closed:
            self._hooks.close()

    def _settings(self) -> dict[str, Any]:
        return {"directions": list(self.directions), **{name: getattr(self, name) for name in CHECKS}}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={shown(value)}" for name, value in self._settings().items())
        return f"{type(self).__name__}({type(self.inner_model).__name__}, {settings}; attention {self._hooks.status})"

    def _repr_html_(self) -> str:
        rows = [["inner_model", type(self.inner_model).__name__], *([name, shown(v)] for name, v in self._settings().items())]
        return table.as_html([[type(self).__name__, f"attention {self._hooks.status}"], *rows])


def of_sag(name: str) -> Any:
    return property(lambda self: getattr(self.directions[0], name), lambda self, value: setattr(self.directions[0], name, value))


class SAGDenoiser(GuidedDenoiser):
    """Wraps a k-diffusion denoiser with classifier-free guidance and Self-Attention Guidance: a `GuidedDenoiser` with one `SAG`.

        guided = ksag.SAGDenoiser(denoiser, sag_scale=0.5, blur_sigma=2.0)
        K.sampling.sample_euler(guided, x, sigmas, extra_args={"cond": c, "uncond": uc, "cond_scale": 7.5})

    The settings of SAG are attributes of the wrapper, and may be assigned later, except `attention`.

    Args:
        inner_model, cfg_rule, cond_key, batch_cond, shared_kwargs, check_attention: see `GuidedDenoiser`.
        sag_scale: the `scale` of `SAG`.
        blur_sigma, blur_kernel_size, mask_threshold, attention, sigma_range, one_pass, every: see `SAG`.
    """

    def __init__(
        self, inner_model: nn.Module, sag_scale: float | Tensor = 0.5, blur_sigma: float = 2.0, *, blur_kernel_size: int = 9,
        mask_threshold: float = 1.0, attention: str | nn.Module = "middle", sigma_range: tuple[float, float] = (0.0, math.inf),
        one_pass: bool = False, every: int = 1, cfg_rule: Rule = plain, cond_key: str | None = "cond", batch_cond: bool = True,
        shared_kwargs: Sequence[str] = (), check_attention: bool = True,
    ):  # fmt: skip
        sag = SAG(
            sag_scale, blur_sigma, blur_kernel_size=blur_kernel_size, mask_threshold=mask_threshold, attention=attention,
            sigma_range=sigma_range, one_pass=one_pass, every=every,
        )  # fmt: skip
        super().__init__(
            inner_model, sag, cfg_rule=cfg_rule, cond_key=cond_key, batch_cond=batch_cond, shared_kwargs=shared_kwargs,
            check_attention=check_attention,
        )  # fmt: skip

    sag_scale, blur_sigma, blur_kernel_size = map(of_sag, ("scale", "blur_sigma", "blur_kernel_size"))
    mask_threshold, sigma_range, one_pass, every = map(of_sag, ("mask_threshold", "sigma_range", "one_pass", "every"))

    @property
    def tap(self) -> AttentionTap:
        return self._hooks.attention[0]

    def _settings(self) -> dict[str, Any]:
        names = ("sag_scale", "blur_sigma", "blur_kernel_size", "mask_threshold", "sigma_range", "one_pass", "every", *CHECKS)
        return {"attention": self.tap.path, **{name: getattr(self, name) for name in names}}
