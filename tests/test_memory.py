"""Peak memory of a guided step at the shapes of Stable Diffusion: its real UNets, run on tensors that have sizes but no data.

What an operator takes for itself is not seen; the figures are held against those that benchmarks/gpu.py measured on a GPU.
"""

import json
import weakref
from pathlib import Path

import gpu
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ksag
from ksag.adapters.diffusers import denoiser as as_denoiser

MEASURED = json.loads((Path(gpu.__file__).parent / "gpu.json").read_text())["memory"]
WITHOUT_DATA = FakeTensorMode(allow_non_fake_inputs=True)


class PeakMemory(TorchDispatchMode):
    """The most bytes held at once by the storages that come up while the mode is entered."""

    def __init__(self, there):
        super().__init__()
        self.known = {id(tensor.untyped_storage()) for tensor in there}
        self.held = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(storage := leaf.untyped_storage()) not in self.known:
                self.known.add(id(storage))
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return result

    def _freed(self, key, size):
        self.known.discard(key)
        self.held -= size


@pytest.fixture(scope="module", params=["SD 1.5", "SDXL"])
def model(request):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)  # for tensors without data have no .half()
    try:
        with WITHOUT_DATA:
            unet = UNet2DConditionModel(**gpu.UNETS[request.param]).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    return request.param, as_denoiser(unet, gpu.scheduler())


@pytest.fixture
def step(monkeypatch, model):
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    name, denoiser = model
    there = [*denoiser.parameters(), *denoiser.buffers()]

    def peak(side, attention="middle", **options):
        with torch.no_grad(), WITHOUT_DATA, ksag.SAGDenoiser(denoiser, attention=attention, cond_key=None) as guided:
            inputs = gpu.make_inputs(name, side, 1)
            with PeakMemory(there) as memory:
                gpu.guided_step(guided, inputs, **options)()
            return memory.peak

    return peak


@pytest.mark.slow
@pytest.mark.parametrize("side", gpu.SIDES)
def test_a_guided_step_holds_no_more_than_plain_cfg(step, model, side):
    cfg, guided = step(side, sag_scale=0.0), step(side)
    [measured] = [m[gpu.CFG] for m in MEASURED if (m["model"], m["side"]) == (model[0], side)]
    assert cfg == pytest.approx(measured, rel=0.05) and guided <= 1.001 * cfg


@pytest.mark.slow
def test_nor_does_it_with_an_outer_layer_at_128(step, model):
    block = "down_blocks.0" if model[0] == "SD 1.5" else "down_blocks.1"
    guided = step(128, attention=f"{block}.attentions.0.transformer_blocks.0.attn1")
    assert guided <= 1.001 * step(128, sag_scale=0.0)
