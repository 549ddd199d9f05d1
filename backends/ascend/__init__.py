"""The Ascend backend, in its smallest real form: the NPU that torch-npu drives, and the default
operations on it.

Verified so far: its probe and its refusals, on machines without an NPU. `moge-hal conformance
--backend ascend` judges it on one.
"""

import importlib
import importlib.util

import torch

from moge_hal.backend import Backend, Probe


class AscendBackend(Backend):
    name = "ascend"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def probe(self) -> Probe:
        if importlib.util.find_spec("torch_npu") is None:
            return Probe(
                False,
                "the package torch-npu is not installed.",
                "on a machine with CANN, `pip install torch-npu`, in torch's own version.",
            )
        try:
            importlib.import_module("torch_npu")  # registers the device type `npu` with torch
            npu = torch.get_device_module("npu")
            count = npu.device_count() if npu.is_available() else 0
        except (ImportError, OSError, RuntimeError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Probe(
                False,
                f"torch-npu cannot start: {first_line}.",
                "source CANN's set_env.sh and match the versions of torch and torch-npu.",
            )
        index = self.index or 0
        if index >= count:
            return Probe(
                False,
                f"there is no npu:{index}, torch-npu finds {count} NPU(s).",
                "check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES.",
            )
        return Probe(True, device=f"npu:{index}, {npu.get_device_name(index)}")

    def device(self) -> torch.device:
        return torch.device("npu", self.index or 0)

    def synchronize(self) -> None:
        torch.get_device_module("npu").synchronize(self.device())
