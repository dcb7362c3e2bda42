"""The description of a network: every parameter is in one part, at the depth that a reader of the picture expects."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import opencoca
from opencoca.model.coca import CoCa
from opencoca.model.encoders.vit import VisionTransformer
from opencoca.model.layers.blocks import TransformerBlock
from opencoca.model.structure import PARTS

KINDS = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "parallel": {"pooler": {"arrangement": "parallel"}, "block": "parallel", "activation": "swiglu"},
    "shared": {"pooler": {"arrangement": "shared"}, "positions": "rotary"},
    "class_token": {"pooler": {"arrangement": "class_token"}, "image": {"class_token": True, "width": 16}},
    "features": {"pooler": {"num_queries": 0}},
    "normed": {"norm_image_tokens": True, "self_attn_mlp": True, "layer_scale": 0.1},
    "efficientnet": {"image": {"name": "efficientnet_lite0"}},
}


@pytest.fixture(params=KINDS)
def model(request, make_model) -> CoCa:
    return make_model(**KINDS[request.param])


def test_every_parameter_is_in_one_part(model):
    structure = model.structure()
    assert tuple(part.name for part in structure.parts) == PARTS
    for name, _ in model.named_parameters():
        owners = [p.name for p in structure.parts if any(f"{name}.".startswith(f"{m}.") for m in p.members)]
        assert owners == [structure.part_of(name)]
    found = [parameter for part in PARTS for parameter in structure.parameters(part)]
    assert sorted(map(id, found)) == sorted(map(id, model.parameters()))


def test_a_custom_encoder_is_a_part(make_config):
    config = make_config(image={"name": "custom", "width": 24})
    structure = CoCa(config, nn.Conv2d(3, 24, 4, 4)).structure()
    assert structure.part_of("image_encoder.stages.0.weight") == "image_encoder"
    assert len(structure.image_encoder.stages) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_counted_from_the_outputs(make_model, tied):
    model = make_model(unimodal_depth=2, multimodal_depth=3, tie_embeddings=tied)
    expected = {
        "image_encoder.stages.0": 3,  # patches, two blocks, the last norm
        "image_encoder.stages.1": 2,
        "image_encoder.stages.2": 1,
        "image_encoder.stages.3": 0,
        "image_pooling": 0,
        "unimodal_decoder.cls_embed": 5,
        "unimodal_decoder.pos_embed": 5,
        "unimodal_decoder.token_embed": 0 if tied else 5,
        "unimodal_decoder.blocks.0": 4,
        "unimodal_decoder.blocks.1": 3,
        "unimodal_decoder.norm": 0,
        "multimodal_decoder.layers.0": 2,
        "multimodal_decoder.layers.1": 1,
        "multimodal_decoder.layers.2": 0,
        "multimodal_decoder.norm": 0,
        "lm_head": 0,
        "image_proj": 0,
        "text_proj": 0,
        "log_logit_scale": 0,
    }
    for name, _ in model.named_parameters():
        (start,) = [start for start in expected if f"{name}.".startswith(f"{start}.")]
        assert model.structure().layers_behind(name) == expected[start], name


def test_matrices_decay_and_tables_do_not(make_model):
    model = make_model()
    decaying = {name for name, p in model.named_parameters() if model.structure().decays(name, p)}
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert decaying == matrices


def test_blocks_are_those_of_the_towers(model):
    structure = model.structure()
    image, text = structure.blocks("image"), structure.blocks("text")
    assert structure.blocks() == [*image, *text]
    every = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    assert structure.blocks() == every
    assert len(text) == 2 + 2 * 2
    assert len(image) == (2 if isinstance(model.image_encoder, VisionTransformer) else 0)


def test_an_inner_unit_is_gathered_before_what_holds_it(model):
    seen: set[nn.Module] = set()
    for unit in model.structure().shard_units():
        inside = {module for member in unit for module in member.modules()}
        assert not seen & set(unit)
        assert all(isinstance(member, nn.Module) for member in unit)
        seen |= inside
    assert set(model.structure().blocks()) <= seen
    assert model.lm_head not in seen


def test_units_of_blocks(make_model):
    structure = make_model(norm_image_tokens=True).structure()
    expected = {
        "image_encoder.stages.0.proj": ("image_encoder.stages.0", False),
        "image_encoder.stages.1.attn.q_proj": ("image_encoder.stages.1", True),
        "image_pooling.poolers.caption_pooler.attn.q_proj": ("image_pooling", False),
        "unimodal_decoder.token_embed": ("unimodal_decoder.token_embed", False),
        "unimodal_decoder.blocks.1.mlp.up_proj": ("unimodal_decoder.blocks.1", True),
        "multimodal_decoder.layers.0.self_block.norm1": ("multimodal_decoder.layers.0.self_block", True),
        "multimodal_decoder.layers.1.cross_block.attn.q_proj": ("multimodal_decoder.layers.1.cross_block", True),
        "multimodal_decoder.layers.1.cross_block.attn.kv_proj": ("image_keys_values", False),
        "multimodal_decoder.layers.1.cross_block.norm_context": ("image_keys_values", False),
        "lm_head": ("lm_head", False),
    }
    for name, (unit, block) in expected.items():
        found = structure.unit_of(name)
        assert (found.name, found.block) == (unit, block), name


@pytest.mark.parametrize(("contrastive", "captioning"), [(True, False), (False, True), (True, True)])
def test_unused_parameters_are_those_without_a_gradient(model, contrastive, captioning):
    images, ids = torch.randn(2, 3, 12, 12), torch.randint(1, 37, (2, 5))
    output = model(images, ids, contrastive=contrastive, captioning=captioning)
    terms = [embed.sum() for embed in (output.image_embed, output.text_embed) if embed is not None]
    terms += [output.logit_scale] if contrastive else []
    terms += [model.word_logits(output.hidden).sum()] if captioning else []
    torch.stack(terms).sum().backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    unused = set(model.unused_parameters(contrastive, captioning))
    assert untouched == {name for name, parameter in model.named_parameters() if parameter in unused}


SOURCES = Path(opencoca.__file__).parent
# Who may know how a network is built: the network, and what reads other projects' weights.
INSIDERS = (SOURCES / "model", SOURCES / "store" / "interop", SOURCES / "assets")
# Names of modules and parameters that nothing else is called.
INNER_NAMES = {
    "unimodal_decoder", "multimodal_decoder", "image_pooling", "image_proj", "text_proj", "lm_head", "log_logit_scale",
    "token_embed", "cls_embed", "pos_embed", "self_block", "cross_block", "attn", "q_proj", "kv_proj", "out_proj",
    "norm1", "norm2", "norm_context", "mlp", "up_proj", "down_proj", "caption_pooler", "contrastive_pooler",
}  # fmt: skip
# These are names of parts as well, or of other things: they are inner names where they are asked of a network.
NETWORK_NAMES = {"image_encoder", "layers", "blocks", "norm", "stages", "query"}
NETWORKS = {"model", "network", "unwrapped", "coca"}


def spelled_paths(source: str) -> list[str]:
    """Where Python source asks for a module inside of a network: attributes, and strings such as ``"lm_head."``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in INNER_NAMES or (node.attr in NETWORK_NAMES and owner in NETWORKS):
                found.append(f"line {node.lineno}: .{node.attr}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
            steps = node.value.split(".")
            if set(steps) & INNER_NAMES and (len(steps) > 1 or node.value not in PARTS):
                found.append(f"line {node.lineno}: {node.value!r}")
    return found


def test_module_paths_are_spelled_in_the_model_alone():
    outside = [file for file in SOURCES.rglob("*.py") if not any(file.is_relative_to(folder) for folder in INSIDERS)]
    assert len(outside) > 100
    spelled = {str(file.relative_to(SOURCES)): spelled_paths(file.read_text(encoding="utf-8")) for file in outside}
    assert not {file: found for file, found in spelled.items() if found}


@pytest.mark.parametrize(
    "line",
    [
        "encoder = model.image_encoder",
        "self.model.image_encoder.stages[:2].eval()",
        "scale = network.log_logit_scale",
        "for layer in self.decoder.cross_block: ...",
        'if name.startswith("lm_head."): ...',
        'path = "image_encoder.contrastive_pooler"',
        'if "cross_block" in name: ...',
    ],
)
def test_a_spelled_path_is_found(line):
    assert spelled_paths(line)
