"""Bars of the libraries that load models, hidden for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cu_runner.runtime.lazy import diffusers, transformers


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Let transformers and diffusers show no bar of what they load inside; then as before."""
    shown = [
        library.utils.logging
        for library in (transformers, diffusers)
        if library.utils.logging.is_progress_bar_enabled()
    ]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
