"""A diffusers pipeline → the single .safetensors file that CompVis's and Stability's code keeps it in, name by name."""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def unet_name(name, config, attends):
    """A UNet's tensor: its blocks count resnets and resamplers in one row. `attends` are the up blocks that have attention."""
    layers = config.layers_per_block
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    side, block, part, layer, rest = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.?(\d*)\.(\w+)\.(\d+)\.(.*)", name).groups()
    if part == "resnets":
        inner, _, kind = rest.rpartition(".")
        rest = f"{RESNET[inner]}.{kind}"
    if side == "mid_block":
        return f"middle_block.{1 if part == 'attentions' else 2 * int(layer)}.{rest}"
    block, layer = int(block), int(layer)
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if block in attends else 1}.{rest}"
    row = ("input_blocks", 1) if side == "down_blocks" else ("output_blocks", 0)
    return f"{row[0]}.{row[1] + block * (layers + 1) + layer}.{0 if part == 'resnets' else 1}.{rest}"


def vae_name(name, blocks):
    for old, new in [
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample"),
        (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"), (r"group_norm", "norm"),
        (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"),
    ]:  # fmt: skip
        name = re.sub(old, new, name)
    return name


def vae_tensors(vae):
    blocks = len(vae.config.up_block_types)
    for name, tensor in vae.state_dict().items():
        name = vae_name(name, blocks)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        yield f"first_stage_model.{name}", tensor[:, :, None, None] if is_attention else tensor  # CompVis's are convolutions


def clip_tensors(encoder, prefix):
    """OpenAI's CLIP, as transformers names it. Its later versions leave out text_model, which the files have."""
    for name, tensor in encoder.state_dict().items():
        yield f"{prefix}text_model.{name.removeprefix('text_model.')}", tensor


def open_clip_tensors(encoder, prefix):
    """OpenCLIP's names; queries, keys and values lie in one."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            yield f"{prefix}text_projection", tensor.T.contiguous()
        elif name.endswith("position_embedding.weight"):
            yield f"{prefix}positional_embedding", tensor
        elif name.endswith("token_embedding.weight"):
            yield f"{prefix}token_embedding.weight", tensor
        elif name.startswith("final_layer_norm"):
            yield name.replace("final_layer_norm", f"{prefix}ln_final"), tensor
        elif ".self_attn.q_proj." in name:
            three = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            yield _resblock(name.replace("q_proj.", "in_proj_"), prefix), three
        elif ".self_attn.out_proj" in name or "self_attn" not in name:
            yield _resblock(name, prefix), tensor


def _resblock(name, prefix):
    names = {
        "encoder.layers": f"{prefix}transformer.resblocks", "self_attn": "attn", "layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj"
    }  # fmt: skip
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def single_file(pipe, path, *, extra=None, metadata=None, leave_out=()):
    """Writes the pipeline as one file; `extra` tensors go in as they are, and what begins with `leave_out` stays out."""
    config = pipe.unet.config
    attends = {i for i, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
    unet = ((unet_name(name, config, attends), tensor) for name, tensor in pipe.unet.state_dict().items())
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in unet}
    tensors |= dict(vae_tensors(pipe.vae))
    if hasattr(pipe, "text_encoder_2"):
        tensors |= dict(clip_tensors(pipe.text_encoder, "conditioner.embedders.0.transformer."))
        tensors |= dict(open_clip_tensors(pipe.text_encoder_2, "conditioner.embedders.1.model."))
    elif pipe.text_encoder.config.hidden_act == "gelu":
        tensors |= dict(open_clip_tensors(pipe.text_encoder, "cond_stage_model.model."))
    else:
        tensors |= dict(clip_tensors(pipe.text_encoder, "cond_stage_model.transformer."))
    kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if not name.startswith(tuple(leave_out))}
    save_file(kept | (extra or {}), path, metadata)
    return path
