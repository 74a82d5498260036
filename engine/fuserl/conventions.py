"""Whose conventions a run follows: a preset of fuserl_kernels, and what the user set over it."""

import dataclasses
from typing import Any

import fuserl_kernels as fk
from fuserl.algorithms import ALGORITHMS
from fuserl.config import RLConfig
from fuserl_kernels.presets import Preset


def conventions(config: RLConfig) -> Preset:
    """The preset with every option that the configuration sets in the place of its own, and
    without the rules that have no meaning for this algorithm and these rewards."""
    names = ("clip_range", "value_clip_range", "missing_eos_penalty")
    changes: dict[str, Any] = {
        name: getattr(config, name) for name in names if getattr(config, name) is not None
    }
    if config.reward_at == "token":  # every token has its own score, in its own slot
        changes |= {"score_slot": "last", "missing_eos": None}
    if ALGORITHMS[config.algorithm].clip == "none":
        changes["dual_clip"] = None
    return dataclasses.replace(fk.PRESETS[config.preset], **changes)
