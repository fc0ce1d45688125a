"""An operator called without torch.library's dispatch, whose Python costs more than a short sequence's kernels.

On a CPU, too: the first dispatch imports PyTorch's compiler, for two seconds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def direct(op: Callable, forward: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """op(*inputs), inputs[0] a tensor, that skips the dispatcher if nobody listens: no compiler, no mode.

    forward, setup_context and backward are what op does, as torch.library takes them.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return backward(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        x = inputs[0]
        if torch.compiler.is_compiling() or type(x) not in _PLAIN or x.is_meta or is_in_torch_dispatch_mode():
            return op(*inputs)
        return Direct.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)

    return call
