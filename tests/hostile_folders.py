"""Pipeline folders that try to run code, to have something unpickled, or that are damaged. Each function changes a good folder."""

import json
import pickle
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


class Bomb:
    """What a pickle can do: it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def edit(file, **changes):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def index(**changes):
    return lambda folder: edit(folder / "model_index.json", **changes)


def config(part, name="config.json", **changes):
    return lambda folder: edit(folder / part / name, **changes)


def replaced(file, content):
    def change(folder):
        (folder / file).write_bytes(content)

    return change


def without(file):
    def change(folder):
        shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()

    return change


def weights(part, change):
    """Changes the tensors of a part, a dict."""

    def in_folder(folder):
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        tensors = change(tensors) or tensors
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})

    return in_folder


def shard_index(part, *names):
    """An index that says that each of these files has some of the tensors."""

    def change(folder):
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        shares = {name: {key: tensors[key].clone() for key in list(tensors)[i :: len(names)]} for i, name in enumerate(names)}
        for name, share in shares.items():
            if isinstance(name, str) and name.endswith(".safetensors"):
                (folder / part / name).parent.mkdir(exist_ok=True, parents=True)
                save_file(share, folder / part / name, {"format": "pt"})
        file.rename(file.parent / "old.safetensors.txt")
        map_of = {key: name for name, share in shares.items() for key in share}
        edit(file.parent / f"{file.name}.index.json", metadata={}, weight_map=map_of)

    return change


# Each of these names code, or a class that could load code. `plant` puts that code where a library would look for it.

REFUSED = {
    "scheduler of its own": index(scheduler=["evil", "Evil"]),
    "feature extractor of its own": index(feature_extractor=["evil", "Evil"]),
    "safety checker of its own": index(safety_checker=["evil", "Evil"]),
    "text encoder of its own": index(text_encoder=["evil", "Evil"]),
    "part of another name": index(evil=["evil", "Evil"]),
    "part outside": index(**{"../evil": ["diffusers", "DDIMScheduler"]}),
    "function of the system": index(scheduler=["os", "system"]),
    "module of diffusers": index(scheduler=["diffusers.pipelines", "DiffusionPipeline"]),
    "attribute of a class": index(scheduler=["diffusers", "DDIMScheduler.from_pretrained"]),
    "class for another part": index(vae=["diffusers", "UNet2DConditionModel"]),
    "class that loads any other": index(unet=["diffusers", "AutoModel"]),
    "pipeline as a part": index(unet=["stable_diffusion", "StableDiffusionPipeline"]),
    "one name": index(text_encoder="CLIP"),
    "three names": index(vae=["diffusers", "AutoencoderKL", "evil"]),
    "half null": index(vae=["diffusers", None]),
    "lists as names": index(vae=[["diffusers"], ["AutoencoderKL"]]),
    "object": index(scheduler={"evil": "Evil"}),
    "pipeline of its own": index(_class_name=["evil", "Evil"]),
    "module as pipeline": index(_class_name="evil"),
    "any pipeline": index(_class_name="DiffusionPipeline"),
    "onnx": index(_class_name="OnnxStableDiffusionPipeline"),
    "no name": index(_class_name=None),
    "object as name": index(_class_name={"evil": "Evil"}),
    "number as name": index(_class_name=1),
}  # fmt: skip

# Each of these makes transformers or diffusers follow a name when they get the folder. ksag does not use them.

IGNORED = {
    "null parts": index(image_encoder=None, feature_extractor=[None, None]),
    "auto_map": config("text_encoder", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}, trust_remote_code=True),
    "auto_map of diffusers": config("unet", auto_map={"AutoModel": "evil.Evil"}),
    "auto_map of a tokenizer": config("tokenizer", "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]},
                                      tokenizer_class="Evil"),
    "auto_map beside a tokenizer": config("tokenizer", model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "class of a config": config("unet", _class_name=["evil", "Evil"]),
    "class of a scheduler": config("scheduler", "scheduler_config.json", _class_name="OnnxStableDiffusionPipeline"),
    "attention from the hub": config("text_encoder", attn_implementation="evil/kernel", _attn_implementation="evil/kernel"),
    "quantised": config("text_encoder", quantization_config={"quant_method": "evil"}),
    "custom pipeline": index(custom_pipeline="evil"),
    "weights by another name": config("text_encoder", transformers_weights="evil.bin"),
    "adapter": config("text_encoder", "adapter_config.json", peft_type="LORA", base_model_name_or_path="evil"),
}  # fmt: skip


def plant(folder, cwd, ran):
    """Puts code and pickles that make the file `ran` where a library that follows a name would find them."""
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n"
    for place in folder, cwd, *(part for part in folder.iterdir() if part.is_dir()):
        for name in "evil", "pipeline", "diffusers", "transformers", "os", "stable_diffusion":
            if place != cwd or name == "evil":
                (place / f"{name}.py").write_text(code)
        for name in "evil.bin", "pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin":
            (place / name).write_bytes(pickle.dumps(Bomb(ran)))


# Each of these would have something unpickled, or a file read from elsewhere.

PICKLED = {
    "index of a text encoder": (shard_index("text_encoder", "evil.bin"), r"names 'evil.bin'"),
    "index of a UNet": (shard_index("unet", "a.safetensors", "evil.bin"), r"names 'evil.bin'"),
    "index that leaves the folder": (shard_index("unet", "../scheduler/a.safetensors"), r"names '../scheduler/"),
    "index into a folder": (shard_index("vae", "deep/a.safetensors"), r"names 'deep/a.safetensors'"),
    "index of an absolute path": (shard_index("vae", "/evil.bin"), r"names '/evil.bin'"),
    "index of a missing file": (config("unet", "diffusion_pytorch_model.safetensors.index.json", weight_map={"a": "b.safetensors"}),
                                r"names 'b.safetensors', but there is no such"),
    "index of numbers": (config("unet", "diffusion_pytorch_model.safetensors.index.json", weight_map={"a": 1}), r"names 1,"),
    "index of lists": (config("unet", "diffusion_pytorch_model.safetensors.index.json", weight_map={"a": ["x"]}), r"names \['x'\]"),
    "index without a map": (config("unet", "diffusion_pytorch_model.safetensors.index.json"), r"names None"),
    "UNet": (without("unet/diffusion_pytorch_model.safetensors"), r"unet has no weights .*pickles \(.bin\) can run any program"),
    "VAE": (without("vae/diffusion_pytorch_model.safetensors"), r"vae has no weights .*only .*diffusion_pytorch_model.bin"),
    "text encoder": (without("text_encoder/model.safetensors"), r"text_encoder has no weights .*only .*pytorch_model.bin"),
    "pickle by the name of a safetensors file": (replaced("unet/diffusion_pytorch_model.safetensors", pickle.dumps({})),
                                                 r"unet/diffusion_pytorch_model.safetensors is damaged"),
}  # fmt: skip


def removed(pattern):
    def change(tensors):
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return change


def added(**tensors):
    return lambda given: given.update({name.replace("__", "."): next(iter(given.values())) for name in tensors})


def cut(pattern):
    def change(tensors):
        for name in [name for name in tensors if pattern in name]:
            tensors[name] = tensors[name][..., :-1].contiguous()

    return change


def truncated(file):
    def change(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:-100])

    return change


def without_vocabulary(folder):
    for name in "tokenizer.json", "vocab.json", "merges.txt":
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def more_tokens(folder):
    without_vocabulary(folder)
    words = [*"abcdefghijklmnopqrstuvwxyz", *(chr(code) for code in range(0x3B1, 0x3C9))]
    tokens = ["<|startoftext|>", "<|endoftext|>", *words, *(f"{word}</w>" for word in words)]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")


DAMAGED = {
    "index that is a list": (replaced("model_index.json", b"[]"), r"index.json holds a JSON list, but an object was expected"),
    "index that is a number": (replaced("model_index.json", b"3"), r"model_index.json holds a JSON int"),
    "index that is empty": (replaced("model_index.json", b""), r"model_index.json is not valid JSON. Download it again"),
    "index that is not JSON": (replaced("model_index.json", b"<html>"), r"model_index.json is not valid JSON"),
    "index that is not UTF-8": (replaced("model_index.json", b'{"a": "\xff"}'), r"model_index.json is not valid JSON"),
    "index that is nested": (replaced("model_index.json", b"[" * 100_000), r"model_index.json is not valid JSON"),
    "unknown pipeline": (index(_class_name="QwenImagePipeline"), r"is a 'QwenImagePipeline'. ksag samples Stable Diffusion 1.x"),
    "index without a VAE": (index(vae=None), r"model_index.json names no vae, which a StableDiffusionPipeline needs"),
    "index with a null scheduler": (index(scheduler=[None, None]), r"names no scheduler"),
    "folder without a VAE": (without("vae"), r"pipe/vae is missing: model_index.json names it as a AutoencoderKL"),
    "folder without a UNet's config": (without("unet/config.json"), r"unet/config.json is missing"),
    "invalid config": (replaced("vae/config.json", b'{"act_fn": '), r"vae/config.json is not valid JSON"),
    "config that is a list": (replaced("text_encoder/config.json", b"[1]"), r"text_encoder/config.json holds a JSON list"),
    "config of a wrong type": (config("unet", block_out_channels="many"), r"pipe/unet cannot be loaded: it is damaged"),
    "config of a wrong type in a text encoder": (config("text_encoder", hidden_size="x"), r"pipe/text_encoder cannot be loaded"),
    "scheduler of a wrong type": (config("scheduler", "scheduler_config.json", beta_schedule=3), r"scheduler cannot be loaded"),
    "folder without a tokenizer": (without("tokenizer"), r"pipe/tokenizer is missing"),
    "tokenizer without a vocabulary": (without_vocabulary, r"pipe/tokenizer has no vocabulary: expected tokenizer.json or"),
    "tokenizer that takes no prompt": (config("tokenizer", "tokenizer_config.json", model_max_length=2),
                                       r"pipe/tokenizer has model_max_length=2"),
    "tokenizer of another model": (more_tokens, r"pipe/tokenizer has \d+ tokens, its text encoder 54"),
    "truncated UNet": (truncated("unet/diffusion_pytorch_model.safetensors"),
                       r"^\S*unet/diffusion_pytorch_model.safetensors is damaged, or not a .safetensors file, the only kind"),
    "truncated text encoder": (truncated("text_encoder/model.safetensors"), r"^\S*text_encoder/model.safetensors is damaged"),
    "pointer": (replaced("vae/diffusion_pytorch_model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid 0\n"),
                r"vae/diffusion_pytorch_model.safetensors is damaged.*a Git LFS pointer"),
    "UNet without a tensor": (weights("unet", removed("conv_in.bias")),
                              r"pipe/unet has weights that do not fit its config.json. Tensors missing: conv_in.bias \(1 in all\)"),
    "VAE without a tensor": (weights("vae", removed("decoder.conv_out.weight")), r"vae has .*missing: decoder.conv_out.weight"),
    "text encoder without queries": (weights("text_encoder", removed("q_proj.weight")),
                                     r"text_encoder has .*missing: .*layers.0.self_attn.q_proj.weight.*\(4 in all\)"),
    "UNet with another tensor": (weights("unet", added(more__weight=0)), r"unet has .*unexpected: more.weight"),
    "VAE with another tensor": (weights("vae", added(more__weight=0)), r"vae has .*unexpected: more.weight"),
    "text encoder with another tensor": (weights("text_encoder", added(more__weight=0)),
                                         r"text_encoder has .*unexpected: more.weight"),
    "UNet of another shape": (weights("unet", cut("conv_in.weight")), r"unet has .*of another shape: conv_in.weight"),
    "text encoder of another shape": (weights("text_encoder", cut("fc1.bias")), r"text_encoder has .*of another shape: .*fc1.bias"),
    "text encoder of another model": (config("unet", cross_attention_dim=48), r"unet has .*of another shape"),
}  # fmt: skip
