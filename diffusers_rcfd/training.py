"""The loop that every trainer shares, on Accelerate: batches, steps, metrics, samples, checkpoints and resume.

Everything random in a step is a function of (seed, stage, step): the order of the images, the noise, the noise
levels and the dropout. A resumed run therefore repeats the run that was never stopped, and p processes with batches
of B / p draw what one process with batches of B draws.
"""

import itertools
import json
import platform
import shutil
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
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from diffusers_rcfd.batches import RandomBatches, derived_seed
from diffusers_rcfd.checkpoints import STATE_FILE, TrainerState, check_output_dir, find_checkpoints, write_json
from diffusers_rcfd.configs import TrainingConfig
from diffusers_rcfd.hub import open_repository, publish_folder, read_card
from diffusers_rcfd.image_tensors import to_model_range

METRICS_FILE = "metrics.jsonl"


@dataclass
class Stage:
    """One model, trained from its first step to its last: the only stage of most trainers, a rung of a ladder."""

    name: str
    index: int
    model: torch.nn.Module
    max_train_steps: int


class Trainer:
    """Base of the trainers. A trainer gives `stages`, `draw` and `compute_loss`, and may extend `losses`,
    `finish_stage` and `sample_images`; `train` does the rest.

    Args:
        config (`TrainingConfig`): the options.
        train_dataset (`torch.utils.data.Dataset`, *optional*): items `{"images": uint8 or [-1, 1] float (C, H, W),
            "labels"}`, such as `load_image_data` returns; None where `draw` gives all that the loss needs.
    """

    def __init__(self, config: TrainingConfig, train_dataset: Dataset | None):
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
        counted = train_dataset is not None and not isinstance(train_dataset, IterableDataset)
        if counted and len(train_dataset) < together:
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

    def losses(self, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The terms of `compute_loss`; several of them, where a batch gives one optimizer step after another."""
        yield self.compute_loss(batch)

    def num_losses(self, draws: dict[str, torch.Tensor]) -> int:
        """How many of `losses` a batch gives, by its draws."""
        return 1

    def finish_stage(self, stage: Stage) -> None:
        """Save the result of a stage; its model holds the final (averaged) weights."""

    def sample_images(self, stage: Stage) -> torch.Tensor | None:
        """Images (B, C, H, W) in [0, 1] from fixed noise for the sample grid, or None."""

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train every stage, from the beginning or from a checkpoint.

        Raises:
            ValueError: if `output_dir` is not empty and neither resumed from nor overwritten.
            FileNotFoundError: if `resume_from_checkpoint` names no whole checkpoint.
        """
        checkpoint = self._open_output_dir()
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.open_repository()  # a wrong token is found now, not after days
        if checkpoint is not None:
            self.state = TrainerState(**json.loads((checkpoint / STATE_FILE).read_text()))
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
        batches = self._batches(stage)
        bar = tqdm(
            total=stage.max_train_steps,
            initial=state.step,
            desc=stage.name,
            unit="step",
            **({} if accelerator.is_local_main_process else {"disable": True}),  # TQDM_DISABLE has its say
        )
        sums = {name: torch.tensor(value, device=accelerator.device) for name, value in state.window.items()}
        while state.step < stage.max_train_steps:
            for turn in self._turns(stage, batches):
                with accelerator.accumulate(self.model):
                    terms = next(turn)
                    accelerator.backward(terms["loss"])
                    if accelerator.sync_gradients and config.max_grad_norm > 0:
                        terms["grad_norm"] = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                for name, term in terms.items():
                    term = term.detach().float() / (1 if name == "grad_norm" else config.gradient_accumulation_steps)
                    sums[name] = sums[name] + term if name in sums else term
            lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self._unwrapped().parameters())
            state.step += 1
            state.global_step += 1
            bar.update()

            last = state.step == stage.max_train_steps
            if state.step % config.logging_steps == 0 or last:
                sums = self._log(stage, sums, lr_scheduler.get_last_lr()[0], bar)
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
                                     num_training_steps=stage.max_train_steps,
                                     step_rules=f"1:{stage.max_train_steps // 2},0.1")  # fmt: skip
        self.model, optimizer, lr_scheduler = accelerator.prepare(stage.model, optimizer, lr_scheduler)
        self.ema = None
        if config.ema_decay:
            self.ema = EMAModel(self._unwrapped().parameters(), decay=config.ema_decay, foreach=True)
        if checkpoint is not None and self.state.step:
            accelerator.load_state(str(checkpoint))
            if self.ema is not None:
                saved = load_file(checkpoint / "ema.safetensors", device=str(accelerator.device))
                for i, shadow in enumerate(self.ema.shadow_params):
                    shadow.copy_(saved[str(i)])
                self.ema.optimization_step = self.state.step
        return optimizer, lr_scheduler

    def _batches(self, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches of this process, from where the stage stands; empty ones without a data set."""
        if self.train_dataset is None:
            yield from itertools.repeat({})
        config, accelerator = self.config, self.accelerator
        first = self.state.step * config.gradient_accumulation_steps
        loader_options = {
            "num_workers": config.dataloader_num_workers,
            "pin_memory": accelerator.device.type == "cuda",
            "collate_fn": getattr(self.train_dataset, "collate", None),
            "generator": torch.Generator(),  # of its own, or it would draw from that of the dropout
        }
        if isinstance(self.train_dataset, IterableDataset):
            batches = self._stream(first, loader_options)
        else:
            order = RandomBatches(
                len(self.train_dataset),
                config.train_batch_size,
                derived_seed(config.seed, stage.index),
                first,
                accelerator.process_index,
                accelerator.num_processes,
            )
            batches = DataLoader(self.train_dataset, batch_sampler=order, **loader_options)
        for batch in batches:
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            yield batch | {"images": to_model_range(batch["images"])}

    def _stream(self, first: int, loader_options: dict) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches of a streaming data set, epoch after epoch; what a resumed epoch had read is read again.

        Raises:
            ValueError: if an epoch of this process does not fill one batch.
        """
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        stream = self.train_dataset.split_by_node(process, processes)
        self.state.streams = self.state.streams or [[0, 0] for _ in range(processes)]
        mine = self.state.streams[process]
        while True:
            epoch, before = mine
            stream.set_epoch(epoch)
            loader = DataLoader(stream, batch_size=self.config.train_batch_size, drop_last=True, **loader_options)
            for batch in itertools.islice(loader, first - before, None):
                first += 1
                yield batch
            if first == before:
                raise ValueError(
                    f"`train_batch_size` must be at most the images that the stream has for a process, got "
                    f"{self.config.train_batch_size}."
                )
            mine[:] = epoch + 1, first

    def _turns(self, stage: Stage, batches: Iterator[dict]) -> list[Iterator[dict[str, torch.Tensor]]]:
        """The batches of one step as their `losses`, each as often as it is asked; accumulated ones take turns."""
        draws = self._draws(stage)
        return [self.losses(next(batches) | draw) for draw in draws] * self.num_losses(draws[0])

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
        self.state.seconds = self._seconds()
        if self.accelerator.is_main_process:
            self.finish_stage(stage)
            if self.config.push_to_hub and self.config.hub_strategy != "end":
                self.push_to_hub()
        self.accelerator.wait_for_everyone()
        self.state.stage, self.state.step, self.state.window, self.state.streams = stage.index + 1, 0, {}, []
        self._save_checkpoint()  # small: that the stage is done

    def _save_checkpoint(self) -> None:
        """Write a checkpoint beside its final place, then rename it; older ones go once it is safe."""
        self.state.seconds = self._seconds()
        accelerator, folder = self.accelerator, self.output_dir / f"checkpoint-{self.state.global_step}"
        partial = folder.with_name(f"partial-{folder.name}")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        accelerator.wait_for_everyone()
        if self.state.streams:
            self.state.streams = gather_object([self.state.streams[accelerator.process_index]])
        if self.state.step:
            accelerator.save_state(str(partial))
        if accelerator.is_main_process and self.state.step and self.ema is not None:
            shadow = {str(i): value.contiguous() for i, value in enumerate(self.ema.shadow_params)}
            save_file(shadow, partial / "ema.safetensors")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(partial / STATE_FILE, asdict(self.state))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in find_checkpoints(self.output_dir)[: -self.config.checkpoints_total_limit]:
                shutil.rmtree(old)
            if self.config.push_to_hub and self.config.hub_strategy == "checkpoint":
                publish_folder(folder, self.repo_id, "checkpoint", self.config.hub_token, folder.name)
        accelerator.wait_for_everyone()

    def _open_output_dir(self) -> Path | None:
        """Check `output_dir`; the checkpoint to resume from, with the metrics cut back to it, or None."""
        checkpoint = check_output_dir(self.config)
        self.accelerator.wait_for_everyone()  # nobody writes before everyone has looked
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            metrics = self.output_dir / METRICS_FILE
            if checkpoint is None:
                metrics.unlink(missing_ok=True)
                for old in [*self.output_dir.glob("checkpoint-*"), *self.output_dir.glob("samples")]:
                    shutil.rmtree(old)
            elif metrics.exists():
                reached = json.loads((checkpoint / STATE_FILE).read_text())["global_step"]
                lines = [line for line in metrics.read_text().splitlines(True) if line.endswith("\n")]
                metrics.write_text("".join(line for line in lines if json.loads(line)["global_step"] <= reached))
        self.accelerator.wait_for_everyone()
        return checkpoint

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
