import pytest
import torch

from diffusers_rcfd import DiffusionConfig, DiffusionTrainer, RCFDPipeline, RCFDScheduler, load_image_data
from diffusers_rcfd.trainers.trainer import Stage
from tests.toys import tiny_unet


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=64)


def trainer(folder, digits, unet=None, scheduler=None, **options):
    options = {"max_train_steps": 2, "train_batch_size": 8, "checkpointing_steps": 0} | options
    config = DiffusionConfig(output_dir=str(folder), **options)
    return DiffusionTrainer(unet or tiny_unet(), scheduler or RCFDScheduler(), config, digits)


def base(run):
    return Stage("base", 0, run.unet, run.config.max_train_steps)


def test_noise_levels_cover_the_whole_schedule(tmp_path, digits):
    def draw(run):
        return run.draw(base(run), 40_000, torch.Generator().manual_seed(0))

    draws = draw(trainer(tmp_path, digits))
    assert draws["t"].min() == 0 and draws["t"].max() == 1024
    assert draws["t"].float().mean() == pytest.approx(512, abs=6)
    assert not draws["flip"].any()
    flips = draw(trainer(tmp_path, digits, random_flip=True))["flip"]
    assert flips.float().mean() == pytest.approx(0.5, abs=0.02)


def test_closed_form_loss_of_a_network_that_knows_the_answer(tmp_path, digits):
    """A network with a constant error e in x0 has the loss e^2 max(SNR, 1) in each sample."""
    run = trainer(tmp_path, digits)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((8, 1, 8, 8), generator=generator) * 2 - 1
    stage = base(run)
    batch = {"images": images} | run.draw(stage, 8, generator)
    stage.model.forward = lambda *args, **options: (images + 0.1,)
    snr = run.scheduler.nu[batch["t"]] ** -2
    expected = 0.01 * snr.clamp(min=1).mean().item()
    assert run.compute_loss(stage, batch)["loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_trains_every_prediction_type_and_class_labels(tmp_path, digits, prediction_type):
    scheduler = RCFDScheduler(prediction_type=prediction_type)
    pipe = trainer(tmp_path, digits, tiny_unet(num_class_embeds=10), scheduler, ema_decay=0.0).train()
    loaded = RCFDPipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.prediction_type == prediction_type
    assert loaded.scheduler.config.num_inference_steps is None and pipe.unet.config.num_class_embeds == 10


def test_learns_one_image_by_heart(tmp_path):
    """Trained on one image alone, a network that has learnt anything denoises towards it at every level."""
    one = load_image_data(max_images=1)
    one = one.subset([0] * 16)
    torch.manual_seed(0)
    pipe = trainer(tmp_path, one, max_train_steps=120, train_batch_size=16, learning_rate=3e-3, lr_warmup_steps=10,
                   ema_decay=0.0).train()  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    image = pipe(4, 8, generator=torch.Generator().manual_seed(0), output_type="pt").images
    expected = one.images[:1].float() / 255
    assert (image - expected).abs().mean() < 0.1 < (0.5 - expected).abs().mean()
