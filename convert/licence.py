"""Whether the terms of a source let an eight-bit copy of it be published, as far as its card tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from formats.errors import InputError

#: Licences that allow copies and changed copies to be passed on, for commerce or not; the names are the Hub's
#: (hub-docs, "Licenses"). All others need a word in the recipe: their conditions are for a person to read.
FREE = frozenset(
    {
        *("apache-2.0", "mit", "mit-0", "isc", "zlib", "unlicense", "wtfpl", "0bsd", "ncsa", "postgresql", "ms-pl", "bsl-1.0", "afl-3.0"),
        *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "artistic-2.0", "ecl-2.0", "osl-3.0", "eupl-1.1", "eupl-1.2"),
        *("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "epl-1.0", "epl-2.0", "lppl-1.3c"),
        *("cc0-1.0", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
        *("pddl", "odc-by", "odbl", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0"),
    }
)


def licence_of(source: Mapping[str, Any]) -> str:
    """The source's licence as its card names it, ``unknown`` where it names none."""
    return str(source["licence"] or "unknown").lower()


def require_permission(source: Mapping[str, Any], accept: Sequence[str], *, public: bool, name: str) -> None:
    """Raises :class:`InputError` naming every word that ``accept`` lacks for this source to be published."""
    missing = [(word, why) for word, why in _obstacles(source, public=public) if word not in accepted(source, accept, public=public)]
    if missing:
        words = ", ".join(word for word, _ in missing)
        raise InputError(
            f"{name} is not published: {'; '.join(why for _, why in missing)}. If you may publish it, say so in the push section of the "
            f"recipe: accept: [{words}]"
        )


def accepted(source: Mapping[str, Any], accept: Sequence[str], *, public: bool) -> list[str]:
    """The words of ``accept`` that this source needed."""
    given = {word.lower() for word in accept}
    return [word for word, _ in _obstacles(source, public=public) if word in given]


def _obstacles(source: Mapping[str, Any], *, public: bool) -> Iterator[tuple[str, str]]:
    licence, origin = licence_of(source), source["origin"]
    if "-nd" in licence:
        yield licence, f"the licence of {origin} is {licence}, which allows no changed copies, and an eight-bit copy is one"
    elif licence == "unknown":
        yield licence, f"the card of {origin} names no licence, so nothing allows copies"
    elif licence not in FREE:
        yield licence, f"the licence of {origin} is {licence}, whose conditions for passing copies on are for you to read"
    if source.get("gated"):
        yield "gated", f"{origin} is gated: whoever takes a copy from you has not agreed to its terms"
    elif source.get("gated", True) is None and source["commit"]:
        yield "gated", f"whether {origin} is gated was not seen, as it was opened from the cache"
    if source.get("private") and public:
        yield "private", f"{origin} is private, and this push is public"
