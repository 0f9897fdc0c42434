"""A base model under the solver of SFD's teacher, for comparison with the student that learns where it ends."""

import torch
from diffusers import ImagePipelineOutput, UNet2DModel

from diffusers_rcfd.pipelines.pipeline_rcfd import RCFDPipeline
from diffusers_rcfd.schedulers.names import TEACHER_SOLVERS
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.schedulers.trajectories import network_calls, solve
from diffusers_rcfd.validation import require


class TrajectoryPipeline(RCFDPipeline):
    """Samples a base model down the nodes that a student of SFD learns from; called like an `RCFDPipeline`.

    A student ends where its teacher's trajectory ends, so this is what to measure before training one. It cannot be
    saved: that is for the base model and the student.

    Args:
        unet (`UNet2DModel`): the network.
        scheduler (`RCFDScheduler`): of the base model: the noise schedule, and what the network predicts.
        nodes (`list[int]`): falling indices of the schedule, two or more.
        solver (`str`, defaults to `"dpm-solver++"`), order (`int`, defaults to 3), thresholding (`bool`, defaults to
            `True`): see `trajectories.solve`.

    Raises:
        ValueError: for nodes that do not fall, a solver or an order that is none of these, and a student of SFD,
            which samples in nodes of its own.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: RCFDScheduler,
        nodes: list[int] | None = None,
        solver: str = "dpm-solver++",
        order: int = 3,
        thresholding: bool = True,
    ):
        super().__init__(unet, scheduler)
        own = self.scheduler.config.nodes
        require(not own, "scheduler", own, "of a base model, without `nodes`")
        falling = [len(self.scheduler), *(nodes or ()), -1]
        fall = len(falling) > 3 and all(high > low for high, low in zip(falling, falling[1:], strict=False))
        require(fall, "nodes", nodes, f"two or more falling indices in 0..{len(self.scheduler) - 1}")
        require(solver in TEACHER_SOLVERS, "solver", solver, f"one of {TEACHER_SOLVERS}")
        require(order in (1, 2, 3), "order", order, "1, 2 or 3")
        self.register_to_config(nodes=list(nodes), solver=solver, order=order, thresholding=thresholding)

    @property
    def num_evaluations(self) -> int:
        """Network evaluations of an image."""
        return network_calls(self.config.nodes, self.config.solver)

    def save_pretrained(self, save_directory, **kwargs):
        """Refused, and so is `push_to_hub`: no stock pipeline samples down these nodes.

        Raises:
            ValueError: always.
        """
        require(False, "save_directory", save_directory, "unset: save `RCFDPipeline(unet, scheduler)`, the base model")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample images; see `RCFDPipeline.__call__`. `num_inference_steps` is `num_evaluations`, or not given.

        Raises:
            ValueError: for arguments not allowed.
        """
        allowed = f"{self.num_evaluations}, the evaluations of its nodes"
        given = num_inference_steps in (None, self.num_evaluations)
        require(given, "num_inference_steps", num_inference_steps, allowed)
        denoiser, z, class_labels = self._begin(batch_size, generator, class_labels, latents, output_type)
        nodes, alpha = self.config.nodes, self.scheduler.alpha
        nu = (self.scheduler.sigma / alpha)[nodes].tolist()
        options = {"solver": self.config.solver, "order": self.config.order, "thresholding": self.config.thresholding}
        x = z / alpha[nodes[0]].item()
        x = solve(lambda x, i: denoiser.at_index(x, nodes[i], class_labels), x, nu, **options)[-1]
        return self._finish(self.scheduler.config.data_std * alpha[nodes[-1]].item() * x, output_type, return_dict)
