"""Regular expressions from recipes and architecture files, matched in time linear in the length of the name.

Python's ``re`` backtracks: ``(a+)+$`` takes minutes on a name of 30 letters. The expressions of pydantic do not; they
have neither look-around nor back-references, which names of layers do not need.
"""

from __future__ import annotations

from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

from ditq.reading import cut, short

LONGEST = 200
MOST = 100
"""The largest number of expressions in one field of a file. A compiled one takes up to 10 MB."""


def check(pattern: str) -> str:
    """Returns ``pattern`` if it is a regular expression.

    Raises:
        ValueError: it is too long, or not a regular expression without look-around and back-references.
    """
    _compiled(pattern)
    return pattern


def search(pattern: str, name: str) -> bool:
    r"""Whether a part of ``name`` matches.

    Example:
        >>> search(r"attn\d", "blocks.0.attn1.to_q"), search(r"^attn", "blocks.0.attn1.to_q")
        (True, False)
    """
    return _compiled(pattern).isinstance_python(name)


@lru_cache(maxsize=MOST + 28)
def _compiled(pattern: str) -> SchemaValidator:
    if len(pattern) > LONGEST:
        raise ValueError(f"a regular expression has {len(pattern)} characters; at most {LONGEST} are allowed")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError as error:
        reason = cut(str(error).rpartition("error: ")[2])
        raise ValueError(f"{short(pattern)} is not a regular expression that ditq supports: {reason}") from error
