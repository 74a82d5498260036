"""What `fuserl profile` can be told: all that `fuserl rl` can, and a little more. See config.py."""

from dataclasses import dataclass

from fuserl.config import RLConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig(RLConfig):
    """Where a step of `fuserl rl` with these options spends its time: seconds, FLOPs, limit and
    memory by phase, the longest operators, and a trace. Nothing is trained for good."""

    out: str
    """Folder for trace.json (.gz if large), the memory snapshot and profile.json."""
    resume: bool = False
    """Of runs; a profile is none."""
    overwrite: bool = False
    """Lose the profile that --out holds. A run or a model is never written over."""
    warmup_steps: int = 2
    """Steps before the one that is timed."""
    num_operators: int = 10
    """Listed for each phase."""

    def __post_init__(self) -> None:
        RLConfig.__post_init__(self)
        for name in ("warmup_steps", "num_operators"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._refuse("with profile: it writes no run", "resume")
