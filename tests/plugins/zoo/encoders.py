"""Encoders of text."""

from __future__ import annotations

import torch

from tests.plugins.zoo.entry import SMALL, Entry, tokens

_BERT = {**SMALL, "pad_token_id": 0, "max_position_embeddings": 64}
_DISTIL = {"vocab_size": 128, "dim": 64, "hidden_dim": 128, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
_MODERN = {**_BERT, "num_hidden_layers": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
_DEBERTA = {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_ESM = {
    **_BERT,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "mask_token_id": 3,
    "position_embedding_type": "rotary",
}
_ALBERT = {**_BERT, "embedding_size": 64, "num_hidden_layers": 2}
_FUNNEL = {"vocab_size": 128, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 64, "n_head": 4, "d_head": 16}
_XLNET = {"vocab_size": 128, "d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 128}


def _encoder(kind, config, *, inputs=tokens, **more):
    return Entry(kind, "encoder", config, inputs, **more)


ENCODERS = (
    _encoder("BertForMaskedLM", _BERT, daily=True),
    _encoder("BertForSequenceClassification", _BERT),
    _encoder("RobertaForMaskedLM", _BERT),
    _encoder("RobertaForSequenceClassification", _BERT),
    _encoder("DistilBertForMaskedLM", _DISTIL),
    _encoder("AlbertForMaskedLM", _ALBERT),
    _encoder("DebertaV2ForMaskedLM", _DEBERTA),
    _encoder("ElectraForPreTraining", {**_BERT, "embedding_size": 32}),
    _encoder("ModernBertForMaskedLM", _MODERN, daily=True),
    _encoder("EsmForMaskedLM", _ESM),
    _encoder("MPNetForMaskedLM", _BERT),
    _encoder("NomicBertModel", _BERT, output="last_hidden_state", daily=True),
    _encoder("GteModel", _BERT, output="last_hidden_state"),
    _encoder("FunnelForMaskedLM", {**_FUNNEL, "d_inner": 128}),
    _encoder("XLNetLMHeadModel", _XLNET, dtype=torch.float32),
)
