"""The scene graph: which objects a scene holds, where they lie, and which split it belongs to."""

import functools
import itertools
import random
from dataclasses import dataclass

from mmjax.errors import InputError, near_misses

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("small", "large")
PATTERNS = ("solid", "striped", "dotted", "hollow")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SPLITS = ("train", "validation", "test", "composition")

ATTRIBUTES = {"size": SIZES, "pattern": PATTERNS, "color": COLORS, "shape": SHAPES}

Pair = tuple[str, str]
PAIRS: tuple[Pair, ...] = tuple(itertools.product(COLORS, SHAPES))
# One pair a color, and one or two a shape: every color and every shape stays common in training.
HELD_OUT: tuple[Pair, ...] = tuple(zip(COLORS, itertools.cycle(SHAPES), strict=False))
SEEN: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

MAX_OBJECTS = 4
# The number of objects of consecutive scenes, over and over. There are only 780 sets of two pairs,
# of which validation and test have 156 each.
OBJECT_COUNTS = (3, 2, 3, 4, 3, 2, 3)

# All lengths are fractions of the picture's side.
_EXTENT = {"small": (0.24, 0.28), "large": (0.36, 0.41)}
_GAP = 0.02
_LIGHTEST, _DARKEST = 250, 214  # background: clearly lighter than every color
RELATION_MARGIN = 0.12


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object: its attributes, its center (x to the right, y down) and its width and height.

    Lengths are fractions of the picture's side.
    """

    color: str
    shape: str
    size: str
    pattern: str
    x: float
    y: float
    extent: float

    @property
    def pair(self) -> Pair:
        """The (color, shape) pair; no two objects of a scene share it."""
        return self.color, self.shape

    @property
    def is_held_out(self) -> bool:
        """Whether the pair never occurs outside the composition split."""
        return self.pair in HELD_OUT


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene graph. `background` holds the RGB of the four corners, row by row."""

    split: str
    seed: int
    number: int
    objects: tuple[SceneObject, ...]
    background: tuple[tuple[int, int, int], ...]

    @property
    def name(self) -> str:
        """What messages call this scene."""
        return f"scenes/{self.split}/{self.number}"

    def random(self, purpose: str) -> random.Random:
        """A fresh random generator for one purpose, the same every time it is asked for."""
        return random.Random(f"{purpose}/{self.split}/{self.seed}/{self.number}")

    def matching(self, **attributes: str) -> list[SceneObject]:
        """The objects with these attributes: `scene.matching(color="red", size="small")`."""
        return [
            thing
            for thing in self.objects
            if all(getattr(thing, name) == value for name, value in attributes.items())
        ]


def make_scene(
    split: str, number: int, seed: int = 0, object_counts: tuple[int, ...] = OBJECT_COUNTS
) -> Scene:
    """The scene of this number, always the same one.

    The sets of (color, shape) pairs are dealt out to the splits once for all seeds, so `train`,
    `validation` and `test` share none. Within a split each set is used once before any is used
    again: with the default `object_counts`, the first 546 scenes of `validation` or `test` all
    differ in their sets.

    Args:
      split: one of `SPLITS`.
      number: from 0, without end.
      seed: another seed is another order of sets, other sizes, patterns, places and backgrounds.
      object_counts: number of objects (2 to 4) of consecutive scenes, repeated.

    Raises:
      InputError: an unknown split or an impossible number of objects.
    """
    check_split(split)
    check_object_counts(object_counts)
    turn, place = divmod(number, len(object_counts))
    count = object_counts[place]
    pair_sets = _pair_sets(split, count, seed)
    position = turn * object_counts.count(count) + object_counts[:place].count(count)

    rng = random.Random(f"scene/{split}/{seed}/{number}")
    pairs = list(pair_sets[position % len(pair_sets)])
    rng.shuffle(pairs)
    sizes = [rng.choice(SIZES) for _ in pairs]
    extents = [rng.uniform(*_EXTENT[size]) for size in sizes]
    objects = tuple(
        SceneObject(color, shape, size, rng.choice(PATTERNS), x, y, extent)
        for (color, shape), size, extent, (x, y) in zip(
            pairs, sizes, extents, _places(extents, rng), strict=True
        )
    )
    return Scene(split, seed, number, objects, _background(rng))


def check_split(split: str) -> None:
    """Raises an `InputError` for a split that does not exist."""
    if split not in SPLITS:
        raise InputError(f"split={split!r}: no such split of scenes.{near_misses(split, SPLITS)}")


def check_object_counts(object_counts: tuple[int, ...]) -> None:
    """Raises an `InputError` for numbers of objects that no scene can have."""
    if not object_counts or not all(2 <= count <= MAX_OBJECTS for count in object_counts):
        raise InputError(
            f"object_counts={object_counts}: expected one or more numbers from 2 to {MAX_OBJECTS}."
        )


def offset(relation: str, a: SceneObject, b: SceneObject) -> float:
    """How far the center of `a` lies from that of `b` in the direction of the relation."""
    match relation:
        case "left":
            return b.x - a.x
        case "right":
            return a.x - b.x
        case "above":
            return b.y - a.y
        case "below":
            return a.y - b.y
    raise ValueError(relation)


def holds(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether `a` is clearly left of (right of, above, below) `b`.

    Objects do not overlap, so between any two at least one relation holds. Where centers are
    nearly level neither a relation nor its opposite holds, and no text speaks of it.
    """
    return offset(relation, a, b) >= RELATION_MARGIN


@functools.lru_cache(maxsize=32)
def _pair_sets(split: str, count: int, seed: int) -> list[tuple[Pair, ...]]:
    """All sets of `count` pairs that belong to the split, in the order of this seed."""
    if split == "composition":
        held_out = frozenset(HELD_OUT)
        sets = [
            pairs
            for pairs in itertools.combinations(PAIRS, count)
            if not held_out.isdisjoint(pairs)
        ]
    else:
        sets = list(itertools.combinations(SEEN, count))
        random.Random("splits").shuffle(sets)
        fifth = len(sets) // 5
        share = {
            "validation": slice(0, fifth),
            "test": slice(fifth, 2 * fifth),
            "train": slice(2 * fifth, None),
        }
        sets = sets[share[split]]
    random.Random(f"order/{split}/{seed}").shuffle(sets)
    return sets


def _places(extents: list[float], rng: random.Random) -> list[tuple[float, float]]:
    """Random centers such that no bounding boxes touch, drawn again until all of them fit."""
    largest_first = sorted(range(len(extents)), key=lambda i: -extents[i])
    while True:
        places: dict[int, tuple[float, float]] = {}
        for i in largest_first:
            low, high = extents[i] / 2 + _GAP, 1 - extents[i] / 2 - _GAP
            for _ in range(8):
                x, y = rng.uniform(low, high), rng.uniform(low, high)
                if all(
                    max(abs(x - u), abs(y - v)) >= (extents[i] + extents[j]) / 2 + _GAP
                    for j, (u, v) in places.items()
                ):
                    places[i] = x, y
                    break
            else:
                break
        if len(places) == len(extents):
            return [places[i] for i in range(len(extents))]


def _background(rng: random.Random) -> tuple[tuple[int, int, int], ...]:
    """Four light corners around one tint."""
    tint = [rng.randint(_DARKEST + 12, _LIGHTEST - 8) for _ in range(3)]

    def corner() -> tuple[int, int, int]:
        shade = rng.randint(-12, 8)
        red, green, blue = (value + shade for value in tint)
        return red, green, blue

    return tuple(corner() for _ in range(4))
