"""The driver's calls, recorded by a stand-in: no GPU is needed."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bitquest.ops.cuda import driver
from bitquest.ops.cuda.driver import Driver, DriverError, TensorMap


class Library:
    """libcuda without a device: notes every call; functions named in `failing` return that error once.

    Arguments of a kernel are read as `kernel_types` while the launch lasts, into `kernel_values`.
    """

    def __init__(self):
        self.calls, self.failing, self.kernel_types, self.kernel_values = [], {}, (), []

    def __getitem__(self, name):
        def function(*arguments):
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_TEST"
            elif name == "cuGetErrorString":
                arguments[1]._obj.value = b"in the test"
            else:
                self.calls.append((name, arguments))
                if name == "cuLaunchKernel":
                    addresses = zip(self.kernel_types, arguments[9], strict=True)
                    self.kernel_values = [made.from_address(address).value for made, address in addresses]
                handles = {"cuModuleLoadData": 11, "cuModuleGetFunction": 12, "cuDevicePrimaryCtxRetain": 13}
                if name in handles:
                    arguments[0]._obj.value = handles[name]
                elif name in ("cuFuncGetAttribute", "cuDeviceGetAttribute"):
                    arguments[0]._obj.value = 100 + arguments[1].value
            return self.failing.pop(name, 0)

        return function

    def names(self):
        return [name for name, _ in self.calls]


class Visited(list):
    """In the place of torch.cuda.device: notes which devices were made current, and left again."""

    def __call__(self, device):
        self.append(device)
        return nullcontext()


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", visited := Visited())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0xABC))
    made = Library()
    made.visited = visited
    return made


@pytest.fixture
def function(library):
    return Driver(library).load(b"\x7fELF", 3).function("kernel", shared_bytes=100_000)


def test_the_structures_are_those_of_cuda_h():
    config, attribute = driver._LaunchConfig, driver._LaunchAttribute
    assert ctypes.sizeof(config) == 56
    assert (config.stream.offset, config.attributes.offset, config.attribute_count.offset) == (32, 40, 48)
    assert (ctypes.sizeof(attribute), attribute.value.offset) == (72, 8)
    assert ctypes.sizeof(TensorMap) == 128


def test_a_module_is_loaded_in_the_context_of_torch(library, function):
    context = ["cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    work = ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute")
    assert library.names() == [name for call in work for name in (*context, call)]
    assert library.visited == [3, 3, 3]
    assert [argument.value for argument in library.calls[-1][1]] == [12, driver.MAX_DYNAMIC_SHARED_BYTES, 100_000]
    assert function.attribute(driver.REGISTERS) == 104


def test_a_launch_passes_addresses_and_values_on_the_current_stream(library, function):
    tensor = torch.arange(4)
    library.kernel_types = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    function.launch((5, 6, 7), (32, 1, 1), (tensor, None, ctypes.c_int(9), ctypes.c_int64(-1)))
    name, arguments = library.calls[-1]
    assert name == "cuLaunchKernel"
    assert arguments[0].value == 12
    assert [argument.value for argument in arguments[1:9]] == [5, 6, 7, 32, 1, 1, 100_000, 0xABC]
    assert library.kernel_values == [tensor.data_ptr(), None, 9, -1]


def test_a_launch_on_another_device_visits_it(library, function, monkeypatch):
    library.visited.clear()
    devices = iter((0, 3))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: next(devices))
    function.launch((1, 1, 1), (32, 1, 1), ())
    assert library.visited == [3]
    assert library.names()[-1] == "cuLaunchKernel"


def test_clusters_and_overlap_are_attributes(library, function):
    function.launch((4, 1, 1), (128, 1, 1), (), cluster=(2, 1, 1), overlap=True)
    name, arguments = library.calls[-1]
    assert name == "cuLaunchKernelEx"
    config = arguments[0]._obj
    assert (list(config.grid), list(config.block)) == ([4, 1, 1], [128, 1, 1])
    assert (config.shared_bytes, config.stream, config.attribute_count) == (100_000, 0xABC, 2)
    assert (config.attributes[0].id, list(config.attributes[0].value[:3])) == (4, [2, 1, 1])
    assert (config.attributes[1].id, config.attributes[1].value[0]) == (6, 1)


def test_a_thread_without_a_context_gets_one_and_launches(library, function):
    library.failing["cuLaunchKernel"] = 201
    library.calls.clear()
    function.launch((1, 1, 1), (32, 1, 1), ())
    assert library.names()[0] == library.names()[-1] == "cuLaunchKernel"
    assert "cuCtxSetCurrent" in library.names()


def test_errors_name_the_call_and_the_error(library, function):
    library.failing["cuLaunchKernel"] = 1
    with pytest.raises(DriverError, match=r"launching kernel failed: CUDA_ERROR_TEST \(in the test\)"):
        function.launch((1, 1, 1), (32, 1, 1), ())
    library.failing["cuModuleLoadData"] = 209
    with pytest.raises(DriverError, match="cuModuleLoadData failed: CUDA_ERROR_TEST"):
        Driver(library).load(b"", 3)


def test_a_tensor_map_counts_from_the_fastest_dimension(library):
    tensor = torch.empty(6, 64, dtype=torch.uint8)[:, :48]
    made = Driver(library).tensor_map(tensor, (4, 32), swizzle=128, l2_promotion=256)
    assert ctypes.addressof(made) % 64 == 0
    name, arguments = library.calls[-1]
    assert name == "cuTensorMapEncodeTiled"
    assert (arguments[1].value, arguments[2].value, arguments[3].value) == (0, 2, tensor.data_ptr())
    assert [list(array) for array in arguments[4:8]] == [[48, 6], [64], [32, 4], [1, 1]]
    assert [argument.value for argument in arguments[8:]] == [0, 3, 3, 0]


def test_a_tensor_map_of_strided_elements_is_refused(library):
    with pytest.raises(DriverError, match=r"no tensor map of torch\.uint8"):
        Driver(library).tensor_map(torch.empty(6, 64, dtype=torch.uint8).t(), (4, 32))


def test_limits_are_read_from_the_device(library):
    assert Driver(library).limits(0) == (10 * 175 + 176, 116, 197, 181)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_device_there_is_no_driver():
    with pytest.raises(DriverError, match="no CUDA device"):
        driver.load_driver()
