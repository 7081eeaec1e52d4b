"""Datasets of synthetic scenes for every task: made in memory from seeds, without files or network.

Every text is lower-case words without punctuation, true or false of its scene by construction. Answers and
labels take turns from row to row, and false statements are worded like true ones, so the text alone tells
only what the held-out combinations rule out. These scenes exercise models and tools and are no benchmark.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features
from datasets.features.features import register_feature

from ..models.crops import crop_features
from .scenes import (
    COLOURS,
    LEVELS,
    RELATIONS,
    SHAPES,
    Kind,
    Level,
    Scene,
    check_image_size,
    check_level,
    compose,
    draw,
    make_scene,
    pick,
    sample,
    split_kinds,
)

SPLITS = {  # disjoint ranges of scene numbers, the same for every task and level
    "train": range(0, 10_000_000),
    "validation": range(10_000_000, 10_100_000),
    "test": range(10_100_000, 10_200_000),
    "test_heldout": range(10_200_000, 10_300_000),
}
QUESTION_TYPES = ("exists", "count", "colour", "shape", "relation")
CONTRADICTION, NEUTRAL, ENTAILMENT = range(3)  # ALBEF's order

SHAPE, COLOUR = 0, 1  # positions in `Kind`
_ANSWERS = ("no", "yes")
_NUMBERS = ("zero", "one", "two", "three")
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_FIXED_WORDS = (
    "a above and are below both bottom colour exactly first how image images in is left many middle more no"
    " of one right second shape shapes than the there three top two which yes zero"
)
_SEED_STRIDE = 2**32  # scene numbers of one seed; with seeds below 2^31 all fit in 64 bits
_CACHED_ROWS = 4096  # the columns of a batch are decoded one after another, each from the same rows

Row = dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """What scenes of one level and one group of splits are made of."""

    level: Level
    image_size: int
    subjects: tuple[Kind, ...]  # kinds that texts are about
    fill: tuple[Kind, ...]  # kinds that fill up a scene
    neighbours: dict[Kind, list[Kind]]  # kinds of `fill` that differ in one attribute

    def scene(
        self,
        random: Random,
        *include: Kind,
        without: Callable[[Kind], bool] | None = None,
        has_cover: bool = False,
    ) -> Scene:
        """A scene with the kinds of `include` (if none, a subject), filled up with others than `without`."""
        fill = [kind for kind in self.fill if not without(kind)] if without else self.fill
        return compose(random, self.level, include or [pick(random, self.subjects)], fill, has_cover)

    def scene_with(self, random: Random, kind: Kind, is_there: bool) -> Scene:
        """A scene with or without `kind`, in both cases with one that resembles it."""
        neighbour = pick(random, self.neighbours[kind])
        include = (kind, neighbour) if is_there else (neighbour,)
        return self.scene(random, *include, without=lambda other: other == kind)

    def scene_with_count(self, random: Random, kind: Kind, attribute: int, count: int) -> Scene:
        """A scene with `count` objects that share this attribute (a position in `Kind`) with `kind`."""
        alike = [other for other in self.fill if other[attribute] == kind[attribute] and other != kind]
        include = [kind, *sample(random, alike, count - 1)] if count else []
        unlike = [other for other in self.subjects if other[attribute] != kind[attribute]]
        return self.scene(
            random,
            *(include or [pick(random, unlike)]),
            without=lambda other: other[attribute] == kind[attribute],
        )

    def noun(self, kind: Kind, attribute: int) -> str:
        """Plural for the objects that share this attribute, such as "circles" or "red shapes"."""
        if attribute == COLOUR:
            return f"{self.level.colours[kind.colour]} shapes"
        return _plural(self.level.shapes[kind.shape])


@lru_cache
def _source(level: int, is_held_out: bool, image_size: int) -> _Source:
    subjects, fill = split_kinds(LEVELS[level], is_held_out)
    neighbours = {kind: [other for other in fill if other.differs_by_one(kind)] for kind in fill}
    return _Source(LEVELS[level], image_size, subjects, fill, neighbours)


# Texts


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _caption(level: Level, objects: Sequence[tuple[Kind, int]]) -> str:
    return " and ".join(f"a {level.name(kind)} {level.place(cell)}" for kind, cell in objects)


def _in_caption_order(random: Random, scene: Scene) -> list[tuple[Kind, int]]:
    """Kind and cell of each object."""
    objects = [(item.kind, item.cell) for item in scene.objects]
    return objects if scene.level.in_reading_order else sample(random, objects, len(objects))


def _boxes(source: _Source, scene: Scene) -> tuple[tuple[int, ...], ...]:
    return tuple(item.box(source.image_size) for item in scene.objects)


def _references(level: Level, scene: Scene, kind: Kind) -> dict[str, list[str]]:
    """Expressions by form, each true of the object of this kind and of no other in the scene."""
    target, objects = scene.find(kind), scene.objects
    shape, colour = level.shapes[kind.shape], level.colours[kind.colour]
    same_shape = [item for item in objects if item.kind.shape == kind.shape]
    same_colour = [item for item in objects if item.kind.colour == kind.colour]
    return {
        "name": [f"the {level.name(kind)}"],
        "shape": [f"the {shape}"] if same_shape == [target] else [],
        "colour": [f"the {colour} shape"] if same_colour == [target] else [],
        "place": [f"the shape {level.place(target.cell)}"],
        "relation": [
            f"the {shape} {relation} the {level.name(anchor.kind)}"
            for anchor in objects
            for relation in RELATIONS
            if [item for item in same_shape if level.holds(relation, item.cell, anchor.cell)] == [target]
        ],
    }


# Rows of each task. Images are scenes here and lists are tuples, until `ShapesColumn` hands them out.


def _captions(source: _Source, random: Random, number: int) -> Row:
    scene = source.scene(random)
    caption = _caption(source.level, _in_caption_order(random, scene))
    return {"image": scene, "caption": caption, "image_id": scene.identity}


def _retrieval_evaluation(source: _Source, random: Random, number: int) -> Row:
    scene = source.scene(random)
    objects = _in_caption_order(random, scene)
    orders = [objects] if source.level.in_reading_order else [objects, objects[::-1]]
    return {"image": scene, "caption": tuple(_caption(source.level, order) for order in orders)}


def _regions(source: _Source, random: Random, number: int) -> Row:
    scene = source.scene(random)
    return {
        "image": scene,
        "caption": _caption(source.level, _in_caption_order(random, scene)),
        "phrases": tuple(f"a {source.level.name(item.kind)}" for item in scene.objects),
        "boxes": _boxes(source, scene),
        "object_ids": tuple(item.kind.shape for item in scene.objects),
        "attribute_ids": tuple(item.kind.colour for item in scene.objects),
    }


def _grounding(source: _Source, random: Random, number: int) -> Row:
    scene = source.scene(random)
    target = pick(random, [item for item in scene.objects if item.kind in source.subjects])
    references = _references(source.level, scene, target.kind)
    form = pick(random, [form for form in source.level.references if references[form]])
    return {
        "image": scene,
        "text": pick(random, references[form]),
        "box": target.box(source.image_size),
        "ref_id": number,
        "candidates": _boxes(source, scene),
    }


def _questions(source: _Source, random: Random, number: int) -> Row:
    turn, question_type = number // len(QUESTION_TYPES), QUESTION_TYPES[number % len(QUESTION_TYPES)]
    level, subject = source.level, pick(random, source.subjects)
    is_yes = turn % 2 == 1
    if question_type == "exists":
        scene = source.scene_with(random, subject, is_yes)
        question, answer = f"is there a {level.name(subject)}", _ANSWERS[is_yes]
    elif question_type == "count":
        count = turn % min(max(level.num_objects), len(_NUMBERS))
        attribute = pick(random, (SHAPE, COLOUR))
        scene = source.scene_with_count(random, subject, attribute, count)
        question, answer = f"how many {source.noun(subject, attribute)} are there", _NUMBERS[count]
    elif question_type == "relation":
        scene = source.scene(random, subject)
        other = pick(random, [item for item in scene.objects if item.kind != subject])
        cell = scene.find(subject).cell
        relation = pick(random, [name for name in RELATIONS if level.holds(name, cell, other.cell)])
        asked = relation if is_yes else _OPPOSITES[relation]
        question = f"is the {level.name(subject)} {asked} the {level.name(other.kind)}"
        answer = _ANSWERS[is_yes]
    else:  # one attribute is asked of the only object with this value of the other
        asked, given = (COLOUR, SHAPE) if question_type == "colour" else (SHAPE, COLOUR)
        values = sorted({kind[asked] for kind in source.subjects})
        value = values[turn % len(values)]
        subject = pick(random, [kind for kind in source.subjects if kind[asked] == value])
        scene = source.scene(random, subject, without=lambda other: other[given] == subject[given])
        shape, colour = level.shapes[subject.shape], level.colours[subject.colour]
        question, answer = (
            (f"which colour is the {shape}", colour)
            if question_type == "colour"
            else (f"which shape is {colour}", shape)
        )
    return {
        "image": scene,
        "question": question,
        "answers": (answer,),
        "question_id": number,
        "question_type": question_type,
    }


def _pairs(source: _Source, random: Random, number: int) -> Row:
    turn, template = divmod(number, 3)
    label, subject = turn % 2 == 1, pick(random, source.subjects)
    if template < 2:
        is_both = template == 0
        sentence = (
            f"there is a {source.level.name(subject)} in {'both images' if is_both else 'exactly one image'}"
        )
        if label == is_both:  # the subject is in both images or, where "one" is false, in neither
            presence = [is_both or pick(random, (False, True))] * 2
        else:
            presence = sample(random, (False, True), 2)
        scenes = tuple(source.scene_with(random, subject, is_there) for is_there in presence)
    else:
        attribute = pick(random, (SHAPE, COLOUR))
        noun = source.noun(subject, attribute)
        sentence = f"there are more {noun} in the first image than in the second"
        possible = range(min(max(source.level.num_objects), len(_NUMBERS)))
        counts = sorted(sample(random, possible, 2), reverse=label)
        scenes = tuple(source.scene_with_count(random, subject, attribute, count) for count in counts)
    return {"images": scenes, "sentence": sentence, "label": label}


def _entailment(source: _Source, random: Random, number: int) -> Row:
    """One cell of each image is covered: what is said of it can neither be confirmed nor denied."""
    label, subject = number % 3, pick(random, source.subjects)
    neighbour = pick(random, source.neighbours[subject])
    include = (subject, neighbour) if label == ENTAILMENT else (neighbour,)
    scene = source.scene(random, *include, without=lambda kind: kind == subject, has_cover=True)
    cell = scene.covered_cell if label == NEUTRAL else scene.find(include[0]).cell
    sentence = f"there is a {source.level.name(subject)} {source.level.place(cell)}"
    return {"image": scene, "sentence": sentence, "label": label}


def _foils(source: _Source, random: Random, number: int) -> Row:
    """The foil is the caption of another possible scene, and differs from the true one in a single word."""
    level, scene = source.level, source.scene(random)
    objects = _in_caption_order(random, scene)
    index = pick(random, [i for i, (kind, _) in enumerate(objects) if kind in source.subjects])
    (kind, cell), kinds, cells = objects[index], *map(set, zip(*objects, strict=True))
    changes = [(other, cell) for other in source.neighbours[kind] if other not in kinds]
    changes += [(kind, other) for other in range(level.grid**2) if other not in cells]

    caption, foils = _caption(level, objects), {}
    for change in changes:
        altered = [*objects[:index], change, *objects[index + 1 :]]
        if level.in_reading_order and altered != sorted(altered, key=lambda item: item[1]):
            continue
        foil = _caption(level, altered)
        if (position := _only_changed_word(caption, foil)) is not None:
            foils.setdefault(position, []).append(foil)
    foil = pick(random, foils[pick(random, sorted(foils))])  # each word that can change equally often
    return {"image": scene, "caption": caption, "foil": foil}


def _only_changed_word(text: str, other: str) -> int | None:
    words, other_words = text.split(), other.split()
    if len(words) != len(other_words):
        return None
    changed = [i for i, (a, b) in enumerate(zip(words, other_words, strict=True)) if a != b]
    return changed[0] if len(changed) == 1 else None


_ROWS: dict[str, Callable[[_Source, Random, int], Row]] = {
    "captions": _captions,
    "regions": _regions,
    "retrieval": _captions,
    "grounding": _grounding,
    "questions": _questions,
    "pairs": _pairs,
    "entailment": _entailment,
    "foils": _foils,
}
TASKS = tuple(_ROWS)


@lru_cache(_CACHED_ROWS)
def _row(task: str, level: int, image_size: int, number: int) -> Row:
    position = number % _SEED_STRIDE
    source = _source(level, position in SPLITS["test_heldout"], image_size)
    is_evaluation = position not in SPLITS["train"]
    make_row = _retrieval_evaluation if task == "retrieval" and is_evaluation else _ROWS[task]
    return make_row(source, Random(number), number)


@lru_cache(_CACHED_ROWS)
def _features(scene: Scene, image_size: int) -> np.ndarray:
    """Of the objects of a scene (R, F)."""
    boxes = [item.box(image_size) for item in scene.objects]
    return crop_features(draw(scene, image_size), boxes).numpy()


def _region_row(scene: Scene, image_size: int) -> Row:
    """The objects as a perfect detector finds them, as `hf_vlp.models.regions` describes; all arrays new."""
    x, y, width, height = np.array([item.box(image_size) for item in scene.objects]).T
    return {
        "features": _features(scene, image_size).copy(),  # (R, F)
        "boxes": np.stack([x, y, x + width, y + height], axis=1).astype(np.float32) / image_size,  # (R, 4)
        "object_ids": np.array([item.kind.shape for item in scene.objects]),
        "object_scores": np.ones(len(scene.objects), dtype=np.float32),
        "attribute_ids": np.array([item.kind.colour for item in scene.objects]),
        "attribute_scores": np.ones(len(scene.objects), dtype=np.float32),
        "image_size": np.array([image_size, image_size]),
    }


# Datasets


@dataclass
class ShapesColumn:
    """Feature of a dataset: Arrow holds the number of a row's scene, reading it makes the column's value."""

    task: str
    column: str
    level: int
    image_size: int

    dtype: ClassVar[str] = "int64"
    pa_type: ClassVar[pa.DataType] = pa.int64()
    _type: str = field(default="ShapesColumn", init=False, repr=False)  # its name in stored features

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def decode_example(self, value: int, token_per_repo_id: dict | None = None) -> Any:
        row = _row(self.task, self.level, self.image_size, value)
        if self.column != "regions":
            return self._hand_out(row[self.column])
        if "images" in row:
            return [_region_row(scene, self.image_size) for scene in row["images"]]
        return _region_row(row["image"], self.image_size)

    def _hand_out(self, value: Any) -> Any:
        """Scenes become images and tuples new lists, so that no caller can change a cached row."""
        if isinstance(value, Scene):
            return draw(value, self.image_size)
        if isinstance(value, tuple):
            return [self._hand_out(item) for item in value]
        return value


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # "register_feature is experimental"
    register_feature(ShapesColumn, "ShapesColumn")  # lets datasets rebuild the features of derived tables


def shapes_dataset(
    task: str,
    split: str,
    num_rows: int,
    level: int = 0,
    image_size: int = 48,
    seed: int = 0,
    regions: bool = False,
) -> Dataset:
    """Rows of synthetic scenes, made whenever they are read.

    | task | columns |
    |---|---|
    | captions | image, caption (every object with its place), image_id (equal where captions say the same) |
    | regions | image, caption, phrases, boxes, object_ids (shapes), attribute_ids (colours) |
    | retrieval | train: as captions; other splits: image, caption (a list), no two scenes alike |
    | grounding | image, text (true of one object), box, ref_id, candidates (boxes of all objects) |
    | questions | image, question, answers, question_id, question_type (one of `QUESTION_TYPES`) |
    | pairs | images (two), sentence, label |
    | entailment | image with a covered cell, sentence, label 0 contradiction, 1 neutral, 2 entailment |
    | foils | image, caption, foil (false, one word differs) |

    Boxes are x, y, width, height in pixels; objects come in reading order. Captions, regions, grounding,
    foils and retrieval training show the same scenes in the same rows. In `test_heldout` every scene or text
    has a colour and shape that never occur together, in images or texts, in the other splits; what is about
    one object is about such an object.

    With `regions` rows of every task have the column regions too: the objects as a perfect detector would
    find them, with mean colours in a grid on each as features (R, 48), shapes as object_ids and colours as
    attribute_ids; a list of two for pairs. A covered cell is no region.

    The Arrow table holds only numbers, and the feature of each column makes its values from them. So a column
    is read without drawing images, and `to_iterable_dataset`, `select`, `shuffle`, `filter`, `map`, saving
    and pickling all work (datasets 5.2 refuses to stream a `with_transform`).

    Raises ValueError for an unknown task, split or level, an image too small for the level's grid, more rows
    than the split has (for retrieval: than it has different scenes), and a seed outside 0 to 2^31 - 1.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    check_level(level)
    check_image_size(LEVELS[level], image_size)
    if not 1 <= num_rows <= len(SPLITS[split]):
        raise ValueError(f"num_rows is {num_rows}; split {split!r} has 1 to {len(SPLITS[split])} rows")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed}; give an integer from 0 to {2**31 - 1}")

    start = seed * _SEED_STRIDE
    if task == "retrieval" and split != "train":
        positions = _distinct_positions(split, num_rows, level, start)
    else:
        positions = SPLITS[split][:num_rows]
    numbers = pa.array(start + np.asarray(positions, dtype=np.int64))
    columns = [*_row(task, level, image_size, numbers[0].as_py()), *(["regions"] if regions else [])]
    features = Features({column: ShapesColumn(task, column, level, image_size) for column in columns})
    table = pa.table({column: numbers for column in columns})
    return Dataset(table, info=DatasetInfo(features=features))


def _distinct_positions(split: str, num_rows: int, level: int, start: int) -> list[int]:
    """Where in the split the first `num_rows` scenes of different identity are."""
    positions: dict[int, int] = {}
    for position in SPLITS[split]:
        scene = make_scene(level, start + position, held_out=split == "test_heldout")
        positions.setdefault(scene.identity, position)
        if len(positions) == num_rows:
            return list(positions.values())
    raise ValueError(
        f"num_rows is {num_rows}; split {split!r} has only {len(positions)} scenes of level {level} that a"
        " caption can tell apart; ask for fewer rows or a higher level"
    )


def vocabulary() -> list[str]:
    """Every word that a text of any task and level can contain, sorted."""
    sizes = {name for level in LEVELS.values() if len(level.sizes) > 1 for name, *_ in level.sizes}
    return sorted({*_FIXED_WORDS.split(), *COLOURS, *SHAPES, *map(_plural, SHAPES), *sizes})
