"""Evaluations of a network on a GPU as CUDA graphs: all kernels of a forward or backward pass start by one call.

Small networks wait for the host, which launches kernel after kernel. A ``GraphedDenoiser`` evaluates like the denoiser
that it was made of, whose network it shares. From the third evaluation with tensors of the same shapes on it copies its
inputs to where a recording expects them and replays that. Weights are read at each replay: training changes them in
place.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from fewstep.core.errors import UserError
from fewstep.core.transfer import send
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, Routed

EAGER = 2  # evaluations before the recording, so that rare shapes are not recorded
MOST = 16  # recordings of one network, which keep their memory

Result = TypeVar("Result")


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def warm_up(work: Callable[[], object]) -> None:
    """Runs ``work`` where recordings are made: libraries load kernels and take memory for a stream when they first use
    it, which cannot be recorded."""
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)


def record(work: Callable[[], Result], pool: Any = None) -> tuple[Callable[[], None], Result]:
    """Records the kernels of ``work``; returns a function that runs them again, and the result of ``work``, whose
    tensors they fill. Recordings with one ``pool`` share their memory."""
    gc.collect()  # a recording that is freed while another is made ends that one
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=_stream(), capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


class GraphedDenoiser(Denoiser):
    """``denoiser`` on a GPU with recorded evaluations. Those without a graph share the memory of ``pool``.

    Raises ``UserError`` for experts by noise level, among which the host chooses; an evaluation does so if the network
    cannot be recorded.
    """

    def __init__(self, denoiser: Denoiser, pool: Any = None) -> None:
        super().__init__(denoiser.backbone, denoiser.schedule, denoiser.kind, style=denoiser.style)
        self.precision = denoiser.precision
        if any(isinstance(module, Routed) for module in _Evaluation(self).modules()):
            raise UserError(
                "cuda_graphs: true is not for a network of several experts by noise level; set it to false."
            )
        self._weights = list(self.backbone.parameters())
        self._pool = pool
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._recordings: dict[tuple[Any, ...], Recording] = {}

    def evaluate(self, x_t: Tensor, times: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        graph = torch.is_grad_enabled()
        through = graph and x_t.requires_grad
        trained = [weight for weight in self._weights if weight.requires_grad] if graph else []
        given = (x_t, times, *condition.values())
        key = (through, len(trained), *condition, *((tuple(x.shape), x.dtype) for x in given))
        self._seen[key] += 1
        if key not in self._recordings and self._seen[key] > EAGER and len(self._recordings) < MOST:
            pool = None if through or trained else self._pool
            self._recordings[key] = Recording(_Evaluation(self), x_t, times, condition, through, trained, pool)
        recording = self._recordings.get(key)
        if recording is None or recording.awaits_backward:
            return self.evaluate_anew(x_t, times, condition)
        return recording(x_t, times, condition)

    def evaluate_anew(self, x_t: Tensor, times: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        """An evaluation that is not replayed."""
        return super().evaluate(x_t, times, condition)


class _Evaluation(nn.Module):
    """The evaluation of a denoiser as a module that contains all of its weights, also those that adapters share."""

    def __init__(self, denoiser: GraphedDenoiser) -> None:
        super().__init__()
        backbone = denoiser.backbone
        self.network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
        self.forward = denoiser.evaluate_anew


class Recording:
    """A recorded forward pass, and the backward pass from its outputs to the input and to the ``trained`` weights, if
    it has a graph to one of them (``through``: to the input)."""

    def __init__(
        self, evaluation: _Evaluation, x_t: Tensor, times: Tensor, condition: Condition, through: bool,
        trained: Sequence[nn.Parameter], pool: Any,
    ) -> None:  # fmt: skip
        device = x_t.device
        self._evaluation = evaluation
        self._x = x_t.detach().clone().requires_grad_(through)
        self._times = send(times, device).clone()  # on the device the network computes with them by its own kernels
        self._condition = Condition({name: x.detach().clone() for name, x in condition.items()}, condition.nulls)
        # A graph that exists may hold the nodes of the weights on another stream: here are others, of the same memory.
        twins = {id(weight): weight.detach().requires_grad_() for weight in trained}
        self._weights = {
            name: twins[id(weight)] for name, weight in evaluation.named_parameters() if id(weight) in twins
        }
        self._trained = list(trained)
        self._ends = [*([self._x] if through else []), *twins.values()]
        self._names: list[str] = []
        self._live: tuple[Tensor, ...] = ()  # the outputs with their graph
        self._slopes: list[Tensor] = []
        self._waiting: weakref.ref[Any] | None = None
        try:
            warm_up(self._both)
            self._replay, self._outputs = record(self._forward, pool)
            if self._ends:
                self._replay_backward, self._gradients = record(self._backward)
        except RuntimeError as error:
            raise UserError(
                f"The evaluation of a {type(evaluation.network).__name__} cannot be recorded as a CUDA graph: "
                f"{next(iter(str(error).splitlines()), type(error).__name__)}. Set cuda_graphs: false."
            ) from error
        finally:
            torch.clear_autocast_cache()

    def __call__(self, x_t: Tensor, times: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            given = [x_t, send(times, x_t.device), *condition.values()]
            torch._foreach_copy_([self._x, self._times, *self._condition.values()], given)
        outputs = _Replay.apply(self, x_t, *self._trained) if self._ends else self.forward()
        raw, *features = outputs
        return raw, dict(zip(self._names, features, strict=True))

    @property
    def awaits_backward(self) -> bool:
        """Whether the backward pass of the latest replay is to come: another replay would overwrite what it needs."""
        return self._waiting is not None and self._waiting() is not None

    # --- what is recorded ---------------------------------------------------------------------------------------------

    def _both(self) -> None:
        self._forward()
        self._slopes = self._slopes or [torch.zeros_like(output) for output in self._live]
        if self._ends:
            self._backward()

    def _forward(self) -> tuple[Tensor, ...]:
        torch.clear_autocast_cache()  # what is recorded must cast the weights that it finds
        given = (self._x, self._times, self._condition)
        raw, features = functional_call(self._evaluation, self._weights, given)
        self._names, self._live = list(features), (raw, *features.values())
        return tuple(output.detach() for output in self._live)

    def _backward(self) -> list[Tensor | None]:
        with_graph = [(x, slope) for x, slope in zip(self._live, self._slopes, strict=True) if x.requires_grad]
        outputs, slopes = zip(*with_graph, strict=True)
        return list(torch.autograd.grad(outputs, self._ends, slopes, allow_unused=True))

    # --- replays ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, ...]:
        """The outputs for the inputs that were copied before."""
        self._replay()
        return tuple(output.clone() for output in self._outputs)

    def expect_backward(self, context: Any) -> None:
        """No replay until the backward pass that ``context`` belongs to has run or was given up."""
        self._waiting = weakref.ref(context)

    @torch.no_grad()
    def backward(self, slopes: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the input, None without a graph to it, and of the weights, for those of the outputs."""
        gradients = self._gradients if self._x.requires_grad else [None, *self._gradients]
        for weight, gradient in zip(self._trained, gradients[1:], strict=True):
            if weight.grad is not None and gradient is not None and weight.grad.data_ptr() == gradient.data_ptr():
                weight.grad = weight.grad.clone()  # of an earlier replay: autograd keeps what it is given
        torch._foreach_copy_(self._slopes, list(slopes))
        self._replay_backward()
        self._waiting = None
        first = gradients[0]
        return [None if first is None else first.clone(), *(None if g is None else g.detach() for g in gradients[1:])]


class _Token:
    """Lives as long as the graph of one replay."""


class _Replay(torch.autograd.Function):
    """A replay of a recording, differentiable once."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, x_t: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.recording, ctx.token = recording, _Token()
        recording.expect_backward(ctx.token)
        return recording.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.recording.backward(slopes))
