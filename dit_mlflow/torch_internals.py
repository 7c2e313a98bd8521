"""Undocumented names of torch, each used here and nowhere else.

All exist in torch 2.6.0, 2.13.0, 2.14.1 and 2.15.0. ``tests/test_torch_internals.py`` fails when one goes; users then
meet an ``AttributeError`` unless it says otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

version: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was changed in place (``Tensor._version``); publicly, only a comparison of values tells."""

COMPILED_MODULE = "_orig_mod"
"""Where the wrapper of ``torch.compile`` keeps its module (importing the wrapper's class would load the compiler). If
it goes, the compiled module is taken for the model, and refused for its parameters' names or its second derivative."""

_COMPILED_FUNCTION = "_torchdynamo_orig_callable"

MISSING_DERIVATIVE = ("derivative for", "differentiate twice", "double backward")
"""Every error that torch raises for want of a second derivative has one of these in its message. If torch words it
otherwise, users see its error in place of ours."""

GRAPH_IS_GONE = "through the graph a second time"
"""In the message of a backward pass over a graph that was freed. If torch words it otherwise, users see its error."""

REFUSING_NODE = "torch::autograd::Error"
"""Name of the node that stands in a graph where ``once_differentiable`` cut it: ``torch.autograd.grad`` with
``allow_unused`` stops before it, and gives zeros where it should raise."""


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that ``torch.compile`` was given, if it made ``function`` (``_torchdynamo_orig_callable``).

    If the name goes, the function stays compiled, and its second derivative is refused.
    """
    found = getattr(function, _COMPILED_FUNCTION, None)
    # A method of torch's own modules comes in one more wrapper.
    inner = getattr(found, "__wrapped__", None)
    return inner if inspect.ismethod(inner) else found


def make_fx(function: Callable[..., Any], values: bool = True) -> Callable[..., fx.GraphModule]:
    """``torch.fx.experimental.proxy_tensor.make_fx``: what ``function`` runs below autograd, as a graph.

    ``torch.export`` refuses functions that take gradients, and Dynamo breaks the graph there.

    Args:
        values: ``False`` = tensors have a shape and a dtype only, so that no value becomes a constant: ``.numpy()`` and
            a branch on ``.item()`` raise, a length that a mask gives is a symbol. Tensors from elsewhere are constants.
    """
    # 0.3 s that only a trace needs.
    from torch.fx.experimental import proxy_tensor

    mode: dict[str, Any] = {} if values else {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    made: Callable[..., fx.GraphModule] = proxy_tensor.make_fx(function, **mode)
    return made


def reading_values(
    factor: float = 1.0,
    spared: Callable[[Tensor], bool] = lambda value: False,
    told: Callable[[Tensor], Any] = lambda value: None,
) -> AbstractContextManager[Any]:
    """A context, inside :func:`make_fx`, in which ``.item()`` gives the value of a tensor that is traced.

    Floating values are multiplied by ``factor``, but for those of ``spared`` tensors. ``told`` is called with each that
    is not spared, also with truth values.

    The operation is ``aten._local_scalar_dense``; a mode (``torch.utils._python_dispatch.TorchDispatchMode``) sees it
    before the tracer, which would refuse it. If either goes, so does the tracing of losses that read values.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    read = torch.ops.aten._local_scalar_dense.default

    class Reading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not read:
                return func(*args, **(kwargs or {}))
            value = args[0].detach()
            found = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy().item()
            if spared(value):
                return found
            told(value)
            return found * factor if factor != 1 and isinstance(found, float) else found

    mode: AbstractContextManager[Any] = Reading()
    return mode


def making(told: Callable[[int], object]) -> AbstractContextManager[Any]:
    """Inside it, ``told`` is called with the bytes of each tensor that an operation makes; views make none.

    The mode (``torch.utils._python_dispatch.TorchDispatchMode``) stands below autograd and ``torch.func``; a public
    ``TorchFunctionMode`` sees neither what backward passes make, nor which results are views.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Making(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if not func.is_view:
                for part in found if isinstance(found, (tuple, list)) else (found,):
                    if isinstance(part, Tensor):
                        told(part.nbytes)
            return found

    mode: AbstractContextManager[Any] = Making()
    return mode


def widening(dtype: torch.dtype, told: Callable[[torch.dtype], Any]) -> AbstractContextManager[Any]:
    """A context, also inside :func:`make_fx`, in which what would be made in bfloat16 or float16 has ``dtype``.

    ``told`` is called with the dtype that was asked for. The mode is that of :func:`reading_values`.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if (asked := kwargs.get("dtype")) in (torch.bfloat16, torch.float16):
                told(asked)
                kwargs["dtype"] = dtype
            return func(*args, **kwargs)

    mode: AbstractContextManager[Any] = Widening()
    return mode


def tensor_slots(module: nn.Module, kind: Literal["parameters", "buffers", "modules"]) -> dict[str, Any]:
    """The dictionary in which a module looks for its tensors (``Module._parameters``, ``_buffers``) or its modules
    (``_modules``); some are ``None``.

    ``setattr`` takes no plain tensor in place of a parameter, and ``torch.func.functional_call`` loses a buffer that
    the model assigns anew.
    """
    found: dict[str, Any] = getattr(module, f"_{kind}")
    return found


def forward_pre_hooks(module: nn.Module) -> Iterable[Callable[..., Any]]:
    """``Module._forward_pre_hooks``: the old ``torch.nn.utils.weight_norm`` is known by its hook alone."""
    return module._forward_pre_hooks.values()


def weight_norm_kernel() -> Callable[..., Tensor]:
    """``torch._weight_norm``, which ``torch.nn.utils.parametrizations.weight_norm`` calls, to be replaced."""
    return torch._weight_norm


def sampling_kernels() -> set[Callable[..., Tensor]]:
    """``torch._standard_gamma`` and ``_sample_dirichlet``, by which the distributions of those names draw."""
    return {torch._standard_gamma, torch._sample_dirichlet}


def set_sampler(loader: DataLoader[Any], name: Literal["sampler", "batch_sampler"], sampler: Any) -> None:
    """Give a loader another sampler, which ``DataLoader.__setattr__`` refuses.

    ``DataLoader._iterator``, the iterator of persistent workers, is reset, since it holds the former sampler. If that
    name goes, the new sampler is not asked, and the first batch is refused.
    """
    vars(loader).update({name: sampler, "_iterator": None})


def exchange_sampler(loader: DataLoader[Any], name: Literal["sampler", "batch_sampler"], sampler: Any) -> None:
    """The same, and the iterator that there is goes on with the sampler that it has."""
    vars(loader)[name] = sampler


def has_gradient_hook(parameter: Tensor) -> bool:
    """Whether something may change the parameter's gradient (``Tensor.register_hook`` and the one after accumulation).

    If ``_backward_hooks`` or ``_post_accumulate_grad_hooks`` goes, such a hook is not warned of.
    """
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return any(bool(getattr(parameter, name, None)) for name in names)


def found_infinite(optimizer: Optimizer) -> bool:
    """Whether a ``GradScaler`` has told a fused optimizer of infinite gradients, so that its step will do nothing.

    It sets the attribute ``found_inf``. If that goes, such a step is recorded, and its replay differs.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
