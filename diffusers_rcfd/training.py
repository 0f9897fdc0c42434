"""The loop that every trainer shares, on Accelerate: batches, steps, metrics, samples, checkpoints and resume.

Everything random in a step is a function of (seed, stage, step): the order of the images, the noise, the noise
levels and the dropout. A resumed run therefore repeats the run that was never stopped, and p processes with batches
of B / p draw what one process with batches of B draws.
"""

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from diffusers_rcfd.batches import derived_seed, endless_batches
from diffusers_rcfd.checkpoints import (
    METRICS_FILE,
    TrainerState,
    load_checkpoint,
    open_output_dir,
    read_state,
    save_checkpoint,
    write_json,
)
from diffusers_rcfd.configs import TrainingConfig
from diffusers_rcfd.hub import open_repository, publish_folder, read_card


@dataclass
class Stage:
    """One model, trained from its first step to its last: the only stage of most trainers, a rung of a ladder."""

    name: str
    index: int
    model: torch.nn.Module
    max_train_steps: int


class Trainer:
    """Base of the trainers. A trainer gives `stages`, `draw` and `compute_loss`, and may extend `finish_stage`,
    `sample_images` and `log_extra`; `train` does the rest.

    Args:
        config (`TrainingConfig`): the options.
        train_dataset (`torch.utils.data.Dataset`): items `{"images": uint8 or [-1, 1] float (C, H, W), "labels"}`,
            such as `load_image_data` returns.
    """

    def __init__(self, config: TrainingConfig, train_dataset: Dataset):
        self.config, self.train_dataset = config, train_dataset
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            # One step of the learning-rate schedule for each optimizer step, on any number of processes.
            dataloader_config=DataLoaderConfiguration(split_batches=True),
        )
        self.state = TrainerState()
        self.model = None  # of the stage under way, prepared by Accelerate
        self.ema = None
        self.repo_id = None
        together = config.train_batch_size * self.accelerator.num_processes
        if not isinstance(train_dataset, IterableDataset) and len(train_dataset) < together:
            raise ValueError(
                f"`train_batch_size` must be at most the {len(train_dataset)} images of the data set over the "
                f"{self.accelerator.num_processes} process(es), got {config.train_batch_size}."
            )

    # --- what a trainer gives -----------------------------------------------------------------------------------

    def stages(self, first: int) -> Iterator[Stage]:
        """The models to train, one after another, from stage `first` on."""
        raise NotImplementedError

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The random numbers that `compute_loss` needs for a batch, each (batch_size, ...), by name."""
        raise NotImplementedError

    def compute_loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Named scalar terms of the loss, among them "loss", of `batch`: images (B, C, H, W), labels and draws."""
        raise NotImplementedError

    def finish_stage(self, stage: Stage) -> None:
        """Save the result of a stage; its model holds the final (averaged) weights."""

    def evaluate_model(self, stage: Stage) -> None:
        """Measure the model under training, which holds its averaged weights; called every `eval_steps`."""

    def choose_weights(self, stage: Stage) -> None:
        """Put other weights than the last ones into the model of a stage that is done."""

    def sample_images(self, stage: Stage) -> torch.Tensor | None:
        """Images (B, C, H, W) in [0, 1] from fixed noise for the sample grid, or None."""

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train every stage, from the beginning or from a checkpoint.

        Raises:
            ValueError: if `output_dir` is not empty and neither resumed from nor overwritten.
            FileNotFoundError: if `resume_from_checkpoint` names no whole checkpoint.
        """
        checkpoint = open_output_dir(self.accelerator, self.config)
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.open_repository()  # a wrong token is found now, not after days
        if checkpoint is not None:
            self.state = read_state(checkpoint)
        self._record_run()
        began = time.perf_counter() - self.state.seconds
        self._seconds = lambda: time.perf_counter() - began
        for stage in self.stages(self.state.stage):
            self._run_stage(stage, checkpoint)
            checkpoint = None
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.push_to_hub()
        for tracker in self.accelerator.trackers:  # not `end_training`, after which no other trainer could follow
            tracker.finish()

    def _run_stage(self, stage: Stage, checkpoint: Path | None) -> None:
        config, accelerator, state = self.config, self.accelerator, self.state
        optimizer, lr_scheduler = self._prepare(stage, checkpoint)
        batches = endless_batches(accelerator, self.train_dataset, config, state)
        bar = tqdm(
            total=stage.max_train_steps,
            initial=state.step,
            desc=stage.name,
            unit="step",
            **({} if accelerator.is_local_main_process else {"disable": True}),  # TQDM_DISABLE has its say
        )
        sums = {name: torch.tensor(value, device=accelerator.device) for name, value in state.window.items()}
        while state.step < stage.max_train_steps:
            for draws in self._draws(stage):
                with accelerator.accumulate(self.model):
                    terms = self.compute_loss(next(batches) | draws)
                    accelerator.backward(terms["loss"])
                    if accelerator.sync_gradients and config.max_grad_norm > 0:
                        terms["grad_norm"] = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                for name, term in terms.items():
                    term = term.detach().float() / (1 if name == "grad_norm" else config.gradient_accumulation_steps)
                    sums[name] = sums[name] + term if name in sums else term
            if self.ema is not None:
                self.ema.step(self._unwrapped().parameters())
            state.step += 1
            state.global_step += 1
            bar.update()

            last = state.step == stage.max_train_steps
            if state.step % config.logging_steps == 0 or last:
                sums = self._log(stage, sums, lr_scheduler.get_last_lr()[0], bar)
            if config.eval_steps and (state.step % config.eval_steps == 0 or last):
                with self._averaged_weights():
                    self.evaluate_model(stage)
            if config.sample_steps and (state.step % config.sample_steps == 0 or last):
                self._save_samples(stage)
            if config.checkpointing_steps and state.step % config.checkpointing_steps == 0 and not last:
                state.window = {name: value.item() for name, value in sums.items()}
                self._save_checkpoint()
        bar.close()
        self._end_stage(stage)

    def _prepare(self, stage: Stage, checkpoint: Path | None):
        """Give the stage's model to Accelerate with its optimizer, and put back what a checkpoint holds."""
        config, accelerator = self.config, self.accelerator
        stage.model.to(accelerator.device).train()
        parameters = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(config, parameters)
        lr_scheduler = get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps,
                                     num_training_steps=stage.max_train_steps)  # fmt: skip
        self.model, optimizer, lr_scheduler = accelerator.prepare(stage.model, optimizer, lr_scheduler)
        self.ema = None
        if config.ema_decay:
            self.ema = EMAModel(self._unwrapped().parameters(), decay=config.ema_decay, foreach=True)
        if checkpoint is not None and self.state.step:
            load_checkpoint(accelerator, checkpoint, self.state, self.ema)
        return optimizer, lr_scheduler

    def _draws(self, stage: Stage) -> list[dict[str, torch.Tensor]]:
        """The random numbers of one optimizer step: this process's share, one dictionary for each batch."""
        config, accelerator = self.config, self.accelerator
        seed = derived_seed(config.seed, stage.index, self.state.step)
        torch.manual_seed(derived_seed(seed, accelerator.process_index))  # dropout
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        shares = accelerator.num_processes * config.gradient_accumulation_steps
        draws = self.draw(config.train_batch_size * shares, generator)
        draws = {name: value.chunk(shares) for name, value in draws.items()}
        mine = range(accelerator.process_index, shares, accelerator.num_processes)
        return [{name: value[i] for name, value in draws.items()} for i in mine]

    # --- records ------------------------------------------------------------------------------------------------

    def _log(self, stage: Stage, sums: dict, learning_rate: float, bar: tqdm) -> dict:
        """Write the means since the last line to the metrics file, the trackers and the progress bar."""
        state = self.state
        count = (state.step - 1) % self.config.logging_steps + 1
        means = self.accelerator.reduce({name: value / count for name, value in sums.items()}, reduction="mean")
        means = {name: value.item() for name, value in means.items()}
        self.write_metrics({"stage": stage.name, "step": state.step, **means, "learning_rate": learning_rate})
        bar.set_postfix(loss=f"{means['loss']:.4g}")
        return {}

    def write_metrics(self, values: dict[str, Any]) -> None:
        """One line of the metrics file, with the global step, and the same numbers to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.output_dir / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"global_step": self.state.global_step} | values) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=self.state.global_step)

    def _save_samples(self, stage: Stage) -> None:
        if not self.accelerator.is_main_process:
            return
        with self._averaged_weights():
            images = self.sample_images(stage)
        if images is not None:
            from torchvision.utils import save_image

            folder = self.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            path = folder / f"{stage.name}-{self.state.step:07d}.png"
            save_image(images, path, nrow=max(1, int(len(images) ** 0.5)), padding=1)

    def _record_run(self) -> None:
        """The resolved options and the environment, as `run.json` and for the trackers."""
        packages = ("torch", "diffusers", "accelerate", "transformers", "datasets", "timm")
        record = {
            "config": {key: value for key, value in asdict(self.config).items() if key != "hub_token"},
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device.type),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in packages},
        }
        if self.accelerator.is_main_process:
            write_json(self.output_dir / "run.json", record)
        simple = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in record["config"].items()}
        if self.config.report_to != "none":
            self.accelerator.init_trackers("diffusers_rcfd", config=simple)

    # --- the Hub ------------------------------------------------------------------------------------------------

    def published_folders(self) -> list[tuple[Path, str | None]]:
        """What `push_to_hub` publishes: folders, each with the branch it goes to (`None` is `main`)."""
        return [(self.output_dir, None)]

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write `README.md` into a folder that is to be published, keeping a person's part of an existing card."""

    def open_repository(self, repo_id: str | None = None) -> str:
        """Check the access to the repository, and create it if it is missing; see `hub.open_repository`."""
        name = repo_id or self.config.hub_model_id or self.output_dir.resolve().name
        self.repo_id = open_repository(name, self.config.hub_token, self.config.hub_private_repo or None)
        return self.repo_id

    def push_to_hub(self, repo_id: str | None = None, commit_message: str = "End of training") -> str:
        """Publish the model, and each student of a ladder as a branch of its own, with their cards.

        Args:
            repo_id (`str`, *optional*): repository; `hub_model_id` of the config by default.
            commit_message (`str`, defaults to `"End of training"`): title of the commits.

        Returns:
            `str`: address of the last commit.

        Raises:
            ValueError: if the repository cannot be written.
            ConnectionError: if an upload fails; that revision is then as it was before.
        """
        if repo_id is not None or self.repo_id is None:
            self.open_repository(repo_id)
        token, address = self.config.hub_token, None
        for folder, revision in self.published_folders():
            self.create_model_card(folder, read_card(self.repo_id, token, revision))
            address = publish_folder(folder, self.repo_id, revision, token, commit_message)
        return address

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _end_stage(self, stage: Stage) -> None:
        """Keep the final weights, hand them to `finish_stage` and note in a checkpoint that the stage is done."""
        if self.ema is not None:
            self.ema.copy_to(self._unwrapped().parameters())
        stage.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False).eval()
        self.accelerator.free_memory()
        self.model = stage.model
        self.choose_weights(stage)
        self.state.seconds = self._seconds()
        if self.accelerator.is_main_process:
            self.finish_stage(stage)
            if self.config.push_to_hub and self.config.hub_strategy != "end":
                self.push_to_hub()
        self.accelerator.wait_for_everyone()
        self.state.stage, self.state.step, self.state.best = stage.index + 1, 0, None
        self.state.window, self.state.streams = {}, []
        self._save_checkpoint()  # small: that the stage is done

    def _save_checkpoint(self) -> None:
        self.state.seconds = self._seconds()
        folder = save_checkpoint(self.accelerator, self.state, self.ema, self.config)
        if self.accelerator.is_main_process and self.config.push_to_hub and self.config.hub_strategy == "checkpoint":
            publish_folder(folder, self.repo_id, "checkpoint", self.config.hub_token, folder.name)
        self.accelerator.wait_for_everyone()

    def _unwrapped(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @contextmanager
    def _averaged_weights(self):
        """The model in eval mode with its averaged weights, where an average is kept."""
        model = self._unwrapped().eval()
        if self.ema is not None:
            self.ema.store(model.parameters())
            self.ema.copy_to(model.parameters())
        yield model
        if self.ema is not None:
            self.ema.restore(model.parameters())
        model.train()


def build_optimizer(config: TrainingConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that `config` names, fused into one kernel."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](parameters, **options)
