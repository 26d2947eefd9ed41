"""What a step took: seconds of its phases, memory, padding, and the share of the device's peak that the models used.

The names are verl's where it has one. All figures are of all processes: times and memory of the one with most, tokens
and operations of all together.

Model FLOPs are those that the mathematics of a step needs (Chowdhery et al. 2022, appendix B): two for each weight in a
matrix product and each real token that a model reads or samples, twice as many again for the gradient of its inputs,
and for that of the weights which are trained. Not counted are attention's own products, which grow with the length, so
that the share is a lower bound; the loss; and padding. A layer that is computed again counts in `perf/hfu/update`
alone. The teacher's outputs that are computed again count in neither.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..settings.config import TrainConfig
from .clock import Clock

if TYPE_CHECKING:
    from accelerate import Accelerator

PHASES = ("rollout", "scoring", "update", "kernels")
GIB = 2**30
STANDSTILL = 1e-9  # seconds: of a clock that a function of the user's has stopped

# FLOP/s in bfloat16 without sparsity, from NVIDIA's data sheets, by what `torch.cuda.get_device_name` says.
PEAKS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,  # SXM
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


class Throughput:
    """Measures one step after another of a student and a teacher, unwrapped, from `begin` to `end`."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, clock: Clock, student: Any, teacher: Any) -> None:
        self.config, self.accelerator, self.clock = config, accelerator, clock
        self._peak = peak(config, accelerator.device)
        self._weights = (0, 0, 0)
        if self._peak is not None and (has_experts(student) or has_experts(teacher)):  # a token passes some of them
            self._peak = None
        if self._peak is not None:
            self._weights = matrix_weights(student), matrix_weights(student, trained=True), matrix_weights(teacher)
        self._before: dict[str, float] = {}
        self._start = 0.0

    def begin(self) -> None:
        """The step begins: the device is waited for, and its peak of memory forgotten."""
        self._before = dict(self.clock.seconds)
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        self._start = self.clock.wait()

    def end(self, *, sampled: float, real: float, learned: float, given: tuple[float, float]) -> dict[str, float]:
        """The figures of the step; every process must call this, with what is its own.

        ``sampled``: tokens that were sampled. ``real``: tokens that a model reads to read every completion once, its
        prompt among them, without padding. ``learned``: those of the completions that the update learns from.
        ``given``: the tokens that models were given, with padding, in any passes, and the real ones among these.
        """
        elapsed = self.clock.wait() - self._start
        seconds = {name: self.clock.seconds.get(name, 0.0) - self._before.get(name, 0.0) for name in PHASES}
        memory = _memory(self.accelerator.device)
        largest = torch.tensor([elapsed, *seconds.values(), *memory.values()], dtype=torch.float32)
        totals = torch.tensor([sampled, real, learned, *given], dtype=torch.float32)
        both = self.accelerator.gather(torch.cat([largest, totals]).to(self.accelerator.device))
        both = both.cpu().view(-1, len(largest) + len(totals))
        elapsed, *maxima = both[:, : len(largest)].amax(0).tolist()
        elapsed = max(elapsed, STANDSTILL)
        sampled, real, learned, *given_to_all = both[:, len(largest) :].double().sum(0).tolist()
        names = [*(f"timing_s/{name}" for name in PHASES), *memory]
        figures = {
            "step_time": elapsed,
            "tokens_per_second": sampled / elapsed,
            **dict(zip(names, maxima, strict=True)),
        }
        figures["perf/padding_share"] = padding_share(*given_to_all)
        return figures | self._utilisation(figures, real, learned)

    def _utilisation(self, figures: dict[str, float], real: float, learned: float) -> dict[str, float]:
        """Model FLOPs as a share of the devices' peak, of the step and of its update; nothing where that is unknown."""
        if self._peak is None:
            return {}
        student, trained, teacher = self._weights
        c, at_peak = self.config, self._peak * self.accelerator.num_processes
        samples = {"sft": teacher, "kd": teacher}.get(c.algorithm, student + teacher * c.mixes_teacher)
        rollout = 0.0 if c.rollout else forward_flops(samples, real)  # a function of the user's samples elsewhere
        scoring = forward_flops(student + teacher, real)
        update = c.epochs * training_flops(student, trained, learned)
        in_update = max(figures["timing_s/update"], STANDSTILL) * at_peak
        shares = {
            "perf/mfu/step": (rollout + scoring + update) / (figures["step_time"] * at_peak),
            "perf/mfu/update": update / in_update,
        }
        if c.gradient_checkpointing:
            shares["perf/hfu/update"] = (update + c.epochs * forward_flops(student, learned)) / in_update
        return shares


def read_tokens(prompt_mask: Tensor, mask: Tensor) -> float:
    """Tokens that a model reads of completions with the masks [B, P] and [B, T]: the last column predicts nothing. Of
    one without a token, which nobody has to read, none."""
    return float((prompt_mask & mask.any(1, keepdim=True)).sum() + mask[:, :-1].sum())


def padding_share(passed: float, real: float) -> float:
    """The share of padding among the tokens that a model is given."""
    return 1.0 - real / max(passed, 1.0)


def forward_flops(weights: float, tokens: float) -> float:
    """FLOPs of a forward pass: a multiplication and an addition for each weight and token."""
    return 2.0 * weights * tokens


def training_flops(weights: float, trained: float, tokens: float) -> float:
    """FLOPs of a forward and a backward pass, 6 for each weight and token where all are trained: the backward pass has
    a product for the gradient of every input, and one for that of every weight that is trained."""
    return (4.0 * weights + 2.0 * trained) * tokens


def matrix_weights(model: Any, trained: bool = False) -> int:
    """The weights that a token is multiplied by: all matrices but embeddings that are looked up. `trained`: only those
    that are. Under an adapter the model's own, or where it is asked for without, as `FrozenBase` does, not its."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    absent = (".original_module.",) if inner is model else (".lora_", ".modules_to_save.")
    head = model.get_output_embeddings()
    looked_up = {id(m.weight) for m in inner.modules() if isinstance(m, nn.Embedding) and m.weight is not head.weight}
    return sum(
        p.numel()
        for name, p in inner.named_parameters()
        if p.dim() > 1
        and id(p) not in looked_up
        and (p is head.weight or not any(part in name for part in absent))
        and (p.requires_grad or not trained)
    )


def has_experts(model: Any) -> bool:
    """Whether a token passes some of a model's weights only, which are not counted here."""
    if not hasattr(model, "config"):  # that of a teacher which is asked is elsewhere
        return False
    settings = model.config.get_text_config().to_dict().items()
    return any("experts" in name and value not in (None, 0, 1, False) for name, value in settings)


def peak(config: TrainConfig, device: torch.device) -> float | None:
    """The FLOP/s that a device can reach in the training's precision; None where that is not known."""
    if device.type != "cuda" or config.precision != "bf16":
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


def _memory(device: torch.device) -> dict[str, float]:
    """GiB: on a GPU the peak of the step's tensors, elsewhere that of the process since it began."""
    if device.type == "cuda":
        return {"perf/max_memory_allocated_gb": torch.cuda.max_memory_allocated(device) / GIB}
    try:
        import resource
    except ImportError:  # not a Unix
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"perf/process_max_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
