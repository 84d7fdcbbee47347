"""UCE and RECE against least squares by numpy, and what becomes of a model's keys and values."""

from itertools import product

import numpy as np
import pytest
import torch
from pipelines import PROMPTS, foreign_flux, foreign_sd3, foreign_xl, tiny

from unlearn_runner.methods.method import Setting
from unlearn_runner.methods.uce import UCE, edited, still_says
from unlearn_runner.models.flux import build_flux
from unlearn_runner.models.stable_diffusion import build_sdxl
from unlearn_runner.models.stable_diffusion_3 import build_sd3
from unlearn_runner.spec import Labels
from unlearn_runner.types import Batch, make_generator

LABELS = Labels(retain=(0,), forget=(1, 2), names=PROMPTS, contents=(0, 1, 1))
NOTHING = Batch(None, None, None, None, 0.0)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("erase, preserve, ridge", [(1.0, 1.0, 0.5), (2.0, 0.1, 0.01), (1.0, 0.0, 1e-6)])
def test_an_edit_is_the_least_squares_solution(erase, preserve, ridge):
    before, concepts, targets, kept = random(5, 7), random(3, 7, seed=1), random(3, 5, seed=2), random(4, 7, seed=3)
    found = edited(before, concepts, targets, kept, erase, preserve, ridge)
    rows = np.concatenate([erase**0.5 * concepts, preserve**0.5 * kept, ridge**0.5 * np.eye(7)])
    wanted = np.concatenate([erase**0.5 * targets, preserve**0.5 * kept @ before.T, ridge**0.5 * before.T])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, atol=1e-8)


def test_what_still_makes_a_concept_is_the_least_squares_solution():
    weights, before = [random(5, 7), random(6, 7, seed=1)], [random(5, 7, seed=2), random(6, 7, seed=3)]
    concepts = random(3, 7, seed=4)
    found = still_says(weights, before, concepts, 0.1)
    rows = np.concatenate([*weights, 0.1**0.5 * np.eye(7)])
    wanted = np.concatenate([*(old @ concepts.T for old in before), np.zeros((7, 3))])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, wanted, rcond=None)[0].T, atol=1e-8)


def uce(model, **options):
    return UCE(Setting(model, make_generator(0, "method"), LABELS), **options)


def read(model, text, weights):
    """What the projections make of a text's tokens from its last word on."""
    with torch.no_grad():
        states = model.token_states([text])[0].double()
    rows = model.last_tokens(text)
    tokens = states[rows[0][0] :] if len(rows) == 1 else states[[first for first, _ in rows]]
    return [tokens @ weight.T for weight in weights]


def weights_of(model):
    return [layer.weight.detach().double().clone() for layer in model.text_projections()]


def foreign(kind, folder):
    build, make = {
        "sdxl": (build_sdxl, foreign_xl), "sd3": (build_sd3, foreign_sd3), "flux": (build_flux, foreign_flux),
    }[kind]  # fmt: skip
    model = build((3, 16, 16), PROMPTS, 0, str(make(folder)), trainable="full")
    model.load(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "tokens"),  # sd3 and flux have more tokens here than each has numbers: no edit sets them all
    [*product(("sd", "sdxl"), ("last", "onwards")), ("sd3", "last"), ("flux", "last")],
)
def test_concepts_are_read_as_the_anchor_and_other_texts_as_before(tmp_path, kind, tokens):
    model = tiny() if kind == "sd" else foreign(kind, tmp_path)
    model.freeze_for_unlearning()
    before = weights_of(model)
    everything = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = uce(model, ridge=1e-6, anchor=PROMPTS[0], preserved=[], tokens=tokens).step(NOTHING)
    after = weights_of(model)
    read_by = ("context_embedder.",) if kind in ("sd3", "flux") else (".attn2.to_k.", ".attn2.to_v.")
    assert len(before) == sum(any(part in name for part in read_by) and "weight" in name for name in everything)
    for text in PROMPTS[1:]:
        for old, new in zip(read(model, PROMPTS[0], before), read(model, text, after), strict=True):
            places = min(len(old), len(new)) if tokens == "onwards" else len(model.last_tokens(text))
            torch.testing.assert_close(new[:places], old[:places], atol=2e-2, rtol=0)
    moved = torch.stack([(new - old).norm() for new, old in zip(after, before, strict=True)]).norm()
    assert metrics["edit/distance"].item() == pytest.approx(moved.item(), rel=1e-3)
    touched = {name for name, value in model.state_dict().items() if not torch.equal(value, everything[name])}
    assert touched and all(any(part in name for part in read_by) for name in touched)


def test_all_prompts_of_several_concepts_are_edited():
    labels = Labels(retain=(0,), forget=(1, 2), names=PROMPTS, contents=(0, 1, 2))
    model = tiny()
    before = weights_of(model)
    method = UCE(Setting(model, make_generator(0, "method"), labels), ridge=1e-6, anchor=PROMPTS[0], preserved=[])
    assert method.concepts == list(PROMPTS[1:])
    method.step(NOTHING)
    after = weights_of(model)
    for text in PROMPTS[1:]:
        for old, new in zip(read(model, PROMPTS[0], before), read(model, text, after), strict=True):
            torch.testing.assert_close(new[:1], old[:1], atol=2e-2, rtol=0)


def test_preserved_texts_move_less():
    distances = {}
    for preserve in (0.0, 100.0):
        model = tiny()
        before = weights_of(model)
        uce(model, preserve=preserve, concepts=[PROMPTS[1]], preserved=[PROMPTS[0]], tokens="onwards").step(NOTHING)
        pairs = zip(read(model, PROMPTS[0], before), read(model, PROMPTS[0], weights_of(model)), strict=True)
        distances[preserve] = sum((new - old).norm().item() for old, new in pairs)
    assert distances[100.0] < distances[0.0] / 5


def test_rounds_take_away_what_still_makes_the_concept():
    """After them no token of moderate length is read as the concept was."""
    left = {}
    for rounds in (0, 3):
        model = tiny()
        before = weights_of(model)
        uce(model, rounds=rounds, concepts=[PROMPTS[1]], anchor=PROMPTS[0], preserved=[]).step(NOTHING)
        after = weights_of(model)
        with torch.no_grad():
            concept = model.embed([PROMPTS[1]])[0].double()[[model.last_tokens(PROMPTS[1])[0][0]]]
        found = still_says(after, before, concept, 0.1)
        left[rounds] = sum(
            (found @ new.T - concept @ old.T).norm().item() for new, old in zip(after, before, strict=True)
        )
    assert left[3] > 2 * left[0]


def test_rounds_do_not_give_the_concept_back():
    """Each round moves the weights for what it found; the concept itself is edited with it, or it comes back."""
    away = {}
    for name, more in {"uce": {"rounds": 0}, "again": {"rounds": 4}, "alone": {"rounds": 4, "again": False}}.items():
        model = tiny()
        before = weights_of(model)
        uce(model, concepts=[PROMPTS[1]], anchor=PROMPTS[0], tokens="onwards", ridge=0.01, **more).step(NOTHING)
        pairs = zip(read(model, PROMPTS[1], weights_of(model)), read(model, PROMPTS[0], before), strict=True)
        away[name] = sum((new[:2] - old[:2]).norm().item() for new, old in pairs)
    assert away["again"] < 2 * away["uce"]
    assert away["alone"] > 2 * away["again"]
