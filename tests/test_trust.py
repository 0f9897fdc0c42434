"""What an attack on version 0.1 found, by the numbers of that report: a test for each that fails on it."""

import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusers_rcfd import FeatureClassifier, RCFDPipeline, load_image_data
from diffusers_rcfd.saving import CHECKSUMS_FILE, read_json, write_whole
from diffusers_rcfd.trainers.checkpoints import STATE_FILE, find_checkpoints
from diffusers_rcfd.trainers.made_files import MADE_FILE
from diffusers_rcfd.trainers.optimization import average_step
from diffusers_rcfd.trainers.parts import check_model, find_part_fault, load_part, verify
from tests.test_run_record import CONFIGS, trainer
from tests.toys import largest_file, parameters, tiny_classifier, tiny_teacher

# The four trainers, two of which tell a fault of all of them.
SOME = [pytest.param(kind, marks=pytest.mark.slow) if kind in ("classifier", "ladder") else kind for kind in CONFIGS]


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=32)


def run(kind, folder, digits, **options):
    return trainer(kind, replace(CONFIGS[kind], output_dir=str(folder), **options), digits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """A finished ladder of two students with sample grids."""
    folder = tmp_path_factory.mktemp("ladder")
    run("ladder", folder, digits, **LADDER).train()
    return folder


LADDER = {"student_steps": [2, 1], "objective": ["pd"], "teacher_steps": [2, 2], "sample_steps": 1,
          "num_sample_images": 4, "checkpoints_total_limit": 9}  # fmt: skip


@pytest.fixture
def ladder_folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_bit(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


# --- 1. a leak ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME)
def test_1_moving_average_keeps_no_graph(tmp_path, digits, kind):
    seen = []
    trained = run(kind, tmp_path, digits, ema_decay=0.9, checkpointing_steps=0)
    train_step = trained._train_step

    def look(stage, *args):
        terms = train_step(stage, *args)
        seen.append([shadow.requires_grad for shadow in stage.ema.shadow_params])
        return terms

    trained._train_step = look
    trained.train()
    assert len(seen) == 2 and not any(map(any, seen))


def measure():
    """Resident bytes, open files, and tensors that keep a graph, of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    graphs = sum(issubclass(type(each), torch.Tensor) and each.grad_fn is not None for each in gc.get_objects())
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_1_memory_stays_the_same_over_2000_steps(tmp_path, digits, kind):
    steps = [2000] if kind == "ladder" else 2000
    options = {"max_train_steps": steps, "ema_decay": 0.999, "checkpointing_steps": 500, "logging_steps": 100}
    trained, seen = run(kind, tmp_path, digits, **options), {}
    train_step = trained._train_step

    def look(*args):
        if trained.state.step in (600, 1900):
            seen[trained.state.step] = measure()
        return train_step(*args)

    trained._train_step = look
    trained.train()
    (before, files, graphs), (after, files_after, graphs_after) = seen.values()
    assert after - before < 8 * 2**20  # 0.1 took 180 KiB a step
    assert (files, graphs) == (files_after, graphs_after)


@pytest.mark.slow
def test_1_memory_stays_the_same_over_1000_calls_of_a_pipeline():
    pipe, seen = tiny_teacher(2), {}
    for call in range(1000):
        pipe(batch_size=2, generator=torch.Generator().manual_seed(call))
        if call in (200, 999):
            seen[call] = measure()
    (before, files, graphs), (after, files_after, graphs_after) = seen.values()
    assert after - before < 8 * 2**20
    assert (files, graphs) == (files_after, graphs_after)


# --- 2. files of others ---------------------------------------------------------------------------------------------


FOREIGN = {
    "samples/holiday.png": "mine", "best/of.txt": "mine", "unused-things/a.txt": "mine",
    "checkpoint-old/a.bin": "mine", "notes.txt": "mine", "4-step/weights.bin": "mine",
    "unused-checkpoint-4/a.bin": "mine",
    "checkpoint-500x/trainer_state.json": '{"epoch": 1.0}', "logs/events": "mine",
}  # fmt: skip


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("name", FOREIGN)
def test_2_latest_without_a_checkpoint_refuses_a_folder_of_others(tmp_path, digits, name):
    put(tmp_path, {name: FOREIGN[name]})
    with pytest.raises(ValueError, match=f"`output_dir` must be empty or hold a run to resume, .* with '{name}'"):
        run("base", tmp_path, digits, resume_from_checkpoint="latest").train()
    assert list(tree(tmp_path)) == [name]


def test_2_overwriting_deletes_what_a_run_has_listed_and_nothing_else(tmp_path, digits):
    run("base", tmp_path, digits, sample_steps=1, num_sample_images=4).train()
    ours = tree(tmp_path).keys()
    put(tmp_path, FOREIGN | {"checkpoint-2/notes.txt": "mine", "unet/notes.txt": "mine"})
    options = {"overwrite_output_dir": True, "checkpointing_steps": 0, "sample_steps": 0, "max_train_steps": 1}
    run("base", tmp_path, digits, **options).train()
    left = tree(tmp_path)
    assert all(left[name] == content.encode() for name, content in FOREIGN.items())
    assert left["unused-checkpoint-2/notes.txt"] == left["unet/notes.txt"] == b"mine"
    gone = {name for name in ours if name.startswith(("checkpoint-", "samples/"))}
    assert gone and not any(name in left for name in gone - {f"checkpoint-1/{STATE_FILE}"})


def test_2_start_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, digits):
    """It has left records, samples and a model, all of which are listed."""
    killed = run("base", tmp_path, digits, checkpointing_steps=0, sample_steps=1, num_sample_images=4)
    killed._save_checkpoint = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert (tmp_path / "unet").is_dir() and not find_checkpoints(tmp_path)
    run("base", tmp_path, digits, resume_from_checkpoint="latest").train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_2_nothing_of_others_is_in_the_place_of_a_checkpoint(tmp_path, digits, kind):
    others = tmp_path / "others"
    put(others, {"weights.bin": "mine"})
    place = tmp_path / "run/checkpoint-1"
    place.parent.mkdir()
    {"folder": lambda: shutil.copytree(others, place), "file": lambda: place.write_text("mine"),
     "link": lambda: place.symlink_to(others)}[kind]()  # fmt: skip
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="`output_dir` must have no checkpoint-1 that is not of a run"):
        run("base", tmp_path / "run", digits, overwrite_output_dir=True).train()
    assert before.items() <= tree(tmp_path).items() and tree(others) == {"weights.bin": b"mine"}


def test_2_13_no_link_is_written_or_deleted_through(tmp_path, digits):
    others = tmp_path / "others"
    put(others, {"weights.bin": "mine"})
    (tmp_path / "run").mkdir()
    for name, options in (("samples", {"sample_steps": 1, "num_sample_images": 4}), ("unet", {})):
        (tmp_path / "run" / name).symlink_to(others)
        with pytest.raises(ValueError, match=f"run/{name}' must be a folder, it is a link"):
            run("base", tmp_path / "run", digits, overwrite_output_dir=True, **options).train()
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).write_text("mine")
        with pytest.raises(ValueError, match=f"run/{name}' must be a folder, it is a file"):
            run("base", tmp_path / "run", digits, overwrite_output_dir=True, **options).train()
        (tmp_path / "run" / name).unlink()
    assert tree(others) == {"weights.bin": b"mine"}
    run("base", tmp_path / "run", digits, overwrite_output_dir=True).train()
    for checkpoint in find_checkpoints(tmp_path / "run"):  # moved to another disk by hand
        checkpoint.rename(others / checkpoint.name)
        checkpoint.symlink_to(others / checkpoint.name)
    before = tree(others)
    options = {"checkpointing_steps": 0, "resume_from_checkpoint": str(tmp_path / "run/checkpoint-1")}
    run("base", tmp_path / "run", digits, **options).train()
    assert tree(others) == before


def test_13_output_dir_that_is_a_file(tmp_path, digits):
    (tmp_path / "file").write_text("mine")
    for options in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
        with pytest.raises((ValueError, FileExistsError)):
            run("base", tmp_path / "file", digits, **options).train()
    assert (tmp_path / "file").read_text() == "mine"


# --- 3. old weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False], ids=["this version", "version 0.1"])
def test_3_students_of_an_earlier_run_are_neither_published_nor_evaluated(ladder_folder, digits, listed):
    if not listed:
        (ladder_folder / MADE_FILE).unlink()
        for path in ladder_folder.glob(f"*-step/{CHECKSUMS_FILE}"):
            path.unlink()
    options = LADDER | {"max_train_steps": [1], "checkpointing_steps": 0, "overwrite_output_dir": True}
    stopped = run("ladder", ladder_folder, digits, **options)
    finish_stage = stopped.finish_stage

    def stop(stage):
        if stage.index == 1:
            raise KeyboardInterrupt
        finish_stage(stage)

    stopped.finish_stage = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped.published_folders() == [(ladder_folder / "2-step", "2-step"), (ladder_folder / "2-step", None)]
    assert (ladder_folder / "1-step/model_index.json").exists() != listed


# --- 5. parts handed on alike ---------------------------------------------------------------------------------------


def test_5_a_part_is_loaded_into_memory_of_its_own(tmp_path):
    """Kernels round by the alignment of their operands: what is mapped from a file lies anywhere."""
    tiny_classifier().save_pretrained(str(tmp_path / "classifier"))
    tiny_teacher().save_pretrained(str(tmp_path / "base"))
    classifier, base = (
        load_part(FeatureClassifier, tmp_path / "classifier"),
        load_part(RCFDPipeline, tmp_path / "base"),
    )
    for network in (classifier, base.unet):
        tensors = [*network.parameters(), *network.buffers()]
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.numel() > 0)
        assert not network.training


@pytest.mark.parametrize("kind", SOME)
def test_5_trainer_hands_on_what_its_file_holds(tmp_path, digits, kind, monkeypatch):
    """What `train` returns is read from the file, whether the run was stopped or not."""
    import diffusers_rcfd.trainers.parts as parts

    loaded, copy_weights = [], parts.copy_weights
    monkeypatch.setattr(parts, "copy_weights", lambda network: (copy_weights(network), loaded.append(network)))
    model = run(kind, tmp_path, digits, checkpointing_steps=0).train()
    assert getattr(model, "unet", model) in loaded
    again = run(kind, tmp_path, digits, checkpointing_steps=0, resume_from_checkpoint="latest").train()
    assert torch.equal(parameters(getattr(again, "unet", again)), parameters(getattr(model, "unet", model)))


# --- 7. damage ------------------------------------------------------------------------------------------------------


def test_7_flipped_bit_in_a_finished_part_is_not_built_on(ladder_folder, digits):
    flip_a_bit(ladder_folder / "2-step/unet/diffusion_pytorch_model.safetensors")
    first = str(ladder_folder / "checkpoint-2")  # between the two rungs
    again = run("ladder", ladder_folder, digits, **LADDER | {"resume_from_checkpoint": first})
    with pytest.raises(ValueError, match="2-step' is damaged: unet/diffusion_pytorch_model.safetensors is not"):
        again.train()


def test_7_verify_finds_one_flipped_bit_in_every_file_by_its_name(ladder_folder, finished):
    assert verify(ladder_folder) == []
    names = [name for name in tree(ladder_folder)]
    assert len(names) > 30
    for name in names:
        whole = (ladder_folder / name).read_bytes()
        for at in (0, 0.5, 0.999):
            flip_a_bit(ladder_folder / name, at)
            faults = verify(ladder_folder)
            assert any(
                Path(name).name in fault and str((ladder_folder / name).parent)[:20] in fault for fault in faults
            ), (name, at)
            (ladder_folder / name).write_bytes(whole)
    assert verify(ladder_folder) == []
    with pytest.raises(FileNotFoundError, match="`folder` must hold a run, a checkpoint or a saved model"):
        verify(ladder_folder / "samples")


def test_4_7_finished_part_is_known_by_what_made_it(tmp_path, digits):
    run("classifier", tmp_path, digits).train()
    assert find_part_fault(tmp_path, run("classifier", tmp_path, digits).made_by()) is None
    other = run("classifier", tmp_path, digits, label_smoothing=0.1).made_by()
    assert "its label_smoothing is 0.0, not 0.1" in find_part_fault(tmp_path, other)
    assert find_part_fault(tmp_path / "none", other) == "has no checkpoint"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert "is not finished: it has come to checkpoint-1" in find_part_fault(
        tmp_path, run("classifier", tmp_path, digits).made_by()
    )


def test_7_a_saved_model_lists_what_was_saved(tmp_path):
    tiny_classifier().save_pretrained(str(tmp_path))
    check_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not whole: config.json has 2 of"):
        check_model(tmp_path)
    tiny_classifier().save_pretrained(str(tmp_path))
    check_model(tmp_path)


# --- 10. results written whole --------------------------------------------------------------------------------------


def test_10_file_is_written_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "comparison.md", "old")
    with largest_file(100), pytest.raises(OSError):
        write_whole(tmp_path / "comparison.md", "new" * 100)
    assert (tmp_path / "comparison.md").read_text() == "old"
    write_whole(tmp_path / "comparison.md", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.md"]


def test_10_damaged_result_is_named(tmp_path):
    assert read_json(tmp_path / "comparison.json") is None
    (tmp_path / "comparison.json").write_text("[{")
    with pytest.warns(UserWarning, match="comparison.json' is damaged and not used: "):
        assert read_json(tmp_path / "comparison.json") is None


def test_10_damaged_line_of_metrics_is_named_and_left_out(tmp_path, digits):
    run("base", tmp_path, digits).train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(True)
    (tmp_path / "metrics.jsonl").write_text(lines[0].replace(":", "", 1) + lines[1])
    first = str(tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match='metrics.jsonl has a damaged line, which is left out: \'{"global_step" 1'):
        run("base", tmp_path, digits, resume_from_checkpoint=first).train()
    assert (tmp_path / "metrics.jsonl").read_text() == lines[1]


# --- 11. the moving average -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ramp, decays", [(False, [0.9, 0.9, 0.9]), (True, [0.0, 2 / 11, 3 / 12])])
def test_11_moving_average_closed_form(ramp, decays):
    """By d at each step: the average of weights that are w_1, w_2, ... after the steps."""
    from diffusers.training_utils import EMAModel

    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema, expected = EMAModel([weight], decay=0.9), 0.0
    for number, d in enumerate(decays, 1):
        weight.data.fill_(number)
        average_step(ema, [weight], True, ramp)
        expected = d * expected + (1 - d) * number
        assert ema.shadow_params[0].item() == pytest.approx(expected, rel=1e-12)


def test_11_ramp_is_an_option(tmp_path, digits):
    fast, slow = (run("base", tmp_path / str(ramp), digits, ema_decay=0.9999, ema_ramp=ramp).train()
                  for ramp in (True, False))  # fmt: skip
    first = parameters(run("base", tmp_path / "first", digits).unet)
    moved = [(parameters(pipe.unet) - first).abs().max() for pipe in (fast, slow)]
    assert moved[1] < 1e-2 * moved[0] and moved[1] > 0


def poison(trained):
    """The trainer, none of whose losses is finite."""
    compute_loss = trained.compute_loss

    def multiply(*args):
        terms = compute_loss(*args)
        return terms | {"loss": terms["loss"] * float("nan")}

    trained.compute_loss = multiply
    return trained


# --- 13. smaller ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME)
def test_13_run_whose_steps_are_all_skipped_is_an_error(tmp_path, digits, kind):
    poisoned = poison(run(kind, tmp_path, digits))  # of two steps, where ten in a row end it
    with pytest.raises(FloatingPointError, match="All steps had a loss or gradient that is not finite .* the end of"):
        poisoned.train()
    assert not list(tmp_path.rglob("model_index.json")) and not (tmp_path / "config.json").exists()
    poisoned = poison(run(kind, tmp_path, digits, resume_from_checkpoint="latest"))  # which goes on counting
    with pytest.raises(FloatingPointError, match="All steps"):
        poisoned.train()


@pytest.mark.parametrize("kind", CONFIGS)
def test_13_fp16_on_a_cpu_is_refused_by_name(tmp_path, digits, kind):
    with pytest.raises(ValueError, match="`mixed_precision` must be 'no' or 'bf16' on a CPU, got 'fp16'"):
        run(kind, tmp_path / "run", digits, mixed_precision="fp16")
    assert not (tmp_path / "run").exists()


def test_13_missing_student_is_named(ladder_folder, digits):
    shutil.rmtree(ladder_folder / "1-step")
    again = run("ladder", ladder_folder, digits, **LADDER | {"resume_from_checkpoint": "latest"})
    with pytest.raises(FileNotFoundError, match="1-step', which this run has saved, is missing"):
        again.train()
