import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_rcfd import RCFDPipeline, RCFDScheduler
from diffusers_rcfd.hub.model_card import create_model_card, describe_generator
from tests.toys import largest_file, tiny_sfd_student, tiny_unet


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return quiet(RCFDPipeline(tiny_unet(), RCFDScheduler(num_inference_steps=4)))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("output_type, kind", [("pt", torch.Tensor), ("np", np.ndarray), ("pil", list)])
def test_output_types_hold_the_same_images(pipe, output_type, kind):
    images = pipe(batch_size=3, generator=seeded(), output_type=output_type).images
    assert isinstance(images, kind) and len(images) == 3
    expected = pipe(batch_size=3, generator=seeded(), output_type="pt", return_dict=False)[0]
    assert expected.shape == (3, 1, 8, 8) and 0 <= expected.min() and expected.max() <= 1
    if output_type == "np":
        np.testing.assert_array_equal(images, expected.permute(0, 2, 3, 1).numpy())
    if output_type == "pil":
        assert images[0].mode == "L" and images[0].size == (8, 8)
        np.testing.assert_allclose(np.asarray(images[1]), 255 * expected[1, 0].numpy(), atol=0.51)


def test_images_depend_on_noise_alone_not_on_batch_or_history(pipe):
    generators = [seeded(i) for i in range(5)]
    together = pipe(batch_size=5, generator=generators, output_type="pt").images
    pipe(num_inference_steps=2, generator=seeded())
    for i in range(5):
        alone = pipe(generator=[seeded(i)], output_type="pt").images
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    latents = torch.stack([torch.randn((1, 8, 8), generator=seeded(i)) for i in range(5)])
    given = pipe(batch_size=5, latents=latents, output_type="pt").images
    torch.testing.assert_close(given, together, rtol=0, atol=1e-6)
    assert len(pipe(latents=latents, output_type="pt").images) == 5


def test_number_of_network_calls_and_default_steps(pipe):
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(int(args[1])))
    pipe()
    pipe(num_inference_steps=1)
    handle.remove()
    assert calls == [1024, 768, 512, 256, 1024]
    base = quiet(RCFDPipeline(pipe.unet, RCFDScheduler()))
    assert base.scheduler.config.num_inference_steps is None
    base(num_inference_steps=3)


def test_class_labels():
    torch.manual_seed(0)
    pipe = quiet(RCFDPipeline(tiny_unet(num_class_embeds=10), RCFDScheduler(num_inference_steps=1)))
    latents = torch.randn(2, 1, 8, 8, generator=seeded()).repeat(2, 1, 1, 1)
    images = pipe(4, latents=latents, class_labels=[1, 1, 2, 2], output_type="pt").images
    assert not torch.allclose(images[:2], images[2:])
    one = pipe(4, latents=latents, class_labels=1, output_type="pt").images
    torch.testing.assert_close(one[:2], images[:2])
    tensor = pipe(4, latents=latents, class_labels=torch.tensor([1, 1, 2, 2]), output_type="pt").images
    torch.testing.assert_close(tensor, images)
    for wrong, message in (
        (None, r"`class_labels` must be given, in 0\.\.9"),
        (10, r"must be in 0\.\.9, got 10"),
        ([0, -1, 1, 2], r"must be in 0\.\.9"),
        ([1, 2], "must be one integer or 4 integers"),
        (0.5, "must be one integer"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(4, class_labels=wrong)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"batch_size": 3, "generator": [seeded()]}, "`generator` as a list .*=3 images, got 1"),
        ({"num_inference_steps": 8}, r"`num_inference_steps` must be one of \[1, 2, 4\]"),
        ({"num_inference_steps": 3}, r"`num_inference_steps` must be one of \[1, 2, 4\]"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be an integer in 1\.\.1024, got 0"),
        ({"output_type": "jpeg"}, r"`output_type` must be one of .*, got 'jpeg'"),
        ({"class_labels": 1}, "`class_labels` must be None"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"`latents` must have the shape .*\(1, 1, 8, 8\), got \(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8), "batch_size": 3}, "`latents` must have the shape"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize("disable", [True, False])
def test_progress_bar_can_be_switched_off(pipe, disable, capfd):
    pipe.set_progress_bar_config(disable=disable)
    pipe()
    pipe.set_progress_bar_config(disable=True)
    assert ("4/4" in capfd.readouterr().err) is not disable


def test_half_precision_draws_the_same_noise(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = quiet(RCFDPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert half.unet.dtype == torch.bfloat16
    images = half(batch_size=2, generator=seeded(), output_type="pt").images
    expected = pipe(batch_size=2, generator=seeded(), output_type="pt").images
    assert images.dtype == torch.float32 and 0 < (images - expected).abs().max() < 0.1


@pytest.mark.parametrize("N", [1, 2, 4, 8])
def test_saved_pipeline_loads_three_ways_with_equal_images(N, tmp_path):
    torch.manual_seed(N)
    pipe = quiet(RCFDPipeline(tiny_unet(), RCFDScheduler(num_inference_steps=N)))
    pipe.save_pretrained(tmp_path)
    expected = pipe(batch_size=4, generator=seeded(), output_type="np").images

    ours = quiet(RCFDPipeline.from_pretrained(tmp_path))
    assert isinstance(ours.scheduler, RCFDScheduler) and ours.scheduler.config.num_inference_steps == N
    np.testing.assert_allclose(ours(batch_size=4, generator=seeded(), output_type="np").images, expected, atol=1e-6)

    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(stock) is DDIMPipeline
    images = stock(batch_size=4, generator=seeded(), num_inference_steps=N, use_clipped_model_output=True,
                   output_type="np").images  # fmt: skip
    np.testing.assert_allclose(images, expected, atol=1e-4)

    custom = quiet(DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True))
    assert type(custom).__name__ == "RCFDPipeline" and not isinstance(custom, RCFDPipeline)
    np.testing.assert_allclose(custom(batch_size=4, generator=seeded(), output_type="np").images, expected, atol=1e-6)

    custom.save_pretrained(tmp_path / "again")  # the copy of the code saves itself
    assert (tmp_path / "again/pipeline.py").read_text() == (tmp_path / "pipeline.py").read_text()


def test_saved_folder_names_only_stock_classes_and_safetensors(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DDIMPipeline" and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    expected = {
        "num_train_timesteps": 1025,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "sample",
        "timestep_spacing": "leading",
        "steps_offset": 256,
        "set_alpha_to_one": False,
    }
    assert {key: config[key] for key in expected} == expected
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors", ".py"}
    source = (tmp_path / "pipeline.py").read_text()
    assert "import RCFDScheduler" not in source and source.count("class RCFDScheduler") == 1


def test_plain_diffusers_process_without_this_package(pipe, tmp_path):
    """A process that cannot import this package loads the folder both ways, without a warning of unknown keys."""
    pipe.save_pretrained(tmp_path)
    np.save(tmp_path / "expected.npy", pipe(batch_size=2, generator=seeded(), output_type="np").images)
    script = f"""
        import sys
        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "diffusers_rcfd":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Hide())
        import numpy as np, torch
        from diffusers import DiffusionPipeline
        expected = np.load({str(tmp_path / "expected.npy")!r})
        for options, call in (
            ({{}}, dict(num_inference_steps=4, use_clipped_model_output=True)),
            (dict(custom_pipeline={str(tmp_path)!r}, trust_remote_code=True), dict()),
        ):
            pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r}, **options)
            images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", **call).images
            np.testing.assert_allclose(images, expected, atol=1e-4)
        assert not any(name.startswith("diffusers_rcfd.") for name in sys.modules)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not expected" not in run.stderr


@pytest.mark.parametrize(
    "network, message",
    [
        ({"out_channels": 2}, "`unet` must have as many `out_channels` as `in_channels`=1, got 2.*learned_range"),
        ({"class_embed_type": "timestep"}, "`unet` must take class labels by `num_class_embeds`, got.*'timestep'"),
        ({"sample_size": None}, "`unet` must have a `sample_size`"),
    ],
)
def test_networks_that_cannot_be_sampled_are_refused(network, message):
    with pytest.raises(ValueError, match=message):
        RCFDPipeline(tiny_unet(**network), RCFDScheduler())


@pytest.mark.parametrize("embeddings", [None, 3])
def test_step_counts_without_embeddings_of_their_own_are_refused(embeddings):
    with pytest.raises(ValueError, match=f"`num_class_embeds` in a multiple of 2, .* got {embeddings}"):
        tiny_sfd_student(num_class_embeds=embeddings)


def test_only_safetensors_are_written(pipe, tmp_path):
    for function, target in ((pipe.save_pretrained, tmp_path / "pickled"), (pipe.push_to_hub, "anna/pickled")):
        with pytest.raises(ValueError, match="`safe_serialization` must be True"):
            function(target, safe_serialization=False)
    assert not any(tmp_path.iterdir())


def test_saving_again_replaces_what_was_there_and_keeps_the_rest(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "partial-save-killed/unet").mkdir(parents=True)  # left by a process that was killed in a save
    (tmp_path / "partial-save-killed/checksums.json").write_text("{}")
    other = RCFDPipeline(pipe.unet, RCFDScheduler(num_inference_steps=2))
    other.save_pretrained(tmp_path, variant="second")
    assert RCFDPipeline.from_pretrained(tmp_path).scheduler.config.num_inference_steps == 2
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("partial-*"))
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) == 2


def test_any_ddim_like_scheduler_becomes_ours():
    pipe = quiet(RCFDPipeline(tiny_unet(), DDPMScheduler(beta_schedule="scaled_linear")))
    assert isinstance(pipe.scheduler, RCFDScheduler)
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.scheduler.grid(3) == [0, 333, 666, 999]
    pipe(num_inference_steps=3)


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("afs", [True, False])
@pytest.mark.parametrize("lists, embeddings", [(1, None), (1, 3), (2, 2), (2, 6)])
def test_student_of_sfd_loads_three_ways_with_equal_images(lists, embeddings, afs, clip_sample, tmp_path):
    """Nodes, analytical first step and step counts (SFD-v), with and without classes, in plain Diffusers too."""
    torch.manual_seed(0)
    nodes = [[1016, 964, 379, 0], [1016, 990, 700, 379, 0]][:lists]
    scheduler = RCFDScheduler(nodes=nodes, analytical_first_step=afs, clip_sample=clip_sample)
    pipe = quiet(RCFDPipeline(tiny_unet(num_class_embeds=embeddings), scheduler))
    assert pipe.num_classes == {None: None, 2: None}.get(embeddings, 3)
    pipe.save_pretrained(tmp_path)
    ours = quiet(RCFDPipeline.from_pretrained(tmp_path))
    custom = quiet(DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True))
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(stock) is ConsistencyModelPipeline
    for N in pipe.scheduler.trained_steps:
        options = {
            "num_inference_steps": N,
            "output_type": "np",
            "class_labels": None if pipe.num_classes is None else 0,
        }
        expected = pipe(2, generator=seeded(), **options).images
        for other in (ours, custom):
            np.testing.assert_allclose(other(2, generator=seeded(), **options).images, expected, atol=1e-6)
        call = pipe.stock_call(N)
        stock.scheduler.init_noise_sigma = call.pop("init_noise_sigma")
        assert len(call["timesteps"]) == N
        call["class_labels"] = call["class_labels"] and call["class_labels"] * 2
        images = stock(2, num_inference_steps=None, generator=seeded(), output_type="np", **call).images
        np.testing.assert_allclose(images, expected, atol=1e-4)


def test_network_calls_with_an_analytical_first_step():
    pipe = quiet(RCFDPipeline(tiny_unet(), RCFDScheduler(nodes=[[1016, 964, 379, 0]], analytical_first_step=True)))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(int(args[1])))
    pipe()
    assert calls == [964, 379]
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be one of \[2\]"):
        pipe(num_inference_steps=3)


@pytest.mark.parametrize("size", [(8, 16), (8, 8)])
def test_stock_form_is_of_images_whose_size_is_a_number(tmp_path, size):
    """Diffusers' `ConsistencyModelPipeline` takes no other; the card then tells of `custom_pipeline`."""
    student = quiet(tiny_sfd_student(sample_size=size))
    assert not student.has_stock_form and tiny_sfd_student().has_stock_form
    student.save_pretrained(tmp_path)
    custom = quiet(DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True))
    images = custom(2, generator=seeded(), output_type="np").images
    np.testing.assert_allclose(images, student(2, generator=seeded(), output_type="np").images, atol=1e-6)
    card = create_model_card(describe_generator(student, "me/mine")).content
    assert "custom_pipeline=repo" in card and "timesteps=" not in card


@pytest.mark.parametrize("steps", [2.0, True, 4])
def test_number_of_evaluations_that_a_student_of_sfd_was_not_made_for(steps):
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be one of \[2, 3\]"):
        tiny_sfd_student()(num_inference_steps=steps)


def test_full_disk_leaves_the_pipeline_that_was_there(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with largest_file(20_000), pytest.raises(Exception, match="(?i)file too large"):
        RCFDPipeline(tiny_unet(), RCFDScheduler()).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


STOCK_SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)


@pytest.mark.parametrize("stock", STOCK_SCHEDULERS)
def test_stock_scheduler_that_is_set_later_is_taken_over(stock):
    pipe = quiet(RCFDPipeline(tiny_unet(), RCFDScheduler()))
    expected = pipe(2, 4, generator=seeded(), output_type="pt").images
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    assert isinstance(pipe.scheduler, RCFDScheduler)
    torch.testing.assert_close(pipe(2, 4, generator=seeded(), output_type="pt").images, expected, rtol=0, atol=1e-3)


def test_what_is_no_scheduler_is_refused_by_name():
    pipe = RCFDPipeline(tiny_unet(), RCFDScheduler())
    with pytest.raises(TypeError, match="`scheduler` must be a scheduler of Diffusers, got str"):
        pipe.scheduler = "ddim"
    with pytest.raises(ValueError, match="`scheduler` must have betas"):
        pipe.scheduler = EDMEulerScheduler()


def test_call_leaves_the_scheduler_of_a_shared_pipeline_alone():
    pipe = quiet(RCFDPipeline(tiny_unet(), RCFDScheduler()))
    pipe.scheduler.set_timesteps(3)
    pipe(1, 2)
    assert pipe.scheduler.num_inference_steps == 3


def test_arguments_of_other_types():
    pipe = quiet(RCFDPipeline(tiny_unet(num_class_embeds=3), RCFDScheduler(num_inference_steps=1)))
    noise = torch.randn(1, 1, 8, 8)
    options = {"class_labels": 1, "output_type": "pt"}
    images = pipe(latents=noise.numpy(), **options).images
    assert torch.equal(images, pipe(latents=noise, **options).images)
    with pytest.raises(ValueError, match="`class_labels` must be one integer or 1 integers, got torch.bool"):
        pipe(class_labels=True)
    with pytest.raises(TypeError, match="`generator` must be a torch.Generator or a list of them, got 0"):
        pipe(class_labels=1, generator=0)
