# SPDX-License-Identifier: MIT
"""When no process may be begun: it would have descriptors that are to be closed, and wait for them."""

from __future__ import annotations

import threading

#: Held while a process is begun, and from when a client's descriptors come until those that may keep whoever
#: closes them waiting (``engine.closing.close_aside``) are gone.
no_new_process = threading.RLock()
