"""Synthetic scenes: drawn pixels against boxes, every text against an evaluator that reads words only."""

import json
import pickle
import re
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageChops
from torch.utils.data import DataLoader

from hf_vlp.data import shapes
from hf_vlp.data.scenes import COLOURS, LEVELS, SHAPES, Scene, draw, make_scene
from hf_vlp.data.shapes import QUESTION_TYPES, SPLITS, TASKS, shapes_dataset, vocabulary
from hf_vlp.data.task_readers import ENTAILMENT_LABELS
from hf_vlp.models.region_extractors import crop_features
from hf_vlp.models.regions import stack_regions

levels = st.sampled_from(sorted(LEVELS))
seeds = st.integers(0, 2**40)
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3}
OPPOSITE_AXES = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}


# The evaluator: a scene as a list of word sets with a row and a column


def words_of(scene: Scene) -> list[dict]:
    level = scene.level
    return [
        {
            "words": {
                level.shapes[item.kind.shape],
                level.colours[item.kind.colour],
                level.sizes[item.kind.size][0],
            },
            "cell": divmod(item.cell, level.grid),
            "box": list(item.box(48)),
        }
        for item in scene.objects
    ]


def place_of(cell: tuple[int, int], grid: int) -> str:
    vertical = {0: "top", grid - 1: "bottom"}.get(cell[0], "")
    horizontal = {0: "left", grid - 1: "right"}.get(cell[1], "")
    return " ".join(word for word in (vertical, horizontal) if word) or "middle"


def matching(objects: list[dict], description: str) -> list[dict]:
    """Objects of which every word but articles and "shape" is true."""
    singular = {"crosses": "cross"} | {f"{shape}s": shape for shape in SHAPES}
    wanted = {singular.get(word, word) for word in description.split()} - {"a", "the", "shape", "shapes"}
    return [item for item in objects if wanted <= item["words"]]


def related(objects: list[dict], description: str, relation: str, anchor: str) -> list[dict]:
    axis, sign = OPPOSITE_AXES[relation]
    (other,) = matching(objects, anchor)
    return [
        item
        for item in matching(objects, description)
        if sign * (item["cell"][axis] - other["cell"][axis]) > 0
    ]


def split_place(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.*?)((?: (?:top|bottom|left|right|middle))+)", text)
    return found[1], found[2].strip()


def at_place(objects: list[dict], text: str, grid: int) -> list[dict]:
    description, place = split_place(text)
    return [item for item in matching(objects, description) if place_of(item["cell"], grid) == place]


def is_caption_true(scene: Scene, caption: str) -> bool:
    objects, parts = words_of(scene), caption.split(" and ")
    found = [at_place(objects, part, scene.level.grid) for part in parts]
    return len(parts) == len(objects) and all(len(item) == 1 for item in found)


def rows_of(task: str, split: str, num_rows: int, level: int) -> list[dict]:
    """Rows with the scene in place of the image."""
    dataset = shapes_dataset(task, split, num_rows, level=level)
    numbers = dataset.data.column(0).to_pylist()
    return [shapes._row(task, level, 48, number) for number in numbers]


def each_level_and_split(function):
    function = pytest.mark.parametrize("split", ["train", "test", "test_heldout"])(function)
    return pytest.mark.parametrize("level", sorted(LEVELS))(function)


def assert_balanced(values: list, tolerance: int = 1) -> None:
    counts = Counter(values)
    assert len(counts) > 1
    assert max(counts.values()) - min(counts.values()) <= tolerance


# Scenes and drawing


@settings(max_examples=60, deadline=None)
@given(level=levels, seed=seeds, image_size=st.integers(36, 130), supersampling=st.integers(1, 4))
def test_boxes_are_tight_and_apart(level, seed, image_size, supersampling):
    scene = make_scene(level, seed)
    taken = np.zeros((image_size, image_size), dtype=int)
    empty = draw(Scene(scene.level, (), scene.background), image_size, supersampling)
    for item in scene.objects:
        x, y, width, height = item.box(image_size)
        alone = draw(Scene(scene.level, (item,), scene.background), image_size, supersampling)
        drawn = ImageChops.difference(alone, empty).getbbox()
        assert np.abs(np.subtract(drawn, (x, y, x + width, y + height))).max() <= 1
        assert 0 <= x and x + width <= image_size and 0 <= y and y + height <= image_size
        taken[y : y + height, x : x + width] += 1
        assert alone.getpixel((x + width // 2, y + height // 2)) == item.fill
    assert taken.max() == 1


@settings(max_examples=60, deadline=None)
@given(level=levels, seed=seeds, held_out=st.booleans())
def test_scene_follows_its_level(level, seed, held_out):
    scene = make_scene(level, seed, held_out)
    kinds = [item.kind for item in scene.objects]
    assert len(kinds) in scene.level.num_objects
    assert len(set(kinds)) == len(kinds)
    assert [item.cell for item in scene.objects] == sorted({item.cell for item in scene.objects})
    assert any(kind.is_held_out for kind in kinds) == held_out
    assert 0 < scene.identity < 2**63
    assert scene == make_scene(level, seed, held_out)


def test_objects_nearly_fill_their_cells():
    sides = [item.side * LEVELS[0].grid for seed in range(200) for item in make_scene(0, seed).objects]
    assert 0.75 <= min(sides) and max(sides) <= 0.95


def test_covered_cell_hides_what_is_there():
    row = rows_of("entailment", "train", 1, 0)[0]
    image = np.asarray(draw(row["image"], 48))
    y, x = (24 * index for index in divmod(row["image"].covered_cell, 2))
    assert len(np.unique(image[y : y + 24, x : x + 24])) == 1


# Truth of the texts


@each_level_and_split
def test_captions_describe_their_scene_and_image_ids_tell_captions_apart(level, split):
    rows = rows_of("captions", split, 400, level)
    assert all(is_caption_true(row["image"], row["caption"]) for row in rows)
    by_id: dict = {}
    for row in rows:
        by_id.setdefault(row["image_id"], set()).add(frozenset(row["caption"].split(" and ")))
    assert all(len(captions) == 1 for captions in by_id.values())
    assert len(set.union(*by_id.values())) == len(by_id)


@each_level_and_split
def test_regions_name_their_objects(level, split):
    dataset = shapes_dataset("regions", split, 100, level=level)
    for row, scene_row in zip(dataset, rows_of("regions", split, 100, level), strict=True):
        objects = words_of(scene_row["image"])
        assert is_caption_true(scene_row["image"], row["caption"])
        found = [matching(objects, phrase) for phrase in row["phrases"]]
        assert [[item["box"] for item in items] for items in found] == [[box] for box in row["boxes"]]
        for [item], shape, colour in zip(found, row["object_ids"], row["attribute_ids"], strict=True):
            assert {SHAPES[shape], list(COLOURS)[colour]} < item["words"]


@each_level_and_split
def test_referring_expressions_fit_one_object(level, split):
    forms = set()
    for row in rows_of("grounding", split, 300, level):
        objects, text = words_of(row["image"]), row["text"]
        relation = re.fullmatch(r"(.*) (left of|right of|above|below) (.*)", text)
        if relation:
            found = related(objects, *relation.groups())
        elif re.search("top|bottom|left|right|middle", text):
            found = at_place(objects, text, row["image"].level.grid)
        else:
            found = matching(objects, text)
        assert [tuple(item["box"]) for item in found] == [row["box"]]
        assert [tuple(item["box"]) for item in objects] == list(row["candidates"])
        forms.add("relation" if relation else len(text.split()))
    assert len(forms) == [1, 3, 4][level]


def test_box_of_a_random_object_is_an_honest_baseline():
    rows = rows_of("grounding", "test", 2000, 0)
    assert np.mean([1 / len(row["candidates"]) for row in rows]) == pytest.approx(0.42, abs=0.02)
    assert np.mean([row["candidates"].index(row["box"]) == 0 for row in rows]) == pytest.approx(
        0.42, abs=0.04
    )


def answer_of(scene: Scene, question: str) -> str:
    objects = words_of(scene)
    if found := re.fullmatch("is there (.*)", question):
        return "yes" if matching(objects, found[1]) else "no"
    if found := re.fullmatch("how many (.*) are there", question):
        return list(NUMBERS)[len(matching(objects, found[1]))]
    if found := re.fullmatch("which (colour|shape) is (?:the )?(.*)", question):
        (item,) = matching(objects, found[2])
        return (item["words"] & set(COLOURS if found[1] == "colour" else SHAPES)).pop()
    found = re.fullmatch("is (.*) (left of|right of|above|below) (.*)", question)
    return "yes" if related(objects, *found.groups()) else "no"


@each_level_and_split
def test_answers_are_right_and_balanced(level, split):
    rows = rows_of("questions", split, 600, level)
    assert all(row["answers"] == (answer_of(row["image"], row["question"]),) for row in rows)
    assert_balanced([row["question_type"] for row in rows])
    for question_type in QUESTION_TYPES:
        assert_balanced([row["answers"] for row in rows if row["question_type"] == question_type])


def test_relation_questions_are_never_close_calls():
    """No question is answered by "no" because two objects share a row or column."""
    for row in rows_of("questions", "train", 500, 1):
        if found := re.fullmatch("is (the .*) (left of|right of|above|below) (.*)", row["question"]):
            opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
            objects = words_of(row["image"])
            is_true = bool(related(objects, *found.groups()))
            assert is_true != bool(related(objects, found[1], opposite[found[2]], found[3]))


@each_level_and_split
def test_pair_sentences_are_labelled_right_and_balanced(level, split):
    rows = rows_of("pairs", split, 600, level)
    for row in rows:
        first, second = (words_of(scene) for scene in row["images"])
        if found := re.fullmatch("there is (.*) in (both images|exactly one image)", row["sentence"]):
            images = bool(matching(first, found[1])) + bool(matching(second, found[1]))
            truth = images == (2 if found[2] == "both images" else 1)
        else:
            noun = re.fullmatch("there are more (.*) in the first image than in the second", row["sentence"])[
                1
            ]
            truth = len(matching(first, noun)) > len(matching(second, noun))
        assert row["label"] is truth
    assert_balanced([row["label"] for row in rows])
    assert_balanced([(row["label"], re.search("both|one|more", row["sentence"])[0]) for row in rows])


def test_labels_of_entailment_are_those_of_the_readers():
    labels = (shapes.CONTRADICTION, shapes.NEUTRAL, shapes.ENTAILMENT)
    assert labels == tuple(map(ENTAILMENT_LABELS.index, ("contradiction", "neutral", "entailment")))


@each_level_and_split
def test_entailment_labels_are_right_and_balanced(level, split):
    rows = rows_of("entailment", split, 600, level)
    for row in rows:
        scene, text = row["image"], row["sentence"].removeprefix("there is ")
        objects, place = words_of(scene), split_place(text)[1]
        covered = divmod(scene.covered_cell, scene.level.grid)
        assert covered not in [item["cell"] for item in objects]
        if place == place_of(covered, scene.level.grid):
            assert row["label"] == shapes.NEUTRAL
            assert not matching(objects, split_place(text)[0])  # kinds never repeat, which would decide it
        elif at_place(objects, text, scene.level.grid):
            assert row["label"] == shapes.ENTAILMENT
        else:
            assert row["label"] == shapes.CONTRADICTION
            (there,) = [item for item in objects if place_of(item["cell"], scene.level.grid) == place]
            hidden_word = set() if level == 2 else {"large"}
            assert len({*split_place(text)[0].split()[1:], *hidden_word} - there["words"]) == 1
    assert_balanced([row["label"] for row in rows])


@each_level_and_split
def test_foils_are_false_by_one_word_and_plausible(level, split):
    changed = set()
    for row in rows_of("foils", split, 400, level):
        caption, foil = row["caption"].split(), row["foil"].split()
        assert is_caption_true(row["image"], row["caption"]) and not is_caption_true(
            row["image"], row["foil"]
        )
        [(word, other)] = [(a, b) for a, b in zip(caption, foil, strict=True) if a != b]
        changed |= {word, other}
        parts = [split_place(part) for part in row["foil"].split(" and ")]
        assert len({name for name, _ in parts}) == len({place for _, place in parts}) == len(parts)
        if level == 0:
            order = [
                ("top left", "top right", "bottom left", "bottom right").index(place) for _, place in parts
            ]
            assert order == sorted(order)
    assert changed & set(COLOURS) and changed & set(SHAPES) and "left" in changed
    assert ("small" in changed) == (level == 2)


@pytest.mark.parametrize(("task", "bound"), [("entailment", 0.40), ("pairs", 0.56)])
def test_labels_cannot_be_told_from_the_text(task, bound):
    by_text: dict = {}
    rows = rows_of(task, "train", 6000, 0)
    for row in rows:
        by_text.setdefault(row["sentence"], Counter())[row["label"]] += 1
    assert sum(max(counts.values()) for counts in by_text.values()) / len(rows) < bound


# Datasets


@pytest.mark.parametrize("level", sorted(LEVELS))
def test_retrieval_scenes_are_all_different(level):
    rows = rows_of("retrieval", "test", 300, level)
    descriptions = [frozenset(row["caption"][0].split(" and ")) for row in rows]
    assert len(set(descriptions)) == len(rows)
    for row in rows:
        assert len(set(row["caption"])) == len(row["caption"]) == (1 if level == 0 else 2)
        assert all(is_caption_true(row["image"], caption) for caption in row["caption"])
    assert shapes_dataset("retrieval", "train", 1, level).column_names == ["image", "caption", "image_id"]
    assert shapes_dataset("retrieval", "test", 1, level).column_names == ["image", "caption"]


def test_splits_are_disjoint_and_shared_by_tasks():
    positions = [position for split in SPLITS.values() for position in (split[0], split[-1])]
    assert positions == sorted(set(positions))
    train = shapes_dataset("captions", "train", 50)
    assert train["caption"][:] == shapes_dataset("regions", "train", 50)["caption"][:]
    assert train["caption"][:] != shapes_dataset("captions", "validation", 50)["caption"][:]
    assert train["caption"][:] != shapes_dataset("captions", "train", 50, seed=1)["caption"][:]
    assert train["caption"][:] == shapes_dataset("captions", "train", 80)["caption"][:50]


def texts_of(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for item in value for text in texts_of(item)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", sorted(LEVELS))
def test_held_out_kinds_are_seen_and_named_in_their_split_only(task, level):
    held_out = {f"{colour} {shape}" for colour, shape in zip(COLOURS, LEVELS[level].shapes, strict=False)}
    for split in SPLITS:
        for row in rows_of(task, split, 150, level):
            scenes = row["images"] if task == "pairs" else [row["image"]]
            is_shown = any(item.kind.is_held_out for scene in scenes for item in scene.objects)
            is_named = any(pair in text for text in texts_of(list(row.values())) for pair in held_out)
            if split == "test_heldout":
                assert is_shown or is_named
            else:
                assert not is_shown and not is_named


def test_rows_are_the_same_everywhere():
    """A digest over every task: a change of it silently changes every number reported on this data."""
    digests = []
    for level in LEVELS:
        rows = [row for task in TASKS for split in SPLITS for row in rows_of(task, split, 20, level)]
        texts = [{key: value for key, value in row.items() if key not in ("image", "images")} for row in rows]
        boxes = [[item.box(48) for item in row["image"].objects] for row in rows if "image" in row]
        digests.append(sha256(json.dumps([texts, boxes]).encode()).hexdigest()[:8])
    assert digests == ["de746380", "7a00f773", "dc359fe9"]


@pytest.mark.parametrize("task", TASKS)
def test_rows_can_be_streamed_selected_and_pickled(task):
    dataset = shapes_dataset(task, "test", 10, level=1)
    rows = [dataset[i] for i in range(10)]
    assert list(dataset.to_iterable_dataset()) == rows
    assert list(dataset.to_iterable_dataset(num_shards=3)) == rows
    assert dataset.__getitems__([7, 2]) == [rows[7], rows[2]]
    assert pickle.loads(pickle.dumps(dataset))[4] == rows[4]
    assert dataset.select([3]).shuffle(seed=0)[0] == rows[3]
    images = rows[0]["images"] if task == "pairs" else [rows[0]["image"]]
    assert all(image.size == (48, 48) and image.mode == "RGB" for image in images)


@pytest.mark.parametrize("task", TASKS)
def test_regions_are_the_objects_of_the_scene(task):
    dataset = shapes_dataset(task, "test", 6, level=2, image_size=60, regions=True)
    plain = shapes_dataset(task, "test", 6, level=2, image_size=60)
    assert dataset.column_names == [*plain.column_names, "regions"]
    for number, row in zip(dataset.data.column(0).to_pylist(), dataset, strict=True):
        scenes = shapes._row(task, 2, 60, number)
        scenes = scenes["images"] if task == "pairs" else [scenes["image"]]
        regions = row["regions"] if task == "pairs" else [row["regions"]]
        images = row["images"] if task == "pairs" else [row["image"]]
        assert len(regions) == len(scenes)
        for scene, region, image in zip(scenes, regions, images, strict=True):
            boxes = np.array([item.box(60) for item in scene.objects])
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            np.testing.assert_allclose(region["boxes"] * 60, corners, atol=1e-5)
            assert region["object_ids"].tolist() == [item.kind.shape for item in scene.objects]
            assert region["attribute_ids"].tolist() == [item.kind.colour for item in scene.objects]
            assert region["image_size"].tolist() == [60, 60]
            np.testing.assert_array_equal(region["features"], crop_features(image, boxes).numpy())
            for name in ("object_scores", "attribute_scores"):
                assert region[name].tolist() == [1.0] * len(boxes)
    assert stack_regions(regions).features.shape[2] == 48


def test_a_covered_cell_is_no_region():
    for row in shapes_dataset("entailment", "train", 20, regions=True):
        grey = np.array([120, 120, 120]) / 255
        assert (
            not np.isclose(row["regions"]["features"].reshape(-1, 16, 3), grey, atol=1e-3).all((1, 2)).any()
        )


def test_images_are_drawn_once_for_their_regions(monkeypatch):
    drawn = []
    monkeypatch.setattr(shapes, "draw", lambda *args: drawn.append(args) or draw(*args))
    dataset = shapes_dataset("captions", "train", 5, seed=77, regions=True)
    first, again = (dataset.select_columns("regions")[:]["regions"] for _ in range(2))
    assert len(drawn) == 5
    first[0]["features"][:] = -1
    assert (dataset[0]["regions"]["features"] == again[0]["features"]).all()


def test_regions_reach_streams_selections_and_pickles():
    dataset = shapes_dataset("pairs", "train", 6, regions=True)
    expected = dataset[3]["regions"][1]["features"]
    streamed = list(dataset.to_iterable_dataset(num_shards=2))[3]
    for row in (streamed, dataset.select([3])[0], pickle.loads(pickle.dumps(dataset))[3]):
        np.testing.assert_array_equal(row["regions"][1]["features"], expected)


def test_rows_reach_the_workers_of_a_loader():
    dataset = shapes_dataset("grounding", "train", 20)
    for source in (dataset, dataset.to_iterable_dataset(num_shards=2)):
        loader = DataLoader(source, batch_size=5, num_workers=2, collate_fn=list)
        texts = [row["text"] for rows in loader for row in rows]
        assert sorted(texts) == sorted(dataset["text"][:])


def test_derived_datasets_keep_their_columns(tmp_path):
    dataset = shapes_dataset("captions", "train", 30)
    longer = dataset.map(lambda row: {"num_words": len(row["caption"].split())})
    assert longer[3]["image"] == dataset[3]["image"] and longer[3]["num_words"] in (11, 17)
    red = dataset.filter(lambda row: "red" in row["caption"])
    assert 0 < len(red) < 30 and all("red" in caption for caption in red["caption"])
    dataset.save_to_disk(tmp_path)
    assert load_from_disk(tmp_path)[5] == dataset[5]


def test_columns_are_read_without_drawing(monkeypatch):
    monkeypatch.setattr(shapes, "draw", None)
    assert len(shapes_dataset("captions", "train", 5)["caption"][:]) == 5


def test_changing_a_row_leaves_the_dataset_alone():
    dataset = shapes_dataset("regions", "train", 1)
    row, again = dataset[0], dataset[0]
    row["boxes"][0][0] = -1
    row["image"].putpixel((0, 0), (1, 2, 3))
    assert dataset[0] == again


def test_vocabulary_is_exactly_what_texts_use():
    words = vocabulary()
    assert words == sorted(set(words)) and len(words) < 60
    used = set()
    for level in LEVELS:
        for task in TASKS:
            for split in ("train", "test", "test_heldout"):
                for row in rows_of(task, split, 300, level):
                    texts = texts_of([value for column, value in row.items() if column != "question_type"])
                    assert max((len(text.split()) for text in texts), default=0) <= 40
                    used.update(word for text in texts for word in text.split())
    assert used == set(words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "caption"}, "task is 'caption'; choose one of captions, regions"),
        ({"split": "val"}, "split is 'val'; choose one of train"),
        ({"level": 3}, "level is 3; choose one of 0, 1, 2"),
        ({"num_rows": 0}, "num_rows is 0"),
        ({"split": "test", "num_rows": 100_001}, "num_rows is 100001; split 'test' has 1 to 100000 rows"),
        ({"level": 1, "image_size": 35}, "image_size is 35; a 3x3 grid needs at least 36"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "give an integer from 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shapes_dataset(**{"task": "captions", "split": "train", "num_rows": 4} | change)


def test_running_out_of_different_scenes_is_told(monkeypatch):
    monkeypatch.setitem(SPLITS, "test", range(10_100_000, 10_100_200))
    with pytest.raises(ValueError, match="a caption can tell apart; ask for fewer rows"):
        shapes_dataset("retrieval", "test", 200)


def test_bad_drawing_arguments_are_named():
    scene = make_scene(0, 1)
    with pytest.raises(ValueError, match="image_size is 20"):
        draw(scene, 20)
    with pytest.raises(ValueError, match="supersampling is 0"):
        draw(scene, 48, 0)
    with pytest.raises(ValueError, match="level is 9"):
        make_scene(9, 1)
