"""StopTextMatcher: cuts at the earliest stop text, shows the rest as soon as it is certain."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.stop_text import StopTextMatcher


def test_text_is_shown_as_soon_as_it_cannot_begin_a_stop_text() -> None:
    matcher = StopTextMatcher(("abc",))
    assert [matcher.push(piece) for piece in ("x", "a", "b", "x", "ab", "ab")] == [
        "x",
        "",
        "",
        "abx",
        "",
        "ab",
    ]
    assert matcher.flush() == "ab"


def test_the_first_to_be_complete_wins_and_of_two_the_longer() -> None:
    for stops, won, shown in ((("bc", "abcd"), "bc", "a"), (("cd", "bcd", "d"), "bcd", "a")):
        for pieces in (["abcd"], ["ab", "cd"], list("abcd")):
            matcher = StopTextMatcher(stops)
            assert "".join(matcher.push(piece) for piece in pieces if matcher.matched is None) == shown
            assert matcher.matched == won


def test_text_passed_over_is_never_part_of_a_match() -> None:
    matcher = StopTextMatcher(("ab",))
    assert matcher.pass_over("a") == "a"
    assert matcher.push("b") == "b"
    assert matcher.matched is None


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_any_cutting_into_pieces_gives_what_a_search_of_the_whole_gives(pieces, stops, include) -> None:
    matcher = StopTextMatcher(tuple(stops), include_in_output=include)
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop), stop) for stop in stops if stop in whole]
    end, begin, first = min(ends, default=(len(whole) + 1, 0, None))
    shown = read = ""
    for piece in pieces:
        read += piece
        shown += matcher.push(piece)
        if len(read) >= end:
            assert matcher.matched == first
            assert shown == whole[: end if include else begin]
            return
        assert matcher.matched is None
        assert read.startswith(shown)
        held = read[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops), "text is held back without need"
    assert shown + matcher.flush() == read
