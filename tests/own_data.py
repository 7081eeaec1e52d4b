"""A user's own data in small: drawn scenes as files, annotated in the official layouts."""

import json
import pickle
from pathlib import Path

from hf_vlp.data.shapes import shapes_dataset

SCENES = 12


def write_photos(folder: Path) -> None:
    """Images 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(shapes_dataset("captions", "train", SCENES)):
        row["image"].save(folder / f"{i}.png")


def write_lines(images: Path, regions: Path) -> None:
    """X-VLM's JSON lines of images and of regions."""
    rows = list(shapes_dataset("regions", "train", SCENES))
    lines = [{"image_rpath": f"{i}.png", "caption": row["caption"]} for i, row in enumerate(rows)]
    _write(images, "\n".join(map(json.dumps, lines)))
    for line, row in zip(lines, rows, strict=True):
        pairs = zip(row["phrases"], row["boxes"], strict=True)
        line["elems"] = [{"caption": phrase, "bb": box} for phrase, box in pairs]
    _write(regions, "\n".join(map(json.dumps, lines)))


def write_karpathy(train: Path, test: Path) -> None:
    captions = shapes_dataset("captions", "train", SCENES)["caption"]
    entries = [{"image": f"{i}.png", "caption": text, "image_id": f"i{i}"} for i, text in enumerate(captions)]
    _write(train, json.dumps(entries))
    _write(test, json.dumps([{"image": entry["image"], "caption": [entry["caption"]]} for entry in entries]))


def write_refer(refs: Path, instances: Path) -> None:
    """REFER's two files; two thirds are the split train, the others val."""
    referred, objects = [], {"images": [], "annotations": []}
    for i, row in enumerate(shapes_dataset("grounding", "train", SCENES)):
        ref = {"ref_id": i, "ann_id": i, "image_id": i, "sentences": [{"sent": row["text"]}]}
        referred.append(ref | {"split": "train" if 3 * i < 2 * SCENES else "val"})
        objects["images"].append({"id": i, "file_name": f"{i}.png"})
        objects["annotations"].append({"id": i, "image_id": i, "bbox": row["box"]})
    _write(instances, json.dumps(objects))
    refs.write_bytes(pickle.dumps(referred))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
