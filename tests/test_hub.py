"""Publishing and loading over HTTP, with the real clients against the Hub of `tests/fake_hub.py`."""

import json
import os
import resource
import subprocess
import sys
import textwrap
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from diffusers_rcfd import FeatureClassifier, RCFDPipeline, RCFDScheduler
from diffusers_rcfd.data.image_data import DIGITS_PATH, load_image_data
from diffusers_rcfd.hub.model_card import BEGIN
from diffusers_rcfd.models.feature_classifier import load_feature_classifier
from tests.fake_hub import ClientError, ClientProcess, FakeHub
from tests.toys import tiny_classifier, tiny_teacher

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINE_FILES = {"model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS,
                  "checksums.json"}  # fmt: skip
RGB = (2 * 3 * 32 * 32, (2, 3, 32, 32))  # how many pixels, of which shape
STOCK_CALL = {"num_inference_steps": 4, "use_clipped_model_output": True}


@pytest.fixture(scope="module")
def server():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    """A process that was started with HF_ENDPOINT and HF_TOKEN; call it with one of the functions below."""
    with ClientProcess(server.environment(tmp_path_factory.mktemp("home"))) as client:
        yield client


@pytest.fixture
def hub(server):
    server.cuts.clear()
    server.requests.clear()
    server.page_size = 1000
    yield server
    server.cuts.clear()


# --- what runs in the client's process -------------------------------------------------------------------------


def images(pipeline, **call):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="np", **call).images


def push(repo_id, steps=4, **options):
    tiny_teacher(steps).push_to_hub(repo_id, **options)


def save(folder, steps=4, **options):
    tiny_teacher(steps).save_pretrained(folder, **options)


def load(repo_id, **options):
    """Images of what `RCFDPipeline` loads."""
    pipeline = RCFDPipeline.from_pretrained(repo_id, **options)
    assert isinstance(pipeline.scheduler, RCFDScheduler)
    return images(pipeline)


def load_stock(repo_id, call, **options):
    """Images, and the class that `DiffusionPipeline` chose."""
    pipeline = DiffusionPipeline.from_pretrained(repo_id, **options)
    return images(pipeline, **call), type(pipeline).__module__ + "." + type(pipeline).__name__


def on_a_full_disk(function, *args, room, **options):
    """Call a function while no file can grow beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        return function(*args, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_classifier(folder, **options):
    tiny_classifier().save_pretrained(folder, **options)


def push_classifier(repo_id, **options):
    torch.manual_seed(0)
    tiny_classifier().push_to_hub(repo_id, **options)


def classify(repo_id, load=load_feature_classifier, images=(128, (2, 1, 8, 8)), **options):
    classifier = load(repo_id, **options)
    assert not classifier.training
    return classifier(torch.linspace(-1, 1, images[0]).reshape(images[1])).logits.detach().numpy()


def load_classifier(repo_id, **options):
    return classify(repo_id, FeatureClassifier.from_pretrained, **options)


def read_images(dataset, **options):
    data = load_image_data(dataset, **options)
    rows = list(data) if options.get("streaming") else [data[row] for row in range(len(data))]
    return np.stack([row["images"] for row in rows]), [int(row["labels"]) for row in rows], data.class_names


def call_api(method, *args, **kwargs):
    getattr(HfApi(), method)(*args, **kwargs)


def tokenless(function, *args, **kwargs):
    token = os.environ.pop("HF_TOKEN")
    try:
        return function(*args, **kwargs)
    finally:
        os.environ["HF_TOKEN"] = token


def cached_files(repo_id):
    """The files of a repository's snapshots in the client's cache."""
    folder = Path(os.environ["HF_HOME"], "hub", "models--" + repo_id.replace("/", "--"))
    snapshots = {path.relative_to(folder).parts[2:] for path in folder.glob("snapshots/*/**/*") if path.is_file()}
    return {"/".join(parts) for parts in snapshots}


# --- publishing ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected():
    """Images of the pipeline that `push` publishes, by its number of steps."""
    return {steps: images(tiny_teacher(steps)) for steps in (2, 4)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a saved pipeline, as a repository holds them."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push_to_hub_publishes_what_is_saved(hub, client, files):
    client(push, "pushed", commit_message="Four steps")  # among the repositories of the token's owner
    published = hub.files("anna/pushed")
    assert {path: published[path] for path in files} == files and files.keys() == PIPELINE_FILES
    assert published.keys() - files.keys() == {"README.md", "samples.png"}
    repo = hub.repos["model", "anna/pushed"]
    assert [title for _, title in repo.history] == ["initial commit", "Four steps"] and not repo.private
    assert sum(method == "PUT" for method, _, _ in hub.requests) == 2  # weights and picture, alone, went into LFS
    client(push, "anna/pushed")
    assert len(repo.history) == 2, "what has not changed was committed again"


def test_card_is_ours_and_keeps_what_a_person_wrote(hub, client):
    client(push, "anna/carded")
    card = ModelCard(hub.files("anna/carded")["README.md"].decode())
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "unconditional-image-generation"
    assert "distilled to **4 steps**" in card.text and 'from_pretrained("anna/carded")' in card.text
    assert card.data.get("license") is None and "## Training" not in card.text and card.text.count(BEGIN) == 1
    client(call_api, "upload_file", path_or_fileobj=card.content.replace("# carded", "# My digits").encode(),
           path_in_repo="README.md", repo_id="anna/carded")  # fmt: skip
    client(push, "anna/carded", steps=2)
    text = hub.files("anna/carded")["README.md"].decode()
    assert "# My digits" in text and "distilled to **2 steps**" in text and text.count(BEGIN) == 1


@pytest.mark.parametrize("publish", [push, push_classifier])
def test_pickled_weights_are_not_published(hub, client, publish):
    with pytest.raises(ClientError, match="ValueError: `safe_serialization` must be True"):
        client(publish, "anna/unsafe", safe_serialization=False)
    assert ("model", "anna/unsafe") not in hub.repos


@pytest.mark.parametrize("room", [1000, 50_000])
@pytest.mark.parametrize("write", [save, save_classifier])
def test_full_disk_leaves_nothing_half_written_and_publishes_nothing(hub, client, tmp_path, write, room):
    """Already the first file does not fit, or the weights do not."""
    with pytest.raises(ClientError, match=f"OSError: Saving in .*{tmp_path.name}/new.* failed.*File too large"):
        client(on_a_full_disk, write, tmp_path / "new/student", room=room, push_to_hub=True, repo_id="anna/full")
    assert not (tmp_path / "new").exists() and ("model", "anna/full") not in hub.repos
    client(write, tmp_path / "old")
    before = contents(tmp_path / "old")
    with pytest.raises(ClientError, match="OSError: Saving in"):
        client(on_a_full_disk, write, tmp_path / "old", room=room)
    assert contents(tmp_path / "old") == before


def contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_save_pretrained_publishes_and_keeps_the_folder(hub, client, files, tmp_path):
    client(save, tmp_path / "student", push_to_hub=True, repo_id="anna/saved", private=True)
    published = hub.files("anna/saved")
    assert {path: published[path] for path in files} == files and hub.repos["model", "anna/saved"].private
    local = {path.relative_to(tmp_path / "student").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert local == published.keys()


def test_pull_request_leaves_main_alone(hub, client):
    client(push, "anna/reviewed")
    client(push, "anna/reviewed", steps=2, create_pr=True)
    offsets = {
        revision: json.loads(hub.files("anna/reviewed", revision)["scheduler/scheduler_config.json"])["steps_offset"]
        for revision in ("main", "refs/pr/1")
    }
    assert offsets == {"main": 256, "refs/pr/1": 512}


def test_classifier_is_published_and_loaded_by_both_loaders(hub, client):
    client(push_classifier, "anna/classifier")
    published = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "checksums.json"}
    assert hub.files("anna/classifier").keys() == published
    torch.manual_seed(0)
    logits = tiny_classifier().eval()(torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)).logits.detach().numpy()
    for function in (classify, load_classifier):
        np.testing.assert_allclose(client(function, "anna/classifier"), logits, atol=1e-5)


def test_classifier_by_revision_and_token(hub, client, tmp_path):
    token = "hf_anna_may_write"
    client(push_classifier, "anna/graded", private=True)
    client(call_api, "create_branch", "anna/graded", branch="better")
    client(save_classifier, tmp_path)
    client(call_api, "upload_folder", repo_id="anna/graded", folder_path=tmp_path, revision="better")
    for function in (classify, load_classifier):
        main, better = (client(function, "anna/graded", revision=revision) for revision in ("main", "better"))
        assert np.abs(main - better).max() > 1e-3
        given = client(tokenless, function, "anna/graded", revision="better", token=token)
        np.testing.assert_allclose(given, better, atol=1e-6)
    with pytest.raises(ClientError, match="ValueError: `revision` 'worse' of 'anna/graded' is not on the Hub"):
        client(classify, "anna/graded", revision="worse")
    hub.add_repo("anna/ungraded", hub.files("anna/graded"), private=True)
    with pytest.raises(ClientError, match="ValueError: No classifier 'anna/ungraded'"):
        client(classify, "anna/ungraded", token="hf_bob_may_write")


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_timm_repository_by_revision_and_token(hub, client, tmp_path, prefix):
    """timm itself takes no token; and of a repository without safetensors nothing is read."""
    client(save_timm, tmp_path / "safe", safe_serialization=True)
    name = f"anna/timm{len(prefix)}"
    hub.add_repo(name, {path.name: path.read_bytes() for path in (tmp_path / "safe").iterdir()}, private=True)
    logits = client(tokenless, classify, prefix + name, token="hf_anna_may_write", revision="main", images=RGB)
    np.testing.assert_allclose(logits, client(classify, str(tmp_path / "safe"), images=RGB), atol=1e-6)
    client(save_timm, tmp_path / "pickled", safe_serialization=False)
    pickled = {path.name: path.read_bytes() for path in (tmp_path / "pickled").iterdir()}
    assert "pytorch_model.bin" in pickled
    hub.add_repo(f"{name}-pickled", pickled)
    with pytest.raises(ClientError, match=f"ValueError: '.*{name}-pickled' must hold model.safetensors"):
        client(classify, f"{prefix}{name}-pickled", images=RGB)


def save_timm(folder, **options):
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=5), str(folder), **options)


def test_token_reaches_no_file_and_no_log(hub, tmp_path):
    token = "hf_anna_may_write"
    hub.lfs.clear()  # so that there is something to upload
    script = f"""
        import os
        from tests.test_hub import *
        push("anna/quiet", private=True)
        save({str(tmp_path / "student")!r}, push_to_hub=True, repo_id="anna/quiet-too", token={token!r})
        push_classifier("anna/quiet-classifier", token={token!r})
        load("anna/quiet")
        print("all done")
    """
    environment = hub.environment(tmp_path / "home", token)
    environment |= {f"{library}_VERBOSITY": "debug" for library in ("HF_HUB", "DIFFUSERS", "DATASETS")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert "all done" in run.stdout, run.stderr
    with_token = {path for _, path, headers in hub.requests if headers.get("authorization") == f"Bearer {token}"}
    assert "/api/repos/create" in with_token
    storage = {path for _, path, _ in hub.requests if path.startswith(("/cdn/", "/lfs/")) and "verify" not in path}
    assert len(storage) >= 3 and not storage & with_token
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in written)
    assert not [path for path in written if token.encode() in path.read_bytes()]
    assert token not in run.stdout + run.stderr and len(run.stderr) > 1000
    for repo_id in ("anna/quiet", "anna/quiet-too", "anna/quiet-classifier"):
        assert not [path for path, content in hub.files(repo_id).items() if token.encode() in content]


def lowered(requests):
    return [
        (method, path, {key.lower(): value for key, value in headers.items()}) for method, path, headers in requests
    ]


# --- who may ---------------------------------------------------------------------------------------------------


def test_private_repository_opens_to_its_owner_alone(hub, client, files, expected):
    hub.add_repo("anna/private", files, private=True)
    np.testing.assert_allclose(client(load, "anna/private"), expected[4], atol=1e-6)
    hub.add_repo("anna/locked", files, private=True)
    for options in ({"token": "hf_bob_may_write"}, {"token": False}):
        with pytest.raises(
            ClientError,
            match="(?s)Cannot load 'anna/locked' from the Hub: 40.*make sure you are authen",
        ):
            client(load, "anna/locked", **options)
    assert client(cached_files, "anna/locked") == set()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"token": "hf_anna_too_late"}, "401.*User Access Token is expired"),
        ({"token": "hf_nobody"}, "401.*Invalid credentials in Authorization header"),
        ({"token": "hf_anna_may_read"}, "403 Forbidden: You don't have the rights.*correct permissions"),
        ({"token": "hf_bob_may_write"}, '403 Forbidden: You don\'t have the rights.*namespace "anna"'),
        ({"repo_id": "anna/st udent"}, "HFValidationError: Repo id must use alphanumeric chars"),
        ({"repo_id": "anna/our/student"}, "HFValidationError: Repo id must be in the form"),
        ({"repo_id": "anna/student.git"}, "HFValidationError: Repo_id cannot end by '.git'"),
        ({"repo_id": "bob/student"}, '403 Forbidden: You don\'t have the rights.*namespace "bob"'),
    ],
)
@pytest.mark.parametrize("publish", [push, push_classifier])
def test_refused_publishing_publishes_nothing(hub, client, publish, options, message):
    before = set(hub.repos)
    with pytest.raises(ClientError, match=f"(?s){message}") as error:
        client(publish, **{"repo_id": "anna/refused", **options})
    assert set(hub.repos) == before
    assert str(options.get("token")) not in str(error.value)


def test_publishing_without_a_token(hub, client):
    with pytest.raises(ClientError, match=r"(?s)401.*Invalid username or password"):
        client(tokenless, push, "anna/tokenless")
    assert ("model", "anna/tokenless") not in hub.repos


def test_repository_that_exists(hub, client, files):
    """Pushing adds a commit; another's repository, or one of another kind, is not touched."""
    hub.add_repo("anna/exists", {"notes.txt": b"mine"})
    client(push, "anna/exists")
    assert hub.files("anna/exists")["notes.txt"] == b"mine" and files.keys() < hub.files("anna/exists").keys()
    theirs = hub.add_repo("bob/exists", files)
    with pytest.raises(ClientError, match="403"):
        client(push, "bob/exists", steps=2)
    assert len(theirs.history) == 2
    data = hub.add_repo("anna/pixels", {"a.txt": b""}, kind="dataset")
    client(push, "anna/pixels")
    assert len(data.history) == 2 and files.keys() < hub.files("anna/pixels").keys()


@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_cut_connection_publishes_nothing_by_half(hub, client, files, expected, method, tmp_path):
    name = f"anna/cut-{method.lower()}"
    client(push, name, steps=2)
    head, history = hub.files(name), len(hub.repos["model", name].history)
    hub.cut(method, 500)
    hub.lfs.clear()
    with pytest.raises(ClientError):
        client(save, tmp_path / "student", push_to_hub=True, repo_id=name)
    assert hub.files(name) == head and len(hub.repos["model", name].history) == history
    np.testing.assert_allclose(images(RCFDPipeline.from_pretrained(tmp_path / "student")), expected[4], atol=1e-6)
    hub.cut(method, None)
    client(push, name)
    assert {path: hub.files(name)[path] for path in files} == files


# --- loading ---------------------------------------------------------------------------------------------------


def test_four_load_forms_give_equal_images(hub, client, files, expected, tmp_path):
    """With this package: from a folder and over HTTP; each with its own class, the stock one and the carried code."""
    hub.add_repo("anna/forms", files)
    client(save, tmp_path)
    for place in ("anna/forms", str(tmp_path)):
        np.testing.assert_allclose(client(load, place), expected[4], atol=1e-4)
        stock, name = client(load_stock, place, STOCK_CALL)
        assert name == "diffusers.pipelines.ddim.pipeline_ddim.DDIMPipeline"
        np.testing.assert_allclose(stock, expected[4], atol=1e-4)
        custom, name = client(load_stock, place, {}, custom_pipeline=place, trust_remote_code=True)
        assert name.startswith("diffusers_modules.") and name.endswith(".RCFDPipeline")
        np.testing.assert_allclose(custom, expected[4], atol=1e-4)


def test_load_forms_without_this_package(hub, files, expected, tmp_path):
    hub.add_repo("anna/plain", files)
    save(tmp_path / "student")
    np.save(tmp_path / "expected.npy", expected[4])
    script = f"""
        import sys
        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "diffusers_rcfd":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Hide())
        try:
            import diffusers_rcfd
            sys.exit("the package is not hidden")
        except ModuleNotFoundError:
            pass
        import numpy as np, torch
        from diffusers import DiffusionPipeline
        expected = np.load("expected.npy")
        for place in ("anna/plain", {str(tmp_path / "student")!r}):
            for options, call in (
                (dict(), dict(num_inference_steps=4, use_clipped_model_output=True)),
                (dict(custom_pipeline=place, trust_remote_code=True), dict()),
            ):
                pipe = DiffusionPipeline.from_pretrained(place, **options)
                generator = torch.Generator().manual_seed(0)
                images = pipe(batch_size=3, generator=generator, output_type="np", **call).images
                np.testing.assert_allclose(images, expected, atol=1e-4)
        print("all equal")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "all equal" in run.stdout, run.stderr
    assert "not expected" not in run.stderr
    assert any("/anna/plain/resolve/" in path for _, path, _ in hub.requests)


def test_revisions(hub, client, expected, tmp_path):
    client(push, "anna/steps")
    first = hub.repos["model", "anna/steps"].branches["main"]
    client(call_api, "create_branch", "anna/steps", branch="2-step")
    client(call_api, "create_tag", "anna/steps", tag="v4")
    client(save, tmp_path, steps=2)
    client(call_api, "upload_folder", repo_id="anna/steps", folder_path=tmp_path, revision="2-step")
    for revision, steps in (("2-step", 2), ("main", 4), (None, 4), ("v4", 4), (first, 4)):
        np.testing.assert_allclose(client(load, "anna/steps", revision=revision), expected[steps], atol=1e-6)
    with pytest.raises(ClientError, match="(?s)Cannot load 'anna/steps' from the Hub: 404.*Invalid rev id: 1-step"):
        client(load, "anna/steps", revision="1-step")


def test_remote_code_runs_only_with_trust(hub, client, files):
    """Diffusers' own refusal; and neither our class nor the stock one runs the code that a repository carries."""
    hub.add_repo("anna/code", {**files, "pipeline.py": b"raise SystemError('the code of the repository ran')"})
    with pytest.raises(
        ClientError, match=r"(?s)ValueError: .*anna/code.*contains custom code.*trust_remote_code=True"
    ):
        client(load_stock, "anna/code", {}, custom_pipeline="anna/code")
    client(load, "anna/code")
    client(load_stock, "anna/code", STOCK_CALL)
    with pytest.raises(ClientError, match="the code of the repository ran"):
        client(load_stock, "anna/code", {}, custom_pipeline="anna/code", trust_remote_code=True)


def text_to_image(files):
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
    )
    index = json.loads(files["model_index.json"]) | {"_class_name": "StableDiffusionPipeline"}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    described = {"model_index.json": json.dumps(index).encode(), "unet/config.json": unet.to_json_string().encode()}
    return {**files, **described, WEIGHTS: safetensors.torch.save(unet.state_dict())}


def without_unet(files):
    index = json.loads(files["model_index.json"]) | {"_class_name": "DiTPipeline"}
    index["transformer"] = ["diffusers", "DiTTransformer2DModel"]
    del index["unet"]
    moved = {path.replace("unet/", "transformer/"): content for path, content in files.items()}
    return {**moved, "model_index.json": json.dumps(index).encode()}


def latent(files):
    index = json.loads(files["model_index.json"]) | {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    return {**files, "model_index.json": json.dumps(index).encode()}


def pickled(files):
    buffer = BytesIO()
    torch.save(tiny_teacher(4).unet.state_dict(), buffer)
    others = {path: content for path, content in files.items() if path != WEIGHTS}
    return {**others, "unet/diffusion_pytorch_model.bin": buffer.getvalue()}


def without(path):
    return lambda files: {other: content for other, content in files.items() if other != path}


NO_WEIGHTS = "diffusion_pytorch_model.safetensors found|not find the necessary `safetensors` weights"
BAD_MODELS = {
    "missing": (without(WEIGHTS), NO_WEIGHTS),
    "truncated": (lambda files: {**files, WEIGHTS: files[WEIGHTS][:5000]}, f"Unable to load weights.*{WEIGHTS}"),
    "empty": (lambda files: {**files, WEIGHTS: b""}, f"Unable to load weights.*{WEIGHTS}"),
    "pickled": (pickled, NO_WEIGHTS),
    "text-to-image": (text_to_image, "TypeError: `unet` must be a UNet2DModel, got UNet2DConditionModel"),
    "transformer": (without_unet, "ValueError: .*RCFDPipeline.*expected .*unet.* but only"),
    "latent": (latent, "ValueError: .*must be a pipeline of a unet and a scheduler.*LDMPipeline and has also: vqvae"),
    "no-index": (without("model_index.json"), "model_index.json"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_is_refused_from_folder_and_hub(hub, client, files, name, tmp_path):
    spoil, message = BAD_MODELS[name]
    spoilt = spoil(files)
    hub.add_repo(f"anna/{name}", spoilt)
    for path, content in spoilt.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    for place in (f"anna/{name}", str(tmp_path)):
        with pytest.raises(ClientError, match=message):
            client(load, place)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == spoilt.keys()


def test_truncated_classifier_is_refused(hub, client, tmp_path):
    client(save_classifier, tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    hub.add_repo("anna/short", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    for place in ("anna/short", str(tmp_path)):
        with pytest.raises(ClientError, match="Unable to load weights.*diffusion_pytorch_model.safetensors"):
            client(classify, place)


def test_pickled_classifier_is_refused(hub, client):
    buffer = BytesIO()
    classifier = tiny_classifier()
    torch.save(classifier.state_dict(), buffer)
    config = classifier.to_json_string().encode()
    hub.add_repo("anna/pickle", {"config.json": config, "diffusion_pytorch_model.bin": buffer.getvalue()})
    for function in (classify, load_classifier):
        with pytest.raises(ClientError, match="diffusion_pytorch_model.safetensors"):
            client(function, "anna/pickle")


def test_cut_download_leaves_no_broken_snapshot(hub, client, files, expected):
    hub.add_repo("anna/broken-line", files)
    hub.cut("GET", 2000)
    with pytest.raises(ClientError):
        client(load, "anna/broken-line")
    assert WEIGHTS not in client(cached_files, "anna/broken-line")
    hub.cut("GET", None)
    np.testing.assert_allclose(client(load, "anna/broken-line"), expected[4], atol=1e-6)
    assert WEIGHTS in client(cached_files, "anna/broken-line")


def test_name_of_no_folder_and_no_repository(client):
    with pytest.raises(
        ClientError, match='ValueError: .*"./no/such/folder" is neither a valid local path nor a valid repo id'
    ):
        client(load, "./no/such/folder")


@pytest.mark.parametrize("function", [load, load_classifier])
def test_unsafe_loading_is_refused(client, function):
    with pytest.raises(ClientError, match="ValueError: `use_safetensors` must be True"):
        client(function, "anna/any", use_safetensors=False)


def test_repository_of_another_kind_or_of_none(hub, client, files):
    hub.add_repo("anna/images", {"data.txt": b"1"}, kind="dataset")
    for name in ("anna/nothing", "anna/images"):
        with pytest.raises(ClientError, match=f"(?s)Cannot load '{name}' from the Hub: 404.*Repository Not Found"):
            client(load, name)
        with pytest.raises(ClientError, match=f"ValueError: No classifier '{name}' here or on the Hub"):
            client(classify, name)
    hub.add_repo("anna/a-model", files)
    for name in ("anna/nothing", "anna/a-model"):
        with pytest.raises(ClientError, match=f"FileNotFoundError: `dataset` must .* got '{name}'"):
            client(read_images, name)


# --- data sets -------------------------------------------------------------------------------------------------


def image_folder(rows=6):
    """PNG files in two classes, as a data set's repository holds them."""
    repository = {}
    for row in range(rows):
        buffer = BytesIO()
        Image.fromarray(np.full((8, 8), 40 * row % 256, dtype=np.uint8)).save(buffer, format="png")
        repository[f"train/{('cat', 'dog')[row % 2]}/{row}.png"] = buffer.getvalue()
    return repository


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("private", [False, True])
def test_image_data_from_the_hub(hub, client, streaming, private):
    name = f"anna/folder-{streaming}-{private}".lower()
    hub.add_repo(name, image_folder(), kind="dataset", private=private)
    hub.page_size = 4  # six files and three folders: three pages
    pixels, labels, names = client(read_images, name, streaming=streaming)
    order = np.argsort(pixels[:, 0, 0, 0].astype(float))
    assert sorted(labels) == [0, 0, 0, 1, 1, 1] and names == ["cat", "dog"]
    assert [labels[row] for row in order] == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(to_unit(pixels[order])[:, 0, 3, 3], 40 * np.arange(6) / 127.5 - 1, atol=1e-6)


def to_unit(pixels):
    return pixels / 127.5 - 1 if pixels.dtype == np.uint8 else pixels


def test_parquet_data_from_the_hub(hub, client):
    content = {"data/train-00000-of-00001.parquet": DIGITS_PATH.read_bytes()}
    hub.add_repo("anna/digits", content, kind="dataset")
    pixels, labels, _ = client(read_images, "anna/digits")
    expected = read_images("digits")
    np.testing.assert_array_equal(pixels, expected[0])
    assert labels == expected[1]
    streamed, stream_labels, _ = client(read_images, "anna/digits", streaming=True, max_images=20)
    assert streamed.shape == (20, 1, 8, 8) and sorted(stream_labels) == sorted(labels[:20])
    with pytest.raises(ClientError, match="ValueError: `dataset`, .* got 'anna/digits'.*'test'"):
        client(read_images, "anna/digits", split="test")
