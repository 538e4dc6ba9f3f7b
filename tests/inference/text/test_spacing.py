import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.inference.text.spacing import (
    CleanContinuation,
    CleanStream,
    clean_spacing,
    is_spaced_apart,
)

PAIRS = [
    # numbers and hyphens
    ("a role @-@ playing game", "a role-playing game"),
    ("10 @,@ 000 men and 1 @.@ 5 % of 3 @,@ 000 @,@ 000", "10,000 men and 1.5% of 3,000,000"),
    ("a state @-@ of @-@ the @-@ art @-@ design", "a state-of-the-art-design"),
    # punctuation
    ("So , yes ; he said : why ? No !", "So, yes; he said: why? No!"),
    ("well . . . what ? !", "well... what?!"),
    # brackets
    ("a game ( Japanese : x , lit . y ) , made [ sic ] .",
     "a game (Japanese: x, lit. y), made [sic]."),
    ("( ( a ) b )", "((a) b)"),
    # quotes, from left to right
    ('the " Nameless " , a " unit " .', 'the "Nameless", a "unit".'),
    ('" Go , " he said , " now . "', '"Go," he said, "now."'),
    ('( " Raven " ) and " ( x ) "', '("Raven") and "(x)"'),
    ('a " b " c " d', 'a "b" c "d'),
    ("he said “ no ” .", "he said “no”."),
    # contractions
    ("it 's , they 're , I 've , he 'll , she 'd , I 'm", "it's, they're, I've, he'll, she'd, I'm"),
    ("I do n't , he DID N'T , WE DON 'T , I wo n't", "I don't, he DIDN'T, WE DON'T, I won't"),
    ('" Raven " \'s crew and the U.S. \'s', '"Raven"\'s crew and the U.S.\'s'),
    # a line of WikiText, as it is
    (' It met with " high " sales ( 5 @,@ 000 ) , and did n\'t stop . ',
     ' It met with "high" sales (5,000), and didn\'t stop. '),
    (" = = Plot = = ", " = = Plot = = "),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "clean"), PAIRS)
def test_artefacts_go(raw, clean):
    assert clean_spacing(raw) == clean


ORDINARY = [
    'He said, "I don\'t know (yet)." It\'s 5% of 1,000.5; why? "No!"',
    '("quoted"), then "more", and "(both)".',
    'A 5" pipe and a 3.5" disk: "cheap".',
    "costs .5 or -.25, see .gitignore ... sad :( or glad :)",
    "van 't Hoff, Gerard 't Hooft, rock 'n' roll, the 's' key, the boys' toys, the '80s",
    "- [ ] a task, f( ), { x: y }, x @ y, me@here.org, a @-mention",
    "  indented\n    : more\n\t. tabs\na   ,   wide   (  gap  )",
    "so (very) “directed” it’s — fine",
    "",
    "\n\n \n",
]


@pytest.mark.parametrize("text", [*ORDINARY, *(clean for _, clean in PAIRS)])
def test_ordinary_text_stays(text):
    assert clean_spacing(text) == text


word = st.sampled_from(["The", "raven", "I", "game", "in", "of", "unit", "x", "1942", "Ünder"])
mark = st.sampled_from(".,;:!?%")


def both(strategy):
    """A piece that looks the same raw and clean."""
    return strategy.map(lambda piece: (piece, piece))


def joined(pieces):
    return " ".join(raw for raw, _ in pieces), " ".join(clean for _, clean in pieces)


def wrapped(inner):
    """Pieces (raw, clean) made of smaller ones, as WikiText's tokenisation spaces them."""
    phrase = st.lists(inner, min_size=1, max_size=4).map(joined)
    return st.one_of(
        phrase.map(lambda p: (f"( {p[0]} )", f"({p[1]})")),
        phrase.map(lambda p: (f"[ {p[0]} ]", f"[{p[1]}]")),
        st.tuples(phrase, mark).map(lambda t: (f"{t[0][0]} {t[1]}", f"{t[0][1]}{t[1]}")),
    )


def quoted(p):
    return f'" {p[0]} "', f'"{p[1]}"'


hyphenated = st.tuples(word, word).map(lambda t: (" @-@ ".join(t), "-".join(t)))
numbers = st.integers(1, 999).map(lambda n: (f"{n} @,@ 000 @.@ 5", f"{n},000.5"))
owned = word.map(lambda w: (f"{w} 's", f"{w}'s"))
leaves = st.one_of(both(word), hyphenated, numbers, owned)
pieces = st.recursive(leaves, wrapped, max_leaves=6)
# A quotation may hold anything but a quotation.
lines = st.lists(st.one_of(pieces, pieces.map(quoted)), max_size=5).map(joined)
documents = st.lists(lines, max_size=4).map(
    lambda rows: ("\n".join(raw for raw, _ in rows), "\n".join(clean for _, clean in rows))
)
FRAGMENTS = " |  |\"|'|.|,|%|@-@| @,@ |(|)|[|]|“|”|n't|'s| 't|don|a|é|5|\n|\r\n|\t|\u2028"
tricky = st.lists(st.sampled_from(FRAGMENTS.split("|")), max_size=30).map("".join)


@given(documents)
def test_what_was_set_apart_is_joined_again(document):
    raw, clean = document
    assert clean_spacing(raw) == clean
    assert clean_spacing(clean) == clean


@given(tricky | st.text())
def test_cleaning_twice_is_cleaning_once_and_only_takes_away(text):
    clean = clean_spacing(text)
    assert clean_spacing(clean) == clean
    left = iter(text)
    assert all(c in left for c in clean)


@given(tricky | documents.map(lambda d: d[0]), st.lists(st.integers(1, 7), max_size=30))
def test_a_stream_gives_the_same_however_it_is_cut(text, sizes):
    stream, given_out, start = CleanStream(), "", 0
    for size in [*sizes, len(text)]:
        given_out += stream.feed(text[start : start + size])
        start += size
        seen = text[:start]
        assert given_out == clean_spacing(seen[: seen.rfind("\n") + 1])
    assert given_out + stream.finish() == clean_spacing(text)


spaced = st.text('a.," @-\n()', max_size=20)


@given(st.text('a.," @-()', max_size=8), st.lists(spaced, max_size=6))
def test_a_continuation_is_clean_however_it_is_cut(before, pieces):
    stream, text = CleanContinuation(before), "".join(pieces)
    result = "".join(map(stream.feed, pieces)) + stream.finish()
    whole, start = clean_spacing(before + text), clean_spacing(before)
    assert result in (whole[len(start) :] if whole.startswith(start) else None, clean_spacing(text))
    once = CleanContinuation(before)
    assert once.feed(text) + once.finish() == result


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("He said", " , yes .", ", yes."),
        ('The " role', ' " game', '" game'),
        ("He said ", ", yes .", ", yes."),  # the space is on the screen already
        ("", " a .", " a."),
    ],
)
def test_what_stands_before_decides_about_the_first_line(before, text, expected):
    stream = CleanContinuation(before)
    assert stream.feed(text) + stream.finish() == expected


@given(st.lists(st.sampled_from([*FRAGMENTS.split("|"), "n", "ca", "word"]), max_size=20))
def test_what_is_settled_stays_whatever_follows(fragments):
    text = "".join(fragments)
    for before, whole in (("", clean_spacing(text)), ("\n", "\n" + clean_spacing(text))):
        stream, given_out = CleanContinuation(""), ""
        given_out = stream.feed(before)
        for letter in text:
            given_out += stream.feed(letter)
            # Any text is wanted: none is found in a word, and all are in the line.
            assert whole.startswith(given_out + stream.settled(["@"] if "@" in text else [" "]))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("wikitext-103", True),
        ("wikitext-2", True),
        ("Salesforce/wikitext:wikitext-2-v1", True),
        ("/data/WikiText-103/", True),
        ("data/wiki.train.tokens", True),
        ("python-stdlib", False),
        ("tinystories", False),
        ("/home/wikitext/code.py", False),
        ("wikimedia/wikipedia:20231101.en", False),
        ("", False),
    ],
)
def test_text_that_is_spaced_apart_is_known_by_name(dataset, expected):
    assert is_spaced_apart(dataset) is expected
