"""The demo page as a visitor uses it: the Space's own files in a process, clicked through in headless Chromium."""

import math
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import SpaceCard, SpaceCardData, metadata_load
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from diffusers_rcfd import RCFDPipeline
from diffusers_rcfd.cli import demo
from diffusers_rcfd.evaluation.sampling import initial_noise
from tests.fake_hub import FakeHub
from tests.toys import tiny_sfd_student, tiny_teacher

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "demo.py"
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page must do without the internet
]  # fmt: skip
WAIT = 120  # seconds, for a machine that is busy


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base model, a folder of students, a student with classes, and a base model of another image shape."""
    folder = tmp_path_factory.mktemp("models")
    tiny_teacher(seed=1).save_pretrained(folder / "base")
    tiny_teacher(4, seed=2).save_pretrained(folder / "students" / "4-step")
    tiny_teacher(2, seed=3).save_pretrained(folder / "students" / "2-step")
    tiny_teacher(2, seed=4, num_class_embeds=5).save_pretrained(folder / "with-classes")
    tiny_teacher(seed=5, sample_size=16).save_pretrained(folder / "larger")
    return folder


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The folder that is uploaded as a Space."""
    folder = tmp_path_factory.mktemp("space")
    line = [sys.executable, str(DEMO), "--make_space", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and str(folder) in done.stdout, done.stderr
    return folder


@pytest.fixture(scope="module")
def page(models, space, tmp_path_factory):
    """URL of the Space, run as the Hub runs it, with a Hub of its own that has the students too."""
    pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[demo]'")
    with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        hub.add_repo("anna/subfolders", files_of(models / "students"))
        revisions = hub.add_repo("anna/revisions", files_of(models / "base"))
        revisions.branches["4-step"] = revisions.add_commit(files_of(models / "students" / "4-step"), "Four steps")

        home = tmp_path_factory.mktemp("home")
        environment = hub.environment(home, token=None)
        environment |= {"MODEL_ID": str(models / "students"), "BASE_MODEL_ID": str(models / "base")}
        environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(home / "gradio")}
        environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, metadata_load(space / "README.md")["app_file"]],
            cwd=space, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            yield wait_for_url(process)
        finally:
            process.terminate()
            process.wait(30)


def wait_for_url(process):
    """The address that the process prints; its output goes on being read, so that it never blocks on it."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    printed = ""
    while (line := lines.get(timeout=WAIT)) is not None:
        printed += line
        if "http://" in line:
            return line.split()[-1].rstrip("/") + "/"
    pytest.fail(printed)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected_picture(folder, steps, num_images, seed, class_labels=None):
    """The grid (H, W, 3) drawn from the pipeline's own images: whole-number enlargement, white lines of 2 pixels."""
    pipeline = RCFDPipeline.from_pretrained(folder)
    noise = initial_noise(range(num_images), pipeline.image_shape, seed)
    call = {} if class_labels is None else {"class_labels": class_labels}
    images = pipeline(num_images, steps, latents=noise, output_type="np", **call).images  # (B, H, W, 1)
    if num_images == 1:
        return enlarge(images[0], 64)
    columns = math.ceil(math.sqrt(num_images))
    scale = 512 // (8 * columns)
    tile = 8 * scale + 2
    rows = math.ceil(num_images / columns)
    picture = np.full((rows * tile + 2, columns * tile + 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * tile + 2, i % columns * tile + 2
        picture[top : top + 8 * scale, left : left + 8 * scale] = enlarge(image, scale)
    return picture


def enlarge(image, scale):
    return np.kron((image * 255).round().astype(np.uint8), np.ones((scale, scale, 3), np.uint8))


def assert_same_picture(picture, expected):
    picture = np.asarray(picture.convert("RGB")).astype(int)
    assert picture.shape == expected.shape
    assert np.abs(picture - expected).max() <= 1  # a rounding error may fall on the border between two grey levels


# --- without a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generate(page):
    """Press the button by Gradio's own client: the two pictures and the two headings."""
    from gradio_client import Client

    client = Client(page, verbose=False)

    def press(model, base, steps, num_images, seed, class_label="balanced"):
        client.predict(model, steps, api_name="/classes")
        title, picture, base_title, base_picture, *_ = client.predict(
            model, base, steps, class_label, num_images, seed, api_name="/generate"
        )
        return title, Image.open(picture), base_title, base_picture and Image.open(base_picture)

    return press


def test_client_gets_both_pictures_of_the_same_noise(generate, models):
    title, picture, base_title, base_picture = generate(str(models / "students"), str(models / "base"), 2, 3, 11)
    assert_same_picture(picture, expected_picture(models / "students" / "2-step", 2, 3, 11))
    assert_same_picture(base_picture, expected_picture(models / "base", 2, 3, 11))
    assert "Model in 2 steps" in title and "ms an image" in title and "distilled for 2 steps" in title
    assert "Base model in 2 steps" in base_title and "same noise" in base_title


@pytest.mark.parametrize(
    "model, steps, origin",
    [
        ("anna/subfolders", 2, "students/2-step"),
        ("anna/subfolders", 4, "students/4-step"),
        ("anna/revisions", 4, "students/4-step"),
        ("anna/revisions", 2, "base"),
    ],
)
def test_rungs_come_from_subfolders_and_revisions_of_a_hub_repository(generate, models, model, steps, origin):
    _, picture, _, base_picture = generate(model, "", steps, 1, 0)
    assert_same_picture(picture, expected_picture(models / origin, steps, 1, 0))
    assert base_picture is None


def test_classes_come_in_turn_or_one_for_all(generate, models):
    model = models / "with-classes"
    in_turn = generate(str(model), "", 1, 6, 0)[1]
    assert_same_picture(in_turn, expected_picture(model, 1, 6, 0, [0, 1, 2, 3, 4, 0]))
    title, one_class, _, unconditional = generate(str(model), str(models / "base"), 1, 6, 0, class_label=3)
    assert_same_picture(one_class, expected_picture(model, 1, 6, 0, 3))
    assert_same_picture(unconditional, expected_picture(models / "base", 1, 6, 0))
    assert "in 1 step\n" in title and "distilled for 2 steps" in title


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "anna/absent"}, "No folder and no model of the Hub: 'anna/absent'.*Not Found"),
        ({"model": "no/such/folder"}, "No folder and no model of the Hub: 'no/such/folder'"),
        ({"model": " "}, "`model` must be a folder or a Hub id, got ' '"),
        ({"base": "larger"}, r"`base` must be a model of the same image shape \(1, 8, 8\), got \(1, 16, 16\)"),
        ({"model": "with-classes", "steps": 4}, r"`num_inference_steps` must be one of \[1, 2\]"),
        ({"steps": 1}, r"no pipeline, and none for 1 step beside \['2-step', '4-step'\]"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
        ({"num_images": 65}, "65"),
    ],
    ids=["hub", "folder", "empty", "shape", "divisor", "rung", "seed", "number"],
)
def test_what_is_wrong_is_said(generate, models, change, message):
    from gradio_client.exceptions import AppError

    given = {"model": "students", "base": "base", "steps": 2, "num_images": 1, "seed": 0} | change
    for name in ("model", "base"):
        if (models / given[name]).is_dir():
            given[name] = str(models / given[name])
    with pytest.raises(AppError, match=f"(?s){message}"):
        generate(**given)


def test_own_rung_is_preferred_to_the_folder_s_pipeline(models, tmp_path):
    shutil.copytree(models / "base", tmp_path, dirs_exist_ok=True)
    assert demo.find_pipeline(str(tmp_path), 4) == (str(tmp_path), None)
    shutil.copytree(models / "students" / "4-step", tmp_path / "4-step")
    assert demo.find_pipeline(str(tmp_path), 4) == (str(tmp_path / "4-step"), None)
    assert demo.find_pipeline(str(tmp_path), 2) == (str(tmp_path), None)


def test_student_of_two_evaluations_and_more(tmp_path):
    tiny_sfd_student().save_pretrained(tmp_path)
    pipeline = demo.load_pipeline(str(tmp_path), None, "cpu")
    images, seconds = demo.sample(pipeline, 2, num_images=3, seed=0)
    assert images.shape == (3, 1, 8, 8) and seconds > 0


def test_pickled_weights_are_not_read(models, tmp_path):
    shutil.copytree(models / "base", tmp_path, dirs_exist_ok=True)
    RCFDPipeline.from_pretrained(tmp_path).unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert list((tmp_path / "unet").glob("*.bin"))
    with pytest.raises(OSError, match="safetensors"):
        demo.load_pipeline(str(tmp_path), None, "cpu")


def test_space_readme_has_the_metadata_that_the_hub_asks_for(space):
    data = metadata_load(space / "README.md")
    known = set(vars(SpaceCardData())) | {"emoji", "colorFrom", "colorTo", "short_description"}
    assert data.keys() <= known
    assert SpaceCard.load(space / "README.md").data.to_dict() == data
    assert data["sdk"] == "gradio" and (space / data["app_file"]).is_file()
    assert data["license"] == "apache-2.0" and len(data["short_description"]) <= 60
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {data["colorFrom"], data["colorTo"]} <= colors
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    gradio, python = re.search(r'"(gradio[^"]+)"', setup), re.search(r'python_requires="([^"]+)"', setup)
    assert gradio and Requirement(gradio[1]).specifier.contains(data["sdk_version"])
    assert SpecifierSet(python[1]).contains(data["python_version"])


def test_space_brings_the_package_and_its_requirements(space):
    package = {path for path in files_of(ROOT / "diffusers_rcfd") if "__pycache__" not in path}
    assert files_of(space / "diffusers_rcfd").keys() == package
    line = [sys.executable, str(space / "demo.py"), "--help"]
    done = subprocess.run(line, cwd=space, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: rcfd demo" in done.stdout, done.stderr
    names = {Requirement(line).name for line in (space / "requirements.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "safetensors"} <= names and not {"pytest", "gradio", "selenium"} & names


def test_space_is_not_written_over_other_files(tmp_path):
    (tmp_path / "mine.txt").touch()
    line = [sys.executable, str(DEMO), "--make_space", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and "`make_space` must be a new or an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --- in the browser --------------------------------------------------------------------------------------------


class Browser:
    """Chromium on the page: what a visitor does and sees."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.all("#generate"))

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException, IndexError]
        return WebDriverWait(self.driver, WAIT, 0.1, ignored).until(lambda _: condition())

    def type(self, selector, text):
        from selenium.webdriver.common.keys import Keys

        self.all(selector)[0].send_keys(Keys.CONTROL, "a")
        self.all(selector)[0].send_keys(Keys.DELETE if text == "" else text, Keys.TAB)

    def choose_steps(self, steps):
        next(label for label in self.all("#steps label") if label.text == str(steps)).click()

    def press(self):
        """Press the button and wait for another picture."""
        before = self.address("picture")
        self.all("#generate")[0].click()
        self.wait(lambda: self.address("picture") not in (None, before))

    def address(self, name):
        """Where a picture comes from, once it is shown."""
        script = "const i = document.querySelector(arguments[0]); return i && i.complete && i.naturalWidth && i.src"
        return self.driver.execute_script(script, f"#{name} img") or None

    def picture(self, name):
        """The pixels of a picture as the browser decoded them."""
        self.wait(lambda: self.address(name))
        script = """
            const image = document.querySelector(arguments[0]), canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png").split(",")[1]"""
        return Image.open(BytesIO(b64decode(self.driver.execute_script(script, f"#{name} img"))))

    def painted(self, name):
        """The pixels of a picture on the screen."""
        return Image.open(BytesIO(self.all(f"#{name} img")[0].screenshot_as_png)).convert("RGB")


@pytest.fixture(scope="module")
def driver(page, tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[test]'")
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver, page):
    return Browser(driver, page)


def test_browser_shows_the_pipeline_s_images_beside_those_of_the_base_model(browser, models, tmp_path):
    browser.choose_steps(4)
    browser.type("#num_images input[type=number]", "5")
    browser.type("#seed input", "7")
    browser.press()
    expected = expected_picture(models / "students" / "4-step", 4, 5, 7)
    assert_same_picture(browser.picture("picture"), expected)
    assert_same_picture(browser.picture("base_picture"), expected_picture(models / "base", 4, 5, 7))
    title, base_title = browser.all("#title")[0].text, browser.all("#base_title")[0].text
    assert title.startswith("Model in 4 steps") and base_title.startswith("Base model in 4 steps")
    assert re.search(r"[\d.]+ s on cpu, [\d.]+ ms an image; distilled for 4 steps", title)

    rendering = "return getComputedStyle(document.querySelector('#picture img')).imageRendering"
    assert browser.driver.execute_script(rendering) == "pixelated"
    painted = browser.painted("picture")
    shown = Image.fromarray(expected).resize(painted.size, Image.Resampling.NEAREST)
    assert min(painted.size) > 200
    assert np.abs(np.asarray(painted).astype(int) - np.asarray(shown)).mean() < 8
    browser.driver.save_screenshot(str(tmp_path / "demo.png"))

    browser.type("#seed input", "8")
    browser.press()
    assert_same_picture(browser.picture("picture"), expected_picture(models / "students" / "4-step", 4, 5, 8))
    browser.choose_steps(2)
    browser.press()
    assert_same_picture(browser.picture("picture"), expected_picture(models / "students" / "2-step", 2, 5, 8))


def test_browser_offers_the_classes_of_a_model_that_has_some(browser, models):
    assert not [box for box in browser.all("#class input") if box.is_displayed()]
    browser.type("#model textarea", str(models / "with-classes"))
    browser.type("#base textarea", "")
    browser.wait(lambda: any(box.is_displayed() for box in browser.all("#class input")))
    browser.all("#class input")[0].click()
    browser.wait(lambda: len(browser.all("[role=option]")) == 6)
    assert [choice.text.split()[-1] for choice in browser.all("[role=option]")] == ["turn", "0", "1", "2", "3", "4"]
    browser.all("[role=option]")[4].click()
    browser.type("#num_images input[type=number]", "2")
    browser.press()
    assert_same_picture(browser.picture("picture"), expected_picture(models / "with-classes", 1, 2, 0, 3))
    browser.wait(lambda: not [box for box in browser.all("#base_picture") if box.is_displayed()])


def test_browser_shows_what_is_wrong(browser):
    browser.type("#model textarea", "anna/absent")
    browser.all("#generate")[0].click()
    browser.wait(lambda: "No folder and no model of the Hub: 'anna/absent'" in browser.all("body")[0].text)
    assert browser.address("picture") is None


def test_browser_needs_nothing_from_the_internet(browser, page):
    browser.wait(lambda: browser.all("#picture"))
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    addresses = browser.driver.execute_script(script)
    assert addresses and not [address for address in addresses if not address.startswith(page)]
