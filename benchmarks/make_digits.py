"""Make digits.parquet from scikit-learn's copy of the UCI digits: `python make_digits.py`."""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits


def main():
    """Write the 1797 images, levels 0..16 scaled to 0..255, as PNG with their labels, beside this file."""
    digits = load_digits()
    images = [PILImage.fromarray(np.round(levels * 255 / 16).astype(np.uint8)) for levels in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    data = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    data.to_parquet(Path(__file__).parents[1] / "diffusers_rcfd/data/digits.parquet")


if __name__ == "__main__":
    main()
