"""LoRA adapters of a network: peft's layout, identity at the start, merging, removal."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import EMB_DIM, TEXT_WIDTH, scrambled, tiny_decoder, tiny_prior
from torch import Tensor, nn

from unclip.models.lora import LoRAConfig, add_lora, attach, detach, merge, read_lora, save_lora
from unclip.models.unclip.decoder import Decoder
from unclip.types import TextEncoding

pytest.importorskip("peft")


def outputs(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text = TextEncoding(
        torch.randn(2, EMB_DIM, generator=generator),
        torch.randn(2, 5, TEXT_WIDTH, generator=generator),
        torch.ones(2, 5, dtype=torch.bool),
    )
    emb, t = torch.randn(2, EMB_DIM, generator=generator), torch.tensor([10.0, 500.0])
    image = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        if isinstance(network, Decoder):
            return network(image, t, emb, text)
        return network(emb, t, text)


def trained(network: nn.Module, folder: Path, **config: object) -> Tensor:
    """Save an adapter with random values; return the adapted outputs."""
    adapted = copy.deepcopy(network)
    add_lora(adapted, LoRAConfig(**config))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    save_lora(adapted, folder)
    return outputs(adapted)


@pytest.fixture(params=[tiny_prior, tiny_decoder], ids=["prior", "decoder"])
def network(request) -> nn.Module:
    torch.manual_seed(0)
    return scrambled(request.param()).eval()


def test_a_new_adapter_is_the_identity_and_all_that_is_trained(network):
    before, names = outputs(network), {name for name, _ in network.named_parameters()}
    add_lora(network, LoRAConfig(rank=3))
    assert torch.equal(outputs(network), before)
    for name, p in network.named_parameters():
        assert p.requires_grad == (".lora_" in name), name
    assert len(names) < len(list(network.parameters()))


def test_round_trip_merge_and_removal(network, tmp_path):
    before, state = outputs(network), copy.deepcopy(network.state_dict())
    adapted = trained(network, tmp_path, rank=4, alpha=6.0)
    assert (adapted - before).abs().max() > 0.1

    adapter = read_lora(tmp_path)
    attach(network, adapter, "a")
    assert (outputs(network) - adapted).abs().max() <= 1e-5
    detach(network, "a")
    assert torch.equal(outputs(network), before)
    assert network.state_dict().keys() == state.keys() and not hasattr(network, "peft_config")

    attach(network, adapter, "a")
    merge(network, "a")
    assert (outputs(network) - adapted).abs().max() <= 1e-5
    assert network.state_dict().keys() == state.keys()


def test_adapters_add_up_and_scale(network, tmp_path):
    trained(network, tmp_path / "a", rank=2, targets=("out",))
    trained(network, tmp_path / "b", rank=3, targets=("out", "qkv"))
    a, b = read_lora(tmp_path / "a"), read_lora(tmp_path / "b")
    merged = copy.deepcopy(network)
    for adapter, scale in ((a, 0.5), (b, -2.0)):
        attach(merged, adapter, "x", scale)
        merge(merged, "x")
    attach(network, a, "a", 0.5)
    attach(network, b, "b", -2.0)
    torch.testing.assert_close(outputs(network), outputs(merged), rtol=0, atol=1e-5)


def test_peft_reads_the_files(network, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = trained(network, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(network), str(tmp_path)).eval()
    assert (outputs(loaded.base_model.model) - adapted).abs().max() <= 1e-5


def test_same_files_for_the_same_adapter(network, tmp_path):
    add_lora(network, LoRAConfig())
    for name in "ab":
        save_lora(network, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_targets_that_do_not_exist():
    with pytest.raises(ValueError, match=r"lora.targets is \['conv'\].*state_proj"):
        add_lora(tiny_prior(), LoRAConfig(targets=("conv",)))


def test_misfit_is_explained(tmp_path):
    trained(scrambled(tiny_prior()), tmp_path)
    adapter = read_lora(tmp_path)
    assert "no linear layer" in (adapter.misfit(tiny_decoder()) or "")
    assert "the adapter has (" in (adapter.misfit(tiny_prior(width=64)) or "")
    assert adapter.misfit(tiny_prior()) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "plain LoRA"),
        ({"r": 5}, "rank 5"),
        ({"lora_alpha": "16"}, "plain LoRA"),
    ],
)
def test_other_adapters_are_refused(change, message, tmp_path):
    trained(scrambled(tiny_prior()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path)


def test_of_the_config_only_the_scale_is_used(tmp_path):
    """Initialisations such as PiSSA change the base weights, and megatron_core names a module."""
    network = scrambled(tiny_prior()).eval()
    adapted = trained(network, tmp_path, rank=4)
    file = tmp_path / "adapter_config.json"
    hostile = {"init_lora_weights": "pissa", "megatron_config": {}, "megatron_core": "antigravity"}
    file.write_text(json.dumps(json.loads(file.read_text()) | hostile))
    attach(network, read_lora(tmp_path), "a")
    assert (outputs(network) - adapted).abs().max() <= 1e-5
