"""From pictures and texts to the batch that a pretrained model takes, and back to text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax.errors import InputError
from mmjax.json_files import find_json, write_json
from mmjax.processing.families import read_image_processor
from mmjax.processing.pixels import ImageProcessor, Picture
from mmjax.processing.tokenizer import PretrainedTokenizer
from mmjax.processing.tokenizer_config import load_tokenizer

PROCESSOR = "processor"  # the folder of it inside a checkpoint of ours

# The image processor where the folder does not name it, by the model's family.
_PIXELS_OF_FAMILY = {
    **dict.fromkeys(("vit", "swin"), "ViTImageProcessor"),
    "deit": "DeiTImageProcessor",
    "resnet": "ConvNextImageProcessor",
    **dict.fromkeys(("align", "efficientnet"), "EfficientNetImageProcessor"),
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "blip": "BlipImageProcessor",
    "vilt": "ViltImageProcessor",
    "flava": "FlavaImageProcessor",
    "bridgetower": "BridgeTowerImageProcessor",
}
# Families whose texts are treated in a way that the tokenizer alone does not tell.
_PROCESSOR_OF_FAMILY = {
    "align": "AlignProcessor",
    "blip": "BlipProcessor",
    "siglip": "SiglipProcessor",
    "siglip2": "Siglip2Processor",
}


@dataclass(frozen=True)
class Processor:
    """What a model was trained to see and to read: `load_processor` makes one of a folder.

    Attributes:
      pixels: from pictures to `image`; None where the folder speaks of no pictures.
      tokenizer: from texts to `text`; None where the folder has no vocabulary.
      processor_class: the name that `transformers` has for the two together.
    """

    pixels: ImageProcessor | None
    tokenizer: PretrainedTokenizer | None
    processor_class: str | None = None

    def __call__(
        self,
        image: Picture | Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
        text_pair: str | Sequence[str] | None = None,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """A batch as the model takes it: `model(**processor(image=…, text=…))`.

        Args:
          image: pictures: Pillow's, paths, encoded bytes, or uint8 pixels [H, W, 3]. A single one
            is a batch of one, here and in `text`.
          text: texts; there may be another number of them than of pictures.
          text_pair: a second text to each of them.
          length: pad and cut texts to so many tokens. Without it they are padded to the longest and
            cut to what the model can read; for CLIP, SigLIP and ALIGN always padded, to the 77, 64
            and 64 tokens that these were trained with.

        Returns:
          `image` float32 [B, H, W, 3], normalised; `image_mask` bool [B, H, W], True on a picture,
          where they are padded; `text` int32 [B, L]; `text_mask` bool [B, L], True on a token,
          unless the model attends to padding too; `text_type` int32 [B, L], 1 on second texts,
          where the model has token types.

        Raises:
          InputError: neither is given, or something is no picture or no text.
        """
        if image is None and text is None:
            raise InputError("Give the processor pictures (image=…), texts (text=…), or both.")
        if text_pair is not None and text is None:
            raise InputError(
                "text_pair holds the second of two texts; the first, text, is missing."
            )
        batch: dict[str, np.ndarray] = {}
        if image is not None:
            if self.pixels is None:
                raise InputError("This processor has no image config, and takes texts only.")
            batch |= self.pixels(_pictures(image))
        if text is not None:
            pairs = None if text_pair is None else _texts(text_pair, "text_pair")
            batch |= self._reader()(_texts(text, "text"), pairs, length)
        return batch

    def decode(self, ids: Any) -> str | list[str]:
        """The text of generated ids [L], or the texts of ids [B, L], without special tokens.

        Raises:
          InputError: these are no ids.
        """
        try:
            array = np.asarray(ids)
        except ValueError as error:
            raise InputError("Ids in rows of different lengths are decoded row by row.") from error
        whole = np.issubdtype(array.dtype, np.integer) or array.size == 0
        if not whole or array.ndim not in (1, 2):
            raise InputError(
                f"Ids are whole numbers [L] or [B, L], not {array.dtype} {array.shape}."
            )
        if (array < 0).any():
            raise InputError(f"Ids count from 0; there is {array.min()} among them.")
        if array.ndim == 2:
            return [self._reader().decode(row) for row in array.tolist()]
        return self._reader().decode(array.tolist())

    def save(self, folder: str | Path) -> None:
        """Writes what `load_processor` and `transformers` read into a folder.

        Raises:
          InputError: the folder cannot be written, or a file in it would hide what is written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} is no folder to write to: {error.strerror}.") from error
        if (folder / "processor_config.json").exists():
            raise InputError(
                f"{folder} has a processor_config.json, which would be read instead of the "
                "preprocessor_config.json written here. Delete it, or save elsewhere."
            )
        if self.pixels is not None:
            named = {"processor_class": self.processor_class} if self.processor_class else {}
            write_json(folder / "preprocessor_config.json", self.pixels.to_config() | named)
        if self.tokenizer is not None:
            self.tokenizer.save(folder, self.processor_class)

    def _reader(self) -> PretrainedTokenizer:
        if self.tokenizer is None:
            raise InputError("This processor has no tokenizer, and takes pictures only.")
        return self.tokenizer


def load_processor(source: str | Path) -> Processor:
    """The processor of a model from its Hugging Face folder, or its Hub name (`hf://owner/name`).

    A checkpoint of ours that was converted from such a folder has it in its folder `processor`.

    Read are `preprocessor_config.json` or `processor_config.json`, and of the tokenizer
    `tokenizer.json`, else `vocab.txt`, `vocab.json` with `merges.txt`, or `spiece.model` (which
    SigLIP has first), with `tokenizer_config.json`; `config.json` for what these leave open.
    Nothing in the folder is executed, and no path that a file names is followed.

    Raises:
      InputError: the folder is missing or has neither, or a file in it is broken.
    """
    from mmjax.weights.hub import resolve  # here, because weights bring all models along

    folder = resolve(source, weights=False)
    if (folder / PROCESSOR).is_dir():
        folder = folder / PROCESSOR
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. A model's folder has its config.json in it.")
    model_config = find_json(folder / "config.json") or {}
    tokenizer_config = find_json(folder / "tokenizer_config.json") or {}
    name, config = _image_config(folder)
    processor_class = next(
        (c["processor_class"] for c in (config, tokenizer_config) if c.get("processor_class")), None
    )
    family = str(processor_class or "").removesuffix("Processor").lower()
    if family not in _PIXELS_OF_FAMILY:
        family = str(model_config.get("model_type"))
    pixels = None
    if name is not None:
        pixels = _read_pixels(folder / name, config, model_config, family)
    tokenizer = load_tokenizer(folder, model_config, family)
    if pixels is None and tokenizer is None:
        raise InputError(
            f"{folder} has neither an image config (preprocessor_config.json) nor a tokenizer "
            "(tokenizer.json, vocab.txt, vocab.json with merges.txt, or spiece.model)."
        )
    return Processor(pixels, tokenizer, processor_class or _PROCESSOR_OF_FAMILY.get(family))


def load_pixels(folder: Path, model_config: Mapping[str, Any]) -> ImageProcessor | None:
    """What a folder says of pictures alone; None where it says nothing."""
    name, config = _image_config(folder)
    if name is None:
        return None
    return _read_pixels(folder / name, config, model_config, str(model_config.get("model_type")))


def _read_pixels(
    path: Path, config: dict[str, Any], model_config: Mapping[str, Any], family: str
) -> ImageProcessor:
    type_name = _image_type(config, model_config, family, origin=str(path))
    return read_image_processor(config, type_name, origin=str(path))


def save_processor(processor: Processor, folder: str | Path) -> None:
    """As `Processor.save`."""
    processor.save(folder)


def _image_config(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The file that speaks of pictures, and what it says; without one, what is said of both."""
    both = find_json(folder / "processor_config.json") or {}
    named = {"processor_class": both.get("processor_class")}
    if isinstance(both.get("image_processor"), dict):
        return "processor_config.json", named | both["image_processor"]
    alone = find_json(folder / "preprocessor_config.json")
    return (None, named) if alone is None else ("preprocessor_config.json", named | alone)


def _image_type(
    config: Mapping[str, Any], model_config: Mapping[str, Any], family: str, origin: str
) -> str:
    """The class of the image processor: as the file names it, else by the model."""
    for key in ("image_processor_type", "feature_extractor_type"):
        if config.get(key):
            return str(config[key])
    parts = [model_config.get("vision_config"), model_config.get("encoder")]
    families = [family, *(part.get("model_type") for part in parts if isinstance(part, dict))]
    for each in families:
        if each in _PIXELS_OF_FAMILY:
            return _PIXELS_OF_FAMILY[each]
    raise InputError(
        f"{origin} names no image_processor_type, and no config.json beside it tells the model's "
        'family. Add, for instance, "image_processor_type": "CLIPImageProcessor".'
    )


def _pictures(image: Picture | Sequence[Picture]) -> Sequence[Picture]:
    match image:
        case Image.Image() | str() | Path() | bytes():
            return [image]
        case np.ndarray():
            return list(image) if image.ndim == 4 else [image]
        case [*pictures]:
            return pictures
    raise InputError(f"image: expected a list of pictures, found {type(image).__name__}.")


def _texts(text: str | Sequence[str], name: str) -> Sequence[str]:
    if isinstance(text, str):
        return [text]
    if isinstance(text, bytes) or not isinstance(text, Sequence):
        raise InputError(f"{name}: expected a list of texts, found {type(text).__name__}.")
    return text
