"""Operators that name their arguments: what PyTorch calls with a flat list is, in our files, one value with fields.

An operator of torch takes tensors and numbers one after the other. Here its arguments are declared as a NamedTuple, in
which others may be nested, and read by name; the schema that torch sees is made from the types of the fields.

    class Given(NamedTuple):
        pair: Pair                      # student, teacher, tokens, ... one argument each: pair_student, pair_teacher
        backend: str

    @operator("token_stats")
    def _token_stats(given: Given) -> Made: ...      # Made: a NamedTuple of tensors

    @_token_stats.shapes                             # what it returns, as empty tensors
    def _(given: Given) -> Made: ...

    @_token_stats.gradient(of=("logprob", "entropy"), keep=lambda given, made: Kept(given.pair, made.saved))
    def _(backward: Backward[Kept]) -> dict[str, Tensor]: ...   # by the name of the argument: {"pair_student": ...}

    _token_stats(Given(pair, "cpu"))

A call in plain eager mode goes straight to its function, by way of an `autograd.Function` if an argument needs a
gradient. One that somebody else takes part in (`onlookers`), such as torch.compile, goes through the registered
operator, with the same results; one in a transform of torch.func by way of an `autograd.Function` of that operator.

There is one derivative, in reverse mode. Everything else, forward mode and a derivative of the gradient, is an error:
torch would take the tangent of an operator that says nothing of it for 0.
"""

from __future__ import annotations

import functools
import hashlib
import operator as fields_of
import sys
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from cmdp_fast.compiling import in_tensor, varies
from cmdp_fast.ops.arguments import flatten, is_record, leaves, record_of, schema_type
from cmdp_fast.ops.namespace import NAMESPACE
from cmdp_fast.ops.onlookers import (
    any_tangent,
    autograd_excluded,
    forward_mode,
    forward_mode_in_graph,
    gradient_in_graph,
    transformed,
    transforms_of,
    unobserved,
)

Given = TypeVar("Given", bound=tuple[Any, ...])  # a NamedTuple of arguments
Made = TypeVar("Made")  # a NamedTuple of tensors, a tensor, or None
Kept = TypeVar("Kept", bound=tuple[Any, ...])

# Every operator declared so far by name, and a hash of them all, which every call of a registered one passes along:
# torch.compile keeps compiled graphs on disk and knows them by the calls of the forward pass. Were it not for the hash,
# a graph that an earlier version of this package left there would go on calling a backward operator whose arguments
# have changed since.
DECLARED: dict[str, Operator[Any, Any]] = {}
REVISION = ""


def seal() -> None:
    """Computes the hash; called once all operators of the package have been declared."""
    global REVISION
    declarations = sorted(operator.declaration for operator in DECLARED.values())
    REVISION = hashlib.sha256("\n".join(declarations).encode()).hexdigest()[:12]


class Backward(Generic[Kept]):
    """What a backward pass is told."""

    def __init__(self, context: Any, needed: set[str], upstream: tuple[Tensor | None, ...]) -> None:
        self.context = context  # survives from one backward pass through the same call to the next
        self.upstream = upstream
        """The gradients that arrive, in the order of ``of``; None for one that does not count. Not all are None."""
        self.needed = needed
        """The names of the arguments that need a gradient. Not empty."""

    @property
    def kept(self) -> Kept:
        """What the forward pass kept. Raises RuntimeError if one of its tensors has been overwritten since."""
        context, values = self.context, list(self.context.kept)
        for i, t in zip(context.places, context.saved_tensors, strict=True):
            values[i] = t
        return cast(Kept, context.record.rebuild(values))


class _Gradient(NamedTuple):
    """How the results of an operator are differentiated."""

    outputs: tuple[int, ...]  # those that are differentiable
    keep: Callable[[Any, Any], Any]
    function: Callable[[Backward[Any]], dict[str, Tensor]]

    def remember(self, context: Any, given: Any, made: Any, output: Sequence[Tensor]) -> None:
        """What has to be done in a forward pass."""
        context.mark_non_differentiable(*(t for i, t in enumerate(output) if i not in self.outputs))
        context.set_materialize_grads(False)
        kept = self.keep(given, made)
        kind: Any = type(kept)
        record, values = record_of(kind), flatten(kept)
        # While a graph is traced a number may be a tensor, too.
        places = [*record.tensors, *(i for i in record.floats if isinstance(values[i], Tensor))]
        context.save_for_backward(*(values[i] for i in places))  # None stays None
        for i in places:
            values[i] = None
        context.kept, context.record, context.places = values, record, places

    def back(self, context: Any, needed: set[str], upstream: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """The gradients of the arguments that need one, by name."""
        arrived = tuple(upstream[i] for i in self.outputs)
        if not needed or all(g is None for g in arrived):
            return {}
        return self.function(Backward(context, needed, arrived))


class Operator(Generic[Given, Made]):
    """A function of one NamedTuple, registered with torch as an operator of its fields."""

    def __init__(self, name: str, function: Callable[[Given], Made], mutates: str) -> None:
        hints = get_type_hints(function)
        made = hints.pop("return")
        (kind,) = hints.values()
        self.name = name
        self.takes, self.makes = record_of(kind), record_of(made) if is_record(made) else None
        arguments = list(leaves(kind))
        self.names = [leaf.name for leaf in arguments]
        self.mutates = mutates
        tensors = [leaf for leaf in arguments if leaf.type.startswith("Tensor")]
        self.tensor_names = tuple(leaf.name for leaf in tensors)
        self._tensors_of = fields_of.attrgetter(*(leaf.path for leaf in tensors))
        declared = ", ".join(
            f"{leaf.type.replace('Tensor', 'Tensor(a!)') if leaf.name == mutates else leaf.type} {leaf.name}"
            for leaf in arguments
        )
        self.made_names = [leaf.name for leaf in leaves(made)] if self.makes else []
        returned = f"({', '.join(['Tensor'] * len(self.made_names))})" if self.makes else schema_type(made)
        self.function = function
        self.differentiated: Any = None  # the function as one that autograd knows, if there is a gradient
        self.transformable: Any = None  # and as one that torch.func knows, unless it overwrites something
        self.no_derivative = (
            f"{NAMESPACE}.{name} has no derivative: the operations of {NAMESPACE} are differentiated once, in reverse "
            "mode; token_stats and divergence have all derivatives with backend='torch'"
        )
        self.registered = torch.library.custom_op(
            f"{NAMESPACE}::{name}",
            self._run,
            mutates_args=(mutates,) if mutates else (),
            schema=f"({declared}, Tensor? numbers=None, str revision='') -> {'()' if returned == 'None' else returned}",
        )
        if not mutates:
            self.registered.register_autograd(self._refuse)
            self.transformable = self._function_of_transforms(lambda ctx, inputs, output: None, self._refuse)
        self.declaration = f"{name}({declared}) -> {returned}"
        DECLARED[name] = self

    def __call__(self, given: Given) -> Made:
        if not torch.compiler.is_compiling():  # torch.compile looks no further
            tensors = self.tensors_of(given)
            if unobserved(tensors):
                needing = self._needing(tensors) if torch.is_grad_enabled() else {}
                # Without a gradient of its own the registered operator says so, if somebody asks for it.
                if not needing or (self.differentiated is not None and not autograd_excluded()):
                    call = self._call if "torch._dynamo" not in sys.modules else self._call_untraced
                    return call(given, needing)
        return self.dispatched(given)

    def dispatched(self, given: Given) -> Made:
        """The call by way of the registered operator."""
        call = self.registered
        if torch.compiler.is_compiling():
            self._check_transforms_of_graph()
        elif self.transformable is not None and (transformed() or forward_mode()):
            # Outside of a vmap torch would not come to ask for the derivative that there is not.
            if forward_mode() and any("jvp" in transforms_of(t) for t in self.tensors_of(given) if t is not None):
                self._refuse()
            call = self.transformable.apply
        return self._named(call(*self._arguments(given)))

    def _check_transforms_of_graph(self) -> None:
        """Raises NotImplementedError for a derivative that a graph cannot have."""
        if self.differentiated is None:
            return
        if forward_mode_in_graph():
            raise NotImplementedError(self.no_derivative)
        if gradient_in_graph():  # torch traces none of a registered operator
            raise NotImplementedError(
                f"{NAMESPACE}.{self.name}: torch.compile does not trace torch.func.grad, vjp or jacrev of it; "
                "compile without fullgraph=True, or use backward"
            )

    def _arguments(self, given: Given) -> tuple[Any, ...]:
        """What the registered operator is called with.

        A number that a graph is to serve every value of goes into a tensor: of a number itself a graph holds the value.
        """
        flat, numbers = flatten(given), None
        if any([varies(flat[i]) for i in self.takes.floats]):
            places = [i for i in self.takes.floats if flat[i] is not None]
            numbers = torch.stack([in_tensor(flat[i]) for i in places])
            for i in places:
                flat[i] = 0.0
        return (*flat, numbers, REVISION)

    def tensors_of(self, given: Given) -> tuple[Tensor | None, ...]:
        """The arguments that are tensors, or None where one was left out, in the order of ``tensor_names``."""
        tensors: Any = self._tensors_of(given)
        return tensors if len(self.tensor_names) != 1 else (tensors,)

    def _needing(self, tensors: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """The tensors that need a gradient, by name."""
        return {
            name: t for name, t in zip(self.tensor_names, tensors, strict=True) if t is not None and t.requires_grad
        }

    def _call(self, given: Given, needing: dict[str, Tensor]) -> Made:
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"{NAMESPACE}::{self.name}"):
                return self._compute(given, needing)
        return self._compute(given, needing)

    @functools.cached_property
    def _call_untraced(self) -> Callable[..., Made]:
        """`_call` where frames may be watched by torch.compile, which has left this one to plain Python."""
        return cast(Callable[..., Made], torch.compiler.disable(self._call))

    def _compute(self, given: Given, needing: dict[str, Tensor]) -> Made:
        if needing:
            return self._named(self.differentiated.apply(given, tuple(needing), *needing.values()))
        if self.mutates:
            overwritten = self.tensors_of(given)[self.tensor_names.index(self.mutates)]
            if overwritten is not None and not overwritten.is_inference():
                torch.autograd.graph.increment_version(overwritten)
        return self.function(given)

    def _named(self, outcome: Any) -> Made:
        return cast(Made, outcome if self.makes is None else self.makes.rebuild(outcome))

    def _bound(self, flat: Sequence[Any], traced: bool = False) -> Given:
        """The arguments of the function, from those of the registered operator.

        ``traced``: of numbers in a tensor that is part of a trace, such as a graph's, each is a tensor.
        """
        numbers = flat[self.takes.size] if len(flat) > self.takes.size else None
        if numbers is not None:
            values = list(flat)
            places = [i for i in self.takes.floats if flat[i] is not None]
            known = numbers.unbind() if traced and not unobserved((numbers,)) else numbers.tolist()
            for i, number in zip(places, known, strict=True):
                values[i] = number
            flat = values
        return cast(Given, self.takes.rebuild(flat))

    def _run(self, *flat: Any) -> Any:
        if any_tangent(flat):  # of a graph that was made before
            self._refuse()
        return self._flat(self.function(self._bound(flat)))

    def _refuse(self, *_: Any) -> None:
        """What stands in the place of a derivative that there is not."""
        raise NotImplementedError(self.no_derivative)

    def _flat(self, outcome: Any) -> Any:
        return outcome if self.makes is None else tuple(flatten(outcome))

    def shapes(self, function: Callable[[Given], Made]) -> None:
        """Registers what the operator returns for tensors without memory."""

        def fake(*flat: Any) -> Any:
            return self._flat(function(self.takes.rebuild(flat)))

        self.registered.register_fake(fake)

    def gradient(
        self, *, of: Sequence[str], keep: Callable[[Given, Made], Kept], operation: str = "", instead: str = ""
    ) -> Callable[[Callable[[Backward[Kept]], dict[str, Tensor]]], None]:
        """Registers the backward pass.

        ``of``: the outputs that are differentiable, by name. ``keep``: what the backward pass will need of arguments
        and results, as a NamedTuple. The function that is decorated returns gradients by the name of the argument.
        ``operation``: what users call, if it has another name; ``instead``: what has all derivatives. An error says so.
        """
        self.no_derivative = (
            f"{NAMESPACE}.{operation or self.name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); use reverse mode (backward, torch.func.grad, vjp, jacrev)"
            + (f", or {instead}" if instead else "")
        )
        outputs = tuple(self.made_names.index(name) for name in of)

        def register(function: Callable[[Backward[Kept]], dict[str, Tensor]]) -> None:
            gradient = _Gradient(outputs, keep, function)

            def remember(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
                gradient.remember(ctx, self._bound(inputs, traced=True), self._named(output), output)

            def back(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
                needed = {name for name, needs in zip(self.names, ctx.needs_input_grad, strict=False) if needs}
                gradients = gradient.back(ctx, needed, upstream)
                return (*(gradients.get(name) for name in self.names), None, None)  # none for numbers and revision

            self.registered.register_autograd(back, setup_context=remember)
            self.differentiated = self._function_of_autograd(gradient)
            self.transformable = self._function_of_transforms(remember, back)

        return register

    def _function_of_autograd(self, gradient: _Gradient) -> Any:
        """The operator as an `autograd.Function` of its arguments, the names of those that need a gradient, and these
        themselves."""

        def forward(ctx: Any, given: Given, names: tuple[str, ...], *needing: Tensor) -> tuple[Tensor, ...]:
            made = self.function(given)
            output = self._flat(made)
            ctx.needing = names
            gradient.remember(ctx, given, made, output)
            return cast(tuple[Tensor, ...], output)

        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            gradients = gradient.back(ctx, set(ctx.needing), upstream)
            return (None, None, *(gradients.get(name) for name in ctx.needing))

        return self._function({"forward": forward, "backward": backward})

    def _function_of_transforms(self, remember: Callable[..., None], back: Callable[..., Any]) -> Any:
        """The registered operator as an `autograd.Function`, in the form that torch.func takes."""

        def forward(*flat: Any) -> Any:
            return self.registered(*flat)

        methods = {"forward": forward, "setup_context": remember, "backward": back, "jvp": self._refuse}
        function = self._function(methods)
        function.generate_vmap_rule = True
        return function

    def _function(self, methods: dict[str, Callable[..., Any]]) -> Any:
        # By the name that torch gives the one it makes of the registered operator: errors quote it.
        name = f"GeneratedBackwardFor_{NAMESPACE}_{self.name}_default"
        static = {method: staticmethod(function) for method, function in methods.items()}
        return type(name, (torch.autograd.Function,), static)


def operator(name: str, mutates: str = "") -> Callable[[Callable[[Given], Made]], Operator[Given, Made]]:
    """Registers a function of one NamedTuple as the operator ``cmdp_fast::name``.

    ``mutates``: the name of the argument that it overwrites.
    """

    def register(function: Callable[[Given], Made]) -> Operator[Given, Made]:
        return Operator(name, function, mutates)

    return register
