"""Regular expressions from files: Python's meaning for names of layers, without its backtracking."""

from __future__ import annotations

import random
import re

import pytest

from ditq.patterns import LONGEST, check, search

NAMES = ["", "proj_out", "blocks.0.attn1.to_q", "transformer_blocks.11.ff.net.0.proj", "time_embed.linear_1", "x_0.É"]
PATTERNS = [
    "", "attn", r"^blocks\.", r"\.to_[qkv]$", r"blocks\.(0|1[01])\.", r"^(?:time|proj).*", r"\d+", r"[^a-z._]",
    r"\bff\b", "(?i)ATTN", r"net\.0{1}\.", "(?P<kind>ff|attn)", ".", "a?b?c*", r"\W", r"^x_0\.\w$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_answers_as_python(pattern: str) -> None:
    assert check(pattern) == pattern
    for name in NAMES:
        assert search(pattern, name) == bool(re.search(pattern, name)), name


def test_random_expressions_have_the_same_answers() -> None:
    generator = random.Random(0)
    for _ in range(300):
        pattern = "".join(
            generator.choice(["a", "b", ".", "a*", "b+", "(ab)?", "[ab]", "^", "$", "a|b"]) for _ in range(5)
        )
        name = "".join(generator.choice("abc") for _ in range(8))
        assert search(pattern, name) == bool(re.search(pattern, name)), (pattern, name)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "^(a|a)*$", "(a*)*b", "(.*)*x", "(a|aa)+$", ".*.*.*.*.*.*.*.*=", "a*" * 50 + "b"]
)
def test_backtracking_expressions_end(pattern: str) -> None:
    """With ``re`` these take longer than the universe is old."""
    assert not search(pattern, "a" * 2000 + "!")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "unclosed group"),
        ("[", "unclosed character class"),
        ("(?!attn)", "look-around"),
        (r"(a)\1", "backreferences"),
        ("((a{99}){99}){99}", "size limit"),
        ("a" * (LONGEST + 1), f"at most {LONGEST}"),
    ],
)
def test_expressions_that_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        check(pattern)
    assert len(str(error.value)) < 400
