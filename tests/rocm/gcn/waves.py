"""The architectural state of a batch of waves: registers as numpy arrays over (wave, lane)."""

from __future__ import annotations

import numpy as np

VCC, M0, NULL, SCALARS = 106, 124, 125, 126
"""Rows of `Waves.s` beside the SGPRs 0-105: VCC takes two; trap temporaries are at 108-123."""
TTMP = 108


class Waves:
    """Registers of `count` waves of `lanes` lanes.

    v, a: uint32 [registers, wave, lane], vector and accumulation registers.
    s: uint32 [SCALARS, wave]. scc: bool [wave].
    exec: bool [wave, lane].
    active: bool [wave], the waves that execute the current instruction; `mask` is exec of those waves.
    """

    def __init__(
        self, count: int, lanes: int, vgprs: int, agprs: int, workgroup: np.ndarray, number: np.ndarray, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        self.count, self.lanes = count, lanes
        self.words = lanes // 32  # of a lane mask

        def garbage(*shape: int) -> np.ndarray:
            return random.integers(0, 2**32, shape, dtype=np.uint32)

        # one row of random numbers for all lanes would make all lanes agree, which hides mistakes
        self.v = garbage(vgprs, count, lanes)
        self.a = garbage(agprs, count, lanes)
        self.s = garbage(SCALARS, count)
        self.s[NULL] = 0
        self.scc = random.integers(0, 2, count).astype(bool)
        self.exec = np.ones((count, lanes), bool)
        self.workgroup = workgroup  # index of the wave's workgroup in the batch
        self.number = number  # of the wave within its workgroup
        self.active = np.ones(count, bool)
        self.all_active = True
        self.mask = self.exec
        self.full = True
        self.lane = np.arange(lanes, dtype=np.uint32)[None, :]

    def activate(self, active: np.ndarray) -> None:
        """Choose the waves that execute from here on."""
        self.active = active
        self.all_active = bool(active.all())
        self._exec_changed()

    def set_exec(self, lanes: np.ndarray) -> None:
        """Write the exec mask of the active waves from bool [wave, lane]."""
        self.exec = lanes if self.all_active else np.where(self.active[:, None], lanes, self.exec)
        self._exec_changed()

    def _exec_changed(self) -> None:
        self.mask = self.exec if self.all_active else self.exec & self.active[:, None]
        self.full = bool(self.mask.all())

    def set_scc(self, value: np.ndarray) -> None:
        """Write SCC of the active waves."""
        if self.all_active:
            self.scc = np.broadcast_to(value, (self.count,)).copy()
        else:
            self.scc = np.where(self.active, value, self.scc)

    def set_s(self, index: int, value: np.ndarray) -> None:
        """Write one 32-bit scalar register of the active waves."""
        if index == NULL:
            return
        if self.all_active:
            self.s[index] = value
        else:
            np.copyto(self.s[index], value, where=self.active, casting="unsafe")

    def set_v(self, index: int, value: np.ndarray) -> None:
        """Write one vector register in the lanes that execute; `value` is uint32, broadcast to [wave, lane]."""
        if self.full:
            self.v[index] = value
        else:
            np.copyto(self.v[index], value, where=self.mask)

    def pack(self, lanes: np.ndarray) -> np.ndarray:
        """Bool [wave, lane] to mask words, uint32 [wave, words]."""
        return np.packbits(lanes, axis=1, bitorder="little").view(np.uint32)

    def unpack(self, words: np.ndarray) -> np.ndarray:
        """The inverse of `pack`."""
        return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little").view(bool)

    def mask_at(self, index: int) -> np.ndarray:
        """The lane mask in the scalar registers from `index`, as bool [wave, lane]."""
        return self.unpack(self.s[index : index + self.words].T)

    def set_mask_at(self, index: int, lanes: np.ndarray) -> None:
        """Write a lane mask to the scalar registers from `index`."""
        if index != NULL:
            words = self.pack(lanes)
            for word in range(self.words):
                self.set_s(index + word, words[:, word])
