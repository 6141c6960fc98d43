"""Token removal equals what it stands for: pixel replacement and attention masking."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xaifast
from xaifast.coalitions import Coalitions
from xaifast.evaluate import Evaluator
from xaifast.models import VisionTransformer
from xaifast.players import resolve_players
from xaifast.removal import TokenDrop, TokenSelect

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Normalised(nn.Module):
    """A wrapper as users write them: preprocessing, then the model, then one of its outputs."""

    def __init__(self, model, pick):
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, x):
        return self.pick(self.model((x - 0.4) / 0.3))


def own():
    return VisionTransformer(16, 4, 5, dim=32, depth=2, heads=4)


def hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=5, **sizes))
    if kind == "deit":
        return transformers.DeiTForImageClassification(transformers.DeiTConfig(num_labels=5, **sizes))
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(projection_dim=8, **sizes))


def build(kind, dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "own":
            model = own()
        elif kind == "own wrapped":
            model = Normalised(own(), lambda out: out)
        elif kind == "clip":
            model = Normalised(hugging_face("clip"), lambda out: out.pooler_output[:, :6])
        elif kind == "vit wrapped":
            model = Normalised(hugging_face("vit"), lambda out: out.logits)
        else:
            model = hugging_face(kind)
        with torch.no_grad():  # as-initialised transformers hardly look at their patches, which hides mistakes
            for parameter in model.parameters():
                if parameter.dim() in (2, 4):
                    parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


KINDS = ["own", "own wrapped", "vit", "vit wrapped", "deit", "clip"]
MASKS = {
    "patches": xaifast.grid_mask((16, 16), 4),
    "quarters": xaifast.grid_mask((16, 16), 8),
    "uneven": torch.tensor([0, 1, 1, 2, 0, 3, 1, 2, 4, 3, 3, 5, 4, 4, 0, 5])
    .reshape(4, 4)
    .repeat_interleave(4, 0)
    .repeat_interleave(4, 1),
}


def values(model, x, mask, present, batch_size=7, **kwargs):
    run = Evaluator(model, (x,), players=resolve_players(mask, (x,), "test"), batch_size=batch_size, **kwargs)
    return run(Coalitions.from_present(present))


def coalitions(mask, seed=0):
    n_players = int(mask.max()) + 1
    present = (
        torch.rand(20, n_players, generator=torch.Generator().manual_seed(seed)) < torch.linspace(0, 1, 20)[:, None]
    )
    present[0], present[-1] = False, True
    return present


def images(dtype, n=3):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_select_equals_pixel_replacement(kind, mask, dtype):
    model, x, present = build(kind, dtype), images(dtype), coalitions(mask)
    for baselines in (0.0, torch.rand(3, 16, 16).to(dtype), torch.rand(3, 3, 16, 16).to(dtype)):
        pixels = values(model, x, mask, present, baselines=baselines)
        tokens = values(model, x, mask, present, baselines=baselines, removal=TokenSelect())
        assert float((pixels - tokens).abs().max()) <= TOLERANCE[dtype] * float(pixels.abs().max())
        assert float(pixels.std(1).max()) > 1e-3  # masking matters to this model
    background = xaifast.Background(torch.rand(4, 3, 16, 16).to(dtype))
    pixels = values(model, x, mask, present, baselines=background, batch_size=10)
    tokens = values(model, x, mask, present, baselines=background, removal=TokenSelect(), batch_size=3)
    assert float((pixels - tokens).abs().max()) <= TOLERANCE[dtype] * float(pixels.abs().max())


def masked_attention(model, kind, x, keep):
    """Logits with absent tokens masked out of every attention layer; ``keep`` BoolTensor [T] with the prefix."""
    bias = torch.zeros(1, 1, 1, len(keep), dtype=x.dtype).masked_fill(~keep, -torch.inf)
    if kind in ("vit", "deit"):
        return model(x, attention_mask=keep[None].long().expand(len(x), -1)).logits
    if kind == "vit wrapped":
        return model.model((x - 0.4) / 0.3, attention_mask=keep[None].long().expand(len(x), -1)).logits
    if kind == "clip":
        vision = model.model
        hidden = vision.pre_layrnorm(vision.embeddings((x - 0.4) / 0.3))
        hidden = vision.encoder(inputs_embeds=hidden, attention_mask=bias).last_hidden_state
        return vision.post_layernorm(hidden[:, 0])[:, :6]
    net = model if kind == "own" else model.model
    h = net.embeddings(x if kind == "own" else (x - 0.4) / 0.3)
    for block in net.blocks:
        batch, length, dim = h.shape
        q, k, v = block.qkv(block.norm1(h)).view(batch, length, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(batch, length, dim)
        h = h + block.out(mixed)
        h = h + block.down(F.gelu(block.up(block.norm2(h))))
    return net.head(net.norm(h[:, 0]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_drop_equals_attention_masking(kind, mask, dtype):
    model, x, present = build(kind, dtype), images(dtype), coalitions(mask)
    dropped = values(model, x, mask, present, removal=TokenDrop())
    prefix = 2 if kind == "deit" else 1
    players = mask[::4, ::4].reshape(-1)
    with torch.no_grad():
        for c in range(20):
            keep = torch.cat((torch.ones(prefix, dtype=torch.bool), present[c][players]))
            expected = masked_attention(model, kind, x, keep).double()
            assert float((dropped[:, c] - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())
    assert float(dropped.std(1).max()) > 1e-3


@pytest.mark.parametrize("removal", [TokenDrop(), TokenSelect()], ids=["drop", "select"])
def test_per_input_masks_and_designs(removal):
    model, x = build("own", torch.float64), images(torch.float64)
    masks = torch.stack([MASKS["patches"], MASKS["quarters"], MASKS["uneven"]])[:, None].expand(-1, 3, -1, -1)
    present = torch.rand(3, 9, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    together = values(model, x, masks, present, removal=removal)
    for b in range(3):
        alone = values(
            model, x[b : b + 1], masks[b : b + 1, :1], present[b, :, : int(masks[b].max()) + 1], removal=removal
        )
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("removal", [TokenDrop(), TokenSelect()], ids=["drop", "select"])
def test_model_is_restored_also_after_an_error(removal):
    model, x, mask = build("own", torch.float32), images(torch.float32), MASKS["patches"]
    expected = model(x)

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def forward(self, rows):
            out = self.inner(rows)
            self.calls += 1
            if self.calls == 3:
                raise KeyError("mine")
            return out

    with pytest.raises(KeyError):
        values(Failing(), x, mask, coalitions(mask), removal=removal)
    assert "forward" not in vars(model.embeddings) and not model.embeddings._forward_hooks
    assert torch.equal(model(x), expected)


def test_named_embeddings_serve_other_models():
    class Tokeniser(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Conv2d(3, 8, 8, 8)
            self.first = nn.Parameter(torch.randn(1, 1, 8))

        def forward(self, x):
            return torch.cat((self.first.expand(len(x), -1, -1), self.project(x).flatten(2).transpose(1, 2)), 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer = Tokeniser(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.layer(self.stem(x))[:, 0]

    model, x, mask = Model().double().eval(), images(torch.float64), MASKS["quarters"]
    present = coalitions(mask)
    pixels = values(model, x, mask, present)
    tokens = values(model, x, mask, present, removal=TokenSelect("stem"))
    torch.testing.assert_close(tokens, pixels, atol=1e-12, rtol=1e-10)
    assert values(model, x, mask, present, removal=TokenDrop("stem")).shape == pixels.shape


def test_kernel_shap_with_dropped_tokens_runs_fewer_tokens():
    lengths = []
    model = build("own", torch.float32)
    model.blocks.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[:2]))
    result = xaifast.kernel_shap(
        model, images(torch.float32), feature_mask=MASKS["patches"], n_samples=200, removal=TokenDrop(), target=0
    )
    assert result.values.shape == (3, 16)
    spent = sum(rows * length for rows, length in lengths)
    assert spent < 0.6 * 3 * 200 * 17
