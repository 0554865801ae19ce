"""Scenes hold what they promise: every text is true by a second reading of the scene graph."""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import pickle
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from mmjax.data import scenes
from mmjax.data.scenes import (
    ANSWERS,
    HELD_OUT,
    SPLITS,
    SceneQuestions,
    Scenes,
    SceneStatements,
    ask,
    captions,
    make_scene,
    statement_pair,
)
from mmjax.errors import InputError

# --- A reader of the texts that shares no code with their writer ---------------------------------

KINDS = {
    "size": ["small", "large"],
    "pattern": ["solid", "striped", "dotted", "hollow"],
    "color": ["red", "orange", "yellow", "green", "blue", "purple", "pink", "black"],
    "shape": ["circle", "square", "triangle", "star", "cross", "heart"],
}
KIND_OF = {value: kind for kind, values in KINDS.items() for value in values}
DIRECTIONS = {
    "left of": (-1, 0),
    "to the left of": (-1, 0),
    "right of": (1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "over": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
}
RELATION = "|".join(sorted(DIRECTIONS, key=len, reverse=True))
MENTION = rf"(?:(?:{'|'.join(KIND_OF)}) )*(?:{'|'.join(KINDS['shape'])}|object)"
NUMBERS = {"two": 2, "three": 3, "four": 4}
CLEARLY = 0.1  # of the picture's side: 6 pixels of 64


def fits(phrase, thing):
    words = [word for word in phrase.split() if word != "object"]
    assert all(word in KIND_OF for word in words), phrase
    return all(getattr(thing, KIND_OF[word]) == word for word in words)


def singular(noun):
    return noun.removesuffix("es") if noun.endswith("crosses") else noun.removesuffix("s")


def matches(phrase, scene):
    return [thing for thing in scene.objects if fits(phrase, thing)]


def the(phrase, scene):
    (thing,) = matches(phrase, scene)
    return thing


def lies(a, relation, b, by=CLEARLY):
    dx, dy = DIRECTIONS[relation]
    return dx * (a.x - b.x) + dy * (a.y - b.y) > by


def caption_parts(text):
    """(number stated or None, noun phrases, (subject, relation, object) as places of phrases)."""
    head = re.match(r"(two|three|four) objects: ", text)
    number = NUMBERS[head[1]] if head else None
    row = re.search(r"from (left to right|top to bottom)", text)
    mentions = list(re.finditer(rf"an? ({MENTION})\b", text))
    relations = []
    if row:
        along = "left of" if row[1] == "left to right" else "above"
        relations = [(i, along, i + 1) for i in range(len(mentions) - 1)]
    subject = 0
    for i, (a, b) in enumerate(itertools.pairwise(mentions)):
        between = text[a.end() : b.start()].strip()
        if found := re.fullmatch(rf"(and )?(?:is )?({RELATION})", between):
            subject = subject if found[1] else i
            relations.append((subject, found[2], i + 1))
        else:
            assert between in {"and", ",", ", and", ", and there is", "and there is"}, text
    return number, [mention[1] for mention in mentions], relations


def caption_is_true(text, scene):
    number, phrases, relations = caption_parts(text)
    if number not in (None, len(scene.objects)):
        return False
    found = [matches(phrase, scene) for phrase in phrases]
    if not all(len(things) == 1 for things in found):
        return False
    return all(lies(found[a][0], relation, found[b][0]) for a, relation, b in relations)


def answer_to(text, scene):
    """The answer, worked out from the scene graph; fails where the question is ambiguous."""

    def yes(truth):
        return "yes" if truth else "no"

    def count(noun):
        return len(matches(singular(noun), scene))

    if found := re.fullmatch(
        rf"(?:is there|can you see|does the picture show) an? ({MENTION})", text
    ):
        return yes(matches(found[1], scene))
    if found := re.fullmatch(r"how many ([a-z ]+) (?:are there|can you see)", text):
        return str(count(found[1]))
    if found := re.fullmatch(r"are there (more|fewer) ([a-z ]+) than ([a-z ]+)", text):
        a, b = count(found[2]), count(found[3])
        return yes(a > b if found[1] == "more" else a < b)
    if found := re.fullmatch(rf"is the ({MENTION}) (larger|smaller) than the ({MENTION})", text):
        a, b = the(found[1], scene), the(found[3], scene)
        assert a.size != b.size
        return yes((a.size == "large") == (found[2] == "larger"))
    if found := re.fullmatch(
        rf"do the ({MENTION}) and the ({MENTION}) have the same (size|pattern)", text
    ):
        a, b = the(found[1], scene), the(found[2], scene)
        return yes(getattr(a, found[3]) == getattr(b, found[3]))
    if found := re.fullmatch(
        rf"(?:what|which) (color|shape) (?:is|does) the object ({RELATION}) the ({MENTION})"
        r"(?: have)?",
        text,
    ):
        anchor = the(found[3], scene)
        (thing,) = (other for other in scene.objects if lies(other, found[2], anchor, by=0))
        assert lies(thing, found[2], anchor)
        return getattr(thing, found[1])
    if found := re.fullmatch(rf"is the ({MENTION}) small or large", text):
        return the(found[1], scene).size
    found = re.fullmatch(
        r"(?:what|which) (color|shape|pattern|size) (?:is|does|is on) the"
        rf" ({MENTION})(?: have)?",
        text,
    )
    assert found, text
    return getattr(the(found[2], scene), found[1])


def statement_is_true(text, scene):
    if found := re.fullmatch(rf"there is an? ({MENTION})", text):
        return bool(matches(found[1], scene))
    if found := re.fullmatch(rf"the ({MENTION}) is ({RELATION}) the ({MENTION})", text):
        a, b = the(found[1], scene), the(found[3], scene)
        assert lies(a, found[2], b) != lies(b, found[2], a), "neither clearly true nor false"
        return lies(a, found[2], b)
    found = re.fullmatch(rf"the ({MENTION}) is (\w+)", text)
    assert found, text
    return fits(found[2], the(found[1], scene))


def pair_set(scene):
    return frozenset((thing.color, thing.shape) for thing in scene.objects)


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# --- Texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_name_every_object(split):
    for number in range(200):
        scene = make_scene(split, number)
        texts = captions(scene)
        assert len(set(texts)) == len(texts) == 5
        for text in texts:
            assert caption_is_true(text, scene), (text, scene)
            _, phrases, relations = caption_parts(text)
            assert len(phrases) == len(scene.objects)
            assert relations
            assert text == text.lower()


def test_the_caption_reader_can_say_no():
    scene = make_scene("train", 0)
    swap = {"left": "right", "right": "left", "above": "below", "below": "above"}
    swap |= {"over": "under", "under": "over"}
    for text in captions(scene):
        if "from" not in text:
            swapped = re.sub("|".join(swap), lambda word: swap[word[0]], text)
            assert swapped != text
            assert not caption_is_true(swapped, scene)


def test_captions_rarely_fit_another_picture():
    gallery = [make_scene("validation", number) for number in range(500)]
    sets = [pair_set(scene) for scene in gallery]
    others = 0
    for i, scene in enumerate(gallery):
        for text in captions(scene)[:2]:
            others += sum(
                caption_is_true(text, gallery[j])
                for j in range(len(gallery))
                if j != i and sets[i] <= sets[j]
            )
    assert others <= 10  # one caption in a hundred


def test_captions_fit_24_tokens_of_a_small_trained_vocabulary():
    texts = [text for number in range(400) for text in captions(make_scene("train", number))]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=256, special_tokens=special)
    )
    fresh = [text for number in range(400) for text in captions(make_scene("test", number))]
    encodings = tokenizer.encode_batch(fresh)
    assert not any("[UNK]" in encoding.tokens for encoding in encodings)
    assert max(len(encoding.ids) for encoding in encodings) <= 22


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_questions_clear(split):
    for index in range(400):
        question = ask(split, index)
        assert answer_to(question.text, question.scene) == question.answer, question
        assert question.answer in ANSWERS


@pytest.mark.parametrize("split", SPLITS)
def test_statements_are_true_and_false_by_a_small_change(split):
    for number in range(300):
        scene = make_scene(split, number)
        _, true, false = statement_pair(scene)
        assert statement_is_true(true, scene), (true, scene)
        assert not statement_is_true(false, scene), (false, scene)
        changed = [
            pair for pair in zip(true.split(), false.split(), strict=True) if pair[0] != pair[1]
        ]
        assert 1 <= len([pair for pair in changed if set(pair) != {"a", "an"}]) <= 1


# --- Balance -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions():
    return [ask("train", index) for index in range(4000)]


def masked(text):
    """The question with attribute and relation words put out: what form it has."""
    text = re.sub(rf"\b({'|'.join(KIND_OF)})(e?s)?\b", "*", text)
    return re.sub(r"(\* )+", "* ", re.sub(rf"\b({RELATION})\b", "@", text))


def majority(questions, key):
    answers = collections.defaultdict(collections.Counter)
    for question in questions:
        answers[key(question)][question.answer] += 1
    return sum(counter.most_common(1)[0][1] for counter in answers.values()) / len(questions)


def test_the_text_alone_gives_little_away(questions):
    assert majority(questions, lambda question: question.type) < 0.25
    assert majority(questions, lambda question: (question.type, masked(question.text))) < 0.30


def test_every_type_is_balanced(questions):
    counts = collections.defaultdict(collections.Counter)
    for question in questions:
        counts[question.type][question.answer] += 1
    assert set(counts) == {"exist", "count", "query", "compare", "relate"}
    share = {kind: counter.total() / len(questions) for kind, counter in counts.items()}
    assert min(share.values()) > 0.05
    for kind in ("exist", "compare"):
        assert 0.49 < counts[kind]["yes"] / counts[kind].total() < 0.51
    assert max(counts["count"].values()) / counts["count"].total() < 0.36
    for kind in ("query", "relate"):
        for attribute in ("color", "shape"):
            of = [counts[kind][value] for value in KINDS[attribute]]
            assert max(of) < 1.1 * min(of)


def test_words_in_yes_no_questions_do_not_tell_the_answer(questions):
    yes = collections.Counter()
    total = collections.Counter()
    for question in questions:
        if question.answer in ("yes", "no"):
            for word in set(question.text.split()):
                total[word] += 1
                yes[word] += question.answer == "yes"
    common = {word: yes[word] / n for word, n in total.items() if n >= 100}
    assert len(common) > 10
    assert all(0.35 < share < 0.65 for share in common.values()), common


def test_statements_are_half_true_and_their_words_do_not_tell():
    source = SceneStatements("train", 2000)
    labels, true_words, words = [], collections.Counter(), collections.Counter()
    for index in range(len(source)):
        record = source[index]
        labels.append(record["label"])
        for word in record["statement"].split():
            words[word] += 1
            true_words[word] += record["label"]
    assert np.mean(labels) == 0.5
    assert all(0.4 < true_words[word] / n < 0.6 for word, n in words.items() if n >= 100)


# --- Splits and determinism ----------------------------------------------------------------------


def test_splits_share_no_set_of_pairs():
    shown = {
        split: {
            pair_set(make_scene(split, number, seed)) for seed in (0, 1) for number in range(1500)
        }
        for split in SPLITS
    }
    for a, b in itertools.combinations(SPLITS, 2):
        assert not shown[a] & shown[b]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_500_evaluation_scenes_differ_in_their_sets(split):
    assert len({pair_set(make_scene(split, number)) for number in range(500)}) == 500


def test_held_out_pairs_are_shown_in_composition_alone():
    held_out = set(HELD_OUT)
    for split in ("train", "validation", "test"):
        assert not any(held_out & pair_set(make_scene(split, number)) for number in range(1000))
    shown = [held_out & pair_set(make_scene("composition", number)) for number in range(400)]
    assert all(shown)
    assert set().union(*shown) == held_out
    assert sorted(color for color, _ in HELD_OUT) == sorted(KINDS["color"])
    assert {shape for _, shape in HELD_OUT} == set(KINDS["shape"])


def test_training_texts_never_speak_of_held_out_pairs():
    spoken = re.compile("|".join(f"{color} {shape}" for color, shape in HELD_OUT))
    for number in range(300):
        scene = make_scene("train", number)
        texts = [*captions(scene), *statement_pair(scene), ask("train", number).text]
        assert not any(spoken.search(text) for text in texts)


def test_every_color_and_shape_is_common_in_training():
    for kind, values in (("color", KINDS["color"]), ("shape", KINDS["shape"])):
        seen = collections.Counter(
            getattr(thing, kind)
            for number in range(1000)
            for thing in make_scene("train", number).objects
        )
        assert max(seen[value] for value in values) < 1.4 * min(seen[value] for value in values)


def test_records_are_the_same_for_ever():
    scene = make_scene("train", 17, seed=3)
    graph = [
        [thing.color, thing.shape, thing.size, thing.pattern, round(thing.x, 9), round(thing.y, 9)]
        for thing in scene.objects
    ]
    questions = [ask("validation", index) for index in range(10)]
    texts = [*captions(scene), *statement_pair(scene)]
    texts += [f"{question.text} {question.answer}" for question in questions]
    assert (digest(graph), digest(texts)) == ("32ec6b73e0b329a5", "4e366e61c71a86ec")


def test_records_depend_on_index_and_seed_but_not_on_size():
    def texts(source):
        return [source[index]["captions"] for index in range(10)]

    assert texts(Scenes("train", 10)) == texts(Scenes("train", 1000))
    assert texts(Scenes("train", 10)) != texts(Scenes("train", 10, seed=1))


def test_sources_survive_pickling_and_threads():
    for make in (Scenes, SceneQuestions, SceneStatements):
        source = make("test", 40, regions=True)
        expected = [source[index] for index in range(len(source))]
        scenes.world._pair_sets.cache_clear()
        copy = pickle.loads(pickle.dumps(source))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            records = list(pool.map(copy.__getitem__, range(len(copy))))
        for record, other in zip(records, expected, strict=True):
            assert record.keys() == other.keys()
            for key, value in record.items():
                np.testing.assert_array_equal(value, other[key], err_msg=key)


# --- The sources as such -------------------------------------------------------------------------


def test_records_have_the_keys_of_their_task():
    picture = {"image", "image_id", "name"}
    assert set(Scenes("train", 3)[0]) == picture | {"captions"}
    questions = SceneQuestions("validation", 300)
    assert set(questions[0]) == picture | {"question", "answers", "question_type", "question_id"}
    assert set(SceneStatements("train", 3)[0]) == picture | {
        "statement",
        "label",
        "statement_type",
    }
    answers = questions.answer_list()
    assert len(set(answers)) == len(answers)
    records = [questions[index] for index in range(len(questions))]
    assert [record["question_id"] for record in records] == list(range(300))
    pictures = Scenes("validation", 400)
    for record in records[:20]:
        assert list(record["answers"].values()) == [1.0]
        assert set(record["answers"]) <= set(answers)
        same = pictures[record["image_id"]]
        assert same["name"] == record["name"]
        np.testing.assert_array_equal(same["image"], record["image"])


def test_the_texts_for_a_vocabulary_hold_every_word():
    source = SceneStatements("train", 2000)
    known = {word for text in source.texts() for word in re.findall(r"\w+", text)}
    for index in range(len(source)):
        assert set(source[index]["statement"].split()) <= known
    for split in SPLITS:
        for number in range(300):
            scene = make_scene(split, number)
            for text in (*captions(scene), ask(split, number).text):
                assert set(re.findall(r"\w+", text)) <= known, text


def test_an_index_beyond_the_end_is_refused():
    for source in (Scenes("train", 3), SceneQuestions("train", 3), SceneStatements("train", 3)):
        assert len(source) == 3
        for index in (3, -1):
            with pytest.raises(IndexError):
                source[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validate", "size": 3}, "validation"),
        ({"split": "train", "size": 0}, "size=0"),
        ({"split": "train", "size": 3, "image_size": 32}, "image_size=32"),
    ],
)
def test_impossible_sources_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SceneQuestions(**arguments)


def test_object_counts_are_kept_and_checked():
    source = Scenes("train", 6, object_counts=(2, 3), regions=True)
    assert [len(source[index]["tags"]) for index in range(6)] == [2, 3, 2, 3, 2, 3]
    for counts in ((), (1,), (5,)):
        with pytest.raises(InputError, match="object_counts"):
            Scenes("train", 6, object_counts=counts)
