"""Peak memory of a guided step at the shapes of Stable Diffusion: its real UNets, run on tensors that have sizes but no data.

What an operator takes for itself is not seen.
"""

import weakref

import gpu
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ksag
from ksag.adapters.diffusers import denoiser as as_denoiser
from ksag.model.conditioning import join

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
def peak(monkeypatch, model):
    """The peak memory of a guided step, and of the model alone with a number of rows."""
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    name, denoiser = model
    there = [*denoiser.parameters(), *denoiser.buffers()]

    def measure(side, directions=None, rows=None):
        with torch.no_grad(), WITHOUT_DATA:
            x, sigma, cond, uncond = gpu.make_inputs(name, side, 1)
            with PeakMemory(there) as memory:
                if rows is not None:
                    denoiser(torch.cat([x] * rows), torch.cat([sigma] * rows), **join(*[cond] * rows))
                else:
                    with ksag.GuidedDenoiser(denoiser, directions, cond_key=None) as guided:
                        for _ in range(2):
                            guided(x, sigma, cond=cond, uncond=uncond, cond_scale=7.5)
            return memory.peak

    return measure


DIRECTIONS = {
    "SD 1.5": [(2, []), (2, [ksag.SAG()]), (3, [ksag.SAG(one_pass=True)]), (3, [ksag.PAG()]), (3, [ksag.SEG()]),
               (3, [ksag.SEG(3.0, 2.0)]), (4, [ksag.SAG(one_pass=True), ksag.PAG()])],
    "SDXL": [(2, [ksag.SAG()]), (4, [ksag.SAG(one_pass=True), ksag.PAG()])],
}  # fmt: skip
"""For each model, directions after the number of rows that the largest pass has."""


@pytest.mark.slow
def test_a_guided_step_holds_little_more_than_the_model_with_as_many_rows(peak, model):
    name, side = model[0], {"SD 1.5": 64, "SDXL": 128}[model[0]]
    bare = {rows: peak(side, rows=rows) for rows in dict(DIRECTIONS[name])}
    for rows, directions in DIRECTIONS[name]:
        guided = peak(side, directions)
        assert bare[rows] <= guided <= 1.03 * bare[rows], f"{directions}: {guided / bare[rows]:.3f} of the model's own"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SD 1.5"], indirect=True)
def test_nor_does_it_with_an_outer_layer_at_128(peak, model):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    bare = {rows: peak(128, rows=rows) for rows in (2, 3)}
    for rows, direction in (2, ksag.SAG(attention=layer)), (3, ksag.PAG(attention=layer)), (3, ksag.SEG(attention=layer)):
        assert peak(128, [direction]) <= 1.03 * bare[rows]
