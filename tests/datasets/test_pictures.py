import io

import numpy as np
import pytest
import torch
from PIL import Image

from kclib.datasets import _pictures
from kclib.errors import DamagedFileError, InvalidValueError

GREY = np.array([[0, 1000, 32768], [65535, 257, 128 * 257]], np.uint16)  # 16 bits: 257 is one of 8
SCALED = [[0, 4, 128], [255, 1, 128]]


def through_file(image: Image.Image, path, **options) -> np.ndarray:
    image.save(path, **options)
    found = _pictures.read(path)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bits_are_scaled_not_cut_off(tmp_path, name):
    found = through_file(Image.fromarray(GREY), tmp_path / name)
    assert found.tolist() == np.repeat(np.array(SCALED)[:, :, None], 3, 2).tolist()


def test_a_tiff_of_12_bits_has_its_white_at_4095():
    image = Image.fromarray(np.array([[0, 4095]], np.uint16))
    image.tag_v2 = {258: (12,)}
    assert np.asarray(_pictures.as_rgb(image))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(("mode", "white"), [("1", 1), ("L", 255)])
def test_grey_is_the_same_in_three_channels(tmp_path, mode, white):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), white)
    assert through_file(image, tmp_path / "a.png").tolist() == [[[0] * 3, [255] * 3]]


def test_a_palette_is_its_colours_not_its_indices(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert through_file(image, tmp_path / "a.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_palettes_transparent_colour_lies_on_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    found = through_file(image, tmp_path / "a.png", transparency=transparency)
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 100, 255, 51), (204, 224, 255)),  # a fifth of the colour, four of white
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (7, 255), (7, 7, 7)),
    ],
)
def test_transparent_pixels_lie_on_white(tmp_path, mode, pixel, expected):
    assert through_file(Image.new(mode, (1, 1), pixel), tmp_path / "a.png")[0, 0].tolist() == list(expected)


@pytest.mark.parametrize(("mode", "pixel"), [("RGB", (10, 20, 30)), ("L", 7)])
def test_a_colour_declared_transparent_lies_on_white(tmp_path, mode, pixel):
    found = through_file(Image.new(mode, (1, 1), pixel), tmp_path / "a.png", transparency=pixel)
    assert found[0, 0].tolist() == [255, 255, 255]


def test_cmyk_is_converted(tmp_path):
    for pixel, expected in (((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0))):
        found = through_file(Image.new("CMYK", (8, 8), pixel), tmp_path / "a.jpg", quality=100)
        assert np.abs(found[4, 4] - expected).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_the_cameras_orientation_is_applied(tmp_path, orientation, mode):
    """EXIF's table: what the file's first row and first column are in the picture."""
    first = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    first |= {5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}
    image = Image.new(mode, (3, 2))
    image.putpixel((0, 0), (255, 255, 255) if mode == "RGB" else 65535)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = through_file(image, tmp_path / "a.png", exif=exif)[:, :, 0]
    assert found.shape == ((2, 3) if orientation < 5 else (3, 2))
    row, column = (0 if side in first[orientation] else -1 for side in ("top", "left"))
    assert found[row, column] == 255
    assert (found > 0).sum() == 1


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(_pictures.read(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_white_are_refused(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "a.tif")
    with pytest.raises(DamagedFileError, match=rf"a\.tif.*mode {mode}.*8 or 16 bits"):
        _pictures.read(tmp_path / "a.tif")
    with pytest.raises(InvalidValueError, match="white"):
        _pictures.as_rgb(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp"])
def test_a_damaged_picture_is_named_by_its_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for part in (whole[:300], whole[: len(whole) // 2], b"", b"<html>"):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(DamagedFileError, match=str(tmp_path / name)):
            _pictures.read(tmp_path / name)


def test_damaged_exif_leaves_the_pixels(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG", exif=b"Exif\0\0nonsense")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert np.asarray(_pictures.read(tmp_path / "a.png"))[0, 0].tolist() == [255, 0, 0]


def test_pictures_are_a_data_set_of_images_and_labels(tmp_path):
    Image.new("L", (2, 2), 9).save(tmp_path / "a.png")
    data = _pictures.Pictures([(str(tmp_path / "a.png"), 3)])
    image, label = data[0]
    assert (len(data), image.getpixel((0, 0)), label) == (1, (9, 9, 9), 3)
    assert isinstance(data, torch.utils.data.Dataset)
