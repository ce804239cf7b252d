"""Does a wrong `cond_key` get an error that names the setting?"""

import pytest
import torch
from torch import nn

import ksag
import ksag.adapters.diffusers as adapter
from tests.diffusers_pipelines import scheduler, unet
from tests.models import inputs, make_denoiser, unconditional


def call(denoiser, cond, channels=3, **options):
    _, sigma, _, _ = inputs()
    with ksag.SAGDenoiser(denoiser, **options) as guided:
        guided(torch.randn(2, channels, 16, 16), sigma, cond=cond)


UNEXPECTED = r"got an unexpected keyword argument '{}': inner_model does not take its conditioning under this name. "
SET = r"Set cond_key= to the keyword that inner_model takes"


def test_k_diffusions_own_model():
    message = UNEXPECTED.format("cond") + SET + r"\.$"
    with pytest.raises(TypeError, match=r"ImageDenoiserModelV1.forward\(\) " + message) as error:
        call(make_denoiser(), torch.zeros(2, 10))
    assert "unexpected keyword argument 'cond'" in str(error.value.__cause__)


@pytest.mark.parametrize("model", [unet(), unconditional().eval()])
def test_diffusers_unets(model):
    denoiser = adapter.denoiser(model, scheduler())
    with pytest.raises(TypeError, match=r"UNet2D\w*Model.forward\(\) " + UNEXPECTED.format("cond") + SET):
        call(denoiser, torch.zeros(2, 7, 32), channels=model.config.in_channels)


def test_a_dict_that_was_meant_as_keywords():
    denoiser = adapter.denoiser(unet(), scheduler())
    with pytest.raises(TypeError, match=SET + r" \(cond is a dict: if its keys are inner_model's keywords, set cond_key=None\)\."):
        call(denoiser, {"encoder_hidden_states": torch.zeros(2, 7, 32)}, channels=4)


def test_a_key_of_the_dict_that_the_model_does_not_take():
    denoiser = adapter.denoiser(unet(), scheduler())
    with pytest.raises(TypeError, match=UNEXPECTED.format("hidden_states") + r"Rename the key in cond and uncond\.$"):
        call(denoiser, {"hidden_states": torch.zeros(2, 7, 32)}, channels=4, cond_key=None)


def test_a_keyword_of_extra_args_is_pythons_own_error():
    _, sigma, cond, _ = inputs()
    with (
        ksag.SAGDenoiser(make_denoiser(), cond_key="mapping_cond") as guided,
        pytest.raises(TypeError, match=r"ImageDenoiserModelV1.forward\(\) got an unexpected keyword argument 'strength'$"),
    ):
        guided(torch.randn(2, 3, 16, 16), sigma, cond=cond, strength=1.0)


def test_an_error_inside_the_model_is_its_own():
    class Broken(nn.Module):
        """A model that makes a mistake itself."""

        def __init__(self):
            super().__init__()
            self.inner = make_denoiser()

        def forward(self, x, sigma, cond=None):
            return self.inner(x, sigma, cond=cond) if x is None else torch.nn.functional.relu(x, slope=cond)

    with pytest.raises(TypeError, match=r"relu\(\) got an unexpected keyword argument 'slope'$"):
        call(Broken(), torch.zeros(2, 10))
