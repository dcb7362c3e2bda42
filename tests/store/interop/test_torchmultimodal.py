"""torchmultimodal's weights against a written-out float64 reference of them, and (marker peers) the package."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.store.interop import torchmultimodal

StateDict = dict[str, Tensor]
WIDTH, IMAGE_WIDTH, VOCAB, COLUMNS, PATCH, GRID, DEPTH = 16, 12, 23, 9, 4, 2, 2
TEXT_MLP, FUSION_MLP, IMAGE_MLP = 20, 28, 18
HEADS = {"num_heads": 2, "multimodal_num_heads": 4, "image_num_heads": 3, "pooler_num_heads": 2}


def make_state_dict(cascade: bool = True, class_token: bool = False, final_norm: bool = False) -> StateDict:
    tensors: StateDict = {}

    def put(name: str, *shape: int, scale: float = 1.0) -> None:
        tensors[name] = scale * torch.randn(shape, dtype=torch.float64)

    def affine(name: str, *shape: int) -> None:
        put(f"{name}.weight", *shape, scale=shape[-1] ** -0.5)
        put(f"{name}.bias", shape[0], scale=0.3)

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, dtype=torch.float64)
        put(f"{name}.bias", width, scale=0.3)

    def attention(name: str, context_width: int) -> None:
        for part, columns in (("q", WIDTH), ("k", context_width), ("v", context_width), ("output", WIDTH)):
            affine(f"{name}.{part}_proj", WIDTH, columns)

    def mlp(name: str, width: int, hidden: int, down: int = 2) -> None:
        affine(f"{name}.model.0", hidden, width)
        affine(f"{name}.model.{down}", width, hidden)

    put("vision_encoder.embeddings.position_embeddings", 1, GRID**2 + class_token, IMAGE_WIDTH)
    affine("vision_encoder.embeddings.conv_projection", IMAGE_WIDTH, 3, PATCH, PATCH)
    if class_token:
        put("vision_encoder.embeddings.cls_token", 1, 1, IMAGE_WIDTH)
    for index in range(DEPTH):
        layer = f"vision_encoder.encoder.layer.{index}."
        affine(f"{layer}attention.input_proj", 3 * IMAGE_WIDTH, IMAGE_WIDTH)
        affine(f"{layer}attention.output_proj", IMAGE_WIDTH, IMAGE_WIDTH)
        mlp(f"{layer}feedforward", IMAGE_WIDTH, IMAGE_MLP, down=3)
        norm(f"{layer}attention_layernorm", IMAGE_WIDTH)
        norm(f"{layer}feedforward_layernorm", IMAGE_WIDTH)
    if final_norm:
        norm("vision_encoder.encoder.final_layer_norm", IMAGE_WIDTH)
    poolers = {".poolers.0": (4, IMAGE_WIDTH), ".poolers.1": (1, WIDTH)} if cascade else {"": (5, IMAGE_WIDTH)}
    for name, (queries, context_width) in poolers.items():
        put(f"vision_pooler{name}.query", queries, WIDTH)
        norm(f"vision_pooler{name}.ln_q", WIDTH)
        norm(f"vision_pooler{name}.ln_k", context_width)
        norm(f"vision_pooler{name}.ln_post", WIDTH)
        attention(f"vision_pooler{name}.attn", context_width)
    put("vision_proj.weight", WIDTH, WIDTH)
    put("text_decoder.embeddings.token_embeddings.weight", VOCAB, WIDTH)
    put("text_decoder.embeddings.position_embeddings", COLUMNS + 1, WIDTH)
    put("text_decoder.embeddings.cls_embedding", WIDTH)
    norm("text_decoder.ln_final", WIDTH)
    put("text_decoder.text_projection.weight", WIDTH, WIDTH)
    for half, hidden in (("text_decoder", TEXT_MLP), ("multimodal_decoder", FUSION_MLP)):
        for index in range(DEPTH):
            layer = f"{half}.transformer_decoder.layer.{index}."
            attention(f"{layer}attention", WIDTH)
            mlp(f"{layer}feedforward", WIDTH, hidden)
            norm(f"{layer}attention_layernorm", WIDTH)
            norm(f"{layer}feedforward_layernorm", WIDTH)
            if half == "multimodal_decoder":
                attention(f"{layer}cross_attention", WIDTH)
                norm(f"{layer}cross_attention_layernorm", WIDTH)
    norm("multimodal_decoder.transformer_decoder.final_layer_norm", WIDTH)
    put("multimodal_decoder.output_projection.weight", VOCAB, WIDTH)
    return tensors


@dataclass(frozen=True)
class Reference:
    """What their modules compute, one text and one image at a time."""

    weights: StateDict

    def affine(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].flatten(1).T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def attention(self, name: str, x: Tensor, context: Tensor, heads: int, visible: Tensor | None = None) -> Tensor:
        parts = [self.affine(f"{name}.{p}_proj", y) for p, y in (("q", x), ("k", context), ("v", context))]
        return self.affine(f"{name}.output_proj", self.mixed(parts, heads, visible))

    def mixed(self, parts: list[Tensor], heads: int, visible: Tensor | None) -> Tensor:
        out = []
        for q, k, v in zip(*(part.chunk(heads, dim=1) for part in parts), strict=True):
            scores = q @ k.T / math.sqrt(q.shape[1])
            scores = scores if visible is None else scores.masked_fill(~visible, -math.inf)
            out.append(scores.softmax(dim=1) @ v)
        return torch.cat(out, dim=1)

    def mlp(self, name: str, x: Tensor, down: int = 2) -> Tensor:
        return self.affine(f"{name}.model.{down}", F.gelu(self.affine(f"{name}.model.0", x)))

    def image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The image embedding (E,) and the image tokens (Q, D)."""
        w, root = self.weights, "vision_encoder."
        places = [(r * PATCH, c * PATCH) for r in range(GRID) for c in range(GRID)]
        patches = torch.stack([image[:, r : r + PATCH, c : c + PATCH].flatten() for r, c in places])
        x = self.affine(f"{root}embeddings.conv_projection", patches)
        if f"{root}embeddings.cls_token" in w:
            x = torch.cat((w[f"{root}embeddings.cls_token"][0], x))
        x = x + w[f"{root}embeddings.position_embeddings"][0]
        for index in range(DEPTH):
            layer = f"{root}encoder.layer.{index}."
            fused = self.affine(f"{layer}attention.input_proj", self.norm(f"{layer}attention_layernorm", x))
            mixed = self.mixed(list(fused.chunk(3, dim=1)), HEADS["image_num_heads"], None)
            x = x + self.affine(f"{layer}attention.output_proj", mixed)
            x = x + self.mlp(f"{layer}feedforward", self.norm(f"{layer}feedforward_layernorm", x), down=3)
        if f"{root}encoder.final_layer_norm.weight" in w:
            x = self.norm(f"{root}encoder.final_layer_norm", x)
        if "vision_pooler.query" in w:
            pooled = self.pool("vision_pooler", x)
            vector, tokens = pooled[0], pooled[1:]
        else:
            tokens = self.pool("vision_pooler.poolers.0", x)
            vector = self.pool("vision_pooler.poolers.1", tokens)[0]
        return F.normalize(w["vision_proj.weight"] @ vector, dim=0), tokens

    def pool(self, name: str, x: Tensor) -> Tensor:
        queries = self.norm(f"{name}.ln_q", self.weights[f"{name}.query"])
        context = self.norm(f"{name}.ln_k", x)
        return self.norm(f"{name}.ln_post", self.attention(f"{name}.attn", queries, context, HEADS["pooler_num_heads"]))

    def text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (COLUMNS,), 0 = padding -> the text embedding (E,) and the states (COLUMNS, D)."""
        w, root = self.weights, "text_decoder."
        rows = (w[f"{root}embeddings.token_embeddings.weight"][ids], w[f"{root}embeddings.cls_embedding"][None])
        x = torch.cat(rows) + w[f"{root}embeddings.position_embeddings"]
        visible = torch.ones(len(x), len(x)).tril().bool()
        # Whether [CLS] sees a position is said by the id before it.
        visible[-1, 1:] = ids != 0
        for index in range(DEPTH):
            x = self.self_attend(f"{root}transformer_decoder.layer.{index}.", x, HEADS["num_heads"], visible)
            x = self.add_mlp(f"{root}transformer_decoder.layer.{index}.", x)
        embed = w[f"{root}text_projection.weight"] @ self.norm(f"{root}ln_final", x[-1])
        return F.normalize(embed, dim=0), x[:-1]

    def logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        x, heads = states, HEADS["multimodal_num_heads"]
        visible = torch.ones(len(x), len(x)).tril().bool()
        for index in range(DEPTH):
            layer = f"multimodal_decoder.transformer_decoder.layer.{index}."
            x = self.self_attend(layer, x, heads, visible)
            queries = self.norm(f"{layer}cross_attention_layernorm", x)
            x = self.add_mlp(layer, x + self.attention(f"{layer}cross_attention", queries, tokens, heads))
        x = self.norm("multimodal_decoder.transformer_decoder.final_layer_norm", x)
        return x @ self.weights["multimodal_decoder.output_projection.weight"].T

    def self_attend(self, layer: str, x: Tensor, heads: int, visible: Tensor) -> Tensor:
        inputs = self.norm(f"{layer}attention_layernorm", x)
        return x + self.attention(f"{layer}attention", inputs, inputs, heads, visible)

    def add_mlp(self, layer: str, x: Tensor) -> Tensor:
        return x + self.mlp(f"{layer}feedforward", self.norm(f"{layer}feedforward_layernorm", x))


def make_texts(vocab_size: int, columns: int) -> tuple[Tensor, Tensor]:
    """Texts of 1 word, some, one too few and all words, padded with 0, and their mask."""
    lengths = torch.tensor([1, columns // 2, columns - 1, columns])
    mask = torch.arange(columns) < lengths[:, None]
    return torch.randint(1, vocab_size, (4, columns)) * mask, mask


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize(
    "options", [{}, {"cascade": False}, {"class_token": True, "final_norm": True}], ids=["cascade", "shared", "class"]
)
def test_logits_and_embeddings_are_those_of_the_reference(options: dict[str, bool]):
    state_dict = make_state_dict(**options)
    model, reference = torchmultimodal.load_torchmultimodal(state_dict, **HEADS), Reference(state_dict)
    texts, mask = make_texts(VOCAB, COLUMNS)
    images = torch.randn(4, 3, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    logits = model.logits(images, texts, mask)
    image, text = model.encode_image(images), model.encode_text(texts, mask)
    for row in range(4):
        image_embed, tokens = reference.image(images[row])
        text_embed, states = reference.text(texts[row])
        assert relative(image.embed[row], image_embed) < 1e-9
        assert relative(image.tokens[row], tokens) < 1e-9
        assert relative(text.embed[row], text_embed) < 1e-9
        length = int(mask[row].sum())
        assert relative(logits[row, :length], reference.logits(states, tokens)[:length]) < 1e-9


def test_configuration_is_read_from_the_tensors_and_survives_storing():
    config = torchmultimodal.load_torchmultimodal(make_state_dict(class_token=True), **HEADS).config
    assert CoCaConfig.from_dict(config.to_dict()) == config
    assert (config.pooler.arrangement, config.pooler.num_queries) == ("cascade", 4)
    assert (config.text.context_length, config.text.mlp_width, config.compat.text_multimodal_mlp_width) == (9, 20, 28)
    assert (config.compat.image_class_token, config.compat.image_final_norm) == (True, False)
    assert config.image.image_size == (GRID * PATCH, GRID * PATCH)


def test_weights_of_pretraining_bring_their_temperature():
    state_dict = {f"model.{name}": tensor for name, tensor in make_state_dict().items()}
    state_dict["contrastive_loss.logit_scale"] = torch.tensor(3.0, dtype=torch.float64)
    model = torchmultimodal.load_torchmultimodal(state_dict, **HEADS)
    assert float(model.logit_scale) == pytest.approx(math.exp(3.0))
    assert float(torchmultimodal.load_torchmultimodal(make_state_dict(), **HEADS).logit_scale) == pytest.approx(
        1 / 0.07
    )
    with pytest.raises(ValueError, match=r"no place for: model\.vision_proj\.weight"):
        torchmultimodal.load_torchmultimodal(state_dict | {"vision_proj.weight": torch.zeros(16, 16)}, **HEADS)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("vision_pooler.poolers.1.ln_q.bias", None, "no tensor vision_pooler.poolers.1.ln_q.bias"),
        ("multimodal_decoder.output_projection.weight", None, "no words can be predicted"),
        ("vision_proj.weight", torch.zeros(3, 3), r"vision_proj.weight has shape \(3, 3\), where \(16, 16\)"),
        ("text_decoder.extra", torch.zeros(1), "1 tensors that the model has no place for: text_decoder.extra"),
        ("text_decoder.ln_final.weight", torch.full((16,), math.nan), "text_decoder.ln_final.weight holds numbers"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_tensor(name: str, change: Tensor | None, words: str):
    state_dict = make_state_dict()
    if change is None:
        del state_dict[name]
    else:
        state_dict[name] = change
    with pytest.raises(ValueError, match=words):
        torchmultimodal.load_torchmultimodal(state_dict, **HEADS)


# --- the package itself ---


def build_peer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **changes: object) -> nn.Module:
    """Their pretraining model, every parameter moved away from its neutral start."""
    from torchmultimodal.models.coca.coca_model import coca_for_pretraining  # pyright: ignore[reportMissingImports]
    from torchmultimodal.modules.layers.normalizations import Fp32LayerNorm  # pyright: ignore[reportMissingImports]

    # Their norms compute in float32 whatever the type, which would hide what float64 is to show.
    monkeypatch.setattr(Fp32LayerNorm, "forward", nn.LayerNorm.forward)
    options = {
        "vision_patch_size": 8,
        "vision_dim_feedforward": 56,
        "vision_n_layer": 2,
        "vision_n_head": 4,
        "vocab_size": 300,
        "num_text_positions": 21,
        "text_hidden_dim": 32,
        "text_n_layer": 3,
        "text_n_head": 4,
        "text_dim_feedforward": 48,
        "text_output_dim": 32,
        "fusion_n_layer": 2,
        "fusion_n_head": 2,
        "fusion_dim_feedforward": 40,
        "pooler_input_embed_dim": 24,
        "pooler_output_embed_dim": 32,
        "pooler_n_head": 2,
        "image_size": 32,
        "multimodal_output_projection_dim": 300,
        "pooler_n_queries": 5,
    }
    peer = coca_for_pretraining(**(options | changes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return peer


def their_losses(model: CoCa, texts: Tensor, mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """As docs/migration.md has it: the last column is a label alone."""
    image, text = model.encode_image(images), model.encode_text(texts[:, :-1], mask[:, :-1])
    hidden, has_label = model.decode(text.words, image.tokens), mask[:, 1:]
    caption = captioning_loss(hidden[has_label], texts[:, 1:][has_label], model.lm_head.weight)
    return caption, contrastive_loss(image.embed, text.embed, model.logit_scale)


@pytest.mark.peers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cascaded_pooler": False},
        {"vision_include_cls_embed": True, "vision_final_layer_norm_eps": 1e-5, "fusion_dropout": 0.1},
    ],
    ids=["cascade", "shared", "class token"],
)
def test_equal_to_the_package(dtype, tolerance, changes, monkeypatch):
    theirs = build_peer(dtype, monkeypatch, **changes)
    heads = {"num_heads": 4, "multimodal_num_heads": 2, "image_num_heads": 4, "pooler_num_heads": 2}
    ours = torchmultimodal.load_torchmultimodal(theirs.state_dict(), **heads)
    texts, mask = make_texts(300, 21)
    images = torch.randn(4, 3, 32, 32, dtype=dtype)
    words, is_word = texts[:, :-1], mask[:, :-1]
    with torch.no_grad():
        expected = theirs.model(images, texts)
        pairs = {
            "logits": (ours.logits(images, words, is_word)[is_word], expected.multimodal_embeddings[is_word]),
            "text": (ours.encode_text(words, is_word).embed, expected.text_pooled_output),
            # With two poolers, theirs keeps the dimension of the one query.
            "image": (ours.encode_image(images).embed, expected.image_pooled_output.reshape(4, -1)),
        }
        if "cascaded_pooler" in changes:  # their loss cannot be computed with two poolers
            losses = theirs(images, texts)
            caption, contrastive = their_losses(ours, texts, mask, images)
            pairs |= {"caption": (caption, losses["captioning"]), "pairs": (contrastive, losses["contrastive"])}
    for name, (found, wanted) in pairs.items():
        scale = 1.0 if dtype == torch.float32 else wanted.abs().max()
        assert float((found - wanted).abs().max() / scale) <= tolerance, name
