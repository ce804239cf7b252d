"""A diffusers pipeline → the single .safetensors file that CompVis's and Stability's code keeps it in, name by name."""

import functools
import re

import torch
from safetensors.torch import save_file


def made_once(tmp_path_factory, finish):
    """A function of a function that makes a pipeline in a folder: what `finish(pipe, folder)` returns of it, made once for each."""

    @functools.cache
    def pipeline(make):
        folder = tmp_path_factory.mktemp(make.__name__)
        return finish(make(folder), folder)

    return pipeline


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


STABLE_DIFFUSION_3 = {
    r"^pos_embed\.pos_embed": "pos_embed", r"^pos_embed\.proj": "x_embedder.proj",
    r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"^time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"^time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    r"^proj_out": "final_layer.linear", r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"\.norm1\.linear": ".x_block.adaLN_modulation.1", r"\.norm1_context\.linear": ".context_block.adaLN_modulation.1",
    r"\.(attn2?)\.to_[qkv]\.": r".x_block.\1.qkv.", r"\.attn\.add_[qkv]_proj": ".context_block.attn.qkv",
    r"\.(attn2?)\.norm_([qk])\.": r".x_block.\1.ln_\2.", r"\.attn\.norm_added_([qk])": r".context_block.attn.ln_\1",
    r"\.(attn2?)\.to_out\.0": r".x_block.\1.proj", r"\.attn\.to_add_out": ".context_block.attn.proj",
    r"\.ff\.": ".x_block.mlp.", r"\.ff_context\.": ".context_block.mlp.",
    r"net\.0\.proj": "fc1", r"net\.2": "fc2", r"^transformer_blocks": "joint_blocks",
}  # fmt: skip
FLUX = {
    r"^time_text_embed\.timestep_embedder": "time_in", r"^time_text_embed\.text_embedder": "vector_in",
    r"^time_text_embed\.guidance_embedder": "guidance_in", r"_in\.linear_1": "_in.in_layer", r"_in\.linear_2": "_in.out_layer",
    r"^context_embedder": "txt_in", r"^x_embedder": "img_in",
    r"^proj_out": "final_layer.linear", r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"^single(.*)\.(?:attn\.to_[qkv]|proj_mlp)\.": r"single\1.linear1.", r"^single(.*)\.proj_out": r"single\1.linear2",
    r"^single(.*)\.norm\.linear": r"single\1.modulation.lin", r"^single(.*)\.attn\.norm_": r"single\1.norm_",
    r"^single_transformer_blocks": "single_blocks", r"^transformer_blocks": "double_blocks",
    r"\.norm1\.linear": ".img_mod.lin", r"\.norm1_context\.linear": ".txt_mod.lin",
    r"\.attn\.to_[qkv]\.": ".img_attn.qkv.", r"\.attn\.add_[qkv]_proj": ".txt_attn.qkv",
    r"\.attn\.norm_added_": ".txt_attn.norm_", r"\.attn\.norm_": ".img_attn.norm_",
    r"\.norm_q\.weight": ".norm.query_norm.scale", r"\.norm_k\.weight": ".norm.key_norm.scale",
    r"\.attn\.to_out\.0": ".img_attn.proj", r"\.attn\.to_add_out": ".txt_attn.proj",
    r"\.ff\.net\.(\d)(\.proj)?": r".img_mlp.\1", r"\.ff_context\.net\.(\d)(\.proj)?": r".txt_mlp.\1",
}  # fmt: skip


def transformer_tensors(transformer, prefix="model.diffusion_model."):
    """Queries, keys and values lie in one, Flux's single blocks have the MLP there too; a last norm's shift is before its scale."""
    is_flux, joined = type(transformer).__name__ == "FluxTransformer2DModel", {}
    last = "norm_out" if is_flux else rf"norm_out|transformer_blocks\.{transformer.config.num_layers - 1}\.norm1_context"
    for name, tensor in transformer.state_dict().items():
        new = name
        for old, of_file in (FLUX if is_flux else STABLE_DIFFUSION_3).items():
            new = re.sub(old, of_file, new)
        part = re.search(r"\.(?:to_|add_|proj_)([qkvm])(?:_proj|lp)?\.", name)
        rows = tensor.roll(len(tensor) // 2, 0) if re.match(last, name) else tensor
        joined.setdefault(prefix + new, {})["qkvm".index(part[1]) if part else 0] = rows
    for name, parts in joined.items():
        yield name, torch.cat([parts[place] for place in sorted(parts)])


def flow_tensors(pipe, prefix):
    """Stable Diffusion 3 or Flux; ComfyUI leaves a logit_scale next to each text encoder."""
    yield from transformer_tensors(pipe.transformer, prefix)
    encoders = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2, "t5xxl": getattr(pipe, "text_encoder_3", None)}
    if encoders["t5xxl"] is None:
        encoders = {"clip_l": pipe.text_encoder, "t5xxl": pipe.text_encoder_2}
    for name, encoder in encoders.items():
        whole = f"text_encoders.{name}.transformer."
        yield f"text_encoders.{name}.logit_scale", torch.ones(1)
        for key, tensor in encoder.state_dict().items():
            key = key if name == "t5xxl" or key.startswith("text_") else f"text_model.{key}"
            if key != "encoder.embed_tokens.weight":  # the same as shared.weight
                yield whole + key, tensor


def flow_file(pipe, path, *, prefix="model.diffusion_model.", vae="first_stage_model.", **options):
    """`single_file` of Stable Diffusion 3 or Flux, with the prefixes of its transformer and VAE."""
    tensors = dict(flow_tensors(pipe, prefix))
    tensors |= {name.replace("first_stage_model.", vae): tensor for name, tensor in vae_tensors(pipe.vae)}
    return _save(tensors, path, **options)


def single_file(pipe, path, **options):
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
    return _save(tensors, path, **options)


def _save(tensors, path, *, extra=None, metadata=None, leave_out=()):
    kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if not name.startswith(tuple(leave_out))}
    save_file(kept | (extra or {}), path, metadata)
    return path
