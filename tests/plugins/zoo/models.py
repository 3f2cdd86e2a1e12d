"""The zoo: tiny models of many classes of transformers, for the tests of everything that holds for any model."""

from __future__ import annotations

from tests.plugins.zoo.audio import AUDIO
from tests.plugins.zoo.decoders import DECODERS
from tests.plugins.zoo.encoders import ENCODERS
from tests.plugins.zoo.entry import Entry
from tests.plugins.zoo.experts import EXPERTS
from tests.plugins.zoo.multimodal import MULTIMODAL
from tests.plugins.zoo.recurrent import RECURRENT
from tests.plugins.zoo.seq2seq import SEQ2SEQ
from tests.plugins.zoo.vision import VISION

ENTRIES = (*DECODERS, *EXPERTS, *RECURRENT, *ENCODERS, *SEQ2SEQ, *VISION, *MULTIMODAL, *AUDIO)
ZOO: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
"""Every entry by its name."""

assert len(ZOO) == len(ENTRIES), "two entries of one name"
