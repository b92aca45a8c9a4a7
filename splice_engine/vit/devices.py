"""Choice of device and precision, and recognition of a lack of memory."""

import torch

from ..errors import SpliceError
from .precision import bf16_is_faster

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

AMD_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""Beginnings of the names of AMD's architectures that multiply matrices of bf16."""

NO_MEMORY = (
    "out of memory",  # CUDA, HIP, MPS, cudaErrorMemoryAllocation
    "allocate memory",  # the CPU's allocator on Linux and macOS
    "not enough memory",  # on Windows
    "Invalid buffer size",  # MPS, for more than it ever gives
    "_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, hipBLAS
    "rocblas_status_memory_error",
    "miopenStatusAllocFailed",
)
"""What errors of lack of memory say, by allocators and libraries."""


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name, or the fastest of this machine for "auto".

    Args:
        name: "auto", "cpu", "mps", "cuda" or "cuda:0", "cuda:1", …

    Raises:
        SpliceError: No such device in this machine.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():  # CUDA, and ROCm under the same name
        available[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise SpliceError(f"there is no device '{name}' here: choose one of {', '.join(available)}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the ViT's matrix products.

    Args:
        name: "fp32", "bf16", or "auto" for bf16 where the device computes it faster.
        device: Where the ViT computes.

    Raises:
        SpliceError: Unknown name.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if _multiplies_bf16(device) else torch.float32
        return torch.bfloat16 if device.type == "cpu" and bf16_is_faster() else torch.float32
    if name not in DTYPES:
        raise SpliceError(f"unknown precision '{name}': choose auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether a CUDA or ROCm device has units for bf16; the capability of an AMD device is no CUDA capability."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(AMD_BF16)
    return torch.cuda.get_device_capability(device) >= (8, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left; torch has no single class for it.

    oneDNN's "could not create a primitive" means memory: for what it does not support it names a primitive descriptor.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and (
        any(words in message for words in NO_MEMORY) or message == "could not create a primitive"
    )
