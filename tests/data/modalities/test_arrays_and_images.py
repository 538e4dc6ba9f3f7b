"""EnCodec's arrays and images: what is read is what a library wrote, and faults are named."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from wavelet_lm.data.modalities import find_modality
from wavelet_lm.errors import UserError

CODES = np.arange(24).reshape(4, 6) * 40


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("encodec", CODES, CODES[0]),
        ("encodec:2", CODES.astype(np.int16), CODES[2]),
        ("encodec", CODES[None, None], CODES[0]),
        ("encodec", CODES[3], CODES[3]),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_codes(name, array, expected, suffix, tmp_path):
    file = tmp_path / f"codes{suffix}"
    if suffix == ".npy":
        np.save(file, array)
    else:
        torch.save(torch.from_numpy(array), file)
    assert find_modality(name).read_prompt(file) == expected.tolist()


def test_codes_survive_a_file(tmp_path):
    encodec, tokens = find_modality("encodec"), list(range(1024))
    encodec.write(tmp_path / "x.npy", tokens)
    assert encodec.read_prompt(tmp_path / "x.npy") == tokens
    assert np.load(tmp_path / "x.npy").shape == (1, 1024)


class Evil:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_faulty_codes(tmp_path):
    def message(suffix, write, name="encodec"):
        file = tmp_path / f"x{suffix}"
        write(file)
        with pytest.raises(UserError) as error:
            list(find_modality(name).read(file))
        assert str(error.value).startswith(f"{file}: ")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "code 1024 at position 2" in message(".npy", lambda f: np.save(f, [5, 6, 1024]))
    assert "code -1 at position 0" in message(".npy", lambda f: np.save(f, [-1]))
    assert "4 codebooks (0 … 3)" in message(".npy", lambda f: np.save(f, CODES), "encodec:4")
    assert "[2] of float64" in message(".npy", lambda f: np.save(f, [0.5, 1]))
    assert "[2, 4, 6]" in message(".npy", lambda f: np.save(f, np.stack([CODES, CODES])))
    assert "as an array" in message(".npy", lambda f: f.write_bytes(b"no array"))
    objects = np.array([Evil()], dtype=object)
    assert "as an array" in message(".npy", lambda f: np.save(f, objects, allow_pickle=True))
    assert "as an array" in message(".pt", lambda f: torch.save(Evil(), f))
    assert "as an array" in message(".pt", lambda f: f.write_bytes(pickle.dumps(Evil())))
    assert "holds a dict" in message(".pt", lambda f: torch.save({"codes": torch.ones(3)}, f))
    for name in ("encodec:", "encodec:x", "encodec:-1"):
        with pytest.raises(UserError, match="encodec:N"):
            find_modality(name)


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(("name", "pixels"), [("pixels", PIXELS[..., 0]), ("pixels_rgb", PIXELS)])
def test_pixels_survive_a_file(name, pixels, tmp_path):
    file = tmp_path / "x.png"
    Image.fromarray(pixels).save(file)
    modality = find_modality(name).fitted([file])
    tokens = modality.read_prompt(file)
    assert tokens == pixels.ravel().tolist()
    modality.write(tmp_path / "y.png", tokens)
    with Image.open(tmp_path / "y.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
    modality.write(tmp_path / "y.png", tokens[:-1])  # a row that is not complete
    assert modality.read_prompt(tmp_path / "y.png") == [*tokens[:-1], 0]


def test_other_modes_and_sizes(tmp_path):
    grey = PIXELS[..., 1]
    modality = find_modality("pixels", width=7, height=5)
    for suffix, image in {
        "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "alpha.png": Image.fromarray(np.stack([grey] * 3 + [grey // 2], -1), "RGBA"),
        "palette.png": Image.fromarray(grey).convert("P"),
    }.items():
        image.save(tmp_path / suffix)
        assert modality.read_prompt(tmp_path / suffix) == grey.ravel().tolist(), suffix
    Image.fromarray(grey[:3]).save(tmp_path / "rows.png")
    assert modality.read_prompt(tmp_path / "rows.png") == grey[:3].ravel().tolist()
    with pytest.raises(UserError, match=r"rows\.png: 7 by 3 pixels, .* 7 by 5"):
        list(modality.read(tmp_path / "rows.png"))
    Image.fromarray(grey[:, :3]).save(tmp_path / "narrow.png")
    with pytest.raises(UserError, match="3 pixels wide"):
        modality.read_prompt(tmp_path / "narrow.png")
    for content in (b"", b"no image", (tmp_path / "deep.png").read_bytes()[:60]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.png: cannot be read as an image"):
            list(modality.read(tmp_path / "bad.png"))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="mode F"):
        list(modality.read(tmp_path / "float.tiff"))
