"""How far `FeatureClassifier` is from timm and transformers themselves, for each of their families.

    python benchmarks/classifiers.py

A small network of random weights of each family is saved by its own library, loaded by `load_feature_classifier` and
compared: the pixels that are fed, the logits, and the features. It writes `classifiers.md`. It takes about ten minutes
on one CPU core and downloads nothing. What was measured is in `runs/classifiers` and is not measured again.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported, which read it once
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402
from timm.models import model_entrypoint  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.classifier_families import (  # noqa: E402
    NO_IMAGES,
    TIMM_MODELS,
    TRANSFORMERS_MODELS,
    Agreement,
    timm_agreement,
    transformers_agreement,
)

DONE = ROOT / "runs/classifiers"
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "diffusers")
HEADER = """\
| {} | network | size | cropped from | pixels | resized | logits | features | length |
|---|---|---:|---:|---:|---:|---:|---:|---:|
"""
REPORT = """\
# Classifiers: every family of timm and of transformers

Written on {date}, on one CPU core, with {versions}, by

    python benchmarks/classifiers.py

A small network of random weights of each family (batch norm statistics and last layers as after training) is saved by
its own library with its own preparation of images, loaded by `load_feature_classifier`, and compared. In the tables

- *size* is the height and width that the network takes, *cropped from* that of an image of which the library's own
  preparation keeps the middle. `FeatureClassifier` does not crop: a generator is compared on its whole images. So the
  library gets that image, and `FeatureClassifier` its middle.
- *pixels* is the largest difference of what is fed. Nothing is resized there, so this is rounding.
- *resized* is the mean difference, in grey levels of 255, for a smooth image of twice the height and width.
  `FeatureClassifier` resizes numbers, differentiably, where the library resizes and rounds bytes.
- *logits* is the largest difference of the logits over the largest logit; *features* is the same for what the last
  layers make of the features: the features are their input, all of it.
- *length* is D, the length of the features.

Largest over all families: pixels {pixels:.1e}, resized {resized:.2f} grey levels, logits {logits:.1e}.

VOLO adds to its logits those of an auxiliary layer for each token: the features are the input of the main layer, and
so do not give all of the logits.

Refused, each with the reason: {refused}, whose networks take no images; and processors that pad
images or feed other than square ones. The defaults of Donut and of MobileViT do: they are compared with other sizes.
{skipped}
## timm, {timm} networks of {modules} modules

{timm_table}
## transformers, {transformers} classes

{transformers_table}"""


def main() -> None:
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    timm_rows = [(module_of(name), name, measure(name, timm_agreement, name)) for name in tqdm(TIMM_MODELS)]
    missing = [] if find_spec("natten") else ["dinat"]
    transformers_rows = [
        (family, name, measure(name, transformers_agreement, family, name))
        for family, name in tqdm(TRANSFORMERS_MODELS)
        if family not in missing
    ]
    (ROOT / "benchmarks/classifiers.md").write_text(report(timm_rows, transformers_rows, missing))


def measure(name: str, agreement: Callable[..., Agreement], *arguments: str) -> Agreement:
    """Compare one network, or read what an earlier run of this program found."""
    path = DONE / f"{name}.json"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            found = agreement(*arguments, Path(folder))
        DONE.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)))
    return Agreement(**json.loads(path.read_text()))


def module_of(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


def report(timm_rows: list, transformers_rows: list, missing: list[str]) -> str:
    agreements = [agreement for *_, agreement in timm_rows + transformers_rows]
    return REPORT.format(
        date=date.today(),
        versions=", ".join(f"{library} {version(library)}" for library in LIBRARIES),
        refused=", ".join(NO_IMAGES),
        skipped=f"\nNot run, since its library is not installed: {', '.join(missing)} (natten).\n" if missing else "",
        timm=len(timm_rows),
        modules=len({module for module, *_ in timm_rows}),
        transformers=len(transformers_rows),
        timm_table=HEADER.format("module") + "".join(map(line, sorted(timm_rows, key=lambda row: row[:2]))),
        transformers_table=HEADER.format("family") + "".join(map(line, transformers_rows)),
        **{key: max(getattr(each, key) for each in agreements) for key in ("pixels", "resized", "logits")},
    )


def line(row: tuple[str, str, Agreement]) -> str:
    family, name, a = row
    figures = f"{a.pixels:.1e} | {a.resized:.2f} | {a.logits:.1e} | {a.features:.1e}"
    return f"| {family} | `{name}` | {a.size} | {a.crop} | {figures} | {a.length} |\n"


if __name__ == "__main__":
    main()
