"""A causal language model in two halves: the hidden states that its head reads, and the head.

    hidden = cf.last_hidden_state(model, input_ids, attention_mask)  # [B, T, H]; no logits are computed
    head = cf.head_of(model)                                         # weight [V, H], bias, scale, softcap
    head.logits(hidden)                                              # what model(...).logits would have been

Where the halves meet is observed rather than assumed. The model is run as it stands, wrappers included, with two hooks
on the module that `get_output_embeddings` names. To get hidden states, the first hook keeps the head's input and hands
the head zero rows of it. So they are what the head reads, after each model's own steps before it (Mamba's cast,
MiniCPM3's division, OPT's projection), and a PEFT model applies its adapters. Where there is a process group they leave
the model as a part of its output: what DDP and FSDP do for the backward pass they do to outputs. FSDP gathers the
weights of the root when the gradient of an output arrives, DDP with a static graph starts its reduction there. To learn
what a model does with its logits afterwards, the second hook makes the head answer with chosen numbers, and what the
model returns is compared with `Head.logits` of them. The configuration says which numbers could be a scale or a
softcap, but only the model says what it does with them: Granite divides by `logits_scaling`, HyperCLOVA X multiplies.

Nothing here needs transformers: a model is a module with `get_output_embeddings()` that returns `.logits`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmdp_fast import checks
from cmdp_fast.compiling import replaced, untraced
from cmdp_fast.field_docs import documented

# What transformers' configurations call them.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_Candidates = tuple[tuple[float | None, ...], tuple[float, ...]]  # softcaps and scales


@documented
class Head(NamedTuple):
    """How a model turns hidden states h into logits: softcap * tanh(scale * (h W^T + b) / softcap).

    Gemma has a softcap, Cohere, Granite and Falcon-H1 a scale.
    """

    weight: Tensor
    """W ``[V, H]``, the model's own parameter, so gradients reach it; float32, bfloat16, float16 or float64, a DTensor
    where the model is tensor-parallel."""
    bias: Tensor | None = None
    """b ``[V]``, a parameter like ``weight``, or None."""
    softcap: float | None = None
    """The largest size of a logit; None: no tanh."""
    scale: float = 1.0
    """What ``h W^T + b`` is multiplied by."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., V] of hidden states [..., H], all at once; differentiable."""
        return _postprocessed(nn.functional.linear(hidden, self.weight, self.bias), self.softcap, self.scale)

    def scaled(self, factor: float) -> Head:
        """The head whose logits are ``factor``, not 0, times these; a softcap is as many times as high. Sharing the
        parameters."""
        softcap = None if self.softcap is None else self.softcap * factor
        return replaced(self, softcap=softcap, scale=self.scale * factor)


def last_hidden_state(
    model: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
) -> Tensor:
    """The hidden states from which ``model(input_ids, attention_mask=..., **inputs).logits`` would be computed.

    Shape [B, T, H]: one for each row of those logits, so ``logits_to_keep`` works where the model has it. In the dtype
    in which they enter the head, on the device where the layer below left them; differentiable with respect to the
    model, gradient checkpointing and autocast included. No cache is kept unless ``use_cache=True`` is given.

    ``model`` may be wrapped by DDP, FSDP, accelerate, PEFT or `torch.compile`. The wrapper itself is called, so that
    its hooks run. A compiled model runs eagerly here, since its graph contains the head; compile its layers or its base
    model instead (``model.model.compile()``), which stay compiled. The model must not be used from another thread
    meanwhile: that call would get no logits.

    Raises TypeError for a model without an output embedding and for ``labels`` (a loss needs logits), ValueError if the
    model does not call its head exactly once or, where there is a process group, if a forward hook replaces what the
    model returns.
    """
    chain = _unwrapped(model)
    head = _output_embedding(chain)
    if inputs.get("labels") is not None:
        raise TypeError("labels= makes the model compute a loss, and so logits; expected its other inputs only")
    return _hidden_states(chain, head, {"input_ids": input_ids, "attention_mask": attention_mask, **inputs})


def head_of(model: Any) -> Head:
    """The head of a causal language model, wrapped or not, checked to give the model's logits.

    The first call for a model runs it once, in evaluation mode, without gradients, on two tokens, with logits from
    -1000 to 1000 put in the place of the head's; later calls return what was found with the parameters of the moment.
    Under DDP or FSDP every rank must make the first call, best before training. Tied embeddings are fine. Where
    peft trains a copy of the head ("modules to save"), it is the copy, or the original while the adapter is off.

    Under FSDP2 call it after `last_hidden_state`, in each step and on every rank. Where the forward pass leaves the
    head together, its weight is the one that FSDP gathered, until the backward pass frees it. Where not
    (``reshard_after_forward=True``, or a group of its own) it is gathered here, in the dtype of the parameters, and its
    gradient is averaged over the ranks as FSDP does.

    Raises TypeError for a model without an output embedding, or a head that is not a plain linear layer in floating
    point (quantized, or with an adapter of its own); ValueError if its weights are elsewhere (sharded, offloaded) or if
    the model's logits are not those of a `Head` with the numbers of its configuration.
    """
    chain = _unwrapped(model)
    inner = chain[-1]
    linear = _plain_linear(_output_embedding(chain), inner)
    candidates = _candidates(inner)
    known = _known.get(inner)
    if known is None or known[0] != candidates:
        _known[inner] = known = candidates, _measured(chain, linear, candidates)
    softcap, scale = known[1]
    weight, bias = (_gathered(parameter, chain) for parameter in (linear.weight, linear.bias))
    return Head(weight, bias, softcap, scale)


# --------------------------------------------------------------------------------------------------------------
# Running a model with hooks on its head


def _unwrapped(model: Any) -> list[nn.Module]:
    """The model, what it wraps, and so on down to the causal language model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chain = [model]
    while True:
        outer: Any = chain[-1]
        inner = getattr(outer, "_orig_mod", None)  # torch.compile
        if not isinstance(inner, nn.Module):
            inner = getattr(outer, "module", None)  # DDP, FSDP, DeepSpeed
        if not isinstance(inner, nn.Module) and callable(getattr(outer, "get_base_model", None)):
            inner = outer.get_base_model()  # PEFT
        if not isinstance(inner, nn.Module) or inner in chain:
            return chain
        chain.append(inner)


def _output_embedding(chain: list[nn.Module]) -> nn.Module:
    """The head that the model calls: the outermost wrapper that knows a head says which, and of peft's original and
    copies of it ("modules to save") it is the one that is switched on."""
    named: list[Any] = [getattr(module, "get_output_embeddings", None) for module in chain]
    head: Any = next((get() for get in named if callable(get)), None)
    if isinstance(getattr(head, "original_module", None), nn.Module):
        active = [name for name in head.active_adapters if name in head.modules_to_save]
        head = head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{type(chain[-1]).__name__} has no output embedding; expected a causal language model whose "
            "get_output_embeddings() returns its head"
        )
    return head


@untraced
def _hidden_states(chain: list[nn.Module], head: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What enters the head, by the way that the model's output takes through its wrappers."""
    seen: list[Tensor] = []
    placed: list[nn.Module] = []
    distributed = dist.is_available() and dist.is_initialized()

    def keep(hidden: Tensor) -> Tensor:
        if distributed and hidden._is_view():
            hidden = hidden.clone()  # FSDP2 warns of views: a change in place could lose the hook that it puts there
        seen.append(hidden)
        return hidden[..., :0, :]

    def carry(module: nn.Module, args: Any, output: Any) -> Any:
        # The innermost whose hooks run (PEFT goes round those of its model), and a wrapper that drops them
        if seen and not (placed and _carried(output, seen[0]) is not None):
            placed.append(module)
            output = _carrying(output, seen[0])
        return output

    # First of all, before the hook in which FSDP2 looks at the output. In a process alone nobody waits for an output
    handles = [module.register_forward_hook(carry, prepend=True) for module in chain if distributed]
    try:
        output = _call(chain, head, inputs, keep)
    finally:
        for handle in handles:
            handle.remove()
    _once(seen, chain[-1])
    if not distributed:
        return seen[0]
    arrived = _carried(output, seen[0])
    if arrived is None:
        what = f"a forward hook of {type(chain[0]).__name__} put a {type(output).__name__} in the place of its output"
        raise ValueError(f"{what}, which carried the hidden states; expected hooks that leave it as it is")
    return arrived if arrived.dtype == seen[0].dtype else _Uncast.apply(arrived, seen[0].detach())


def _carrying(output: Any, hidden: Tensor) -> Any:
    """A model's output with the hidden states in it, in the field that transformers' outputs have for them.

    The empty logits stay: DDP looks for the parameters that no output depends on, and would count the head's twice.
    """
    if isinstance(output, dict) and (not is_dataclass(output) or hasattr(output, "hidden_states")):
        output["hidden_states"] = (hidden,)
        return output
    return output, hidden


def _carried(output: Any, hidden: Tensor) -> Tensor | None:
    """The hidden states in an output that was made by `_carrying` and may have been rebuilt or cast since."""
    rest = output[1:] if isinstance(output, (tuple, list)) else ()
    held = output.get("hidden_states") if isinstance(output, dict) else rest
    arrived = held[0] if isinstance(held, (tuple, list)) and len(held) == 1 else None
    return arrived if isinstance(arrived, Tensor) and arrived.shape == hidden.shape else None


class _Uncast(torch.autograd.Function):
    """The hidden states as they entered the head, where a wrapper cast its output; their gradient takes that way."""

    @staticmethod
    def forward(ctx: Any, arrived: Tensor, hidden: Tensor) -> Tensor:
        ctx.dtype = arrived.dtype
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


@untraced
def _call(
    chain: list[nn.Module],
    head: nn.Module,
    inputs: dict[str, Any],
    before: Callable[[Tensor], Tensor],
    after: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
) -> Any:
    """Calls the model with the head's input replaced by before(input), its output by after(head, input, output)."""
    # First of all, before a hook that would shard the input
    handles = [head.register_forward_pre_hook(lambda _, x: (before(x[0]), *x[1:]), prepend=True)]
    if after is not None:
        handles.append(head.register_forward_hook(lambda module, x, out: after(module, x[0], out)))
    # A graph compiled with the hooks would be used again without them, and one compiled without them ignores them.
    eager = torch.compiler.set_stance("force_eager") if any(map(_is_compiled, chain)) else nullcontext()
    if "use_cache" in inspect.signature(type(chain[-1]).forward).parameters:
        inputs = {"use_cache": False} | inputs
    try:
        with eager:
            return chain[0](**{name: value for name, value in inputs.items() if value is not None})
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile`, of the module or of its forward, or in place."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or hasattr(module.forward, "_torchdynamo_orig_callable")


def _once(seen: list[Any], inner: nn.Module) -> None:
    if len(seen) != 1:
        raise ValueError(f"{type(inner).__name__} called its output embedding {len(seen)} times; expected once")


def whole(parameter: Any) -> Tensor:
    """All of a DTensor, the weight [V, H] or bias [V] of a head; differentiable. Its gradient is the mean of those of
    the ranks, whether each has rows of its own, as under FSDP, or all have the same, as in tensor parallelism."""
    from torch.distributed.tensor import Partial

    gathered: Tensor = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return gathered


def whole_head(head: Head) -> Head:
    """A head whose columns lie on several ranks, in tensor parallelism, as a whole."""
    weight, bias = (whole(p) if hasattr(p, "full_tensor") else p for p in (head.weight, head.bias))
    assert weight is not None
    return head._replace(weight=weight, bias=bias)


def _gathered(parameter: Any, chain: list[nn.Module]) -> Any:
    """A parameter of the head, all of it where FSDP2 has spread it; tensor parallelism alone leaves it as it is.

    As a DTensor it would be taken for columns that serve the same rows on every rank, and ranks of FSDP have their own.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.fsdp import FSDPModule

    # An outermost model may hold the inner ones without their being its modules
    if not any(isinstance(module, FSDPModule) for part in (chain[0], chain[-1]) for module in part.modules()):
        return parameter
    return whole(parameter)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and every module back in its own mode afterwards: parts may be frozen in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --------------------------------------------------------------------------------------------------------------
# What a head is, and what happens to its output


def _plain_linear(head: nn.Module, inner: nn.Module) -> nn.Linear:
    what = f"the head of {type(inner).__name__}, a {type(head).__name__},"
    if hasattr(head, "base_layer"):
        raise TypeError(f"{what} carries an adapter; leave the head out of the adapter's target modules, or merge it")
    # FSDP and parametrizations subclass Linear, but compute what it does; a quantized layer does not.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(f"{what} is not a plain torch.nn.Linear")
    weight = head.weight
    if weight.dtype not in checks.LOGIT_DTYPES or not (
        type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")
    ):
        raise TypeError(
            f"{what} is quantized: its weight is a {type(weight).__name__} of {weight.dtype}; expected a plain tensor "
            "of float32, bfloat16, float16 or float64"
        )
    if weight.is_meta or weight.shape != (head.out_features, head.in_features):
        state = "offloaded" if weight.is_meta else f"sharded, its shape is {list(weight.shape)}"
        raise ValueError(
            f"the weight of {what} is {state}; expected all of it, [{head.out_features}, {head.in_features}]: gather it"
        )
    return head


def _candidates(inner: nn.Module) -> _Candidates:
    """The softcaps and the scales that the configuration could mean."""
    config = getattr(inner, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    values = {
        names: [
            float(value)
            for name in names
            for value in {getattr(part, name, None) for part in (config, text)}
            if isinstance(value, (int, float)) and math.isfinite(value) and value != 0
        ]
        for names in (_SCALES, _SOFTCAPS)
    }
    softcaps = tuple(dict.fromkeys([None, *values[_SOFTCAPS]]))
    return softcaps, tuple(dict.fromkeys([1.0, *(s for v in values[_SCALES] for s in (v, 1.0 / v))]))


def _postprocessed(raw: Tensor, softcap: float | None, scale: float) -> Tensor:
    out = raw if scale == 1.0 else raw * scale
    return out if softcap is None else torch.tanh(out / softcap) * softcap


# What a model does with its logits, measured for the candidates of its configuration
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, tuple[float | None, float]]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def _measured(chain: list[nn.Module], head: nn.Linear, candidates: _Candidates) -> tuple[float | None, float]:
    """(softcap, scale) under which a `Head` gives this model's logits."""
    inner = chain[-1]
    seen: list[Tensor] = []
    linear_error: list[float] = []

    def enter(hidden: Tensor) -> Tensor:  # a padding token's may be 0, and shows nothing
        return _pattern(hidden.shape[-1], hidden).to(hidden.dtype).expand_as(hidden)

    def leave(module: Any, hidden: Tensor, out: Tensor) -> Tensor:
        weight, bias = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in (module.weight, module.bias))
        ours = nn.functional.linear(hidden.to(weight.dtype), weight, bias)
        linear_error.append(_error(out, ours, ours.abs().amax(-1, keepdim=True), out.dtype))
        seen.append(chosen_logits(out))
        return seen[-1]

    embeddings: Any = getattr(inner, "get_input_embeddings", lambda: None)
    embedding = embeddings()
    device = head.weight.device if embedding is None else embedding.weight.device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with evaluating(chain[0]):
        output = _call(chain, head, {"input_ids": tokens}, enter, leave)
    _once(seen, inner)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(inner).__name__} returned a {type(output).__name__}; expected an output with .logits")
    if linear_error[0] > 1.0:
        raise ValueError(f"the head of {type(inner).__name__} does not return h W^T + b: something changes its forward")
    return postprocessing(inner, seen[0], logits, candidates)


def _pattern(size: int, like: Tensor) -> Tensor:
    """Numbers of both signs in [-1, 1], in no order."""
    return (torch.arange(size, device=like.device) * 1_000_003 % size - size // 2) / max(size // 2, 1)


def chosen_logits(like: Tensor) -> Tensor:
    """Numbers [..., V] in the place of a head's output: large ones show a softcap however timid the model's own logits
    are, and different ones in all columns show a bias, a mask or a cut wherever it is."""
    odd = torch.arange(like.shape[-2], device=like.device)[:, None] % 2
    rows = _pattern(like.shape[-1], like) * torch.where(odd == 1, 10.0, 1000.0)
    return rows.to(like.dtype).expand_as(like)


def postprocessing(
    inner: nn.Module, raw: Tensor, logits: Tensor, candidates: _Candidates | None = None
) -> tuple[float | None, float]:
    """(softcap, scale) with which a model made ``logits`` [..., V] of ``raw`` [..., V], the output of its head, out of
    those that its configuration allows. Raises ValueError if it did something else."""
    raw, logits = raw.cpu(), logits.cpu()  # not every device has float64
    if logits.shape != raw.shape:
        raise ValueError(
            f"{type(inner).__name__} makes logits of shape {list(logits.shape)} from the {list(raw.shape)} of its "
            "head; expected it to keep the shape"
        )
    smallest = torch.finfo(raw.dtype).smallest_normal
    rounded = max(raw.dtype, logits.dtype, key=lambda dtype: torch.finfo(dtype).eps)  # by a wrapper's cast
    errors = {
        (softcap, scale): _error(
            logits,
            ours := _postprocessed(raw.double(), softcap, scale),
            ours.abs().clamp(min=smallest * max(softcap or 1.0, 1.0)),
            rounded,
        )
        for softcap, scale in itertools.product(*(candidates or _candidates(inner)))
    }
    best = min(errors, key=lambda pair: errors[pair])
    if not errors[best] <= 1.0:
        off = (logits.double() - _postprocessed(raw.double(), *best)).abs().nan_to_num(math.inf).amax()
        raise ValueError(
            f"{type(inner).__name__} does something to its logits that is not known here: they are off by up to "
            f"{float(off):.3g} from softcap * tanh(scale * logit / softcap) with softcap={best[0]}, scale={best[1]:g}, "
            f"the nearest that its configuration allows ({', '.join(_SOFTCAPS + _SCALES)})"
        )
    return best


def _error(value: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> float:
    """The largest error in units of a handful of roundings in ``dtype`` of numbers of this size; > 1 is too large."""
    if value.shape != expected.shape:
        return math.inf
    allowed = 8 * torch.finfo(dtype).eps * size.cpu().double()
    off = (value.cpu().double() - expected.cpu().double()).abs()
    return float(torch.where(off == 0, 0.0, off / allowed).nan_to_num(math.inf).amax())
