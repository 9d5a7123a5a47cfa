"""Image files as people keep them: each decoded exactly, or refused with the reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DataError
from pipeline.images import MAX_IMAGE_PIXELS, find_images, find_unsupported_images, read_image


def picture(height: int = 24, width: int = 40) -> NDArray[np.uint8]:
    """Four flat quadrants, of which no turn or mirror image is the same."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (200, 40, 40)
    image[: height // 2, width // 2 :] = (40, 200, 40)
    image[height // 2 :, : width // 2] = (40, 40, 200)
    image[height // 2 :, width // 2 :] = (220, 220, 220)
    return image


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than its few bytes hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


class TestConversions:
    def test_rgb_is_what_was_saved(self, tmp_path: Path) -> None:
        Image.fromarray(picture()).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())

    def test_gray_is_repeated(self, tmp_path: Path) -> None:
        gray = picture()[:, :, 1]
        Image.fromarray(gray).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.stack([gray] * 3, axis=2))

    def test_a_palette_is_looked_up(self, tmp_path: Path) -> None:
        Image.fromarray(picture()).quantize(8).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())

    def test_alpha_is_dropped_not_blended(self, tmp_path: Path) -> None:
        alpha = np.full((24, 40, 1), 7, np.uint8)
        Image.fromarray(np.concatenate([picture(), alpha], axis=2)).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())

    def test_cmyk_is_converted_as_pillow_documents(self, tmp_path: Path) -> None:
        Image.fromarray(picture()).convert("CMYK").save(tmp_path / "a.jpg", quality=95, subsampling=0)
        with Image.open(tmp_path / "a.jpg") as saved:
            assert saved.mode == "CMYK"
            c, m, y, k = (np.asarray(band).astype(int) for band in saved.split())
        # Every colour is darkened by its ink and by the black ink.
        expected = np.stack([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)], axis=2)
        found = read_image(tmp_path / "a.jpg").astype(int)
        assert np.abs(found - expected).max() <= 1
        assert np.abs(found - picture()).mean() < 8  # and it is the picture, not its negative

    def test_16_bit_gray_is_scaled_over_its_whole_range(self, tmp_path: Path) -> None:
        wide = np.array([[0, 257, 32768], [65535, 128, 129]], np.uint16)
        Image.fromarray(wide).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png")[:, :, 0].tolist() == [[0, 1, 128], [255, 0, 1]]

    def test_32_bit_pixels_are_refused(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match="32-bit"):
            read_image(tmp_path / "a.tif")

    @pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "gif", "tif", "ppm"])
    def test_the_usual_formats_are_read(self, tmp_path: Path, suffix: str) -> None:
        Image.fromarray(picture()).save(tmp_path / f"a.{suffix}")
        assert np.abs(read_image(tmp_path / f"a.{suffix}").astype(int) - picture()).mean() < 12


class TestExif:
    @pytest.mark.parametrize(
        ("orientation", "stored"),
        [
            (1, lambda image: image),
            (2, lambda image: image[:, ::-1]),
            (3, lambda image: image[::-1, ::-1]),
            (4, lambda image: image[::-1]),
            (5, lambda image: image.transpose(1, 0, 2)),
            (6, lambda image: np.rot90(image, 1)),
            (7, lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
            (8, lambda image: np.rot90(image, -1)),
        ],
    )
    def test_every_orientation_comes_out_upright(self, tmp_path: Path, orientation: int, stored) -> None:  # type: ignore[no-untyped-def]
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(stored(picture()))).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())

    def test_16_bit_gray_is_turned_too(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        wide = np.arange(12, dtype=np.uint16).reshape(3, 4) * 257
        Image.fromarray(wide).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[:, :, 0], np.rot90(wide // 257, -1))

    @pytest.mark.parametrize("orientation", [0, 9, 500])
    def test_an_orientation_that_does_not_exist_is_ignored(self, tmp_path: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_corrupt_exif_does_not_lose_the_photograph(self, tmp_path: Path) -> None:
        Image.fromarray(picture()).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())


class TestRefusals:
    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="unreadable"):
            read_image(tmp_path / "a.png")

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").touch()
        with pytest.raises(DataError, match="empty file"):
            read_image(tmp_path / "a.jpg")

    def test_bytes_that_are_no_image(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
        with pytest.raises(DataError, match="unreadable"):
            read_image(tmp_path / "a.jpg")

    @pytest.mark.parametrize("suffix", ["jpg", "png"])
    def test_a_truncated_file(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"a.{suffix}"
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match="unreadable"):
            read_image(path)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("side", [int(MAX_IMAGE_PIXELS**0.5) + 1, 12_000, 30_000])
    def test_a_bomb_is_refused_by_its_header(self, tmp_path: Path, side: int) -> None:
        (tmp_path / "a.png").write_bytes(png_of_size(side, side))
        with pytest.raises(DataError, match="pixels") as refusal:
            read_image(tmp_path / "a.png")
        assert "truncated" not in str(refusal.value)  # the decoder was not asked

    def test_an_image_at_the_limit_is_decoded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.fromarray(picture()).save(tmp_path / "a.png")
        monkeypatch.setattr("pipeline.images.MAX_IMAGE_PIXELS", 24 * 40)
        assert read_image(tmp_path / "a.png").shape == (24, 40, 3)
        monkeypatch.setattr("pipeline.images.MAX_IMAGE_PIXELS", 24 * 40 - 1)
        with pytest.raises(DataError, match="40×24 pixels; the limit is 959"):
            read_image(tmp_path / "a.png")

    def test_a_line_of_pixels(self, tmp_path: Path) -> None:
        Image.fromarray(np.zeros((1, 300, 3), np.uint8)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match="300×1"):
            read_image(tmp_path / "a.png")

    def test_a_format_whose_decoder_runs_a_program(self, tmp_path: Path) -> None:
        Image.fromarray(picture()).save(tmp_path / "a.eps")
        (tmp_path / "a.eps").rename(tmp_path / "a.png")
        with pytest.raises(DataError, match="unreadable"):
            read_image(tmp_path / "a.png")


def test_find_images_goes_by_name_in_sorted_order(tmp_path: Path) -> None:
    for name in (
        "b/2.JPG",
        "b/10.png",
        "a/1.jpeg",
        "z.webp",
        ".hidden.jpg",
        ".git/x.png",
        "notes.txt",
        "c.heic",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a/1.jpeg", "b/10.png", "b/2.JPG", "z.webp"]
    assert [path.name for path in find_unsupported_images(tmp_path)] == ["c.heic"]
