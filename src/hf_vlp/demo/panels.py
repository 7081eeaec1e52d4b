"""What is asked and shown for each task: the components of a tab, and what happens between them.

Each panel reads what a person gave, lets the pipeline predict, and draws. What is missing or does not fit is
a ValueError whose message is for the page.
"""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from ..data.shapes import shapes_dataset
from ..images import load_image
from ..models.image_text_heatmaps import HeatmapHead
from ..pipelines import VLPPipeline
from ..visualization import draw_heatmap, draw_located, draw_sheet
from ..visualization.gradcam import HEADS

EXAMPLES = 2
EXAMPLE_SIZE = 240  # pixels a side of a drawn scene
HEIGHT = 300  # pixels of a picture on the page
LINES = "one in each line"
Values = list[Any]


class Panel:
    """A tab of one task. `run` takes the values of `inputs` and gives those of `outputs`; `examples` are
    values of the first inputs, which hold one of them from the start."""

    title = does = button = ""

    def __init__(self, pipe: VLPPipeline):
        self.pipe = pipe
        self.has_heatmap = isinstance(pipe.model, HEADS)

    def inputs(self, *example: Any) -> list[gr.components.Component]:
        raise NotImplementedError

    def outputs(self) -> list[gr.components.Component]:
        raise NotImplementedError

    def examples(self) -> list[Values]:
        raise NotImplementedError

    def heat_switch(self, value: bool = True) -> list[gr.Checkbox]:
        """Of models that show where they look."""
        return [gr.Checkbox(value, label="Show where the model looks")] if self.has_heatmap else []

    def heat_picture(self) -> list[gr.Image]:
        return [_result("Where the model looks")] if self.has_heatmap else []


class QuestionAnswering(Panel):
    title, does, button = "Question answering", "answers a question about the picture", "Answer"

    def inputs(self, picture, question, lines=""):
        components = [_picture(picture), gr.Textbox(question, label="Question")]
        answers = gr.Textbox(
            lines,
            label="Answers to choose from (optional)",
            info=f"{LINES}; without them the model writes one",
            lines=3,
            visible=not self._knows_answers,
        )
        return [*components, answers, *self.heat_switch()]

    def outputs(self):
        return [gr.Label(label="Answer", num_top_classes=5), *self.heat_picture()]

    def examples(self):
        rows = shapes_dataset("questions", "test", 3, image_size=EXAMPLE_SIZE).select([2, 1])
        choices = ["red\ngreen\nblue\nyellow", "zero\none\ntwo\nthree"]
        values = zip(rows["image"], rows["question"], choices, strict=True)
        return [list(value)[: 2 if self._knows_answers else 3] for value in values]

    @property
    def _knows_answers(self) -> bool:
        """Whether the head has answers of its own."""
        return getattr(self.pipe.model.config, "answers", None) is not None

    def run(self, picture: Image.Image, question: str, answers: str = "", heat: bool = False) -> Values:
        _check_picture(picture)
        found = self.pipe(
            picture,
            _text(question, "a question"),
            answers=_lines(answers) or None,
            return_heatmap=heat,
        )
        best = found["answers"]
        if "probability" in best[0]:
            label = {each["answer"] or "(nothing)": each["probability"] for each in best}
        else:
            label = best[0]["answer"] or "(nothing)"
        return [label, *self._drawn(picture, found)]

    def _drawn(self, picture: Image.Image, found: dict) -> list[Image.Image | None]:
        if not self.has_heatmap:
            return []
        return [draw_heatmap(picture, found["heatmap"]) if "heatmap" in found else None]


class Entailment(QuestionAnswering):
    title, does, button = "Visual entailment", "tells whether the picture entails the sentence", "Judge"

    def inputs(self, picture, sentence):
        return [_picture(picture), gr.Textbox(sentence, label="Sentence"), *self.heat_switch()]

    def outputs(self):
        return [gr.Label(label="Judgement"), *self.heat_picture()]

    def examples(self):
        rows = shapes_dataset("entailment", "test", EXAMPLES, image_size=EXAMPLE_SIZE)
        return [[row["image"], row["sentence"]] for row in rows]

    def run(self, picture: Image.Image, sentence: str, heat: bool = False) -> Values:
        _check_picture(picture)
        found = self.pipe(picture, _text(sentence, "a sentence"), return_heatmap=heat)
        return [found["probabilities"], *self._drawn(picture, found)]


class Reasoning(Panel):
    title, does, button = "Visual reasoning", "tells whether the sentence is true of both pictures", "Judge"

    def inputs(self, left, right, sentence):
        with gr.Row():
            pictures = [_picture(left, "Left picture"), _picture(right, "Right picture")]
        return [*pictures, gr.Textbox(sentence, label="Sentence"), *self.heat_switch()]

    def outputs(self):
        return [gr.Label(label="Judgement"), *self.heat_picture()]

    def examples(self):
        rows = shapes_dataset("pairs", "test", EXAMPLES, image_size=EXAMPLE_SIZE)
        return [[*row["images"], row["sentence"]] for row in rows]

    def run(self, left: Image.Image, right: Image.Image, sentence: str, heat: bool = False) -> Values:
        _check_picture(left, "the left picture")
        _check_picture(right, "the right picture")
        found = self.pipe([left, right], _text(sentence, "a sentence"), return_heatmap=heat)
        values = [found["probabilities"]]
        if self.has_heatmap:
            drawn = [
                draw_heatmap(*pair) for pair in zip((left, right), found.get("heatmap", ()), strict=False)
            ]
            values.append(draw_sheet(list(zip(("left", "right"), drawn, strict=True))) if heat else None)
        return values


class Grounding(Panel):
    title, does, button = "Grounding", "finds what a phrase refers to", "Find"

    def inputs(self, picture, lines):
        components = [_picture(picture), gr.Textbox(lines, label="Phrases", info=LINES, lines=3)]
        return [*components, *self.heat_switch(isinstance(self.pipe.model, HeatmapHead))]

    def outputs(self):
        score = ["match" if name == "probability" else name for name in self._score()]
        return [_result("Found"), _table(["phrase", "x1", "y1", "x2", "y2", *score], first=40)]

    def examples(self):
        rows = shapes_dataset("regions", "test", EXAMPLES, image_size=EXAMPLE_SIZE)
        phrases = ([f"the {phrase.removeprefix('a ')}" for phrase in row["phrases"]] for row in rows)
        return [[row["image"], "\n".join(lines)] for row, lines in zip(rows, phrases, strict=True)]

    def run(self, picture: Image.Image, phrases: str, heat: bool = False) -> Values:
        _check_picture(picture)
        texts = _lines(phrases)
        _text(phrases, "a phrase")
        found = self.pipe([picture] * len(texts), texts, return_heatmap=heat)
        for each in found:
            each["image"] = 0
        rows = [
            [each["text"], *map(round, each["box"]), *(f"{each[name]:.2f}" for name in self._score())]
            for each in found
        ]
        drawn = draw_located([picture], found)
        if len(drawn) == 1:
            return [drawn[0], rows]
        return [draw_sheet(list(zip(texts, drawn, strict=True)), columns=3), rows]

    def _score(self) -> list[str]:
        """What heads tell beside the box."""
        if isinstance(self.pipe.model, HeatmapHead):
            return ["probability"]
        return ["score"] if hasattr(self.pipe.model.config, "visual_feat_dim") else []


class Retrieval(Panel):
    title, does, button = "Retrieval", "ranks texts by how well they fit pictures", "Compare"

    def inputs(self, examples, lines):
        pictures = gr.Gallery(
            examples,
            label="Pictures",
            type="filepath",
            interactive=True,
            columns=3,
            height=HEIGHT,
            file_types=["image"],
            elem_classes="gallery",
        )
        return [pictures, gr.Textbox(lines, label="Texts", info=LINES, lines=3), *self.heat_switch()]

    def outputs(self):
        best = gr.Gallery(
            label="The best text of each picture",
            interactive=False,
            columns=2,
            height=HEIGHT,
            format="png",
            elem_classes="gallery",
        )
        return [best, _table(["text", "picture", "match", *self._cosine()], first=46)]

    def examples(self):
        rows = shapes_dataset("captions", "test", 2 * EXAMPLES, image_size=EXAMPLE_SIZE)
        pictures, texts = [row["image"] for row in rows], [row["caption"] for row in rows]
        return [[pictures[i : i + 2], "\n".join(texts[i : i + 2])] for i in range(0, len(texts), 2)]

    def run(self, pictures: Sequence[tuple[str, Any]], texts: str, heat: bool = False) -> Values:
        if not pictures:
            raise ValueError("Add a picture first.")
        _text(texts, "a text")
        images = [ImageOps.exif_transpose(load_image(path)) for path, _ in pictures]
        found = self.pipe(images, _lines(texts), return_heatmap=heat)
        drawn, rows = [], []
        for place, (image, of_image) in enumerate(zip(images, found, strict=True), 1):
            best = of_image["texts"][0]
            image = draw_heatmap(image, best["heatmap"]) if heat else image
            drawn.append((image, f"{place}: {best['text']}"))
            for each in of_image["texts"]:
                cosine = [f"{each[name]:.2f}" for name in self._cosine()]
                rows.append([each["text"], place, f"{each['probability']:.3f}", *cosine])
        return [drawn, rows]

    def _cosine(self) -> list[str]:
        """Of models whose features can be compared."""
        return ["cosine"] if hasattr(self.pipe.model.config, "projection_dim") else []


class Captioning(Panel):
    title, does, button = "Captioning", "writes what is in the picture", "Describe"

    def inputs(self, picture):
        return [
            _picture(picture),
            gr.Textbox(label="Begin with (optional)", info="a prompt in place of the model's own"),
            gr.Slider(1, 10, 3, step=1, label="Beams", info="more read further ahead, and take longer"),
        ]

    def outputs(self):
        return [gr.Textbox(label="Caption", lines=2, interactive=False)]

    def examples(self):
        rows = shapes_dataset("captions", "test", EXAMPLES, image_size=EXAMPLE_SIZE)
        return [[row["image"]] for row in rows]

    def run(self, picture: Image.Image, prompt: str = "", beams: int = 3) -> Values:
        _check_picture(picture)
        return [self.pipe(picture, (prompt or "").strip() or None, num_beams=int(beams))["caption"]]


PANELS: dict[str, type[Panel]] = {  # by pipeline; features are numbers, which retrieval compares
    "visual-grounding": Grounding,
    "visual-question-answering": QuestionAnswering,
    "image-text-retrieval": Retrieval,
    "image-captioning": Captioning,
    "visual-entailment": Entailment,
    "visual-reasoning": Reasoning,
}


# Components


def _picture(value: Image.Image, label: str = "Picture") -> gr.Image:
    picture = gr.Image(
        value, type="pil", format="png", label=label, height=HEIGHT, sources=["upload", "clipboard", "webcam"]
    )
    read = picture.preprocess

    def preprocess(payload):
        try:
            return read(payload)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            message = f"{label} cannot be read; give another, such as a PNG or JPEG file."
            raise gr.Error(message, title=NOTE, print_exception=False) from error

    picture.preprocess = preprocess  # gradio writes a .pyi file beside each subclass of its components
    return picture


def _result(label: str) -> gr.Image:
    return gr.Image(
        label=label, height=HEIGHT, interactive=False, format="png", buttons=["download", "fullscreen"]
    )


def _table(headers: Sequence[str], first: int) -> gr.Dataframe:
    """Numbers behind texts, which take the `first` percents of its width."""
    rest = len(headers) - 1
    widths = [f"{first}%", *[f"{(100 - first) / rest:.1f}%"] * rest]
    return gr.Dataframe(
        headers=list(headers), label="Numbers", interactive=False, wrap=True, column_widths=widths
    )


# What a person gave

NOTE = "This does not work"  # above messages


def _check_picture(picture: Image.Image | None, name: str = "a picture"):
    if picture is None:
        raise ValueError(f"Add {name} first.")


def _text(text: str | None, name: str) -> str:
    if not (text or "").strip():
        raise ValueError(f"Write {name} first.")
    return text.strip()


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
