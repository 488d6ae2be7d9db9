"""The state that an interrupted request goes on from, and the code that trained it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cu_runner.concepts.requests import Request
from cu_runner.config.run_config import RunConfig
from cu_runner.runner.early_stop import EarlyStop
from cu_runner.runner.training import Training
from cu_runner.runtime.code_identity import CodeIdentity, spell_changes
from cu_runner.schema.errors import StoreError
from cu_runner.store.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

# What is saved; codes: every code that trained the request so far.
PARTS = ["training", "early_stop", "codes"]


class SavedState:
    """Of one request. Several codes train it only where that was allowed, each time.

    request: whose it is. training, early_stop: what was saved; None and [] where the request
    begins. mixed: whether other code made a part of it.
    """

    def __init__(
        self, checkpoint: Checkpoint, request: Request, key: Mapping[str, object], plan: RunConfig
    ) -> None:
        """Read what was saved under the key.

        Raises:
            StoreError: other code made it, or a part of it, and neither fresh nor allow_other_code
                is set.
        """
        self.request, self._checkpoint, own = request, checkpoint, plan.code
        self.training: dict[str, Any] | None = None
        self.early_stop: list[dict[str, float]] = []
        self.mixed, self._codes = False, [own]
        state = checkpoint.begin({**key, "holds": PARTS})
        if state is None:
            return
        done = len(state["training"]["rows"])
        codes = [CodeIdentity(**code) for code in state["codes"]]
        if changed := sorted({name for code in codes for name in own.changes(code)}):
            said = f"made by other code (changed: {spell_changes(changed)})"
            if plan.spine.fresh:
                logger.info("   request %d begins anew: its state was %s", request.index, said)
                return
            if not plan.spine.allow_other_code:
                raise StoreError(
                    f"{checkpoint.path}: the state of request {request.index} after step {done} "
                    f"was {said}; fresh=true begins the request anew, allow_other_code=true goes "
                    "on with it"
                )
            self.mixed = True
        self._codes += [code for code in codes if code != own]
        self.training, self.early_stop = state["training"], state["early_stop"]
        logger.info("   request %d goes on after step %d", request.index, done)

    def save(self, training: Training, early_stop: EarlyStop) -> None:
        """Save where the request is now."""
        codes = [asdict(code) for code in self._codes]
        parts = (training.state(), early_stop.seen, codes)
        self._checkpoint.save(dict(zip(PARTS, parts, strict=True)))
