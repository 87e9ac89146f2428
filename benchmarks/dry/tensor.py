"""Tensors of a GPU that is not there: on device ``cuda``, with shapes and integers, and no other values.

Integers and booleans of a `Hollow` tensor have values where they were made of values alone (labels, indices,
offsets, masks), so that sizes which hang on them are right; floating-point numbers have none, whatever made
them, and take no memory. Where a value is asked for that is not there, one is made up (1, 0 or True), and
counted in ``HollowMode.made_up``.

To torch's C++ a `Hollow` tensor is one of a CPU, so that autograd and autocast need no CUDA in the build;
what Python sees of it says ``cuda``. Operators run in `HollowMode`: on meta tensors, or on values where all
are there. One that mixes a CPU's tensor with a GPU's raises, as CUDA does, and so does one that waits for the
device where that is forbidden.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

CUDA = torch.device("cuda", 0)
# Integers beyond this many are shapes alone, as floating-point numbers are.
MOST_VALUES = 1 << 22
ROUNDING = 512  # bytes, to which torch's allocator rounds
# What may take a CPU's tensor beside a GPU's; numbers, of no dimension, all may.
MIXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "copy_")
BY_INDEX = MIXING[:-1]
# Of what is no view, what runs nothing on a GPU.
NO_LAUNCH = ("empty", "new_empty", "_unsafe_view", "lift", "resize_")
# What a product takes to be summed in another dtype than its operands'.
OUT_DTYPE = "out_dtype"
# Made-up booleans are True, but for these and for what differs from itself.
MADE_UP_FALSE = ("any", "isnan", "isinf")

to_any = Tensor.to  # torch's own, which `benchmarks.dry.device` replaces


class Block:
    """Memory that tensors share; its bytes are given back with the last of them."""

    def __init__(self, mode: HollowMode, size: int, address: int) -> None:
        self.mode, self.size, self.address = mode, size, address
        mode.allocated += size
        mode.peak = max(mode.peak, mode.allocated)

    def __del__(self) -> None:
        self.mode.allocated -= self.size


class Hollow(Tensor):
    """A tensor on the GPU: ``inner`` is one of ``meta``, or of the CPU with its values.

    ``is_known``: no value of it was made up.
    """

    inner: Tensor
    block: Block
    is_known: bool

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, block: Block, is_known: bool) -> Hollow:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="cpu",
        )  # fmt: skip
        made.inner, made.block, made.is_known = inner, block, is_known
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: on a tensor of a dry run that is over")

    # What C++ would answer with a CPU.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Hollow) -> None:
        if other.shape != self.shape or other.dtype != self.dtype:
            raise NotImplementedError(f"data: of a dry run's tensor {self}, got {other}")
        self.inner, self.block, self.is_known = other.inner, other.block, other.is_known

    def data_ptr(self) -> int:
        """Aligned as torch aligns it; equal for tensors that begin at the same place."""
        return self.block.address + self.storage_offset() * self.element_size()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def set_(self, storage: Any, *shape: Any) -> Tensor:
        """A tensor over a storage: another one, because a wrapper's shape stands."""
        made = torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, *shape)
        return current().wrap(made, is_known=not made.is_meta)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": CUDA, **options})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __repr__(self, **options: Any) -> str:
        return f"Hollow({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = self.detach().clone().requires_grad_(self.requires_grad)
        made.__dict__ |= {name: value for name, value in self.__dict__.items() if name not in made.__dict__}
        memo[id(self)] = made
        return made


class HollowMode(TorchDispatchMode):
    """Runs operators on hollow tensors; counts what they allocate, and what is made up.

    Args:
        total_memory: bytes; more at a time raise `torch.OutOfMemoryError`.

    ``launched`` has the names of what a GPU would have run, as long as it is a list.
    """

    # Torch then looks for no CUDA of its own where a device is named.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self, total_memory: int) -> None:
        super().__init__()
        self.limit = total_memory
        self.allocated = self.peak = self.made_up = 0
        self.forbids_waiting = False
        self.launched: list[str] | None = None
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
        self._next_address = 1 << 40

    def __enter__(self) -> HollowMode:
        _modes.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        _modes.pop()
        super().__exit__(*exc)

    def wrap(self, inner: Tensor, is_known: bool = True) -> Hollow:
        """
        Raises:
            torch.OutOfMemoryError: its memory is new, and more than is left.
        """
        storage = inner.untyped_storage()
        block = self._blocks.get(storage._cdata)
        if block is None:
            size = -(-storage.nbytes() // ROUNDING) * ROUNDING
            if self.allocated + size > self.limit:
                left = f"{self.limit - self.allocated} of {self.limit} are free"
                raise torch.OutOfMemoryError(f"CUDA out of memory: tried to allocate {size} bytes, {left}")
            block = self._blocks[storage._cdata] = Block(self, size, self._next_address)
            self._next_address += size + ROUNDING
        return Hollow(inner, block, is_known)

    def wait(self, what: str) -> None:
        """
        Raises:
            RuntimeError: waiting for the device is forbidden.
        """
        if self.forbids_waiting:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def launch(self, name: str) -> None:
        if self.launched is not None:
            self.launched.append(name)

    def to_gpu(self, tensor: Tensor, non_blocking: bool) -> Hollow:
        if not non_blocking:
            self.wait("a copy from the host")
        if has_values(tensor):
            return self.wrap(tensor.clone())
        return self.wrap(to_any(tensor, "meta"), is_known=False)

    def to_host(self, tensor: Hollow) -> Tensor:
        self.wait("a copy to the host")
        self.made_up += not tensor.is_known
        if tensor.inner.is_meta:
            return torch.ones(tensor.shape, dtype=tensor.dtype)
        return tensor.inner.clone()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Hollow)]
        if not given and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            return func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        if namespace not in ("aten", "prims", "prim"):
            with self:  # the body of an op that is registered from Python
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if name == "empty_like" and (kwargs.get("device") or CUDA).type == "cpu":  # perhaps pinned
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if (special := SPECIAL.get(name)) is not None:
            return special(self, *args, **kwargs)
        if not (func.is_view or name.startswith(NO_LAUNCH)):
            self.launch(name)
        if name in BY_INDEX:
            leaves, spec = tree_flatten((self._without_masks(args), kwargs))
            given = [leaf for leaf in leaves if isinstance(leaf, Hollow)]
        elif given:
            _check_devices(func, leaves)
        return self._run(func, name, leaves, spec, given)

    def _run(self, func: Any, name: str, leaves: list[Any], spec: Any, given: list[Hollow]) -> Any:
        is_valued = not any(leaf.inner.is_meta for leaf in given)
        hangs_on_values = torch.Tag.dynamic_output_shape in func.tags and name not in BY_INDEX
        if is_valued and not (func._schema.is_mutable or func.is_view or hangs_on_values):
            # A comparison of all labels with all of a vocabulary would have values by the billion.
            is_valued = all(has_values(result) for result in _tensors(_call(func, leaves, spec, "meta")))
        if hangs_on_values and not is_valued:
            self.made_up += 1
            one = [self._one_element(leaf) for leaf in leaves]
            return tree_map(lambda leaf: self.wrap(leaf, is_known=False), _call(func, one, spec, "cpu"))
        result = _call(func, leaves, spec, "cpu" if is_valued else "meta")
        if func._schema.is_mutable:
            written = _written(func, leaves, spec)
            for leaf in written:
                leaf.is_known = is_valued and all(leaf.is_known for leaf in given)
            if len(written) == 1 and isinstance(result, Tensor):
                return written[0]
            return written if isinstance(result, (tuple, list)) else result
        is_known = is_valued and all(leaf.is_known for leaf in given)

        def wrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.is_meta and has_values(leaf) and not func.is_view:
                is_itself = name == "ne" and len(given) == 2 and given[0] is given[1]
                value = leaf.dtype == torch.bool and name not in MADE_UP_FALSE and not is_itself
                leaf = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).fill_(value)
            return self.wrap(leaf, is_known)

        return tree_map(wrapped, result)

    def _one_element(self, leaf: Any) -> Any:
        """In the place of a tensor without values, for an operator whose result's shape hangs on them."""
        if not isinstance(leaf, Hollow) or not leaf.inner.is_meta:
            return leaf
        return self.wrap(torch.ones((1,) * leaf.dim(), dtype=leaf.dtype), is_known=False)

    def _without_masks(self, args: Any) -> Any:
        """Positions in the place of masks, whose number hangs on values."""
        index: list[Any] = []
        for leaf in args[1]:
            if isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8):
                found = self._nonzero(leaf if isinstance(leaf, Hollow) else self.wrap(leaf))
                index += [self.wrap(part, found.is_known) for part in found.inner.unbind(1)]
            else:
                index.append(leaf)
        return (args[0], index, *args[2:])

    def _nonzero(self, tensor: Hollow) -> Hollow:
        self.wait("nonzero, or an index that is a mask")
        self.made_up += not tensor.is_known
        mask = torch.ones(tensor.shape, dtype=torch.bool) if tensor.inner.is_meta else tensor.inner
        return self.wrap(mask.nonzero(), tensor.is_known)

    def _number(self, tensor: Hollow) -> Any:
        self.wait("reading a number")
        self.made_up += not tensor.is_known
        return torch.ones((), dtype=tensor.dtype).item() if tensor.inner.is_meta else tensor.inner.item()

    def _equal(self, left: Hollow, right: Hollow) -> bool:
        self.wait("torch.equal")
        self.made_up += not (left.is_known and right.is_known)
        if left.inner.is_meta or right.inner.is_meta:
            return left.shape == right.shape
        return torch.equal(left.inner, right.inner)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not isinstance(target, Hollow):
            assert isinstance(source, Hollow)
            return target.copy_(self.to_host(source))
        inner, is_known = source, True
        if isinstance(source, Hollow):
            inner, is_known = source.inner, source.is_known
            self.launch("copy_")
        elif not non_blocking and source.dim():
            self.wait("a copy from the host")
        target.is_known = is_known and not target.inner.is_meta and not inner.is_meta
        if target.is_known:
            target.inner.copy_(inner)
        else:
            torch.empty(target.shape, device="meta").copy_(torch.empty(source.shape, device="meta"))
        return target


_modes: list[HollowMode] = []
# Operators that leave the device, or whose result's shape hangs on values.
SPECIAL = {
    "_local_scalar_dense": HollowMode._number,
    "equal": HollowMode._equal,
    "nonzero": HollowMode._nonzero,
    "copy_": HollowMode._copy,
}


def current() -> HollowMode:
    """The mode that is on."""
    return _modes[-1]


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor of this shape and dtype is kept with its values."""
    is_whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    return is_whole and tensor.numel() <= MOST_VALUES


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _call(func: Any, leaves: list[Any], spec: Any, device: str) -> Any:
    """The operator on the inner tensors, all of one device."""

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device(device)
        if isinstance(leaf, Hollow):
            leaf = leaf.inner
        if device == "meta" and isinstance(leaf, torch.Generator):
            return None
        return to_any(leaf, "meta") if device == "meta" and isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_unflatten([plain(leaf) for leaf in leaves], spec)
    names = [argument.name for argument in func._schema.arguments]
    if device == "meta" and OUT_DTYPE in names:  # not all of them have a shape on meta in torch 2.11
        dtype = args[names.index(OUT_DTYPE)]
        func = getattr(func.overloadpacket, "out" if "out" in kwargs else "default")
        args = [to_any(arg, dtype) for arg in args if isinstance(arg, Tensor)]
    return func(*args, **kwargs)


def _written(func: Any, leaves: list[Any], spec: Any) -> list[Hollow]:
    """Arguments that the operator writes to."""
    args, kwargs = tree_unflatten(leaves, spec)
    values = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [
        leaf for leaf in itertools.chain.from_iterable(map(tree_leaves, values)) if isinstance(leaf, Hollow)
    ]


def _check_devices(func: Any, leaves: list[Any]) -> None:
    """
    Raises:
        RuntimeError: a tensor of the CPU beside one of the GPU.
    """
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, Hollow) and leaf.dim():
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"{leaf.device}! ({func})"
            )
