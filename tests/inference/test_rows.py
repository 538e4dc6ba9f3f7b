import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.inference.writers import Letters, tokens
from wavelet_lm.inference.generation import Drawn
from wavelet_lm.inference.rows import Request, Row, TextUntil
from wavelet_lm.inference.text.spacing import clean_spacing

texts = st.text("ab", max_size=12)


def slow_until(text, stop):
    """Letter by letter: the text before the longest stop text that the first prefix ends with."""
    for end in range(len(text) + 1):
        ends = [s for s in stop if text[:end].endswith(s)]
        if ends:
            return text[: end - max(map(len, ends))], True
    return text, False


@given(
    st.lists(texts, max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@example(["ab", "b"], ["abb", "b"])
@example(["aab"], ["b", "ab", "aab"])
def test_text_ends_before_the_first_stop_text_however_it_comes(pieces, stop):
    until, shown, whole = TextUntil(stop), [], ""
    for piece in pieces:
        whole += piece
        shown.append(until.feed(piece))
        expected, found = slow_until(whole, stop)
        assert until.found == found
        assert expected.startswith("".join(shown))
        if not found:  # and no more is held back than may be the beginning of a stop text
            held = expected[len("".join(shown)) :]
            assert not held or any(s.startswith(held) for s in stop)
    assert "".join(shown) + until.finish() == slow_until(whole, stop)[0]


def row(num_tokens, stop=(), end_of_text=None, clean_after=None):
    return Row(Request(3, num_tokens, stop), Letters(end_of_text), end_of_text, clean_after)


def take(row, text):
    """Feed letters until the row ends; their figures are −1, −2, … and 1, 2, …"""
    shown = []
    for n, token in enumerate(tokens(text), 1):
        if row.reason is None:
            shown.append(row.take(Drawn(token, -float(n), float(n))))
    return "".join(shown)


def test_a_row_ends_with_its_number_of_tokens():
    one = row(3)
    assert take(one, "abcdef") == "abc"
    done = one.completion(0.25)
    assert (done.text, done.tokens, done.reason, done.seed) == ("abc", tokens("abc"), "length", 3)
    assert (done.log_probs, done.entropies) == ([-1, -2, -3], [1, 2, 3])
    assert done.mean_log_prob == -2
    assert done.metrics["mean_log_prob"] == -2
    assert done.metrics["n_tokens"] == 3
    assert done.metrics["drift"] == 0.25
    assert done.timings.decode_seconds >= 0


def test_the_end_of_text_is_no_part_of_the_text():
    one = row(9, end_of_text=2)
    assert take(one, "abcdef") == "ab"
    assert (one.reason, one.tokens) == ("end_of_text", tokens("ab"))
    assert row(9).tokens == []
    assert take(row(9), "abc") == "abc"


def test_what_may_be_a_stop_text_is_held_back_and_shown_at_the_end():
    one = row(5, stop=("cde", "x"))
    first, second, third, fourth, last = tokens("abcdg")
    assert [one.take(Drawn(t, -1.0, 1.0)) for t in (first, second, third, fourth)] == [
        *"ab",
        "",
        "",
    ]
    assert one.take(Drawn(last, -1.0, 1.0)) == "cdg"
    assert one.reason == "length"
    cut = row(9, stop=("cde",))
    assert take(cut, "abcdefg") == "ab"
    assert (cut.reason, cut.tokens) == ("stop", tokens("abcde"))
    held = row(4, stop=("cde",))
    assert take(held, "abcdefg") == "abcd"
    assert held.completion(0.0).text == "abcd"


def test_a_row_of_no_tokens_has_no_mean():
    empty = row(0)
    assert empty.reason == "length"
    assert empty.completion(0.0).mean_log_prob == -float("inf")
    assert empty.completion(0.0).metrics["mean_log_prob"] is None


def test_an_interrupted_row_keeps_its_text():
    one = row(9, stop=("bc",))
    assert take(one, "ab") == "a"
    assert one.end("interrupted") == "b"
    assert one.completion(0.0).text == "ab"


def test_a_row_is_cleaned_line_by_line_after_what_stands_before_it():
    one = row(9, clean_after="(a")
    shown = [one.take(Drawn(t, -1.0, 1.0)) for t in tokens(" . b\n .a")]
    assert shown == [""] * 4 + [". b\n"] + [""] * 3
    assert one.end("interrupted") == " .a"
    assert one.completion(0.0).text == ". b\n .a"


MARKS = Letters(letters="ab .,:()@-\"'\nnte0")


def cleaned_row(raw, stop, before=""):
    """A row that was fed all letters of `raw` that it takes."""
    one = Row(Request(1, len(raw), stop), MARKS, None, before)
    for letter in raw:
        if one.reason is None:
            one.take(Drawn(MARKS.letters.index(letter), -1.0, 1.0))
    return one


@pytest.mark.parametrize(
    ("raw", "stop", "text", "read"),
    [
        # What is shown ends it, not what was read, once it is clear that it stays.
        ("at a , tea , be", "a,", "at ", "at a , tea ,"),
        ("at a : b , tea n , be", "a: b", "at ", "at a : b , t"),
        ("at a @-@ b , tea", "-b", "at a", "at a @-@ b , t"),
        ('a " b " n , t e', '"b"', "a ", 'a " b " n ,'),
        ("at a , b , a", " ,", "at a, b, a", "at a , b , a"),
        ("be :) at a be", "be:", "be :) at a be", "be :) at a be"),
        ("do n't at a tea b", "o n", "don't at a tea b", "do n't at a tea b"),
        # At once, where nothing that follows can take it apart.
        ("at a do n", "o n", "at a d", "at a do n"),
        ("at a , b . ea te", ".", "at a, b", "at a , b ."),
        ("at a tea , b", "tea", "at a ", "at a tea"),
        ("at a tea , b", "a t", "at ", "at a t"),
        ("at ,\nb , a", "\nb", "at,", "at ,\nb"),
        ("at ,\n\nb , a", "\n\n", "at,", "at ,\n\n"),
    ],
)
def test_a_stop_text_is_looked_for_in_what_is_shown(raw, stop, text, read):
    letters = Letters(letters="".join(sorted(set(raw))))
    one, shown = Row(Request(1, len(raw), (stop,)), letters, None, ""), ""
    for letter in raw:
        if one.reason is None:
            shown += one.take(Drawn(letters.letters.index(letter), -1.0, 1.0))
    done = one.completion(0.0)
    assert shown == done.text == text
    assert letters.decode(done.tokens) == read
    assert done.reason == ("stop" if stop in clean_spacing(raw) else "length")


wanted = st.text('ab .,"@-\n(', min_size=1, max_size=3)


@given(st.text(MARKS.letters, max_size=30), st.lists(wanted, min_size=1, max_size=2))
@example("a ) ( ) b a ( a ", [")("])
def test_a_stop_text_ends_the_clean_text_where_the_whole_of_it_would(raw, stop):
    stop = tuple(stop)
    done = cleaned_row(raw, stop).completion(0.0)
    whole = TextUntil(stop)
    expected = whole.feed(clean_spacing(raw)) + whole.finish()
    # What follows a stop text inside a word can still take the spaces away that stand before it.
    assert done.text.rstrip(" ") == expected.rstrip(" ")
    assert (done.reason == "stop") == whole.found


def test_a_stop_text_of_the_last_line_counts_though_more_could_have_come():
    one = row(4, stop=("a .",), clean_after="")
    take(one, "a . ")
    assert (one.reason, one.completion(0.0).text) == ("length", "a. ")
    cut = row(3, stop=("a.",), clean_after="")
    take(cut, "a .")
    assert (cut.reason, cut.completion(0.0).text) == ("stop", "")
    stopped = row(9, stop=("a.",), clean_after="")
    take(stopped, "a .")
    stopped.end("interrupted")
    assert (stopped.reason, stopped.completion(0.0).text) == ("interrupted", "")
