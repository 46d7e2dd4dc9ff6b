"""What a conformance run found: checks, numbers, and the likely cause in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pass", "fail", "other", "note"]
LABELS = {"pass": "pass", "fail": "FAIL", "other": "OTHER", "note": "note"}


@dataclass(frozen=True)
class Check:
    """One check. "other": the trainer descends another objective that the literature knows; "note": no judgement."""

    name: str
    level: int
    status: Status
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """A candidate of the catalogue: the relative error of the trainer's expected gradient after the best scale."""

    name: str
    error: float
    scale: float


@dataclass(frozen=True)
class Report:
    """ok: every check passed. cause: the likely cause, None where all passed; `cause_name` is its name in the
    catalogue, None where nothing there has the trainer's gradient. nearest: the best candidates, nearest first."""

    trainer: str
    against: str
    parameters: Mapping[str, float]
    checks: tuple[Check, ...]
    cause_name: str | None
    cause: str | None
    nearest: tuple[Match, ...]

    @property
    def verdict(self) -> Literal["conforms", "another objective", "fails"]:
        found = {check.status for check in self.checks}
        if not found & {"fail", "other"}:
            return "conforms"
        return "another objective" if "other" in found and "fail" not in found else "fails"

    @property
    def ok(self) -> bool:
        return self.verdict == "conforms"

    def as_data(self) -> dict[str, Any]:
        """What `preflab conform --json` prints; null where a number is not finite."""

        def finite(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "trainer": self.trainer,
            "against": self.against,
            "parameters": dict(self.parameters),
            "ok": self.ok,
            "verdict": self.verdict,
            "cause": self.cause,
            "cause_name": self.cause_name,
            "checks": [
                {
                    "name": c.name,
                    "level": c.level,
                    "status": c.status,
                    "text": c.text,
                    "numbers": {key: finite(x) for key, x in c.numbers.items()},
                }
                for c in self.checks
            ],
            "nearest": [
                {"name": m.name, "error": finite(m.error), "scale": finite(m.scale)} for m in self.nearest
            ],
        }

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value:g}" for name, value in self.parameters.items())
        lines = [f"{self.trainer} against {self.against}{f' ({given})' if given else ''}: {self.verdict}"]
        lines += [f"  {LABELS[c.status]:5} level {c.level}  {c.name}: {c.text}" for c in self.checks]
        if self.cause is not None:
            lines.append(f"  likely cause: {self.cause}")
        if not self.ok and self.nearest:
            words = ", ".join(f"{m.name} {m.error:.2g}" for m in self.nearest if math.isfinite(m.error))
            lines.append(f"  nearest in the catalogue (relative error): {words}")
        return "\n".join(lines)
