"""The Inception network of FID and IS, offline and without unpickling."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from diffusers_rcfd.data.image_tensors import to_uint8

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class InceptionExtractor(torch.nn.Module):
    """The Inception network of FID and IS, ported from TensorFlow by torch-fidelity, called like a FeatureClassifier.

    It resizes as TensorFlow 1 did, which is part of the metric. Grey images are given as three equal channels.

    Args:
        weights_path (`str` or `os.PathLike`, *optional*): torch-fidelity's weight file, a state dict in PyTorch
            format; by default where torch-fidelity itself keeps it, in the cache of `torch.hub`.

    Raises:
        FileNotFoundError: if the file is absent, for nothing is downloaded.
        ValueError: if the file holds other weights.
    """

    name = "inception-v3-compat"
    num_features = 2048

    def __init__(self, weights_path: str | os.PathLike | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights_path or Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE))
        if not path.is_file():
            raise FileNotFoundError(
                f"No Inception weights at `inception_weights`={str(path)!r}. Fetch {INCEPTION_FILE} from "
                f"{INCEPTION_URL} and pass its path (`--inception_weights PATH`, `InceptionExtractor(PATH)`)."
            )
        # torch-fidelity would unpickle whatever the file holds, so it is given a copy of the tensors alone.
        tensors_only = io.BytesIO()
        try:
            torch.save(torch.load(path, map_location="cpu", weights_only=True), tensors_only)
            tensors_only.seek(0)
            self.network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=tensors_only
            )
        except Exception as error:
            raise ValueError(f"`inception_weights` must hold {INCEPTION_FILE}, got {str(path)!r}: {error}") from error

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        """Images (B, 1 or 3, H, W) in [-1, 1] -> `features` (B, 2048) and `logits` without bias (B, 1008)."""
        features, logits = self.network(to_uint8(images).expand(-1, 3, -1, -1))
        return SimpleNamespace(features=features, logits=logits)
