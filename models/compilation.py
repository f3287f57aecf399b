"""Compilation of a network's repeated blocks, one by one, by ``torch.compile``.

The blocks of a kind share their compiled graphs, and so do the networks of all roles: one graph each for evaluations
with a graph to the weights, to the input and to nothing, and one for each set of active adapters, for any batch. What
is between the blocks stays eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models.adapters import AdapterView
from fewstep.models.backbone import Backbone

GRAPHS = 32  # of one kind of block; by default torch gives up after 8, which adapters of three roles exceed


def compile_blocks(backbone: nn.Module, backend: str = "inductor") -> None:
    """Compiles the ``repeated_blocks`` of a network in place, on their first calls. Copies are not compiled.

    Raises ``UserError`` if the network has none.
    """
    network = backbone.shared_network if isinstance(backbone, AdapterView) else backbone
    names = network.repeated_blocks if isinstance(network, Backbone) else ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(f"compile: true has no effect on a {type(network).__name__}, which names no repeated_blocks.")
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for block in blocks:
        if block._compiled_call_impl is None:  # a network that adapters share is given once for each role
            block._compiled_call_impl = _sizes_are_constant(torch.compile(block._call_impl, backend=backend))


def _sizes_are_constant(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, called with tensors of which only the first axis may have other sizes in the same graph.

    Blocks of one kind at several resolutions would otherwise share graphs of any height and width, at which torch 2.13
    fails to order the strides of a convolution's input.
    """

    def call(*args: Any, **options: Any) -> Any:
        for x in (*args, *options.values()):
            if isinstance(x, Tensor):
                torch._dynamo.mark_static(x, list(range(1, x.ndim)))
        return compiled(*args, **options)

    return call


@contextmanager
def compiling() -> Iterator[None]:
    """Inside this context, a failure of torch's compiler is a ``UserError``."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"torch {torch.__version__} could not compile a block of the network ({reason}). Set compile=false."
        ) from error


def graphs() -> int:
    """The number of graphs that were compiled in this process."""
    import torch._dynamo.utils

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
