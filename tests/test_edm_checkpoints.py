"""NVlabs' EDM networks, against golden outputs and against ADM written out below."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from safetensors.torch import save_file

from diffusers_rcfd import RCFDPipeline
from diffusers_rcfd.models.edm_checkpoints import build_edm_unet, convert_edm, read_edm_checkpoint
from diffusers_rcfd.models.edm_unet import EDMUNet2DModel
from tests.toys import GOLDEN, golden

NAMES = ("edm_ddpmpp", "edm_ddpmpp_cond", "edm_adm")
SIGMA_DATA = 0.5


@pytest.fixture(scope="module")
def numbers():
    return golden("edm_io")


def read(name):
    return read_edm_checkpoint(GOLDEN / f"{name}.safetensors")


def relative_error(given, expected):
    """The largest over the images of a batch."""
    return ((given - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def labels_of(unet, numbers):
    return None if unet.config.num_class_embeds is None else numbers["classes"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_golden_denoised_images(name, numbers):
    unet, scheduler = convert_edm(*read(name))
    assert not unet.training and scheduler.config.sigma_data == SIGMA_DATA
    x = numbers[f"{name}_x"]
    sigma = numbers["sigma"].view(-1, 1, 1, 1)
    scale = (sigma**2 + SIGMA_DATA**2).sqrt()
    output = unet(x / scale, (sigma.log() / 4).flatten(), labels_of(unet, numbers)).sample
    denoised = (SIGMA_DATA / scale) ** 2 * x + sigma * SIGMA_DATA / scale * output
    assert relative_error(denoised, numbers[f"{name}_D"]) < 1e-5
    # Where little noise is, D is nearly x: the network's own output, to what float32 leaves of it in D.
    expected = (numbers[f"{name}_D"] - (SIGMA_DATA / scale) ** 2 * x) / (sigma * SIGMA_DATA / scale)
    assert relative_error(output[1:], expected[1:]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_golden_pipeline_on_our_grid(name, numbers):
    """The grid of EDM's scheduler ends at the first and the last of the golden noise levels."""
    pipeline = RCFDPipeline(*convert_edm(*read(name)))
    for k, i in ((0, 0), (1024, 3)):
        sigma = numbers["sigma"][i].item()
        z = numbers[f"{name}_x"][i : i + 1] / math.hypot(sigma, SIGMA_DATA)
        labels = labels_of(pipeline.unet, numbers)
        output = pipeline.unet(z, k, None if labels is None else labels[i : i + 1]).sample
        x0 = pipeline.scheduler.predict_x0(output, z, torch.tensor([k]))
        assert relative_error(x0, numbers[f"{name}_D"][i : i + 1]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_network_is_saved_copied_and_trained(name, numbers, tmp_path):
    unet, _ = convert_edm(*read(name))
    unet.save_pretrained(tmp_path)
    loaded = EDMUNet2DModel.from_pretrained(tmp_path)
    assert dict(loaded.config).keys() - {"_name_or_path"} <= dict(unet.config).keys() | {"_class_name"}
    x, labels = numbers[f"{name}_x"], labels_of(unet, numbers)
    outputs = [each(x, 0.3, labels).sample for each in (unet, loaded, copy.deepcopy(unet))]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    loaded.train()(x, torch.arange(4.0), labels).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize("name", NAMES[:1])
def test_pipeline_is_saved(name, numbers, tmp_path):
    pipeline = RCFDPipeline(*convert_edm(*read(name)))
    pipeline.save_pretrained(tmp_path)
    again = RCFDPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is EDMUNet2DModel
    options = {"num_inference_steps": 2, "latents": numbers[f"{name}_x"], "output_type": "pt"}
    assert torch.equal(pipeline(4, **options).images, again(4, **options).images)


def test_architecture_is_read_off_the_tensors():
    """A config is needed for nothing that shapes the network."""
    for name in NAMES:
        state, config = read(name)
        with_config, _ = convert_edm(state, config)
        without, _ = convert_edm({key.removeprefix("model."): tensor for key, tensor in state.items()})
        assert dict(without.config) == dict(with_config.config)
        assert all(torch.equal(a, b) for a, b in zip(without.parameters(), with_config.parameters(), strict=True))


@pytest.mark.parametrize(
    "kind, size, channels, multipliers, blocks, attention, classes, millions",
    [
        ("SongUNet", 32, 128, [2, 2, 2], 4, [16], 0, 55.7),
        ("SongUNet", 64, 128, [1, 2, 2, 2], 4, [16], 0, 61.8),
        ("DhariwalUNet", 64, 192, [1, 2, 3, 4], 3, [32, 16, 8], 1000, 295.9),
    ],
)
def test_published_networks_have_their_size(kind, size, channels, multipliers, blocks, attention, classes, millions):
    """In millions of parameters: CIFAR-10, FFHQ and AFHQ, ImageNet-64."""
    architecture = {"model_type": kind, "img_resolution": size, "img_channels": 3, "model_channels": channels}
    architecture |= {"channel_mult": multipliers, "channel_mult_emb": 4, "num_blocks": blocks}
    with torch.device("meta"):
        unet = build_edm_unet(architecture | {"attn_resolutions": attention, "label_dim": classes})
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6, 1) == millions
    assert (type(unet) is UNet2DModel) == (kind == "DhariwalUNet")


# --- ADM, in channels enough for a plain UNet2DModel ------------------------------------------------------------


def adm_state(channels=128, multipliers=(1, 2), blocks=1, attention=(8,), size=16, classes=3):
    generator = torch.Generator().manual_seed(0)
    state = {}

    def layer(name, *shape, bias=True):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def block(name, c_in, c_out, attend=False, resample=False):
        norm(f"{name}.norm0", c_in)
        layer(f"{name}.conv0", c_out, c_in, 3, 3)
        layer(f"{name}.affine", 2 * c_out, 4 * channels)
        norm(f"{name}.norm1", c_out)
        layer(f"{name}.conv1", c_out, c_out, 3, 3)
        if c_in != c_out:
            layer(f"{name}.skip", c_out, c_in, 1, 1)
        if resample:
            state[f"{name}.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
            state[f"{name}.skip.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        if attend:
            norm(f"{name}.norm2", c_out)
            layer(f"{name}.qkv", 3 * c_out, c_out, 1, 1)
            layer(f"{name}.proj", c_out, c_out, 1, 1)

    layer("map_layer0", 4 * channels, channels)
    layer("map_layer1", 4 * channels, 4 * channels)
    layer("map_label", 4 * channels, classes, bias=False)
    layer(f"enc.{size}x{size}_conv", channels, 3, 3, 3)
    width, skips = channels, [channels]
    for level, multiplier in enumerate(multipliers):
        res = size >> level
        if level:
            block(f"enc.{res}x{res}_down", width, width, resample=True)
            skips.append(width)
        for i in range(blocks):
            block(f"enc.{res}x{res}_block{i}", width, channels * multiplier, res in attention)
            width = channels * multiplier
            skips.append(width)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        res = size >> level
        if level == len(multipliers) - 1:
            block(f"dec.{res}x{res}_in0", width, width, attend=True)
            block(f"dec.{res}x{res}_in1", width, width)
        else:
            block(f"dec.{res}x{res}_up", width, width, resample=True)
        for i in range(blocks + 1):
            block(f"dec.{res}x{res}_block{i}", width + skips.pop(), channels * multiplier, res in attention)
            width = channels * multiplier
    norm("out_norm", width)
    layer("out_conv", 3, width, 3, 3)
    return state


@torch.no_grad()
def official_adm(state, x, noise, classes):
    """ADM as a function of its weights: `noise` (B,) is ln(sigma) / 4."""

    def conv(name, h):
        return F.conv2d(
            h, state[f"{name}.weight"], state[f"{name}.bias"], padding=state[f"{name}.weight"].shape[-1] // 2
        )

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, h):
        groups = min(32, h.shape[1] // 4)
        return F.group_norm(h, groups, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def resample(name, h):
        if name.endswith("_down"):
            return F.avg_pool2d(h, 2)
        return F.interpolate(h, scale_factor=2.0) if name.endswith("_up") else h

    def block(name, x):
        h = conv(f"{name}.conv0", resample(name, F.silu(norm(f"{name}.norm0", x))))
        scale, shift = linear(f"{name}.affine", embedding)[:, :, None, None].chunk(2, dim=1)
        h = conv(f"{name}.conv1", F.silu(shift + norm(f"{name}.norm1", h) * (1 + scale)))
        shortcut = resample(name, x)
        h = h + (conv(f"{name}.skip", shortcut) if f"{name}.skip.weight" in state else shortcut)
        if f"{name}.qkv.weight" not in state:
            return h
        heads = h.shape[1] // 64
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", h)).reshape(len(h), heads, 64, 3, -1)  # (B, heads, 64, 3, HW)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)  # (B, heads, 64, HW)
        return h + conv(f"{name}.proj", attended.reshape(h.shape))

    half = state["map_layer0.weight"].shape[1] // 2
    angles = noise[:, None] / 10000 ** (torch.arange(half) / half)
    embedding = linear("map_layer1", F.silu(linear("map_layer0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    embedding = F.silu(embedding + state["map_label.weight"].T[classes])
    blocks = list(dict.fromkeys(".".join(key.split(".")[:2]) for key in state if key.startswith(("enc", "dec"))))
    # In the order of the forward pass: falling resolutions, then rising ones.
    kinds = {"conv": 0, "down": 0, "in0": 0, "in1": 1, "up": 0}
    places = []
    for name in blocks:
        size, kind = name[4:].split("_")
        order = kinds.get(kind, 2 + int(kind[5:]) if kind.startswith("block") else 0)
        resolution = int(size.split("x")[0])
        places.append(((0, -resolution, order) if name.startswith("enc") else (1, resolution, order), name))
    skips, h = [], x
    for (part, _, _), name in sorted(places):
        if part == 0:
            h = conv(name, h) if name.endswith("_conv") else block(name, h)
            skips.append(h)
        else:
            h = block(name, torch.cat([h, skips.pop()], dim=1) if "block" in name else h)
    return conv("out_conv", F.silu(norm("out_norm", h)))


@torch.no_grad()
def test_wide_adm_is_a_plain_unet(numbers):
    noise, classes = numbers["sigma"].log() / 4, torch.tensor([0, 2, 1, 0])
    x = numbers["edm_adm_x"] / (numbers["sigma"].view(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
    state = {key.removeprefix("model."): tensor for key, tensor in read("edm_adm")[0].items()}
    unet, _ = convert_edm(state)  # whose golden numbers make the function above theirs
    torch.testing.assert_close(official_adm(state, x, noise, classes), unet(x, noise, classes).sample)
    state = adm_state()
    unet, _ = convert_edm(state)
    assert type(unet) is UNet2DModel and unet.config.block_out_channels == [128, 256]
    torch.testing.assert_close(
        unet(x, noise, classes).sample, official_adm(state, x, noise, classes), atol=1e-4, rtol=1e-4
    )


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("edm_ddpmpp", {"model.dec.8x8_in1.conv1.bias": None}, r"missing: dec\.8x8_in1\.conv1\.bias\."),
        ("edm_ddpmpp", {"model.map_layer1.weight": None}, r"missing: map_layer1\.weight\."),
        ("edm_ddpmpp", {"model.enc.8x8_down.skip.weight": None}, r"missing: enc\.8x8_down\.skip\.weight\."),
        (
            "edm_adm",
            {"model.dec.16x16_block1.qkv.weight": torch.ones(192, 64, 1, 1)},
            "not of this network: dec.16x16",
        ),
        ("edm_adm", {"model.extra.weight": torch.ones(1)}, r"not of this network: extra\.weight\."),
        ("edm_adm", {"model.out_conv.bias": torch.ones(6)}, r"another shape: out_conv\.bias \(6,\) instead of \(3,\)"),
        ("edm_adm", {"model.map_layer0.weight": None}, "no tensor 'map_layer0.weight'"),
        ("edm_ddpmpp_cond", {"model.map_label.bias": None}, "no tensor 'map_label.bias'"),
        (
            "edm_ddpmpp",
            {"model.enc.8x8_down.conv0.resample_filter": torch.ones(1, 1, 4, 4)},
            r"`state` must be of DDPM\+\+ .* got NCSN\+\+ or another: its blocks resample with a filter of 4 x 4",
        ),
        ("edm_ddpmpp", {"model.enc.8x8_down.conv0.resample_filter": torch.ones(1, 1, 2, 2)}, r"is not \[1, 1\]"),
        (
            "edm_ddpmpp",
            {"model.enc.8x8_aux_residual.weight": torch.ones(1)},
            "residual or skip connections to the ima",
        ),
        ("edm_ddpmpp", {"model.map_noise.freqs": torch.ones(16)}, "random Fourier features"),
        ("edm_adm", {"u": torch.ones(1001)}, "iDDPM"),
        ("edm_adm", {"model.enc.8x8_block1.norm0.bias": torch.ones(64)}, "as many blocks at each level"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, message):
    state, config = read(name)
    for key, value in change.items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    with pytest.raises(ValueError, match=message):
        convert_edm(state, config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_resolution": 32}, "`config` contradicts the tensors: `img_resolution` is 32, they have 16"),
        ({"label_dim": 10}, "`label_dim` is 10, they have 0"),
        ({"channel_mult": [1, 1]}, r"`channel_mult` is \[1, 1\], they have \[1, 2\]"),
        ({"attn_resolutions": [16, 8]}, r"`attn_resolutions` is \[16, 8\], they have \[8\]"),
        ({"model_type": "DhariwalUNet"}, "`model_type` is 'DhariwalUNet', they have 'SongUNet'"),
        (
            {"class_name": "training.networks.VPPrecond"},
            "`class_name` in `config` must be 'EDMPrecond', got 'VPPrecond'",
        ),
        ({"embedding_type": "fourier"}, "`embedding_type` is 'fourier', they have 'positional'"),
    ],
)
def test_config_that_contradicts_the_weights_is_refused(change, message):
    state, config = read("edm_ddpmpp")
    with pytest.raises(ValueError, match=message):
        convert_edm(state, config | change)
    convert_edm(state, config | {"class_name": "training.networks.EDMPrecond", "attn_resolutions": [8, 4]})


def test_only_tensors_are_read(tmp_path):
    torch.save({"ema": torch.ones(2)}, tmp_path / "network.pkl")
    with pytest.raises(ValueError, match="`checkpoint` must be a safetensors file, got .*network.pkl"):
        read_edm_checkpoint(tmp_path / "network.pkl")
    with pytest.raises(FileNotFoundError):
        read_edm_checkpoint(tmp_path / "none.safetensors")
    for text, message in (("{", "must be JSON"), ("[1]", "must be a JSON object")):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"config": text})
        with pytest.raises(ValueError, match=message):
            read_edm_checkpoint(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"config": json.dumps({"sigma_data": 1.0})})
    state, config = read_edm_checkpoint(tmp_path / "a.safetensors")
    assert config == {"sigma_data": 1.0}
    with pytest.raises(ValueError, match="must hold an EDM network with `enc.*` and `dec.*`, got a"):
        convert_edm(state, config)
