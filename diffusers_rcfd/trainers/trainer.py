"""The loop that every trainer shares, on Accelerate: batches, steps, metrics, samples, checkpoints and resume.

Everything random in a step is a function of (seed, stage, step): the order of the images, the noise, the noise
levels and the dropout. A resumed run therefore repeats the run that was never stopped, and p processes with batches
of B / p draw what one process with batches of B draws.
"""

import copy
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from diffusers_rcfd.data.datasets import as_image_dataset
from diffusers_rcfd.hub.publishing import CARD_FILES, list_model_files, open_repository, publish_files, read_card
from diffusers_rcfd.saving import write_whole
from diffusers_rcfd.trainers.accelerators import build_accelerator, use_state_of
from diffusers_rcfd.trainers.batches import derived_seed, endless_batches
from diffusers_rcfd.trainers.checkpoints import (
    METRICS_FILE,
    STATE_FILE,
    TrainerState,
    find_changes,
    full_tensor,
    load_checkpoint,
    open_output_dir,
    read_state,
    save_checkpoint,
    window_of,
)
from diffusers_rcfd.trainers.config import TrainingConfig
from diffusers_rcfd.trainers.fast_networks import compile_network, set_memory_format
from diffusers_rcfd.trainers.interruption import Interruption, host_group, largest_of_all
from diffusers_rcfd.trainers.lock import lock_folder
from diffusers_rcfd.trainers.made_files import note_made, seal_made
from diffusers_rcfd.trainers.optimization import (
    average_step,
    backward,
    begin_momentum,
    build_optimizer,
    check_mixed_precision,
    clip_gradients,
)
from diffusers_rcfd.trainers.run_record import PLACES, RUN_FILE, describe_environment, describe_options, record_run
from diffusers_rcfd.trainers.skipped_steps import SkippedSteps, means_of_taken


@dataclass
class Stage:
    """One model on its way from its first step to its last: all that most trainers have, or a rung of a ladder.

    Args:
        name (`str`): what it is called in folders, metrics and messages.
        index (`int`): its number, from 0.
        model (`torch.nn.Module`): the model; while it is trained, as Accelerate and `torch.compile` have wrapped it.
        max_train_steps (`int`): steps of the loop.
        ema (`EMAModel`, *optional*): the averaged weights, while it is trained and where they are kept.
        unsharded (`torch.nn.Module`, *optional*): with FSDP2 a copy on the CPU that takes the final weights.
    """

    name: str
    index: int
    model: torch.nn.Module
    max_train_steps: int
    ema: EMAModel | None = None
    unsharded: torch.nn.Module | None = None


class Trainer:
    """Base of the trainers. A trainer gives `run`, `draw` and `compute_loss`, and may extend `made_by`,
    `optimizer_steps`, `finish_stage` and `sample_images`; `train` does the rest.

    Args:
        config (`TrainingConfig`): the options.
        train_dataset (`torch.utils.data.Dataset`, *optional*): items `{"images": uint8 or [-1, 1] float (C, H, W),
            "labels"}`, such as `load_image_data` returns; None where `draw` gives all that the loss needs.
    """

    described_elsewhere: tuple[str, ...] = ()  # options that `made_by` describes by other names

    def __init__(self, config: TrainingConfig, train_dataset: Dataset | None):
        train_dataset = None if train_dataset is None else as_image_dataset(train_dataset)
        self.config, self.train_dataset = config, train_dataset
        self.output_dir = Path(config.output_dir)
        self.accelerator = build_accelerator(config)
        check_mixed_precision(self.accelerator)
        self.state = TrainerState()
        self.repo_id = None
        self.checkpoint = None  # the last one written, or resumed from
        for name in ("sample_steps", "eval_steps"):
            if self.accelerator.is_fsdp2 and getattr(config, name) > 0:
                raise ValueError(
                    f"`{name}` must be 0 with FSDP, where no process has all the weights, got {getattr(config, name)}."
                )
        together = config.train_batch_size * self.accelerator.num_processes
        counted = train_dataset is not None and not isinstance(train_dataset, IterableDataset)
        if counted and len(train_dataset) < together:
            raise ValueError(
                f"`train_batch_size` must be at most the {len(train_dataset)} images of the data set over the "
                f"{self.accelerator.num_processes} process(es), got {config.train_batch_size}."
            )

    # --- what a trainer gives -----------------------------------------------------------------------------------

    def run(self) -> Any:
        """Train the stages, one after another by `fit`, and return what `train` returns."""
        raise NotImplementedError

    def made_by(self) -> dict[str, Any]:
        """What a checkpoint must have been made by for this trainer to go on from it, by name."""
        accelerator, made_by = self.accelerator, {"trainer": type(self).__name__}
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if sharded:
            made_by["engine"] = accelerator.distributed_type.value
        if sharded or isinstance(self.train_dataset, IterableDataset):
            made_by["num_processes"] = accelerator.num_processes
        device = accelerator.device.type
        made_by |= describe_options(self.config, accelerator.num_processes, device, self.described_elsewhere)
        if isinstance(self.train_dataset, IterableDataset):  # whose workers share the shards
            made_by["options"]["dataloader_num_workers"] = self.config.dataloader_num_workers
        made_by["fingerprints"] = {"data": getattr(self.train_dataset, "fingerprint", None)}
        return made_by

    def folder_of(self, stage: Stage) -> Path:
        """Where the model of a stage is saved."""
        return self.output_dir

    def draw(self, stage: Stage, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The random numbers that a loss needs for a batch, each (batch_size, ...), by name."""
        raise NotImplementedError

    def optimizer_steps(
        self, stage: Stage, batches: list[dict[str, torch.Tensor]]
    ) -> Iterator[list[Callable[[], dict[str, torch.Tensor]]]]:
        """The optimizer steps of a step of the loop: for each, the losses of the batches, as functions to call.

        What a function returns are named scalars, among them "loss".
        """
        yield [partial(self.compute_loss, stage, batch) for batch in batches]

    def compute_loss(self, stage: Stage, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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

    def train(self) -> Any:
        """Train every stage, from the beginning or from a checkpoint, and return the result.

        Raises:
            ValueError: if `output_dir` is not empty and neither resumed from nor overwritten, or a checkpoint is
                damaged or of another run; also where the data set raises one.
            FileNotFoundError: if `resume_from_checkpoint` names no checkpoint.
            FloatingPointError: if loss or gradient were not finite for `max_skipped_steps` in a row.
            RuntimeError: if the data set fails; a checkpoint is saved first.
            OSError: if a checkpoint or a result cannot be written; the checkpoints before are whole.
            SystemExit: with 128 + 15 or 128 + 2, after SIGTERM or SIGINT; a checkpoint is saved first.
        """
        with lock_folder(self.output_dir, self.accelerator):
            return self._train()

    def _train(self) -> Any:
        use_state_of(self.accelerator)
        checkpoint = self.checkpoint = open_output_dir(self.accelerator, self.config, self.made_by())
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.open_repository()  # a wrong token is found now, not after days
        if checkpoint is not None:
            self.state = read_state(checkpoint)
        self._record_run({} if checkpoint is None else find_changes(checkpoint, self.made_by()))
        began = time.perf_counter() - self.state.seconds
        self._seconds = lambda: time.perf_counter() - began
        self._host_group = host_group(self.accelerator)
        with Interruption() as self._interruption:
            result = self.run()
            if self.accelerator.is_main_process:
                seal_made(self.output_dir)
            if self._interruption.signal:
                raise SystemExit(128 + self._interruption.signal)
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.push_to_hub()
        for tracker in self.accelerator.trackers:  # not `end_training`, after which no other trainer could follow
            tracker.finish()
        return result

    def fit(self, stage: Stage) -> None:
        """Train a stage from where the run stands to its end; its model is then plain and holds the final weights."""
        config, accelerator, state = self.config, self.accelerator, self.state
        optimizer, lr_scheduler = self._prepare(stage)
        batches = endless_batches(accelerator, self.train_dataset, config, state)
        bar = tqdm(
            total=stage.max_train_steps,
            initial=state.step,
            desc=stage.name,
            unit="step",
            **({} if accelerator.is_local_main_process else {"disable": True}),  # else TQDM_DISABLE is respected
        )
        skipped = SkippedSteps(config.max_skipped_steps, accelerator.scaler, state.skipped_in_a_row, state.taken)
        window = window_of(state, accelerator.process_index, accelerator.num_processes)
        sums = {name: torch.tensor(value, device=accelerator.device) for name, value in window.items()}
        while state.step < stage.max_train_steps:
            step_batches = self._next_step(stage, batches, sums)
            for terms in self._train_step(stage, step_batches, optimizer, lr_scheduler):
                sums = skipped.add(terms, sums)
            state.step += 1
            state.global_step += 1
            bar.update()

            last = state.step == stage.max_train_steps
            logging = state.step % config.logging_steps == 0 or last
            if logging or accelerator.device.type == "cpu":
                skipped.check(f"step {state.step} of {stage.name}", self.checkpoint)
            if logging:
                sums = self._log(stage, means_of_taken(sums), lr_scheduler.get_last_lr()[0], bar)
            if config.eval_steps and (state.step % config.eval_steps == 0 or last):
                with self._averaged_weights(stage):
                    self.evaluate_model(stage)
            if config.sample_steps and (state.step % config.sample_steps == 0 or last):
                self._save_samples(stage)
            state.skipped_in_a_row, state.taken = skipped.in_a_row, skipped.taken
            if config.checkpointing_steps and state.step % config.checkpointing_steps == 0 and not last:
                self._save_checkpoint(stage, sums)
        bar.close()
        skipped.check_end(f"the end of {stage.name}", self.checkpoint)
        self._end_stage(stage)

    def _prepare(self, stage: Stage):
        """Give the stage's model to Accelerate with its optimizer, and put back what a checkpoint holds."""
        config, accelerator = self.config, self.accelerator
        set_memory_format(config, stage.model.to(accelerator.device)).train()
        parameters = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(config, parameters)
        lr_scheduler = get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps,
                                     num_training_steps=stage.max_train_steps,
                                     step_rules=f"1:{max(1, stage.max_train_steps // 2)},0.1")  # fmt: skip
        stage.unsharded = copy.deepcopy(stage.model).cpu() if accelerator.is_fsdp2 else None
        stage.model, optimizer, lr_scheduler = accelerator.prepare(stage.model, optimizer, lr_scheduler)
        stage.model = compile_network(config, stage.model)
        begin_momentum(optimizer)
        if config.ema_decay:
            foreach = not accelerator.is_fsdp2  # whose parameters `copy_to` then copies one by one
            stage.ema = EMAModel(self.unwrap(stage.model).parameters(), decay=config.ema_decay, foreach=foreach)
        if self.state.step:
            load_checkpoint(accelerator, self.checkpoint, self.state, optimizer, stage.ema)
        return optimizer, lr_scheduler

    def _next_step(self, stage: Stage, batches: Iterator[dict], sums: dict) -> list[dict[str, torch.Tensor]]:
        """The batches of the next optimizer step with their draws. Here, between two steps, all processes leave
        together when one is to: a checkpoint is saved, then the data's error or `SystemExit` is raised.
        """
        state, config, fetched, error = self.state, self.config, [], None
        streams = copy.deepcopy(state.streams)
        try:
            for _ in range(config.gradient_accumulation_steps):
                fetched.append(next(batches))
        except Exception as trouble:  # whatever a data set or a worker of its loader may raise
            error = trouble
        if config.dataloader_num_workers:
            self._interruption.notice_dead_workers_late()
        number = largest_of_all(self._interruption.signal or int(error is not None), self._host_group)
        if number == 0:
            return [batch | draws for batch, draws in zip(fetched, self._draws(stage), strict=True)]
        state.streams = streams
        if self.checkpoint != self.output_dir / f"checkpoint-{state.global_step}":
            self._save_checkpoint(stage, sums)
        if number > 1:
            raise SystemExit(128 + number)
        name = getattr(self.train_dataset, "name", type(self.train_dataset).__name__)
        reason = "in another process" if error is None else f"{type(error).__name__}: {error}"
        raise (ValueError if isinstance(error, ValueError) else RuntimeError)(
            f"`train_dataset` {name} failed after step {state.step} of {stage.name}: {reason} The run is saved in "
            f"{self.checkpoint} and goes on with `resume_from_checkpoint='latest'`."
        ) from error

    def _train_step(self, stage: Stage, batches: list[dict], optimizer, lr_scheduler) -> list[dict[str, torch.Tensor]]:
        """One step of the loop: of each of its optimizer steps what `_optimizer_step` gives."""
        steps = [self._optimizer_step(stage, losses, optimizer) for losses in self.optimizer_steps(stage, batches)]
        lr_scheduler.step()
        if stage.ema is not None:
            taken = torch.stack([terms["grad_norm"].isfinite() for terms in steps]).any()
            average_step(stage.ema, list(self.unwrap(stage.model).parameters()), taken, self.config.ema_ramp)
        return steps

    def _optimizer_step(self, stage: Stage, losses: list[Callable], optimizer) -> dict[str, torch.Tensor]:
        """One optimizer step; its loss terms, means over the batches, and "grad_norm".

        Where loss or gradient are not finite on any process, weights, averages and optimizer stay as they are.
        """
        config, accelerator, means = self.config, self.accelerator, {}
        statistics = [buffer for buffer in stage.model.buffers() if buffer.is_floating_point()]  # of batch norm
        before = [buffer.clone() for buffer in statistics]
        for loss in losses:
            with accelerator.accumulate(stage.model):
                terms = loss()
                backward(accelerator, terms["loss"])
                if accelerator.sync_gradients:
                    norm = clip_gradients(accelerator, stage.model, optimizer, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            for name, term in terms.items():
                means[name] = means.get(name, 0) + term.detach().float() / config.gradient_accumulation_steps
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, value))
        return means | {"grad_norm": norm.float()}

    def _draws(self, stage: Stage) -> list[dict[str, torch.Tensor]]:
        """The random numbers of one optimizer step: this process's share, one dictionary for each batch."""
        config, accelerator = self.config, self.accelerator
        seed = derived_seed(config.seed, stage.index, self.state.step)
        torch.manual_seed(derived_seed(seed, accelerator.process_index))  # dropout
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        shares = accelerator.num_processes * config.gradient_accumulation_steps
        draws = self.draw(stage, config.train_batch_size * shares, generator)
        draws = {name: value.chunk(shares) for name, value in draws.items()}
        mine = range(accelerator.process_index, shares, accelerator.num_processes)
        return [{name: value[i] for name, value in draws.items()} for i in mine]

    # --- records ------------------------------------------------------------------------------------------------

    def _log(self, stage: Stage, means: dict, learning_rate: float, bar: tqdm) -> dict:
        """Write the means since the last line to the metrics file, the trackers and the progress bar; no sums yet."""
        means = {name: value.item() for name, value in self.accelerator.reduce(means, reduction="mean").items()}
        self.write_metrics({"stage": stage.name, "step": self.state.step, **means, "learning_rate": learning_rate})
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
        with self._averaged_weights(stage):
            images = self.sample_images(stage)
        if images is not None:
            from torchvision.utils import save_image

            folder = self.output_dir / "samples"
            name = f"{stage.name}-{self.state.step:07d}.png"
            note_made(self.output_dir, files=[f"samples/{name}"])
            folder.mkdir(exist_ok=True)
            save_image(images, picture := io.BytesIO(), nrow=max(1, int(len(images) ** 0.5)), padding=1, format="png")
            write_whole(folder / name, picture.getvalue())

    def _record_run(self, changes: dict[str, tuple]) -> None:
        """The resolved options and the environment, as `run.json` and for the trackers."""
        record = {
            "config": {key: value for key, value in asdict(self.config).items() if key not in PLACES},
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **describe_environment(self.accelerator),
            "fingerprints": self.made_by()["fingerprints"],
        }
        if self.accelerator.is_main_process:
            note_made(self.output_dir, files=[RUN_FILE])
            record_run(self.output_dir, record, self.state.global_step, changes)
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
            cards = [(folder / name).relative_to(self.output_dir) for name in CARD_FILES if (folder / name).is_file()]
            note_made(self.output_dir, files=[name.as_posix() for name in cards])
            files = list_model_files(folder)
            address = publish_files(folder, files, self.repo_id, revision, token, commit_message)
        return address

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _end_stage(self, stage: Stage) -> None:
        """Keep the final weights, hand them to `finish_stage` and note in a checkpoint that the stage is done."""
        if stage.ema is not None:
            stage.ema.copy_to(self.unwrap(stage.model).parameters())
        model = self.accelerator.unwrap_model(stage.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        if stage.unsharded is not None:
            stage.unsharded.load_state_dict({name: full_tensor(value) for name, value in model.state_dict().items()})
            model = stage.unsharded.to(self.accelerator.device)
        stage.model = model.eval().to(memory_format=torch.contiguous_format)
        stage.ema = None
        self.accelerator.free_memory()
        self.choose_weights(stage)
        self.state.seconds = self._seconds()
        if self.accelerator.is_main_process:
            try:
                note_made(self.output_dir, models=[self.folder_of(stage).relative_to(self.output_dir).as_posix()])
                self.finish_stage(stage)
            except (OSError, SafetensorError) as error:  # a full disk
                raise OSError(
                    f"{stage.name} could not be saved in {self.output_dir}; its checkpoints are whole: {error}"
                ) from error
        self.state.stage, self.state.step, self.state.best, self.state.streams = stage.index + 1, 0, None, []
        self.state.skipped_in_a_row, self.state.taken = 0, 0
        if self.accelerator.is_main_process and self.config.push_to_hub and self.config.hub_strategy != "end":
            self.push_to_hub()
        self.accelerator.wait_for_everyone()
        self._save_checkpoint(stage, {})  # small: that the stage is done

    def _save_checkpoint(self, stage: Stage, sums: dict[str, torch.Tensor]) -> None:
        """Save where the run stands, with the sums of the loss terms since the last line of metrics."""
        self.state.seconds = self._seconds()
        self.state.skipped_in_a_row, self.state.taken = int(self.state.skipped_in_a_row), int(self.state.taken)
        self.state.windows = [{name: value.item() for name, value in sums.items()}] * self.accelerator.num_processes
        self.checkpoint = save_checkpoint(self.accelerator, self.state, stage.ema, self.config, self.made_by())
        if self.accelerator.is_main_process and self.config.push_to_hub and self.config.hub_strategy == "checkpoint":
            files = [STATE_FILE, *json.loads((self.checkpoint / STATE_FILE).read_text(encoding="utf-8"))["files"]]
            token, title = self.config.hub_token, self.checkpoint.name
            publish_files(self.checkpoint, files, self.repo_id, "checkpoint", token, title)
        self.accelerator.wait_for_everyone()

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model inside the wrappers of Accelerate and `torch.compile`."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    @contextmanager
    def _averaged_weights(self, stage: Stage):
        """The stage's model in eval mode with its averaged weights, where they are kept, laid out as files want it."""
        model = self.unwrap(stage.model).eval().to(memory_format=torch.contiguous_format)
        if stage.ema is not None:
            stage.ema.store(model.parameters())
            stage.ema.copy_to(model.parameters())
        yield
        if stage.ema is not None:
            stage.ema.restore(model.parameters())
        set_memory_format(self.config, model).train()


def data_name(dataset: Dataset | None) -> str | None:
    """The name that a data set was loaded by, where it has one."""
    return getattr(dataset, "name", "").split(" [")[0] or None
