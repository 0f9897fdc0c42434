"""The few-step generator: a U-Net and an RCFDScheduler."""

import copy
import importlib.util
import inspect
import re
import tempfile
from pathlib import Path

import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo
from huggingface_hub.errors import HfHubHTTPError

from diffusers_rcfd.models.denoiser import Denoiser, unwrap
from diffusers_rcfd.saving import saved_whole
from diffusers_rcfd.schedulers.noise_schedules import schedule_betas
from diffusers_rcfd.schedulers.scheduling_rcfd import RCFDScheduler
from diffusers_rcfd.validation import require_count

OUTPUT_TYPES = ("pil", "np", "pt")
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


class RCFDPipeline(DiffusionPipeline):
    """Pipeline that samples images in the few steps a student was distilled for, or from a base model in any number.

    Saved, it is a stock `DDIMPipeline` that plain Diffusers loads too (call that one with `num_inference_steps=N,
    use_clipped_model_output=True`), and it carries its own code as `pipeline.py` for `custom_pipeline`.

    A student of SFD, whose scheduler has `nodes`, is saved as a stock `ConsistencyModelPipeline` instead, the one that
    takes timesteps one by one. If it `has_stock_form`, plain Diffusers makes the same images from a `generator` with
    what `stock_call` spells out: the nodes as `timesteps`, with an analytical first step also
    `scheduler.init_noise_sigma`, and for a model of several step counts the `class_labels` that its step count and
    class have in the network.

    Args:
        unet (`UNet2DModel`): the network, unconditional or class-conditional. Where the scheduler has several lists of
            `nodes`, one table of class embeddings holds all classes for the first list, all for the second, and so on.
        scheduler (`RCFDScheduler`): or any scheduler with betas (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...), which is
            turned into one; or EDM's or flow matching's, which are turned into one with their network.

    Raises:
        TypeError: for a network of another kind, such as the `UNet2DConditionModel` of a text-to-image pipeline.
        ValueError: for a network that predicts a variance too, a scheduler without betas, such as flow matching, or
            one of several step counts that the network's class embeddings are not for.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: RCFDScheduler):
        super().__init__()
        network = unwrap(unet)
        check_network(network.config)
        if takes_no_index(scheduler):
            from diffusers_rcfd.models.adoption import adopt_unet
            from diffusers_rcfd.models.edm import from_edm

            config = {"_class_name": type(scheduler).__name__, **scheduler.config}
            unet, scheduler = (from_edm if "sigma_data" in config else adopt_unet)(network, config)
        scheduler = to_rcfd_scheduler(scheduler)
        embeddings, counts = unet.config.num_class_embeds, len(scheduler.trained_steps)
        if counts > 1 and (not embeddings or embeddings % counts):
            raise ValueError(
                f"`unet` must have `num_class_embeds` in a multiple of {counts}, the step counts of the scheduler's "
                f"`nodes`, got {embeddings}."
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    def __setattr__(self, name, value):
        """Take a stock scheduler over as in the constructor: `pipe.scheduler = DDIMScheduler.from_config(...)`."""
        super().__setattr__(name, to_rcfd_scheduler(value) if name == "scheduler" else value)

    @property
    def components(self) -> dict:
        """Network and scheduler by their names. Diffusers asks after each call, and would inspect the signature."""
        return {"unet": self.unet, "scheduler": self.scheduler}

    @property
    def denoiser(self) -> Denoiser:
        """Network and scheduler as a function (z_t, t, labels) -> x0."""
        return Denoiser(self.unet, self.scheduler)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.denoiser.image_shape

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional model, else None; step counts that share the embeddings do not count."""
        return self.denoiser.num_classes

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
        """Sample images.

        Args:
            batch_size (`int`, defaults to 1): number of images; that of `latents` where those are given.
            num_inference_steps (`int`, *optional*): network evaluations N; defaults to what the model was distilled
                for, whose divisors are allowed too. A base model takes any number in 1..n - 1 (default n - 1), a
                student of SFD those that it was trained for (default the largest).
            generator (`torch.Generator` or a list of `batch_size` of them, *optional*): the source of the noise,
                one for the batch or one for each image.
            class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): one class for all, or one for each
                image, in 0..num_classes - 1; needed by, and only by, class-conditional models.
            latents (`torch.Tensor`, *optional*): the noise itself, (batch_size, C, H, W).
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), the last
                two in [0, 1].
            return_dict (`bool`, defaults to `True`): an `ImagePipelineOutput`, else a tuple.

        Raises:
            ValueError: for a value outside those named above.
        """
        denoiser, z, class_labels = self._begin(batch_size, generator, class_labels, latents, output_type)
        scheduler = denoiser.scheduler
        scheduler.set_timesteps(num_inference_steps, device=z.device)
        z = z * scheduler.init_noise_sigma
        for t in self.progress_bar(scheduler.timesteps):
            prediction = denoiser.predict(z, t, class_labels)
            z = scheduler.step(prediction, t, z, return_dict=False)[0]

        return self._finish(z * scheduler.config.data_std, output_type, return_dict)  # z_0 is x0 / data_std

    def _begin(self, batch_size, generator, class_labels, latents, output_type) -> tuple:
        """The denoiser of a call, and its checked arguments as noise (B, C, H, W) and labels (B,) or None."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        denoiser = Denoiser(self.unet, copy.copy(self.scheduler))  # whose steps no other thread sets
        z = self._initial_noise(denoiser.image_shape, batch_size, generator, latents, self._device())
        return denoiser, z, check_class_labels(class_labels, denoiser.num_classes, z)

    def _device(self) -> torch.device:
        """Where the network computes; offloaded weights lie on the CPU or nowhere."""
        weight = next(self.unet.parameters())
        offloaded = weight.device.type in ("cpu", "meta") and torch.accelerator.is_available()
        return self._execution_device if offloaded else weight.device

    def _finish(self, z: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Images in [-1, 1] as what the caller asked for."""
        images = (z / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_noise(self, image_shape, batch_size, generator, latents, device) -> torch.Tensor:
        """z_T (B, C, H, W) in float32, whatever the network's number type, so that noise depends on the seed alone."""
        batch_size = require_count("batch_size", batch_size, 1)
        if latents is not None:
            latents = torch.as_tensor(latents)
            if latents.ndim != 4 or latents.shape[1:] != image_shape or batch_size not in (1, len(latents)):
                raise ValueError(
                    f"`latents` must have the shape (batch_size, C, H, W) = {(batch_size, *image_shape)}, got "
                    f"{tuple(latents.shape)}."
                )
            return latents.to(device, torch.float32)
        generators = generator if isinstance(generator, list) else [generator]
        if not all(isinstance(each, torch.Generator | None) for each in generators):
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` as a list must hold one generator for each of the `batch_size`={batch_size} images, "
                f"got {len(generator)}."
            )
        return randn_tensor((batch_size, *image_shape), generator=generator, device=device, dtype=torch.float32)

    @property
    def has_stock_form(self) -> bool:
        """Whether plain Diffusers can sample a student of SFD alike; its `ConsistencyModelPipeline` makes squares."""
        return self.scheduler.has_stock_form and isinstance(self.unet.config.sample_size, int)

    def stock_call(self, num_inference_steps: int | None = None) -> dict:
        """What the `ConsistencyModelPipeline` that a student of SFD is saved as needs for the same images.

        Args:
            num_inference_steps (`int`, *optional*): as in a call.

        Returns:
            `dict`: "timesteps" and "class_labels" of the call, the latter of one image of class 0 and None where there
            is none, and "init_noise_sigma", to be set on its scheduler.
        """
        self.scheduler.set_timesteps(num_inference_steps)
        rows = self.denoiser.embedding_rows(torch.zeros(1, dtype=torch.int64), torch.empty(1))
        return {
            "timesteps": self.scheduler.timesteps.tolist(),
            "class_labels": None if rows is None else rows.tolist(),
            "init_noise_sigma": self.scheduler.init_noise_sigma,
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a saved pipeline of a `UNet2DModel` and a DDIM-like scheduler; pickled weights are never read.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or the name of a Hub repository.
            kwargs: passed to `DiffusionPipeline.from_pretrained` (`revision`, `token`, `dtype`, `variant`, ...).

        Raises:
            ValueError: for `use_safetensors=False`, a pipeline of other components, or a name that is neither a
                folder nor one of a repository.
            OSError: if there is no such repository, revision or file, or the token does not open it.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` must be True: pickled weights can run code and are not read.")
        kwargs["use_safetensors"] = True
        name = str(pretrained_model_name_or_path)
        try:
            pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if isinstance(error.__cause__, HfHubHTTPError):  # Diffusers speaks of its cache instead
                raise OSError(f"Cannot load {name!r} from the Hub: {error.__cause__}") from error
            raise
        index = cls.load_config(name, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
        parts = {key for key, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None}
        if parts > {"unet", "scheduler"}:  # which Diffusers would leave out without a word
            others = ", ".join(sorted(parts - {"unet", "scheduler"}))
            raise ValueError(
                f"{name!r} must be a pipeline of a unet and a scheduler that makes pixels; it is a "
                f"{index.get('_class_name')} and has also: {others}."
            )
        return pipeline

    def save_pretrained(
        self,
        save_directory,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> str | None:
        """Save as a stock pipeline in safetensors (see the class), with this class beside it as `pipeline.py`.

        Files take their place once all are written: a failure, such as a full disk, leaves what was there before.

        Args:
            save_directory (`str` or `os.PathLike`): the folder, made if it is missing.
            safe_serialization (`bool`, defaults to `True`): nothing else is allowed.
            push_to_hub (`bool`, defaults to `False`): also write a model card and publish the folder, as one commit.
            repo_id (`str`, *optional*): repository to publish to; the name of the folder by default.
            commit_message, private, token, create_pr: see `push_to_hub`.
            kwargs: passed to `DiffusionPipeline.save_pretrained` (`variant`, ...).

        Returns:
            the commit's address, where it is published.

        Raises:
            ValueError: for `safe_serialization=False`.
            OSError: if writing fails; the folder is then as it was before, and nothing is published.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: nothing pickled is written.")
        folder = Path(save_directory)
        with saved_whole(folder) as partial:
            (partial / "pipeline.py").write_text(pipeline_source(), encoding="utf-8")
            if self.scheduler.config.nodes:
                stock = ConsistencyModelPipeline(unet=self.unet, scheduler=self.scheduler.to_dpm_solver())
            else:
                stock = DDIMPipeline(unet=self.unet, scheduler=self.scheduler.to_ddim())
            stock.save_pretrained(str(partial), **kwargs)
            files = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()]
        if not push_to_hub:
            return None
        repo_id = create_repo(repo_id or folder.resolve().name, exist_ok=True, private=private, token=token).repo_id
        if importlib.util.find_spec("diffusers_rcfd"):  # the copy of this file that a saved pipeline carries has none
            from diffusers_rcfd.hub.model_card import write_pipeline_card
            from diffusers_rcfd.hub.publishing import CARD_FILES, publish_files, read_card

            write_pipeline_card(self, folder, repo_id, read_card(repo_id, token))
            title = commit_message or f"Upload {type(self).__name__}"
            return publish_files(folder, [*files, *CARD_FILES[:2]], repo_id, None, token, title, create_pr)
        return self._upload_folder(
            str(folder), repo_id, token=token, commit_message=commit_message, create_pr=create_pr
        )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> str:
        """Publish the pipeline with a model card, as one commit; a person's part of an existing card is kept.

        Args:
            repo_id (`str`): "name" or "owner/name"; made if it is missing.
            commit_message (`str`, *optional*): title of the commit.
            private (`bool`, *optional*): of a new repository; the account's default where not given.
            token (`str`, *optional*): defaults to that of `hf auth login`.
            create_pr (`bool`, defaults to `False`): open a pull request instead of committing.
            kwargs: passed to `save_pretrained` (`variant`, ...).

        Returns:
            the commit's address.
        """
        options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options, **kwargs)


def check_network(config) -> None:
    """Raise a `ValueError` if a `UNet2DModel` of this config does not turn z_t into a prediction of its own shape."""
    if config.sample_size is None:
        raise ValueError("`unet` must have a `sample_size`, the height and width of its images, got None.")
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"`unet` must have as many `out_channels` as `in_channels`={config.in_channels}, got "
            f"{config.out_channels}: a network that predicts a variance too (`learned_range`) is not supported."
        )
    if config.class_embed_type is not None:
        raise ValueError(
            f"`unet` must take class labels by `num_class_embeds`, got `class_embed_type`={config.class_embed_type!r}."
        )


def takes_no_index(scheduler) -> bool:
    """Whether a scheduler gives its network something else than the index of a noise level: EDM's, flow matching's."""
    config = getattr(scheduler, "config", {})
    named = type(scheduler).__name__.startswith(("EDM", "FlowMatch"))
    return named or bool(config.get("use_flow_sigmas")) or config.get("timestep_type") == "continuous"


def to_rcfd_scheduler(scheduler) -> RCFDScheduler:
    """Turn a scheduler with betas into an `RCFDScheduler`; one of ours is returned as it is.

    Raises:
        TypeError: for what is no scheduler.
        ValueError: for a scheduler that no schedule of betas describes.
    """
    if isinstance(scheduler, RCFDScheduler):
        return scheduler
    if not isinstance(scheduler, SchedulerMixin):
        raise TypeError(f"`scheduler` must be a scheduler of Diffusers, got {type(scheduler).__name__}.")
    return RCFDScheduler.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})


def check_class_labels(class_labels, num_classes: int | None, z: torch.Tensor) -> torch.Tensor | None:
    """The class labels of a call as a tensor (B,) on the device of z (B, C, H, W), or None for no classes."""
    if num_classes is None:
        if class_labels is not None:
            raise ValueError("`class_labels` must be None: this model is unconditional.")
        return None
    if class_labels is None:
        raise ValueError(f"`class_labels` must be given, in 0..{num_classes - 1}: the model is class-conditional.")
    labels = torch.as_tensor(class_labels)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape not in ((), (1,), (len(z),)):
        raise ValueError(
            f"`class_labels` must be one integer or {len(z)} integers, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"`class_labels` must be in 0..{num_classes - 1}, got {labels.tolist()}.")
    return labels.to(z.device).expand(len(z))


def pipeline_source() -> str:
    """The pipeline and its scheduler as one Python file that needs Diffusers and nothing of ours."""
    parts = (require_count, saved_whole, schedule_betas, RCFDScheduler, Denoiser, RCFDPipeline)
    files = dict.fromkeys(inspect.getsourcefile(inspect.unwrap(part)) for part in parts)
    source = "\n\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    return re.sub(r"^from diffusers_rcfd\S* import (\([^)]*\)|.*)\n", "", source, flags=re.MULTILINE)
