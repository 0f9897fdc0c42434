"""NVlabs' EDM networks (Karras et al. 2022) turned into a `UNet2DModel` and an `EDMEulerScheduler`, exactly.

Known, from their public code: `EDMPrecond` holds a network `model`, and the pickles that they publish hold an
`EDMPrecond` as `ema`. docs/published_weights.md says how its state dict becomes a safetensors file. Two networks are
converted: DDPM++ (`SongUNet` with the embedding `positional` and the resampling filter [1, 1], of CIFAR-10, FFHQ and
AFHQ) and ADM (`DhariwalUNet`, of ImageNet-64). Everything that shapes a network is read off its tensors.

Not in the tensors, so taken from the config or assumed: `sigma_data` 0.5 and noise levels from 0.002 to 80. ADM has 64
channels a head. Left out: the inputs for augmentation, which are zero when sampling, and dropout.
"""

import json
import re
from os import PathLike
from typing import Any

import torch
from diffusers import EDMEulerScheduler, UNet2DModel
from safetensors import SafetensorError, safe_open

from diffusers_rcfd.models.edm_unet import EDMUNet2DModel
from diffusers_rcfd.models.state_dicts import check_tensors, get_tensor, load_tensors, shorten

# Modules of their residual block and of Diffusers' one.
_RESIDUAL_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_CHANNELS_PER_HEAD = 64
# What the tensors do not say: EDMPrecond's default, and the range of their sampler.
SIGMA_DATA = 0.5
SIGMA_MIN = 0.002
SIGMA_MAX = 80.0


def read_edm_checkpoint(path: str | PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Read a safetensors file with the state dict of an `EDMPrecond`.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        the tensors, and what the file's metadata holds as JSON under `config`: arguments of the network, or None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in safetensors format, a pickle for example, or its config is not a JSON object.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, safe_open is no dict
            text = (file.metadata() or {}).get("config")
    except SafetensorError as error:
        raise ValueError(
            f"`checkpoint` must be a safetensors file, got {str(path)!r}: pickles can run code and are not read. "
            f"docs/published_weights.md says how to export one ({error})."
        ) from error
    if text is None:
        return state, None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`config` in the metadata of {str(path)!r} must be JSON, got {text!r}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"`config` in the metadata of {str(path)!r} must be a JSON object, got {text!r}.")
    return state, config


def convert_edm(
    state: dict[str, torch.Tensor], config: dict[str, Any] | None = None
) -> tuple[UNet2DModel, EDMEulerScheduler]:
    """The network of an `EDMPrecond` and the scheduler that its noise levels and its preconditioning are of.

    `RCFDPipeline(*convert_edm(state))` puts both on its own grid. ADM becomes a plain `UNet2DModel`. DDPM++ becomes an
    `EDMUNet2DModel`, because a plain one has no 1x1 convolutions on the shortcuts of blocks that resample; so does an
    ADM network with fewer than 32 groups in some group norm.

    Args:
        state (`dict`): name -> tensor, as `EDMPrecond.state_dict()` has them, or its `model`'s.
        config (`dict`, *optional*): arguments of the network as their code names them (`img_resolution`,
            `channel_mult`, ...) and of `EDMPrecond` (`sigma_data`, ...), and `class_name`, which must be `EDMPrecond`.
            Where given, it has to agree with the tensors.

    Returns:
        the network in eval mode, which sees ln(sigma) / 4 as its timestep, and the scheduler.

    Raises:
        ValueError: for a network that cannot be converted exactly, such as NCSN++, for tensors that are missing,
            foreign or of another shape, or for a config that contradicts the tensors. Each is named.
    """
    config = config or {}
    state = {key.removeprefix("model."): tensor for key, tensor in check_tensors(state, "state").items()}
    _refuse_other_networks(state)
    found = _read_architecture(state)
    _check_config(config, found)
    modules = _name_modules(found)
    unet = build_edm_unet(found)
    load_tensors(unet, _convert_tensors(state, modules, found), {ours: theirs for theirs, ours in modules.items()})
    scheduler = EDMEulerScheduler(  # with the levels of their sampler, which stays in the network's range
        sigma_min=max(SIGMA_MIN, config.get("sigma_min", 0)),
        sigma_max=min(SIGMA_MAX, config.get("sigma_max", SIGMA_MAX)),
        sigma_data=config.get("sigma_data", SIGMA_DATA),
    )
    return unet.eval(), scheduler


def _refuse_other_networks(state: dict[str, torch.Tensor]) -> None:
    """Raise a `ValueError` for networks of their code that Diffusers' blocks do not compute."""
    why = None
    filters = {key: tensor for key, tensor in state.items() if key.endswith("resample_filter")}
    wide = [key for key, tensor in filters.items() if tensor.shape[-2:] != (2, 2)]
    uneven = [key for key, tensor in filters.items() if key not in wide and (tensor != 0.25).any()]
    skips = [key for key in state if re.match(r"enc\.\w+_aux_|dec\.\w+_aux_up", key)]
    if wide:
        size = state[wide[0]].shape[-1]
        why = f"its blocks resample with a filter of {size} x {size} ({wide[0]}), as NCSN++ does with [1, 3, 3, 1]"
    elif uneven:
        why = f"the filter {uneven[0]} is not [1, 1]"
    elif skips:
        why = f"it has NCSN++'s residual or skip connections to the image ({shorten(skips, 2)})"
    elif "map_noise.freqs" in state:
        why = "it embeds the noise level in random Fourier features (map_noise.freqs), as NCSN++ does"
    elif "u" in state:
        why = "it is an iDDPM network (u)"
    if why is not None:
        raise ValueError(f"`state` must be of DDPM++ with the filter [1, 1] or of ADM, got NCSN++ or another: {why}.")


def _read_architecture(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What shapes the network, as their code names it, from the names and shapes of its tensors."""
    names = [match.groups() for key in state if (match := re.match(r"(enc|dec)\.(\d+)x\2_([a-z0-9]+)", key))]
    resolutions = sorted({int(size) for part, size, _ in names if part == "enc"}, reverse=True)
    if not resolutions:
        raise ValueError(f"`state` must hold an EDM network with `enc.*` and `dec.*`, got {shorten(state)}.")
    if resolutions != [resolutions[0] >> level for level in range(len(resolutions))]:
        raise ValueError(f"`state` must halve the resolution at each level, got the levels {resolutions}.")
    counts = {
        size: len({name for part, of, name in names if (part, of) == ("enc", str(size)) and name.startswith("block")})
        for size in resolutions
    }
    if len(set(counts.values())) > 1 or not counts[resolutions[0]]:
        raise ValueError(f"`state` must have as many blocks at each level of `enc`, got {counts}.")
    num_blocks = counts[resolutions[0]]
    stem = get_tensor(state, f"enc.{resolutions[0]}x{resolutions[0]}_conv.weight")
    channels = get_tensor(state, "map_layer0.weight").shape[1]
    if len(stem) != channels:
        raise ValueError(
            f"`map_layer0.weight` must take the {len(stem)} channels of the first convolution, got {channels}."
        )
    widths = [len(get_tensor(state, f"enc.{size}x{size}_block0.conv0.weight")) for size in resolutions]
    strange = [width for width in widths if width % channels]
    if strange:
        raise ValueError(f"`state` must have levels in multiples of {channels} channels, got {strange}.")
    labels = state.get("map_label.weight")
    return {
        "model_type": "DhariwalUNet" if "out_norm.weight" in state else "SongUNet",
        "img_resolution": resolutions[0],
        "img_channels": stem.shape[1],
        "label_dim": 0 if labels is None else labels.shape[1],
        "model_channels": channels,
        "channel_mult": [width // channels for width in widths],
        "channel_mult_emb": len(get_tensor(state, "map_layer0.weight")) // channels,
        "num_blocks": num_blocks,
        "attn_resolutions": [size for size in resolutions if f"enc.{size}x{size}_block0.qkv.weight" in state],
        "augment_dim": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
    }


def _check_config(config: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise a `ValueError` for a config that says something else than the tensors."""
    kind = str(config.get("class_name", "EDMPrecond")).rpartition(".")[2]
    if kind != "EDMPrecond":
        raise ValueError(
            f"`class_name` in `config` must be 'EDMPrecond', got {kind!r}: its preconditioning is another."
        )
    sizes = [found["img_resolution"] >> level for level in range(len(found["channel_mult"]))]
    for name, value in config.items():
        if name == "attn_resolutions":  # may name resolutions that the network has not
            value = [size for size in sizes if size in value]
        if name in found and value != found[name]:
            raise ValueError(f"`config` contradicts the tensors: `{name}` is {value!r}, they have {found[name]!r}.")


def _name_modules(found: dict[str, Any]) -> dict[str, str]:
    """Each module of their network with its name in UNet2DModel; those of attention as far as "to_out.0"."""
    top = found["img_resolution"]
    sizes = [top >> level for level in range(len(found["channel_mult"]))]
    modules = {f"enc.{top}x{top}_conv": "conv_in", "map_layer0": "time_embedding.linear_1"}
    if found["model_type"] == "SongUNet":
        modules |= {f"dec.{top}x{top}_aux_norm": "conv_norm_out", f"dec.{top}x{top}_aux_conv": "conv_out"}
    else:
        modules |= {"out_norm": "conv_norm_out", "out_conv": "conv_out"}
    if not _embeds_class_first(found):
        modules["map_layer1"] = "time_embedding.linear_2"

    def add_block(theirs: str, parent: str, i: int) -> None:
        modules.update({f"{theirs}.{a}": f"{parent}.resnets.{i}.{b}" for a, b in _RESIDUAL_BLOCK.items()})
        modules.update({f"{theirs}.norm2": f"{parent}.attentions.{i}.group_norm"})
        modules.update({f"{theirs}.proj": f"{parent}.attentions.{i}.to_out.0"})

    def add_resampler(theirs: str, ours: str) -> None:
        modules.update({f"{theirs}.{a}": f"{ours}.{b}" for a, b in _RESIDUAL_BLOCK.items()})

    for level, size in enumerate(sizes):
        up = len(sizes) - 1 - level
        for i in range(found["num_blocks"]):
            add_block(f"enc.{size}x{size}_block{i}", f"down_blocks.{level}", i)
        for i in range(found["num_blocks"] + 1):
            add_block(f"dec.{size}x{size}_block{i}", f"up_blocks.{up}", i)
        if level > 0:
            add_resampler(f"enc.{size}x{size}_down", f"down_blocks.{level - 1}.downsamplers.0")
            add_resampler(f"dec.{size * 2}x{size * 2}_up", f"up_blocks.{up}.upsamplers.0")
    for i in (0, 1):
        add_block(f"dec.{sizes[-1]}x{sizes[-1]}_in{i}", "mid_block", i)
    return modules


def _embeds_class_first(found: dict[str, Any]) -> bool:
    """Whether the class is added before the two layers that embed the noise level, as in DDPM++."""
    return found["model_type"] == "SongUNet" and found["label_dim"] > 0


def build_edm_unet(found: dict[str, Any]) -> UNet2DModel:
    """A randomly initialised network of an architecture that is given as their code names it (see `convert_edm`)."""
    song = found["model_type"] == "SongUNet"
    channels = found["model_channels"]
    sizes = [found["img_resolution"] >> level for level in range(len(found["channel_mult"]))]
    attends = [size in found["attn_resolutions"] for size in sizes]
    options = {
        "sample_size": found["img_resolution"],
        "in_channels": found["img_channels"],
        "out_channels": found["img_channels"],
        "time_embedding_dim": channels * found["channel_mult_emb"],
        "flip_sin_to_cos": not song,  # DDPM++ has the sines first
        "freq_shift": 1 if song else 0,
        "down_block_types": ["AttnDownBlock2D" if each else "ResnetDownsampleBlock2D" for each in attends],
        "up_block_types": ["AttnUpBlock2D" if each else "ResnetUpsampleBlock2D" for each in reversed(attends)],
        "block_out_channels": [channels * multiplier for multiplier in found["channel_mult"]],
        "layers_per_block": found["num_blocks"],
        "attention_head_dim": None if song else _CHANNELS_PER_HEAD,
        "norm_eps": 1e-6 if song else 1e-5,
        "resnet_time_scale_shift": "default" if song else "scale_shift",
        "num_class_embeds": found["label_dim"] or None,
    }
    if song:
        return EDMUNet2DModel(
            **options,
            stem_channels=channels,
            resnet_out_scale_factor=2**0.5,
            resample_shortcut=True,
            attend_last_layer_up=True,
            embed_class_first=_embeds_class_first(found),
        )
    if min(options["block_out_channels"]) < 4 * 32:  # fewer than 32 groups
        return EDMUNet2DModel(**options)
    return UNet2DModel(**options, downsample_type="resnet", upsample_type="resnet", attn_norm_num_groups=32)


def _convert_tensors(
    state: dict[str, torch.Tensor], modules: dict[str, str], found: dict[str, Any]
) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in UNet2DModel -> (name in the file, tensor); names that UNet2DModel has not stay as they are."""
    tensors = {}
    class_first = _embeds_class_first(found)
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        if parameter == "resample_filter" or module in ("map_augment", "map_label"):
            continue
        if module.endswith(".qkv"):
            attention = modules.get(module.replace(".qkv", ".norm2"), module).removesuffix(".group_norm")
            for name, part in zip("qkv", _split_heads(tensor, found), strict=True):
                tensors[f"{attention}.to_{name}.{parameter}"] = (key, part)
        elif module.endswith(".proj") and tensor.ndim == 4:  # 1x1 convolution (C, C, 1, 1) -> linear layer (C, C)
            tensors[f"{modules.get(module, module)}.{parameter}"] = (key, tensor.flatten(1))
        elif class_first and module.endswith(".affine"):  # the second layer that embeds the noise level, then this one
            block = modules.get(module, module)
            tensors[f"{block}.0.{parameter}"] = (
                f"map_layer1.{parameter}",
                get_tensor(state, f"map_layer1.{parameter}"),
            )
            tensors[f"{block}.2.{parameter}"] = (key, tensor)
        elif not (class_first and module == "map_layer1"):
            tensors[f"{modules.get(module, module)}.{parameter}"] = (key, tensor)
    if class_first:
        _embed_class_first(tensors, state, found["label_dim"])
    elif found["label_dim"]:
        tensors["class_embedding.weight"] = ("map_label.weight", state["map_label.weight"].T)
    return tensors


def _split_heads(qkv: torch.Tensor, found: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of a convolution whose channels are ordered by head, then channel, then these three."""
    channels = len(qkv) // 3
    heads = 1 if found["model_type"] == "SongUNet" else max(channels // _CHANNELS_PER_HEAD, 1)
    parts = qkv.reshape(heads, channels // heads, 3, -1).unbind(2)
    return tuple(part.reshape(channels, -1) if qkv.ndim > 1 else part.flatten() for part in parts)


def _embed_class_first(tensors: dict, state: dict[str, torch.Tensor], label_dim: int) -> None:
    """Put the class, which enters before the first layer, behind it; the network has no activation in between."""
    first = get_tensor(state, "map_layer0.weight")
    weight, bias = (get_tensor(state, f"map_label.{name}") for name in ("weight", "bias"))
    classes = weight.double() * label_dim**0.5 + bias.double()[:, None]  # (channels, classes)
    tensors["class_embedding.weight"] = ("map_label.weight", (first.double() @ classes).T.to(first.dtype))
    size = len(first)
    tensors["time_embedding.linear_2.weight"] = ("map_layer0.weight", torch.eye(size, dtype=first.dtype))
    tensors["time_embedding.linear_2.bias"] = ("map_layer0.bias", torch.zeros(size, dtype=first.dtype))
