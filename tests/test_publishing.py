"""Trainers that publish, over HTTP against the Hub of `tests/fake_hub.py`, and the cards they write."""

import json
import os
import shutil
import socket
import subprocess

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_rcfd import (
    CFDDistillationConfig,
    CFDDistillationTrainer,
    ClassifierConfig,
    ClassifierTrainer,
    DiffusionConfig,
    DiffusionTrainer,
    Evaluator,
    FeatureClassifier,
    RCFDPipeline,
    RCFDScheduler,
    SFDDistillationConfig,
    SFDDistillationTrainer,
    load_image_data,
)
from diffusers_rcfd.hub.model_card import BEGIN, END
from diffusers_rcfd.hub.publishing import EVAL_RESULTS, list_model_files, open_repository, publish_files, read_card
from tests.fake_hub import ClientError, ClientProcess, FakeHub
from tests.test_hub import image_folder
from tests.toys import tiny_classifier, tiny_teacher, tiny_unet

TRAINED = ("base", "classifier", "ladder", "sfd")


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with ClientProcess(hub.environment(tmp_path_factory.mktemp("home"))) as client:
        yield client


# --- what runs in the client's process -------------------------------------------------------------------------


def distil(folder, evaluate=False, **options):
    options = {"student_steps": [2, 1], "objective": ["cfd"], "max_train_steps": [1], "train_batch_size": 8} | options
    data = load_image_data(max_images=32)
    config = CFDDistillationConfig(output_dir=str(folder), push_to_hub=not evaluate, num_sample_images=4, **options)
    trainer = CFDDistillationTrainer(tiny_teacher(), tiny_classifier(), config, data)
    trainer.train()
    if evaluate:
        trainer.evaluate(Evaluator(tiny_classifier().eval(), data, name="tiny", cache_dir=False), num_images=16)
        trainer.push_to_hub()


def distil_sfd(folder, **options):
    """SFD-v, and its images by the card's call of plain Diffusers less those of the pipeline, from the Hub."""
    options |= {"student_steps": [1, 2], "max_train_steps": 1, "train_batch_size": 4, "num_sample_images": 4}
    config = SFDDistillationConfig(output_dir=str(folder), push_to_hub=True, report_to="tensorboard", sample_steps=1,
                                   checkpointing_steps=1, **options)  # fmt: skip
    SFDDistillationTrainer(tiny_teacher(), None, config).train()
    own = RCFDPipeline.from_pretrained(config.hub_model_id)
    stock = DiffusionPipeline.from_pretrained(config.hub_model_id)
    call = own.stock_call()
    stock.scheduler.init_noise_sigma = call["init_noise_sigma"]
    options = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    call = {"num_inference_steps": None, "timesteps": call["timesteps"], "class_labels": call["class_labels"]}
    theirs = stock(1, **call, **options).images
    options["generator"].manual_seed(0)
    return (own(1, 2, **options).images - theirs).abs().max().item()


def train_base(folder, **options):
    config = DiffusionConfig(output_dir=str(folder), push_to_hub=True, max_train_steps=1, train_batch_size=8,
                             num_sample_images=4, sample_inference_steps=2, **options)  # fmt: skip
    DiffusionTrainer(tiny_unet(), RCFDScheduler(), config, load_image_data(max_images=32)).train()


def train_classifier(folder, **options):
    config = ClassifierConfig(
        output_dir=str(folder), push_to_hub=True, max_train_steps=1, train_batch_size=8, **options
    )
    ClassifierTrainer(tiny_classifier(), config, load_image_data(max_images=32)).train()


def steps_of(repo_id, revision=None):
    return RCFDPipeline.from_pretrained(repo_id, revision=revision).scheduler.config.num_inference_steps


def without_token(function, *args, **options):
    token = os.environ.pop("HF_TOKEN")
    try:
        return function(*args, **options)
    finally:
        os.environ["HF_TOKEN"] = token


def train_in(folder, data, user, host):
    """Each trainer, with all that may keep a path: local images and teachers, records, checkpoints, best weights."""
    os.environ |= {"USER": user, "LOGNAME": user}
    socket.gethostname = lambda: host  # in this process alone
    data = load_image_data(str(data))
    evaluator = Evaluator(tiny_classifier().eval(), data, name="tiny", metrics=["fd"], cache_dir=False)
    options = {"max_train_steps": 1, "train_batch_size": 8, "num_sample_images": 4, "push_to_hub": True}
    best = options | {"eval_steps": 1, "eval_num_images": 8, "load_best_model_at_end": True}

    def place(name):
        return {"output_dir": str(folder / name), "hub_model_id": f"anna/odd-{name}"}

    config = DiffusionConfig(**best, **place("base"), sample_inference_steps=2, sample_steps=1,
                             report_to="tensorboard")  # fmt: skip
    DiffusionTrainer(tiny_unet(), RCFDScheduler(), config, data, evaluator=evaluator).train()
    ClassifierTrainer(tiny_classifier(2), ClassifierConfig(**options, **place("classifier")), data).train()
    teacher = RCFDPipeline.from_pretrained(folder / "base")
    classifier = FeatureClassifier.from_pretrained(folder / "classifier")
    ladder = options | {"student_steps": [1], "objective": ["cfd"], "max_train_steps": [2], "checkpointing_steps": 1}
    config = CFDDistillationConfig(**ladder, **place("ladder"), hub_strategy="checkpoint")
    CFDDistillationTrainer(teacher, classifier, config, data).train()
    config = SFDDistillationConfig(student_steps=[2], objective="cfd", **best, **place("sfd"))
    SFDDistillationTrainer(teacher, classifier, config, evaluator=evaluator).train()
    RCFDPipeline.from_pretrained(folder / "ladder/1-step").push_to_hub("anna/odd-pushed")
    (folder / "diary.txt").write_text("mine")
    teacher.save_pretrained(folder, push_to_hub=True, repo_id="anna/odd-saved")


# ---------------------------------------------------------------------------------------------------------------


def test_every_rung_is_a_revision_and_main_holds_the_last(hub, client, tmp_path):
    client(distil, tmp_path / "run", hub_model_id="anna/ladder", evaluate=True)
    assert [client(steps_of, "anna/ladder", revision) for revision in ("2-step", "1-step", None)] == [2, 1, 1]
    files = hub.files("anna/ladder")
    assert {"README.md", "samples.png", "model_index.json", "pipeline.py"} <= files.keys()
    assert not any(name.startswith(("checkpoint", "samples/", "logs", "2-step")) for name in files)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.eval_results[0].metric_type == "fd-tiny" and "FD(tiny)" in card.text


@pytest.mark.parametrize("strategy, branches", [
    ("end", {"main", "2-step", "1-step"}), ("every_rung", {"main", "2-step", "1-step"}),
    ("checkpoint", {"main", "2-step", "1-step", "checkpoint"}),
])  # fmt: skip
def test_strategies(hub, client, tmp_path, strategy, branches):
    name = f"anna/{strategy.replace('_', '-')}"
    client(distil, tmp_path / "run", hub_model_id=name, hub_strategy=strategy, checkpointing_steps=1)
    assert {branch for branch in branches if hub.files(name, branch)} == branches
    if strategy == "checkpoint":
        assert "trainer_state.json" in hub.files(name, "checkpoint")


def test_student_of_sfd(hub, client, tmp_path):
    assert client(distil_sfd, tmp_path / "run", hub_model_id="anna/sfd") < 1e-4
    files = hub.files("anna/sfd")
    assert {"README.md", "samples.png", "model_index.json", "pipeline.py"} <= files.keys()
    local = ("checkpoint-1/", "samples/", "logs/")
    assert all((tmp_path / "run" / name).is_dir() for name in local)
    assert not any(name.startswith(local) for name in files)
    card = ModelCard(files["README.md"].decode())
    assert "**1, 2 network evaluations** by SFD" in card.text and "sfd" in card.data.tags


def test_base_model_and_classifier(hub, client, tmp_path):
    client(train_base, tmp_path / "base", hub_model_id="anna/base", hub_private_repo=True)
    client(train_classifier, tmp_path / "classifier", hub_model_id="anna/classifier")
    assert client(steps_of, "anna/base") is None
    assert "num_inference_steps=64" in hub.files("anna/base")["README.md"].decode()
    files = hub.files("anna/classifier")
    assert {"config.json", "diffusion_pytorch_model.safetensors", "README.md"} <= files.keys()
    assert "Accuracy on held-out images" in files["README.md"].decode()


def test_main_job_publishes_base_model_classifier_and_students(hub, tmp_path):
    """Each in a repository of its own, linked by the students' card; a wrong name is found before any training."""
    from tests.test_examples import SMALL, command

    line = command("distill_rcfd.py", *SMALL, "--output_dir", tmp_path / "job", "--student_steps", 2, 1,
                   "--teacher_steps", 2, 2, "--objective", "pd", "cfd", "--compare_with_pd", "False",
                   "--base_push_to_hub", "--classifier_push_to_hub", "--push_to_hub")  # fmt: skip
    environment = hub.environment(tmp_path / "home")
    wrong = [*line, "--classifier_hub_model_id", "anna/not allowed"]
    failed = subprocess.run(wrong, env=environment, capture_output=True, text=True)
    assert "`hub_model_id` must be a name the Hub allows, got 'anna/not allowed'" in failed.stderr
    assert not (tmp_path / "job").exists()
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model_index.json" in hub.files("anna/job-base") and "config.json" in hub.files("anna/job-classifier")
    assert hub.files("anna/job").keys() == hub.files("anna/job", "1-step").keys()
    assert ModelCard(hub.files("anna/job")["README.md"].decode()).data.base_model == "anna/job-base"
    assert ("model", "anna/job-evaluator") not in hub.repos


def test_second_push_keeps_what_a_person_wrote(hub, client, tmp_path):
    client(distil, tmp_path / "one", hub_model_id="anna/edited")
    repo_card = hub.files("anna/edited")["README.md"].decode()
    edited = repo_card.replace("# edited", "# My digits\n\nHand-made words.").replace(
        "license: apache-2.0", "license: mit"
    )
    client(upload_card, "anna/edited", edited)
    client(distil, tmp_path / "two", hub_model_id="anna/edited", learning_rate=0.00123)
    card = hub.files("anna/edited")["README.md"].decode()
    assert "Hand-made words." in card and "license: mit" in card and "0.00123" in card
    assert card.count(BEGIN) == card.count(END) == 1


def upload_card(repo_id, text):
    ModelCard(text).push_to_hub(repo_id)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hub_token": "hf_wrong"}, "ValueError: `hub_token` must be a valid token with write access"),
        ({"hub_token": "hf_anna_too_late"}, "ValueError: `hub_token` must be a valid token with write access"),
        ({"hub_model_id": "anna/not allowed"}, "ValueError: `hub_model_id` must be a name the Hub allows"),
        (
            {"hub_model_id": "anna/text-model"},
            "ValueError: `hub_model_id` 'anna/text-model' holds files of another kind",
        ),
    ],
)
def test_wrong_access_is_found_before_training(hub, client, tmp_path, options, message):
    if ("model", "anna/text-model") not in hub.repos:
        hub.add_repo("anna/text-model", {"tokenizer.json": b"{}"})
    with pytest.raises(ClientError, match=message):
        client(distil, tmp_path / "run", **({"hub_model_id": "anna/wrong"} | options))
    assert not (tmp_path / "run/2-step").exists()


def test_no_token(client):
    with pytest.raises(ClientError, match="ValueError: `hub_token`"):
        client(without_token, open_repository, "anna/no-token")


def test_cut_upload_publishes_nothing_and_says_where_the_model_is(hub, client, tmp_path):
    client(distil, tmp_path / "one", hub_model_id="anna/cut")
    before = hub.files("anna/cut")
    hub.cut("POST", 50)
    try:
        with pytest.raises(ClientError, match="ConnectionError: Publishing .* nothing of it was published"):
            client(distil, tmp_path / "two", hub_model_id="anna/cut", seed=1, learning_rate=0.01)
    finally:
        hub.cuts.clear()
    assert hub.files("anna/cut") == before and (tmp_path / "two/1-step/model_index.json").is_file()


def test_nothing_published_names_a_place_a_user_or_a_host(hub, client, tmp_path):
    user, host = "quinquagesima", "halcyon-node-7"
    folder, data = tmp_path / user / "zephyr-42", tmp_path / user / "gargoyle pictures"
    for path, content in image_folder(rows=20).items():
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_bytes(content)
    folder.mkdir(parents=True)
    client(train_in, folder, data, user, host)
    published = [
        (name, path, content)
        for (_, name), repo in hub.repos.items()
        if name.startswith("anna/odd-")
        for files in repo.commits.values()
        for path, content in files.items()
    ]
    assert {name for name, _, _ in published} == {f"anna/odd-{name}" for name in (*TRAINED, "pushed", "saved")}
    words = [word.encode() for word in (user, host, folder.name, data.name, str(tmp_path), tmp_path.name)]
    assert not [(name, path, word) for name, path, content in published for word in words if word in content]
    assert not [path for _, path, _ in published if "tfevents" in path or path == "diary.txt"]
    record = json.loads(hub.files("anna/odd-base")["run.json"])["config"]
    assert "output_dir" not in record and record["hub_model_id"] == "anna/odd-base"
    state = hub.files("anna/odd-ladder", "checkpoint")["trainer_state.json"]
    assert state == (folder / "ladder/checkpoint-2/trainer_state.json").read_bytes()  # its checksum holds


def test_only_what_was_saved_is_published(tmp_path):
    """By the index of the pipeline; neither other files, nor an old student's folder, nor what lies behind a link."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/diary.txt").write_text("mine")
    (tmp_path / "elsewhere/config.json").write_text("{}")
    folder = tmp_path / "run"
    tiny_teacher(2).save_pretrained(folder)
    tiny_teacher(4).save_pretrained(folder / "4-step")
    saved = ["model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json",
             "unet/diffusion_pytorch_model.safetensors"]  # fmt: skip
    for name in ("notes.txt", "unet/notes.txt", "checkpoint-1/model.safetensors", "logs/events", "samples/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    assert sorted(list_model_files(folder)) == saved
    (folder / "README.md").write_text("words")
    (folder / "run.json").write_text("{}")
    (folder / "samples.png").symlink_to(tmp_path / "elsewhere/diary.txt")
    assert sorted(list_model_files(folder)) == sorted([*saved, "README.md", "run.json"])
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    assert "unet/config.json" not in list_model_files(folder)
    tiny_classifier().save_pretrained(tmp_path / "classifier")
    (tmp_path / "classifier/other.json").write_text("{}")
    assert list_model_files(tmp_path / "classifier") == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_results_of_an_earlier_run_leave_the_repository(hub, client, tmp_path):
    hub.add_repo("anna/again", {name: b"old" for name in (EVAL_RESULTS, "evaluation.json", "run.json", "notes.txt")})
    (tmp_path / "run.json").write_text("{}")
    client(publish_files, tmp_path, ["run.json"], "anna/again")
    assert hub.files("anna/again") == {"run.json": b"{}", "notes.txt": b"old"}


def test_card_that_cannot_be_reached_is_not_taken_for_missing(hub, client):
    hub.add_repo("anna/reached", {"README.md": b"Hand-made words.", "config.json": b"{}"})
    assert client(read_card, "anna/reached") == "Hand-made words."
    hub.add_repo("anna/bare", {"config.json": b"{}"})
    assert client(read_card, "anna/bare") is None and client(read_card, "anna/bare", None, "no-branch") is None
    with pytest.raises(ConnectionError, match="The Hub cannot be reached for the card of 'anna/reached'"):
        read_card("anna/reached")  # the test's own process is offline


def test_token_is_written_nowhere(hub, client, tmp_path):
    token = next(iter(hub.tokens))
    client(distil, tmp_path / "run", hub_model_id="anna/secret", hub_token=token, hub_strategy="checkpoint",
           checkpointing_steps=1, report_to="tensorboard")  # fmt: skip
    assert hub.files("anna/secret")
    config = CFDDistillationConfig(hub_token=token)
    assert token not in repr(config)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


def test_evaluation_is_recorded(tmp_path):
    distil_options = {"student_steps": [1], "objective": ["pd"], "max_train_steps": [1], "train_batch_size": 8}
    data = load_image_data(max_images=32)
    torch.manual_seed(0)
    trainer = CFDDistillationTrainer(
        tiny_teacher(), None, CFDDistillationConfig(output_dir=str(tmp_path / "run"), **distil_options), data
    )
    trainer.train()
    results = trainer.evaluate(Evaluator(tiny_classifier().eval(), data, name="tiny", cache_dir=False), num_images=16)
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["1"] == results[1]
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["FD(tiny)"] == results[1]["metrics"]["fd"]["value"]
