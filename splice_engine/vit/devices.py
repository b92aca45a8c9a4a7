"""Choice of device and precision, and recognition of a lack of memory."""

import torch

from ..errors import SpliceError
from .precision import bf16_is_faster

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
        return torch.bfloat16 if device.type == "cpu" and bf16_is_faster() else torch.float32
    if name not in DTYPES:
        raise SpliceError(f"unknown precision '{name}': choose auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left; torch has no single class for it.

    oneDNN's "could not create a primitive" means memory: for what it does not support it names a primitive descriptor.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in message or "out of memory" in message or message == "could not create a primitive"
    )
