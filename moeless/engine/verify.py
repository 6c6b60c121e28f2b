"""Generated tokens and logits against the unmodified model in one process.

The reference reads each request's prompt and generated tokens in one pass. If at every position its greedy choice
is the engine's token, its own greedy generation is the engine's, by induction. A different choice is excused only
where the reference's two best logits lie closer together than the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeless.engine.job import Job
from moeless.engine.results import finished_requests
from moeless.engine.serving import sample
from moeless.files import write_json

#: Largest difference of float32 logits (design: outputs equal the unmodified model's).
TOLERANCE = 1e-4
#: Lower precisions may differ on average by this multiple of what the reference itself differs from float32.
LOW_PRECISION_FACTOR = 2.0


@dataclass(frozen=True)
class Verification:
    """How one policy's outputs compare.

    Attributes:
        identical: generated tokens that are the reference's own choice; ``near_ties`` excused ones.
        max_difference, mean_difference: of logits.
        reference_difference: mean difference of the reference in the run's precision from float32; 0 in float32.
    """

    requests: int
    tokens: int
    identical: int
    near_ties: int
    max_difference: float
    mean_difference: float
    reference_difference: float
    passed: bool

    def sentence(self) -> str:
        """What a person reads."""
        verdict = "verified" if self.passed else "NOT verified"
        return (
            f"{verdict}: {self.identical} of {self.tokens} tokens of {self.requests} requests identical, "
            f"{self.near_ties} near ties, logits differ by at most {self.max_difference:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Reference:
    """The unmodified model, with its answers kept by sequence.

    Args:
        dtype: precision of the run; float32 is always computed beside a lower one.
    """

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        kinds = {torch.float32, dtype}
        self._dtype = dtype
        self._models = {
            kind: transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=kind, attn_implementation="eager"
            ).eval()
            for kind in kinds
        }
        self._known: dict[tuple[tuple[int, ...], torch.dtype], np.ndarray] = {}  # type: ignore[type-arg]

    def logits(self, sequence: tuple[int, ...], first: int, dtype: torch.dtype = torch.float32) -> np.ndarray:  # type: ignore[type-arg]
        """Float32 logits at positions ``first`` and later, ``[n, V]``."""
        key = (sequence, dtype)
        if key not in self._known:
            with torch.inference_mode():
                ids = torch.tensor([sequence])
                out = self._models[dtype](input_ids=ids, use_cache=False, logits_to_keep=len(sequence) - first)
            self._known[key] = out.logits[0].float().numpy()
        return self._known[key]

    def compare(
        self,
        prompts: Mapping[int, Sequence[int]],
        outputs: Mapping[int, Sequence[int]],
        logits: Mapping[int, np.ndarray],  # type: ignore[type-arg]
        sampled: Callable[[torch.Tensor, int, int], int] | None = None,
    ) -> Verification:
        """Compare a policy's generated tokens and their logits ``[n, V]`` by request.

        Args:
            sampled: chooses a token from logits ``[V]``, a request and a position, where the run did not take the
                greedy choice; the reference then chooses from its own logits with the same seed, and only the logits
                decide whether the policy passes.
        """
        exact = self._dtype == torch.float32
        tokens = identical = near = values = 0
        worst = total = own = 0.0
        for request, output in outputs.items():
            sequence = (*prompts[request], *output[:-1])
            first = len(prompts[request]) - 1
            truth = self.logits(sequence, first)
            difference = np.abs(logits[request] - truth)
            worst, total, values = (
                max(worst, float(difference.max())),
                total + float(difference.sum()),
                values + difference.size,
            )
            if not exact:
                own += float(np.abs(self.logits(sequence, first, self._dtype) - truth).sum())
            tokens += len(output)
            best = np.sort(np.partition(truth, -2, axis=-1)[:, -2:], axis=-1)
            if sampled is None:
                choice = truth.argmax(-1)
            else:
                rows = enumerate(torch.from_numpy(truth), start=first + 1)
                choice = np.array([sampled(row, request, position) for position, row in rows])
            same = choice == np.asarray(output)
            identical += int(same.sum())
            if sampled is None:
                near += int((~same & (best[:, 1] - best[:, 0] < TOLERANCE)).sum())
        mean, reference = total / max(values, 1), own / max(values, 1)
        if exact:
            passed = worst <= TOLERANCE and (sampled is not None or identical + near == tokens)
        else:
            passed = mean <= LOW_PRECISION_FACTOR * reference
        return Verification(len(outputs), tokens, identical, near, worst, mean, reference, passed and tokens > 0)


def verification_path(job: Job) -> Path:
    """Where :func:`verifying` leaves what it found: per cell, the verification's fields and its ``sentence``."""
    return job.folder / "verification.json"


def verifying(argument: Mapping[str, Any]) -> Callable[[int], None]:
    """The work of the one process that compares a job's cells with the reference.

    Args:
        argument: ``job``, the job's file; ``cells``, those whose outputs have to be the model's.
    """
    from moeless.engine.worker import DTYPES

    job = Job.read(Path(argument["job"]))

    def sampled(row: Any, request: int, position: int) -> int:
        return sample(row, job.temperature, job.top_p, (job.seed, request, position))

    def work(_: int) -> None:
        reference = Reference(job.model, DTYPES[job.dtype])
        prompts = {live.request.id: live.token_P for live in job.requests}
        found = {}
        for cell in argument["cells"]:
            outputs = {entry["request"]: entry["tokens"] for entry in finished_requests(job.folder, cell, job.ranks)}
            logits = {request: np.load(job.folder / f"logits-{cell}-{request}.npy") for request in outputs}
            result = reference.compare(prompts, outputs, logits, sampled if job.temperature else None)
            found[str(cell)] = result.to_json() | {"sentence": result.sentence()}
        write_json(verification_path(job), found)

    return work
