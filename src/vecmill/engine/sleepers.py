"""Unloaded models whose weights wait in the machine's memory: waking one takes a copy to the card, and reads no file.

Only where a card has memory of its own. Where CPU and GPU share theirs (GB10, Jetson, Apple) and on a CPU, a copy would
take as much as it frees: there a model is unloaded and read again, whose files the kernel may still have.

The copies are ordinary memory, not pinned: torch rounds what it pins up to powers of two and does not give it back, and
pinning gigabytes takes longer than it saves in one copy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vecmill.engine.forward import LoadedModel
from vecmill.hardware.memory import GIGABYTE, MEGABYTE, host_memory, memory_floor
from vecmill.models.networks import move_tensors, tensors_of

logger = logging.getLogger(__name__)

Copies = Mapping[int, Tensor]
"""What is to take the place of tensors on the device, by their `id`."""
Shared = dict[tuple[Path, str], nn.Module]


def has_own_memory(device: torch.device) -> bool:
    """Whether what a device holds takes nothing of the machine's memory."""
    return device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated


@dataclass(slots=True)
class _Sleeper:
    model: LoadedModel
    shared: Shared
    """Its networks that other models would share."""
    own: dict[int, Tensor]
    """Those that are in the machine's memory for it; what a loaded model holds, too, is on the device."""
    size: int = 0
    """Bytes of `own`."""

    def __post_init__(self) -> None:
        self.count()

    def count(self) -> None:
        """After a change of `own`."""
        self.size = sum(tensor.nbytes for tensor in self.own.values())


class Sleepers:
    """The models that sleep, longest first. Its calls must not overlap."""

    def __init__(self, device: torch.device, sleep_gb: float, floor_gb: float | None) -> None:
        """`sleep_gb`: SLEEP_GB; `floor_gb`: MEMORY_FLOOR_GB."""
        self._device, self._floor_gb = device, floor_gb
        self._most = sleep_gb * GIGABYTE if sleep_gb and has_own_memory(device) else 0
        if sleep_gb and not self._most:
            logger.warning(
                "SLEEP_GB=%g does nothing on %s, which has no memory of its own: models are unloaded", sleep_gb, device
            )
        self._asleep: dict[str, _Sleeper] = {}

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of the machine's memory by model. For any thread."""
        return {key: sleeper.size for key, sleeper in list(self._asleep.items())}

    def copied(self, model: LoadedModel, others: Iterable[LoadedModel]) -> Copies | None:
        """What a model holds and the other loaded ones do not, in the machine's memory; None where it has no room.

        Whoever sleeps longest makes room within SLEEP_GB. The model may run meanwhile: nothing is exchanged yet.
        """
        kept = {key for other in others for key in tensors_of(other.model)}
        own = {key: tensor for key, tensor in tensors_of(model.model).items() if key not in kept}
        size = sum(tensor.nbytes for tensor in own.values())
        if size > self._most:
            return None
        while self._asleep and sum(self.sizes.values()) + size > self._most:
            self.forget(next(iter(self._asleep)))
        machine = host_memory()
        if size > machine.available_mb * MEGABYTE - memory_floor(machine.total_mb * MEGABYTE, self._floor_gb):
            logger.info("%s is unloaded: the machine has no memory left in which it could sleep", model.card.id)
            return None
        try:
            return {key: tensor.detach().to("cpu", copy=True) for key, tensor in own.items()}
        except (RuntimeError, MemoryError):
            return None

    def keep(self, model: LoadedModel, copies: Copies, shared: Shared) -> None:
        """Put a model to sleep that is out of the engine: its tensors are exchanged for their copies."""
        held = tensors_of(model.model)
        own = {key: held[key] for key in copies if key in held}
        for key, tensor in own.items():
            tensor.data = copies[key]
        self._asleep[model.key] = _Sleeper(model, shared, own)

    def emptied(self, keys: Iterable[int]) -> None:
        """Tensors of these ids hold nothing any more: forget who would need them."""
        gone = set(keys)
        for name in [name for name, each in self._asleep.items() if gone & tensors_of(each.model.model).keys()]:
            self.forget(name)

    def find(self, key: str, folder: Path, present: Shared) -> LoadedModel | None:
        """A sleeping model, still asleep; None where it does not sleep, or is to be read anew.

        `folder`: where its files are now; `present`: the networks of loaded models, which it would have to share.
        """
        sleeper = self._asleep.get(key)
        if sleeper is None:
            return None
        other = any(present.get(place, network) is not network for place, network in sleeper.shared.items())
        if other or sleeper.model.checkpoint.folder != folder:
            self.forget(key)
            return None
        return sleeper.model

    def size(self, key: str) -> int:
        """Bytes that a sleeping model takes of the device when it wakes."""
        return self._asleep[key].size

    def wake(self, key: str, present: Shared) -> None:
        """Put a model's tensors back on the device, to the bit. Where that fails it sleeps on.

        Raises:
            Exception: the device has no room for it.
        """
        sleeper = self._asleep[key]
        move_tensors(sleeper.model.model, self._device)
        present.update(sleeper.shared)
        del self._asleep[key]
        for other in self._asleep.values():  # what they share is on the device now
            for moved in sleeper.own.keys() & other.own.keys():
                del other.own[moved]
            other.count()

    def forget(self, key: str) -> None:
        """Give back what a model takes while it sleeps, less what others share that sleep on."""
        sleeper = self._asleep.pop(key, None)
        if sleeper is None:
            return
        for other in self._asleep.values():
            both = sleeper.own.keys() & tensors_of(other.model.model).keys()
            other.own |= {each: sleeper.own.pop(each) for each in both}
            other.count()
        for tensor in sleeper.own.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        logger.info("%s sleeps no more: it is read from its files when it is needed", sleeper.model.card.id)
