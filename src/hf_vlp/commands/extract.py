"""`hf-vlp extract`: regions of images into a store of `hf_vlp.data.features`."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm.auto import tqdm

from ..data.features import RegionWriter
from ..evaluation.inference import batched
from ..images import BadImageError, load_image
from ..models.region_extractors import load_extractor
from ..models.regions import RegionExtractor

logger = logging.getLogger(__name__)

NOTE = "extractor.json"  # beside the regions: what made them

Refuse = Callable[[str, ValueError], None]  # told of images that give no regions


def run(
    sources: Sequence[str], spec: str, out: Path, batch_size: int = 8, on_bad_image: str = "raise"
) -> str:
    """Write the regions of images to the store in `out`, or what is missing there after a run cut short.

    Args:
        sources: images, and folders, of which all images are taken, those of folders in them too. An image's
            id is the name of its file without the ending.
        spec: what finds the regions, see `load_extractor`.
        out: a new folder, or one that was written with the same `spec`.
        batch_size: images at a time.
        on_bad_image: "raise" stops at an image that cannot be read, or that the extractor refuses; "skip"
            leaves it out and logs its name.

    Returns:
        What the store holds now, in a sentence.

    Raises:
        ValueError: no images, two with one id, `out` written by something else, as `load_extractor`, or an
            image as above.
    """
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f'on_bad_image is {on_bad_image!r}; give "raise" or "skip"')
    files = find_images(sources)
    stored = RegionWriter(out) if out.is_dir() else ()
    note = _read_note(out, spec)
    waiting = [name for name in files if name not in stored]
    batches = list(batched(waiting, batch_size))
    skipped = []

    def refuse(name: str, error: ValueError):
        complaint = (
            f"{files[name]} gives no regions ({error}); repair or remove it, or leave such images out with "
            "--on-bad-image skip"
        )
        if on_bad_image == "raise":
            raise BadImageError(complaint) from error
        logger.warning("image left out: %s", complaint)
        skipped.append(name)

    if waiting:
        extractor = load_extractor(spec).to("cuda" if torch.cuda.is_available() else "cpu")
        note = _write_note(out, spec, extractor)
        done = len(files) - len(waiting)
        with RegionWriter(out) as writer, tqdm(desc="images", total=len(files), initial=done) as bar:
            for names in batches:
                images = _read({name: files[name] for name in names}, refuse)
                for name, row in _regions(extractor, images, refuse):
                    writer.write(name, row)
                bar.update(len(names))
    fits = "those" if note["fits_released_weights"] else "not those"
    return (
        f"{len(files) - len(skipped)} images in {out}, {len(waiting) - len(skipped)} of them new, "
        f"{len(skipped)} left out; features of width {note['feature_dim']}, {fits} of the released LXMERT "
        "weights"
    )


def find_images(sources: Iterable[str]) -> dict[str, Path]:
    """The images among files and folders by their ids, in the order of the sources and of names.

    Raises:
        ValueError: no such file or folder, no images, or two with one id.
    """
    found = {}
    for file in image_files(sources):
        if file.stem in found:
            raise ValueError(
                f"{found[file.stem]} and {file} would both have the id {file.stem}; rename one, or write "
                "them to different stores"
            )
        found[file.stem] = file
    return found


def image_files(sources: Iterable[str]) -> list[Path]:
    """The images among files and folders, in the order of the sources and of names.

    Raises:
        ValueError: no such file or folder, or no images.
    """
    files = [file for source in sources for file in _files_of(Path(source))]
    if not files:
        raise ValueError(f"no images in {', '.join(sources)}; give images or folders that hold some")
    return files


def _files_of(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(file for file in source.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    if not source.is_file():
        raise ValueError(f"{source} is not there; give images or folders that hold some")
    return [source]


def _read(files: dict[str, Path], refuse: Refuse) -> dict[str, Image.Image]:
    images = {}
    for name, file in files.items():
        try:
            images[name] = load_image(file)
        except BadImageError as error:
            refuse(name, error.__cause__)
    return images


def _regions(
    extractor: RegionExtractor, images: dict[str, Image.Image], refuse: Refuse
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Ids and region rows; images that are refused together are tried one by one."""
    if not images:
        return
    try:
        regions = extractor.extract(list(images.values()))
    except ValueError as error:
        if len(images) == 1:
            refuse(*images, error)
        else:
            for name, image in images.items():
                yield from _regions(extractor, {name: image}, refuse)
        return
    for i, name in enumerate(images):
        yield name, regions.row(i)


def _read_note(out: Path, spec: str) -> dict[str, Any] | None:
    """What made the regions in `out`, None if there are none."""
    file = out / NOTE
    if file.is_file():
        note = json.loads(file.read_text(encoding="utf-8"))
    elif out.is_dir() and any(out.iterdir()):
        note = {"extractor": None}
    else:
        return None
    if note["extractor"] != spec:
        raise ValueError(
            f"{out} was written by {note['extractor'] or 'something else'}, not by {spec}, whose features "
            "would not be alike; give another folder"
        )
    return note


def _write_note(out: Path, spec: str, extractor: RegionExtractor) -> dict[str, Any]:
    note = {
        "extractor": spec,
        "feature_dim": extractor.feature_dim,
        "fits_released_weights": extractor.fits_released_weights,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return note
