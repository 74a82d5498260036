"""Phases that need the memory which a kept rollout holds: scoring and training between rollouts."""

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.memory import is_out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


def with_room(
    memory: RolloutMemory,
    name: str,
    phase: Callable[[], T],
    *,
    begin_again: Callable[[], bool] = lambda: True,
) -> T:
    """phase(); where memory runs out in it, once more without what the memory keeps.

    begin_again: undoes what the phase has begun; False where it has done what must not be done
    twice. The error goes on then, and where nothing was kept.
    """
    handled = sys.exception()  # whoever trains while out of memory is handled has other errors too
    try:
        return phase()
    except (MemoryError, RuntimeError) as error:
        if memory.kept is None or not is_out_of_memory(error, handled):
            raise
        if not begin_again():
            logger.error(
                "out of memory in %s, which has changed weights and cannot begin again: lower "
                "microbatch_size or rollout_slots",
                name,
            )
            raise
    # Past the handler, whose error holds the frames of the phase and all that is in them.
    memory.give_way()
    logger.warning(
        "out of memory in %s: the rollout's cache and graphs are released, and it begins again; "
        "later rollouts keep half as much",
        name,
    )
    return phase()
