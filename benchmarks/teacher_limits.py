"""Where the limit is when a teacher is on a server: the teacher, the wire or the student. CALCULATED, not measured.

    python benchmarks/teacher_limits.py

A server runs the teacher's layers and sends what a divergence needs of each token of a completion; the trainer has both
heads, reads the completions with the student, and updates it. Each of the three has its own tokens per second, and the
smallest is the limit, if they work at the same time. Sizes of the models are those of their published configurations.
The one assumption is `SHARE`: what part of a GPU's peak the products reach. Left out: prompts (the completions of a
group share one), attention's own products, and the sampling of the completions, which goes on elsewhere or before.
`teacher_cost.py` measures the same ways of asking on the machine at hand, with a model that fits it.
"""

from __future__ import annotations

from dataclasses import dataclass

PEAK = 989.4e12  # FLOP/s of an H100 or H200 in bfloat16, by the data sheet
SHARE = 0.4
LINKS = {"10": 10e9 / 8, "25": 25e9 / 8, "100": 100e9 / 8}  # bytes/s by Gbit/s
TOPK = 64


@dataclass(frozen=True)
class Model:
    """A causal language model: weights in matrix products that a token passes, without embedding and head."""

    name: str
    weights: float
    hidden: int
    vocab: int

    @property
    def head(self) -> float:
        """FLOPs of the head for a token, forward."""
        return 2.0 * self.hidden * self.vocab

    @property
    def layers(self) -> float:
        """FLOPs of the layers for a token, forward."""
        return 2.0 * self.weights


@dataclass(frozen=True)
class Place:
    """A teacher with its GPUs, and the GPUs of the student."""

    teacher: Model
    teacher_gpus: int
    student_gpus: int


STUDENT = Model("Qwen2.5-1.5B", 1.31e9, 1536, 151936)
TEACHERS = (
    Place(Model("Qwen2.5-7B", 6.53e9, 3584, 152064), 1, 1),
    Place(Model("Qwen3-235B-A22B", 20.8e9, 4096, 151936), 8, 8),  # the weights of the experts that a token passes
)


def messages(teacher: Model) -> dict[str, float]:
    """Bytes per token of what can be sent."""
    return {
        "log-probability of the token": 4.0,
        f"top {TOPK}: ids and log-probabilities": TOPK * (4 + 4) + 4.0,
        "hidden state, int8": teacher.hidden + 4.0,
        "hidden state, bfloat16": 2.0 * teacher.hidden,
        "hidden state, float32": 4.0 * teacher.hidden,
        "logits, bfloat16": 2.0 * teacher.vocab,
    }


def teacher_rate(place: Place, message: str) -> float:
    """Tokens per second of the teacher's server: its layers, and its head where that is not the trainer's part."""
    work = place.teacher.layers + (0.0 if message.startswith("hidden") else place.teacher.head)
    return SHARE * PEAK * place.teacher_gpus / work


def student_rate(place: Place, message: str) -> float:
    """Tokens per second of the trainer: scoring reads once, an update reads and differentiates (three times a forward
    pass), each head computes its logits once more for the backward pass."""
    student, teacher = STUDENT, place.teacher
    work = (1 + 3) * student.layers + (1 + 1 + 3) * student.head
    if message.startswith("hidden"):
        work += (1 + 1 + 1) * teacher.head
    return SHARE * PEAK * place.student_gpus / work


def limits(place: Place) -> list[tuple[str, float, float, float, dict[str, tuple[float, str]]]]:
    """(message, bytes, teacher's rate, student's rate, by link the smallest rate and whose it is) of each message."""
    table = []
    for message, size in messages(place.teacher).items():
        rates = {"teacher": teacher_rate(place, message), "student": student_rate(place, message)}
        at = {}
        for link, speed in LINKS.items():
            slowest = min({**rates, "wire": speed / size}.items(), key=lambda item: item[1])
            at[link] = (slowest[1], slowest[0])
        table.append((message, size, rates["teacher"], rates["student"], at))
    return table


def lines() -> list[str]:
    """The tables as Markdown."""
    text = []
    for place in TEACHERS:
        text += [
            f"CALCULATED: {STUDENT.name} on {place.student_gpus}, {place.teacher.name} on {place.teacher_gpus} GPUs, "
            f"products at {SHARE:.0%} of {PEAK / 1e12:g} TFLOP/s; thousands of tokens a second",
            "",
            "| what is sent | bytes a token | teacher | student | "
            + " | ".join(f"limit at {link} Gbit/s" for link in LINKS)
            + " |",
            "| --- | --: | --: | --: | " + " | ".join("---" for _ in LINKS) + " |",
        ]
        for message, size, teacher, student, at in limits(place):
            ends = " | ".join(f"{rate / 1e3:.3g}, {whose}" for rate, whose in at.values())
            text.append(f"| {message} | {size:,.0f} | {teacher / 1e3:.3g} | {student / 1e3:.3g} | {ends} |")
        text.append("")
    return text


if __name__ == "__main__":
    print("\n".join(lines()))
