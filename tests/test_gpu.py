"""What only a CUDA GPU can show: real graphs, no synchronisation, memory, half precision, Inductor's CUDA graphs."""

import gc
import threading

import k_diffusion as K
import pytest
import torch
from PIL import Image
from torch import nn

import ksag
from ksag.adapters.diffusers import denoiser as as_denoiser
from ksag.attention.saliency import MAX_LOGITS, _can_use_flash, saliency
from ksag.commands.pipeline import Pipeline
from ksag.commands.sampling import Sampling
from ksag.model.conditioning import transform
from ksag.samplers import SAMPLERS, sample
from tests import forms, reference
from tests.commands import invoke, pixels
from tests.diffusers_pipelines import scheduler
from tests.diffusers_pipelines import stable_diffusion as make_pipeline
from tests.diffusers_pipelines import unet as make_unet
from tests.models import inputs, make_denoiser

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def full_float32():
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def on_gpu(dtype=torch.float32, **sizes):
    denoiser = make_denoiser().to("cuda", dtype).eval().requires_grad_(False)
    x, sigma, cond, uncond = (t.to("cuda", dtype) for t in inputs(**sizes))
    return denoiser, x, sigma, {"cond": cond, "uncond": uncond, "cond_scale": 2.0}


def wrap(denoiser, **options):
    return ksag.SAGDenoiser(denoiser, cond_key="mapping_cond", **options)


def stable_diffusion(dtype, compute=None):
    """A small diffusers UNet in `dtype` under float32 latents, as people sample in half precision; its weights and
    conditioning rounded to `dtype`, then computed in `compute`.
    """
    compute = compute or dtype
    torch.manual_seed(0)
    cond, uncond = ({"encoder_hidden_states": torch.randn(2, 7, 32, device="cuda").to(dtype).to(compute)} for _ in range(2))
    x = torch.randn(2, 4, 16, 24, device="cuda")
    unet = make_unet().to("cuda", dtype).to(compute)
    return as_denoiser(unet, scheduler()), x, {"cond": cond, "uncond": uncond, "cond_scale": 2.0}


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def moved(args):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def on_the_gpu(form, dtype=torch.float32):
    """A wrapper that takes its tensors from the CPU, and gives them back there."""
    guided = forms.wrap(form, forms.tiny().to("cuda", dtype))
    return guided, lambda x, sigma, **args: guided(x.cuda(), sigma.cuda(), **moved(args)).cpu()


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_is_what_it_is_on_a_cpu(form, graphed):
    expected = forms.run(forms.wrap(form, forms.tiny().double()), dtype=torch.float64)  # where no token changes sides
    guided, call = on_the_gpu(form, torch.float64)
    if graphed:
        guided.use_cuda_graphs()
    with torch.no_grad():
        for _ in range(3):
            assert relative(forms.run(call, dtype=torch.float64), expected) < 1e-10
            guided.reset()


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_in_half_precision(form, dtype, graphed):
    """At threshold 0 all is masked, so that rounding moves no token across it."""
    options = {"mask_threshold": 0.0} if "SAG" in form else {}
    expected = forms.run(forms.wrap(form), **options)
    guided, call = on_the_gpu(form, dtype)
    if graphed:
        guided.use_cuda_graphs()
    with torch.no_grad():
        result = forms.run(call, dtype=dtype, **options)
    assert result.dtype == dtype and relative(result, expected) < 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("form", [form for form in forms.FORMS if "every" not in form])  # which reads sigma
def test_no_form_synchronises(form, graphed):
    guided, _ = on_the_gpu(form)
    x, args = forms.latents()
    x, args, sigma = x.cuda(), moved(args), torch.full((2,), 3.0, device="cuda")
    if graphed:
        guided.use_cuda_graphs()
    with torch.no_grad():
        guided(x, sigma, **args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(1, 9):  # calls 2, 4 and 8 check the attention again
                guided(x + i, sigma * 0.9**i, **args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphed", [False, True])
def test_a_change_that_shows_nowhere_is_found_later_without_waiting(graphed):
    """Under graphs a change would not even run: what was captured is replayed."""

    guided, _ = on_the_gpu("SAG and PAG")
    layer = guided.inner_model.middle_block[0].attn1
    factor = [1.0]

    def forward(x):
        q, k, v = (to(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v))
        weights = torch.softmax(q @ k.mT * (factor[0] * q.shape[-1] ** -0.5), dim=-1)
        return layer.to_out((weights @ v).transpose(1, 2).flatten(2))

    layer.forward = forward
    x, args = forms.latents()
    x, args, sigma = x.cuda(), moved(args), torch.full((2,), 3.0, device="cuda")
    if graphed:
        guided.use_cuda_graphs()
    with torch.no_grad():
        expected = guided(x, sigma, **args)
        factor[0] = 4.0
        if graphed:
            assert all(torch.equal(guided(x, sigma, **args), guided(x, sigma, **args)) for _ in range(10))
            assert relative(guided(x, sigma, **args), expected) < 1e-5
            return
        with pytest.raises(ValueError, match="found at guided call 2 of those that use this layer; it was right at call 1"):
            for _ in range(4):
                guided(x, sigma, **args)
                torch.cuda.synchronize()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("form", ["SAG and PAG", "SAG in one pass, PAG and SEG", "a user's own"])
def test_a_compiled_model_gives_the_eager_image_in_every_form(form, mode):
    expected = forms.run(forms.wrap(form))
    guided, call = on_the_gpu(form)
    with torch.no_grad():
        forms.run(call)
        guided.inner_model = torch.compile(guided.inner_model, mode=mode, fullgraph=True)
        for _ in range(2):
            guided.reset()
            assert relative(forms.run(call), expected) < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphed_samples_are_the_eager_ones(sampler):
    denoiser, _, _, args = on_gpu()
    sigmas = K.sampling.get_sigmas_karras(6, 0.05, 10.0, device="cuda")
    eager, graphed = wrap(denoiser, sigma_range=(0.2, 5.0)), wrap(denoiser, sigma_range=(0.2, 5.0)).use_cuda_graphs()
    with eager.trace() as expected_steps:
        expected = sample(sampler, eager, (3, 12, 16), sigmas, [0, 1], args)
    with graphed.trace() as steps:
        result = sample(sampler, graphed, (3, 12, 16), sigmas, [0, 1], args)
    assert relative(result, expected) < 1e-5
    assert len(steps) == len(expected_steps) > 0
    for step, wanted in zip(steps, expected_steps, strict=True):
        pairs = zip(reference.tensors(step), reference.tensors(wanted), strict=True)
        assert step.name == wanted.name and all(relative(a, b) < 1e-4 for a, b in pairs)
    assert len(graphed._passes.graphs) == 3


def random_denoiser():
    denoiser, x, sigma, args = on_gpu()
    return wrap(denoiser), x, sigma, args


def random_stable_diffusion():
    denoiser, x, args = stable_diffusion(torch.float16)
    return ksag.SAGDenoiser(denoiser, cond_key=None), x, torch.full((2,), 3.0, device="cuda"), args


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("model", [random_denoiser, random_stable_diffusion])
def test_no_synchronisation_and_no_copy_from_or_to_the_host_in_a_guided_step(model, one_pass, graphed):
    guided, x, sigma, args = model()
    guided.one_pass = one_pass
    if graphed:
        guided.use_cuda_graphs()
    other = transform(torch.neg, args["cond"])
    with torch.no_grad():
        guided(x, sigma, **args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            guided(x + 1, sigma * 2, **args)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                guided(x + 1, sigma * 2, **{**args, "cond": other}, sag_scale=1.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    names = {event.key for event in profile.key_averages()}
    assert len(names) > (3 if graphed else 20) and not {name for name in names if "HtoD" in name or "DtoH" in name}


def test_a_changed_conditioning_changed_weights_and_moved_weights_are_seen():
    denoiser, x, sigma, args = on_gpu()
    eager, graphed = wrap(denoiser), wrap(denoiser).use_cuda_graphs()
    with torch.no_grad():

        def same():
            assert relative(graphed(x, sigma, **args), eager(x, sigma, **args)) < 1e-5

        same()
        args["cond"].mul_(2)
        same()
        args["uncond"] = args["uncond"] + 1
        same()
        for p in denoiser.parameters():
            p.mul_(1.01)
        same()
        denoiser.cpu()
        denoiser.cuda()
        same()


def test_two_threads_with_one_graphed_wrapper():
    denoiser, x, _, args = on_gpu()
    graphed, eager = wrap(denoiser).use_cuda_graphs(), wrap(denoiser)
    results = {}

    def work(value):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            sigma = torch.full((2,), value, device="cuda")
            results[value] = [graphed(x, sigma, **args) for _ in range(10)]
            torch.cuda.current_stream().synchronize()  # not the device: the other thread may be capturing

    threads = [threading.Thread(target=work, args=(value,)) for value in (0.5, 6.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.keys() == {0.5, 6.0}
    with torch.no_grad():
        for value, images in results.items():
            expected = eager(x, torch.full((2,), value, device="cuda"), **args)
            assert len(images) == 10 and all(relative(image, expected) < 1e-5 for image in images)


def test_what_a_graph_computes_in_is_the_graphs_own_memory():
    """A workspace of cuBLAS that came from elsewhere would be freed under the graph: by Inductor, which clears them all around
    each capture of its own, and by a PyTorch that clears a stream's when a graph captured there is dropped.
    """
    denoiser, x, sigma, args = on_gpu()
    guided = wrap(denoiser).use_cuda_graphs()
    torch._C._cuda_clearCublasWorkspaces()
    with torch.no_grad():
        guided(x, sigma, **args)
    (lane,) = guided._passes.graphs._kept.lanes.values()
    pools = [
        segment["segment_pool_id"]
        for segment in torch.cuda.memory_snapshot() if segment["stream"] == lane.stream.cuda_stream
        for block in segment["blocks"] if block["state"] == "active_allocated" and block["size"] >= 2**20
    ]  # fmt: skip
    assert set(pools) == {lane.pool}  # among them a workspace: the images of this model are smaller


def test_a_model_that_reads_values_is_refused_and_leaves_the_gpu_usable():
    class Reads(nn.Module):
        def __init__(self, inner_model):
            super().__init__()
            self.inner_model = inner_model

        def forward(self, x, sigma, **kwargs):
            assert sigma.max().item() > 0
            return self.inner_model(x, sigma, **kwargs)

    denoiser, x, sigma, args = on_gpu()
    guided = wrap(Reads(denoiser)).use_cuda_graphs()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="could not be captured as a CUDA graph"):
            guided(x, sigma, **args)
        assert relative(wrap(denoiser).use_cuda_graphs()(x, sigma, **args), wrap(denoiser)(x, sigma, **args)) < 1e-5


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 60.0])  # K.layers.Denoiser squares sigma, and 256² is infinite in float16
def test_half_precision_weights(dtype, magnitude, graphed):
    denoiser, x, sigma, args = on_gpu(dtype)
    guided = wrap(denoiser)
    if graphed:
        guided.use_cuda_graphs()
    with torch.no_grad():
        result = guided(x * magnitude, sigma * magnitude, **args)
        exact = wrap(denoiser.double())(x.double() * magnitude, sigma.double() * magnitude,
                                        **{**args, "cond": args["cond"].double(), "uncond": args["uncond"].double()})  # fmt: skip
    assert result.dtype == dtype and result.isfinite().all()
    assert relative(result, exact) < (0.03 if dtype == torch.float16 else 0.3)


@pytest.mark.parametrize("latent_dtype", [torch.float16, torch.float32])
def test_a_float16_unet_at_latents_of_large_magnitude(latent_dtype):
    denoiser, x, args = stable_diffusion(torch.float16)
    sigma = torch.full((2,), 4000.0, device="cuda")  # about what a zero terminal SNR is given
    with torch.no_grad():
        for guided in ksag.SAGDenoiser(denoiser, cond_key=None), ksag.SAGDenoiser(denoiser, cond_key=None).use_cuda_graphs():
            result = guided((x * sigma[0]).to(latent_dtype), sigma, **args)
            assert result.isfinite().all() and result.abs().max() > 100


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_around_the_sampler(dtype, graphed):
    denoiser, x, _, args = on_gpu()
    sigmas = K.sampling.get_sigmas_karras(6, 0.05, 500.0, device="cuda")
    exact = K.sampling.sample_euler(wrap(denoiser), x * 500, sigmas, extra_args=args, disable=True)
    guided = wrap(denoiser)
    if graphed:
        guided.use_cuda_graphs()
    with torch.autocast("cuda", dtype):
        result = K.sampling.sample_euler(guided, x * 500, sigmas, extra_args=args, disable=True)
    assert result.isfinite().all() and relative(result, exact) < (0.05 if dtype == torch.float16 else 0.3)


@pytest.mark.parametrize("spread", [1.0, 4.0])  # of the logits: nearly even attention, and attention to few tokens
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 24, 2048, 2381, 64), (2, 5, 1501, 1777, 72), (1, 6, 4096, 4608, 128)])
def test_the_saliency_of_large_attention_is_the_definition(shape, dtype, spread):
    b, heads, queries, keys, dim = shape
    q = torch.randn(b, queries, heads, dim, device="cuda").to(dtype).transpose(1, 2)  # as layers give them
    k = (torch.randn(b, keys, heads, dim, device="cuda") * spread).to(dtype).transpose(1, 2)
    image = slice(0, queries)
    received = sum(torch.softmax(q[:, i].double() @ k[:, i].double().mT * 0.125, -1).sum(1) for i in range(heads))[:, image]
    expected = received / received.mean(1, keepdim=True)
    result = saliency(q, k, 0.125, image).double()
    assert (result / expected - 1).abs().max() < (1e-5 if dtype == torch.float32 else 1e-4)
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(saliency(q, k, 0.125, image).double(), result)
    compiled = torch.compile(saliency, fullgraph=True)(q, k, 0.125, image).double()
    assert (compiled / expected - 1).abs().max() < 1e-5  # in float32 there


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_and_queries_whose_channels_are_not_adjacent(dtype):
    """As layers give them that attend over (b, channels, tokens)."""
    q, k = (torch.randn(1, 8, 64, 1024, device="cuda", dtype=dtype).mT for _ in range(2))
    torch.testing.assert_close(saliency(q, k, 0.125), saliency(q.contiguous(), k.contiguous(), 0.125), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 8, 4096, 160), (1, 20, 4096, 64), (4, 20, 1024, 64), (4, 24, 4096, 64)])
def test_the_saliencys_working_set_is_bounded(shape):
    b, heads, tokens, dim = shape
    q, k = (torch.randn(b, tokens, heads, dim, device="cuda", dtype=torch.float16).transpose(1, 2) for _ in range(2))
    saliency(q, k, shape[-1] ** -0.5)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = saliency(q, k, shape[-1] ** -0.5)
    peak = torch.cuda.max_memory_allocated() - before
    copies = 0 if _can_use_flash(q, k, None) else 4 * (q.numel() + k.numel())
    assert peak <= 3 * 4 * MAX_LOGITS + copies + 4 * 2**20
    assert result.mean(1).sub(1).abs().max() < 1e-5


def check_agrees(result, eager, exact):
    """In float32 the eager image; in float16, where the eager one rounds more often, an image as near to float32's as that."""
    if exact is None:
        assert relative(result, eager) < 1e-5
    else:
        assert relative(result, exact) < 1.2 * relative(eager, exact) < 0.01


def smooth(dtype):
    """In float16 a token within rounding of the threshold would change sides, and the image with it, by more than it rounds."""
    return {"mask_threshold": 0.0} if dtype == torch.float16 else {}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"sigma_range": (0.2, 5.0)}, {"batch_cond": False}])
def test_a_compiled_unet_samples_the_eager_image(mode, dtype, options):
    sigmas = K.sampling.get_sigmas_karras(6, 0.05, 10.0, device="cuda")
    samplers = K.sampling.sample_euler, K.sampling.sample_dpmpp_2m

    def images(denoiser, x, args):
        guided = ksag.SAGDenoiser(denoiser, cond_key=None, **smooth(dtype), **options)
        eager = [sampler(guided, x * 10, sigmas, extra_args=args, disable=True) for sampler in samplers]
        return guided, eager

    exact = images(*stable_diffusion(dtype, compute=torch.float32))[1] if dtype == torch.float16 else [None, None]
    denoiser, x, args = stable_diffusion(dtype)
    guided, eager = images(denoiser, x, args)
    denoiser.inner_model = torch.compile(denoiser.inner_model, mode=mode, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    results = [sampler(guided, x * 10, sigmas, extra_args=args, disable=True) for sampler in samplers]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    samplers[0](guided, x * 9, sigmas * 0.9, extra_args=args, disable=True)
    for triple in zip(results, eager, exact, strict=True):
        check_agrees(*triple)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_whole_wrapper_compiled_gives_the_eager_image(dtype):
    sigma = torch.full((2,), 3.0, device="cuda")

    def step(denoiser, x, args, compile_=lambda guided: guided):
        with torch.no_grad():
            return compile_(ksag.SAGDenoiser(denoiser, cond_key=None, **smooth(dtype)))(x * 3, sigma, **args)

    exact = step(*stable_diffusion(dtype, compute=torch.float32)) if dtype == torch.float16 else None
    result = step(*stable_diffusion(dtype), lambda guided: torch.compile(guided, fullgraph=True))
    check_agrees(result, step(*stable_diffusion(dtype)), exact)


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_compiled_unet_can_be_graphed(one_pass):
    """In one pass, the second call at the same x and sigma is exact SAG."""
    denoiser, x, sigma, args = on_gpu()
    guided = wrap(denoiser, one_pass=one_pass)
    with torch.no_grad():
        expected = wrap(denoiser)(x, sigma, **args)
        guided(x, sigma, **args)
        denoiser.inner_model = torch.compile(denoiser.inner_model, fullgraph=True)
        guided.use_cuda_graphs()
        for _ in range(2):
            assert relative(guided(x, sigma, **args), expected) < 1e-5


@pytest.mark.parametrize("option", ["--cuda-graphs", "--offload"])
def test_the_command_makes_the_same_pictures_with(tmp_path, option):
    """Of a tiny pipeline; the second picture replays the first one's graphs, or finds the parts where the first one left them."""
    make_pipeline(tmp_path)
    prompts = "--prompt", "a cat", "--prompt", "a dog"
    for folder, options in ("plain", []), ("other", [option]):
        invoke("sample", "--pipeline", tmp_path / "pipe", *prompts, "--device", "cuda", "--dtype", "float32", "--steps", 4,
               *options, "--out", tmp_path / folder)  # fmt: skip
    plain, other = ([pixels(tmp_path / folder / f"00000{seed}.png") for seed in range(2)] for folder in ("plain", "other"))
    assert (plain[0] - plain[1]).abs().max() > 1
    assert all((a - b).abs().max() <= 1 for a, b in zip(plain, other, strict=True))  # of 255


def test_offload_keeps_the_vae_off_the_gpu_while_the_unet_works(tmp_path):
    """From a picture, which the VAE encodes before the first step; and it has decoded one before the second picture's."""
    make_pipeline(tmp_path)
    Image.effect_noise((16, 16), 64).save(tmp_path / "picture.png")
    args = {"prompt": ["a cat"], "image": tmp_path / "picture.png", "offload": True}
    model = Pipeline(str(tmp_path / "pipe"), torch.device("cuda", 0), torch.float32, **args)
    where = []
    model.pipe.unet.register_forward_pre_hook(lambda *_: where.append(model.pipe.vae.device.type))
    with ksag.SAGDenoiser(model.denoiser, cond_key=None) as guided:
        sampling = Sampling(model, guided, "euler", model.sigmas(4, "model"))
        for seed in range(2):
            sampling.pictures([seed])
    assert set(where) == {"cpu"}
    parts = model.pipe.unet, model.pipe.vae, model.pipe.text_encoder
    assert all(weight.device.type == "cpu" for part in parts for weight in part.parameters())
