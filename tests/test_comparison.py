import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_rcfd import Evaluator, load_image_data
from diffusers_rcfd.evaluation.comparison import (
    Contender,
    compare,
    markdown_table,
    save_comparison,
    save_comparison_grid,
    student_contender,
)
from tests.toys import tiny_classifier, tiny_sfd_student, tiny_teacher


@pytest.fixture(scope="module")
def contenders():
    base = tiny_teacher()
    return [Contender("DDIM", 2, base), Contender("DDIM", 1, base), Contender("PD", 1, tiny_teacher(1, seed=1))]


@pytest.fixture(scope="module")
def rows(contenders):
    torch.manual_seed(0)
    evaluator = Evaluator(tiny_classifier().eval(), load_image_data(max_images=100), name="tiny", batch_size=32,
                          cache_dir=False)  # fmt: skip
    return compare(contenders, evaluator, num_images=64)


def test_each_contender_has_its_numbers(rows):
    assert [(row["method"], row["num_inference_steps"]) for row in rows] == [("DDIM", 2), ("DDIM", 1), ("PD", 1)]
    values = [row["evaluation"]["metrics"]["fd"]["value"] for row in rows]
    assert len(set(values)) == 3 and all(value > 0 for value in values)
    assert rows[0]["evaluation"]["num_images"] == 64 and all(row["images_per_second"] > 0 for row in rows)


def test_table_and_files(rows, tmp_path):
    save_comparison(rows, tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines == markdown_table(rows).splitlines() and len(lines) == 5
    assert lines[0] == "| evaluations | method | FD(tiny) | IS(tiny) | images/s |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 2", "| 1", "| 1"]
    assert "FID" not in "".join(lines)  # which is Inception's alone
    assert json.loads((tmp_path / "comparison.json").read_text()) == rows


def test_grid_has_a_column_for_each_contender(contenders, tmp_path):
    save_comparison_grid(contenders, tmp_path / "grid.png", num_noises=4)
    three = np.asarray(Image.open(tmp_path / "grid.png"))
    save_comparison_grid(contenders[:1], tmp_path / "one.png", num_noises=4)
    one = np.asarray(Image.open(tmp_path / "one.png"))
    assert three.shape[1] > 2 * one.shape[1] and three[..., :3].std() > 10


def test_a_student_of_several_step_counts_is_chosen_by_number(tmp_path):
    tiny_sfd_student().save_pretrained(tmp_path / "student")
    tiny_teacher(4).save_pretrained(tmp_path / "ladder")
    tiny_teacher().save_pretrained(tmp_path / "base")

    def chosen(place):
        contender = student_contender(place)
        calls = []
        contender.pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(int(args[1])))
        contender.pipeline.set_progress_bar_config(disable=True)
        contender.pipeline(1, contender.num_inference_steps)
        return contender.method, contender.num_inference_steps, len(calls)

    assert chosen(f"SFD-v={tmp_path / 'student'}") == ("SFD-v", 3, 3)
    assert chosen(f"SFD-v={tmp_path / 'student'}@2") == ("SFD-v", 2, 2)
    assert chosen(f"{tmp_path / 'student'}@3")[:2] == (f"{tmp_path.name}/student", 3)
    assert chosen(f"PD={tmp_path / 'ladder'}@2") == ("PD", 2, 2)
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be one of \[2, 3\].* got 4"):
        student_contender(f"{tmp_path / 'student'}@4")
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be .* got 0"):
        student_contender(f"{tmp_path / 'student'}@0")
    with pytest.raises(ValueError, match="`students` must have been distilled for a number of steps"):
        student_contender(f"{tmp_path / 'base'}@4")
    tiny_sfd_student().save_pretrained(tmp_path / "student@2")
    assert chosen(f"{tmp_path / 'student'}@2")[:2] == (f"{tmp_path.name}/student@2", 3)  # a folder of that name
