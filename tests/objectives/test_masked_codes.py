"""Masked image modelling: which patches are hidden, and the loss of their codes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.objectives import Features, Masking
from mmjax.objectives.loss import example_keys
from mmjax.objectives.masked_codes import MaskedCodes, MaskedCodesAlone
from mmjax.objectives.masking import PROPOSALS, blocks_of, choose_blocks
from tests.objectives.fakes import FakeModel, FakeTokenizer, batch_of, encoded

# ---- which patches

GRIDS = [((14, 14), 78), ((14, 14), 20), ((5, 9), 18), ((4, 4), 6), ((1, 6), 3), ((3, 3), 9)]


def blocks_by_loops(uniform, grid, count):
    """BEiT's algorithm 1 with its code's rule that the share is never exceeded."""
    height, width = grid
    mask = np.zeros(grid, bool)
    for area, ratio, down, right in uniform.astype(np.float64):
        left = count - mask.sum()
        area = min(16, left) + area * (left - min(16, left))
        ratio = 0.3 * (1 / 0.3 / 0.3) ** ratio
        tall, wide = int(np.rint(np.sqrt(area * ratio))), int(np.rint(np.sqrt(area / ratio)))
        if tall > height or wide > width:
            continue
        top, start = int(down * (height - tall + 1)), int(right * (width - wide + 1))
        block = np.zeros(grid, bool)
        block[top : top + tall, start : start + wide] = True
        if (block & ~mask).sum() <= left:
            mask |= block
    return mask


@pytest.mark.parametrize(("grid", "count"), GRIDS, ids=str)
def test_blocks_agree_with_the_algorithm(grid, count):
    blocks = jax.jit(blocks_of, static_argnums=(1, 2))
    for seed in range(20):
        uniform = np.random.default_rng(seed).random((PROPOSALS, 4), np.float32)
        found = blocks(jnp.array(uniform), grid, count)
        np.testing.assert_array_equal(found, blocks_by_loops(uniform, grid, count))


def blocks(pictures=2000, grid=(14, 14), rate=0.4, key=0, index=None):
    index = np.arange(pictures) if index is None else index
    keys = example_keys(jax.random.key(key), jnp.array(index))
    return np.asarray(jax.jit(choose_blocks, static_argnums=(1, 2))(keys, grid, rate))


@pytest.mark.parametrize(("grid", "rate"), [((14, 14), 0.4), ((24, 24), 0.4), ((4, 4), 0.2)])
def test_the_share_is_reached_and_never_exceeded(grid, rate):
    hidden, wanted = blocks(500, grid, rate).sum(axis=1), round(rate * grid[0] * grid[1])
    assert hidden.max() == wanted
    assert (hidden == wanted).mean() > 0.99


def test_what_is_hidden_hangs_together_and_is_everywhere():
    chosen = blocks().reshape(-1, 14, 14)
    share = chosen.mean(axis=0)
    assert 0.02 < share.min() < share.max() < 0.8  # blocks reach the corners less often
    neighbours = (chosen[:, 1:] & chosen[:, :-1]).mean() / chosen[:, 1:].mean()
    assert neighbours > 0.75  # of patches drawn one by one it would be 0.4


def test_blocks_belong_to_examples_not_to_rows():
    index = np.random.default_rng(0).permutation(10_000)[:30]
    order = np.random.default_rng(1).permutation(30)
    chosen = blocks(index=index)
    np.testing.assert_array_equal(blocks(index=index[order]), chosen[order])
    assert (blocks(index=index, key=1) != chosen).any()
    assert len(np.unique(chosen, axis=0)) == 30


# ---- the loss

ROWS, GRID, CODES = 5, (3, 4), 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, ROWS, 12, CODES)).astype(np.float32)  # of pairs, of pictures alone
VALID = np.arange(ROWS) != 1
BATCH = batch_of(
    ROWS,
    valid=VALID,
    image=RNG.normal(size=(ROWS, 14, 3)).astype(np.float32),
    text=RNG.integers(5, 40, (ROWS, 6)).astype(np.int32),
    text_mask=np.ones((ROWS, 6), bool),
    image_codes=RNG.integers(0, CODES, (ROWS, 12)).astype(np.int32),
)


class CodeModel(FakeModel):
    """Two class tokens stand before the patches; a hidden patch is zero."""

    masked_image = masked_image_alone = True

    def __init__(self, logits=LOGITS):
        super().__init__(config=SimpleNamespace(image=SimpleNamespace(grid=GRID)))
        self.logits, self.read = logits, []

    def encode_image(self, image, patch_mask=None, key=None):
        shown = jnp.ones(image.shape[:2], bool)
        if patch_mask is not None:
            shown = shown.at[:, 2:].set(~patch_mask)
        return encoded(image * shown[..., None])

    def encode_text(self, text, text_mask=None, key=None):
        self.read.append(np.asarray(text))
        return encoded(text, text_mask)

    def score_codes(self, tokens):
        return jnp.array(self.logits[0]) + 0 * self._seen(tokens)

    def score_codes_alone(self, tokens):
        return jnp.array(self.logits[1]) + 0 * self._seen(tokens)

    def _seen(self, tokens):
        self.hidden = ~np.asarray(tokens).any(
            axis=-1
        )  # of the patches: no class token is among them
        return tokens[..., :1]


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize(
    ("objective", "name", "logits"),
    [
        (MaskedCodes(), "masked_codes", LOGITS[0]),
        (MaskedCodesAlone(), "masked_codes_alone", LOGITS[1]),
    ],
)
def test_the_loss_agrees_with_plain_cross_entropy(objective, name, logits, conditional):
    model = CodeModel()
    features = Features(
        model, BATCH, tokenizer=FakeTokenizer(), masking=Masking(words=0.9, conditional=conditional)
    )
    loss = objective(features, jax.random.key(0))
    chosen, codes = model.hidden, np.asarray(BATCH["image_codes"])
    np.testing.assert_array_equal(chosen.sum(axis=1), np.where(VALID, 5, 0))  # 0.4 of 12
    x = logits.astype(np.float64)
    log_p = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    expected = -sum(log_p[b, i, codes[b, i]] for b, i in np.argwhere(chosen))
    np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
    assert loss.weight == chosen.sum()
    hits, weight = loss.metrics[f"{name}/accuracy"]
    np.testing.assert_allclose(hits / weight, (x.argmax(axis=-1) == codes)[chosen].mean())
    # Words are hidden in the same pass, or not at all.
    assert (model.read[-1] != BATCH["text"]).any() == (not conditional)


def test_the_gradient_is_probability_less_target():
    def total(logits):
        features = Features(
            CodeModel(jnp.stack([logits, logits])), BATCH, tokenizer=FakeTokenizer()
        )
        return MaskedCodes()(features, jax.random.key(0)).total

    model = CodeModel()
    MaskedCodes()(Features(model, BATCH, tokenizer=FakeTokenizer()), jax.random.key(0))
    gradient = jax.grad(total)(jnp.array(LOGITS[0]))
    target = jax.nn.one_hot(BATCH["image_codes"], CODES)
    expected = (jax.nn.softmax(LOGITS[0]) - target) * model.hidden[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_the_same_patches_are_hidden_of_an_example_in_any_row():
    order = np.array([3, 0, 4, 1, 2])
    masks = []
    for rows in (np.arange(ROWS), order):
        model = CodeModel()
        batch = {name: x[rows] for name, x in BATCH.items()}
        MaskedCodes()(Features(model, batch, tokenizer=FakeTokenizer()), jax.random.key(0))
        masks.append(model.hidden)
    np.testing.assert_array_equal(masks[1], masks[0][order])


def test_what_cannot_be_is_refused():
    batch = BATCH | {"image_codes": BATCH["image_codes"][:, :9]}
    with pytest.raises(InputError, match=r"9 image_codes .* 3 × 4 patches: set data.code_grid"):
        MaskedCodes()(Features(CodeModel(), batch, tokenizer=FakeTokenizer()), jax.random.key(0))
    for objective in (MaskedCodes(), MaskedCodesAlone()):
        with pytest.raises(InputError, match="take a model that has masked_image"):
            objective.check("masked_codes", FakeModel())
        objective.check("masked_codes", CodeModel())
