import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_rcfd.evaluation.inspection import draw_inspection, inspect_sampling
from diffusers_rcfd.evaluation.sampling import initial_noise
from tests.toys import tiny_classifier, tiny_sfd_student, tiny_teacher


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return tiny_classifier().eval()


def test_last_prediction_is_the_image_and_the_numbers_are_the_classifiers(classifier):
    pipeline = tiny_teacher()
    inspection = inspect_sampling(pipeline, classifier, 4, num_images=12, seed=3)
    assert inspection.timesteps == [1024, 768, 512, 256]
    images = pipeline(12, 4, latents=initial_noise(range(12), (1, 8, 8), 3), output_type="pt").images
    # The last step goes to index 0, which has next to no noise left.
    torch.testing.assert_close(inspection.x0[-1] / 2 + 0.5, images, rtol=0, atol=0.02)
    with torch.no_grad():
        p = classifier(inspection.x0[1]).logits.softmax(1)
        last = classifier(inspection.x0[-1]).logits.argmax(1)
    torch.testing.assert_close(inspection.entropy[1], -(p * p.log()).sum(1))
    assert inspection.histogram.tolist() == pytest.approx([(last == c).float().mean().item() for c in range(10)])
    numbers = inspection.numbers()
    assert len(numbers["entropy"]) == 4 and all(0 <= value <= math.log(10) for value in numbers["entropy"])
    assert sum(numbers["histogram"]) == pytest.approx(1)


@pytest.mark.parametrize("embeddings, N", [(2, 2), (6, 3)])
def test_student_of_sfd_starts_at_its_own_noise_and_rows(classifier, embeddings, N):
    pipeline = tiny_sfd_student(num_class_embeds=embeddings)
    inspection = inspect_sampling(pipeline, classifier, N, num_images=4)
    labels = None if embeddings == 2 else [0, 1, 2, 0]
    noise = initial_noise(range(4), (1, 8, 8))
    images = pipeline(4, N, latents=noise, class_labels=labels, output_type="pt").images
    torch.testing.assert_close((inspection.x0[-1] / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=0.02)
    rows = torch.tensor(labels or [0] * 4) + (N - 2) * embeddings // 2
    with torch.no_grad():
        first = pipeline.unet(pipeline.scheduler.init_noise_sigma * noise, inspection.timesteps[0], rows).sample
    torch.testing.assert_close(inspection.x0[0], first)


def test_class_conditional_models_are_given_their_classes(classifier):
    pipeline = tiny_teacher(num_class_embeds=2)
    inspection = inspect_sampling(pipeline, classifier, 2, num_images=4)
    noise = initial_noise(range(4), (1, 8, 8))
    images = pipeline(4, 2, latents=noise, class_labels=[0, 1, 0, 1], output_type="pt").images
    torch.testing.assert_close(inspection.x0[-1] / 2 + 0.5, images, rtol=0, atol=0.02)


def test_steps_that_a_student_does_not_take(classifier):
    with pytest.raises(ValueError, match="`num_inference_steps` must be one of"):
        inspect_sampling(tiny_teacher(4), classifier, 3)


def test_picture_grows_with_the_steps(classifier, tmp_path):
    two, four = (inspect_sampling(tiny_teacher(), classifier, N, num_images=6) for N in (2, 4))
    draw_inspection({"two": two}, tmp_path / "one.png", num_rows=3)
    draw_inspection({"two": two, "four": four, "again": four}, tmp_path / "three.png", num_rows=3)
    one, three = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "three.png"))
    assert three.shape[1] > 1.2 * one.shape[1] and three[..., :3].std() > 20
