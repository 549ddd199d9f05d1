"""The CUDA backend: plain torch on an NVIDIA GPU, and a step that a CUDA graph can record.

How far it is verified: it has NOT RUN ON A GPU. Its refusals are tested on machines without one;
`moge-hal conformance --backend cuda --simulate` judges its operations on the CPU, in every dtype;
and that a step neither waits for the GPU nor copies to or from the host is proved on fake CUDA
tensors (profile capture). On a GPU, `moge-hal conformance --backend cuda` judges it for real.
"""

from moge_hal.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
