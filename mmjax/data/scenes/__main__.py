"""Draws a sheet of scenes with their texts: python -m mmjax.data.scenes --output=FOLDER."""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmjax.data.scenes.drawing import draw
from mmjax.data.scenes.language import captions, statement_pair
from mmjax.data.scenes.questions import ask
from mmjax.data.scenes.world import SPLITS

_PICTURE, _WIDTH, _HEIGHT, _COLUMNS = 192, 320, 460, 4


def main() -> None:
    """Writes FOLDER/scenes.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for scenes.png")
    parser.add_argument("--count", type=int, default=12, help="number of scenes")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--image_size", type=int, default=64, help="pixels, shown at 192")
    arguments = parser.parse_args()

    rows = -(-arguments.count // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _WIDTH, rows * _HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i in range(arguments.count):
        left, top = 16 + i % _COLUMNS * _WIDTH, 16 + i // _COLUMNS * _HEIGHT
        question = ask(arguments.split, 3 * i)
        scene = question.scene
        picture = Image.fromarray(draw(scene, arguments.image_size))
        sheet.paste(picture.resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (left, top))
        _, true, false = statement_pair(scene)
        texts = [
            *(f"- {caption}" for caption in captions(scene)[:3]),
            f"{question.text}? {question.answer}",
            f"true: {true}",
            f"false: {false}",
        ]
        lines = [line for text in texts for line in textwrap.wrap(text, 46)]
        pen.multiline_text((left, top + _PICTURE + 8), "\n".join(lines), "black", font)
    arguments.output.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output / "scenes.png")


if __name__ == "__main__":
    main()
