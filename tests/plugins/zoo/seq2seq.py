"""Encoders with decoders, of text."""

from __future__ import annotations

from tests.plugins.zoo.entry import Entry, translation

_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
_GATED = {**_T5, "feed_forward_proj": "gated-gelu"}
_BART = {"vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64}
_BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
_BART |= {"forced_eos_token_id": None}
_LED = {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
_SWITCH = {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
_SWITCH |= {"num_decoder_layers": 1, "expert_capacity": 64}
_NLLB = {**_BART, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 64}


def _seq2seq(kind, config, *, inputs=translation, **more):
    return Entry(kind, "seq2seq", config, inputs, **more)


SEQ2SEQ = (
    _seq2seq("T5ForConditionalGeneration", _T5, daily=True),
    _seq2seq("T5ForConditionalGeneration", {**_T5, "tie_word_embeddings": False}, variant="untied"),
    _seq2seq("MT5ForConditionalGeneration", _GATED),
    _seq2seq("UMT5ForConditionalGeneration", _GATED),
    _seq2seq("BartForConditionalGeneration", _BART, daily=True),
    _seq2seq("MBartForConditionalGeneration", _BART),
    _seq2seq("MarianMTModel", _BART),
    _seq2seq("PegasusForConditionalGeneration", _BART),
    _seq2seq("M2M100ForConditionalGeneration", _BART),
    _seq2seq("LEDForConditionalGeneration", _LED),
    _seq2seq("SwitchTransformersForConditionalGeneration", _SWITCH, reads="wo.weight.dtype"),
    _seq2seq("NllbMoeForConditionalGeneration", _NLLB),
)
