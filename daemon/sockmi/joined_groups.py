# SPDX-License-Identifier: MIT
"""The groups that an operator has joined: kept in the state folder, for the next start.

Those of the configuration are not here: it says itself what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sockmi.config import GroupConfig
from sockmi.problems import problems
from sockmi.transport.identity import write_private_file

FILE = "groups.json"
_BYTES_MAX = 1_000_000
_GROUPS = TypeAdapter(list[GroupConfig])

_log = logging.getLogger(__name__)


class JoinedGroups:
    """Owns the file ``groups.json`` of ``state_dir``: a list of what `config.GroupConfig` has."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE

    def read(self) -> list[GroupConfig]:
        """What was kept last. A damaged file must not keep the daemon from its connections: it is told."""
        try:
            with self._path.open("rb") as file:
                return _GROUPS.validate_json(file.read(_BYTES_MAX))
        except FileNotFoundError:
            return []
        except ValidationError as error:
            why = "; ".join(problems(error))
        except OSError as error:
            why = error.strerror or str(error)
        _log.error("%s: %s; remove it, and join the groups again that are not configured", self._path, why)
        return []

    def keep(self, groups: Iterable[GroupConfig]) -> None:
        """Replace them, durably; raises OSError, and then nothing has changed."""
        if content := list(groups):
            write_private_file(self._path, _GROUPS.dump_json(content, indent=2), replace=True)
        else:
            self._path.unlink(missing_ok=True)
