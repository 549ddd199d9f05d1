"""The CUDA backend, in its smallest real form: the device, and the default operations in plain
torch on it.

Verified so far: its probe and its refusals, on machines without a GPU. `moge-hal conformance
--backend cuda` judges it on one.
"""

import torch

from moge_hal.backend import Backend, Probe


class CudaBackend(Backend):
    name = "cuda"

    def probe(self) -> Probe:
        if torch.version.cuda is None:
            return Probe(
                False,
                f"this build of torch ({torch.__version__}) has no CUDA.",
                "install a CUDA build of torch.",
            )
        if not torch.cuda.is_available():
            return Probe(
                False,
                "torch finds no usable NVIDIA GPU.",
                "check `nvidia-smi` and CUDA_VISIBLE_DEVICES.",
            )
        index, count = self.index or 0, torch.cuda.device_count()
        if index >= count:
            fix = f"name one of cuda:0 .. cuda:{count - 1}."
            return Probe(False, f"there is no cuda:{index}, only {count} GPU(s).", fix)
        return Probe(True, device=f"cuda:{index}, {torch.cuda.get_device_name(index)}")

    def device(self) -> torch.device:
        return torch.device("cuda", self.index or 0)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device())
