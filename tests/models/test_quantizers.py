"""Quantizers: nearest codes, gradients, and codebooks of running means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forks import fork, wait
from torch import Tensor, nn

from unclip.models.codecs import quantizers
from unclip.models.codecs.quantizers import (
    GumbelConfig,
    GumbelQuantizer,
    NearestConfig,
    VectorQuantizer,
)

K, C = 12, 5


def make_features(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, C, 3, 3, generator=torch.Generator().manual_seed(seed))


def make_quantizer(seed: int = 0, **options: float | None) -> VectorQuantizer:
    torch.manual_seed(seed)
    module = VectorQuantizer(NearestConfig(**options), K, C)
    module.codebook.data.normal_()
    if module.config.ema is not None:
        module.sums.copy_(module.codebook)
    return module


def rows(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def test_encode_returns_the_nearest_code(monkeypatch):
    module, z = make_quantizer(), make_features()
    expected = torch.cdist(rows(z), module.codebook).argmin(dim=1).view(4, 3, 3)
    assert torch.equal(module.encode(z), expected)
    monkeypatch.setattr(quantizers, "CHUNK", 7)  # in chunks
    assert torch.equal(module.encode(z), expected)
    assert torch.equal(rows(module.embed(expected)), module.codebook[expected.flatten()])


def test_autocast_does_not_change_codes():
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for module in (
        VectorQuantizer(NearestConfig(), 4096, 4),
        GumbelQuantizer(GumbelConfig(), 4096, 4),
    ):
        module.codebook.data.normal_()
        expected = module.encode(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module.encode(z), expected)


def test_gradient_is_straight_through():
    module, z = make_quantizer(), make_features().requires_grad_()
    out, g = module(z), torch.randn(4, C, 3, 3)
    torch.testing.assert_close(out.z, module.embed(out.codes))
    assert torch.equal(torch.autograd.grad(out.z, z, g, retain_graph=True)[0], g)
    assert torch.autograd.grad(out.z, module.codebook, g, allow_unused=True)[0] is None


def test_logits_exclude_all_other_codes():
    module, z = make_quantizer(), make_features()
    q = torch.distributions.Categorical(logits=module.logits(z))
    assert torch.equal(q.probs.argmax(dim=-1), module.encode(z)) and not q.entropy().any()
    assert torch.equal(q.sample(), module.encode(z))


def test_loss_pulls_codes_and_features_together():
    module, z = make_quantizer(commitment=0.25), make_features().requires_grad_()
    out = module(z)
    e = module.embed(out.codes)
    torch.testing.assert_close(out.loss, 1.25 * F.mse_loss(z, e))
    dz, de = torch.autograd.grad(out.loss, [z, module.codebook])
    torch.testing.assert_close(dz, 0.25 * 2 * (z - e) / z.numel())
    expected = torch.zeros(K, C).index_add_(0, out.codes.flatten(), rows(2 * (e - z) / z.numel()))
    torch.testing.assert_close(de, expected)


def test_ema_codebook_converges_to_feature_means():
    module, z = make_quantizer(ema=0.9), make_features()
    codes = module(z).codes.flatten()
    uses, sums = torch.ones(K), make_quantizer(ema=0.9).codebook.clone()
    uses = 0.9 * uses + 0.1 * torch.bincount(codes, minlength=K)
    sums = 0.9 * sums + 0.1 * torch.zeros(K, C).index_add_(0, codes, rows(z))
    torch.testing.assert_close(module.codebook, sums / uses[:, None])
    for _ in range(300):
        codes = module(z).codes.flatten()
    for code in codes.unique():
        torch.testing.assert_close(module.codebook[code], rows(z)[codes == code].mean(dim=0))
    assert not list(module.parameters()) and module.codebook.isfinite().all()


def test_codebook_is_constant_in_eval_mode():
    module = make_quantizer(ema=0.9, revive=1.0).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(make_features())
    module.encode(make_features())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_rarely_used_codes_are_reset_to_features(ema):
    module, z = make_quantizer(ema=ema, revive=0.5), make_features()
    module.codebook.data[:3] = 100.0  # out of reach
    module.uses.fill_(1.0)
    module.uses[:3] = 0.4
    alive = module.codebook.data[3:].clone()
    with torch.no_grad():
        module._revive(rows(z))
    assert torch.equal(module.codebook[3:], alive)
    assert (module.codebook[:3, None] == rows(z)).all(dim=-1).any(dim=-1).all()
    assert set(module(z).codes.unique().tolist()) & {0, 1, 2}
    module.uses.fill_(1.0)
    before = module.codebook.data.clone()
    with torch.no_grad():
        module._revive(rows(make_features(seed=1)))
    assert torch.equal(module.codebook, before)


def test_first_batch_revives_all_codes():
    torch.manual_seed(0)
    module, z = VectorQuantizer(NearestConfig(ema=0.99, revive=0.1), K, C), 50 + make_features(64)
    assert module(z).codes.unique().numel() > K // 2
    plain = VectorQuantizer(NearestConfig(ema=0.99), K, C)
    assert plain(z).codes.unique().numel() < K // 2


def test_gumbel_quantizer():
    torch.manual_seed(0)
    module, z = GumbelQuantizer(GumbelConfig(), K, C), make_features()
    logits = F.conv2d(z, module.head.weight, module.head.bias)
    assert torch.equal(module.encode(z), logits.argmax(dim=1))
    out = module.train()(z, temperature=1e-4)
    torch.testing.assert_close(
        out.z, module.embed(nearest_codes(out.z, module.codebook)), atol=1e-3, rtol=1e-3
    )
    assert not torch.equal(module(z, temperature=1.0).z, module(z, temperature=1.0).z)
    hard = module.eval()(z, kl_weight=2.0)
    assert torch.equal(hard.z, module.embed(module.encode(z)))
    q = logits.permute(0, 2, 3, 1).softmax(dim=-1)
    torch.testing.assert_close(hard.loss, 2 * (q * (q * K).log()).sum(dim=-1).mean())


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(rows(z), codebook).argmin(dim=1).view(len(z), *z.shape[2:])


def run_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    module = make_quantizer(ema=0.9)
    for step in range(3):
        module(make_features(seed=step)[2 * rank : 2 * rank + 2])
    revived = make_quantizer(seed=rank, revive=1e6)
    revived(make_features()[2 * rank : 2 * rank + 2])
    torch.save(
        {"codebook": module.codebook, "revived": revived.codebook.data}, folder / f"{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_codebook_of_two_processes_equals_that_of_the_joint_batch(tmp_path):
    assert wait(fork(lambda rank: run_process(rank, tmp_path), 2), 60) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    module = make_quantizer(ema=0.9)
    for step in range(3):
        module(make_features(seed=step))
    torch.testing.assert_close(first["codebook"], second["codebook"], atol=0, rtol=0)
    torch.testing.assert_close(first["codebook"], module.codebook)
    assert torch.equal(first["revived"], second["revived"])


def test_ema_codebook_is_in_the_state_dict():
    module = nn.ModuleDict({"quantizer": make_quantizer(ema=0.9, revive=1.0)})
    assert {"quantizer.codebook", "quantizer.uses", "quantizer.sums"} == set(module.state_dict())
