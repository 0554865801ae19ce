"""Questions about scenes, balanced so that their text tells little about their answers.

The answer comes first: the index says the form of the question and the answer, each answer of a
form in its turn, and then a scene is looked for in which the form has that answer. The words that
fill the form are drawn from all that fit, so that over many scenes they do not tell it either.
"""

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from mmjax.data.scenes.language import RELATION_WORDS, noun, with_article
from mmjax.data.scenes.world import (
    ATTRIBUTES,
    COLORS,
    HELD_OUT,
    PATTERNS,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    holds,
    make_scene,
    offset,
)

QUESTION_TYPES = ("exist", "count", "query", "compare", "relate")
_YES_NO = ("yes", "no")
ANSWERS = (*_YES_NO, "0", "1", "2", "3", "4", *COLORS, *SHAPES, *SIZES, *PATTERNS)

# A form's words for a scene in which the answer is as wanted; None where the scene offers none.
_Ask = Callable[[Scene, str, random.Random], str | None]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene, its only answer, and its type, one of `QUESTION_TYPES`."""

    scene: Scene
    text: str
    answer: str
    type: str


@dataclass(frozen=True, slots=True)
class _Form:
    type: str
    weight: int  # questions of this form in a hundred
    answers: tuple[str, ...]
    ask: _Ask


def ask(split: str, index: int, seed: int = 0) -> Question:
    """The question of this index: about the first scene from number `index` on that offers it."""
    rng = random.Random(f"question/{split}/{seed}/{index}")
    block, place = divmod(index, len(_SCHEDULE))
    form = _SCHEDULE[place]
    asked_before = block * form.weight + _SCHEDULE[:place].count(form)
    answer = form.answers[asked_before % len(form.answers)]
    for number in itertools.count(index):
        scene = make_scene(split, number, seed)
        text = form.ask(scene, answer, rng)
        if text is not None:
            return Question(scene, text, answer, form.type)
    raise AssertionError("unreachable: every answer of every form is offered by some scene")


def _worded(rng: random.Random, wordings: tuple[str, ...], *nouns: str) -> str:
    return rng.choice(wordings).format(*nouns)


def _exist(kind: str, scene: Scene, answer: str, rng: random.Random) -> str | None:
    """Is there a red object, a circle, a red circle?"""
    if kind == "pair":
        # Asked of held-out pairs alone where the scene shows one, else of the others alone: were
        # they mixed, the pair itself would tell the answer.
        askable = HELD_OUT if any(thing.is_held_out for thing in scene.objects) else SEEN
        shown = {thing.pair for thing in scene.objects}
        nouns = [noun(*pair) for pair in askable if (pair in shown) == (answer == "yes")]
    else:
        nouns = [
            noun(value)
            for value in ATTRIBUTES[kind]
            if bool(scene.matching(**{kind: value})) == (answer == "yes")
        ]
    if not nouns:
        return None
    return _worded(rng, ("is there {}", "can you see {}"), with_article(rng.choice(nouns)))


def _count(kind: str | None, scene: Scene, answer: str, rng: random.Random) -> str | None:
    """How many objects, red objects, circles, striped objects, small objects are there?"""
    if kind is None:
        nouns = ["objects"] if len(scene.objects) == int(answer) else []
    else:
        nouns = [
            noun(value, plural=True)
            for value in ATTRIBUTES[kind]
            if len(scene.matching(**{kind: value})) == int(answer)
        ]
    if not nouns:
        return None
    return _worded(rng, ("how many {} are there", "how many {} can you see"), rng.choice(nouns))


_REFERENCES = {
    "color": (("shape",), ("size", "shape"), ("pattern", "shape")),
    "shape": (("color",), ("size", "color"), ("pattern", "color")),
    "pattern": (("shape",), ("color",), ("color", "shape")),
    "size": (("shape",), ("color",), ("color", "shape")),
}
_QUERIES = {
    "color": ("what color is the {}", "which color does the {} have"),
    "shape": ("what shape is the {}", "which shape does the {} have"),
    "pattern": ("what pattern does the {} have", "which pattern is on the {}"),
    "size": ("what size is the {}", "is the {} small or large"),
}


def _query(kind: str, scene: Scene, answer: str, rng: random.Random) -> str | None:
    """What color (shape, pattern, size) is the object of this description?"""
    asked = [thing for thing in scene.objects if thing.is_held_out] or scene.objects
    nouns = [
        name
        for thing in asked
        if getattr(thing, kind) == answer and (name := _only_name(thing, _REFERENCES[kind], scene))
    ]
    return _worded(rng, _QUERIES[kind], rng.choice(nouns)) if nouns else None


def _only_name(
    thing: SceneObject, references: tuple[tuple[str, ...], ...], scene: Scene
) -> str | None:
    """The first description by these attributes that fits no other object."""
    for names in references:
        attributes = {name: getattr(thing, name) for name in names}
        if len(scene.matching(**attributes)) == 1:
            return noun(*attributes.values())
    return None


def _compare_counts(kind: str, scene: Scene, answer: str, rng: random.Random) -> str | None:
    """Are there more (fewer) red objects than blue objects?"""
    more = rng.choice((True, False))
    number = {value: len(scene.matching(**{kind: value})) for value in ATTRIBUTES[kind]}
    pairs = [
        (a, b)
        for a, b in itertools.permutations(number, 2)
        if number[a] + number[b] > 0
        and (number[a] > number[b] if more else number[a] < number[b]) == (answer == "yes")
    ]
    if not pairs:
        return None
    a, b = (noun(value, plural=True) for value in rng.choice(pairs))
    return f"are there {'more' if more else 'fewer'} {a} than {b}"


def _compare_sizes(scene: Scene, answer: str, rng: random.Random) -> str | None:
    """Is the red circle larger (smaller) than the blue star?"""
    larger = rng.choice((True, False))
    first_is = "large" if larger == (answer == "yes") else "small"
    pairs = [
        (a, b)
        for a, b in itertools.permutations(scene.objects, 2)
        if a.size == first_is and b.size != first_is
    ]
    if not pairs:
        return None
    a, b = (noun(*thing.pair) for thing in rng.choice(pairs))
    return f"is the {a} {'larger' if larger else 'smaller'} than the {b}"


def _compare_same(scene: Scene, answer: str, rng: random.Random) -> str | None:
    """Do the red circle and the blue star have the same size (pattern)?"""
    kind = rng.choice(("size", "pattern"))
    pairs = [
        (a, b)
        for a, b in itertools.permutations(scene.objects, 2)
        if (getattr(a, kind) == getattr(b, kind)) == (answer == "yes")
    ]
    if not pairs:
        return None
    a, b = (noun(*thing.pair) for thing in rng.choice(pairs))
    return f"do the {a} and the {b} have the same {kind}"


def _relate(kind: str, scene: Scene, answer: str, rng: random.Random) -> str | None:
    """What color (shape) is the object left of the red circle?"""
    nouns = [
        f"object {rng.choice(RELATION_WORDS[relation])} the {noun(*anchor.pair)}"
        for anchor in scene.objects
        for relation in RELATIONS
        if (thing := _only_one(relation, anchor, scene)) and getattr(thing, kind) == answer
    ]
    return _worded(rng, _QUERIES[kind], rng.choice(nouns)) if nouns else None


def _only_one(relation: str, anchor: SceneObject, scene: Scene) -> SceneObject | None:
    """The one object clearly on this side of the anchor, when no other is at all."""
    there = [thing for thing in scene.objects if offset(relation, thing, anchor) > 0]
    return there[0] if len(there) == 1 and holds(relation, there[0], anchor) else None


# Weighted to what a small model can learn in a minute: which colors there are and how many objects.
# Whether something is there, or how two things compare, takes it far longer.
_FORMS = (
    _Form("exist", 9, _YES_NO, functools.partial(_exist, "color")),
    _Form("exist", 3, _YES_NO, functools.partial(_exist, "shape")),
    _Form("exist", 2, _YES_NO, functools.partial(_exist, "pair")),
    _Form("count", 14, ("2", "3", "4"), functools.partial(_count, None)),
    _Form("count", 1, ("0", "1", "2"), functools.partial(_count, "color")),
    _Form("count", 1, ("0", "1", "2"), functools.partial(_count, "shape")),
    _Form("count", 1, ("0", "1", "2"), functools.partial(_count, "pattern")),
    _Form("count", 1, ("0", "1", "2", "3"), functools.partial(_count, "size")),
    _Form("query", 24, COLORS, functools.partial(_query, "color")),
    _Form("query", 6, SHAPES, functools.partial(_query, "shape")),
    _Form("query", 3, PATTERNS, functools.partial(_query, "pattern")),
    _Form("query", 3, SIZES, functools.partial(_query, "size")),
    _Form("compare", 3, _YES_NO, functools.partial(_compare_counts, "color")),
    _Form("compare", 2, _YES_NO, functools.partial(_compare_counts, "shape")),
    _Form("compare", 2, _YES_NO, _compare_sizes),
    _Form("compare", 1, _YES_NO, _compare_same),
    _Form("relate", 20, COLORS, functools.partial(_relate, "color")),
    _Form("relate", 4, SHAPES, functools.partial(_relate, "shape")),
)
_SCHEDULE = [form for form in _FORMS for _ in range(form.weight)]
random.Random("schedule").shuffle(_SCHEDULE)
