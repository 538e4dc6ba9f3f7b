"""MIDI built byte by byte against the notes that it must give, and round trips of any stream."""

import struct
import tempfile
from pathlib import Path

import mido
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavelet_lm.data.modalities import find_modality
from wavelet_lm.data.modalities.midi import Note, notes_of, read_notes, tokens_of
from wavelet_lm.errors import UserError

MIDI = find_modality("midi")
ON, OFF, SHIFT, VELOCITY = 0, 128, 256, 356
END = bytes.fromhex("00ff2f00")
# A beat of 480 ticks, 0.5 s as long as no tempo is given.


def smf(*tracks, kind=None, division=480):
    """The bytes of a MIDI file; each track as its events without the end of track."""
    kind = (1 if len(tracks) > 1 else 0) if kind is None else kind
    data = b"MThd" + struct.pack(">IHHH", 6, kind, len(tracks), division)
    for events in tracks:
        data += b"MTrk" + struct.pack(">I", len(events) + 4) + events + END
    return data


def notes(content, tmp_path):
    file = tmp_path / "x.mid"
    file.write_bytes(content)
    return [tuple(note) for note in read_notes(file)]


def test_running_status_and_an_on_of_velocity_0(tmp_path):
    # One status byte for four events; 0x83 0x60 is 480 ticks, as a quantity of variable length.
    events = bytes.fromhex("00 90 3c 40  00 40 50  8360 3c 00  8360 40 00")
    assert notes(smf(events), tmp_path) == [(0, 50, 60, 16), (0, 100, 64, 20)]


def test_tempo_changes_and_tracks(tmp_path):
    # 1 s a beat from the start, 0.25 s a beat from beat 1 on; the notes are in another track.
    tempi = bytes.fromhex("00 ff5103 0f4240  8360 ff5103 03d090")
    events = bytes.fromhex("00 91 3c 7f  8360 81 3c 00  00 91 3e 04  8360 81 3e 00")
    assert notes(smf(tempi, events), tmp_path) == [(0, 100, 60, 31), (100, 125, 62, 1)]


def test_the_sustain_pedal_holds_until_it_rises_or_the_pitch_starts_anew(tmp_path):
    events = bytes.fromhex(
        "00 b0 40 7f  00 90 3c 40  00 90 40 40"  # pedal down; 60 and 64 start
        "8360 80 3c 00  00 80 40 00"  # both keys up at 0.5 s
        "8360 90 3c 40  00 80 3c 00"  # 60 again at 1.0 s, for no time at all
        "8360 b0 40 00"  # pedal up at 1.5 s
        "00 90 43 40  00 80 43 00"  # 67 without the pedal, for no time at all
    )
    expected = [(0, 100, 60, 16), (0, 150, 64, 16), (100, 150, 60, 16), (150, 151, 67, 16)]
    assert notes(smf(events), tmp_path) == expected


def test_percussion_is_left_out_and_channels_share_the_keys(tmp_path):
    events = bytes.fromhex(
        "00 99 24 40  00 90 3c 40  8360 91 3c 50  8360 80 3c 00  8360 81 3c 00 00 89 24 00"
    )
    assert notes(smf(events), tmp_path) == [(0, 50, 60, 16), (50, 150, 60, 20)]


def test_what_still_sounds_at_the_end_is_ended_there(tmp_path):
    events = bytes.fromhex("00 90 3c 40  8360 90 3e 40")
    assert notes(smf(events), tmp_path) == [(0, 50, 60, 16), (50, 51, 62, 16)]


def test_events_of_notes():
    score = [Note(0, 250, 60, 16), Note(5, 250, 64, 16), Note(250, 251, 60, 20)]
    expected = [VELOCITY + 16, ON + 60, SHIFT + 4, ON + 64, SHIFT + 99, SHIFT + 99, SHIFT + 44]
    expected += [OFF + 60, OFF + 64, VELOCITY + 20, ON + 60, SHIFT, OFF + 60]
    assert tokens_of(score) == expected
    assert notes_of(expected) == sorted(score)
    assert MIDI.vocab_size == 388


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 387) | st.sampled_from([60, 61, 188, 189, 256, 355]), max_size=80))
def test_any_stream_gives_a_file_that_reads_as_its_canonical_form(tokens):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.mid"
        MIDI.write(file, tokens)
        found = [token for part in MIDI.read(file) for token in part.tolist()]
        opened = mido.MidiFile(file)
        sounding = set()
        for message in opened:  # every note is started once and ended
            if message.type == "note_on":
                assert message.note not in sounding
                sounding.add(message.note)
            elif message.type == "note_off":
                sounding.remove(message.note)
        assert not sounding
        assert found == tokens_of(notes_of(tokens))
        if found:  # canonical: tokens → file → tokens changes nothing any more
            MIDI.write(file, found)
            assert MIDI.read_prompt(file) == found


def test_notes_of_one_pitch_never_overlap_in_a_loose_stream():
    tokens = [OFF + 3, ON + 60, ON + 60, SHIFT + 9, VELOCITY + 3, ON + 60, ON + 61]
    assert notes_of(tokens) == [(0, 10, 60, 16), (10, 11, 60, 3), (10, 11, 61, 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no MIDI", "cannot be read as MIDI"),
        (b"", "cannot be read as MIDI"),
        (smf(bytes.fromhex("00 90 3c 40  8360 3c 00"))[:-7], "cannot be read as MIDI"),
        (smf(bytes.fromhex("00 3c 40")), "cannot be read as MIDI"),  # running status of nothing
        (smf(b"", b"", kind=2), "independent songs"),
        (smf(b"", division=0xE728), "SMPTE"),
        (smf(b"", division=0), "SMPTE"),
    ],
)
def test_faulty_files(content, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        notes(content, tmp_path)
    assert str(tmp_path / "x.mid") in str(error.value)
    assert "\n" not in str(error.value)
