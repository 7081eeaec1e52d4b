"""The page on which models are tried out: by its functions, over HTTP, in a browser, and as a Space."""

import io
import re
import shutil
from pathlib import Path

import gradio
import pytest
import torch
from data_fixtures import picture
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from heads import save_heads
from hub_server import run_client
from huggingface_hub import SpaceCard
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from test_cli import run_main
from test_pipelines import HEADS, make_pipeline
from tiny_extractors import save_trunk

import hf_vlp
from hf_vlp import demo
from hf_vlp.demo.panels import PANELS
from hf_vlp.demo.space import APP, REQUIREMENTS
from hf_vlp.visualization.boxes import PREDICTED
from hf_vlp.visualization.gradcam import HEADS as WITH_HEATMAPS

ROOT = Path(__file__).parents[1]
SAVED = (
    hf_vlp.XVLMForPreTraining,
    hf_vlp.ALBEFForQuestionAnswering,
    hf_vlp.SOHOForVisualReasoning,
    hf_vlp.LXMERTForGrounding,
)
CASES = [
    (name, head)
    for name in PANELS
    for head in HEADS[name]
    if "PreTraining" not in head.__name__ and name != "image-captioning"
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return f"grid:{save_trunk('vit', tmp_path_factory.mktemp('trunk') / 'vit')}#2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save_heads(tmp_path_factory.mktemp("heads"), *SAVED)


@pytest.fixture(scope="module")
def address(folder):
    """Of a page with a model that points and compares, one that answers, and one that judges pairs."""
    page = demo.build([folder / head.__name__ for head in SAVED[:3]], device="cpu")
    demo.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


def tabs(page: gradio.Blocks) -> list[str]:
    return [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]


# Panels


@pytest.mark.parametrize(
    ("name", "head"),
    [*CASES, ("image-captioning", hf_vlp.XVLMForCaptioning)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_head_does_its_examples(name, head, spec):
    panel = PANELS[name](make_pipeline(name, head, spec))
    with gradio.Blocks(analytics_enabled=False):
        inputs, outputs = panel.inputs(*panel.examples()[0]), panel.outputs()
    assert len(panel.examples()) == 2 and all(component.label for component in [*inputs, *outputs])
    for example in panel.examples():
        values = [component.value for component in inputs[len(example) :]]
        if name == "image-text-retrieval":
            example = [[(image, None) for image in example[0]], example[1]]
        found = panel.run(*example, *values)
        assert len(found) == len(outputs)
        for component, value in zip(outputs, found, strict=True):
            component.postprocess(value)
    if issubclass(head, WITH_HEATMAPS):
        other = panel.run(*example, *values[:-1], not values[-1])
        assert other[0] != found[0] or other[1:] != found[1:]


def test_boxes_and_numbers_are_those_of_the_pipeline(spec):
    pipe = make_pipeline("visual-grounding", hf_vlp.XVLMForGrounding, spec)
    image, texts = picture(0), ["a red circle", "the square"]
    drawn, rows = PANELS["visual-grounding"](pipe).run(image, " a red circle \n\n the square\n")
    boxes = [found["box"] for found in pipe([image, image], texts)]
    assert rows == [[text, *map(round, box)] for text, box in zip(texts, boxes, strict=True)]
    assert shows_box(drawn)


def shows_box(image: Image.Image) -> bool:
    wanted = tuple(bytes.fromhex(PREDICTED[1:]))
    return wanted in {color for _, color in image.convert("RGB").getcolors(maxcolors=2**24)}


# The page


def test_tabs_are_named_after_tasks_and_where_need_be_models(folder, spec):
    names = [str(folder / head.__name__) for head in SAVED]
    page = demo.build(names, extractor=spec)
    assert tabs(page) == [
        "Grounding · XVLMForPreTraining",
        "Grounding · LXMERTForGrounding",
        "Question answering",
        "Retrieval",
        "Visual reasoning",
    ]
    assert page.analytics_enabled is False
    routes = {fn.api_name for fn in page.fns.values() if fn.api_visibility == "public"}
    assert {"grounding_XVLMForPreTraining", "vqa", "retrieval", "reasoning"} <= routes
    assert tabs(demo.build(names[0], ["retrieval"])) == ["Retrieval"]


def test_models_of_one_name_are_told_apart(folder, tmp_path):
    again = tmp_path / "again" / SAVED[1].__name__
    shutil.copytree(folder / SAVED[1].__name__, again)
    found = tabs(demo.build([folder / SAVED[1].__name__, again]))
    assert found == [f"Question answering · {name}" for name in (folder / SAVED[1].__name__, again)]


def test_what_cannot_be_shown_is_named(folder, spec, tmp_path):
    for options, message in [
        ({"models": []}, "models is empty"),
        ({"models": folder / "XVLMForPreTraining", "tasks": ["poetry"]}, "tasks has poetry"),
        ({"models": folder / "XVLMForPreTraining", "tasks": ["vqa"]}, "nothing to try: .* trained first"),
        ({"models": folder / "XVLMForPreTraining", "extractor": spec}, "no model reads regions"),
        ({"models": folder / "LXMERTForGrounding"}, "extractor is None, but .*LXMERTForGrounding reads"),
        ({"models": list(folder.iterdir()), "tasks": ["captioning"]}, "nothing to try"),
    ]:
        with pytest.raises(ValueError, match=message):
            demo.build(**options)
    with pytest.raises(OSError):
        demo.build(tmp_path / "none")


def test_the_command_hands_its_arguments_on(folder, monkeypatch):
    launched = []
    monkeypatch.setattr(demo, "launch", lambda page, **options: launched.append((tabs(page), options)))
    model = str(folder / "XVLMForPreTraining")
    assert run_main(monkeypatch, "demo", model, "--task", "retrieval", "--port", "7999") == 0
    assert launched == [(["Retrieval"], {"server_port": 7999})]
    assert "nothing to try" in run_main(monkeypatch, "demo", model, "--task", "vqa")
    assert "which a Space cannot read" in run_main(monkeypatch, "demo", model, "--push-space", "org/space")


# Over HTTP


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False, analytics_enabled=False)


@pytest.fixture
def photo(tmp_path) -> Path:
    picture(0).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_page_answers_over_http(client, folder, photo):
    pipe = hf_vlp.pipeline("visual-grounding", folder / "XVLMForPreTraining", device="cpu")
    drawn, numbers = client.predict(handle_file(photo), "the red circle", False, api_name="/grounding")
    box = pipe(photo, "the red circle")["box"]
    assert numbers["data"] == [["the red circle", *map(round, box)]]
    assert shows_box(Image.open(drawn))

    pipe = hf_vlp.pipeline("visual-question-answering", folder / "ALBEFForQuestionAnswering", device="cpu")
    label, heat = client.predict(handle_file(photo), "what is it?", "red\nblue", True, api_name="/vqa")
    best = pipe(photo, "what is it?", answers=["red", "blue"])["answers"]
    assert label["label"] == best[0]["answer"] and Image.open(heat).size == picture(0).size
    assert [each["label"] for each in label["confidences"]] == [each["answer"] for each in best]

    label = client.predict(handle_file(photo), handle_file(photo), "two circles", api_name="/reasoning")
    assert {each["label"] for each in label["confidences"]} == {"true", "false"}
    pictures = [{"image": handle_file(photo), "caption": None}] * 2
    best, numbers = client.predict(pictures, "a circle\na square", True, api_name="/retrieval")
    assert len(best) == 2 and [row[1] for row in numbers["data"]] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("values", "api_name", "message"),
    [
        ((None, "a circle", False), "/grounding", "Add a picture first"),
        (("photo", " \n ", False), "/grounding", "Write a phrase first"),
        (("broken", "a circle", False), "/grounding", "Picture cannot be read"),
        (("photo", "", "", False), "/vqa", "Write a question first"),
        (("photo", None, "two circles"), "/reasoning", "Add the right picture first"),
        (([], "a circle", False), "/retrieval", "Add a picture first"),
    ],
)
def test_bad_input_is_told(values, api_name, message, client, photo, tmp_path, capfd):
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:50])
    files = {"photo": handle_file(photo), "broken": handle_file(tmp_path / "broken.png")}
    given = [files.get(value, value) if isinstance(value, str) else value for value in values]
    with pytest.raises(AppError, match=message):
        client.predict(*given, api_name=api_name)
    assert "Traceback" not in "".join(capfd.readouterr())


# In a browser


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on this machine; install one, such as Debian's package chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """The page, whose requests all stay on this machine."""
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_a_picture_and_a_phrase_give_a_box(page, folder, photo):
    page.get_by_role("tab", name="Grounding").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_label("Remove Image").first.click()
    panel.locator("input[type=file]").first.set_input_files(photo)
    expect(panel.get_by_label("Remove Image").first).to_be_visible()
    panel.get_by_label("Phrases").fill("the red circle\na square")
    panel.get_by_role("button", name="Find").click()
    expect(panel.get_by_role("gridcell", name="the red circle")).to_be_visible(timeout=20_000)

    pipe = hf_vlp.pipeline("visual-grounding", folder / "XVLMForPreTraining", device="cpu")
    for found in pipe([photo] * 2, ["the red circle", "a square"]):
        row = panel.get_by_role("row").filter(has_text=found["text"])
        assert row.first.inner_text().split()[-4:] == [str(round(side)) for side in found["box"]]
    result = panel.locator(".block").filter(has=page.get_by_text("Found", exact=True)).locator("img").last
    assert shows_box(Image.open(io.BytesIO(result.screenshot())))


def test_a_question_gives_answers(page):
    page.get_by_role("tab", name="Question answering").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_label("Question").fill("which colour is the circle")
    panel.get_by_label("Answers to choose from").fill("red\nblue")
    panel.get_by_role("button", name="Answer", exact=True).click()
    for answer in ("red", "blue"):
        expect(panel.get_by_role("button", name=answer)).to_be_visible(timeout=20_000)


def test_the_page_tells_what_is_missing(page):
    page.get_by_role("tab", name="Grounding").click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_label("Remove Image").first.click()
    panel.get_by_role("button", name="Find").click()
    expect(page.get_by_text("Add a picture first.")).to_be_visible(timeout=20_000)


# As a Space

PUSH = """
from heads import make_head
import hf_vlp
from hf_vlp.commands.demo import run
model, processor = make_head(hf_vlp.XVLMForPreTraining)
model.push_to_hub("org/tiny-xvlm")
processor.push_to_hub("org/tiny-xvlm")
assert "org/try-it/commit" in run(["org/tiny-xvlm"], ["grounding"], space="org/try-it", private=True)
"""
AGAIN = """
from hf_vlp import demo
demo.push_space("org/try-it", ["org/tiny-xvlm"])
try:
    demo.push_space("org/theirs", ["org/tiny-xvlm"])
except ValueError as error:
    assert "did not write" in str(error)
else:
    raise AssertionError("overwritten")
"""
RUN = """
import json, os, runpy, socket, time
import gradio, hf_vlp
assert hf_vlp.__file__.startswith(os.getcwd()), "the copy beside it"
asked = []
look_up = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **options: asked.append(host) or look_up(host, *rest, **options)
page = runpy.run_path("app.py")["demo"]
hf_vlp.demo.launch(page, prevent_thread_lock=True)
time.sleep(1)  # what gradio does on the side
page.close()
assert {str(host) for host in asked} <= {"127.0.0.1", "localhost", "0.0.0.0", "::1"}, asked
print(json.dumps({"tabs": [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]}))
"""


def test_a_space_goes_to_the_hub_and_runs(hub, tmp_path):
    space, home = tmp_path / "space", tmp_path / "home"
    home.mkdir()
    run_client(hub, PUSH, home)
    files = hub.repos["org/try-it"].files()
    for path in files:
        (space / path).parent.mkdir(parents=True, exist_ok=True)
        (space / path).write_bytes(hub.read("org/try-it", path))
    card = SpaceCard.load(space / "README.md").data
    assert (card.sdk, card.sdk_version, card.app_file) == ("gradio", gradio.__version__, APP)
    assert card.models == ["org/tiny-xvlm"] and card.title == "try-it"
    assert (space / "requirements.txt").read_text().split() == list(REQUIREMENTS)
    assert not [path for path in files if "__pycache__" in path]
    assert run_client(hub, RUN, space) == {"tabs": ["Grounding"]}

    hub.write("org/try-it", {"README.md": b"mine", "hf_vlp/old.py": b""})
    hub.write("org/theirs", {APP: b"print()"})
    run_client(hub, AGAIN, home)
    assert hub.read("org/try-it", "README.md") == b"mine"
    assert "hf_vlp/old.py" not in hub.repos["org/try-it"].files()
    assert b"['grounding']" not in hub.read("org/try-it", APP)
    assert hub.read("org/theirs", APP) == b"print()"


def test_a_space_installs_what_the_package_does():
    setup = (ROOT / "setup.py").read_text()
    named = (
        re.search(r"install_requires=\[(.*?)\]", setup, flags=re.S)[1] + re.search("DEMO = (.*)", setup)[1]
    )
    assert tuple(re.findall('"(.+?)"', named)) == REQUIREMENTS


def test_folders_of_this_machine_are_no_models_of_a_space(folder, tmp_path):
    for options in ({"models": folder / "XVLMForPreTraining"}, {"models": "org/lxmert", "extractor": folder}):
        with pytest.raises(ValueError, match="which a Space cannot read"):
            demo.write_space(tmp_path / "space", **options)
        assert not (tmp_path / "space").exists()
