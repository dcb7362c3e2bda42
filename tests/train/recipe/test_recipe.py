"""Recipes: what the file says, what overrides it, and one sentence for everything that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from opencoca.model.config import CoCaConfig
from opencoca.train import Recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def load(file: Path, text: str, *overrides: str) -> Recipe:
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, list(overrides))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads(path: Path) -> None:
    # Some begin with what another has trained, which is not there; any model stands in for that.
    begins_with_a_run = "init_from: runs/" in path.read_text(encoding="utf-8")
    start = ["--init_from", "coca-flickr8k"] if begins_with_a_run else []
    recipe = load_recipe(path, ["--data.train_images", "somewhere", *start])
    assert recipe.data.train_images == "somewhere"
    assert json.loads(json.dumps(recipe.to_dict()))["batch_size"] == recipe.batch_size


def test_there_is_a_recipe_to_test() -> None:
    assert "flickr8k" in [path.stem for path in RECIPES]


def test_an_empty_recipe_has_the_defaults(recipe_file: Path) -> None:
    assert load(recipe_file, "") == Recipe()


def test_size_gives_the_fields_that_the_recipe_leaves_out(recipe_file: Path) -> None:
    recipe = load(recipe_file, "size: tiny\nmodel: {embed_dim: 64, text: {context_length: 20}}\n")
    tiny = CoCaConfig.named("tiny")
    assert recipe.model.embed_dim == 64
    assert recipe.model.text.context_length == 20
    assert recipe.model.text.width == tiny.text.width != CoCaConfig.named("small").text.width
    assert recipe.model.image == tiny.image
    other = load(recipe_file, "size: tiny\nmodel: {embed_dim: 64}\n", "--size", "base")
    assert other.model.text.width == CoCaConfig.named("base").text.width
    assert other.model.embed_dim == 64


def test_overrides_win_over_the_file(recipe_file: Path) -> None:
    text = "batch_size: 12\nepochs: 3\noptimizer: {learning_rate: 0.5, weight_decay: 0.25}\n"
    recipe = load(recipe_file, text, "--batch_size", "24", "--optimizer.learning_rate=1e-4", "--model.text.width=48")
    assert (recipe.batch_size, recipe.epochs) == (24, 3)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (1e-4, 0.25)
    assert recipe.model.text.width == 48


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001"])
def test_numbers_may_be_written_as_people_do(recipe_file: Path, number: str) -> None:
    assert load(recipe_file, f"optimizer: {{learning_rate: {number}}}").optimizer.learning_rate == 0.001


def one_sentence(file: Path, text: str, overrides: list[str]) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        load(file, text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    for traceback in ("Traceback", "object at 0x", "functools", "<class", "typing."):
        assert traceback not in message
    assert str(file) in message
    return message


WRONG: list[tuple[str, list[str], str]] = [
    # unknown keys
    ("bogus: 1", [], "bogus"),
    ("optimizer: {lr: 1}", [], "lr"),
    ("model: {text: {widht: 3}}", [], "text.widht"),
    ("", ["--bogus", "3"], "--bogus"),
    ("", ["--data.nothing=3"], "--data.nothing"),
    ("", ["stray"], "stray"),
    # wrong types
    ("batch_size: many", [], "batch_size"),
    ("epochs: true", [], "epochs"),
    ("seed: 1.5", [], "seed"),
    ("data: 3", [], "data"),
    ("optimizer:", [], "optimizer"),
    ("model: tiny", [], "model"),
    ("data: {crop_scale: [0.5]}", [], "data.crop_scale"),
    ("data: {mean: [0, 0]}", [], "data.mean"),
    ("", ["--batch_size", "x"], "batch_size"),
    ("", ["--batch_size"], "--batch_size"),
    ("max_steps: soon", [], "max_steps must be a whole number or null, got soon"),
    ("precision: half", [], "precision must be one of auto, fp32, bf16, got half"),
    ("data: {sources: [{image: x}]}", [], "data.sources has an unknown key image"),
    ("batch_size: null", [], "batch_size must have a value, got null"),
    ("model: {text: {width: ~}}", [], "model.text.width must have a value"),
    ("task: {max_new_tokens: ~}", [], "task.max_new_tokens must have a value"),
    ("", ["--seed", "null"], "seed"),
    ("", ["--encoder.cache_features", "perhaps"], "cache_features"),
    # not a recipe
    ("- a\n- b", [], "mapping"),
    ("just words", [], "mapping"),
    ("a: [1", [], "not YAML"),
    ("a: &a [1]\nb: &b [*a, *a]\nbatch_size: *b\nepochs: &e [*e]", [], "&e contains itself"),
    ("size: tiny\nmodel: &m {embed_dim: 4, text: *m}", [], "&m contains itself"),
    ("".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10 if n else 'x' * 10)}]\n" for n in range(9)), [], "values"),
    ("{a: " * 3000 + "1" + "}" * 3000, [], "nested"),
    ("#" * 200_001, [], "bytes"),
    ("batch_size: 3\nepochs: 2\nbatch_size: 4", [], "batch_size is given twice, again in line 3"),
    ("optimizer: {eps: 1.0e-8, eps: 1.0e-7}", [], "eps is given twice"),
    ("batch_size: 3\nbatch-size: 3", [], "batch_size is given twice"),
    ("1: 2", [], "the key 1"),
    ("? [a, b]\n: 2", [], "a key is a list"),
    ("epochs: 2001-99-99", [], "not YAML"),
    ("epochs: " + "9" * 5000, [], "not YAML"),
    ("epochs: !!python/object/apply:os.system [true]", [], "not YAML"),
    ("output: ''", [], "output"),
    # nearly right
    ("batch_sise: 3", [], "unknown key batch_sise; did you mean batch_size?"),
    ("learning_rate: 3", [], "learning_rate?"),
    ("", ["--optimiser.learning-rate", "3"], "did you mean optimizer.learning_rate?"),
    # impossible choices
    ("size: huge", [], "'huge'"),
    ("precision: fp16", [], "precision"),
    ("select_by: beauty", [], "select_by"),
    ("model: {text: {width: 100, num_heads: 3}}", [], "num_heads 3"),
    ("model: {text: {dropout: 1.5}}", [], "dropout 1.5"),
    ("batch_size: 10\naccumulation_steps: 3", [], "accumulation_steps 3"),
    ("loss: {contrastive_weight: 0, caption_weight: 0}", [], "task.contrastive_weight"),
    ("task: {caption_weight: 0, select_by: cider_d}", [], "task.caption_weight"),
    ("loss: {contrastive_weight: 0}\nselect_by: mean_r1", [], "task.contrastive_weight"),
    ("task: juggling", [], "'juggling'"),
    ("task: {name: pretraining, taste: 1}", [], "taste"),
    ("loss: {caption_weight: 1}\ntask: {caption_weight: 2}", [], "task"),
    ("tokenizer: {source: init_from}", [], "init_from"),
    ("encoder: {cache_features: true}", [], "encoder.frozen_stages"),
    ("data: {crop_scale: [0.5, 1.5]}", [], "data.crop_scale"),
    ("data: {crop_scale: [0.9, 0.1]}", [], "data.crop_scale"),
    ("data: {crop_ratio: [0, 1]}", [], "data.crop_ratio"),
    ("optimizer: {betas: [0.9, 1.0]}", [], "optimizer.betas"),
]


@pytest.mark.parametrize(("text", "overrides", "named"), WRONG, ids=[f"{t}{' '.join(o)}" for t, o, _ in WRONG])
def test_a_mistake_is_one_sentence_that_names_the_key(
    recipe_file: Path, text: str, overrides: list[str], named: str
) -> None:
    message = one_sentence(recipe_file, text, overrides)
    assert named in message.replace(str(recipe_file), "")


IMPOSSIBLE: dict[str, list[Any]] = {
    "epochs": [0, -1, 10**7],
    "max_steps": [0, -5],
    "batch_size": [0, 10**7, 10**400],
    "grad_cache_steps": [10**9, 65],
    "tokenizer.vocab_size": [10**7],
    "distributed.timeout_minutes": [1e300],
    "checkpoint.keep_last": [10**8],
    "accumulation_steps": [0],
    "validate_every_epochs": [0],
    "task.max_new_tokens": [0, 10**9],
    "log_every_steps": [0],
    "checkpoint_minutes": [-1.0, ".nan"],
    "seed": [-1, 2**64],
    "data.captions_per_image": [0],
    "data.max_pixels": [-3, 0],
    "data.flip_probability": [-0.1, 1.1],
    "data.color_jitter": [-0.1, 2.0],
    "data.num_workers": [-1],
    "encoder.frozen_stages": [-2],
    "encoder.learning_rate": [0.0, -1.0],
    "encoder.cache_views": [0],
    "task.contrastive_weight": [-1.0, ".nan", ".inf"],
    "task.caption_weight": [-0.5],
    "task.label_smoothing": [-0.1, 1.0],
    "optimizer.learning_rate": [0.0, -1e-3, ".inf", ".nan"],
    "optimizer.eps": [0.0],
    "optimizer.weight_decay": [-0.1],
    "optimizer.grad_clip": [-1.0],
    "optimizer.warmup_steps": [-1],
    "optimizer.final_lr_fraction": [-0.1, 1.5],
    "optimizer.ema_decay": [-0.5, 1.0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_an_impossible_number_is_refused_with_its_key(recipe_file: Path, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    text = f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n"
    assert key in one_sentence(recipe_file, text, [])


def test_keys_may_have_hyphens(recipe_file: Path) -> None:
    recipe = load(
        recipe_file, "batch-size: 12\noptimizer: {learning-rate: 0.5}", "--log-every-steps=3", "--data.num-workers", "0"
    )
    assert (recipe.batch_size, recipe.optimizer.learning_rate) == (12, 0.5)
    assert (recipe.log_every_steps, recipe.data.num_workers) == (3, 0)
    assert load(recipe_file, "", "--val-max-new-tokens", "7").task == load(recipe_file, "val-max-new-tokens: 7").task


def test_aliases_within_reason(recipe_file: Path) -> None:
    recipe = load(recipe_file, "data: {mean: &half [0.25, 0.25, 0.25], std: *half}")
    assert recipe.data.std == (0.25, 0.25, 0.25)


def test_a_recipe_of_the_package_by_its_name() -> None:
    by_file = load_recipe(Path(__file__).parents[3] / "recipes" / "flickr8k.yaml")
    assert load_recipe("flickr8k") == by_file
    with pytest.raises(ValueError, match=r"there is no recipe flickr9k; did you mean flickr8k\?") as error:
        load_recipe("flickr9k")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["x" * 5000, "a\x1b[31m\nb", "../nothing"])
def test_any_name_makes_a_short_message_of_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="there is no recipe") as error:
        load_recipe(name)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_seeds_of_64_bits(recipe_file: Path) -> None:
    assert load(recipe_file, f"seed: {2**64 - 1}").seed == 2**64 - 1


def test_made_recipes_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of every kind; benchmarks/robustness.py tries many more."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    from hostile_recipes import attempt

    assert [f"{trial.name}: {trial.fault}" for trial in attempt(0, 0, 30) if trial.fault] == []


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no recipe .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_file_of_bytes(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    with pytest.raises(ValueError, match="not YAML") as error:
        load_recipe(recipe_file)
    assert "\n" not in str(error.value)


def test_a_model_section_of_before_is_read(tmp_path: Path) -> None:
    """It had the fields of `Compat` among those of the parts."""
    (tmp_path / "old.yaml").write_text(
        "size: tiny\nmodel:\n  text:\n    self_attn_mlp: true\n    cross_attn_mlp: true\n"
    )
    (tmp_path / "new.yaml").write_text("size: tiny\nmodel:\n  compat:\n    text_self_attn_mlp: true\n")
    old, new = (load_recipe(tmp_path / name).model for name in ("old.yaml", "new.yaml"))
    assert old == new
    assert old.compat.text_self_attn_mlp


def test_another_model_to_start_from_replaces_the_recipes_whole(recipe_file: Path) -> None:
    """Weights that the recipe names are of its own model, and do not go with the command line's."""
    recipe_file.write_text("init_from: {model: coca_ViT-B-32, weights: laion2b_s13b_b90k}", encoding="utf-8")
    assert load_recipe(recipe_file).init_from.weights == "laion2b_s13b_b90k"
    options = ["--init_from", "open_clip:coca_ViT-B-32", "--init_from.checkpoint", "weights.pt"]
    start = load_recipe(recipe_file, options).init_from
    assert (start.model, start.weights, start.checkpoint) == ("open_clip:coca_ViT-B-32", None, "weights.pt")
