"""`hf-vlp predict`: one task on images and texts, JSON and a picture out."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..data.lxmert_readers import read_answer_table
from ..data.readers import load_json
from ..data.soho_readers import read_soho_answers
from ..images import load_image
from ..loading import load_trained, place_extractor
from ..prediction import Prediction, predict
from ..visualization import draw_located, draw_word_heatmaps, stack, word_heatmaps
from ..visualization.gradcam import HEADS


def run(
    task: str,
    name: str,
    images: Sequence[str],
    texts: Sequence[str],
    out: Path | None = None,
    answers: Path | None = None,
    proposals: Path | None = None,
    extractor: str | None = None,
    top_k: int = 5,
    batch_size: int = 32,
) -> str | None:
    """Predict with the model in `name`; the JSON text, unless `out` is a .json file, which then holds it.

    A picture goes to an `out` of .png or .jpg: boxes where the task has them, else the words' heat maps.
    `extractor` is what finds LXMERT's regions, in place of the model's own.

    Raises:
        ValueError: as `load_trained` and `predict`, options of other tasks, `out` of another kind, or a
            picture of a head that has none.
    """
    if out is not None and out.suffix not in (".json", ".png", ".jpg"):
        raise ValueError(f"out is {out}; give a file in .json, .png or .jpg")
    options = {"batch_size": batch_size}
    for needed, option, given in (("vqa", "answers", answers), ("grounding", "proposals", proposals)):
        if given is not None and task != needed:
            raise ValueError(f"{option} is {given}, which {task} has no use for; leave it out")
    if task == "vqa":
        options |= {"answers": answers and read_answers(answers), "top_k": top_k}
    if proposals is not None:
        options["proposals"] = load_json(proposals)
    model, processor = load_trained(task, name, extractor)
    draws = out is not None and out.suffix != ".json"
    if draws and task != "grounding" and not isinstance(model, HEADS):
        raise ValueError(
            f"out is {out}, but {type(model).__name__} has no heat maps to draw; give a .json file"
        )
    place_extractor(processor, model.device)

    predictions = predict(task, model, processor, images, texts, **options)
    if draws:
        _draw(model, processor, images, predictions).save(out)
    text = json.dumps([_printed(prediction, images) for prediction in predictions], indent=2)
    if out is None or draws:
        return text
    out.write_text(text + "\n", encoding="utf-8")


def read_answers(file: Path) -> list[str]:
    """Answers of a JSON list, of LXMERT's table, of a VQA file of SOHO, or of a text file with one in each
    line."""
    if file.suffix == ".json":
        return read_soho_answers(file) if isinstance(load_json(file), dict) else read_answer_table(file)
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _draw(model, processor, images: Sequence, predictions: Sequence[Prediction]) -> Image.Image:
    """Boxes on each image, one image for each heat map; without boxes, words' heat maps of each text.

    Of retrieval, each text is drawn with the image that suits it best.
    """
    if "box" in predictions[0]:
        return stack(draw_located(images, predictions))
    drawn = [one for one in predictions if one.get("image_rank", 1) == 1]
    pictures = [[load_image(images[place]) for place in _places(one)] for one in drawn]
    inputs = [pair if len(pair) == 2 else pair[0] for pair in pictures]
    targets = [one["answers"][0]["answer"] for one in drawn] if "answers" in drawn[0] else None
    heatmaps = iter(word_heatmaps(model, processor, inputs, [one["text"] for one in drawn], targets))
    return stack(
        [
            draw_word_heatmaps(picture, next(heatmaps), _title(prediction))
            for prediction, of_text in zip(drawn, pictures, strict=True)
            for picture in of_text
        ]
    )


def _places(prediction: Prediction) -> list[int]:
    """Of the one or two images that a prediction is of."""
    return prediction["images"] if "images" in prediction else [prediction["image"]]


def _title(prediction: Prediction) -> str:
    """The text, then the decision."""
    if "answers" in prediction:
        decision = prediction["answers"][0]["answer"]
    elif "label" in prediction:
        decision = prediction["label"]
    else:
        decision = f"match {prediction['probability']:.2f}"
    return f"{prediction['text']}: {decision}"


def _printed(prediction: Prediction, images: Sequence[str]) -> Prediction:
    """What JSON holds, with the images' names for their places."""
    printed = {name: value for name, value in prediction.items() if name != "heatmap"}
    names = [str(images[place]) for place in _places(prediction)]
    return printed | ({"image": names[0]} if "image" in printed else {"images": names})
