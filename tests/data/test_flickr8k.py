import pickle

import pytest

from mmjax.data.flickr8k import Flickr8k
from mmjax.data.image import decode_image
from mmjax.errors import InputError

CAPTIONS = """\
b.jpg#1\tA second caption of b .
b.jpg#0\tA dog runs .
a.jpg#0\tA cat sits .
c.jpg#0\tA bird flies .
2258277193_586949ec62.jpg.1#0\tA caption of a picture that does not exist .
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_text(CAPTIONS)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("b.jpg\na.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("c.jpg\n")
    (tmp_path / "images").mkdir()
    for name in "abc":
        (tmp_path / f"images/{name}.jpg").write_bytes(b"never opened")
    return tmp_path


def write_captions(root, row):
    """Puts `row` (bytes or text) in the place of the third row of the captions."""
    rows = CAPTIONS.encode().splitlines()
    rows[2] = row if isinstance(row, bytes) else row.encode()
    (root / "Flickr8k.token.txt").write_bytes(b"\n".join(rows) + b"\n")


def test_records_follow_the_split_list(root):
    source = Flickr8k(root, "train")
    assert len(source) == 2
    assert source[0] == {
        "image": root / "images/b.jpg",
        "image_id": 0,
        "name": "b.jpg",
        "captions": ["A dog runs .", "A second caption of b ."],
    }
    assert source[1]["captions"] == ["A cat sits ."]
    assert [record["image_id"] for record in source] == [0, 1]
    with pytest.raises(IndexError):
        source[2]


def test_dev_is_also_called_validation(root):
    assert Flickr8k(root, "dev")[0] == Flickr8k(root, "validation")[0]
    assert Flickr8k(root, "dev")[0]["name"] == "c.jpg"


def test_travels_to_other_processes(root):
    source = Flickr8k(root, "train")
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_windows_line_ends_and_byte_order_mark(root):
    text = b"\xef\xbb\xbf" + CAPTIONS.replace("\n", "\r\n").encode() + b"\r\n"
    (root / "Flickr8k.token.txt").write_bytes(text)
    (root / "Flickr_8k.trainImages.txt").write_bytes(b"b.jpg\r\na.jpg\r\n")
    assert Flickr8k(root, "train")[0]["captions"][0] == "A dog runs ."


@pytest.mark.parametrize("name", ["Flicker8k_Dataset", "Flickr8k_Dataset"])
def test_published_folder_names(root, name):
    (root / "images").rename(root / name)
    assert Flickr8k(root, "train")[0]["image"] == root / name / "b.jpg"


def test_unknown_split(root):
    with pytest.raises(InputError, match=r"data.split = 'trian'.*Did you mean train"):
        Flickr8k(root, "trian")


def test_missing_root(tmp_path):
    with pytest.raises(InputError, match=r"data.root = .*nowhere: there is no such folder"):
        Flickr8k(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("missing", "split"),
    [("Flickr8k.token.txt", "train"), ("Flickr_8k.testImages.txt", "test")],
)
def test_missing_file(root, missing, split):
    (root / missing).unlink(missing_ok=True)
    with pytest.raises(InputError, match=f"{missing} does not exist.*expected as published"):
        Flickr8k(root, split)


def test_missing_image_folder(root):
    (root / "images").rename(root / "photos")
    with pytest.raises(InputError, match="looked for images, Flicker8k_Dataset, Flickr8k_Dataset"):
        Flickr8k(root, "train")


def test_empty_image_folder(root):
    for path in (root / "images").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="images is empty"):
        Flickr8k(root, "train")


def test_absent_pictures_are_counted_and_named(root):
    names = [f"{i}.jpg" for i in range(7)]
    (root / "Flickr_8k.trainImages.txt").write_text("\n".join(["a.jpg", *names]))
    with (root / "Flickr8k.token.txt").open("a") as file:
        file.writelines(f"{name}#0\tA caption .\n" for name in names)
    with pytest.raises(
        InputError,
        match=r"7 pictures of Flickr_8k.trainImages.txt not there: 0.jpg, .*, 4.jpg, … ?\.",
    ):
        Flickr8k(root, "train")


def test_picture_without_caption(root):
    write_captions(root, "")
    with pytest.raises(InputError, match=r"token.txt: 1 picture .*without a caption: a.jpg"):
        Flickr8k(root, "train")


@pytest.mark.parametrize("row", ["a.jpg#0 A cat sits .", "a.jpg\tA cat sits .", "#0\tA cat ."])
def test_malformed_row(root, row):
    write_captions(root, row)
    with pytest.raises(InputError, match=r"token.txt, row 3: expected NAME.jpg#NUMBER"):
        Flickr8k(root, "train")


@pytest.mark.parametrize("row", ["a.jpg#0\t", "a.jpg#0\t   "])
def test_empty_caption(root, row):
    write_captions(root, row)
    with pytest.raises(InputError, match=r"token.txt, row 3: the caption of a.jpg#0 is empty"):
        Flickr8k(root, "train")


def test_empty_caption_of_another_split_does_not_matter(root):
    write_captions(root, "a.jpg#0\t")
    assert len(Flickr8k(root, "dev")) == 1


def test_caption_not_utf8(root):
    write_captions(root, "a.jpg#0\tA café .".encode("latin-1"))
    with pytest.raises(InputError, match=r"token.txt, row 3: not UTF-8 \(byte 14 .* 0xe9\)"):
        Flickr8k(root, "train")


def test_caption_number_twice(root):
    write_captions(root, "b.jpg#0\tAnother first caption .")
    with pytest.raises(InputError, match=r"token.txt, row 3: b.jpg#0 is there twice"):
        Flickr8k(root, "train")


def test_name_twice_in_the_split(root):
    (root / "Flickr_8k.trainImages.txt").write_text("a.jpg\nb.jpg\na.jpg\n")
    with pytest.raises(InputError, match=r"trainImages.txt, rows 1 and 3: a.jpg is listed twice"):
        Flickr8k(root, "train")


def test_empty_split(root):
    (root / "Flickr_8k.trainImages.txt").write_text("\n")
    with pytest.raises(InputError, match=r"trainImages.txt is empty"):
        Flickr8k(root, "train")


def test_the_real_data(shared):
    train = Flickr8k(shared / "data/flickr8k", "train")
    dev = Flickr8k(shared / "data/flickr8k", "dev")
    assert (len(train), len(dev)) == (800, 200)
    assert all(len(record["captions"]) == 5 for source in (train, dev) for record in source)
    assert not {record["name"] for record in train} & {record["name"] for record in dev}
    assert train[0]["name"] == "2513260012_03d33305cf.jpg"
    assert decode_image(train[0]["image"], train[0]["name"]).shape == (224, 224, 3)
