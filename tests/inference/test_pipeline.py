"""The pipeline equals the model's own parts, whatever form images come in and however they are batched."""

import copy
import inspect
import io
import pydoc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import opencoca
from opencoca.data.images import ImageError
from opencoca.data.transforms import EvalTransform, PreprocessConfig
from opencoca.generation import GenerationOptions, generate
from opencoca.inference import loading
from opencoca.inference.labels import LabelScore
from opencoca.inference.loading import ShippedModel, available_models, load
from opencoca.inference.pipeline import Pipeline
from opencoca.inference.preprocess import Preprocess
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.store.model_folder import save_model_folder
from opencoca.tokenizer import train_tokenizer

NUM_IMAGES = 5
LABELS = ["dog", "cat", "{brown} bird"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer = train_tokenizer(["a brown dog runs over the grass", "a cat sleeps", "a photo of a bird"] * 3, 280)
    config = CoCaConfig(
        embed_dim=24,
        image=ImageEncoderConfig(image_size=(16, 24), patch_size=8, width=24, depth=1, num_heads=2, mlp_width=32),
        pooler=PoolerConfig(num_heads=4, num_queries=5),
        text=TextConfig(
            vocab_size=300,
            context_length=14,
            width=32,
            unimodal_depth=1,
            multimodal_depth=1,
            num_heads=4,
            mlp_width=48,
            tie_embeddings=True,
        ),
    )
    torch.manual_seed(0)
    model = CoCa(config).eval()
    with torch.no_grad():
        model.unimodal_decoder.token_embed.weight.normal_()
    folder = tmp_path_factory.mktemp("model")
    preprocess = PreprocessConfig(image_size=(16, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    save_model_folder(folder, model, tokenizer, preprocess, info={"seed": 0})
    return folder


@pytest.fixture(scope="module")
def pipeline(folder) -> Pipeline:
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    """Pictures of different sizes and shapes."""
    rng = np.random.default_rng(0)
    sizes = [(20, 30), (16, 24), (50, 17), (9, 9), (33, 80)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture(scope="module")
def paths(arrays, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for position, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{position}.png")
    return [folder / f"{position}.png" for position in range(len(arrays))]


def expected_pixels(pipeline: Pipeline, arrays: list[np.ndarray]) -> torch.Tensor:
    transform = EvalTransform(pipeline.preprocess.config)
    return torch.stack([transform(Image.fromarray(array)) for array in arrays])


def test_every_form_of_an_image_is_the_same_image(pipeline, arrays, paths):
    expected = expected_pixels(pipeline, arrays)
    forms = {
        "paths": paths,
        "names": [str(path) for path in paths],
        "bytes": [path.read_bytes() for path in paths],
        "pil": [Image.open(path) for path in paths],
        "arrays": arrays,
        "not contiguous": [np.asfortranarray(array) for array in arrays],
        "floats": [array / 255 for array in arrays],
        "floats between": [np.clip(array - 0.4, 0, 255) / 255 for array in arrays],
        "tensors": [torch.from_numpy(array).movedim(-1, 0) for array in arrays],
        "float tensors": [torch.from_numpy(array).movedim(-1, 0) / 255 for array in arrays],
        "mixed": [paths[0], arrays[1], str(paths[2]), Image.fromarray(arrays[3]), paths[4].read_bytes()],
        "iterator": iter(arrays),
    }
    for name, images in forms.items():
        torch.testing.assert_close(pipeline.preprocess(images), expected, rtol=0, atol=0, msg=name)


def test_one_image_alone_is_a_batch_of_one(pipeline, arrays, paths):
    expected = expected_pixels(pipeline, arrays[:1])
    tensor = torch.from_numpy(arrays[0]).movedim(-1, 0)
    for image in (paths[0], str(paths[0]), paths[0].read_bytes(), Image.open(paths[0]), arrays[0], tensor):
        torch.testing.assert_close(pipeline.preprocess(image), expected, rtol=0, atol=0)
        assert len(pipeline.caption(image)) == 1
    # A batch of equally large images is several of them.
    for batch in (np.stack([arrays[0]] * 3), torch.stack([tensor] * 3)):
        torch.testing.assert_close(pipeline.preprocess(batch), expected.expand(3, -1, -1, -1), rtol=0, atol=0)


def test_grey_is_grey_and_transparent_is_white(pipeline, arrays):
    grey = arrays[0][:, :, 0]
    expected = expected_pixels(pipeline, [np.stack([grey] * 3, axis=-1)])
    for image in (grey, grey / 255, Image.fromarray(grey)):
        torch.testing.assert_close(pipeline.preprocess(image), expected, rtol=0, atol=0)
    clear = Image.new("RGBA", (24, 16), (9, 9, 9, 0))
    white = np.full((16, 24, 3), 255, dtype=np.uint8)
    torch.testing.assert_close(pipeline.preprocess(clear), expected_pixels(pipeline, [white]), rtol=0, atol=0)


def test_an_opened_photo_is_turned_upright_as_its_file_is(pipeline, arrays, tmp_path):
    photo = Image.fromarray(arrays[0])
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    opened = pipeline.preprocess(Image.open(tmp_path / "turned.png"))
    torch.testing.assert_close(opened, pipeline.preprocess(tmp_path / "turned.png"), rtol=0, atol=0)
    torch.testing.assert_close(opened, expected_pixels(pipeline, [np.rot90(arrays[0], -1)]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("nowhere.png", "nowhere.png.*no such file"),
        (b"hello", "number 1 .bytes.*text file"),
        (np.zeros((3, 20, 30), np.uint8), r"number 1 .*\(3, 20, 30\).*must have the shape"),
        (np.zeros((4, 4), np.int64), "number 1 .*int64"),
        (np.full((4, 4, 3), 1.5), r"number 1 .*0\.\.1"),
        (np.full((4, 4, 3), -0.5), r"number 1 .*0\.\.1"),
        (np.full((4, 4, 3), np.nan), r"number 1 .*0\.\.1"),
        (np.zeros((0, 4, 3), np.uint8), "number 1 .*no pixels"),
        (torch.zeros(20, 30, 3), "number 1 .*must have the shape"),
        (torch.zeros(3, 4, 4).int(), "number 1 .*int32"),
        (Image.new("RGB", (0, 5)), "number 1 .*0 x 5"),
        (17, "number 1 .*give a path"),
        (None, "number 1 .*give a path"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_unusable_image_is_named(pipeline, arrays, image, reason):
    with pytest.raises(ImageError, match=reason):
        pipeline.caption([arrays[0], image])
    with pytest.raises(ImageError, match=reason):
        pipeline.preprocess([arrays[0], image])


def test_a_truncated_photo_is_named(pipeline, arrays, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(arrays[4]).resize((200, 200)).save(buffer, "JPEG")
    file = tmp_path / "cut.jpg"
    file.write_bytes(buffer.getvalue()[:2000])
    for image in (file, Image.open(file)):
        with pytest.raises(ImageError, match=r"cut\.jpg"):
            pipeline.embed_images([image])


def test_something_that_is_no_image_is_refused(pipeline):
    with pytest.raises(ValueError, match="17 is no image"):
        pipeline.caption(17)


def test_captions_equal_the_parts(pipeline, arrays, paths):
    with torch.inference_mode():
        tokens = pipeline.model.encode_image(expected_pixels(pipeline, arrays)).tokens
    options = GenerationOptions(max_new_tokens=8, min_new_tokens=2, prefix="a photo")
    expected = generate(pipeline.model, tokens, pipeline.tokenizer, options)
    chosen = {"max_new_tokens": 8, "min_new_tokens": 2, "prefix": "a photo"}
    for batch_size in (1, 2, 5, 100):
        details = pipeline.caption_details(paths, batch_size=batch_size, **chosen)
        assert [own[0].token_ids for own in details] == [own[0].token_ids for own in expected]
        captions = pipeline.caption(paths, batch_size=batch_size, **chosen)
        assert captions == [own[0].text for own in expected]
        assert all(caption.startswith("a photo") for caption in captions)


def test_a_pipeline_keeps_what_decoding_has_made_ready(folder, paths):
    pipeline = load(folder)
    expected, kept = pipeline.caption(paths), pipeline.session._packed
    assert pipeline.caption(paths, num_beams=2, rerank=True)
    assert all(one is other for one, other in zip(pipeline.session._packed, kept, strict=True))
    assert bool(kept) == torch.backends.mkldnn.is_available()
    copied = copy.deepcopy(pipeline)
    assert copied.session.model is copied.model is not pipeline.model
    assert copied.caption(paths) == expected


def test_options_are_an_object_or_keywords_or_both(pipeline, paths):
    options = opencoca.GenerationOptions(num_beams=3, num_captions=2, max_new_tokens=6)
    keywords = {"num_beams": 3, "num_captions": 2, "max_new_tokens": 6}
    expected = pipeline.caption(paths, **keywords)
    assert all(len(own) == 2 for own in expected)
    assert pipeline.caption(paths, options) == expected
    assert pipeline.caption(paths, options, num_captions=1) == [own[0] for own in expected]
    details = pipeline.caption_details(paths, options, max_new_tokens=4)
    assert details == pipeline.caption_details(paths, **{**keywords, "max_new_tokens": 4})
    assert max(caption.length for own in details for caption in own) <= 4
    for call, option, meant in (
        (pipeline.caption, "num_beems", "num_beams"),
        (pipeline.caption, "re_rank", "rerank"),
        (pipeline.caption_details, "batchsize", "batch_size"),
        (pipeline.classify, "template", "templates"),
        (load, "devise", "device"),
        (opencoca.GenerationOptions, "max_tokens", "max_new_tokens"),
    ):
        with pytest.raises(TypeError, match=rf"has no option '{option}'; did you mean {meant}\?"):
            call(**{option: 2})


@pytest.mark.parametrize("name", ["caption", "caption_details"])
def test_help_lists_the_options_of_generation(name):
    method = getattr(Pipeline, name)
    shown = inspect.signature(method).parameters
    fields = inspect.signature(opencoca.GenerationOptions, eval_str=True).parameters
    # num_captions is None where the options decide.
    assert {field: shown[field].default for field in fields if field != "num_captions"} == {
        field: parameter.default for field, parameter in fields.items() if field != "num_captions"
    }
    assert all(shown[field].kind is inspect.Parameter.KEYWORD_ONLY for field in fields)
    assert "repetition_penalty: float = 1.0" in pydoc.render_doc(method)


def test_image_embeddings_equal_the_model(pipeline, arrays):
    with torch.inference_mode():
        expected = pipeline.model.encode_image(expected_pixels(pipeline, arrays)).embed
    for batch_size in (1, 2, 5, 100):
        embeds = pipeline.embed_images(arrays, batch_size=batch_size)
        torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(NUM_IMAGES))


def test_text_embeddings_equal_the_model_and_not_their_batch(pipeline):
    texts = ["a dog", "", "the cat sleeps over the brown grass", "bird"]
    expected = []
    for text in texts:
        batch = pipeline.tokenizer(text, 14)
        with torch.inference_mode():
            expected.append(pipeline.model.encode_text(*batch).embed)
    for batch_size in (1, 3, 100):
        embeds = pipeline.embed_texts(texts, batch_size=batch_size)
        torch.testing.assert_close(embeds, torch.cat(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(pipeline.embed_texts("a dog"), embeds[:1], rtol=0, atol=1e-5)


def test_a_long_text_is_cut_at_the_context(pipeline):
    long = "a dog runs over the grass " * 20
    longer = long + "cat " * 20
    torch.testing.assert_close(pipeline.embed_texts(long), pipeline.embed_texts(longer), rtol=0, atol=0)


def test_the_tokenizer_cuts_at_the_context_unless_told_otherwise(pipeline):
    long = "a dog runs over the grass " * 20
    assert pipeline.tokenizer(long).token_ids.shape == (1, 14)
    assert torch.equal(pipeline.tokenizer(long).token_ids, pipeline.tokenizer(long, 14).token_ids)
    assert pipeline.tokenizer(long, 5).token_ids.shape == (1, 5)
    assert pipeline.tokenizer.encode_batch([long]) == pipeline.tokenizer.encode_batch([long], 14)


def test_a_saved_pipeline_is_loaded_again(pipeline, folder, tmp_path, arrays):
    assert pipeline.save(tmp_path / "saved") == tmp_path / "saved"
    names = ("config.json", "model.safetensors", "tokenizer.json")
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a model already.*overwrite=True"):
        pipeline.save(tmp_path / "saved", dtype="bfloat16")
    assert (tmp_path / "saved" / names[1]).read_bytes() == (folder / names[1]).read_bytes()
    pipeline.save(tmp_path / "saved", dtype="bfloat16", overwrite=True)
    halved = load(tmp_path / "saved", device="cpu")
    expected = load(folder, device="cpu", dtype="bfloat16").to(dtype="float32")
    torch.testing.assert_close(halved.embed_images(arrays), expected.embed_images(arrays), rtol=0, atol=0)


def test_an_encoder_that_no_folder_describes_is_not_saved(pipeline, tmp_path):
    image = ImageEncoderConfig(name="custom", image_size=(16, 24), width=8)
    encoder = torch.nn.Conv2d(3, 8, kernel_size=8, stride=8)
    model = CoCa(replace(pipeline.model.config, image=image), image_encoder=encoder)
    with pytest.raises(ValueError, match="an image encoder of your own"):
        Pipeline(model, pipeline.tokenizer, pipeline.preprocess).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_type_is_that_of_loading_in_it(folder, arrays):
    moved = load(folder, device="cpu")
    session = moved.session
    assert moved.to("cpu", torch.bfloat16) is moved
    assert moved.dtype == torch.bfloat16
    assert moved.session is not session
    expected = load(folder, device="cpu", dtype="bfloat16")
    for (name, tensor), wanted in zip(
        moved.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor, wanted), name
    assert moved.model.lm_head.weight is moved.model.unimodal_decoder.token_embed.weight
    assert moved.caption(arrays) == expected.caption(arrays)
    for wrong in ({"device": "gpu"}, {"device": torch.bfloat16}, {"dtype": "half"}):
        with pytest.raises(ValueError, match=r"(gpu'|bfloat16) is no device|the dtype 'half' is none of"):
            moved.to(**wrong)
    assert moved.dtype == torch.bfloat16


def test_a_pipeline_shows_name_size_device_and_type(pipeline, folder):
    count = sum(parameter.numel() for parameter in pipeline.model.parameters())
    assert repr(pipeline) == f"Pipeline({folder}, {count / 1e6:.1f}M parameters, cpu, float32)"
    unnamed = Pipeline(pipeline.model, pipeline.tokenizer, pipeline.preprocess)
    assert repr(unnamed).startswith("Pipeline(unnamed, ")


def test_similarity_is_the_cosine(pipeline, arrays):
    texts = ["a dog", "a cat"]
    images, words = pipeline.embed_images(arrays), pipeline.embed_texts(texts)
    expected = F.cosine_similarity(images[:, None].double(), words[None].double(), dim=-1).float()
    torch.testing.assert_close(pipeline.similarity(arrays, texts), expected, rtol=0, atol=1e-6)
    assert pipeline.similarity(arrays[0], "a dog").shape == (1, 1)


@pytest.mark.parametrize("templates", ["it is {}", ["a photo of a {}.", "{}", "{}!"]])
def test_classes_equal_the_definition(pipeline, arrays, templates):
    results = pipeline.classify(arrays, LABELS, templates)
    images = pipeline.embed_images(arrays).double()
    columns = []
    for label in LABELS:
        texts = [t.replace("{}", label) for t in ([templates] if isinstance(templates, str) else templates)]
        mean = sum(pipeline.embed_texts(text)[0].double() for text in texts)
        columns.append(images @ (mean / mean.norm()))
    logits = torch.stack(columns, dim=1) * pipeline.model.logit_scale.item()
    for scores, row in zip(results, logits.softmax(dim=1), strict=True):
        assert [score.label for score in scores] == [LABELS[i] for i in row.argsort(descending=True)]
        assert dict(scores) == pytest.approx(dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-4)
        assert sum(score.probability for score in scores) == pytest.approx(1)


def test_classes_do_not_depend_on_the_order_of_labels(pipeline, arrays):
    first, second = pipeline.classify(arrays, LABELS), pipeline.classify(arrays, LABELS[::-1])
    for scores, others in zip(first, second, strict=True):
        assert dict(scores) == pytest.approx(dict(others), abs=1e-5)
    assert isinstance(first[0][0], LabelScore)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["{}"], "no labels"),
        ("dog,cat", ["{}"], "a list of labels"),
        (["dog", "cat", "dog"], ["{}"], "'dog' is given more than once"),
        (["dog", 3], ["{}"], "label number 1 is 3"),
        (["dog"], [], "no prompt templates"),
        (["dog"], ["{}", "a photo"], r"'a photo' must contain \{\} once"),
    ],
)
def test_wrong_labels_and_templates_are_named(pipeline, arrays, labels, templates, message):
    with pytest.raises(ValueError, match=message):
        pipeline.classify(arrays, labels, templates)


def test_nothing_gives_nothing(pipeline):
    assert pipeline.caption([]) == []
    assert pipeline.embed_images([]).shape == (0, 24)
    assert pipeline.embed_texts([]).shape == (0, 24)
    assert pipeline.similarity([], ["a dog"]).shape == (0, 1)
    assert pipeline.classify([], LABELS) == []
    assert pipeline.preprocess([]).shape == (0, 3, 16, 24)


@pytest.mark.parametrize("call", [lambda p: p.caption([], batch_size=0), lambda p: p.embed_texts([], batch_size=-1)])
def test_impossible_batch_sizes_are_named(pipeline, call):
    with pytest.raises(ValueError, match="batch_size is"):
        call(pipeline)


def test_an_error_late_in_the_list_ends_the_threads(folder, arrays):
    preprocess = Preprocess(load(folder, "cpu").preprocess.config)
    batches = preprocess.batches([*arrays, b"", *arrays * 20], batch_size=2)
    assert next(batches).shape == (2, 3, 16, 24)
    with pytest.raises(ImageError, match="number 5"):
        list(batches)


def test_low_precision_is_near(folder, arrays):
    low = load(folder, device="cpu", dtype="bfloat16")
    full = load(folder, device="cpu")
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert low.embed_images(arrays).dtype == torch.float32
    assert (low.embed_images(arrays) * full.embed_images(arrays)).sum(dim=1).min() > 0.99
    assert len(low.caption(arrays)) == NUM_IMAGES
    assert load(folder, device="cpu", dtype=torch.float64).dtype == torch.float64


def test_auto_is_cuda_where_there_is_one(folder):
    assert load(folder).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_a_folder_says_of_itself_is_there(pipeline):
    assert pipeline.info == {"seed": 0}
    assert not pipeline.model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "'gpu' is no device"),
        ({"device": "cuda:99"}, "cuda:99 is not there"),
        ({"dtype": "float8"}, "'float8' is none of float32"),
        ({"dtype": torch.int8}, "int8"),
    ],
)
def test_unknown_devices_and_types_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **arguments)


def test_models_are_found_by_name(folder, monkeypatch):
    (shipped, *_) = available_models()
    assert shipped.description
    assert shipped.licence
    ours = replace(shipped, name="ours", folder=folder)
    assert isinstance(ours, ShippedModel)
    monkeypatch.setattr(loading, "SHIPPED_MODELS", {"ours": ours})
    monkeypatch.setattr(loading, "DEFAULT_MODEL", "ours")
    assert load("ours").info == load().info == {"seed": 0}


def test_an_unknown_model_is_named_with_those_known():
    with pytest.raises(FileNotFoundError, match=r"no model 'colour'.*coca-flickr8k"):
        load("colour")


def test_the_package_offers_what_it_promises(folder):
    assert opencoca.load is load
    assert opencoca.Pipeline is Pipeline
    assert opencoca.CoCa is CoCa
    assert opencoca.CoCaConfig is CoCaConfig
    assert opencoca.__version__
    assert set(opencoca.__all__) <= set(dir(opencoca))
    assert isinstance(opencoca.load(folder).tokenizer, opencoca.Tokenizer)
    with pytest.raises(AttributeError, match="colour"):
        _ = opencoca.colour


def test_importing_the_package_imports_no_pytorch():
    code = "import sys, opencoca; assert opencoca.__version__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
