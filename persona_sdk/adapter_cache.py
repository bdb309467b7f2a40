"""Adapters that are in use: of each a shell stays in memory, while the weights come and go.

A shell is the adapter with `LazyBundle` in place of its tensors: it knows its configuration and digest,
so it can contribute to a plan without its weights. They are read when somebody asks for them, which the
engine does only if none of its tiers has them. So ten thousand personas cost shells, not weights.
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from persona_sdk.adapters import Adapter
from persona_sdk.memory import MemCube
from persona_sdk.tensors import Digest, LazyBundle, TensorBundle, present, size_bytes

_WEIGHT_BYTES = 256 * 2**20
_SHELLS = 65_536


class PlanTensors(Mapping[Digest, TensorBundle]):
    """The tensors of a plan; what is lazy among them is read when it is taken, as one bundle."""

    def __init__(self, tensors: Mapping[Digest, TensorBundle]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: Digest) -> TensorBundle:
        return present(self._tensors[key])

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[Digest]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class AdapterCache:
    """Shells of adapters by cube, and the weights of those used last.

    Args:
        read: reads a whole adapter from the store.
    """

    def __init__(self, read: Callable[[MemCube], Adapter]) -> None:
        self._read = read
        self._shells: OrderedDict[str, Adapter] = OrderedDict()
        self._weights: OrderedDict[str, TensorBundle] = OrderedDict()
        self._bytes = 0
        self._cleared = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shells)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory."""
        return self._bytes

    def get(self, cube: MemCube) -> Adapter:
        """The adapter of a cube, as a shell.

        Raises:
            CorruptBlobError: its stored weights are damaged.
        """
        with self._lock:
            cleared = self._cleared
            if cube.id in self._shells:
                self._shells.move_to_end(cube.id)
                return self._shells[cube.id]
        whole = self._read(cube)  # outside the lock: others need not wait for the disk
        shell = copy.copy(whole)
        shell.__dict__["digest"] = whole.digest
        object.__setattr__(shell, "tensors", LazyBundle(lambda: self._bundle(cube)))
        self._keep(cube.id, whole.tensors, cleared)
        with self._lock:
            if cleared == self._cleared:
                self._shells[cube.id] = shell
                if len(self._shells) > _SHELLS:
                    self._shells.popitem(last=False)
        return shell

    def clear(self) -> None:
        """Drop everything, as after forgetting."""
        with self._lock:
            self._cleared += 1
            self._shells.clear()
            self._weights.clear()
            self._bytes = 0

    def _bundle(self, cube: MemCube) -> TensorBundle:
        with self._lock:
            cleared = self._cleared
            if cube.id in self._weights:
                self._weights.move_to_end(cube.id)
                return self._weights[cube.id]
        tensors = self._read(cube).tensors
        self._keep(cube.id, tensors, cleared)
        return tensors

    def _keep(self, cube_id: str, tensors: TensorBundle, cleared: int) -> None:
        """Keep weights, unless something was forgotten since they were read."""
        with self._lock:
            if cleared != self._cleared or cube_id in self._weights:
                return
            self._weights[cube_id] = tensors
            self._bytes += size_bytes(tensors)
            while len(self._weights) > 1 and self._bytes > _WEIGHT_BYTES:
                _, dropped = self._weights.popitem(last=False)
                self._bytes -= size_bytes(dropped)
