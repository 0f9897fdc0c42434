"""Sampling through ONNX Runtime gives the images of the pipeline itself, in any batch size and kind of model."""

import copy
import sys

import pytest
import torch

from diffusers_rcfd import RCFDPipeline, RCFDScheduler, to_onnx_runtime
from tests.toys import tiny_teacher, tiny_unet

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def base():
    return tiny_teacher()


@pytest.fixture(scope="module")
def faster(base):
    return to_onnx_runtime(base, num_threads=1)


@pytest.mark.parametrize("batch_size, steps", [(1, 1), (3, 4), (5, 2)])
def test_same_images(base, faster, batch_size, steps):
    options = {"num_inference_steps": steps, "output_type": "pt"}
    theirs, ours = (each(batch_size, generator=torch.manual_seed(1), **options).images for each in (base, faster))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.05


def test_torch_does_not_run_the_network(base):
    """The export alone computes: with the weights gone the images are the same."""
    emptied = RCFDPipeline(copy.deepcopy(base.unet), base.scheduler)
    faster = to_onnx_runtime(emptied)
    with torch.no_grad():
        for parameter in emptied.unet.parameters():
            parameter.zero_()
    call = {"batch_size": 2, "num_inference_steps": 1, "output_type": "pt"}
    theirs, ours = (pipeline(generator=torch.manual_seed(0), **call).images for pipeline in (base, faster))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_classes(tmp_path):
    """A class-conditional model, whose labels reach the network."""
    torch.manual_seed(0)
    unet = tiny_unet(num_class_embeds=3)
    torch.nn.init.normal_(unet.class_embedding.weight, std=3.0)
    pipeline = RCFDPipeline(unet.eval(), RCFDScheduler(num_inference_steps=2))
    call = {"batch_size": 3, "class_labels": [0, 1, 2], "output_type": "pt"}
    noise = torch.randn(1, *pipeline.image_shape).expand(3, -1, -1, -1)
    ours = to_onnx_runtime(pipeline)(latents=noise, **call).images
    torch.testing.assert_close(ours, pipeline(latents=noise, **call).images, rtol=0, atol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 1e-3


def test_the_given_pipeline_stays_and_the_faster_one_is_saved_like_it(base, faster, tmp_path):
    assert "forward" not in vars(base.unet)
    faster.save_pretrained(tmp_path)
    loaded = RCFDPipeline.from_pretrained(str(tmp_path))
    for name, value in base.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)
    assert "forward" not in vars(loaded.unet)


@pytest.mark.parametrize("num_threads", [0, -1, True, 1.5])
def test_bad_threads(base, num_threads):
    with pytest.raises(ValueError, match="num_threads"):
        to_onnx_runtime(base, num_threads)


def test_other_number_types_are_refused():
    with pytest.raises(ValueError, match="float32 on the CPU, got torch.bfloat16"):
        to_onnx_runtime(tiny_teacher().to(torch.bfloat16))


def test_a_pipeline_moved_since_is_refused(base):
    moved = to_onnx_runtime(RCFDPipeline(copy.deepcopy(base.unet), base.scheduler)).to(torch.bfloat16)
    with pytest.raises(ValueError, match="`sample` must be in float32 on the CPU, got torch.bfloat16"):
        moved(num_inference_steps=1)


def test_missing_package_is_named(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript: pip install diffusers_rcfd\[onnx\]"):
        to_onnx_runtime(base)
