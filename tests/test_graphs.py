"""When a pass is captured and what is copied in. No GPU is needed: the `cuda` fixture replaces CUDA's graphs.

It records the operations that ran between begin and end, and a replay runs them again into the same tensors, so that outputs are
overwritten and inputs are read from fixed addresses, as on a GPU. tests/test_gpu.py has the real ones.
"""

import contextlib
import gc
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ksag
from ksag.attention import checker
from ksag.model import graphs
from ksag.samplers import SAMPLERS, sample
from tests import forms, reference


class Recorder(TorchDispatchMode):
    def __init__(self, ops):
        super().__init__()
        self.ops = ops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


class CPUGraph:
    """Used in place of torch.cuda.CUDAGraph."""

    replays = 0

    def __init__(self):
        self.ops = []

    def replay(self):
        CPUGraph.replays += 1
        with torch.autocast("cpu", enabled=False):  # what was recorded has autocast's casts in it
            for func, args, kwargs, out in self.ops:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


class Stream:
    cuda_stream = 0


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(graphs, "_on_cuda", lambda x: True)
    monkeypatch.setattr(CPUGraph, "replays", 0)
    for name, value in {
        "CUDAGraph": CPUGraph,
        "graph": lambda graph, *args, **kwargs: Recorder(graph.ops),
        "Stream": Stream,
        "current_stream": lambda device=None: Stream(),
        "device": lambda device: contextlib.nullcontext(),
        "graph_pool_handle": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def graphed(guided, limit=8):
    with pytest.warns(UserWarning, match="not on a CUDA device, so it runs without graphs"):
        return guided.use_cuda_graphs(limit)


def wrap(denoiser, limit=8, **options):
    return graphed(ksag.SAGDenoiser(denoiser, blur_kernel_size=5, **options), limit)


def call(guided, batch=2, size=(6, 8), sigma=3.0, cond_scale=2.0, **options):
    x, args = forms.latents(batch, size)
    with torch.no_grad():
        return guided(x * sigma, torch.full((batch,), sigma), **{**args, "cond_scale": cond_scale, **options})


def captured(guided):
    return guided._passes.graphs._kept.captured


def eager(denoiser, *args, options=None, **kwargs):
    with ksag.SAGDenoiser(denoiser, blur_kernel_size=5, **(options or {})) as guided:
        return call(guided, *args, **kwargs)


@pytest.fixture
def denoiser():
    return forms.tiny()


GRAPHS = {form: 2 if form in ("SAG", "SAG and PAG") else 1 for form in forms.FORMS} | {"SAG, every 2nd call": 3}
"""Exact SAG asks a second time, and of every other call only the batch is the same with it and without, but for what is read."""


@pytest.mark.parametrize("form", forms.FORMS)
def test_replays_give_the_eager_image_in_every_form(cuda, form):
    eager, guided = forms.wrap(form), graphed(forms.wrap(form))
    with torch.no_grad(), eager.trace() as expected_steps:
        expected = [forms.run(eager, seed=seed) for seed in range(2)]
    with torch.no_grad(), guided.trace() as steps:
        results = [forms.run(guided, seed=seed) for seed in range(2)]
    assert all(map(torch.equal, results, expected))
    assert reference.same_steps(steps, expected_steps) and steps
    assert CPUGraph.replays >= 8 > len(guided._passes.graphs) == GRAPHS[form]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("options", [{"sigma_range": (0.5, 4.0)}, {"one_pass": True, "every": 2}])
def test_replays_give_the_eager_image_under_every_sampler(cuda, denoiser, sampler, options):
    _, args = forms.latents()
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.0])
    plain = ksag.SAGDenoiser(denoiser, blur_kernel_size=5, **options)
    with plain.trace() as expected_steps:
        expected = sample(sampler, plain, (3, 6, 8), sigmas, [0, 1], args)
    guided = wrap(denoiser, **options)
    with guided.trace() as steps:
        result = sample(sampler, guided, (3, 6, 8), sigmas, [0, 1], args)
    assert torch.equal(result, expected)
    assert CPUGraph.replays > len(guided._passes.graphs) >= 2
    assert reference.same_steps(steps, expected_steps) and steps


def test_a_run_of_its_own_shares_the_graphs(cuda):
    form = "SAG in one pass, PAG and SEG"
    expected = [forms.run(forms.wrap(form), seed=seed) for seed in range(2)]
    guided = graphed(forms.wrap(form))
    with torch.no_grad():
        assert all(torch.equal(forms.run(guided.run(), seed=seed), expected[seed]) for seed in range(2))
    assert len(guided._passes.graphs) == 1


def test_no_attention_is_checked_under_graphs(cuda, monkeypatch):
    guided = graphed(forms.wrap("SAG and PAG"))
    with torch.no_grad():
        forms.run(guided)
        monkeypatch.setattr(checker, "error", lambda *_: pytest.fail("checked"))
        for seed in range(10):
            forms.run(guided, seed=seed)


def test_a_step_is_two_graphs_and_scales_take_no_more(cuda, denoiser):
    guided = wrap(denoiser)
    for options in {}, {"cond_scale": 5.0}, {"sag_scale": 2.0}, {"blur_sigma": 1.0}, {"mask_threshold": 0.9}, {"sigma": 1.0}:
        assert torch.equal(call(guided, **options), eager(denoiser, **options))
    assert len(guided._passes.graphs) == 2
    assert torch.equal(call(guided, sag_scale=0.0), eager(denoiser, sag_scale=0.0))
    assert len(guided._passes.graphs) == 3


def test_new_shapes_are_captured_by_themselves_within_the_limit(cuda, denoiser):
    guided = wrap(denoiser, limit=4)
    sizes = [(6, 8), (8, 6), (8, 8)]
    for size in sizes[:2]:
        call(guided, size=size)
    with pytest.warns(UserWarning, match=r"More than 4 CUDA graphs.*limit=\.\.\."):
        call(guided, size=sizes[2])
    assert len(guided._passes.graphs) == 4
    for size in sizes:
        assert torch.equal(call(guided, size=size), eager(denoiser, size=size))


def test_the_least_recently_used_is_dropped(cuda, denoiser):
    guided = wrap(denoiser, limit=4)
    call(guided, size=(6, 8))
    call(guided, size=(8, 6))
    call(guided, size=(6, 8))
    with pytest.warns(UserWarning, match="dropped"):
        call(guided, size=(8, 8))
    kept = {dict((place, shape) for place, shape, *_ in key[3])["latents[0]"] for key in captured(guided)}
    assert kept == {(2, 3, 6, 8), (2, 3, 8, 8)}


@pytest.mark.parametrize(
    "change", [lambda t: t.add_(1), lambda t: t.data.add_(1), lambda t: t.numpy().__iadd__(1), lambda t: setattr(t, "data", t + 1)]
)
def test_every_change_of_the_conditioning_is_seen(cuda, denoiser, change):
    x, args = forms.latents()
    sigma, args = torch.full((2,), 3.0), {**args, "cond": args["cond"].clone(), "uncond": args["uncond"].clone()}
    guided = wrap(denoiser)
    for name in "cond", "uncond":
        with torch.no_grad():
            before = guided(x, sigma, **args)
            change(args[name])
            result = guided(x, sigma, **args)
            with ksag.SAGDenoiser(denoiser, blur_kernel_size=5) as plain:
                assert torch.equal(result, plain(x, sigma, **args)) and not torch.equal(result, before)
    assert len(guided._passes.graphs) == 2


def test_weights_may_change_in_place_and_may_move(cuda, denoiser):
    guided = wrap(denoiser)
    first = call(guided)
    weight = next(p for p in denoiser.parameters() if p.ndim == 4)
    with torch.no_grad():
        weight.mul_(1.5)
    changed = call(guided)
    assert not torch.equal(changed, first) and torch.equal(changed, eager(denoiser))
    before = list(captured(guided).values())
    weight.data = weight.data / 1.5
    assert torch.equal(call(guided), eager(denoiser))
    assert not set(before) & set(captured(guided).values())


def test_gradients_run_eagerly(cuda, denoiser):
    x, args = forms.latents()
    x.requires_grad_()
    wrap(denoiser)(x, torch.full((2,), 3.0), **args).sum().backward()
    assert x.grad.norm() > 0 and CPUGraph.replays == 0


@pytest.mark.parametrize("inference_first", [False, True])
def test_inference_mode_and_no_grad_share_their_graphs(cuda, denoiser, inference_first):
    guided = wrap(denoiser)
    with torch.inference_mode(inference_first):
        call(guided)
    expected = eager(denoiser)
    with torch.inference_mode():
        x, args = forms.latents()
        x, sigma = x * 3.0, torch.full((2,), 3.0)
        assert torch.equal(guided(x, sigma, **args), expected)
        args["cond"].mul_(2)
        doubled = guided(x, sigma, **args)
    assert not torch.equal(doubled, expected)
    assert torch.equal(call(guided), expected) and len(guided._passes.graphs) == 2


def test_autocast_has_graphs_of_its_own(cuda, denoiser):
    guided = wrap(denoiser)
    plain = call(guided)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(guided), eager(denoiser))
    assert torch.equal(call(guided), plain) and len(guided._passes.graphs) == 4


def test_each_thread_captures_for_itself_and_frees_what_it_captured(cuda, denoiser):
    guided = wrap(denoiser)
    call(guided)
    results, graphs_of_threads = {}, weakref.WeakSet()

    def work(sigma):
        assert len(guided._passes.graphs) == 0
        results[sigma] = [call(guided, sigma=sigma) for _ in range(3)]
        graphs_of_threads.update(captured(guided).values())
        assert len(graphs_of_threads) == 2

    for sigma in 1.0, 5.0:
        thread = threading.Thread(target=work, args=(sigma,))
        thread.start()
        thread.join()  # one after the other: the stand-in records all that the process runs
        gc.collect()
        assert len(graphs_of_threads) == 0
    assert len(guided._passes.graphs) == 2
    for sigma, images in results.items():
        assert len(images) == 3 and all(torch.equal(image, eager(denoiser, sigma=sigma)) for image in images)


@pytest.mark.filterwarnings("ignore:More than 2 CUDA graphs")
def test_threads_take_turns_to_capture(cuda, monkeypatch):
    capturing, overlaps, failures, kept = [], [], [], []

    class Slow(graphs._Captured):
        def __init__(self, *args):
            overlaps.extend(capturing)
            capturing.append(self)
            time.sleep(0.005)
            super().__init__(*args)
            capturing.clear()

    def double(x):
        return x * 2

    def work(sizes):
        try:
            with torch.no_grad():
                for size in sizes * 3:
                    assert torch.equal(replayed(double, torch.ones(size)), torch.full((size,), 2.0))
            kept.append(len(replayed))
        except BaseException as failure:
            failures.append(failure)

    monkeypatch.setattr(graphs, "_Captured", Slow)
    replayed = graphs.CUDAGraphs(nn.Identity(), limit=2)
    threads = [threading.Thread(target=work, args=(sizes,)) for sizes in ([1, 2, 3], [4, 5, 6])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not overlaps and kept == [2, 2]


def test_keywords_are_part_of_the_signature_or_refused(cuda):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner_model = forms.tiny()

        def forward(self, x, sigma, bias=0.0, **kwargs):
            return self.inner_model(x, sigma, **kwargs) + (bias if isinstance(bias, float) else 0)

    guided = wrap(Biased())
    plain, biased = call(guided), call(guided, bias=1.0)
    assert not torch.equal(plain, biased) and len(guided._passes.graphs) == 4
    with pytest.raises(
        TypeError, match=r"inner_model is given a object as kwargs\['bias'\], and a CUDA graph would not see it change"
    ):
        call(guided, bias=object())


def test_a_model_that_cannot_be_captured_is_a_clear_error(cuda, denoiser, monkeypatch):
    class Fails(Recorder):
        def __exit__(self, *exc_info):
            super().__exit__(*exc_info)
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    guided = wrap(denoiser)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, *args, **kwargs: Fails(graph.ops))
    with pytest.raises(RuntimeError, match=r"could not be captured.*\.item\(\).*operation not permitted when stream is capturing$"):
        call(guided)
    assert len(guided._passes.graphs) == 0


def test_close_frees_the_graphs(cuda, denoiser):
    guided = wrap(denoiser)
    call(guided)
    guided.close()
    assert guided._passes.graphs is None
    assert torch.equal(call(guided, sag_scale=0.0), eager(denoiser, sag_scale=0.0))


def test_on_a_cpu_it_warns_and_runs_eagerly(denoiser):
    assert torch.equal(call(wrap(denoiser)), eager(denoiser))


def test_a_limit_below_one_step_is_an_error(denoiser):
    with pytest.raises(ValueError, match="limit must be 2 or more, since a guided step may replay two graphs, got 1"):
        ksag.SAGDenoiser(denoiser).use_cuda_graphs(1)
