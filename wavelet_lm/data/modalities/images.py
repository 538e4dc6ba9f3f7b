"""Images as their pixels in reading order, 256 values each.

`pixels` reads grey values, `pixels_rgb` red, green and blue of each pixel in turn. All images of a
data set have one size, which is kept with the run; transparency is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.data.modalities.modality import Modality, needed
from wavelet_lm.errors import UserError
from wavelet_lm.json_files import brief

MOST_PIXELS = 1 << 20  # of a row or a column


class Pixels(Modality):
    """Images of one size. width, height: None until `fitted` has seen the files.

    Raises:
        ValueError: a width or height that no image has.
    """

    kind, output, vocab_size = "image", ".png", 256
    suffixes = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

    def __init__(self, name: str = "pixels", width: int | None = None, height: int | None = None):
        for side in (width, height):
            if side is not None and (type(side) is not int or not 1 <= side <= MOST_PIXELS):
                raise ValueError(f"width and height are whole numbers of pixels, not {brief(side)}")
        self.name, self.width, self.height = name, width, height
        self.channels = 3 if name == "pixels_rgb" else 1

    @property
    def is_fitted(self) -> bool:
        return self.width is not None and self.height is not None

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.width}x{self.height}"

    def _details(self) -> dict[str, object]:
        return {"width": self.width, "height": self.height}

    def fitted(self, files: Sequence[Path]) -> Pixels:
        if self.width is not None:
            return self
        height, width, _ = self._pixels(files[0]).shape
        return Pixels(self.name, width, height)

    def read(self, path: Path) -> Iterator[np.ndarray]:
        pixels = self._pixels(path)
        height, width, _ = pixels.shape
        if (width, height) != (self.width, self.height):
            raise UserError(
                f"{path}: {width} by {height} pixels, and the other images have {self.width} by"
                f" {self.height}; bring all to one size"
            )
        yield pixels.reshape(-1)

    def read_prompt(self, path: Path) -> list[int]:
        """The pixels of an image as wide as those of the data set, of any height."""
        pixels = self._pixels(path)
        if pixels.shape[1] != self.width:
            raise UserError(
                f"{path}: {pixels.shape[1]} pixels wide, and the images of this model have"
                f" {self.width}; cut or scale it to that width"
            )
        return pixels.reshape(-1).tolist()

    def write(self, path: Path, tokens: Sequence[int] | np.ndarray) -> None:
        """An image as high as the tokens fill, what is missing of its last row in black."""
        image = needed("PIL.Image", path, "pillow")
        row = self.width * self.channels
        n_rows = max(1, -(-len(tokens) // row))
        pixels = np.zeros(n_rows * row, dtype=np.uint8)
        pixels[: len(tokens)] = tokens
        shape = (n_rows, self.width) + ((3,) if self.channels == 3 else ())
        with atomic_path(path) as temporary:
            image.fromarray(pixels.reshape(shape)).save(temporary, format="PNG")

    def _pixels(self, path: Path) -> np.ndarray:
        """uint8 [height, width, channels]."""
        image = needed("PIL.Image", path, "pillow")
        try:
            with image.open(path) as opened:
                mode, array = opened.mode, None
                if mode.startswith("I;16"):  # 16-bit grey, which convert() would clip
                    array = (np.asarray(opened) >> 8).astype(np.uint8)
                elif mode in ("I", "F"):
                    raise UserError(
                        f"{path}: an image of mode {mode}, whose values have no fixed range; save"
                        " it with 8 or 16 bits"
                    )
                else:
                    array = np.asarray(opened.convert("RGB" if self.channels == 3 else "L"))
        except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{path}: cannot be read as an image ({reason})") from None
        return np.repeat(array[..., None], self.channels, -1) if array.ndim == 2 else array
