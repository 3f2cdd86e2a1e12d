"""One decoding step of a transformers model with a static cache, as a CUDA graph."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from harness.graphs import LEAD_CYCLES
from peers import models

SPARE = 64
"""Places of the cache after the context."""


class DecodeStep:
    """The step of one token for each of `batch` sequences, after `context` others of which the cache is full."""

    def __init__(self, model: nn.Module, batch: int, context: int, device: str) -> None:
        self.model, self.context, self.device = model, context, device
        length = context + SPARE
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        generator = torch.Generator().manual_seed(batch)
        self.tokens = torch.randint(model.config.vocab_size, (batch, 1), generator=generator).to(device)
        self.positions = torch.full((batch, 1), context, device=device)
        # the mask that a step has, made beforehand: [batch, 1, 1, length]
        self.mask = (torch.arange(length, device=device) <= context).expand(batch, 1, 1, length).contiguous()
        self.graph: Any = None
        self.note = ""
        self.step()
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.reset()

    def reset(self) -> None:
        """To where the context ends."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def step(self) -> Tensor:
        """Logits [batch, 1, vocabulary]."""
        inputs = {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": self.positions}
        return self.model(**inputs, use_cache=True, **{models.CACHE: self.cache}).logits

    def capture(self) -> None:
        """Record the step; where that fails it is called, and the note says so."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.reset()
                self.step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            self.reset()
            with torch.cuda.graph(graph, stream=stream):
                self.step()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.note = f"called, no graph: {str(error).splitlines()[0][:80]}"
        self.run()

    def run(self) -> float:
        """Milliseconds of one step."""
        self.reset()
        if self.device == "cpu":
            start = time.perf_counter()
            self.step()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(LEAD_CYCLES)
        begin.record()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
