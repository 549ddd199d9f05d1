"""The device, its probe, and the operations that the specification's own code would not do well."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moge_hal.backend import Backend, Facts, Probe
from moge_hal.backends.cuda.experts import expert_by_expert, slot_by_slot
from moge_hal.ops import up

RECORDED = 6  # times as many tokens as experts: no larger step is worth to be recorded


class CudaBackend(Backend):
    """claims capture for steps of up to `RECORDED` times as many tokens as there are experts."""

    name = "cuda"
    claims = ("core", "train", "capture")

    def probe(self) -> Probe:
        """Makes no CUDA context, which would hold hundreds of megabytes of the GPU; so it names the
        GPU only once something else has made one.

        torch asks the driver, after which a forked process cannot use the GPU; with
        PYTORCH_NVML_BASED_CUDA_CHECK=1 in the environment it asks NVML, and that is harmless too.
        """
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
        known = torch.cuda.is_initialized()
        words = torch.cuda.get_device_name(index) if known else f"one of {count} NVIDIA GPU(s)"
        return Probe(True, device=f"cuda:{index}, {words}")

    def device(self) -> torch.device:
        return torch.device("cuda", self.index or 0)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device())

    def pack(self, role: str, weight: Tensor) -> Any:
        return weight.double() if role == "router_logits.w" else weight  # see `router_logits`

    def why_not(self, facts: Facts) -> str | None:
        if facts.op == "experts" and facts.training:
            return "it computes experts that nobody chose, whose overflow would reach the gradients"
        return None

    def router_logits(self, x: Tensor, w: Any) -> Tensor:
        """In float64 inside, where TF32 does not exist.

        A process may have switched TF32 on for float32 products, by one of several flags of which
        some cannot even be read once they are mixed. It keeps 10 bits of a factor, and then some
        tokens go to other experts. The price is T*E*D products in float64, a few thousandths of a
        layer's; on a GPU for games, whose float64 is slow, some percent of its time.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.double(), w.double())
        return logits.to(up(x).dtype)

    def experts(
        self, x: Tensor, gate_up: Any, down: Any, ids: Tensor, weights: Tensor, first: int = 0
    ) -> Tensor:
        """In one of three ways by the number of tokens, which a graph holds still.

        Slot by slot, the weights of T*K experts are read, copied and read again; expert by expert,
        those of all E are read once, whether somebody chose them or not, and E/K times the products
        are computed. With many tokens these products cost more than the specification's E waits
        (by a rough count from T = 350 on, for 64 experts on an H100), and nobody records a prefill.
        """
        experts = len(gate_up)
        if 3 * ids.numel() <= experts:
            return slot_by_slot(x, gate_up, down, ids, weights, first)
        if len(x) <= RECORDED * experts:
            return expert_by_expert(x, gate_up, down, ids, weights, first, self.swiglu_ffn)
        return super().experts(x, gate_up, down, ids, weights, first)
