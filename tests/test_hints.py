"""Does a wrong `cond_key` get an error that names the keyword that the model takes?"""

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


def test_k_diffusions_own_model():
    with pytest.raises(TypeError, match=r"ImageDenoiserModelV1 does not take its conditioning as 'cond'. It takes mapping_cond, .*"
                       r"Make the SAGDenoiser with cond_key='mapping_cond'") as error:  # fmt: skip
        call(make_denoiser(), torch.zeros(2, 10))
    assert "unexpected keyword argument 'cond'" in str(error.value.__cause__)


@pytest.mark.parametrize(("model", "expected"), [(unet(), "encoder_hidden_states"), (unconditional().eval(), "class_labels")])
def test_diffusers_unets(model, expected):
    denoiser = adapter.denoiser(model, scheduler())
    with pytest.raises(TypeError, match=rf"UNet2D\w*Model does not take its conditioning as 'cond'.*cond_key='{expected}'"):
        call(denoiser, torch.zeros(2, 7, 32), channels=model.config.in_channels)


def test_a_dict_that_was_meant_as_keywords():
    denoiser = adapter.denoiser(unet(), scheduler())
    with pytest.raises(TypeError, match=r"Make the SAGDenoiser with cond_key=None, since cond is a dict of keywords"):
        call(denoiser, {"encoder_hidden_states": torch.zeros(2, 7, 32)}, channels=4)


def test_a_key_of_the_dict_that_the_model_does_not_take():
    denoiser = adapter.denoiser(unet(), scheduler())
    with pytest.raises(
        TypeError, match=r"cond has the key 'hidden_states', which UNet2DConditionModel does not take .*encoder_hidden"
    ):
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
        """A model with a mistake of its own."""

        def __init__(self):
            super().__init__()
            self.inner = make_denoiser()

        def forward(self, x, sigma, cond=None):
            return self.inner(x, sigma, cond=cond) if x is None else torch.nn.functional.relu(x, slope=cond)

    with pytest.raises(TypeError, match=r"relu\(\) got an unexpected keyword argument 'slope'$"):
        call(Broken(), torch.zeros(2, 10))


def test_a_layer_that_takes_one_argument():
    class Embedding(nn.Module):
        def forward(self, x):
            return x

    class Embeds(nn.Module):
        """A model that hands its conditioning to a layer that takes none."""

        def __init__(self):
            super().__init__()
            self.inner, self.embedding = make_denoiser(), Embedding()

        def forward(self, x, sigma, cond=None):
            return self.inner(self.embedding(x, cond=cond), sigma)

    with pytest.raises(TypeError, match=r"Embedding does not take its conditioning as 'cond'"):
        call(Embeds(), torch.zeros(2, 10))
