"""Captions, and true and false statements, about a scene."""

import itertools
import random
import re

from mmjax.data.scenes.world import (
    ATTRIBUTES,
    OPPOSITE,
    PAIRS,
    RELATION_MARGIN,
    RELATIONS,
    SEEN,
    Scene,
    SceneObject,
    holds,
)

CAPTIONS_PER_SCENE = 5
MAX_CAPTION_WORDS = 22  # with [CLS] and [SEP] it fits in 24 tokens

RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

# {A} … {D} are the objects in any order; {AB} is a relation that holds between A and B.
_CAPTIONS = {
    2: (
        "{A} is {AB} {B}",
        "{A} {AB} {B}",
        "there is {A} {AB} {B}",
        "two objects: {A} {AB} {B}",
        "the picture shows {A} {AB} {B}",
    ),
    3: (
        "{A} is {AB} {B} and {AC} {C}",
        "{A} {AB} {B}, and {C}",
        "{A} is {AB} {B}, and there is {C}",
        "three objects: {C}, and {A} {AB} {B}",
        "{C}, and {A} is {AB} {B}",
    ),
    4: (
        "{A} is {AB} {B} and {C} is {CD} {D}",
        "{A} {AB} {B}, and {C} {CD} {D}",
        "{A} is {AB} {B}, and there is {C} and {D}",
        "four objects: {A} {AB} {B}, and {C} {CD} {D}",
        "{C} and {D}, and {A} {AB} {B}",
    ),
}
_ROWS = {
    "right": ("from left to right: {}", "{} from left to right"),
    "below": ("from top to bottom: {}", "{} from top to bottom"),
}
# How many words of size and pattern a caption adds to the colors and shapes, where they fit.
_DETAILS = {2: 4, 3: 3, 4: 2}


def captions(scene: Scene) -> list[str]:
    """`CAPTIONS_PER_SCENE` captions in different words, lower case, `MAX_CAPTION_WORDS` at most.

    Each names all objects by color and shape and at least one spatial relation.
    """
    rng = scene.random("captions")
    count = len(scene.objects)
    frames = [_filled(template, scene, rng) for template in _CAPTIONS[count]]
    frames += [
        rng.choice(_ROWS[direction]).format(_listed([f"{{{i}}}" for i in order]))
        for direction in _ROWS
        if (order := _clear_order(scene, direction))
    ]
    return [_with_details(frame, scene, rng) for frame in rng.sample(frames, CAPTIONS_PER_SCENE)]


def statement_pair(scene: Scene) -> tuple[str, str, str]:
    """(kind, true statement, false statement); the two differ in one word or phrase.

    The kinds are `relation`, `object`, `pattern` and `size`.
    """
    rng = scene.random("statement")
    kind = rng.choice(("relation", "relation", "object", "object", "pattern", "size"))
    a, b = rng.sample(scene.objects, 2)
    match kind:
        case "relation":
            relation = rng.choice([name for name in RELATIONS if holds(name, a, b)])
            wording = rng.randrange(2)
            true, false = (
                f"the {noun(*a.pair)} is {RELATION_WORDS[name][wording]} the {noun(*b.pair)}"
                for name in (relation, OPPOSITE[relation])
            )
        case "object":
            # A pair held out from training may be named only where the split shows such pairs.
            known = PAIRS if any(thing.is_held_out for thing in scene.objects) else SEEN
            shown = {thing.pair for thing in scene.objects}
            one_change = [
                pair
                for pair in known
                if pair not in shown and (pair[0] == a.color) != (pair[1] == a.shape)
            ]
            true, false = (
                f"there is {with_article(noun(*pair))}" for pair in (a.pair, rng.choice(one_change))
            )
        case _:
            value = getattr(a, kind)
            others = [other for other in ATTRIBUTES[kind] if other != value]
            true, false = (f"the {noun(*a.pair)} is {word}" for word in (value, rng.choice(others)))
    return kind, true, false


def noun(*words: str, plural: bool = False) -> str:
    """A noun from attribute values: "red circle", or "striped object" where no shape is given."""
    if words[-1] not in ATTRIBUTES["shape"]:
        words = (*words, "object")
    phrase = " ".join(words)
    if not plural:
        return phrase
    return phrase + ("es" if phrase.endswith("s") else "s")


def with_article(phrase: str) -> str:
    """The phrase with `a` or `an` before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def count_words(text: str) -> int:
    """Words and punctuation marks, the tokens of a vocabulary that knows every word whole."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def _filled(template: str, scene: Scene, rng: random.Random) -> str:
    """The template with relation words put in, and object numbers in braces for the objects."""
    while True:  # with the shorter relation words every template has room
        order = rng.sample(range(len(scene.objects)), len(scene.objects))
        place = dict(zip("ABCD", order, strict=False))
        fields = {letter: f"{{{i}}}" for letter, i in place.items()}
        for a, b in re.findall(r"{([A-D])([A-D])}", template):
            first, second = scene.objects[place[a]], scene.objects[place[b]]
            relation = rng.choice([name for name in RELATIONS if holds(name, first, second)])
            fields[a + b] = rng.choice(RELATION_WORDS[relation])
        frame = template.format(**fields)
        if count_words(_plain(frame, scene)) <= MAX_CAPTION_WORDS:
            return frame


def _plain(frame: str, scene: Scene) -> str:
    """The caption of a frame, objects by color and shape alone."""
    return frame.format(*(with_article(noun(*thing.pair)) for thing in scene.objects))


def _clear_order(scene: Scene, direction: str) -> list[int] | None:
    """Object numbers from left to right (`right`) or from top to bottom, if all are well apart."""
    axis = "x" if direction == "right" else "y"
    where = [getattr(thing, axis) for thing in scene.objects]
    order = sorted(range(len(where)), key=where.__getitem__)
    gaps = [where[b] - where[a] for a, b in itertools.pairwise(order)]
    return order if min(gaps) >= RELATION_MARGIN else None


def _with_details(frame: str, scene: Scene, rng: random.Random) -> str:
    """The caption of a frame, with as many words of size and pattern as there is room for."""
    spare = MAX_CAPTION_WORDS - count_words(_plain(frame, scene))
    room = min(_DETAILS[len(scene.objects)], spare)
    slots = [(i, kind) for i in range(len(scene.objects)) for kind in ("size", "pattern")]
    told = [slots[k] for k in sorted(rng.sample(range(len(slots)), room))]
    return frame.format(
        *(
            with_article(_described(thing, [kind for j, kind in told if j == i]))
            for i, thing in enumerate(scene.objects)
        )
    )


def _described(thing: SceneObject, kinds: list[str]) -> str:
    return noun(*(getattr(thing, kind) for kind in kinds), *thing.pair)


def _listed(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"
