"""Is what `ksag.zoo` loads what was saved, and is a damaged or foreign file an error that names it?"""

import json
import random
import re
from pathlib import Path

import k_diffusion as K
import pytest
import torch
import train_emoji
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ksag
from ksag import zoo
from ksag.samplers import sample
from ksag.zoo import files
from tests.models import randomise

ROOT = Path(__file__).parents[1]

# The bundled model


def test_the_bundled_model_is_small_and_carries_its_config():
    assert zoo.EMOJI.stat().st_size <= 24 * 2**20
    assert all(t.dtype == torch.float16 for t in load_file(zoo.EMOJI).values())
    assert zoo.load_config() == K.config.load_config(config_of_the_training())
    assert K.config.load_config(zoo.EMOJI) == zoo.load_config()  # k-diffusion itself can read the file


def test_load_returns_a_k_diffusion_denoiser(bundled):
    assert isinstance(bundled, K.layers.Denoiser) and bundled.sigma_data == 0.6
    assert isinstance(bundled.inner_model, K.models.ImageDenoiserModelV1)
    assert not bundled.training and not any(p.requires_grad for p in bundled.parameters())


def test_the_categories_and_styles_are_those_of_the_config():
    dataset = zoo.load_config()["dataset"]
    assert list(zoo.CATEGORIES) == dataset["categories"] and list(zoo.STYLES) == dataset["styles"]


def test_conditioning_is_one_hot_category_beside_one_hot_style():
    cond, uncond = zoo.conditioning(["Smileys & Emotion", None, "Symbols", None], ["emojione", "noto", None, None])
    assert cond.dtype == torch.float32 and not uncond.any() and uncond.shape == (4, 15)
    assert cond.nonzero().tolist() == [[0, 0], [0, 14], [1, 8], [2, 7]] and set(cond.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(zoo.conditioning(["Objects"])[0], torch.eye(15)[[6]])
    assert zoo.conditioning([])[0].shape == (0, 15)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            (["Objects", "Food"],),
            ValueError,
            r"'Food' is not one of .* categories: Smileys & Emo.*Symbols; None is any",
        ),
        (
            (["Objects"], ["notto"]),
            ValueError,
            r"'notto' is not one of .* styles: noto, noto-v1, .*None",
        ),
        ((["Objects"], ["noto", None]), ValueError, "Give a category and a style for each sample, got 1 categories and 2 styles"),
        (("Objects",), ValueError, "'O' is not one of the bundled model's categories: Smileys"),
    ],
)
def test_conditioning_for_what_the_model_does_not_know(given, error, message):
    with pytest.raises(error, match=message):
        zoo.conditioning(*given)


def test_one_hot_has_zeros_for_no_class_and_refuses_an_unknown_one():
    assert torch.equal(zoo.one_hot([2, None, 0], 3), torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]]))
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        zoo.one_hot([3], 3)


def test_the_bundled_model_denoises_and_knows_its_categories_and_styles(bundled):
    """On its own samples: noise that is added comes off again, and better so with the right category and style."""
    categories, styles = ["Smileys & Emotion", "Objects"], ["noto", "emojione"]
    cond, uncond = zoo.conditioning(categories, styles)
    x = sample("dpmpp_2m", bundled, (3, 64, 64), K.sampling.get_sigmas_karras(6, 0.02, 80.0), range(2), {"mapping_cond": cond})
    assert x.abs().max() < 1.6 and x.std() > 0.2
    noise = torch.randn_like(x)

    def denoised(cond, sigma):
        return bundled(x + noise * sigma, torch.full((2,), sigma), mapping_cond=cond)

    right = denoised(cond, 8.0)
    assert (denoised(cond, 0.5) - x).square().mean() < 0.1 * 0.5**2
    assert (right - x).square().mean() < (denoised(uncond, 8.0) - x).square().mean()
    for other in zoo.conditioning(categories[::-1], styles)[0], zoo.conditioning(categories, styles[::-1])[0]:
        assert (denoised(other, 8.0) - right).abs().amax((1, 2, 3)).min() > 0.05


def test_the_recommended_settings_guide_the_bundled_model(bundled):
    sag, pag = zoo.directions()
    assert all(getattr(sag, name) == value for name, value in zoo.SETTINGS.items() if name != "sag_scale")
    assert [direction.scale for direction in zoo.directions(2.0, 0.0)] == [2.0, 0.0]
    assert zoo.SETTINGS["attention"] in repr(ksag.SAGDenoiser(bundled, cond_key="mapping_cond", **zoo.SETTINGS))
    guided = ksag.GuidedDenoiser(bundled, [sag, pag], cond_key="mapping_cond")
    x, sigma, args = torch.randn(2, 3, 64, 64) * 2, torch.full((2,), 2.0), {"cond": zoo.conditioning(["Objects", None])[0]}
    with guided.trace() as steps:
        guided(x, sigma, **args)
    assert [step.name for step in steps] == ["SAG", "PAG"] and all(step.direction.abs().max() > 1e-3 for step in steps)
    assert steps[0].saliency.shape == (2, 16, 16) and 0.1 < steps[0].mask.mean() < 0.9


# Files that are whole


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights.safetensors"


def config_of_the_training():
    """What scripts/train_emoji.py writes beside weights that scripts/emoji.json made it train."""
    return train_emoji.inference_config(json.loads((ROOT / "scripts/emoji.json").read_text()))


def small_config():
    """The bundled model's, smaller, so that a file is loaded in milliseconds."""
    config = config_of_the_training()
    config["model"] |= {"channels": [32, 32], "depths": [1, 1], "self_attn_depths": [False, True], "mapping_out": 32}
    return config


def small_model():
    torch.manual_seed(0)
    return randomise(K.config.make_model(K.config.load_config(small_config()))).half().float()


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_what_is_saved_is_loaded(weights):
    model, config = small_model(), small_config()
    zoo.save(model.state_dict(), weights, config, {"steps": 3})
    assert same(zoo.load(weights).inner_model.state_dict(), model.state_dict())
    assert zoo.load_config(weights) == K.config.load_config(config) == K.config.load_config(weights)
    with safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["training"]) == {"steps": 3}


def test_the_bundled_file_is_as_save_writes_it(weights, bundled):
    with safe_open(zoo.EMOJI, "pt") as file:
        metadata = file.metadata()
    zoo.save(bundled.inner_model.state_dict(), weights, json.loads(metadata["config"]), json.loads(metadata["training"]))
    with safe_open(weights, "pt") as file:
        assert file.metadata() == metadata


def test_checksum_is_of_names_dtypes_shapes_bytes_and_metadata():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(1.5, dtype=torch.float16)}
    metadata = {"config": "{}"}
    expected = files.checksum(tensors, metadata)
    assert expected == files.checksum(dict(reversed(tensors.items())), metadata | {"sha256": "?"})
    assert expected == files.checksum(tensors | {"b": tensors["b"].T.contiguous().T}, metadata)
    different = [
        (tensors | {"b": tensors["b"].reshape(3, 2)}, metadata),
        (tensors | {"b": tensors["b"].view(torch.int32)}, metadata),
        (tensors | {"b": tensors["b"].nextafter(torch.tensor(9.0))}, metadata),
        ({"b": tensors["b"], "c": tensors["a"]}, metadata),
        (tensors, {"config": "[]"}),
        (tensors, metadata | {"training": ""}),
    ]
    assert len({expected, *(files.checksum(*other) for other in different)}) == 1 + len(different)


def test_k_diffusions_own_file_has_no_checksum_and_loads(weights):
    """As its convert_for_inference.py writes it."""
    model = small_model()
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(state, weights, metadata={"config": json.dumps(small_config(), indent=4)})
    assert same(zoo.load(weights).inner_model.state_dict(), model.state_dict())


# Files that are damaged


def replace_bytes(data, start, end, generator):
    """One to three bytes between start and end, by random ones."""
    for _ in range(generator.randint(1, 3)):
        data[generator.randrange(start, end)] = generator.randrange(256)


def damage_header(data, generator):
    replace_bytes(data, 0, 8 + int.from_bytes(data[:8], "little"), generator)


def damage_header_letter(data, generator):
    """A letter or a digit by another, so that the header remains JSON."""
    letters = [i for i in range(8, 8 + int.from_bytes(data[:8], "little")) if chr(data[i]).isalnum()]
    data[generator.choice(letters)] = ord(generator.choice("0123456789abcdeftrues"))


def damage_config_number(data, generator):
    start = data.index(b"config")
    digits = [i for i in range(start, data.index(b"ema_sched")) if chr(data[i]).isdigit()]
    data[generator.choice(digits)] = ord(generator.choice("0123456789"))


def damage_tensors(data, generator):
    replace_bytes(data, 8 + int.from_bytes(data[:8], "little"), len(data), generator)


def damage_sector(data, generator):
    start = generator.randrange(len(data) - 512)
    data[start : start + 512] = bytes(512)


def exchange_names(data, generator):
    """Two tensors' names, of the same length."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    a = generator.choice(names)
    b = generator.choice([name for name in names if len(name) == len(a)])
    swapped = {{a: b, b: a}.get(name, name): entry for name, entry in header.items()}
    data[8:end] = json.dumps(swapped, separators=(",", ":")).encode().ljust(end - 8)


def cut_off(data, generator):
    del data[generator.randrange(len(data)) :]


def lengthen(data, generator):
    data += generator.randbytes(generator.randint(1, 64))


@pytest.mark.parametrize(
    "damage",
    [
        damage_header, damage_header_letter, damage_config_number, damage_tensors, damage_sector, exchange_names, cut_off, lengthen,
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_it_or_the_same_model(weights, damage):
    model = small_model()
    zoo.save(model.state_dict(), weights, small_config(), {"steps": 3})
    whole, expected, config = weights.read_bytes(), model.state_dict(), zoo.load_config(weights)
    generator = random.Random(0)
    refused = 0
    for _ in range(30):
        damaged = bytearray(whole)
        damage(damaged, generator)
        weights.write_bytes(damaged)
        try:
            denoiser = zoo.load(weights)
        except ValueError as error:
            assert "weights.safetensors" in str(error)
            refused += 1
        else:
            assert same(denoiser.inner_model.state_dict(), expected) and zoo.load_config(weights) == config
    assert refused >= 15


def test_a_file_whose_checksum_was_taken_out(weights):
    save_file(load_file(zoo.EMOJI), weights, {"config": json.dumps(small_config()), "training": "{}"})
    with pytest.raises(ValueError, match=r"weights.safetensors has no checksum .* it is damaged"):
        zoo.load(weights)


# Files of another kind


def test_truncated_weights(weights):
    weights.write_bytes(zoo.EMOJI.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"weights.safetensors is cut off, or not a safetensors file"):
        zoo.load(weights)


@pytest.mark.parametrize("content", [b"PK\x03\x04 this is a zip, or a pickle, or a picture", b""])
def test_foreign_file(weights, content):
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.safetensors is cut off, or not a safetensors file"):
        zoo.load(weights)


def test_a_pickled_checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": small_model().state_dict()}, path)
    with pytest.raises(ValueError, match=r"model.ckpt is .* not a safetensors file.*convert_for_inference.py"):
        zoo.load(path)


def test_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        zoo.load(tmp_path)


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"config": '{"model": '}, {"config": "[]"}])
def test_weights_of_another_library(weights, metadata):
    save_file({"conv_in.weight": torch.zeros(1)}, weights, metadata)
    with pytest.raises(ValueError, match=r"weights.safetensors has no k-diffusion config in its metadata.*ksag.adapters.diffusers"):
        zoo.load(weights)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("{}", "KeyError: 'model'"),
        ('{"model": {"type": "image_v1"}}', "KeyError: 'input_channels'"),
        ('{"model": {"type": "flux"}}', "unsupported model type flux"),
        (json.dumps(small_config() | {"model": small_config()["model"] | {"depths": "two"}}), "TypeError"),
    ],
)
def test_a_config_that_k_diffusion_cannot_build_from(weights, config, error):
    save_file({"a": torch.zeros(1)}, weights, {"config": config})
    with pytest.raises(ValueError, match=rf"weights.safetensors has a config that k-diffusion cannot build .* from: .*{error}"):
        zoo.load(weights)


def test_weights_that_do_not_fit_their_config(weights):
    save_file({"a": torch.zeros(1)}, weights, {"config": json.dumps(small_config())})
    with pytest.raises(ValueError, match=r"(?s)weights.safetensors has a config that .*Missing key.*Unexpected key.*\"a\""):
        zoo.load(weights)


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors"):
        zoo.load("nowhere.safetensors")
