"""One run: where it takes place, case after case, and what is kept if it is interrupted."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from ..autotune.card import Card
from ..autotune.devices import find_device
from ..verify.provenance import commit, versions
from .attention import attention_rows
from .lab import Lab
from .plan import DECODE, Case
from .record import Ceilings, Header, Record
from .steps import decode_rows
from .timing import measured_ceilings


def header(command: str, dtype: torch.dtype, card: Card | None) -> Header:
    """Where the figures come from; measures the ceilings of the GPU at hand."""
    name = torch.cuda.get_device_name()
    try:
        known = find_device(name)
        stated = {"vendor_tflops": known.tensor_tflops, "vendor_tbps": known.hbm_gbps / 1e3}
        if dtype == torch.float32:
            stated["vendor_tflops"] = known.fp32_tflops
    except LookupError:
        stated = {}
    tflops, tbps = measured_ceilings(dtype)
    cudnn = torch.backends.cudnn.version()
    return Header(
        device=name,
        versions=versions() | {"cudnn": str(cudnn or "")},
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        card={} if card is None else {**asdict(card.setting()), **asdict(card.state())},
        ceilings=Ceilings(tflops=tflops, tbps=tbps, **stated),
    )


@dataclass
class Session:
    """Measures the cases in order; `keep` gets the record whenever a row was added, incomplete up to the last."""

    header: Header
    cases: Sequence[Case]
    lab: Lab
    keep: Callable[[Record], None]

    def run(self) -> Record:
        """The record, not complete after Ctrl-C."""
        left = list(self.cases)
        try:
            while left:
                rows = decode_rows if DECODE in left[0].whats else attention_rows
                for _ in rows(left[0], self.lab):
                    self.keep(self._record(left))
                left.pop(0)
        except KeyboardInterrupt:
            self.lab.say("interrupted")
        finally:
            self.lab.gate.close()
        record = self._record(left)
        self.keep(record)
        return record

    def _record(self, left: Sequence[Case]) -> Record:
        return Record(header=self.header, rows=tuple(self.lab.rows), complete=not left, missing=tuple(map(str, left)))
