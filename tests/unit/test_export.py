"""What of an export needs no ranks: its classes, its files, and what ends it."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sentencepiece
import torch
from huggingface_hub import HfApi

from megatron_prores.convert import export as exporting
from megatron_prores.convert import hybrid_to_gpt
from megatron_prores.convert.architecture import architecture_of
from megatron_prores.convert.export import export, open_checkpoint
from megatron_prores.convert.from_hugging_face import megatron_flags
from megatron_prores.convert.tokenizer import SAMPLE_TEXT, fast_sentencepiece
from megatron_prores.errors import UserError
from tests.distributed.launch import REPOSITORY
from tests.unit.stored import make, make_llama, unguard_loading

LLAMA: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "group_query_attention": False,
    "max_position_embeddings": 64,
    "seq_length": 64,
    "init_method_std": 0.02,
    "layernorm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "untie_embeddings_and_output_weights": True,
    "add_bias_linear": False,
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def architecture(**changed: Any) -> str:
    return architecture_of(Namespace(**LLAMA | changed), 250, NO_IDS).name


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"swiglu": False}, "no --swiglu"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned"),
        ({"rotary_percent": 0.5}, "--rotary-percent 0.5"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"window_size": [8, 0]}, "--window-size"),
        ({"qk_layernorm": True, "norm_placement": "post"}, "--qk-layernorm"),
        ({"num_experts": 4, "moe_router_pre_softmax": True}, "--moe-router-pre-softmax"),
        ({"num_experts": 4, "norm_placement": "sandwich"}, "--norm-placement sandwich"),
        ({"num_experts": 4, "moe_layer_freq": 2}, "--moe-layer-freq 2"),
        ({"heterogeneous_layers_config_encoded_json": "{}"}, "--heterogeneous-layers-config-path"),
    ],
)
def test_a_model_without_a_class_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    assert architecture() == "LlamaForCausalLM"
    with pytest.raises(UserError) as error:
        architecture(**changed)
    assert words in error.value.message()
    assert "cannot be exported" in error.value.message()


def test_every_class_gets_a_config_that_transformers_takes() -> None:
    from transformers import AutoConfig

    for changed in (
        {},
        {"norm_placement": "sandwich"},
        {"qk_layernorm": True},
        {"num_experts": 4, "moe_ffn_hidden_size": 32, "moe_router_topk": 2},
    ):
        config = architecture_of(Namespace(**LLAMA | changed), 250, NO_IDS).config
        read = AutoConfig.for_model(**config)
        assert read.hidden_size == 64
        assert read.num_key_value_heads == 4
        assert read.rms_norm_eps == 1e-5


def test_megatrons_flags_of_a_config_give_that_config_again() -> None:
    config = architecture_of(Namespace(**LLAMA | {"rotary_base": 500000}), 250, NO_IDS).config
    flags = megatron_flags(config)
    for flag, value in {
        "--num-layers": "4",
        "--ffn-hidden-size": "128",
        "--rotary-base": "500000",
        "--norm-epsilon": "1e-05",
    }.items():
        assert flags[flags.index(flag) + 1] == value
    assert "--untie-embeddings-and-output-weights" in flags
    for wrong in ({"attention_bias": True}, {"hidden_act": "gelu"}, {"sliding_window": 8}):
        with pytest.raises(UserError, match="cannot be imported"):
            megatron_flags(config | wrong)


def train(kind: str, **options: Any) -> bytes:
    texts = [f"{text} {number}" for number in range(30) for text in SAMPLE_TEXT]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=400,
        model_type=kind,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


LIKE_LLAMA = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
}


@pytest.mark.parametrize("options", [LIKE_LLAMA, {}], ids=["like Llama's", "defaults"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_fast_tokenizer_has_sentencepieces_ids(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(kind, **options))
    slow = sentencepiece.SentencePieceProcessor(model_file=str(path))
    fast = fast_sentencepiece(str(path))
    fast.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    for tokenizer in (fast, AutoTokenizer.from_pretrained(tmp_path)):
        for text in SAMPLE_TEXT:
            assert tokenizer(text)["input_ids"] == slow.encode(text), text


def test_wrong_places_end_in_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path / "nowhere",), "no such directory"),
        ((tmp_path,), "there is no checkpoint, or no tracker file, in it"),
        ((tmp_path, 7), "--ckpt-step 7"),
    ):
        with pytest.raises(UserError) as error:
            open_checkpoint(*arguments)
        assert words in error.value.message()


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "hf"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for overwrite, words in ((False, "--overwrite"), (True, "is no exported model")):
        with pytest.raises(UserError) as error:
            export(None, output, overwrite=overwrite)  # type: ignore[arg-type]
        assert words in error.value.message()
    assert (output / "notes.txt").read_text() == "mine"


def test_shards_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from megatron_prores.convert.stored_weights import Weight

    tensors = {f"w{n}": torch.full((10, 10), float(n)) for n in range(7)}
    weights = [
        Weight(name, (10, 10), lambda name=name: tensors[name])  # type: ignore[misc]
        for name in tensors
    ]
    monkeypatch.setattr(exporting, "SHARD_BYTES", 1000)  # two of them in float32, five in bf16
    exporting._write_weights(tmp_path, weights, torch.float32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    assert len(set(index["weight_map"].values())) == 4
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


EXPORT = """
import resource, sys
from pathlib import Path
from megatron_prores.convert import export as exporting

exporting.SHARD_BYTES = 32_000_000
source = exporting.open_checkpoint(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
exporting.export(source, Path(sys.argv[2]), "fp32", "none")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_an_export_takes_the_memory_of_a_shard_not_of_the_model(tmp_path: Path) -> None:
    import torch

    shape = {"num_layers": 6, "hidden_size": 1024, "ffn_hidden_size": 2816, "vocab_size": 8192}
    make_llama(tmp_path / "saved", **shape, dtype=torch.float32)
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "saved"), str(tmp_path / "hf")]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    model = sum(path.stat().st_size for path in files)
    assert model > 370_000_000
    # A shard and the copy that safetensors makes of it, and what the largest weight is made of.
    assert int(ran.stdout) < 200_000_000


class _Hub(HfApi):
    """What the Hub would be asked for."""

    asked: ClassVar[list[str]] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.asked.append(f"create {repo_id} {options}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:  # type: ignore[override]
        files = " ".join(sorted(path.name for path in Path(folder_path).iterdir()))
        self.asked.append(f"upload {repo_id}: {files}")


def test_push_uploads_what_was_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    shape = {"num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 128, "vocab_size": 64}
    root = make_llama(tmp_path / "saved", **shape, dtype=torch.float32).parent
    monkeypatch.setattr("huggingface_hub.HfApi", _Hub)
    words = ["--load", str(root), "--tokenizer", "none", "--push", "me/model"]
    exporting.main([*words, "--output", str(tmp_path / "hf")])
    assert _Hub.asked == [
        "create me/model {'exist_ok': True}",
        "upload me/model: README.md config.json generation_config.json model.safetensors",
    ]
    assert "me/model: uploaded" in capsys.readouterr().out

    # A Hub that cannot be reached: the model is there all the same.
    unreachable = functools.partial(HfApi, endpoint="http://127.0.0.1:9", token="none")
    monkeypatch.setattr("huggingface_hub.HfApi", unreachable)
    with pytest.raises(UserError) as error:
        exporting.main([*words, "--output", str(tmp_path / "again")])
    assert f"the model is in {tmp_path / 'again'}" in error.value.message()
    assert (tmp_path / "again" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("pattern", "optimizer", "words"),
    [
        ("M-*-", "optimizer.state.param.decoder.layers.0.mixer.A_log", "M-\\*- is no GPT model"),
        ("*-*-/*-", "optimizer.state.param.mtp.layers.0.weight", "is no GPT model"),
        ("*-*-", "optimizer.distributed.dp_group_idx_0.param_state", "fully-reshardable"),
    ],
)
def test_a_hybrid_checkpoint_that_no_gpt_model_goes_on_from(
    pattern: str, optimizer: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unguard_loading(monkeypatch)
    make(tmp_path / "saved", 2, {optimizer: torch.ones(2)}, hybrid_layer_pattern=pattern)
    argv = ["--load", str(tmp_path / "saved"), "--output", str(tmp_path / "gpt")]
    with pytest.raises(UserError, match=words):
        hybrid_to_gpt.main(argv)
    assert not (tmp_path / "gpt").exists()
