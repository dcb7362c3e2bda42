"""Muon: singular values near 1, map by map; AdamW for all else; one optimizer to schedules and checkpoints."""

import pytest
import torch
from torch import Tensor, nn

from opencoca.train.optim.muon import Muon, divide_groups, orthogonalised


def polynomial(x: Tensor) -> Tensor:
    """What one step of the iteration does to a singular value, five times over; computed on the values themselves."""
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@pytest.mark.parametrize(("has_instructions", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_singular_vectors_stay_and_values_come_near_1(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], has_instructions: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("opencoca.train.optim.muon.multiplies_bfloat16", lambda: has_instructions)
    matrices = torch.randn(3, *shape)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    assert orthogonalised(matrices).dtype == dtype
    found = orthogonalised(matrices).float()
    scaled = polynomial(values / values.norm(dim=1, keepdim=True))
    expected = left @ torch.diag_embed(scaled) @ right
    assert (found - expected).abs().max() < (0.05 if has_instructions else 1e-4)
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_nothing_is_divided_by_zero() -> None:
    assert orthogonalised(torch.zeros(1, 4, 6)).eq(0).all()


def step_of(parameter: nn.Parameter, grads: list[Tensor], maps: int, **options: float) -> Tensor:
    """The parameter after steps with these gradients."""
    optimizer = Muon([{"params": [parameter], "maps": maps, "lr": 0.1, "weight_decay": 0.0} | options])
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    return parameter.detach()


def test_update_has_adamws_size_and_nesterovs_momentum() -> None:
    first, second = torch.randn(2, 6, 10).unbind(0)
    found = step_of(nn.Parameter(torch.zeros(6, 10)), [first, second], 1)
    expected, mean = torch.zeros(6, 10), torch.zeros(6, 10)
    for grad in (first, second):
        mean = 0.95 * mean + 0.05 * grad
        ahead = 0.05 * grad + 0.95 * mean
        expected -= 0.1 * 0.2 * 10**0.5 * orthogonalised(ahead[None])[0].float()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-3)
    assert 0.1 < step_of(nn.Parameter(torch.zeros(64, 64)), [torch.randn(64, 64)], 1).square().mean().sqrt() / 0.1 < 0.3


def test_maps_of_one_parameter_do_not_meet() -> None:
    grad = torch.randn(8, 6)
    both = step_of(nn.Parameter(torch.zeros(8, 6)), [grad], 2)
    alone = [step_of(nn.Parameter(torch.zeros(4, 6)), [part], 1) for part in grad.chunk(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0.02, atol=1e-3)
    other = grad.clone()
    other[4:] = torch.randn(4, 6)
    assert step_of(nn.Parameter(torch.zeros(8, 6)), [other], 2)[:4].equal(both[:4])


def test_weights_decay_apart_from_the_update() -> None:
    grad = torch.randn(6, 6)
    without = step_of(nn.Parameter(torch.ones(6, 6)), [grad], 1)
    decayed = step_of(nn.Parameter(torch.ones(6, 6)), [grad], 1, weight_decay=0.5)
    torch.testing.assert_close(without - decayed, torch.full((6, 6), 0.1 * 0.5))


def test_the_others_are_adamws() -> None:
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in "ab")
    settings = {"lr": 0.1, "weight_decay": 0.3}
    hidden = nn.Parameter(torch.eye(4))
    muon = Muon(
        [{"params": [ours], **settings}, {"params": [hidden], "maps": 1, **settings}], betas=(0.8, 0.9), eps=1e-6
    )
    adamw = torch.optim.AdamW([theirs], betas=(0.8, 0.9), eps=1e-6, fused=True, **settings)
    for rate in (0.1, 0.02):
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
        for parameter in (ours, theirs):
            parameter.grad = torch.arange(5.0)
        muon.step()
        adamw.step()
        assert ours.equal(theirs)
    assert set(muon.state) == {ours}  # without a gradient there is no state, and no update
    assert hidden.equal(torch.eye(4))


@pytest.mark.parametrize(("shape", "maps"), [((6,), 1), ((5, 4), 2), ((2, 3, 4), 1)])
def test_what_is_no_matrix_of_so_many_maps_is_refused(shape: tuple[int, ...], maps: int) -> None:
    with pytest.raises(ValueError, match="muon cannot divide"):
        Muon([{"params": [nn.Parameter(torch.zeros(shape))], "maps": maps}])


def test_hidden_matrices_of_a_model(make_model) -> None:
    model = make_model(activation="swiglu")
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: maps for parameter, maps in model.structure().hidden_matrices().items()}
    assert found["unimodal_decoder.blocks.0.attn.kv_proj.weight"] == 2
    assert found["unimodal_decoder.blocks.0.mlp.up_proj.weight"] == 2
    assert found["unimodal_decoder.blocks.0.mlp.down_proj.weight"] == 1
    assert found["multimodal_decoder.layers.0.cross_block.attn.q_proj.weight"] == 1
    matrices = {name for parameter, name in names.items() if parameter.ndim == 2}
    left = {name for name in matrices if name not in found}
    assert all(word not in name for name in found for word in ("embed", "query", "head", "text_proj", "image_proj"))
    no_hidden = ("embed", "query", "queries", "head", "patch", "text_proj", "image_proj")
    assert left
    assert all(any(word in name for word in no_hidden) for name in left), left


def test_groups_are_divided_and_nothing_is_lost(make_model) -> None:
    model = make_model()
    rates = {"lr": 0.5, "peak_lr": 0.5, "weight_decay": 0.1}
    groups = divide_groups(model, [{"params": list(model.parameters()), **rates}])
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    assert all(group["peak_lr"] == 0.5 for group in groups)
    assert {group.get("maps") for group in groups} == {None, 1, 2}
