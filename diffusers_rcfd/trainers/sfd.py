"""Simple and Fast Distillation: a student trained down its own trajectory, one optimizer step at each node."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from diffusers_rcfd.distillation.feature_terms import check_stages, feature_terms, spatial_distance
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.hub.model_card import steps_described
from diffusers_rcfd.losses.predictions import log_mean_prediction
from diffusers_rcfd.models.count_embeddings import for_counts, for_one_count
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.models.fingerprints import fingerprint_weights
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline, embedding_rows
from diffusers_rcfd.pipelines.trajectory_sampler import TrajectoryPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.schedulers.trajectories import (
    analytical_first_step,
    euler_step,
    nearest_indices,
    network_calls,
    one_step_target,
    rho_nodes,
    solve,
    subdivide,
)
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.fast_networks import frozen
from diffusers_rcfd.trainers.generator import GeneratorTrainer, as_pipeline
from diffusers_rcfd.trainers.ladder import without_dropout
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.sfd_config import SFDDistillationConfig
from diffusers_rcfd.trainers.trainer import Stage
from diffusers_rcfd.validation import require

logger = logging.get_logger(__name__)

FAR = 0.7  # in ln(sigma / alpha), a factor of 2: a node this far from the level that was asked for is said


@dataclass(frozen=True)
class Route:
    """The nodes of one step count: falling indices of the student, and the teacher's, which contain them.

    `evaluations` is how often the teacher's network is called on its way down.
    """

    student: list[int]
    teacher: list[int]
    evaluations: int


@dataclass
class Walk:
    """A batch on its way down a route: the student's state x = z / alpha at a node, and what lies before it.

    Each of `steps` is k and k_next, the nodes that it leads from and to, and the teacher's state at the latter.
    """

    x: torch.Tensor
    labels: torch.Tensor | None
    steps: list[tuple[int, int, torch.Tensor]]


class SFDDistillationTrainer(GeneratorTrainer):
    """Distils a teacher into a few evaluations along the student's own trajectory (SFD), without images.

    A step of the loop is a batch of noise: the teacher takes it down to the last node once, the student node by node,
    with an optimizer step at each and the weights so moved at the next. A checkpoint therefore lies between
    trajectories. The student is an `RCFDPipeline` whose scheduler holds its nodes; it does not clip, as in training.
    Metrics are means over the optimizer steps, that is over nodes. A batch costs the forward passes of the teacher's
    whole way (K for each of the N - 1 intervals, twice that with heun) and, for each evaluation of the student, a
    forward and a backward pass.

    A teacher that is itself a student of SFD starts the second stage: it samples in its own nodes, by Euler steps,
    and the student's nodes must be among them; `teacher_steps` and the solver are then not used.

    A student ends where its teacher's trajectory ends: `teacher_samplers`, the pipelines of that by their network
    evaluations, can be measured before anything is trained.

    Unlike the authors' code it turns dropout off, skips a step whose gradient is not finite (there NaN becomes 0), and
    can average the weights (`ema_decay`); average and learning rate move once for each batch.

    Args:
        teacher (`DiffusionPipeline`): a base model, or any pipeline of a `UNet2DModel` and a DDIM-like scheduler; or
            a student of SFD.
        classifier (`FeatureClassifier`, *optional*): frozen; for the objectives cfd and rcfd, and for the second stage
            without LPIPS.
        config (`SFDDistillationConfig`): the options; defaults are the paper's.
        lpips (`Callable`, *optional*): `lpips.LPIPS` with its weights, or anything that takes two batches of images in
            [-1, 1] with three channels to (B,) or (B, 1, 1, 1). Of the second stage with objective l1 alone.
        evaluator (`Evaluator`, *optional*): measures the student, in its largest step count, every `eval_steps`.

    Raises:
        ValueError: if nodes, teacher, classifier and LPIPS do not fit.
        TypeError: if the teacher is no such pipeline.
    """

    def __init__(
        self,
        teacher: DiffusionPipeline,
        classifier: FeatureClassifier | None = None,
        config: SFDDistillationConfig | None = None,
        lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        evaluator: Evaluator | None = None,
    ):
        config = config or SFDDistillationConfig()
        super().__init__(config, None, evaluator)
        teacher = as_pipeline(teacher)
        self.teacher, self.classifier, self.lpips = teacher, classifier, lpips
        self.student, self.log_p_mean = None, None
        self.second_stage = bool(teacher.scheduler.config.nodes)
        if not self.second_stage and teacher.scheduler.config.num_inference_steps is not None:
            N = teacher.scheduler.config.num_inference_steps
            logger.warning(
                f"`teacher` was distilled for {N} steps, and the nodes of SFD are not those of that sampler."
            )
        self.nu = teacher.scheduler.sigma / teacher.scheduler.alpha  # (n,), float64
        self.routes = [self._route(N) for N in config.student_steps]
        self.num_classes = teacher.num_classes
        self._check_losses()
        self.teacher_samplers = self._teacher_samplers()
        self.scheduler = RCFDScheduler.from_config(
            dict(teacher.scheduler.config)
            | {
                "nodes": [route.student for route in self.routes],
                "analytical_first_step": config.analytical_first_step,
                "num_inference_steps": max(config.student_steps),
                "clip_sample": False,
                "thresholding": False,
            }
        )
        self.teacher_name = teacher.config.get("_name_or_path")
        networks = {"teacher": teacher.unet, "classifier": self.classifier, "lpips": lpips}
        self._fingerprints = {name: fingerprint_weights(network) if isinstance(network, torch.nn.Module) else None
                              for name, network in networks.items()}  # fmt: skip

    def _route(self, student_steps: int) -> Route:
        """Nodes of student and teacher for a number of evaluations, on the teacher's schedule.

        Raises:
            ValueError: if the schedule is too coarse or too short for the student's nodes, or they are none of a
                teacher that has its own.
        """
        config, N = self.config, self.config.num_nodes(student_steps)
        if config.nodes is None:
            levels = rho_nodes(N, config.sigma_max, config.sigma_min, config.rho)
        else:
            levels = torch.tensor(config.nodes, dtype=torch.float64)
        student = nearest_indices(self.nu, levels)
        require(
            all(high > low for high, low in pairwise(student)),
            "teacher",
            student,
            f"of a schedule that tells the nodes {[round(s, 4) for s in levels.tolist()]} apart",
        )
        if self.second_stage:
            row, scheduler = self._teacher_row(), self.teacher.scheduler
            teacher = list(scheduler.config.nodes[row])
            lacking = sorted(set(student) - set(teacher)) or student[0] != teacher[0] or student[-1] != teacher[-1]
            require(not lacking, "student_steps", student_steps, f"such that its nodes {student} are among {teacher}")
            return Route(student, teacher, scheduler.trained_steps[row])
        fine = nearest_indices(self.nu, subdivide(levels, config.teacher_steps_of(student_steps), config.rho))
        teacher = sorted(set(fine), reverse=True)  # nodes that fall on one index are one
        if (self.nu[student].log() - levels.log()).abs().max() > FAR:
            given, wanted = ([f"{s:.3g}" for s in values.tolist()] for values in (self.nu[student], levels))
            logger.warning(
                f"The teacher's schedule does not reach the nodes {', '.join(wanted)}: they are {', '.join(given)}, "
                f"and the teacher takes {len(teacher) - 1} steps. See `sigma_max`, `sigma_min` and `nodes`."
            )
        return Route(student, teacher, network_calls(teacher, config.teacher_solver))

    def _teacher_row(self) -> int:
        """Which of its step counts a student of SFD teaches with: its default one."""
        scheduler = self.teacher.scheduler
        counts = scheduler.trained_steps
        return counts.index(scheduler.config.num_inference_steps or max(counts))

    def _teacher_samplers(self) -> dict[int, RCFDPipeline]:
        """The teacher, sampled as the students see it, by its network evaluations."""
        config, teacher = self.config, self.teacher
        solver = (config.teacher_solver, config.solver_order, config.dynamic_thresholding)
        return {
            route.evaluations: teacher
            if self.second_stage
            else TrajectoryPipeline(teacher.unet, teacher.scheduler, route.teacher, *solver)
            for route in self.routes
        }

    def _check_losses(self) -> None:
        config, (channels, *size) = self.config, self.teacher.image_shape
        perceptual = self.second_stage and config.objective == "l1" and config.perceptual_weight > 0
        if self.lpips is not None:
            least = getattr(self.lpips, "min_size", 1)
            fits = channels in (1, 3) and min(size) >= least
            require(
                fits, "lpips", (channels, *size), f"for images of 1 or 3 channels and {least} pixels a side or more"
            )
            if not perceptual:
                logger.warning("`lpips` is not used: it is of the second stage with objective 'l1' alone.")
        guided = config.objective != "l1" or (perceptual and self.lpips is None)
        if self.classifier is None:
            need = f"objective {config.objective!r}" if config.objective != "l1" else "the second stage without LPIPS"
            require(not guided, "classifier", None, f"given for {need} (or `perceptual_weight` 0)")
            return
        if not guided:
            logger.warning("`classifier` is not used: objective 'l1' compares images.")
            self.classifier = None
            return
        wanted, num_classes = self.classifier.config.in_channels, self.classifier.config.num_classes
        require(channels in (1, wanted), "classifier", f"one for {wanted}", f"for images of {channels} channel(s)")
        predicts = config.objective == "rcfd" and config.regularization_weight > 0
        require(not predicts or num_classes > 1, "classifier", num_classes, "of 2 or more classes for rcfd")
        if (perceptual and self.lpips is None) or (config.objective != "l1" and config.distribution == "spatial"):
            check_stages(self.classifier, self.teacher.image_shape, config)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def stages(self, first: int) -> Iterator[Stage]:
        """The student is the only stage."""
        if first:
            self.student = load_part(RCFDPipeline, self.output_dir)
            return
        student, device = copy.deepcopy(self.teacher.unet).requires_grad_(False), self.accelerator.device
        self.teacher = RCFDPipeline(frozen(self.config, self.teacher.unet, device), self.teacher.scheduler)
        if self.classifier is not None:
            self.classifier = frozen(self.config, self.classifier, device)
        if isinstance(self.lpips, torch.nn.Module):
            self.lpips = frozen(self.config, self.lpips, device)
        if self.second_stage:
            student = for_one_count(student, self._teacher_row(), len(self.teacher.scheduler.trained_steps))
        if len(self.routes) > 1:
            student = for_counts(student, len(self.routes))
        without_dropout(student).requires_grad_(True)
        student.register_to_config(_name_or_path="student")  # not the folder that its teacher was loaded from
        yield Stage("student", 0, student, self.config.max_train_steps)
        self.student = load_part(RCFDPipeline, self.output_dir)

    def made_by(self) -> dict[str, Any]:
        """Also by this teacher's network and solver, these nodes and step counts, and this objective."""
        config = self.config
        solver = (config.teacher_solver, config.solver_order, config.dynamic_thresholding)
        route = {
            "nodes": [route.student for route in self.routes],
            "teacher_nodes": [route.teacher for route in self.routes],
            "student_steps": config.student_steps,
            "analytical_first_step": config.analytical_first_step,
            "solver": None if self.second_stage else solver,
        }
        made_by = super().made_by() | architecture(self.teacher.unet) | route | {"objective": config.objective}
        made_by["fingerprints"] |= self._fingerprints
        return made_by

    def train(self) -> RCFDPipeline:
        """Train, save to `output_dir` and return the student."""
        super().train()
        return self.student

    def finish_stage(self, stage: Stage) -> None:
        """Save the student."""
        RCFDPipeline(stage.model, self.scheduler).save_pretrained(self.output_dir)

    def sampler(self) -> tuple[RCFDPipeline, None]:
        """The student, in its default number of evaluations, the largest."""
        return RCFDPipeline(self._unwrapped(), self.scheduler), None

    def draw(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise, the route of all (uniform, SFD-v), and classes (uniform) for a class-conditional teacher."""
        shape, device = (batch_size, *self.teacher.image_shape), generator.device
        draws = {
            "noise": torch.randn(shape, generator=generator, device=device),
            "route": torch.randint(len(self.routes), (1,), generator=generator, device=device).expand(batch_size),
        }
        if self.num_classes is not None:
            draws["labels"] = torch.randint(self.num_classes, (batch_size,), generator=generator, device=device)
        return draws

    def num_optimizer_steps(self, batch: dict[str, torch.Tensor]) -> int:
        """Network evaluations of the drawn route, each of which has a loss."""
        return self.config.student_steps[self._row(batch)]

    def _row(self, batch: dict[str, torch.Tensor]) -> int:
        """Which route a batch takes; it is read from the device only where there are several."""
        return int(batch["route"][0]) if len(self.routes) > 1 else 0

    def prepare_step(self, batches: list[dict[str, Any]]) -> None:
        """Set the batches out on their walk, the first time, and take rcfd's mean prediction where they stand."""
        for batch in batches:
            if "walk" not in batch:
                batch["walk"] = self.begin_walk(batch)
        config, self.log_p_mean = self.config, None
        diverse = config.objective == "rcfd" and config.regularization_weight * (1 - config.entropy_ratio) > 0
        if len(batches) > 1 and diverse:
            with torch.no_grad(), self.accelerator.autocast():
                logits = [self.classifier(self._x0_at_node(batch["walk"])).logits for batch in batches]
                self.log_p_mean = log_mean_prediction(torch.cat(logits))

    def begin_walk(self, batch: dict[str, torch.Tensor]) -> Walk:
        """Noise at the first node that is evaluated, with the teacher's trajectory from it (SFD, Alg. 1).

        Args:
            batch (`dict`): "noise" (B, C, H, W), "route" (B,) all equal, "labels" (B,) where there are classes.
        """
        row = self._row(batch)
        route, labels = self.routes[row], batch.get("labels")
        x = batch["noise"] / self.scheduler.alpha[route.student[0]].item()
        targets = self.teacher_states(x, route, labels)
        steps = [(*nodes, target) for nodes, target in zip(pairwise(route.student), targets, strict=True)]
        if self.config.analytical_first_step:
            k, k_next, _ = steps.pop(0)
            s, s_next = self.nu[k].item(), self.nu[k_next].item()
            x = analytical_first_step(x, s, s_next, self.scheduler.config.data_std)
        return Walk(x, embedding_rows(labels, row, len(self.routes), self.num_classes, x), steps)

    def compute_loss(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Named terms of the objective at the node where a batch stands, which then moves on to the next one.

        It moves by the weights that the loss was taken with, before the optimizer step.

        Args:
            batch (`dict`): "walk" (`Walk`), of `prepare_step`.
        """
        walk = batch["walk"]
        (k, k_next, target), last = walk.steps[0], len(walk.steps) == 1
        s, s_next = self.nu[k].item(), self.nu[k_next].item()
        x0 = self._x0_at_node(walk)
        x_next = euler_step(walk.x, x0, s, s_next)
        terms = self._terms_at_node(x0, one_step_target(walk.x, target, s, s_next), x_next, target, last)
        walk.x, walk.steps = x_next.detach(), walk.steps[1:]
        return terms

    def _x0_at_node(self, walk: Walk) -> torch.Tensor:
        """The student's denoised image (B, C, H, W) where a batch stands."""
        return self._denoise(self.model, walk.x, walk.steps[0][0], walk.labels)

    @torch.no_grad()
    def teacher_states(self, x: torch.Tensor, route: Route, labels: torch.Tensor | None) -> list[torch.Tensor]:
        """The teacher's states at the student's nodes after the first, (B, C, H, W) each, from x at the first."""
        config, counts = self.config, len(self.teacher.scheduler.trained_steps)
        if self.second_stage:
            labels = embedding_rows(labels, self._teacher_row(), counts, self.num_classes, x)
            teacher = self.teacher.scheduler.config
            solver = {"solver": "euler", "analytical_first": teacher.analytical_first_step,
                      "data_std": teacher.data_std}  # fmt: skip
        else:
            solver = {"solver": config.teacher_solver, "order": config.solver_order,
                      "thresholding": config.dynamic_thresholding}  # fmt: skip
        states = solve(
            lambda x, i: self._denoise(self.teacher.unet, x, route.teacher[i], labels),
            x,
            self.nu[route.teacher].tolist(),
            **solver,
        )
        return [state for k, state in zip(route.teacher, states, strict=True) if k in route.student[1:]]

    def _denoise(self, network, x: torch.Tensor, k: int, labels: torch.Tensor | None) -> torch.Tensor:
        """x0 of a variance-preserving network at x = z / alpha and index k."""
        z, t = self.scheduler.alpha[k].item() * x, torch.full((len(x),), k, device=x.device)
        with self.accelerator.autocast():
            prediction = network(z, t, labels).sample
        return self.scheduler.predict_x0(prediction.float(), z, t)

    def _terms_at_node(self, x0, x0_target, x_next, target, last: bool) -> dict[str, torch.Tensor]:
        """The named terms of the objective, from the student's denoised image and state and those of the teacher."""
        config = self.config
        l1 = (x_next - target).abs().flatten(1).sum(1).mean()
        if config.objective != "l1":
            regularization = (config.regularization_weight, config.entropy_ratio)
            with self.accelerator.autocast():
                terms = feature_terms(self.classifier, x0, x0_target, config, config.temperature,
                                      regularization if config.objective == "rcfd" else None,
                                      self.log_p_mean)  # fmt: skip
            return terms | {"loss": terms["loss"] + config.l1_weight * l1, "l1": l1}
        if not (self.second_stage and config.perceptual_weight):
            return {"loss": l1, "l1": l1}
        if not last:  # the means over the nodes are of as many terms
            return {"loss": l1, "l1": l1, "perceptual": torch.zeros_like(l1)}
        with self.accelerator.autocast():
            if self.lpips is not None:
                perceptual = self.lpips(*(image.expand(-1, 3, -1, -1) for image in (x_next, target))).float().mean()
            else:
                perceptual = spatial_distance(self.classifier, x_next, target, config)
        # Beside a sum over the pixels, as LPIPS stands beside a mean over them.
        loss = l1 + config.perceptual_weight * x0[0].numel() * perceptual
        return {"loss": loss, "l1": l1, "perceptual": perceptual}

    def evaluate(self, evaluator: Evaluator | None = None, num_images: int = 50_000) -> dict[int, dict]:
        """Evaluate the finished student in each of its step counts, for the metrics file and the card.

        Args:
            evaluator (`Evaluator`, *optional*): the metrics and the reference; the trainer's own if not given.
            num_images (`int`, defaults to 50 000): generated images of each step count.

        Returns:
            `dict[int, dict]`: `EvaluationResult.to_dict()` by network evaluations, saved as `evaluation.json`.

        Raises:
            ValueError: if there is no evaluator.
        """
        judge = self._judge(evaluator)
        student, results = RCFDPipeline.from_pretrained(str(self.output_dir)).to(self.accelerator.device), {}
        for N in student.scheduler.trained_steps:
            result = judge.evaluate_pipeline(student, num_images, N, progress=False)
            results[N] = result.to_dict()
            self.write_metrics({"stage": "student", "num_inference_steps": N, **result.named_values})
            if self.accelerator.is_main_process:
                self.record_evaluation(N, result)
        return results

    # --- the Hub ----------------------------------------------------------------------------------------------------

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the student, with a grid of its samples."""
        student = RCFDPipeline.from_pretrained(str(folder))
        self._write_card(
            student,
            folder,
            existing,
            rungs=[],
            teacher=self.teacher_name,
            classifier=None if self.classifier is None else self.classifier.config.backbone,
            objective=self.config.objective,
            **steps_described(student),
        )
