"""Does `load` take a diffusers folder and a single file as they are, and say what another file lacks?"""

import pickle
import shutil

import diffusers
import k_diffusion as K
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

import ksag
import ksag.adapters.diffusers as adapter
from ksag import zoo
from tests.diffusers_pipelines import (
    stable_diffusion,
    stable_diffusion_2,
    stable_diffusion_inpainting,
    stable_diffusion_xl,
    text_encoder,
    unet,
)
from tests.hostile_folders import Bomb, edit
from tests.single_files import made_once, single_file

MAKERS = [stable_diffusion, stable_diffusion_2, stable_diffusion_inpainting, stable_diffusion_xl]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test waits for the hub: what would be downloaded is not there."""

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pipeline that a function makes, its folder and the same as a single file. They are made once: copy what you change."""

    return made_once(
        tmp_path_factory, lambda pipe, folder: (pipe, folder / "pipe", single_file(pipe, folder / "model.safetensors"))
    )


def parts(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def assert_same(actual, expected):
    assert parts(actual).keys() == parts(expected).keys()
    for name, part in parts(expected).items():
        state = parts(actual)[name].state_dict()
        assert state.keys() == part.state_dict().keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in part.state_dict().items()), name


# What works


@pytest.mark.parametrize("make", MAKERS)
def test_a_folder_and_a_single_file_give_the_same_pipeline(made, make):
    pipe, folder, file = made(make)
    for loaded in adapter.load(folder), adapter.load(file, config=folder):
        assert type(loaded) is type(pipe) and not loaded.unet.training
        assert_same(loaded, pipe)
        assert loaded.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type


def test_the_configs_need_no_weights(tmp_path, made):
    pipe, folder, file = made(stable_diffusion)
    shutil.copytree(folder, tmp_path / "pipe")
    for weights in (tmp_path / "pipe").rglob("*.safetensors"):
        weights.unlink()
    assert_same(adapter.load(file, config=tmp_path / "pipe"), pipe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(made, dtype):
    _, folder, file = made(stable_diffusion_xl)
    for loaded in adapter.load(folder, dtype=dtype), adapter.load(file, config=folder, dtype=dtype):
        assert loaded.unet.dtype == loaded.text_encoder.dtype == loaded.text_encoder_2.dtype == dtype
        assert loaded.vae.config.force_upcast
        assert loaded.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_a_folder_that_has_only_a_variant(tmp_path, made):
    pipe, _, _ = made(stable_diffusion)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert list((tmp_path / "half").glob("unet/*.fp16.safetensors"))
    assert_same(adapter.load(tmp_path / "half"), pipe)


def test_device(made):
    _, folder, _ = made(stable_diffusion)
    assert {part.device.type for part in parts(adapter.load(folder, device="meta")).values()} == {"meta"}


# What the model predicts


@pytest.fixture
def xl_file(made, tmp_path):
    pipe, folder, _ = made(stable_diffusion_xl)

    def load(metadata=None, **extra):
        tensors = {name.replace("__", "."): torch.tensor(value) for name, value in extra.items()}
        file = single_file(pipe, tmp_path / "model.safetensors", extra=tensors, metadata=metadata)
        return adapter.load(file, config=folder)

    return load


def test_v_prediction_with_a_zero_terminal_snr_as_noobai_marks_it(xl_file):
    pipe = xl_file(v_pred=[], ztsnr=[])
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr
    denoiser = adapter.denoiser(pipe)
    assert denoiser.sigma_max.item() == pytest.approx(4518.77, abs=0.01)
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")


def test_v_prediction_alone(xl_file):
    pipe = xl_file(v_pred=[])
    assert pipe.scheduler.config.prediction_type == "v_prediction" and not pipe.scheduler.config.rescale_betas_zero_snr


@pytest.mark.parametrize(("stated", "expected"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_a_prediction_that_the_metadata_state(xl_file, stated, expected):
    pipe = xl_file(metadata={"modelspec.prediction_type": stated})
    assert pipe.scheduler.config.prediction_type == expected


def test_noise_levels_of_cosxl(xl_file):
    pipe = xl_file(edm_vpred__sigma_min=0.002, edm_vpred__sigma_max=120.0)
    config = pipe.scheduler.config
    assert isinstance(pipe.scheduler, EDMEulerScheduler)
    assert (config.sigma_data, config.prediction_type, config.sigma_schedule) == (1.0, "v_prediction", "exponential")
    denoiser = adapter.denoiser(pipe)
    assert denoiser.sigma_min.item() == pytest.approx(0.002) and denoiser.sigma_max.item() == pytest.approx(120)


def test_playground_with_the_configs_of_another_model(xl_file):
    with pytest.raises(ValueError, match=r"is a Playground v2.5 model, and config= is for another"):
        xl_file(edm_mean=[0.0], edm_std=[1.0])


@pytest.mark.parametrize(("spread", "expected"), [(0.12, "v_prediction"), (0.05, "epsilon")])
def test_the_two_kinds_of_stable_diffusion_2(made, tmp_path, spread, expected):
    """No key tells them apart, but how much one bias of the last block varies does. The tiny UNet has none: it is added."""
    pipe, folder, _ = made(stable_diffusion_2)
    torch.manual_seed(0)
    bias = {"model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.randn(320) * spread}
    file = single_file(pipe, tmp_path / "model.safetensors", extra=bias)
    for loaded in adapter.load(file, config=folder), adapter.load(file, config=folder, dtype=torch.bfloat16):
        assert loaded.scheduler.config.prediction_type == expected


def test_a_prediction_that_the_caller_knows_better(made):
    pipe, folder, file = made(stable_diffusion)
    for source, options in (folder, {}), (file, {"config": folder}):
        loaded = adapter.load(source, **options, prediction_type="v_prediction", zero_snr=True)
        expected = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True)
        assert loaded.scheduler.config.prediction_type == "v_prediction"
        assert torch.equal(loaded.scheduler.alphas_cumprod, expected.alphas_cumprod)
    with pytest.raises(ValueError, match=r"DDIMScheduler has prediction_type='v'; ksag knows epsilon, v_prediction"):
        adapter.denoiser(adapter.load(folder, prediction_type="v"))


# What a wrong file is


WRONG = {
    "UNet": (lambda: unet().state_dict(), "no UNet and no VAE and no text encoder"),
    "UNet of CompVis": (lambda: {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4)}, "no VAE and no text encoder"),
    "VAE of CompVis": (lambda: {"first_stage_model.decoder.conv_in.weight": torch.zeros(2)}, "no UNet and no text encoder"),
    "LoRA": (lambda: {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(2)}, "no UNet and no VAE"),
    "nothing": (dict, "no UNet and no VAE and no text encoder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_by_what_it_lacks(tmp_path, kind):
    make, lacks = WRONG[kind]
    save_file({name: tensor.contiguous() for name, tensor in make().items()}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=rf"is not a whole Stable Diffusion or Flux checkpoint: it has {lacks}"):
        adapter.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("part", "missing"), [("first_stage_model", "VAE"), ("cond_stage_model", "text encoder")])
def test_a_checkpoint_that_lacks_a_part(made, tmp_path, part, missing):
    file = single_file(made(stable_diffusion)[0], tmp_path / "m.safetensors", leave_out=[part])
    with pytest.raises(ValueError, match=rf"is not a whole Stable Diffusion .* checkpoint: it has no {missing}, so give a folder"):
        adapter.load(file, config=made(stable_diffusion)[1])


def test_a_model_for_another_task(tmp_path):
    pipe = stable_diffusion(tmp_path, {"in_channels": 8})
    file = single_file(pipe, tmp_path / "m.safetensors")
    for source, config in (file, tmp_path / "pipe"), (tmp_path / "pipe", None):
        with pytest.raises(ValueError, match=r"is for another task: its UNet takes 8 channels"):
            adapter.load(source, config=config)


def test_a_model_of_k_diffusion():
    with pytest.raises(ValueError, match=r"emoji.safetensors is a k-diffusion model.*ksag.zoo.load\("):
        adapter.load(zoo.EMOJI)


def test_configs_of_another_model(made):
    for make, other in (stable_diffusion, stable_diffusion_xl), (stable_diffusion_xl, stable_diffusion):
        with pytest.raises(
            ValueError, match=r"model.safetensors is for a StableDiffusion.*Pipeline, but config=.* is for a StableDiffusion"
        ):
            adapter.load(made(make)[2], config=made(other)[1])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"unet_options": {"layers_per_block": 2}}, r"unet has weights that do not fit its config.json. Tensors missing"),
        ({"text": text_encoder(num_hidden_layers=5)}, r"text_encoder has .*missing: .*layers.4"),
        ({"text": text_encoder(num_hidden_layers=3)}, r"text_encoder has .*unexpected: .*layers.3"),
    ],
)
def test_configs_of_a_larger_or_smaller_model(made, tmp_path, other, message):
    stable_diffusion(tmp_path, **other)
    with pytest.raises(ValueError, match=rf"^model.safetensors cannot be loaded with the configs of {tmp_path}.*{message}"):
        adapter.load(made(stable_diffusion)[2], config=tmp_path / "pipe")


# Nothing is run


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_not_opened(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(
        ValueError, match=rf"is a {suffix} file, a pickle, .* or convert it\. .*from_single_file\('.*model{suffix}'\)"
    ):
        adapter.load(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", r"loads. \(it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", r"is damaged, or not a .safetensors file, the only kind"),
        (b"", r"is damaged, or not a .safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors(tmp_path, content, message):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        adapter.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["notes.txt", "model.gguf", "model"])
def test_a_file_with_another_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF and more")
    with pytest.raises(ValueError, match=rf"{name} is damaged, or not a .safetensors file"):
        adapter.load(tmp_path / name)


def test_a_file_whose_download_broke_off(made, tmp_path):
    file = tmp_path / "m.safetensors"
    file.write_bytes(made(stable_diffusion)[2].read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"is damaged, or not a .safetensors file"):
        adapter.load(file)


# Folders, hub ids and what is not there


@pytest.mark.parametrize(
    "name", ["missing.safetensors", "a/missing.safetensors", "./missing", "missing", "a/b/c", "/missing/folder"]
)
def test_what_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=rf"There is no file or folder {name}, and a hub id is owner/name"):
        adapter.load(name)


def test_a_hub_that_cannot_be_reached(made):
    for name in "owner/name", "black-forest-labs/FLUX.1-dev":
        with pytest.raises(OSError, match=rf"There is no folder {name} here, and the hub says: the hub cannot be reached"):
            adapter.load(name)
    with pytest.raises(
        OSError, match=r"model.safetensors has only weights. Give config= \(--config\) the folder of a diffusers pipeline"
    ):
        adapter.load(made(stable_diffusion)[2])


def test_a_hub_id_is_downloaded_without_its_pickles(made, monkeypatch):
    """A stand-in for the hub: what diffusers and the hub's client would bring is a folder here."""
    pipe, folder, _ = made(stable_diffusion)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(folder / name))
    asked = {}

    def download(cls, name, **kwargs):
        asked.update(kwargs, name=name)
        return folder

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", classmethod(download))
    assert_same(adapter.load("owner/name"), pipe)
    expected = {"name": "owner/name", "variant": None, "use_safetensors": True, "trust_remote_code": False, "safety_checker": None}
    assert asked == expected


def test_the_default_configs_of_a_single_file(made, monkeypatch):
    (pipe, folder, file), asked = made(stable_diffusion), []

    def download(repo, allow_patterns):
        asked.append(repo)
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert_same(adapter.load(file), pipe)
    assert asked == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]


def test_what_the_hub_answers(monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("403 Forbidden.\nAccess to owner/name is restricted.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(OSError, match=r"and the hub says: 403 Forbidden. Access to owner/name is restricted"):
        adapter.load("owner/name")


def test_a_text_encoder_that_is_not_clips_is_refused_before_anything_is_loaded(made, tmp_path):
    for part in "text_encoder", "text_encoder_2":
        index = {"dirs_exist_ok": True, "ignore": lambda folder, names: [name for name in names if name != "model_index.json"]}
        shutil.copytree(made(stable_diffusion_xl)[1], tmp_path, **index)
        edit(tmp_path / "model_index.json", **{part: ["transformers", "T5EncoderModel"]})
        with pytest.raises(ValueError, match=rf"as {part}. ksag knows no such {part} of a StableDiffusionXLPipeline"):
            adapter.load(tmp_path)


def test_config_with_a_folder(made):
    _, folder, _ = made(stable_diffusion)
    with pytest.raises(ValueError, match=r"config= \(--config\) goes with a single file"):
        adapter.load(folder, config=folder)


def test_folders_of_something_else(made):
    for folder in made(stable_diffusion)[1].parent, made(stable_diffusion)[1] / "unet":
        with pytest.raises(ValueError, match=rf"{folder} has no model_index.json, so it is not the folder of a diffusers pipeline"):
            adapter.load(folder)


def test_the_whole_way_from_a_single_file_to_a_picture(made):
    _, folder, file = made(stable_diffusion_xl)
    pipe = adapter.load(file, config=folder)
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", size=(16, 24))
    with ksag.SAGDenoiser(adapter.denoiser(pipe), cond_key=None) as guided:
        sigmas = guided.inner_model.get_sigmas(3)
        x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)) * sigmas[0]
        latents = K.sampling.sample_euler(guided, x, sigmas, {"cond": cond, "uncond": uncond, "cond_scale": 4.0}, disable=True)
    (picture,) = adapter.decode(pipe, latents, pil=True)
    assert picture.size == (24, 16) and len(picture.getcolors(1000)) > 10
