"""Synthetic scenes of coloured shapes: what is in them, how they are worded and how they are drawn.

A scene is a grid of cells, some of which hold one object each. Choices come from integer seeds through
`random.Random.random()` alone, the one method whose values Python promises to keep, so a scene is the same in
every process and Python version. After CLEVR-CoGenT (arXiv:1612.06890) one colour of each shape is held out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from random import Random
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLOURS = {
    "red": (220, 50, 45),
    "green": (50, 170, 70),
    "blue": (55, 90, 225),
    "yellow": (240, 215, 60),
    "purple": (150, 60, 195),
    "white": (240, 240, 240),
    "cyan": (60, 215, 220),
    "pink": (250, 150, 190),
}
RELATIONS = ("left of", "right of", "above", "below")
MIN_CELL_PIXELS = 12  # below it a small diamond and a small circle are the same few pixels

_POLYGONS = {  # corners in a box of side 1, x right, y down
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "cross": tuple(
        (x / 3, y / 3)
        for x, y in (
            *((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2)),
            *((2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)),
        )
    ),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
}
_COVER_COLOUR = (120, 120, 120)

Item = TypeVar("Item")


class Kind(NamedTuple):
    """What an object is: positions in `Level.shapes`, `Level.colours` and `Level.sizes`."""

    shape: int
    colour: int
    size: int

    @property
    def is_held_out(self) -> bool:
        """Whether this colour of this shape occurs in the split `test_heldout` only, at every level."""
        return self.colour == self.shape

    def differs_by_one(self, other: "Kind") -> bool:
        return sum(a != b for a, b in zip(self, other, strict=True)) == 1


@dataclass(frozen=True)
class Level:
    """A preset of difficulty.

    - grid: cells along each side
    - sizes: name and range of the side, in cells, of each size; a lone size is never named
    - num_objects: equally likely numbers of objects
    - in_reading_order: captions list the objects from top left to bottom right, else in any order
    - references: ways to refer to one object of the scene, see `shapes.shapes_dataset`, task "grounding"
    """

    grid: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[tuple[str, float, float], ...]
    num_objects: tuple[int, ...]
    in_reading_order: bool
    references: tuple[str, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        counts = (len(self.shapes), len(self.colours), len(self.sizes))
        return tuple(Kind(*ids) for ids in product(*map(range, counts)))

    def name(self, kind: Kind) -> str:
        """Such as "red circle", or "small red circle" where sizes differ."""
        words = (self.colours[kind.colour], self.shapes[kind.shape])
        return " ".join(words if len(self.sizes) == 1 else (self.sizes[kind.size][0], *words))

    def place(self, cell: int) -> str:
        """Such as "top left", "top" or "middle"."""
        row, column = divmod(cell, self.grid)
        middle = (self.grid - 1) / 2
        vertical = "top" if row < middle else "bottom" if row > middle else ""
        horizontal = "left" if column < middle else "right" if column > middle else ""
        return f"{vertical} {horizontal}".strip() or "middle"

    def holds(self, relation: str, cell: int, other: int) -> bool:
        """Whether `cell` lies in this relation to `other`; cells of one row are neither above nor below."""
        (row, column), (other_row, other_column) = divmod(cell, self.grid), divmod(other, self.grid)
        return {
            "left of": column < other_column,
            "right of": column > other_column,
            "above": row < other_row,
            "below": row > other_row,
        }[relation]


LEVELS = {
    0: Level(
        grid=2,
        shapes=SHAPES[:3],
        colours=tuple(COLOURS)[:4],
        sizes=(("large", 0.75, 0.95),),
        num_objects=(2, 3),
        in_reading_order=True,
        references=("name",),
    ),
    1: Level(
        grid=3,
        shapes=SHAPES[:4],
        colours=tuple(COLOURS)[:6],
        sizes=(("large", 0.75, 0.95),),
        num_objects=(2, 3, 4),
        in_reading_order=False,
        references=("name", "shape", "colour", "place"),
    ),
    2: Level(
        grid=3,
        shapes=SHAPES,
        colours=tuple(COLOURS),
        sizes=(("large", 0.8, 0.95), ("small", 0.45, 0.6)),
        num_objects=(3, 4, 5),
        in_reading_order=False,
        references=("name", "shape", "colour", "place", "relation"),
    ),
}


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object; cells count in reading order, left, top and side are fractions of the image's side."""

    kind: Kind
    cell: int
    left: float
    top: float
    side: float
    fill: tuple[int, int, int]

    def box(self, image_size: int) -> tuple[int, int, int, int]:
        """x, y, width, height in whole pixels; rounding down keeps neighbours apart at every image size."""
        side = int(self.side * image_size)
        return int(self.left * image_size), int(self.top * image_size), side, side


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in reading order, all of different kinds; `covered_cell` is hidden under a grey plate."""

    level: Level
    objects: tuple[SceneObject, ...]
    background: int
    covered_cell: int | None = None

    @property
    def identity(self) -> int:
        """A number below 2^63 that two scenes of a level share if and only if one full caption fits both."""
        level = self.level
        base = len(level.shapes) * len(level.colours) * len(level.sizes) + 1
        number = 0
        for item in self.objects:
            shape, colour, size = item.kind
            code = (shape * len(level.colours) + colour) * len(level.sizes) + size + 1
            number += code * base**item.cell
        return number

    def find(self, kind: Kind) -> SceneObject:
        return next(item for item in self.objects if item.kind == kind)


def pick(random: Random, items: Sequence[Item]) -> Item:
    return items[int(random.random() * len(items))]


def sample(random: Random, items: Collection[Item], number: int) -> list[Item]:
    """`number` items without repetition, in random order; all of them if there are fewer."""
    pool = list(items)
    return [pool.pop(int(random.random() * len(pool))) for _ in range(min(number, len(pool)))]


@lru_cache
def split_kinds(level: Level, held_out: bool) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
    """The kinds that texts are about, and the kinds that scenes are filled with."""
    if held_out:
        return tuple(kind for kind in level.kinds if kind.is_held_out), level.kinds
    seen = tuple(kind for kind in level.kinds if not kind.is_held_out)
    return seen, seen


def compose(
    random: Random, level: Level, include: Sequence[Kind], fill: Sequence[Kind], has_cover: bool = False
) -> Scene:
    """A scene with every kind of `include`, filled up to a random number of objects from `fill`."""
    number = max(len(include), pick(random, level.num_objects))
    rest = [kind for kind in sample(random, fill, number) if kind not in include]
    kinds = [*include, *rest][:number]
    cells = sample(random, range(level.grid**2), len(kinds) + has_cover)
    covered_cell = cells.pop() if has_cover else None
    objects = [_place(random, level, kind, cell) for cell, kind in sorted(zip(cells, kinds, strict=True))]
    return Scene(level, tuple(objects), int(20 + 30 * random.random()), covered_cell)


def _place(random: Random, level: Level, kind: Kind, cell: int) -> SceneObject:
    """An object of random size, place within its cell and shade."""
    _, smallest, largest = level.sizes[kind.size]
    side = smallest + (largest - smallest) * random.random()
    row, column = divmod(cell, level.grid)
    left = column + (1 - side) * random.random()
    top = row + (1 - side) * random.random()
    shade = 0.85 + 0.15 * random.random()
    red, green, blue = COLOURS[level.colours[kind.colour]]
    fill = (int(red * shade), int(green * shade), int(blue * shade))
    return SceneObject(kind, cell, left / level.grid, top / level.grid, side / level.grid, fill)


def make_scene(level: int, seed: int, held_out: bool = False) -> Scene:
    """The scene of this seed; with `held_out` at least one object is of a held-out colour and shape.

    Raises ValueError for an unknown level.
    """
    check_level(level)
    random = Random(seed)
    subjects, fill = split_kinds(LEVELS[level], held_out)
    return compose(random, LEVELS[level], [pick(random, subjects)], fill)


def draw(scene: Scene, image_size: int = 48, supersampling: int = 2) -> Image.Image:
    """Square RGB image of `image_size` pixels a side, each the average of `supersampling`^2 points.

    Raises ValueError for an image too small to tell the shapes apart.
    """
    check_image_size(scene.level, image_size)
    if supersampling < 1:
        raise ValueError(f"supersampling is {supersampling}; give 1 (hard edges) or more")
    size = image_size * supersampling
    image = Image.new("RGB", (size, size), (scene.background,) * 3)
    pen = ImageDraw.Draw(image)
    for item in scene.objects:
        x, y, side, _ = (supersampling * value for value in item.box(image_size))
        shape, extent = scene.level.shapes[item.kind.shape], side - 1  # both end points are drawn
        if shape == "circle":
            pen.ellipse((x, y, x + extent, y + extent), fill=item.fill)
        else:
            pen.polygon([(x + u * extent, y + v * extent) for u, v in _POLYGONS[shape]], fill=item.fill)
    if scene.covered_cell is not None:
        row, column = divmod(scene.covered_cell, scene.level.grid)
        cell = size / scene.level.grid
        corners = (column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1)
        pen.rectangle(corners, fill=_COVER_COLOUR)
    return image.reduce(supersampling) if supersampling > 1 else image


def check_level(level: int) -> None:
    """Raises ValueError for an unknown level."""
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; choose one of {', '.join(map(str, LEVELS))}")


def check_image_size(level: Level, image_size: int) -> None:
    """Raises ValueError for an image too small to tell the shapes apart."""
    smallest = MIN_CELL_PIXELS * level.grid
    if image_size < smallest:
        raise ValueError(
            f"image_size is {image_size}; a {level.grid}x{level.grid} grid needs at least {smallest}"
        )
