"""Look at the files of a store: what does not belong there, and what others could read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from crewlog.errors import CrewlogError, StorageFailed
from crewlog.local import cursors, disk, layout, leases
from crewlog.local.layout import Directory

_KNOWN: Final = frozenset(
    {
        layout.STORE,
        layout.SNAPSHOT,
        layout.SNAPSHOT_PREV,
        *layout.NEWBORN,
        layout.POISON,
        *layout.DIRECTORIES,
    }
)


def strays(directory: Directory, report: Callable[[str, str, str], None]) -> None:
    """Tell `report` (code, name, message) of each file that should not be there, or not so."""
    places = [("", directory.root), *((n, directory[n]) for n in layout.DIRECTORIES)]
    for folder, fd in places:
        for name in directory.names(folder):
            _look(directory, folder, name, fd, report)


def _look(
    directory: Directory, folder: str, name: str, fd: int, report: Callable[[str, str, str], None]
) -> None:
    relative = str(Path(folder) / name)
    temporary = disk.is_temporary(name)
    if not folder and name not in _KNOWN and not temporary:
        report("stray_file", relative, "this is no file of a store")
    elif folder in {layout.LOG, layout.ARCHIVE} and not _is_of_history(folder, name):
        if not temporary:
            report("stray_file", relative, "this is no segment")
    elif folder == layout.LEASES and not leases.is_lease(name):
        report("stray_file", relative, "this is no lease")
    elif not folder and name in layout.DIRECTORIES:
        return
    else:
        try:
            if folder == layout.CURSORS and not temporary:
                cursors.read(directory, name)
            else:
                os.close(disk.open_file(name, at=fd, where=directory.where(relative)))
        except FileNotFoundError:  # moved on meanwhile
            return
        except StorageFailed:  # it could not be looked at, which says nothing about it
            raise
        except CrewlogError as error:
            report(error.code, relative, error.why)


def _is_of_history(folder: str, name: str) -> bool:
    if layout.first_seq_of(name) is not None:
        return True
    kept = layout.state_seq_of(name) is not None or layout.merged_seqs_of(name) is not None
    return folder == layout.ARCHIVE and (kept or name == layout.BASE)
