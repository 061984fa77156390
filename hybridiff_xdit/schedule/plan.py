"""Which kind is step i? Phases, step kinds, what a policy is, and the plan as data that prints and parses back.

A *step* is one denoiser evaluation. A *plan* is the list of step kinds of one run, written as a string with one
letter a step (``FFFPSF``), or printed as a grid with one row a step and one column a rank.
"""

import re
from enum import Enum
from typing import NamedTuple, Protocol

from .discrepancy import Bend
from .sampler import Sampler


class StepKind(str, Enum):
    """What the ranks do on a step."""

    FULL = "F"  #: both branches are evaluated, each on half of the ranks
    PIPELINED = "P"  #: one evaluation of the network in total, its layers split over the ranks
    SKIPPED = "S"  #: none: both predictions are estimated from FULL steps before it


class Phase(str, Enum):
    """Where a step lies in the run (arXiv 2602.21760, section 4.1)."""

    WARM_UP = "WARM_UP"  #: before the first step that is not FULL
    PARALLELISM = "PARALLELISM"  #: from the first to the last step that is not FULL
    FULLY_CONNECTING = "FULLY_CONNECTING"  #: after it


FULL, PIPELINED, SKIPPED = StepKind

#: The kinds that a policy which chooses may use, where the user does not say. PIPELINED is not among them: such a step,
#: whose later stages read what was made of an older input, has been the less close one, and saves half as much.
DEFAULT_KINDS = "FS"

#: With more than two stages, FULL steps at the beginning of a run on which each stage waits for the one before it. Each
#: takes as long as with two stages. Two are needed to have something old to extrapolate from; four make the pictures
#: 2.5 dB (emoji-sd3) and 0.6 dB (emoji-sdxl) closer, with eight 0.4 dB more (4 stages, 50 FULL steps, 8 prompts).
SYNCHRONOUS_STEPS = 4


class Row(NamedTuple):
    """One step of a plan: its number, phase, kind and what each rank evaluates."""

    step: int
    phase: Phase
    kind: StepKind
    work: tuple[str, ...]


class Plan(tuple[StepKind, ...]):
    """The step kinds of one run, in order. ``str(plan)`` is its letters; `Plan.parse` reads them back."""

    __slots__ = ()

    def __str__(self) -> str:
        return "".join(kind.value for kind in self)

    @classmethod
    def parse(cls, text: str, num_steps: int | None = None) -> "Plan":
        """Read a plan from letters, or from an interval pattern.

        Args:
            text: one letter F, P or S a step, or ``START-END/GAP``: from step START up to (not including) END every
                GAP-th step is FULL, the rest PIPELINED; ``8-48/2`` has step 8 PIPELINED, 9 FULL, ... 47 FULL. With
                an S at its end (``8-48/2S``) the rest is SKIPPED.
            num_steps: length of the run. Letters must have this length; a pattern needs it.

        Raises:
            ValueError: with the flag and the mend, when the text cannot be read or does not fit the run.
        """
        mend = "Give --hybrid_plan one letter F, P or S a step, or START-END/GAP such as 8-48/2 or 8-48/2S."
        if match := re.fullmatch(r"(\d+)-(\d+)/(\d+)([PS]?)", text):
            start, end, gap = map(int, match.groups()[:3])
            rest = StepKind(match[4] or "P")
            if not 1 <= start < end or gap < 2:
                raise ValueError(
                    f"plan={text!r}: needs 1 <= START < END and GAP >= 2, since the first step is FULL and "
                    f"GAP 1 leaves nothing to pipeline. {mend}"
                )
            if num_steps is None:
                raise ValueError(f"plan={text!r}: a pattern needs the number of steps of the run.")
            if end > num_steps:
                raise ValueError(f"plan={text!r}: END is {end}, but the run has only {num_steps} steps. {mend}")
            steps = range(num_steps)
            between = {i for i in range(start, end) if (i - start) % gap != gap - 1}
            return cls(rest if i in between else FULL for i in steps)
        if not re.fullmatch(r"[FPS]+", text):
            raise ValueError(f"plan={text!r} is neither letters F, P and S nor a pattern. {mend}")
        if text[0] != "F":
            raise ValueError(f"plan={text!r}: the first step must be F, since nothing is known before it. {mend}")
        if num_steps is not None and len(text) != num_steps:
            raise ValueError(f"plan={text!r} has {len(text)} letters, but the run has {num_steps} steps. {mend}")
        return cls(StepKind(letter) for letter in text)

    def speedup_bound(self, stages: int = 2) -> float:
        """Bound of the speed-up over one GPU on as many as there are stages; the one GPU evaluates every step.

        ``2T / (W + (T - W - n_p / 2 - n_s) / R)``, where ``n_p`` and ``n_s`` are the PIPELINED and the SKIPPED steps, a
        branch has R = stages / 2 ranks, and W FULL steps are synchronous (none with two stages).
        """
        waiting = synchronous_steps(stages, self.count(FULL))
        others = len(self) - waiting - self.count(PIPELINED) / 2 - self.count(SKIPPED)
        return 2 * len(self) / (waiting + others / (stages / 2))

    def phase(self, step: int) -> Phase:
        """Phase of a step."""
        estimated = [i for i, kind in enumerate(self) if kind is not FULL]
        if not estimated or step < estimated[0]:
            return Phase.WARM_UP
        return Phase.PARALLELISM if step <= estimated[-1] else Phase.FULLY_CONNECTING

    def rows(self, stages: int = 2) -> list[Row]:
        """The plan, a row a step. Stages that no later step reads are not evaluated: their ranks show ``-``."""
        half = stages // 2
        rows = []
        for i, kind in enumerate(self):
            work = ["uncond"] * half + ["cond"] * half
            if kind is PIPELINED:
                is_read = i + 1 < len(self) and self[i + 1] is PIPELINED
                numbers = [*range(0, stages, 2), *range(1, stages, 2)]
                work = [f"stage{n}" if is_read or n == stages - 1 else "-" for n in numbers]
            elif kind is SKIPPED:
                work = ["-"] * stages
            rows.append(Row(i, self.phase(i), kind, tuple(work)))
        return rows

    def grid(self, stages: int = 2) -> str:
        """The plan as text: a row a step, a column a rank. `from_grid` reads it back."""
        ranks = [f"rank {rank}" for rank in range(stages)]
        lines = [("step", "phase", "kind", *ranks)]
        lines += [(str(row.step), row.phase.name, row.kind.name, *row.work) for row in self.rows(stages)]
        return "\n".join(
            f"{step:>4}  {phase:<16}  {kind:<9}  {'  '.join(f'{part:<6}' for part in work)}".rstrip()
            for step, phase, kind, *work in lines
        )

    @classmethod
    def from_grid(cls, text: str) -> "Plan":
        """Read a plan back from `grid`.

        Raises:
            ValueError: the text is not a grid that this plan would print.
        """
        head, *kinds = [line.split() for line in text.splitlines()] or [[]]
        try:
            plan = cls(StepKind[fields[2]] for fields in kinds)
        except (IndexError, KeyError) as error:
            raise ValueError("not a plan's grid: every row needs step, phase, kind and the ranks' work") from error
        if plan.grid(head.count("rank")).split() != text.split():
            raise ValueError("not a plan's grid: the rows do not agree with the kinds they list")
        return plan


def synchronous_steps(stages: int, full_steps: int) -> int:
    """How many of so many FULL steps are synchronous (`SYNCHRONOUS_STEPS`)."""
    return min(SYNCHRONOUS_STEPS, full_steps) if stages > 2 else 0


class Policy(Protocol):
    """Answers "what kind is step i?" from what has been measured so far, the same on every rank.

    Attributes:
        error: estimate of what the steps so far have added to the latents, relative to their size; None for "unknown".
        tau_1: first step that is not FULL; None for "not yet" or "this policy has none".
        tau_2: first step after the last such.
        reads_bends: whether `observe` reads the bend.
        lag: of the FULL steps so far, how many of the last need not have been observed when a kind is asked for. With
            one, a GPU has that step to work on while the host decides.
        may_pipeline: whether a step may be PIPELINED, for which the denoiser has to be partitioned.
        sampler: of the run, for a policy that reads it.
    """

    reads_bends: bool
    lag: int
    may_pipeline: bool
    sampler: Sampler | None

    @property
    def error(self) -> float | None: ...

    @property
    def tau_1(self) -> int | None: ...

    @property
    def tau_2(self) -> int | None: ...

    def reads_discrepancy(self, step: int) -> bool:
        """Whether the discrepancy of FULL step ``step`` decides anything (reading it makes a GPU's host wait)."""

    def observe(self, step: int, discrepancy: float, bend: Bend | None = None) -> None:
        """Take what FULL step ``step`` measured.

        Args:
            discrepancy: M.
            bend: how the predictions bend there; None where no two FULL steps are known before it.
        """

    def kind(self, step: int, guidance: float = 1.0) -> StepKind:
        """Kind of step ``step``, the next one. On a PIPELINED step that of the one after it can be asked too.

        Args:
            guidance: ``w - 1``.
        """
