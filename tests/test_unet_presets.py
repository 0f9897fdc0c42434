import pytest
import torch

from diffusers_rcfd import UNET_PRESETS, build_unet


def parameters(unet):
    return sum(parameter.numel() for parameter in unet.parameters())


def test_cifar10_is_the_network_of_the_authors():
    unet = build_unet("cifar10", dropout=0.1)
    assert parameters(unet) == 35_746_307
    config = unet.config
    assert config.block_out_channels == (128, 256, 256, 256) and config.layers_per_block == 2
    assert (config.flip_sin_to_cos, config.freq_shift, config.dropout) == (False, 0, 0.1)
    assert [bool(getattr(block, "attentions", None)) for block in unet.down_blocks] == [False, True, False, False]
    assert [bool(getattr(block, "attentions", None)) for block in unet.up_blocks] == [False, False, True, False]
    assert unet.mid_block.attentions[0].heads == 1
    paper = build_unet("cifar10-paper")
    assert [bool(getattr(block, "attentions", None)) for block in paper.down_blocks] == [False, False, True, False]
    assert paper.config.dropout == 0


@pytest.mark.parametrize("preset", sorted(UNET_PRESETS))
def test_forward_keeps_the_image_shape(preset):
    unet = build_unet(preset).eval()
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    with torch.no_grad():
        assert unet(torch.randn(shape), 1024).sample.shape == shape


def test_class_conditional():
    unet = build_unet("digits", num_class_embeds=10)
    images = torch.randn(2, 1, 8, 8)
    out = unet(images, torch.tensor([3, 3]), torch.tensor([1, 2])).sample
    assert out.shape == images.shape


def test_unknown_preset_and_argument():
    with pytest.raises(ValueError, match=r"`preset` must be one of .*'cifar10'.* got 'imagenet'"):
        build_unet("imagenet")
    with pytest.raises(TypeError, match="depth"):
        build_unet("digits", depth=3)
