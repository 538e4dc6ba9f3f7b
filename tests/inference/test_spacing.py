import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.inference.spacing import CleanStream, clean_spacing

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
