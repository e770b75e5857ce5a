"""An update that no rank took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedUpdate:
    """Why no rank took an update: what one rank saw that is not finite."""

    rank: int
    gradient_norm: float
    microbatch: int | None  # None: every loss of this rank was finite
    row_ids: tuple[int, ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        where = "" if self.microbatch is None else f", loss of microbatch {self.microbatch} (rows {list(self.row_ids)})"
        names = f", gradient of {', '.join(self.parameters)}" if self.parameters else ""
        return f"rank {self.rank}: gradient norm {self.gradient_norm}{where}{names}"
