"""Does `load` take a diffusers folder and a single file as they are, run nothing in them, and say what another file is?"""

import json
import pickle
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FluxPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

import ksag
import ksag.adapters.diffusers as adapter
from ksag import zoo
from tests.diffusers_pipelines import (
    controlnet,
    ip_adapter,
    stable_diffusion,
    stable_diffusion_2,
    stable_diffusion_inpainting,
    stable_diffusion_xl,
    t2i_adapter,
    text_encoder,
    unet,
    vae,
)
from tests.single_files import single_file

MAKERS = [stable_diffusion, stable_diffusion_2, stable_diffusion_inpainting, stable_diffusion_xl]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test waits for the hub: what would be downloaded is not there."""

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("diffusers.loaders.single_file.snapshot_download", unreachable)


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
def test_a_folder_and_a_single_file_give_the_same_pipeline(tmp_path, make):
    pipe = make(tmp_path)
    folder = adapter.load(tmp_path / "pipe")
    file = adapter.load(single_file(pipe, tmp_path / "model.safetensors"), config=tmp_path / "pipe")
    for loaded in folder, file:
        assert type(loaded) is type(pipe) and not loaded.unet.training
        assert_same(loaded, pipe)
        assert loaded.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type


def test_the_configs_need_no_weights(tmp_path):
    pipe = stable_diffusion(tmp_path)
    file = single_file(pipe, tmp_path / "model.safetensors")
    for weights in (tmp_path / "pipe").rglob("*.safetensors"):
        weights.unlink()
    assert_same(adapter.load(file, config=tmp_path / "pipe"), pipe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(tmp_path, dtype):
    pipe = stable_diffusion_xl(tmp_path)
    file = single_file(pipe, tmp_path / "model.safetensors")
    for loaded in adapter.load(tmp_path / "pipe", dtype=dtype), adapter.load(file, config=tmp_path / "pipe", dtype=dtype):
        assert loaded.unet.dtype == loaded.text_encoder.dtype == loaded.text_encoder_2.dtype == dtype
        assert loaded.vae.config.force_upcast
        assert loaded.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_a_folder_that_has_only_a_variant(tmp_path):
    pipe = stable_diffusion(tmp_path)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert list((tmp_path / "half").glob("unet/*.fp16.safetensors"))
    assert_same(adapter.load(tmp_path / "half"), pipe)


def test_device(tmp_path):
    stable_diffusion(tmp_path)
    assert {part.device.type for part in parts(adapter.load(tmp_path / "pipe", device="meta")).values()} == {"meta"}


# What the model predicts


def xl_file(folder, metadata=None, **extra):
    pipe = stable_diffusion_xl(folder)
    tensors = {name.replace("__", "."): torch.tensor(value) for name, value in extra.items()}
    file = single_file(pipe, folder / "model.safetensors", extra=tensors, metadata=metadata)
    return adapter.load(file, config=folder / "pipe")


def test_v_prediction_with_a_zero_terminal_snr_as_noobai_marks_it(tmp_path):
    pipe = xl_file(tmp_path, v_pred=[], ztsnr=[])
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr
    denoiser = adapter.denoiser(pipe)
    assert denoiser.sigma_max.item() == pytest.approx(4518.77, abs=0.01)
    assert xl_file_has_the_betas_of(pipe)


def xl_file_has_the_betas_of(pipe):
    """The schedule is still its config's, but for its end."""
    config = pipe.scheduler.config
    return (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")


def test_v_prediction_alone(tmp_path):
    pipe = xl_file(tmp_path, v_pred=[])
    assert pipe.scheduler.config.prediction_type == "v_prediction" and not pipe.scheduler.config.rescale_betas_zero_snr


@pytest.mark.parametrize(("stated", "expected"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_a_prediction_that_the_metadata_state(tmp_path, stated, expected):
    pipe = xl_file(tmp_path, metadata={"modelspec.prediction_type": stated})
    assert pipe.scheduler.config.prediction_type == expected


def test_noise_levels_of_cosxl(tmp_path):
    pipe = xl_file(tmp_path, edm_vpred__sigma_min=0.002, edm_vpred__sigma_max=120.0)
    config = pipe.scheduler.config
    assert isinstance(pipe.scheduler, EDMEulerScheduler)
    assert (config.sigma_data, config.prediction_type, config.sigma_schedule) == (1.0, "v_prediction", "exponential")
    denoiser = adapter.denoiser(pipe)
    assert denoiser.sigma_min.item() == pytest.approx(0.002) and denoiser.sigma_max.item() == pytest.approx(120)


def test_playground_with_the_configs_of_another_model(tmp_path):
    with pytest.raises(ValueError, match=r"is a Playground v2.5 model, and config= is for another"):
        xl_file(tmp_path, edm_mean=[0.0], edm_std=[1.0])


@pytest.mark.parametrize(("spread", "expected"), [(0.12, "v_prediction"), (0.05, "epsilon")])
def test_the_two_kinds_of_stable_diffusion_2(tmp_path, spread, expected):
    """No key tells them apart, but how much one bias of the last block varies does. The tiny UNet has none: it is added."""
    pipe = stable_diffusion_2(tmp_path)
    torch.manual_seed(0)
    bias = {"model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.randn(320) * spread}
    file = single_file(pipe, tmp_path / "model.safetensors", extra=bias)
    for loaded in adapter.load(file, config=tmp_path / "pipe"), adapter.load(file, config=tmp_path / "pipe", dtype=torch.bfloat16):
        assert loaded.scheduler.config.prediction_type == expected


def test_a_prediction_that_the_caller_knows_better(tmp_path):
    pipe = stable_diffusion(tmp_path)
    file = single_file(pipe, tmp_path / "model.safetensors")
    for source, options in (tmp_path / "pipe", {}), (file, {"config": tmp_path / "pipe"}):
        loaded = adapter.load(source, **options, prediction_type="v_prediction", zero_snr=True)
        expected = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True)
        assert loaded.scheduler.config.prediction_type == "v_prediction"
        assert torch.equal(loaded.scheduler.alphas_cumprod, expected.alphas_cumprod)
    with pytest.raises(ValueError, match=r"prediction_type is 'epsilon' or 'v_prediction', got 'v'"):
        adapter.load(tmp_path / "pipe", prediction_type="v")


# What a wrong file is


def lora(folder):
    pipe = stable_diffusion(folder)
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    from peft.utils import get_peft_model_state_dict

    return {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(pipe.unet).items()}


def of_model(make, prefix=""):
    return lambda folder: {f"{prefix}{name}": tensor.clone() for name, tensor in make().state_dict().items()}


def flat_ip_adapter(folder):
    return {f"{part}.{name}": tensor for part, tensors in ip_adapter(unet()).items() for name, tensor in tensors.items()}


def names(*keys):
    """Names alone decide, where the architecture itself is not at hand: those of the public files."""
    return lambda folder: {key: torch.zeros(2, 2) for key in keys}


DIFFUSION = "model.diffusion_model."
WRONG = {
    "UNet of diffusers": (of_model(unet), r"is a UNet alone, .*UNet2DConditionModel.from_single_file"),
    "VAE of diffusers": (of_model(vae), r"is a VAE alone\. .*pipe.vae = diffusers.AutoencoderKL.from_single_file"),
    "ControlNet": (of_model(controlnet), r"is a ControlNet, .*StableDiffusionControlNetPipeline.from_pipe"),
    "T2I-Adapter": (of_model(t2i_adapter), r"is a T2I-Adapter, "),
    "IP-Adapter": (flat_ip_adapter, r"is an IP-Adapter, .*pipe.load_ip_adapter"),
    "LoRA of peft": (lora, r"is a LoRA, .*pipe.load_lora_weights\('.*m.safetensors'\)"),
    "text encoder": (of_model(text_encoder), r"is a text encoder alone\. "),
    "text encoder of a pipeline": (of_model(text_encoder, "text_model."), r"is a text encoder alone\. "),
    "LoRA of kohya": (names("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"), r"is a LoRA, not a whole model\. "),
    "LyCORIS": (names("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"), r"is a LoRA, "),
    "textual inversion": (names("clip_l", "clip_g"), r"is a textual inversion, .*pipe.load_textual_inversion"),
    "ControlNet of CompVis": (names("control_model.zero_convs.0.0.weight", f"{DIFFUSION}out.2.weight"), r"is a ControlNet, "),
    "VAE of CompVis": (names("decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"), r"is a VAE alone\. "),
    "UNet of CompVis": (names(f"{DIFFUSION}input_blocks.0.0.weight", f"{DIFFUSION}out.2.weight"), r"is a UNet alone, .*encoder\. "),
    "T5": (names("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), r"is a text encoder alone\. "),
    "Stable Diffusion 3": (names(f"{DIFFUSION}joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.decoder.conv_in.weight"),
                           r"is a Stable Diffusion 3 model\. .*flow matching.*ksag samples Stable Diffusion 1.x, 2.x and XL"),
    "Flux": (names("double_blocks.0.img_attn.qkv.weight"), r"is a Flux model, or one like it\. Its flow matching"),
    "Flux of diffusers": (names("single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.weight"), "Flux"),
    "Stable Cascade": (names("clip_txt_mapper.weight", "down_blocks.0.0.channelwise.0.weight"), r"is a Stable Cascade model\. "),
    "PixArt": (names("transformer_blocks.0.attn1.to_q.weight", "pos_embed.proj.weight"), r"is a diffusion transformer\. "),
    "video": (names("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"), r"is a motion module, for video\. "),
    "unknown": (names("foo.weight", "bar.weight"), r"is not a model that ksag knows: its tensors are 'bar.weight' and 1 more"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_named(tmp_path, kind):
    make, message = WRONG[kind]
    save_file({name: tensor.contiguous() for name, tensor in make(tmp_path).items()}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        adapter.load(tmp_path / "m.safetensors")
    assert "  " not in str(error.value) and ".." not in str(error.value)


def changed(folder, part, prefix=""):
    """The weights of another part than the pipeline's."""
    state = getattr(stable_diffusion(folder), part).state_dict()
    return {f"{prefix}{name}": tensor * 1.5 for name, tensor in state.items()}


def changed_by_lora(folder):
    return {name: torch.randn(tensor.shape) for name, tensor in lora(folder).items()}


ADVICE = {
    "LoRA": (changed_by_lora, "unet"),
    "UNet": (lambda folder: changed(folder, "unet"), "unet"),
    "VAE": (lambda folder: changed(folder, "vae"), "vae"),
    "textual inversion": (lambda folder: {"emb_params": torch.randn(2, 32)}, "text_encoder"),
}


@pytest.mark.parametrize("kind", ADVICE)
def test_what_a_message_advises_gives_a_folder_with_the_file_in_it(tmp_path, monkeypatch, kind):
    make, part = ADVICE[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    save_file(make(tmp_path / "made"), "m.safetensors")
    with pytest.raises(
        ValueError, match=r"In Python, where MODEL is .*save_pretrained\('folder'\)\. Then .*--pipeline folder"
    ) as error:
        adapter.load("m.safetensors")
    advice = re.search(r"In Python, [^:]*: (.*)\. Then ", str(error.value))[1]
    pipe = stable_diffusion(tmp_path)
    before = {name: tensor.clone() for name, tensor in getattr(pipe, part).state_dict().items()}
    exec(advice, {"ksag": ksag, "diffusers": diffusers, "MODEL": str(tmp_path / "pipe")})  # as a user would type it
    after = getattr(adapter.load("folder"), part).state_dict()
    assert after.keys() == before.keys()
    assert any(tensor.shape != before[name].shape or not torch.equal(tensor, before[name]) for name, tensor in after.items())
    if kind in ("UNet", "VAE"):
        assert all(torch.equal(after[name], tensor * 1.5) for name, tensor in before.items())


@pytest.mark.parametrize(("part", "missing"), [("first_stage_model", "VAE"), ("cond_stage_model", "text encoder")])
def test_a_checkpoint_that_lacks_a_part(tmp_path, part, missing):
    file = single_file(stable_diffusion(tmp_path), tmp_path / "m.safetensors", leave_out=[part])
    with pytest.raises(ValueError, match=rf"a Stable Diffusion checkpoint without its {missing}"):
        adapter.load(file, config=tmp_path / "pipe")


def test_a_checkpoint_for_another_task(tmp_path):
    pipe = stable_diffusion(tmp_path, {"in_channels": 8})
    with pytest.raises(ValueError, match=r"for editing by instruction, whose UNet takes 8 channels"):
        adapter.load(single_file(pipe, tmp_path / "m.safetensors"), config=tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"a StableDiffusionPipeline, whose UNet takes 8 channels"):
        adapter.load(tmp_path / "pipe")


def test_a_model_of_k_diffusion():
    with pytest.raises(ValueError, match=r"emoji.safetensors is a k-diffusion model.*ksag.zoo.load\("):
        adapter.load(zoo.EMOJI)


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
def test_configs_of_another_model(tmp_path, make):
    (tmp_path / "other").mkdir()
    other = stable_diffusion_xl if make is stable_diffusion else stable_diffusion
    other(tmp_path / "other")
    file = single_file(make(tmp_path), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m.safetensors is a Stable Diffusion .* model, but config=.* is for a StableDiffusion"):
        adapter.load(file, config=tmp_path / "other" / "pipe")


@pytest.mark.parametrize(
    ("larger", "message"),
    [
        (
            {"unet_options": {"layers_per_block": 2}},
            r"m.safetensors does not fit the configs of .*large.*, which are for another model",
        ),
        ({"text": text_encoder(num_hidden_layers=5)}, r"it has no weights for some layers of the text_encoder"),
    ],
)
def test_configs_of_a_larger_model(tmp_path, larger, message):
    (tmp_path / "large").mkdir()
    stable_diffusion(tmp_path / "large", **larger)
    file = single_file(stable_diffusion(tmp_path), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        adapter.load(file, config=tmp_path / "large" / "pipe")


# Nothing is run


class Bomb:
    """What a pickle can do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_not_opened(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(
        ValueError, match=rf"is a {suffix} file, a pickle, .* or convert it\. .*from_single_file\('.*model{suffix}'\)"
    ):
        adapter.load(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_in_a_folder_is_not_opened(tmp_path, part):
    stable_diffusion(tmp_path)
    (weights,) = (tmp_path / "pipe" / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (weights.parent / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    weights.unlink()
    with pytest.raises(OSError, match=r"cannot be loaded from .safetensors files, the only ones that ksag takes"):
        adapter.load(tmp_path / "pipe")
    assert not (tmp_path / "ran").exists()


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_code_in_a_folder_is_not_run(tmp_path):
    stable_diffusion(tmp_path)
    folder, ran = tmp_path / "pipe", tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    (folder / "mine.py").write_text(code)
    edit(folder / "model_index.json", _class_name=["mine", "Pipeline"])
    with pytest.raises(ValueError, match=r"needs code of its own"):
        adapter.load(folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline", scheduler=["mine", "Scheduler"])
    (folder / "scheduler" / "mine.py").write_text(code)
    with pytest.raises((ValueError, OSError)):
        adapter.load(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", r"is a Git LFS pointer, not the file"),
        (b"<!DOCTYPE html><html>", r"is damaged, or not a .safetensors file. Download it again"),
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
    with pytest.raises(ValueError, match=rf"{name} is not a .safetensors file, and ksag takes no other"):
        adapter.load(tmp_path / name)


def test_a_file_whose_download_broke_off(tmp_path):
    file = single_file(stable_diffusion(tmp_path), tmp_path / "m.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"is damaged, or not a .safetensors file"):
        adapter.load(file)


# Folders, hub ids and what is not there


@pytest.mark.parametrize("name", ["missing.safetensors", "./missing", "missing", "a/b/c", "/missing/folder"])
def test_what_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=rf"There is no file or folder {name}, and a hub id is owner/name"):
        adapter.load(name)


def test_a_hub_that_cannot_be_reached(tmp_path):
    with pytest.raises(OSError, match=r"There is no folder owner/name here, and the hub cannot be reached"):
        adapter.load("owner/name")
    file = single_file(stable_diffusion(tmp_path), tmp_path / "m.safetensors")
    with pytest.raises(
        OSError, match=r"m.safetensors holds weights alone. .* Give config= \(--config\) the folder of a diffusers pipeline"
    ):
        adapter.load(file)


def test_a_hub_id_is_diffusers_to_load(tmp_path, monkeypatch):
    """A stand-in for the hub: what diffusers and the hub's client would bring is a folder here."""
    from diffusers import DiffusionPipeline

    pipe = stable_diffusion(tmp_path)
    real = DiffusionPipeline.from_pretrained.__func__
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: str(tmp_path / "pipe" / name))
    asked = []

    def from_pretrained(cls, name, **kwargs):
        asked.append((name, kwargs["use_safetensors"], kwargs["trust_remote_code"]))
        return real(cls, tmp_path / "pipe", **kwargs)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    assert_same(adapter.load("owner/name"), pipe)
    assert asked == [("owner/name", True, False)]


def test_what_the_hub_answers(monkeypatch):
    def refused(*args, **kwargs):
        raise OSError("403 Forbidden.\nAccess to owner/name is restricted.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(OSError, match=r"and the hub says: 403 Forbidden. Access to owner/name is restricted"):
        adapter.load("owner/name")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_that_is_not_clips_is_refused_before_anything_is_loaded(tmp_path, part):
    stable_diffusion_xl(tmp_path)
    edit(tmp_path / "pipe" / "model_index.json", **{part: ["transformers", "T5EncoderModel"]})
    for weights in (tmp_path / "pipe").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=rf"is a StableDiffusionXLPipeline whose {part} is a T5EncoderModel\. ksag samples"):
        adapter.load(tmp_path / "pipe")


def test_config_with_a_folder(tmp_path):
    stable_diffusion(tmp_path)
    with pytest.raises(ValueError, match=r"config= \(--config\) goes with a single file"):
        adapter.load(tmp_path / "pipe", config=tmp_path / "pipe")


def test_folders_of_something_else(tmp_path):
    pipe = stable_diffusion(tmp_path)
    with pytest.raises(ValueError, match=r"is the folder of a UNet2DConditionModel alone"):
        adapter.load(tmp_path / "pipe" / "unet")
    with pytest.raises(ValueError, match=r"has no model_index.json"):
        adapter.load(tmp_path)
    single_file(pipe, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"has no model_index.json. Give one of its files, such as .*m.safetensors"):
        adapter.load(tmp_path)
    shutil.copy(tmp_path / "pipe" / "model_index.json", tmp_path / "model_index.json")
    edit(tmp_path / "model_index.json", _class_name=FluxPipeline.__name__, unet=None)
    with pytest.raises(ValueError, match=r"is a FluxPipeline. ksag samples Stable Diffusion 1.x, 2.x and XL"):
        adapter.load(tmp_path)


def test_the_whole_way_from_a_single_file_to_a_picture(tmp_path):
    import k_diffusion as K

    file = single_file(stable_diffusion_xl(tmp_path), tmp_path / "m.safetensors")
    pipe = adapter.load(file, config=tmp_path / "pipe")
    cond, uncond = adapter.conditioning(pipe, "a cat", "bad", size=(16, 24))
    with ksag.SAGDenoiser(adapter.denoiser(pipe), cond_key=None) as guided:
        sigmas = guided.inner_model.get_sigmas(3)
        x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)) * sigmas[0]
        latents = K.sampling.sample_euler(guided, x, sigmas, {"cond": cond, "uncond": uncond, "cond_scale": 4.0}, disable=True)
    (picture,) = adapter.decode(pipe, latents, pil=True)
    assert picture.size == (24, 16) and len(picture.getcolors(1000)) > 10
