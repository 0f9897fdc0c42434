"""Simple and Fast Distillation: a student trained down its own trajectory, one optimizer step at each node."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from diffusers_rcfd.distillation.objectives import Objective, compares_features, needs_classifier
from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.distillation.terms import check_objective
from diffusers_rcfd.distillation.trajectory import Route, trajectory_pairs
from diffusers_rcfd.evaluation.evaluator import Evaluator
from diffusers_rcfd.models.count_embeddings import for_counts, for_one_count
from diffusers_rcfd.models.feature_classifier import FeatureClassifier
from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.pipelines.trajectory_sampler import TrajectoryPipeline
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.schedulers.trajectories import nearest_indices, rho_nodes, subdivide
from diffusers_rcfd.trainers.checkpoints import architecture
from diffusers_rcfd.trainers.distillation import (
    Distillation,
    DistillationTrainer,
    LPIPSDistance,
    to_student,
    warn_of_parametrisation,
)
from diffusers_rcfd.trainers.parts import load_part
from diffusers_rcfd.trainers.sfd_config import SFDDistillationConfig
from diffusers_rcfd.trainers.trainer import Stage
from diffusers_rcfd.validation import require

logger = logging.get_logger(__name__)

FAR = 0.7  # in ln(sigma / alpha), a factor of 2: a node this far from the level that was asked for is logged


@dataclass(kw_only=True)
class TrajectoryStage(Distillation):
    """A student of SFD on its way."""

    routes: list[Route]


class SFDDistillationTrainer(DistillationTrainer):
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
        lpips (`Callable`, *optional*): of the second stage with objective l1, and of the term `lpips`; see
            `DistillationTrainer`.
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
        lpips: LPIPSDistance | None = None,
        evaluator: Evaluator | None = None,
    ):
        config = config or SFDDistillationConfig()
        super().__init__(teacher, classifier, config, None, lpips, evaluator)
        warn_of_parametrisation(self.teacher)
        scheduler = self.teacher.scheduler
        self.second_stage = bool(scheduler.config.nodes)
        if not self.second_stage and scheduler.config.num_inference_steps is not None:
            N = scheduler.config.num_inference_steps
            logger.warning(
                f"`teacher` was distilled for {N} steps, and the nodes of SFD are not those of that sampler."
            )
        self.routes = [self._route(N) for N in config.student_steps]
        self.objective = self._objective()
        self.teacher_samplers = self._teacher_samplers()
        self.scheduler = RCFDScheduler.from_config(
            dict(scheduler.config)
            | {
                "nodes": [route.student for route in self.routes],
                "analytical_first_step": config.analytical_first_step,
                "num_inference_steps": max(config.student_steps),
                "clip_sample": False,
                "thresholding": False,
            }
        )

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
        nu = self.teacher.scheduler.nu
        student = nearest_indices(nu, levels)
        require(
            all(high > low for high, low in pairwise(student)),
            "teacher",
            student,
            f"of a schedule that tells the nodes {[round(s, 4) for s in levels.tolist()]} apart",
        )
        if self.second_stage:
            scheduler = self.teacher.scheduler
            teacher = list(scheduler.config.nodes[self._teacher_row()])
            lacking = sorted(set(student) - set(teacher)) or student[0] != teacher[0] or student[-1] != teacher[-1]
            require(not lacking, "student_steps", student_steps, f"such that its nodes {student} are among {teacher}")
            analytical = scheduler.config.analytical_first_step
            return Route(student, teacher, solver="euler", analytical_first=analytical,
                         student_analytical_first=config.analytical_first_step)  # fmt: skip
        fine = nearest_indices(nu, subdivide(levels, config.teacher_steps_of(student_steps), config.rho))
        teacher = sorted(set(fine), reverse=True)  # nodes that fall on one index are one
        if (nu[student].log() - levels.log()).abs().max() > FAR:
            given, wanted = ([f"{s:.3g}" for s in values.tolist()] for values in (nu[student], levels))
            logger.warning(
                f"The teacher's schedule does not reach the nodes {', '.join(wanted)}: they are {', '.join(given)}, "
                f"and the teacher takes {len(teacher) - 1} steps. See `sigma_max`, `sigma_min` and `nodes`."
            )
        return Route(student, teacher, config.teacher_solver, config.solver_order, config.dynamic_thresholding,
                     student_analytical_first=config.analytical_first_step)  # fmt: skip

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
            route.teacher_evaluations: teacher
            if self.second_stage
            else TrajectoryPipeline(teacher.unet, teacher.scheduler, route.teacher, *solver)
            for route in self.routes
        }

    def _objective(self) -> Objective:
        """The checked objective; a classifier or LPIPS that no term uses is dropped with a warning."""
        image_shape, lpips = self.teacher.image_shape, self.lpips
        if lpips is not None:
            channels, *size = image_shape
            least = getattr(lpips, "min_size", 1)
            fits = channels in (1, 3) and min(size) >= least
            require(fits, "lpips", image_shape, f"for images of 1 or 3 channels and {least} pixels a side or more")
        weights = self.config.weights(self.second_stage, lpips is not None)
        if lpips is not None and "lpips" not in weights:
            logger.warning("`lpips` is not used: no term of the loss is 'lpips'.")
            self.lpips = None
        if self.classifier is not None and not needs_classifier(weights):
            logger.warning("`classifier` is not used: the loss compares images.")
            self.classifier = None
        objective = self.config.objective_of(weights, self.config.temperature)
        check_objective(objective, image_shape, self.classifier, self.lpips)
        return objective

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> RCFDPipeline:
        """Train the student, the only stage; it is saved to `output_dir` and returned."""
        if not self.state.stage:
            self.fit(self.begin())
        return load_part(RCFDPipeline, self.output_dir)

    def begin(self) -> TrajectoryStage:
        """The student at its start, a copy of its teacher, with what it learns from."""
        student = copy.deepcopy(self.teacher.unet).requires_grad_(False)
        if self.second_stage:
            student = for_one_count(student, self._teacher_row(), len(self.teacher.scheduler.trained_steps))
        if len(self.routes) > 1:
            student = for_counts(student, len(self.routes))
        return TrajectoryStage(
            name="student",
            index=0,
            model=to_student(student, "student"),
            max_train_steps=self.config.max_train_steps,
            routes=self.routes,
            teacher=self.freeze_teacher(self.teacher),
            scheduler=self.scheduler,
            objective=self.objective,
            guides=self.freeze_guides(),
            autocast=self.accelerator.autocast,
        )

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
        objective = config.objective if config.terms is None else " ".join(config.terms)
        return super().made_by() | architecture(self.teacher.unet) | route | {"objective": objective}

    def draw(self, stage: TrajectoryStage, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Noise, the route of all (uniform, SFD-v), and classes (uniform) for a class-conditional teacher."""
        num_classes, device = self.teacher.num_classes, generator.device
        draws = {
            "noise": torch.randn((batch_size, *self.teacher.image_shape), generator=generator, device=device),
            "route": torch.randint(len(stage.routes), (1,), generator=generator, device=device).expand(batch_size),
        }
        if num_classes is not None:
            draws["labels"] = torch.randint(num_classes, (batch_size,), generator=generator, device=device)
        return draws

    def pairs(self, stage: TrajectoryStage, batch: dict[str, torch.Tensor]) -> Iterator[Pair]:
        """A pair for each node of the drawn route, see `distillation.trajectory.trajectory_pairs`."""
        # The route is read from the device only where there are several.
        route = stage.routes[int(batch["route"][0]) if len(stage.routes) > 1 else 0]
        return trajectory_pairs(stage.student(route.num_inference_steps), stage.teacher, route, batch)

    def finish_stage(self, stage: Stage) -> None:
        """Save the student."""
        RCFDPipeline(stage.model, stage.scheduler).save_pretrained(self.output_dir)

    def students(self) -> list[tuple[str, Path, int]]:
        """The student in each of its step counts."""
        return [("student", self.output_dir, N) for N in self.scheduler.trained_steps]

    # --- the Hub ----------------------------------------------------------------------------------------------------

    def create_model_card(self, folder: Path, existing: str | None = None) -> None:
        """Write the card of the student, with a grid of its samples."""
        self._write_card(
            RCFDPipeline.from_pretrained(str(folder)),
            folder,
            existing,
            teacher=self.teacher_name,
            classifier=self.describe_guide(),
            objective=self.config.objective if self.config.terms is None else " ".join(self.config.terms),
            is_guided=compares_features(self.objective.weights),
        )
