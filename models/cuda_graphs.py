"""Evaluations of a network on a GPU as CUDA graphs: all kernels of a forward or backward pass start by one call.

Small networks wait for the host, which launches kernel after kernel. A ``GraphedDenoiser`` evaluates like the denoiser
that it was made of, whose network it shares. From the third evaluation with tensors of the same shapes on it copies its
inputs to where a recording expects them and replays that. Weights are read at each replay where they were when it was
recorded: training changes them in place, and nothing may move them.
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
from torch.func import functional_call

from fewstep.core.errors import UserError
from fewstep.core.transfer import send
from fewstep.models.adapters import AdapterView
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser, Routed

EAGER = 2  # evaluations before the recording: rare shapes are not recorded, and networks fill what they cache
MOST = 16  # recordings of one network, which keep their memory

Result = TypeVar("Result")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def warm_up(work: Callable[[], object], device: torch.device) -> None:
    """Runs ``work`` where recordings are made: libraries load kernels and take memory for a stream when they first use
    it, which cannot be recorded."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)


def record(work: Callable[[], Result], device: torch.device, pool: Any = None) -> tuple[Callable[[], None], Result]:
    """Records the kernels of ``work``; returns a function that runs them again, and the result of ``work``, whose
    tensors they fill. Recordings with one ``pool`` share their memory: what one has computed must be copied before
    another runs."""
    gc.collect()  # a recording that is freed while another is made ends that one
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


class GraphedDenoiser(Denoiser):
    """``denoiser`` on a GPU with recorded evaluations; those without a backward pass share the memory of ``pool``.

    A recorded evaluation is differentiable once, and weights that its outputs reach have gradients, perhaps of zero,
    also where a loss takes only some of its outputs.

    Raises ``UserError`` for experts by noise level, among which the host chooses; an evaluation does so if the network
    cannot be recorded.
    """

    def __init__(self, denoiser: Denoiser, pool: Any = None) -> None:
        super().__init__(denoiser.backbone, denoiser.schedule, denoiser.kind, style=denoiser.style)
        self.precision = denoiser.precision
        if any(isinstance(module, Routed) for module in _Evaluation(self).modules()):
            raise UserError("cuda_graphs: true is not for a network of several experts by noise level. Leave it out.")
        self._weights = list(self.backbone.parameters())
        self._pool = pool
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._recordings: dict[tuple[Any, ...], Recording] = {}

    def evaluate(self, x_t: Tensor, times: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        graph = torch.is_grad_enabled()
        through = graph and x_t.requires_grad
        trained = [weight for weight in self._weights if weight.requires_grad] if graph else []
        given = (x_t, times, *condition.values(), *condition.nulls.values())
        key = (through, *map(id, trained), *condition, *condition.nulls, *((tuple(x.shape), x.dtype) for x in given))
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
    """A recorded forward pass, and the backward pass from its outputs to the input (``through``) and to the ``trained``
    weights, if it has a graph to one of them."""

    def __init__(
        self, evaluation: _Evaluation, x_t: Tensor, times: Tensor, condition: Condition, through: bool,
        trained: Sequence[nn.Parameter], pool: Any,
    ) -> None:  # fmt: skip
        device = x_t.device
        x = x_t.detach().clone().requires_grad_(through)
        t = send(times, device).clone()  # on the device the network computes with them by its own kernels
        tensors = {name: value.detach().clone() for name, value in condition.items()}
        nulls = {name: value.detach().clone() for name, value in condition.nulls.items()}
        self._inputs = [x.detach(), t, *tensors.values(), *nulls.values()]
        # A graph that exists may hold the nodes of the weights on another stream: here are others, of the same memory.
        twins = {id(weight): weight.detach().requires_grad_() for weight in trained}
        weights = {name: twins[id(weight)] for name, weight in evaluation.named_parameters() if id(weight) in twins}
        ends = [*([x] if through else []), *twins.values()]
        live: list[Tensor] = []  # the outputs, with their graph

        def forward() -> list[Tensor]:
            torch.clear_autocast_cache()  # what is recorded must cast the weights that it finds
            raw, features = functional_call(evaluation, weights, (x, t, Condition(tensors, nulls)))
            self._names, live[:] = list(features), [raw, *features.values()]
            return [output.detach() for output in live]

        def backward() -> list[Tensor | None]:
            pairs = zip(live, self._slopes, strict=True)
            outputs, slopes = zip(*((y, slope) for y, slope in pairs if y.requires_grad), strict=True)
            with torch.autocast(device.type, enabled=False):  # as where a loss is back-propagated
                return list(torch.autograd.grad(outputs, ends, slopes, allow_unused=True))

        def both() -> None:
            outputs = forward()
            if any(output.requires_grad for output in live):
                self._slopes = [torch.zeros_like(output) for output in outputs]
                backward()

        self._trained, self._through = list(trained), through
        self._number = 0  # of the latest replay with a graph
        self._waiting: Callable[[], _Token | None] = lambda: None
        try:
            warm_up(both, device)
            self._replay, self._outputs = record(forward, device, pool)
            self._differentiable = any(output.requires_grad for output in live)
            if self._differentiable:
                self._replay_backward, self._gradients = record(backward, device)
        except RuntimeError as error:
            raise UserError(
                f"The evaluation of a {type(evaluation.network).__name__} cannot be recorded as a CUDA graph: "
                f"{_first_line(error)}. Set cuda_graphs: false."
            ) from error
        finally:
            torch.clear_autocast_cache()

    def __call__(self, x_t: Tensor, times: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            torch._foreach_copy_(
                self._inputs, [x_t, send(times, x_t.device), *condition.values(), *condition.nulls.values()]
            )
        outputs = _Replay.apply(self, x_t, *self._trained) if self._differentiable else self.forward()
        raw, *features = outputs
        return raw, dict(zip(self._names, features, strict=True))

    @property
    def awaits_backward(self) -> bool:
        """Whether the backward pass of the latest replay is to come: another replay would overwrite what it needs."""
        return self._waiting() is not None

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, ...]:
        """The outputs for the inputs that were copied before."""
        self._replay()
        return tuple(output.clone() for output in self._outputs)

    def expect_backward(self, token: _Token) -> int:
        """No replay until the backward pass that ``token`` belongs to has run or was given up. Returns the number of
        this replay."""
        self._waiting = weakref.ref(token)
        self._number += 1
        return self._number

    @torch.no_grad()
    def backward(self, number: int, slopes: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the input, None without a graph to it, and of the weights, for those of the outputs of the
        replay ``number``. Raises ``UserError`` if there was a later one."""
        if number != self._number:
            raise UserError(
                "A recorded evaluation was back-propagated a second time (retain_graph) after the next one. Set "
                "cuda_graphs: false."
            )
        torch._foreach_copy_(self._slopes, list(slopes))
        self._replay_backward()
        self._waiting = lambda: None
        found = [gradient for gradient in self._gradients if gradient is not None]
        copies = [torch.empty_like(gradient) for gradient in found]
        torch._foreach_copy_(copies, found)
        rest = iter(copies)
        gradients = [None if gradient is None else next(rest) for gradient in self._gradients]
        return gradients if self._through else [None, *gradients]


def _first_line(error: BaseException) -> str:
    """What an error says, or the one before it: an error within a recording ends it, which is another one."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)


class _Token:
    """Lives as long as the graph of one replay."""


class _Replay(torch.autograd.Function):
    """A replay of a recording, differentiable once."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, x_t: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.recording, ctx.token = recording, _Token()
        ctx.number = recording.expect_backward(ctx.token)
        return recording.forward()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError("A recorded evaluation is differentiable once (no create_graph). Set cuda_graphs: false.")
        return (None, *ctx.recording.backward(ctx.number, slopes))
