"""Devices, their precision, and lack of memory."""

from types import SimpleNamespace

import pytest
import torch

from splice_engine.vit.devices import is_out_of_memory, pick_dtype


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("HIP error: out of memory"), True),
        (RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB, max allowed: 9.07 GB)"), True),
        (RuntimeError("Invalid buffer size: 12.50 GB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_lack_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("hip", "name", "capability", "expected"),
    [
        (None, "", (8, 6), torch.bfloat16),
        (None, "", (7, 5), torch.float32),
        ("6.2", "gfx1030", (10, 3), torch.float32),
        ("6.2", "gfx906:sramecc+", (9, 0), torch.float32),
        ("6.2", "gfx90a:sramecc+:xnack-", (9, 0), torch.bfloat16),
        ("6.2", "gfx1100", (11, 0), torch.bfloat16),
    ],
)
def test_bf16_is_picked_where_a_gpu_multiplies_it(hip, name, capability, expected, monkeypatch):
    """What torch says of GPUs that are not here: AMD's numbers are no CUDA capabilities."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(gcnArchName=name))
    assert pick_dtype("auto", torch.device("cuda")) == expected
