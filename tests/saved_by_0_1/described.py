"""What the cards of this folder describe; read by `make.py` under version 0.1 and by the tests."""

RUNGS = [(4, 2, "pd", 1.0, 0.0, 0.5, 300), (2, 2, "rcfd", 0.9, 0.003, 0.75, 500)]  # arguments of `Rung`
MADE_ELSEWHERE = """---
license: mit
tags:
- mine
metrics:
- old
---

# My digits

Hand-made words.
"""


def evaluation(value):
    """An entry of `evaluation.json`."""
    metrics = {
        "fd": {"label": "FD(tiny)", "value": value, "confidence_interval": [value - 0.5, value + 0.5]},
        "is": {"label": "IS(tiny)", "value": 7.25, "confidence_interval": None},
    }
    return {
        "metrics": metrics,
        "num_images": 64,
        "seed": 0,
        "extractor": "tiny",
        "reference": "anna/digits [train]",
        "num_reference_images": 99,
        "reference_key": "",
    }
