"""Pipelines of every task and paper: the results of `predict`, for images of all kinds, lists and streams."""

import http.server
import threading
from functools import partial

import datasets
import numpy as np
import pytest
import torch
import transformers
from data_fixtures import picture
from heads import ALBEF, LXMERT, LXMERT_ANSWERS, SOHO, XVLM, make_head, save_heads
from task_rows import loud
from test_prediction import same
from tiny import tiny_lxmert_processor
from tiny_extractors import save_trunk
from transformers import AutoProcessor

import hf_vlp
from hf_vlp.images import BadImageError, load_image
from hf_vlp.pipelines import PREFIX, TASKS
from hf_vlp.prediction import PREDICTORS

IMAGES = [picture(0), picture(1), picture(2), picture(3)]
TEXTS = ["a red circle", "is the blue square left of the green triangle?"]
HEADS = {
    name: [
        head
        for head in (*ALBEF, *LXMERT, *SOHO, *XVLM, hf_vlp.XVLMForCaptioning)
        if issubclass(head, PREDICTORS[task][1])
    ]
    for name, (task, _) in TASKS.items()
}
CASES = [
    (name, head)
    for name, heads in HEADS.items()
    for head in heads
    if "PreTraining" not in head.__name__ and name != "image-captioning"
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return f"grid:{save_trunk('vit', tmp_path_factory.mktemp('trunk') / 'vit')}#2"


def make_pipeline(name: str, head: type, spec: str, **options):
    _, processor = make_head(head)
    processor = tiny_lxmert_processor(spec) if head in LXMERT else processor
    return hf_vlp.pipeline(name, model=loud(head), processor=processor, **options)


def expected_of(pipe, images: list, texts: list) -> list[dict]:
    """By `predict`, in the pipeline's form."""
    rows = hf_vlp.predict(pipe._task, pipe.model, pipe.processor, images, texts)
    if pipe._task != "retrieval":
        return [{key: value for key, value in row.items() if key != "heatmap"} for row in rows]
    found = []
    for i in range(len(images)):
        of_image = sorted((row for row in rows if row["image"] == i), key=lambda row: row["text_rank"])
        found.append({"image": i, "texts": [without(row, "image", "image_rank") for row in of_image]})
    return found


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def test_every_paper_does_what_its_heads_do():
    papers = {name: {head.__name__[:4] for head in heads} for name, heads in HEADS.items()}
    assert papers.pop("image-captioning") == {"XVLM"}
    assert all(found == {"ALBE", "LXME", "SOHO", "XVLM"} for found in papers.values())


@pytest.mark.parametrize(("name", "head"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_lists_rows_and_streams_give_what_predict_gives(name, head, spec):
    pipe = make_pipeline(name, head, spec)
    images = IMAGES if name == "visual-reasoning" else IMAGES[:2]
    expected = expected_of(pipe, images, TEXTS)
    assert same(pipe(images, TEXTS), expected)

    column = TASKS[name][1][0]
    if name == "visual-reasoning":
        rows = [{"images": IMAGES[:2], column: TEXTS[0]}, {"images": IMAGES[2:], column: TEXTS[1]}]
    elif name == "image-text-retrieval":
        rows = [{"image": image, column: TEXTS} for image in images]
    else:
        rows = [{"image": image, column: text} for image, text in zip(images, TEXTS, strict=True)]
    assert same(pipe(rows, batch_size=1), expected)
    assert same(list(pipe(row for row in rows)), expected)
    assert same(list(pipe(datasets.Dataset.from_list(rows))), expected)
    first = expected_of(pipe, images[:2] if name == "visual-reasoning" else images[:1], TEXTS[:1])
    if name != "image-text-retrieval":
        assert same(pipe(rows[0]), first[0])
        given = images[:2] if name == "visual-reasoning" else images[0]
        assert same(pipe(given, TEXTS[0]), first[0])


def test_captions_with_and_without_a_prompt(spec):
    pipe = make_pipeline("image-captioning", hf_vlp.XVLMForCaptioning, spec, max_length=9, num_beams=2)
    options = {"max_length": 9, "num_beams": 2}
    expected = hf_vlp.predict("captioning", pipe.model, pipe.processor, IMAGES, **options)
    assert pipe(IMAGES) == expected and pipe(IMAGES[1])["caption"] == expected[1]["caption"]
    assert list(pipe({"image": image, "caption": "what people wrote"} for image in IMAGES)) == expected
    prompted = hf_vlp.predict("captioning", pipe.model, pipe.processor, IMAGES, ["red"], **options)
    assert pipe(IMAGES, "red") == prompted
    rows = [{"image": image, "prompt": "red" if i % 2 else None} for i, image in enumerate(IMAGES)]
    assert pipe(rows) == [(prompted if i % 2 else expected)[i] for i in range(4)]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "image-captioning"])
def test_regions_take_the_place_of_images(name, spec):
    head = next(head for head in HEADS[name] if head in LXMERT and "PreTraining" not in head.__name__)
    pipe, finds = make_pipeline(name, head, spec), tiny_lxmert_processor(spec)
    regions = [finds.extract([image]).row(0) for image in IMAGES[:2]]
    assert same(pipe(regions, TEXTS[:1]), pipe(IMAGES[:2], TEXTS[:1]))
    row = {"regions": regions if name == "visual-reasoning" else regions[0], "text": TEXTS[0]}
    found = pipe(row)
    assert same(found, pipe(iter([row]), batch_size=1).__next__())
    pipe.processor.extractor = None
    assert same(pipe(row), found), "no extractor is needed for them"
    with pytest.raises(ValueError, match="extractor is None"):
        pipe(IMAGES[:2], TEXTS[:1])


# Streams


def test_streams_are_read_as_results_are_taken(spec):
    pipe, taken = make_pipeline("visual-grounding", hf_vlp.XVLMForGrounding, spec), []

    def images():
        for i in range(100):
            taken.append(i)
            yield IMAGES[i % 4]

    found = pipe(images(), TEXTS[0], batch_size=2)
    assert taken == []
    assert [next(found)["image"] for _ in range(3)] == [0, 1, 2]
    assert len(taken) == 4
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled(), "between two results"


def test_streamed_datasets(spec):
    pipe = make_pipeline("visual-question-answering", hf_vlp.SOHOForQuestionAnswering, spec, top_k=2)
    rows = datasets.Dataset.from_list([{"image": image, "question": TEXTS[0]} for image in IMAGES])
    found = list(pipe(rows.to_iterable_dataset()))
    assert same(found, expected_of(pipe, IMAGES, TEXTS[:1]) and pipe(IMAGES, TEXTS[0]))
    assert [row["image"] for row in found] == [0, 1, 2, 3]
    assert all(len(row["answers"]) == 2 for row in found)
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    assert same(list(pipe(undecoded)), found)
    assert same(list(pipe(rows["image"][:], TEXTS[0])), found)


# Images


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address and its folder, with an image and a text."""
    folder = tmp_path_factory.mktemp("server")
    IMAGES[0].save(folder / "photo.png")
    (folder / "page.html").write_text("no image")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


def test_images_of_all_kinds(server, spec):
    address, folder = server
    pipe = make_pipeline("visual-grounding", hf_vlp.XVLMForGrounding, spec)
    pixels = np.asarray(IMAGES[0])
    kinds = [
        IMAGES[0],
        folder / "photo.png",
        str(folder / "photo.png"),
        f"{address}/photo.png",
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255,
        {"bytes": (folder / "photo.png").read_bytes(), "path": None},
    ]
    expected = pipe(IMAGES[0], TEXTS[0])
    for image in kinds:
        assert same(pipe(image, TEXTS[0]), expected)
    assert load_image(pixels[:, :, 0]).mode == "RGB"


@pytest.mark.parametrize("name", ["none.png", "page.html"])
def test_addresses_without_an_image_are_named(name, server):
    with pytest.raises(BadImageError, match=name):
        load_image(f"{server[0]}/{name}")


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 4, 5), np.uint8), np.zeros((4, 4, 3)), torch.zeros(7, 4, 4)]
)
def test_arrays_that_are_no_image_are_named(array):
    with pytest.raises(BadImageError, match="array"):
        load_image(array)


def test_a_server_that_is_not_there():
    with pytest.raises(BadImageError, match="127.0.0.1:9/photo.png"):
        load_image("http://127.0.0.1:9/photo.png")


# Options


def test_top_k_and_answers(spec):
    pipe = make_pipeline(
        "visual-question-answering", hf_vlp.ALBEFForQuestionAnswering, spec, answers=LXMERT_ANSWERS
    )
    assert len(pipe(IMAGES[0], TEXTS[0])["answers"]) == 5
    assert len(pipe(IMAGES[0], TEXTS[0], top_k=2)["answers"]) == 2
    pipe = make_pipeline("image-text-retrieval", hf_vlp.XVLMForRetrieval, spec, top_k=1)
    (best,) = pipe(IMAGES[0], [*TEXTS, "a square"])["texts"]
    assert best["text_rank"] == 1
    with pytest.raises(ValueError, match="top_k is 0"):
        pipe(IMAGES[0], TEXTS, top_k=0)


@pytest.mark.parametrize("head", [hf_vlp.ALBEFModel, hf_vlp.XVLMModel])
def test_features_are_what_the_contrastive_loss_compares(head):
    model, processor = make_head(
        hf_vlp.ALBEFForRetrieval if head is hf_vlp.ALBEFModel else hf_vlp.XVLMForRetrieval
    )
    pipe = hf_vlp.pipeline("feature-extraction", model=model.model, processor=processor)
    both, image, text = pipe(IMAGES[0], TEXTS[0]), pipe(IMAGES[0]), pipe(texts=TEXTS[0])
    assert image.keys() == {"image", "image_features"} and text.keys() == {"text", "text_features"}
    assert both.keys() == {"image", "text", "image_features", "text_features", "features"}
    (row,) = hf_vlp.predict("retrieval", model, processor, IMAGES[:1], TEXTS[:1])
    assert (both["image_features"] @ both["text_features"]).item() == pytest.approx(row["cosine"], abs=1e-5)
    with torch.no_grad():
        states = model.model(**processor(images=IMAGES[:1], text=TEXTS[:1])).last_hidden_state
    torch.testing.assert_close(both["features"], states[0, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(image["image_features"], both["image_features"])
    assert [row["image"] for row in pipe(IMAGES)] == [0, 1, 2, 3]
    assert len(pipe(texts=TEXTS)) == 2


def test_pairs_only_have_features_in_lxmert_and_soho(spec):
    pipe = make_pipeline("feature-extraction", hf_vlp.SOHOForRetrieval, spec)
    assert pipe(IMAGES[0], TEXTS[0]).keys() == {"image", "text", "features"}
    with pytest.raises(ValueError, match="give every row both"):
        pipe(IMAGES[0])


@pytest.mark.parametrize(
    ("name", "head", "shape"),
    [
        ("visual-grounding", hf_vlp.ALBEFForGrounding, (2, 2)),
        ("visual-grounding", hf_vlp.XVLMForGrounding, (2, 2)),
        ("visual-entailment", hf_vlp.ALBEFForVisualEntailment, (2, 2)),
        ("visual-question-answering", hf_vlp.ALBEFForQuestionAnswering, (2, 2)),
        ("visual-reasoning", hf_vlp.ALBEFForVisualReasoning, (2, 2, 2)),
        ("image-text-retrieval", hf_vlp.XVLMForRetrieval, (2, 2)),
        ("visual-entailment", hf_vlp.XVLMForVisualEntailment, (2, 2)),
        ("image-text-retrieval", hf_vlp.SOHOForRetrieval, None),
    ],
)
def test_heat_maps_come_when_asked_for(name, head, shape, spec):
    pipe = make_pipeline(name, head, spec)
    images = IMAGES[:2] if name == "visual-reasoning" else IMAGES[0]
    plain, found = pipe(images, TEXTS[0]), pipe(images, TEXTS[0], return_heatmap=True)
    owners = found["texts"] if name == "image-text-retrieval" else [found]
    for owner in owners:
        heat = owner.pop("heatmap")
        assert heat.shape == (shape or heat.shape) and 0 <= heat.min() and heat.max() <= 1 + 1e-6
    assert same(found, plain)


def test_proposals_of_rows(spec):
    pipe = make_pipeline("visual-grounding", hf_vlp.ALBEFForGrounding, spec)
    row = {"image": IMAGES[0], "text": TEXTS[0], "proposals": [[0, 0, 20, 20], [40, 0, 30, 30]]}
    assert pipe(row)["box"] in ([0, 0, 20, 20], [40, 0, 70, 30])
    with pytest.raises(ValueError, match="proposals"):
        make_pipeline("visual-grounding", hf_vlp.XVLMForGrounding, spec)(row)


# Loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    heads = hf_vlp.XVLMForPreTraining, hf_vlp.ALBEFForPreTraining, hf_vlp.SOHOForQuestionAnswering
    return save_heads(tmp_path_factory.mktemp("heads"), *heads, hf_vlp.LXMERTForQuestionAnswering)


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("visual-grounding", "XVLMForPreTraining"),
        ("image-text-retrieval", "ALBEFForPreTraining"),
        ("visual-question-answering", "SOHOForQuestionAnswering"),
        ("feature-extraction", "XVLMForPreTraining"),
        ("feature-extraction", "ALBEFForPreTraining"),
        ("feature-extraction", "SOHOForQuestionAnswering"),
        ("feature-extraction", "LXMERTForQuestionAnswering"),
    ],
)
def test_models_by_name_here_and_in_transformers(name, saved, folder, tmp_path, spec):
    extractor = {"extractor": spec} if "LXMERT" in saved else {}
    pipe = hf_vlp.pipeline(name, model=folder / saved, device="cpu", **extractor)
    found = pipe(IMAGES[0], TEXTS[0])
    assert not pipe.model.training
    theirs = transformers.pipeline(PREFIX + name, model=str(folder / saved), device="cpu")
    assert type(theirs) is type(pipe) and type(theirs.model) is type(pipe.model)
    if not extractor:
        assert same(theirs(IMAGES[0], TEXTS[0]), found)
    pipe.save_pretrained(tmp_path / "saved")
    again = hf_vlp.pipeline(name, model=str(tmp_path / "saved"))
    assert same(again(IMAGES[0], TEXTS[0]), found)
    given = hf_vlp.pipeline(
        name, model=pipe.model, processor=AutoProcessor.from_pretrained(tmp_path / "saved")
    )
    assert same(given(IMAGES[0], TEXTS[0]), found)


def test_weights_in_another_dtype(folder):
    pipe = hf_vlp.pipeline(
        "visual-grounding", model=folder / "XVLMForPreTraining", dtype="bfloat16", device="cpu"
    )
    assert pipe.dtype == torch.bfloat16
    assert len(pipe(IMAGES[0], TEXTS[0])["box"]) == 4
    whole = hf_vlp.pipeline("visual-grounding", model=folder / "XVLMForPreTraining", device="cpu")
    halved = hf_vlp.pipeline("visual-grounding", whole.model, whole.processor, dtype=torch.bfloat16)
    assert halved.dtype == torch.bfloat16


def test_what_does_not_fit_is_named(folder, spec):
    with pytest.raises(ValueError, match="task is 'poetry'; the tasks are visual-question-answering"):
        hf_vlp.pipeline("poetry", model=folder)
    with pytest.raises(ValueError, match="has to be trained first"):
        hf_vlp.pipeline("visual-entailment", model=folder / "ALBEFForPreTraining")
    with pytest.raises(ValueError, match="trained first"):
        transformers.pipeline("vlp-visual-entailment", model=str(folder / "ALBEFForPreTraining"))
    model, processor = make_head(hf_vlp.XVLMForGrounding)
    with pytest.raises(ValueError, match="give its processor"):
        hf_vlp.pipeline("visual-grounding", model=model)
    with pytest.raises(ValueError, match="does not do vqa"):
        hf_vlp.pipeline("visual-question-answering", model=model, processor=processor)
    with pytest.raises(ValueError, match="options are top_k, but vlp-visual-grounding takes no options"):
        hf_vlp.pipeline("visual-grounding", model=model, processor=processor, top_k=3)
    pipe = hf_vlp.pipeline("visual-grounding", model=model, processor=processor)
    with pytest.raises(ValueError, match="batch_size is 0"):
        pipe(IMAGES[0], TEXTS[0], batch_size=0)
    with pytest.raises(ValueError, match="row 0 has no text"):
        list(pipe(iter(IMAGES)))
    with pytest.raises(ValueError, match="at least one image and one text"):
        pipe(IMAGES)
    with pytest.raises(ValueError, match="one for all of the stream"):
        list(pipe(iter(IMAGES), TEXTS))
    with pytest.raises(ValueError, match="give it `image`"):
        pipe({"picture": IMAGES[0], "text": TEXTS[0]})
    pairs = make_pipeline("visual-reasoning", hf_vlp.SOHOForVisualReasoning, spec)
    with pytest.raises(ValueError, match="row 0 is not of two images"):
        list(pairs(iter(IMAGES), TEXTS[0]))
    captions = make_pipeline("image-captioning", hf_vlp.XVLMForCaptioning, spec)
    with pytest.raises(ValueError, match="has none; leave it out"):
        captions(IMAGES[0], return_heatmap=True)
    with pytest.raises(ValueError, match="has none; leave it out"):
        pairs(IMAGES[:2], TEXTS[0], return_heatmap=True)
