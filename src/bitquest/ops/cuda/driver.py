"""The CUDA driver through ctypes: load machine code, look kernels up, launch them on torch's current stream.

torch owns the device, its memory and its streams; this module adds what torch has no call for: modules from cubins,
launches with clusters, and tensor maps for the bulk copy engine (TMA). Every return code is checked and named. Nothing
is loaded when this module is imported.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitquest.errors import ConfigError

MAX_THREADS_PER_BLOCK, LOCAL_BYTES, REGISTERS, MAX_DYNAMIC_SHARED_BYTES = 0, 3, 4, 8  # CUfunction_attribute
NON_PORTABLE_CLUSTER_SIZE = 14
_SHARED_BYTES_PER_BLOCK, _SHARED_BYTES_PER_MULTIPROCESSOR, _MULTIPROCESSORS = 97, 81, 16  # CUdevice_attribute
_CLUSTER_DIMENSION, _PROGRAMMATIC_SERIALIZATION = 4, 6  # CUlaunchAttributeID

# CUtensorMapDataType, by torch's names; the engine moves bytes, so packed codes are uint8.
TENSOR_MAP_TYPES = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.int32: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
TENSOR_MAP_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes of the swizzled span -> CUtensorMapSwizzle
TENSOR_MAP_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}  # bytes a miss fetches into L2 -> CUtensorMapL2promotion


class DriverError(ConfigError):
    """A call of the CUDA driver failed, or the driver is not there."""


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an identifier padded to 8 bytes and a union of 64, here seen as 16 words."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class TensorMap(ctypes.Structure):
    """CUtensorMap, 128 opaque bytes: pass it to `Function.launch` as it is, by value (`const __grid_constant__`).

    The driver wants it on a 64-byte boundary, which ctypes does not promise: build it with `Driver.tensor_map`.
    """

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class DeviceLimits(NamedTuple):
    """What a launch rule needs to know of a device; shared memory in bytes."""

    capability: int  # 10·major + minor
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


class Driver:
    """The loaded driver library."""

    def __init__(self, library: Any) -> None:
        """`library` is libcuda as ctypes loads it (tests pass a stand-in with the same functions)."""
        self._library = library

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function that returns a CUresult. Raises DriverError naming function and error."""
        result = self._library[function](*arguments)
        if result:
            raise DriverError(f"{function} failed: {self.describe(result)}")

    def describe(self, result: int) -> str:
        """A CUresult in words: CUDA_ERROR_OUT_OF_MEMORY (out of memory)."""
        parts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            self._library[function](ctypes.c_int(result), ctypes.byref(text))
            parts.append(text.value.decode() if text.value else f"CUDA error {result}")
        return f"{parts[0]} ({parts[1]})"

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Within it, the device is torch's current one, with a context in this thread."""
        with torch.cuda.device(device):
            self.need_context(device)
            yield

    def need_context(self, device: int) -> None:
        """Give this thread the primary context of torch's current device, the one torch uses, if it has none yet."""
        current, primary = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value is None:
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(primary), ctypes.c_int(device))
            self.call("cuCtxSetCurrent", primary)

    def device_attribute(self, attribute: int, device: int) -> int:
        """A CUdevice_attribute of a device."""
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_int(device))
        return value.value

    def limits(self, device: int) -> DeviceLimits:
        """The limits of a device."""
        major, minor = self.device_attribute(75, device), self.device_attribute(76, device)
        return DeviceLimits(
            10 * major + minor,
            self.device_attribute(_MULTIPROCESSORS, device),
            self.device_attribute(_SHARED_BYTES_PER_BLOCK, device),
            self.device_attribute(_SHARED_BYTES_PER_MULTIPROCESSOR, device),
        )

    def load(self, cubin: bytes, device: int) -> "Module":
        """Load machine code on a device. Raises DriverError when it is not for that device's architecture."""
        handle = ctypes.c_void_p()
        with self.on(device):
            self.call("cuModuleLoadData", ctypes.byref(handle), cubin)
        return Module(self, handle, device)

    def tensor_map(
        self,
        tensor: Tensor,
        box: Sequence[int],
        *,
        swizzle: int = 0,
        l2_promotion: int = 0,
        pointer: int | None = None,
    ) -> TensorMap:
        """A TMA descriptor of a tensor of rank 1 to 5 whose last dimension is contiguous.

        `box` is the copied box, in elements, in the tensor's order of dimensions (last one fastest); `swizzle` the
        bytes of the swizzled span (0, 32, 64, 128), `l2_promotion` 0, 64, 128 or 256. Elements outside the tensor
        read as zeros and are not written. Address and row pitches must be multiples of 16 bytes, no side of the box
        above 256. Raises DriverError. `pointer` replaces the tensor's address (tests).
        """
        rank, size = tensor.dim(), tensor.element_size()
        sizes = (ctypes.c_uint64 * rank)(*reversed(tensor.shape))
        pitches = (ctypes.c_uint64 * max(rank - 1, 1))(*(stride * size for stride in reversed(tensor.stride()[:-1])))
        buffer = (ctypes.c_char * (ctypes.sizeof(TensorMap) + 64))()
        made = TensorMap.from_buffer(buffer, -ctypes.addressof(buffer) % 64)
        if tensor.stride(-1) != 1 or len(box) != rank or tensor.dtype not in TENSOR_MAP_TYPES:
            raise DriverError(
                f"no tensor map of {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, box {tuple(box)}"
            )
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.byref(made),
            ctypes.c_int(TENSOR_MAP_TYPES[tensor.dtype]),
            ctypes.c_uint32(rank),
            ctypes.c_void_p(tensor.data_ptr() if pointer is None else pointer),
            sizes,
            pitches,
            (ctypes.c_uint32 * rank)(*reversed(box)),
            (ctypes.c_uint32 * rank)(*([1] * rank)),
            ctypes.c_int(0),
            ctypes.c_int(TENSOR_MAP_SWIZZLES[swizzle]),
            ctypes.c_int(TENSOR_MAP_PROMOTIONS[l2_promotion]),
            ctypes.c_int(0),
        )
        return made


class Module:
    """Machine code on one device. It stays loaded as long as the process: captured graphs may hold its kernels."""

    def __init__(self, driver: Driver, handle: ctypes.c_void_p, device: int) -> None:
        self.driver, self.device, self._handle = driver, device, handle

    def function(self, name: str, *, shared_bytes: int = 0) -> "Function":
        """The kernel `name` (extern "C"), allowed `shared_bytes` of dynamic shared memory a block."""
        handle = ctypes.c_void_p()
        with self.driver.on(self.device):
            self.driver.call("cuModuleGetFunction", ctypes.byref(handle), self._handle, name.encode())
        function = Function(self.driver, handle, name, self.device, shared_bytes)
        if shared_bytes > 48 * 1024:  # more needs to be asked for
            function.set_attribute(MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        return function


class Function:
    """One kernel on one device."""

    def __init__(self, driver: Driver, handle: ctypes.c_void_p, name: str, device: int, shared_bytes: int) -> None:
        self.driver, self.name, self.device, self.shared_bytes = driver, name, device, shared_bytes
        self._handle = handle

    def attribute(self, attribute: int) -> int:
        """A CUfunction_attribute: REGISTERS, LOCAL_BYTES (0 unless registers spill), …"""
        value = ctypes.c_int()
        with self.driver.on(self.device):
            self.driver.call("cuFuncGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), self._handle)
        return value.value

    def set_attribute(self, attribute: int, value: int) -> None:
        """Set a CUfunction_attribute."""
        with self.driver.on(self.device):
            self.driver.call("cuFuncSetAttribute", self._handle, ctypes.c_int(attribute), ctypes.c_int(value))

    def blocks_per_multiprocessor(self, threads: int) -> int:
        """How many blocks of so many threads one multiprocessor holds at a time."""
        count = ctypes.c_int()
        sizes = (ctypes.c_int(threads), ctypes.c_size_t(self.shared_bytes))
        with self.driver.on(self.device):
            self.driver.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(count), self._handle, *sizes)
        return count.value

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        *,
        cluster: tuple[int, int, int] | None = None,
        overlap: bool = False,
    ) -> None:
        """Start the kernel on torch's current stream of the device.

        `arguments` are the kernel's, in its order and exact types: tensors (their address), None (a null pointer),
        ctypes values, TensorMap. Tensors must live on the kernel's device. `cluster` is the shape of a cluster of
        blocks (sm_90 on), `overlap` lets the kernel begin before the one in front has ended (programmatic dependent
        launch: the kernel must wait by griddepcontrol itself). Raises DriverError. Asynchronous, as every launch.
        """
        if torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                self.launch(grid, block, arguments, cluster=cluster, overlap=overlap)
            return
        values = [self._value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        if cluster is None and not overlap:
            sizes = [ctypes.c_uint(size) for size in (*grid, *block, self.shared_bytes)]
            self._start("cuLaunchKernel", self._handle, *sizes, stream, pointers, None)
            return
        attributes = (_LaunchAttribute * 2)()
        count = 0
        if cluster is not None:
            attributes[count].id = _CLUSTER_DIMENSION
            attributes[count].value[:3] = cluster
            count += 1
        if overlap:
            attributes[count].id = _PROGRAMMATIC_SERIALIZATION
            attributes[count].value[0] = 1
            count += 1
        config = _LaunchConfig(grid, block, self.shared_bytes, stream, attributes, count)
        self._start("cuLaunchKernelEx", ctypes.byref(config), self._handle, pointers, None)

    def _start(self, function: str, *arguments: Any) -> None:
        result = self.driver._library[function](*arguments)
        if result == 201:  # CUDA_ERROR_INVALID_CONTEXT: a thread, such as autograd's, that has not used the device yet
            self.driver.need_context(self.device)
            result = self.driver._library[function](*arguments)
        if result:
            raise DriverError(f"launching {self.name} failed: {self.driver.describe(result)}")

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return ctypes.c_void_p(None) if argument is None else argument


@cache
def load_driver() -> Driver:
    """The driver of this machine. Raises DriverError when there is none, or no device that torch can use."""
    if not torch.cuda.is_available():
        raise DriverError("torch finds no CUDA device")
    torch.cuda.init()
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"the CUDA driver (libcuda.so.1) cannot be loaded: {error}") from error
    return Driver(library)
