"""Models of sound."""

from __future__ import annotations

import torch

from tests.plugins.zoo.entry import SMALL, Entry, tokens

_WHISPER = {"vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
_WHISPER |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 8}
_WHISPER |= {"max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1}
_WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
_WAV2VEC = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
_WAV2VEC |= {"num_attention_heads": 4, "conv_dim": [16, 64], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
_WAV2VEC |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_SPEECHT5 = {**{k: v for k, v in _WAV2VEC.items() if k not in ("intermediate_size", "num_hidden_layers")}}
_SPEECHT5 |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
_SPEECHT5 |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 128}
_CLAP_TEXT = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 64, "projection_dim": 64}
_CLAP_AUDIO = {"spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4, "depths": [1, 1]}
_CLAP_AUDIO |= {"num_attention_heads": [2, 4], "patch_embeds_hidden_size": 32, "hidden_size": 64, "num_mel_bins": 8}
_CLAP_AUDIO |= {"projection_dim": 64, "num_hidden_layers": 2, "enable_fusion": False}
_MUSIC = {"vocab_size": 128, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
_MUSIC |= {"num_codebooks": 2, "pad_token_id": 128, "bos_token_id": None}
_T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "model_type": "t5"}
_ENCODEC = {"model_type": "encodec", "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 32}
_ENCODEC |= {"hidden_size": 16, "num_lstm_layers": 1, "audio_channels": 1}
_CLVP = {"vocab_size": 128, "hidden_size": 64, "n_inner": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
_CLVP |= {"num_mel_attn_blocks": 1, "feature_size": 16}
_AST = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
_AST |= {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}


def _audio(kind, config, inputs, **more):
    return Entry(kind, "audio", config, inputs, **more)


def _whisper():
    return {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": torch.arange(10, 18)[None]}


def _wave():
    return {"input_values": torch.randn(1, 400)}


def _spoken():
    return {**_wave(), "decoder_input_ids": torch.arange(10, 18)[None]}


def _clap():
    return {"input_ids": torch.arange(10, 26).view(2, 8), "input_features": torch.randn(2, 1, 128, 8)}


def _music():
    return {"input_ids": torch.arange(10, 16)[None], "decoder_input_ids": torch.arange(10, 18).view(2, 4)}


AUDIO = (
    _audio("WhisperForConditionalGeneration", _WHISPER, _whisper, daily=True),
    _audio("Wav2Vec2ForCTC", _WAV2VEC, _wave, daily=True),
    _audio("HubertForCTC", _WAV2VEC, _wave),
    _audio("SpeechT5ForSpeechToText", _SPEECHT5, _spoken),
    _audio(
        "ClapModel",
        {"text_config": _CLAP_TEXT, "audio_config": _CLAP_AUDIO, "projection_dim": 64},
        _clap,
        output="logits_per_audio",
    ),
    _audio("MusicgenForCausalLM", _MUSIC, lambda: {"input_ids": torch.arange(10, 18).view(2, 4)}),
    _audio(
        "MusicgenForConditionalGeneration", {"text_encoder": _T5, "audio_encoder": _ENCODEC, "decoder": _MUSIC}, _music
    ),
    _audio("ClvpForCausalLM", _CLVP, tokens),
    _audio("ASTForAudioClassification", _AST, lambda: {"input_values": torch.randn(1, 32, 16)}),
)
