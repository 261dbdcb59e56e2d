"""Globs over local and cloud paths that report unreadable folders.

The standard library's `glob` treats a folder without permission like an empty one. Here it is
reported to the caller.
"""

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator

from etils import epath


def matching_files(pattern: str, problems: list[str]) -> list[epath.Path]:
    """The files that a glob matches.

    Args:
      pattern: as for `glob.glob`; `**` stands for any number of folders.
      problems: list to which folders that cannot be read are added.

    Raises:
      ValueError: no file matches.
    """
    root = fixed_folder(pattern)
    parts = epath.Path(pattern).parts[len(root.parts) :]
    # `**/**` finds a file twice, hence the dict; "" and "." have no part that could match.
    found = dict.fromkeys(_match(root, parts, problems) if parts else ())
    if not found and not problems:
        path = epath.Path(pattern)
        if parts and path.is_dir():
            raise ValueError(
                f"data.path={pattern!r} is a folder; give a glob of its files, such as "
                f"{os.path.join(pattern, '**/*.txt')!r}"
            )
        hint = "give a glob of your own files, such as '/my/texts/**/*.txt'"
        if path.is_file():
            hint = f"its brackets or wildcards stand for other names; give {glob.escape(pattern)!r}"
        elif pattern.startswith("~"):
            hint = f"give the folder of '~' itself: {os.path.expanduser(pattern)!r}"
        raise ValueError(f"data.path={pattern!r} matches no file; {hint}")
    return list(found)


def fixed_folder(pattern: str) -> epath.Path:
    """The leading folders without wildcards, to which names are relative."""
    path = epath.Path(pattern)
    fixed = itertools.takewhile(lambda part: glob.escape(part) == part, path.parts[:-1])
    return type(path)(*fixed)


def _match(folder: epath.Path, parts: tuple[str, ...], problems: list[str]) -> Iterator[epath.Path]:
    part, rest = parts[0], parts[1:]
    if part != "**" and glob.escape(part) == part:
        children = [folder / part] if (folder / part).exists() else []
    else:
        try:
            children = sorted(folder.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
            return
    if part == "**":
        if rest:
            yield from _match(folder, rest, problems)
        for child in children:
            if child.is_dir() and not child.name.startswith("."):
                yield from _match(child, parts, problems)
            elif not rest and not child.name.startswith("."):
                yield child
        return
    for child in children:
        hidden = child.name.startswith(".") and not part.startswith(".")
        if hidden or not fnmatch.fnmatchcase(child.name, part):
            continue
        if rest:
            if child.is_dir():
                yield from _match(child, rest, problems)
        elif child.is_file():
            yield child
