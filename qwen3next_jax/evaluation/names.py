"""Names that a user types: an unknown one comes back with the nearest known ones."""

import difflib
from collections.abc import Iterable, Sequence


def require_known(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises a ValueError that names each unknown of `given`, of this kind of thing."""
    complaints = []
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        if near:
            hint = "did you mean " + " or ".join(map(repr, near)) + "?"
        elif len(known) <= 10:
            hint = "expected one of " + ", ".join(known)
        else:
            hint = f"nothing like it among {len(known)} known ones"
        complaints.append(f"{name!r} ({hint})")
    if complaints:
        raise ValueError(f"Unknown {what}: {', '.join(complaints)}")
