"""Rows of every task, predictions and commands on them, for the tests of LXMERT and SOHO."""

import torch
from data_fixtures import picture
from heads import LXMERT_ANSWERS, make_head
from typer.testing import CliRunner

from hf_vlp.cli import app

IMAGES = [picture(i, 60 + i, 50) for i in range(4)]
TEXTS = ["a red circle", "left of the blue square", "is the green cross right", "top", "a yellow triangle"]


def loud(head):
    """A head with weights large enough that predictions differ."""
    model, _ = make_head(head)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "shift" not in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def rows_of(task: str) -> list[dict]:
    """Seven rows; the first four images come again."""
    rows = []
    for i in range(7):
        image, other, text = IMAGES[i % 4], IMAGES[(i + 1) % 4], TEXTS[i % 5]
        fields = {
            "vqa": {"image": image, "question": text, "answers": [LXMERT_ANSWERS[i % 3]] * 10},
            "reasoning": {"images": [image, other], "sentence": text, "label": i % 2},
            "entailment": {"image": image, "sentence": text, "label": i % 3},
            "grounding": {"image": image, "text": text, "box": [5, 6, 20 + i, 20]},
            "retrieval": {"image": image, "caption": TEXTS[i % 3 :]},
            "foils": {"image": image, "caption": text, "foil": TEXTS[(i + 4) % 5]},
        }
        rows.append(fields[task])
    return rows


def as_line(row: dict) -> dict:
    """A row with the names of its images, and their ids."""
    row = dict(row)
    if "images" in row:
        places = [IMAGES.index(image) for image in row["images"]]
        return row | {"images": [f"{i}.png" for i in places], "image_ids": [str(i) for i in places]}
    place = IMAGES.index(row["image"])
    return row | {"image": f"{place}.png", "image_id": str(place)}


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return round(value, 3) + 0.0 if isinstance(value, float) else value


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output or result.exception
    return result.stdout
