"""Piano music as performance events: MIDI files to tokens and back.

The 388 events of Oore et al., "This Time with Feeling: Learning Expressive Musical Performance",
2018, which Huang et al., "Music Transformer", 2018, also use:

    0 … 127      a note of this pitch starts
    128 … 255    the note of this pitch ends
    256 … 355    time goes on by 10, 20, … 1000 ms
    356 … 387    the velocity of the notes that follow, 32 steps of 4

What the vocabulary cannot say is decided here: all tracks and channels are one instrument, except
channel 10, whose keys are percussion and are left out. A sustain pedal (controller 64 from 64 on)
holds the notes of its channel until it is released, or until the same pitch starts anew. A pitch
sounds once at a time: a new start ends the old note. Times are rounded to 10 ms, and a note lasts
at least that.

A stream is canonical when it is what these rules write for its notes: at each moment first the ends
and then the starts, each by rising pitch, a velocity only where it changes, time in as few steps as
possible, the long ones first, and nothing after the last end. Files always read as canonical
streams, and those survive a file unchanged. Any other stream, such as a model's, is read as well as
it can be: an end without a start is ignored, and what still sounds at the end is ended there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.data.modalities.modality import Modality, needed
from wavelet_lm.errors import UserError

PITCHES, SHIFTS, VELOCITIES = 128, 100, 32
NOTE_ON, NOTE_OFF, SHIFT, VELOCITY = 0, PITCHES, 2 * PITCHES, 2 * PITCHES + SHIFTS
STEPS_PER_SECOND = 100
BIN = 128 // VELOCITIES
DEFAULT_VELOCITY = 16  # of a stream whose first note has none: 66 of 127
PERCUSSION, SUSTAIN, PEDAL_DOWN = 9, 64, 64  # channel 10, counted from 0
TICKS_PER_BEAT, TEMPO = 500, 500_000  # a tick of 1 ms in the files that are written
TICKS_PER_STEP = 10


class Note(NamedTuple):
    """A note: first step and the step after its last, of 10 ms each; pitch; velocity 0 … 31."""

    start: int
    end: int
    pitch: int
    velocity: int


class Midi(Modality):
    """Notes of MIDI files, as the tokens that the module describes."""

    name, kind, suffixes, output = "midi", "music", (".mid", ".midi"), ".mid"
    vocab_size, start, column = VELOCITY + VELOCITIES, SHIFT, "midi_filename"

    def __init__(self, name: str = "midi"):
        self.name = name

    def read(self, path: Path) -> Iterator[np.ndarray]:
        tokens = tokens_of(read_notes(path))
        if tokens:
            yield np.array(tokens, dtype=np.uint16)

    def write(self, path: Path, tokens: Sequence[int] | np.ndarray) -> None:
        write_notes(path, notes_of(map(int, tokens)))


# --- tokens and notes ----------------------------------------------------------------------------


def tokens_of(notes: Iterable[Note]) -> list[int]:
    """The canonical stream of notes of which no two of one pitch overlap."""
    notes = list(notes)
    ends = [(note.end, 0, note.pitch, note) for note in notes]
    starts = [(note.start, 1, note.pitch, note) for note in notes]
    tokens: list[int] = []
    now, velocity = 0, None
    for step, is_start, pitch, note in sorted(ends + starts):
        while step > now:
            shift = min(SHIFTS, step - now)
            tokens.append(SHIFT + shift - 1)
            now += shift
        if not is_start:
            tokens.append(NOTE_OFF + pitch)
            continue
        if note.velocity != velocity:
            velocity = note.velocity
            tokens.append(VELOCITY + velocity)
        tokens.append(NOTE_ON + pitch)
    return tokens


def notes_of(tokens: Iterable[int]) -> list[Note]:
    """The notes of any stream, by start and pitch."""
    begun: dict[int, tuple[int, int]] = {}  # pitch: step and velocity
    notes: list[Note] = []
    now, velocity = 0, DEFAULT_VELOCITY

    def end(pitch: int) -> None:
        if pitch in begun:
            start, loudness = begun.pop(pitch)
            notes.append(Note(start, now, pitch, loudness))

    for token in tokens:
        if token >= VELOCITY:
            velocity = token - VELOCITY
        elif token >= SHIFT:
            now += token - SHIFT + 1
        elif token >= NOTE_OFF:
            end(token - NOTE_OFF)
        else:
            end(token)
            begun[token] = now, velocity
    for pitch in list(begun):
        end(pitch)
    return separated(notes)


def separated(notes: Iterable[Note]) -> list[Note]:
    """Each pitch once at a time and every note at least a step long, by start and pitch.

    A note ends where the next one of its pitch starts; of several that start together the one that
    comes last stays.
    """
    by_pitch: dict[int, dict[int, Note]] = {}
    for note in notes:
        by_pitch.setdefault(note.pitch, {})[note.start] = note
    result = []
    for of_pitch in by_pitch.values():
        starts = sorted(of_pitch)
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            note = of_pitch[start]
            end = max(note.end, start + 1)
            result.append(note._replace(end=end if following is None else min(end, following)))
    return sorted(result)


# --- notes and files -----------------------------------------------------------------------------


def read_notes(path: Path) -> list[Note]:
    """The notes of a MIDI file, by start and pitch.

    Raises:
        UserError: the file is not MIDI, is cut short, or counts time in another way than in beats.
    """
    mido = needed("mido", path)
    try:
        file = mido.MidiFile(path, clip=True)
        if file.type == 2 or file.ticks_per_beat <= 0:
            what = "independent songs" if file.type == 2 else "frames (SMPTE time)"
            raise UserError(
                f"{path}: a MIDI file of {what}; export it as one song with time in beats"
            )
        return separated(_notes(file))
    except UserError:
        raise
    except Exception as error:  # of many kinds, by where in the file the damage is
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path}: cannot be read as MIDI ({reason}); get it again") from None


def _notes(messages: Iterable) -> Iterator[Note]:
    """Notes of mido's messages, whose times are seconds since the one before, as they end."""
    begun: dict[tuple[int, int], tuple[int, int]] = {}  # channel and pitch: step and velocity
    held: list[tuple[int, int, int, int]] = []  # channel, pitch, step, velocity: by the pedal
    pedals: set[int] = set()
    seconds = 0.0
    for message in messages:
        seconds += message.time
        now = round(seconds * STEPS_PER_SECOND)
        if message.is_meta or getattr(message, "channel", PERCUSSION) == PERCUSSION:
            continue
        channel = message.channel
        if message.type in ("note_on", "note_off"):
            key = channel, message.note
            if key in begun:
                start, velocity = begun.pop(key)
                starts_anew = message.type == "note_on" and message.velocity > 0
                if channel in pedals and not starts_anew:
                    held.append((*key, start, velocity))
                else:
                    yield Note(start, now, message.note, velocity)
            if message.type == "note_on" and message.velocity > 0:
                begun[key] = now, message.velocity // BIN
        elif message.is_cc(SUSTAIN) and message.value >= PEDAL_DOWN:
            pedals.add(channel)
        elif message.is_cc(SUSTAIN):
            pedals.discard(channel)
            yield from (Note(s, now, p, v) for c, p, s, v in held if c == channel)
            held = [note for note in held if note[0] != channel]
    yield from (Note(s, now, p, v) for _, p, s, v in held)
    yield from (Note(s, now, p, v) for (_, p), (s, v) in begun.items())


def write_notes(path: Path, notes: Iterable[Note]) -> None:
    """A MIDI file of one track for a piano; it appears whole or not at all."""
    mido = needed("mido", path)
    file = mido.MidiFile(type=0, ticks_per_beat=TICKS_PER_BEAT)
    track = mido.MidiTrack(
        [mido.MetaMessage("set_tempo", tempo=TEMPO), mido.Message("program_change", program=0)]
    )
    now = 0
    for token in tokens_of(notes):
        if token >= VELOCITY:
            velocity = (token - VELOCITY) * BIN + BIN // 2
        elif token >= SHIFT:
            now += (token - SHIFT + 1) * TICKS_PER_STEP
        else:
            kind = "note_off" if token >= NOTE_OFF else "note_on"
            loudness = 0 if token >= NOTE_OFF else velocity
            note = token % PITCHES
            track.append(mido.Message(kind, note=note, velocity=loudness, time=now))
            now = 0
    file.tracks.append(track)
    with atomic_path(path) as temporary:
        file.save(temporary)
