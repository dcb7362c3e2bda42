"""coca_pytorch's weights against a written-out float64 reference of what they mean, and (marker peers) the package."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opencoca.data.transforms import PreprocessConfig
from opencoca.generation.decoding.session import DecodingSession
from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.store.interop import lucidrains
from opencoca.store.model_folder import load_model_folder, save_model_folder
from opencoca.tokenizer import train_tokenizer

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The arguments of their constructors."""

    dim: int = 24
    num_tokens: int = 31
    unimodal_depth: int = 2
    multimodal_depth: int = 2
    num_img_queries: int = 4
    dim_head: int = 8
    heads: int = 3
    ff_mult: int = 2
    dim_latents: int = 10
    image_dim: int = 20
    vit_heads: int = 2
    vit_dim_head: int = 6
    vit_depth: int = 2
    vit_mlp_dim: int = 14
    class_token: bool = True
    simple: bool = False


SIZES = {
    "as published": Sizes(),
    "one head, wide": Sizes(dim=16, heads=1, dim_head=12, ff_mult=4, dim_latents=16, unimodal_depth=1),
    "many heads, SimpleViT": Sizes(heads=5, dim_head=4, num_img_queries=1, multimodal_depth=3, simple=True),
    "one ViT head, no class token": Sizes(image_dim=12, vit_heads=1, vit_dim_head=12, class_token=False),
}
GRID, PATCH, CONTEXT = 3, 4, 12


# --- their state dict, random ---


def make_state_dict(sizes: Sizes, encoder: bool = True) -> StateDict:
    return {name: tensor.double() for name, tensor in _tensors(sizes, encoder)}


def _tensors(s: Sizes, encoder: bool) -> Iterator[tuple[str, Tensor]]:
    inner, ff = s.heads * s.dim_head, s.ff_mult * s.dim

    def norm(name: str, width: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.gamma", 1 + 0.3 * torch.randn(width)
        yield f"{name}.beta", torch.zeros(width)

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", torch.randn(rows, columns) * 1.5 / columns**0.5

    def self_block(name: str) -> Iterator[tuple[str, Tensor]]:
        yield from norm(f"{name}norm", s.dim)
        exponents = torch.arange(0, s.dim_head, 2).float() / s.dim_head
        yield f"{name}rotary_emb.inv_freq", 1.0 / 10_000**exponents
        yield from linear(f"{name}fused_attn_ff_proj", inner + 2 * s.dim_head + 2 * ff, s.dim)
        yield from linear(f"{name}attn_out", s.dim, inner)
        yield from linear(f"{name}ff_out.1", s.dim, ff)

    def cross(name: str, context: int) -> Iterator[tuple[str, Tensor]]:
        yield from norm(f"{name}norm", s.dim)
        yield from linear(f"{name}to_q", inner, s.dim)
        yield from linear(f"{name}to_kv", 2 * s.dim_head, context)
        yield from linear(f"{name}to_out", s.dim, inner)

    token_embed = torch.randn(s.num_tokens, s.dim)
    yield "token_emb.weight", token_embed
    yield "text_cls_token", torch.randn(s.dim)
    yield "img_queries", torch.randn(s.num_img_queries + 1, s.dim)
    yield "temperature", torch.tensor([0.7])
    yield from cross("img_attn_pool.", s.image_dim)
    for name, width in (("img_attn_pool.context_norm", s.image_dim), ("img_attn_pool_norm", s.dim)):
        yield from norm(name, width)
    for name in ("text_cls_norm", "to_logits.0"):
        yield from norm(name, s.dim)
    yield "to_logits.1.weight", token_embed
    for name in ("img_to_latents", "text_to_latents"):
        yield from linear(f"{name}.to_latents", s.dim_latents, s.dim)
    for index in range(s.unimodal_depth):
        yield from self_block(f"unimodal_layers.{index}.fn.")
    for index in range(s.multimodal_depth):
        yield from self_block(f"multimodal_layers.{index}.0.fn.")
        yield from cross(f"multimodal_layers.{index}.1.fn.", s.dim)
        yield from linear(f"multimodal_layers.{index}.1.fn.ff.0", 2 * ff, s.dim)
        yield from linear(f"multimodal_layers.{index}.1.fn.ff.2", s.dim, ff)
    if encoder:
        yield from _vit_tensors(s)


def _vit_tensors(s: Sizes) -> Iterator[tuple[str, Tensor]]:
    width, inner, root = s.image_dim, s.vit_heads * s.vit_dim_head, "img_encoder.vit."

    def affine(name: str, *shape: int) -> Iterator[tuple[str, Tensor]]:
        yield f"{root}{name}.weight", (1 if len(shape) == 1 else 0) + torch.randn(shape) / shape[-1] ** 0.5
        yield f"{root}{name}.bias", 0.3 * torch.randn(shape[0])

    yield from affine("to_patch_embedding.1", 3 * PATCH**2)
    yield from affine("to_patch_embedding.2", width, 3 * PATCH**2)
    yield from affine("to_patch_embedding.3", width)
    if not s.simple:
        yield f"{root}cls_token", torch.randn(int(s.class_token), width)
        yield f"{root}pos_embedding", torch.randn(GRID**2 + s.class_token, width)
    for index in range(s.vit_depth):
        layer = f"transformer.layers.{index}."
        yield from affine(f"{layer}0.norm", width)
        yield f"{root}{layer}0.to_qkv.weight", torch.randn(3 * inner, width) / width**0.5
        if s.simple:
            yield f"{root}{layer}0.to_out.weight", torch.randn(width, inner) / inner**0.5
        elif s.vit_heads > 1 or s.vit_dim_head != width:
            yield from affine(f"{layer}0.to_out.0", width, inner)
        yield from affine(f"{layer}1.net.0", width)
        yield from affine(f"{layer}1.net.1", s.vit_mlp_dim, width)
        yield from affine(f"{layer}1.net.{3 if s.simple else 4}", width, s.vit_mlp_dim)
    yield from affine("transformer.norm", width)
    yield from affine("linear_head" if s.simple else "mlp_head", 7, width)


# --- the reference: one text, one image, one head at a time ---


def normed(x: Tensor, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift


def mixed(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
    scores = queries @ keys.T / math.sqrt(queries.shape[1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(dim=1) @ values


def turned(x: Tensor, frequencies: Tensor) -> Tensor:
    half = x.shape[1] // 2
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies
    numbers = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((numbers.real, numbers.imag), dim=1)


def gated(x: Tensor) -> Tensor:
    value, gate = x.tensor_split(2, dim=-1)
    return value * gate * gate.sigmoid()


@dataclass(frozen=True)
class Reference:
    weights: StateDict
    sizes: Sizes

    def image_features(self, image: Tensor) -> Tensor:
        w, s, root = self.weights, self.sizes, "img_encoder.vit."

        def affine(name: str, x: Tensor) -> Tensor:
            return x @ w[f"{root}{name}.weight"].T + w[f"{root}{name}.bias"]

        def norm(name: str, x: Tensor) -> Tensor:
            return normed(x, w[f"{root}{name}.weight"], w[f"{root}{name}.bias"])

        patches = [
            image[:, row : row + PATCH, column : column + PATCH].permute(1, 2, 0).flatten()
            for row in range(0, image.shape[1], PATCH)
            for column in range(0, image.shape[2], PATCH)
        ]
        x = affine("to_patch_embedding.2", norm("to_patch_embedding.1", torch.stack(patches)))
        x = norm("to_patch_embedding.3", x)
        if s.simple:
            x = x + torch.stack([self._place(index // GRID, index % GRID) for index in range(GRID**2)])
        else:
            x = torch.cat((w[f"{root}cls_token"], x)) + w[f"{root}pos_embedding"]
        for index in range(s.vit_depth):
            layer = f"transformer.layers.{index}."
            queries, keys, values = (norm(f"{layer}0.norm", x) @ w[f"{root}{layer}0.to_qkv.weight"].T).chunk(3, dim=1)
            heads = zip(*(part.split(s.vit_dim_head, dim=1) for part in (queries, keys, values)), strict=True)
            attended = torch.cat([mixed(*head) for head in heads], dim=1)
            if s.simple:
                attended = attended @ w[f"{root}{layer}0.to_out.weight"].T
            elif f"{root}{layer}0.to_out.0.weight" in w:
                attended = affine(f"{layer}0.to_out.0", attended)
            x = x + attended
            hidden = affine(f"{layer}1.net.1", norm(f"{layer}1.net.0", x))
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + affine(f"{layer}1.net.{3 if s.simple else 4}", hidden)
        return norm("transformer.norm", x)

    def _place(self, row: int, column: int) -> Tensor:
        quarter = self.sizes.image_dim // 4
        # They are made in float32, whatever the type of the weights.
        steps = torch.arange(quarter) / (quarter - 1)
        column_angles, row_angles = (place * (1.0 / 10_000**steps) for place in (column, row))
        parts = (column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos())
        return torch.cat(parts).double()

    def pooled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The image vector (D,) and the image tokens (Q, D)."""
        w = self.weights
        context = normed(features, w["img_attn_pool.context_norm.gamma"])
        x = self._look("img_attn_pool.", normed(w["img_queries"], w["img_attn_pool.norm.gamma"]), context)
        x = normed(x, w["img_attn_pool_norm.gamma"])
        return x[0], x[1:]

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (T,), 0 = padding -> the [CLS] vector (D,), which does not see padding, and the states (T, D)."""
        w = self.weights
        x = torch.cat((w["token_emb.weight"][ids], w["text_cls_token"][None]))
        visible = torch.ones(len(x), len(x)).tril().bool()
        visible[-1, :-1] = ids != 0
        for index in range(self.sizes.unimodal_depth):
            x = self._self_block(f"unimodal_layers.{index}.fn.", x, visible)
        return normed(x[-1], w["text_cls_norm.gamma"]), x[:-1]

    def logits(self, states: Tensor, image_tokens: Tensor) -> Tensor:
        w, x = self.weights, states
        visible = torch.ones(len(x), len(x)).tril().bool()
        for index in range(self.sizes.multimodal_depth):
            x = self._self_block(f"multimodal_layers.{index}.0.fn.", x, visible)
            name = f"multimodal_layers.{index}.1.fn."
            inputs = normed(x, w[f"{name}norm.gamma"])
            mlp = gated(inputs @ w[f"{name}ff.0.weight"].T) @ w[f"{name}ff.2.weight"].T
            x = x + self._look(name, inputs, image_tokens) + mlp
        return normed(x, w["to_logits.0.gamma"]) @ w["token_emb.weight"].T

    def loss(self, texts: Tensor, images: Tensor) -> Tensor:
        """The sum of their two losses: [CLS] and the words see all columns but the last."""
        w, word_losses, latents = self.weights, [], []
        for ids, image in zip(texts, images, strict=True):
            cls, states = self.text(ids[:-1])
            vector, tokens = self.pooled(self.image_features(image))
            log_probs = self.logits(states, tokens).log_softmax(dim=1)
            word_losses += [-log_probs[t, label] for t, label in enumerate(ids[1:].tolist()) if label != 0]
            pair = (w["text_to_latents.to_latents.weight"] @ cls, w["img_to_latents.to_latents.weight"] @ vector)
            latents.append([vector / vector.norm() for vector in pair])
        text_latents, image_latents = (torch.stack(rows) for rows in zip(*latents, strict=True))
        similar = text_latents @ image_latents.T * w["temperature"].exp()
        both = similar.log_softmax(dim=1).diagonal() + similar.log_softmax(dim=0).diagonal()
        return torch.stack(word_losses).mean() - both.mean() / 2

    def _self_block(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        w, s = self.weights, self.sizes
        inner, d = s.heads * s.dim_head, s.dim_head
        fused = normed(x, w[f"{name}norm.gamma"]) @ w[f"{name}fused_attn_ff_proj.weight"].T
        queries, key, value, hidden = fused.split((inner, d, d, fused.shape[1] - inner - 2 * d), dim=1)
        frequencies = w[f"{name}rotary_emb.inv_freq"]
        heads = [mixed(turned(q, frequencies), turned(key, frequencies), value, visible) for q in queries.split(d, 1)]
        attended = torch.cat(heads, dim=1) @ w[f"{name}attn_out.weight"].T
        return x + attended + gated(hidden) @ w[f"{name}ff_out.1.weight"].T

    def _look(self, name: str, inputs: Tensor, context: Tensor) -> Tensor:
        w, d = self.weights, self.sizes.dim_head
        key, value = (context @ w[f"{name}to_kv.weight"].T).chunk(2, dim=1)
        heads = [mixed(q, key, value) for q in (inputs @ w[f"{name}to_q.weight"].T).split(d, 1)]
        return torch.cat(heads, dim=1) @ w[f"{name}to_out.weight"].T


# --- the converted model ---


def load(state_dict: StateDict, sizes: Sizes) -> CoCa:
    size = GRID * PATCH if sizes.simple else None
    return lucidrains.load_lucidrains(
        state_dict, image_size=size, image_head_dim=sizes.vit_dim_head, context_length=CONTEXT
    )


def make_batch(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts (4, 9) of 9, 4, 1 and 8 words, padded with 0; their mask; images."""
    lengths = torch.tensor([9, 4, 1, 8])
    mask = torch.arange(9) < lengths[:, None]
    texts = torch.randint(1, num_tokens, (4, 9)) * mask
    return texts, mask, torch.randn(4, 3, GRID * PATCH, GRID * PATCH, dtype=torch.float64)


def their_loss(model: CoCa, texts: Tensor, mask: Tensor, images: Tensor) -> Tensor:
    """As docs/migration.md has it: their [CLS] stands behind all columns but the last."""
    output = model(images, texts, mask)
    text = model.encode_text(texts[:, :-1], mask[:, :-1])
    caption = captioning_loss(output.hidden, output.next_ids, model.lm_head.weight)
    return caption + contrastive_loss(output.image_embed, text.embed, output.logit_scale)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("name", SIZES)
def test_logits_embeddings_and_loss_are_those_of_the_reference(name: str):
    sizes = SIZES[name]
    state_dict = make_state_dict(sizes)
    reference, model = Reference(state_dict, sizes), load(state_dict, sizes)
    texts, mask, images = make_batch(sizes.num_tokens)
    pooled = model.image_pooling(model.image_encoder(images))
    cls = model.unimodal_decoder(texts, mask).cls
    logits = model.logits(images, texts, mask)
    for row in range(4):
        expected_cls, states = reference.text(texts[row])
        vector, tokens = reference.pooled(reference.image_features(images[row]))
        assert relative(pooled.vector[row], vector) < 1e-9
        assert relative(pooled.tokens[row], tokens) < 1e-9
        assert relative(cls[row], expected_cls) < 1e-9
        length = int(mask[row].sum())
        assert relative(logits[row, :length], reference.logits(states, tokens)[:length]) < 1e-9
        latent = state_dict["text_to_latents.to_latents.weight"] @ expected_cls
        assert relative(model.encode_text(texts, mask).embed[row], latent / latent.norm()) < 1e-9
        latent = state_dict["img_to_latents.to_latents.weight"] @ vector
        assert relative(model.encode_image(images).embed[row], latent / latent.norm()) < 1e-9
    loss = their_loss(model, texts, mask, images)
    assert relative(loss, reference.loss(texts, images)) < 1e-9


def test_float32_stays_within_1e_4():
    sizes = SIZES["as published"]
    state_dict = make_state_dict(sizes)
    texts, mask, images = make_batch(sizes.num_tokens)
    wide, narrow = load(state_dict, sizes), load({name: t.float() for name, t in state_dict.items()}, sizes)
    assert narrow.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(
        narrow.logits(images.float(), texts, mask).double(), wide.logits(images, texts, mask), atol=1e-4, rtol=0
    )
    for ours, theirs in ((narrow.encode_text(texts, mask), wide.encode_text(texts, mask)),):
        torch.testing.assert_close(ours.embed.double(), theirs.embed, atol=1e-4, rtol=0)


def test_gradients_are_those_of_the_reference():
    sizes = SIZES["as published"]
    state_dict = make_state_dict(sizes)
    pairs = {
        "img_queries": "image_pooling.poolers.pooler.query",
        "text_cls_token": "unimodal_decoder.cls_embed",
        "temperature": "log_logit_scale",
        "multimodal_layers.1.1.fn.ff.0.weight": "multimodal_decoder.layers.1.cross_block.mlp.up_proj.weight",
        "img_encoder.vit.transformer.layers.0.1.net.1.weight": "image_encoder.stages.1.mlp.up_proj.weight",
    }
    model = load(state_dict, sizes).train()
    texts, mask, images = make_batch(sizes.num_tokens)
    leaves = {name: tensor.requires_grad_(name in pairs) for name, tensor in state_dict.items()}
    Reference(leaves, sizes).loss(texts, images).backward()
    their_loss(model, texts, mask, images).backward()
    parameters = dict(model.named_parameters())
    for theirs, ours in pairs.items():
        expected, found = leaves[theirs].grad, parameters[ours].grad
        assert expected is not None
        assert found is not None
        assert relative(found, expected.reshape(found.shape)) < 1e-9


def test_cls_stands_behind_the_padding_and_does_not_see_it():
    sizes = SIZES["as published"]
    state_dict = make_state_dict(sizes)
    model = load(state_dict, sizes)
    ids = torch.randint(1, sizes.num_tokens, (1, 5))
    embeds = {}
    for columns in (5, 7, 12):
        padded = torch.nn.functional.pad(ids, (0, columns - 5))
        embeds[columns] = model.unimodal_decoder(padded, padded != 0).cls[0]
        assert relative(embeds[columns], Reference(state_dict, sizes).text(padded[0])[0]) < 1e-9
    assert relative(embeds[7], embeds[5]) > 1e-3


def test_cached_decoding_gives_the_same_logits():
    sizes = SIZES["many heads, SimpleViT"]
    model = load(make_state_dict(sizes), sizes)
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    ids = torch.randint(1, sizes.num_tokens, (2, 6))
    with torch.no_grad():
        session = DecodingSession(model)
        state = session.start(model.encode_image(images).tokens)
        steps = [session.step(ids[:, t : t + 1], state) for t in range(6)]
        assert relative(torch.stack(steps, dim=1), model.logits(images, ids)) < 1e-9


def test_configuration_is_read_from_the_tensors_and_survives_storing():
    for sizes in SIZES.values():
        config = load(make_state_dict(sizes), sizes).config
        assert CoCaConfig.from_dict(config.to_dict()) == config
        assert (config.text.num_heads, config.text.head_dim) == (sizes.heads, sizes.dim_head)
        assert config.text.mlp_width == sizes.ff_mult * sizes.dim
        assert config.pooler.num_queries == sizes.num_img_queries + 1
        assert (config.text.unimodal_depth, config.text.multimodal_depth) == (
            sizes.unimodal_depth,
            sizes.multimodal_depth,
        )
        assert config.embed_dim == sizes.dim_latents
        assert config.image.image_size == (GRID * PATCH, GRID * PATCH)
        assert (config.image.num_heads, config.compat.image_class_token) == (
            sizes.vit_heads,
            sizes.class_token and not sizes.simple,
        )


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_files_give_what_the_state_dict_gives(tmp_path, ending: str):
    sizes = SIZES["as published"]
    state_dict = make_state_dict(sizes)
    file = tmp_path / f"weights.{ending}"
    if ending == "pt":
        torch.save({"state_dict": {f"module.{name}": t for name, t in state_dict.items()}, "epoch": 3}, file)
    else:
        # A file of this format cannot hold one tensor twice.
        save_file({name: t for name, t in state_dict.items() if name != "to_logits.1.weight"}, file)
    texts, mask, images = make_batch(sizes.num_tokens)
    stored = lucidrains.load_lucidrains(file, image_head_dim=sizes.vit_dim_head)
    expected = load(state_dict, sizes).logits(images, texts, mask)
    assert relative(stored.logits(images, texts, mask), expected) < 1e-12


def test_a_converted_model_can_be_stored_and_read_again(tmp_path):
    sizes = Sizes(num_tokens=300)
    model = load({name: t.float() for name, t in make_state_dict(sizes).items()}, sizes)
    tokenizer = train_tokenizer(["a dog runs", "a cat sleeps", "a dog sleeps"], 265)
    save_model_folder(tmp_path / "model", model, tokenizer, PreprocessConfig(image_size=(GRID * PATCH, GRID * PATCH)))
    again = load_model_folder(tmp_path / "model").model
    texts, mask, images = make_batch(sizes.num_tokens)
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert relative(again.logits(images.float(), texts, mask), model.logits(images.float(), texts, mask)) < 1e-5


def test_the_model_has_memory_of_its_own():
    sizes = SIZES["as published"]
    state_dict = make_state_dict(sizes)
    before = {name: tensor.clone() for name, tensor in state_dict.items()}
    model = load(state_dict, sizes)
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(storages)) == len(storages)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_dict.items())


# --- an encoder that is handed over ---


class Encoder(nn.Module):
    """Mean colour of each of four quarters, projected."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(3, width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2))


def test_a_module_that_is_handed_over_is_filled_and_used():
    sizes = SIZES["as published"]
    state_dict = make_state_dict(sizes, encoder=False)
    trained = Encoder(sizes.image_dim).double()
    texts, mask, images = make_batch(sizes.num_tokens)
    reference = Reference(state_dict, sizes)
    expected = torch.stack([reference.pooled(features)[0] for features in trained(images)])

    as_it_is = lucidrains.load_lucidrains(state_dict, image_encoder=trained)
    assert relative(as_it_is.image_pooling(as_it_is.image_encoder(images)).vector, expected) < 1e-9
    stored = {f"img_encoder.{name}": tensor for name, tensor in trained.state_dict().items()}
    filled = lucidrains.load_lucidrains(state_dict | stored, image_encoder=Encoder(sizes.image_dim).double())
    assert relative(filled.image_pooling(filled.image_encoder(images)).vector, expected) < 1e-9
    assert torch.equal(filled.logits(images, texts, mask), as_it_is.logits(images, texts, mask))
    assert any(parameter is trained.proj.weight for parameter in as_it_is.parameters())


def test_an_encoder_of_another_width_is_an_error_that_says_so():
    sizes = SIZES["as published"]
    model = lucidrains.load_lucidrains(make_state_dict(sizes, encoder=False), image_encoder=Encoder(7).double())
    with pytest.raises(
        ValueError, match=r"Encoder gives an output of shape \(4, 4, 7\) and not \(batch, positions, 20"
    ):
        model.encode_image(make_batch(sizes.num_tokens)[2])


def test_a_custom_encoder_must_be_handed_over_and_no_other_may():
    sizes = SIZES["as published"]
    state_dict = make_state_dict(sizes, encoder=False)
    with pytest.raises(ValueError, match="no image encoder; hand yours over"):
        lucidrains.load_lucidrains(state_dict)
    config = lucidrains.load_lucidrains(state_dict, image_encoder=Encoder(sizes.image_dim)).config
    assert config.image.name == "custom"
    with pytest.raises(ValueError, match="image_encoder, a module, is missing"):
        CoCa(config)
    with pytest.raises(ValueError, match="only the image encoder 'custom' takes one"):
        CoCa(CoCaConfig.named("tiny"), image_encoder=Encoder(20))


# --- what does not fit ---


def broken(change: str, name: str, tensor: Tensor | None = None) -> StateDict:
    state_dict = make_state_dict(SIZES["as published"])
    if change == "drop":
        del state_dict[name]
    elif change == "put":
        assert tensor is not None
        state_dict[name] = tensor
    elif change == "shape":
        state_dict[name] = state_dict[name][..., :-1]
    else:
        state_dict[name].view(-1)[-1] = math.nan
    return state_dict


NAMES = [
    "token_emb.weight",
    "temperature",
    "img_queries",
    "img_attn_pool.to_kv.weight",
    "img_attn_pool.context_norm.gamma",
    "text_to_latents.to_latents.weight",
    "unimodal_layers.1.fn.fused_attn_ff_proj.weight",
    "multimodal_layers.0.0.fn.norm.gamma",
    "multimodal_layers.1.1.fn.ff.2.weight",
    "img_encoder.vit.to_patch_embedding.2.weight",
    "img_encoder.vit.transformer.layers.1.1.net.4.weight",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["drop", "nan"])
def test_missing_and_not_finite_tensors_are_named(name: str, change: str):
    part = name if change == "nan" else name.split(".weight")[0]
    with pytest.raises(ValueError, match=part.replace(".", r"\.")):
        load(broken(change, name), SIZES["as published"])


@pytest.mark.parametrize(
    "name",
    [
        "text_cls_token",
        "text_cls_norm.gamma",
        "img_attn_pool.to_out.weight",
        "unimodal_layers.1.fn.attn_out.weight",
        "multimodal_layers.1.0.fn.fused_attn_ff_proj.weight",
        "img_encoder.vit.transformer.layers.0.0.to_qkv.weight",
    ],
)
def test_tensors_of_another_shape_are_named(name: str):
    with pytest.raises(
        ValueError, match=rf"{name} has shape \(.*where \(.*\) is expected".replace(".weight", r"\.weight")
    ):
        load(broken("shape", name), SIZES["as published"])


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("unimodal_layers.0.fn.extra", torch.zeros(3), "1 tensors that the model has no place for: unimodal_layers.0"),
        ("text_cls_norm.beta", torch.full((24,), 0.1), "text_cls_norm.beta is not zero"),
        ("unimodal_layers.1.fn.rotary_emb.inv_freq", torch.ones(4), "inv_freq are not the frequencies"),
        ("temperature", torch.tensor([1000.0]), "temperature is 1000"),
        ("img_attn_pool.to_kv.weight", torch.zeros(1, 20), "not heads of width 0"),
        ("img_encoder.vit.transformer.layers.7.0.norm.weight", torch.zeros(20), "no tensor img_encoder.vit.*layers.2"),
    ],
)
def test_what_cannot_be_is_an_error(name: str, tensor: Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        load(broken("put", name, tensor), SIZES["as published"])


def test_a_simple_vit_needs_an_image_size_and_other_encoders_a_module():
    sizes = SIZES["many heads, SimpleViT"]
    with pytest.raises(ValueError, match="give image_size"):
        lucidrains.load_lucidrains(make_state_dict(sizes), image_head_dim=sizes.vit_dim_head)
    foreign = make_state_dict(sizes, encoder=False) | {"img_encoder.conv.weight": torch.zeros(3, 3, 1, 1)}
    with pytest.raises(ValueError, match=r"no ViT or SimpleViT .* hand the encoder over"):
        lucidrains.load_lucidrains(foreign)


# --- the package itself ---


def build_peer(dtype: torch.dtype, kind: str, **changes: int) -> nn.Module:
    """Their CoCa with an encoder of vit_pytorch, every parameter moved away from its neutral start."""
    from coca_pytorch.coca_pytorch import CoCa as TheirCoCa
    from vit_pytorch import ViT
    from vit_pytorch.extractor import Extractor
    from vit_pytorch.simple_vit import SimpleViT
    from vit_pytorch.simple_vit_with_patch_dropout import SimpleViT as SimpleViTWithPatchDropout

    encoder = {"vit": ViT, "simple": SimpleViT, "patch dropout": SimpleViTWithPatchDropout}[kind](
        image_size=32, patch_size=8, num_classes=10, dim=40, depth=2, heads=3, dim_head=16, mlp_dim=56
    )
    extractor = Extractor(encoder, return_embeddings_only=True, detach=False)
    options = {"dim": 64, "num_tokens": 300, "unimodal_depth": 2, "multimodal_depth": 2, "heads": 4, "dim_head": 16}
    peer = TheirCoCa(img_encoder=extractor, image_dim=40, **(options | changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return peer


@pytest.mark.peers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vit", {}),
        ("simple", {"dim": 48, "heads": 3, "dim_head": 32, "num_img_queries": 9, "ff_mult": 2}),
        ("patch dropout", {"unimodal_depth": 3, "multimodal_depth": 1, "dim_latents": 24, "num_img_queries": 1}),
        ("vit", {"heads": 1, "dim_head": 8, "ff_mult": 1, "num_img_queries": 33}),
    ],
)
@pytest.mark.parametrize(("batch_size", "columns"), [(4, 20), (1, 2), (3, 77)])
def test_equal_to_the_package(dtype, tolerance, kind, changes, batch_size, columns):
    theirs = build_peer(dtype, kind, **changes)
    ours = lucidrains.load_lucidrains(theirs.state_dict(), image_size=32, image_head_dim=16)
    lengths = torch.randint(2, columns + 1, (batch_size, 1))
    mask = torch.arange(columns) < lengths
    texts = torch.randint(1, 300, (batch_size, columns)) * mask
    images = torch.randn(batch_size, 3, 32, 32, dtype=dtype)
    with torch.no_grad():
        logits = theirs(text=texts, images=images)
        text_embeds, image_embeds = theirs(text=texts, images=images, return_embeddings=True)
        loss = theirs(text=texts, images=images, return_loss=True)
        pooled, text = ours.image_pooling(ours.image_encoder(images)), ours.unimodal_decoder(texts, mask)
        pairs = {
            "logits": (ours.logits(images, texts, mask)[mask[:, : lengths.max()]], logits[mask]),
            "text_embeds": (text.cls, text_embeds),
            "image_embeds": (pooled.vector, image_embeds),
            "text latents": (ours.encode_text(texts, mask).embed, theirs.text_to_latents(text_embeds)),
            "image latents": (ours.encode_image(images).embed, theirs.img_to_latents(image_embeds)),
            "loss": (their_loss(ours, texts, mask, images), loss),
        }
    for name, (found, expected) in pairs.items():
        scale = 1.0 if dtype == torch.float32 else expected.abs().max()
        assert float((found - expected).abs().max() / scale) <= tolerance, name
    assert float(ours.logit_scale) == pytest.approx(float(theirs.temperature.exp()), rel=1e-6)


@pytest.mark.peers
def test_their_encoder_as_a_module_gives_the_same():
    theirs = build_peer(torch.float64, "vit")
    ours = lucidrains.load_lucidrains(theirs.state_dict(), image_encoder=build_peer(torch.float64, "vit").img_encoder)
    texts, images = torch.randint(1, 300, (2, 6)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative(ours.logits(images, texts), theirs(text=texts, images=images)) < 1e-9
