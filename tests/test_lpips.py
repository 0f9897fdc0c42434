from types import SimpleNamespace

import pytest
import torch
from torch_fidelity import sample_similarity_lpips
from torchvision.models.vgg import cfgs, make_layers

from diffusers_rcfd.losses.lpips import LINEAR_FILE, LPIPS, VGG_FILE


def test_agrees_with_torch_fidelity_and_passes_gradients(tmp_path, monkeypatch):
    """The same random weights in torch-fidelity's port of the authors' code, which takes images in 0..255."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"])
    weights = {f"features.{name}": value for name, value in features.state_dict().items()}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(weights | {"classifier.0.bias": torch.zeros(2)}, tmp_path / VGG_FILE)
    torch.save(linear, tmp_path / LINEAR_FILE)
    monkeypatch.setattr(sample_similarity_lpips, "load_state_dict_from_url", lambda *_, **__: linear)
    monkeypatch.setattr(
        sample_similarity_lpips, "torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=features)
    )
    monkeypatch.setattr(
        sample_similarity_lpips.SampleSimilarityLPIPS, "load_state_dict",
        lambda self, state: torch.nn.Module.load_state_dict(self, state, strict=False),
    )  # fmt: skip
    theirs = sample_similarity_lpips.SampleSimilarityLPIPS("lpips")
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    a.requires_grad_()
    value = LPIPS(tmp_path)(a, b)
    torch.testing.assert_close(value, theirs((a + 1) * 127.5, (b + 1) * 127.5).flatten(), rtol=1e-4, atol=1e-5)
    assert (value > 0).all() and (LPIPS(tmp_path)(b, b) == 0).all()
    value.sum().backward()
    assert a.grad.abs().max() > 0


def test_under_autocast_only_the_features_are_rounded(tmp_path):
    torch.manual_seed(0)
    weights = {f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(weights, tmp_path / VGG_FILE)
    torch.save(linear, tmp_path / LINEAR_FILE)
    lpips, image = LPIPS(tmp_path), torch.rand(2, 3, 32, 32) * 2 - 1
    other = image + 0.3 * torch.randn(image.shape)
    exact = lpips(image, other)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = lpips(image, other)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def test_files_that_are_absent_or_hold_other_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"`lpips_weights` must be a folder that holds {VGG_FILE}"):
        LPIPS(tmp_path)
    for name in (VGG_FILE, LINEAR_FILE):
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="holds other weights"):
        LPIPS(tmp_path)
