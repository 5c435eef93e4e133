"""Moving small inputs to the device without waiting for it."""

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`, ordered before what is asked of the device next.

    On a GPU it goes by pinned memory: out of pageable memory the copy would wait for all that the
    GPU has been given.
    """
    if device.type != "cuda":
        return x
    # Pinning keeps strides, and refuses a tensor that shows some of its memory twice.
    return x.contiguous().pin_memory().to(device, non_blocking=True)
