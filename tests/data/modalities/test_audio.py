"""WAV files of every sort against samples that are known, levels against their definition."""

import math
import struct

import numpy as np
import pytest
import soundfile

from wavelet_lm.data.modalities import audio, find_modality
from wavelet_lm.data.modalities.audio import SAMPLE_RATE, n_seconds, samples_between, samples_of
from wavelet_lm.errors import UserError

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")


def wav(samples, bits=16, rate=SAMPLE_RATE, extensible=False, kind=PCM, data_size=None):
    """The bytes of a WAV file of samples [frames] or [frames, channels] in [−1, 1)."""
    samples = np.atleast_2d(np.asarray(samples, np.float64).T).T
    if kind == FLOAT:
        data = samples.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        data = (np.rint(samples * 128) + 128).astype(np.uint8).tobytes()
    else:
        whole = np.rint(samples * 2 ** (bits - 1)).astype("<i4")
        data = whole.view(np.uint8).reshape(*whole.shape, 4)[..., : bits // 8].tobytes()
    n_channels = samples.shape[1]
    frame = n_channels * bits // 8
    tag = EXTENSIBLE if extensible else kind
    form = struct.pack("<HHIIHH", tag, n_channels, rate, rate * frame, frame, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, kind) + GUID_TAIL
    size = len(data) if data_size is None else data_size
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # of odd size, so padded
    chunks += b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def read(path):
    return np.concatenate([*samples_of(path), np.zeros(0, np.float32)])


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(
    ("bits", "kind"), [(8, PCM), (16, PCM), (24, PCM), (32, PCM), (32, FLOAT), (64, FLOAT)]
)
def test_every_width_of_sample(bits, kind, extensible, tmp_path):
    # A grid that 8 bits can hold, so that every width has the very same samples.
    samples = np.random.default_rng(0).integers(-128, 128, (1000, 2)) / 128
    file = tmp_path / "x.wav"
    file.write_bytes(wav(samples, bits, extensible=extensible, kind=kind))
    np.testing.assert_allclose(read(file), samples.mean(1), atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_a_tone_keeps_its_pitch_and_length(rate, tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "FRAMES_AT_ONCE", 1001)  # stretches must not be heard

    def tone(rate):
        return 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)

    file = tmp_path / "tone.WAV"
    file.write_bytes(wav(tone(rate), 24, rate))
    found = read(file)
    assert abs(len(found) - SAMPLE_RATE) <= 1
    middle = slice(1000, 15000)
    np.testing.assert_allclose(found[middle], tone(SAMPLE_RATE)[middle], atol=1e-3)


def slow_mulaw(x):
    y = math.copysign(math.log(1 + 255 * abs(x)) / math.log(256), x)
    return math.floor((y + 1) / 2 * 255 + 0.5)


def test_levels_are_those_of_the_definition():
    samples = np.concatenate([np.linspace(-1, 1, 2001), [-3, 3]])
    clipped = np.clip(samples, -1, 1)
    found = find_modality("mulaw").levels(samples)
    assert found.tolist() == [slow_mulaw(x) for x in clipped]
    found = find_modality("pcm8").levels(samples)
    assert np.abs((found - 128.0) / 128 - np.clip(samples, -1, 127 / 128)).max() <= 0.5 / 128


@pytest.mark.parametrize("name", ["mulaw", "pcm8"])
def test_tokens_survive_a_file(name, tmp_path):
    modality = find_modality(name)
    tokens = np.random.default_rng(0).permutation(np.repeat(np.arange(256), 7))
    file = tmp_path / "x.wav"
    modality.write(file, tokens)
    assert modality.read_prompt(file) == tokens.tolist()
    header = file.read_bytes()[20:36]
    assert struct.unpack("<HHIIHH", header) == (1, 1, 16000, 32000, 2, 16)
    assert [f.name for f in tmp_path.iterdir()] == ["x.wav"]


def test_an_8_bit_file_is_its_own_tokens(tmp_path):
    file = tmp_path / "x.wav"
    file.write_bytes(wav((np.arange(256) - 128) / 128, 8))
    assert find_modality("pcm8").read_prompt(file) == list(range(256))


def test_a_length_that_the_writer_did_not_know(tmp_path):
    file = tmp_path / "x.wav"
    file.write_bytes(wav([0.5] * 100, data_size=0xFFFFFFFF))
    assert len(read(file)) == 100


def test_a_flac_file_that_is_cut_short(tmp_path):
    file = tmp_path / "x.flac"
    soundfile.write(file, np.random.default_rng(0).uniform(-1, 1, 50_000), SAMPLE_RATE)
    assert len(read(file)) == 50_000
    file.write_bytes(file.read_bytes()[:60_000])
    with pytest.raises(UserError, match=r"x\.flac"):
        read(file)


def test_a_part_of_a_file_is_that_part(tmp_path):
    file = tmp_path / "x.wav"
    samples = np.arange(-500, 500) / 1000
    file.write_bytes(wav(samples, 32, kind=FLOAT))
    part = samples_between(file, 300 / SAMPLE_RATE, 200 / SAMPLE_RATE)
    np.testing.assert_allclose(part, samples[300:500], atol=1e-6)
    assert len(samples_between(file, 900 / SAMPLE_RATE, 1.0)) == 100
    assert len(samples_between(file, 5.0, 1.0)) == 0
    assert n_seconds(file) == 1000 / SAMPLE_RATE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav([0.5] * 100)[:-30], "cut short: 200 bytes of 'data' are promised and 170 are there"),
        (wav([0.5] * 100)[:40], "cut short"),
        (wav([0.5] * 100)[:24], "has no samples"),
        (b"no audio at all, whatever its name says", "cannot be read as audio"),
        (b"", "cannot be read as audio"),
        (wav([0.1, np.nan], 32, kind=FLOAT), "sample 1 is not finite"),
        (wav([0.1, 0.2], 16, kind=77), "cannot be read as audio"),
    ],
)
def test_faulty_files(content, message, tmp_path):
    file = tmp_path / "x.wav"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
