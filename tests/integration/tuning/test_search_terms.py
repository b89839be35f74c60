"""A sweep in Ray Tune's terms, without a cluster; and that the steps it counts on are the steps that are trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.variant_generator import generate_variants

from agents.training.config import TrainConfig
from agents.training.methods import trainer
from agents.tuning import search as terms
from agents.tuning.space import Dimension, Search
from agents.tuning.trial import total_steps
from luthier.v1 import training_pb2


def search(algorithm="random", grace=0.25, dimensions=()):
    return Search(tuple(dimensions), algorithm, 4, 2, "eval_loss", False, 7, grace)


def draw(dimension, count=200):
    domain = terms._domain(dimension, grid=False)
    return [domain.sample(random_state=seed) for seed in range(count)]


def test_ranges_keep_their_bounds_and_types():
    whole = draw(Dimension("lora.rank", "integer", low=2, high=4))
    assert set(whole) == {2, 3, 4}
    even = draw(Dimension("x", "uniform", low=0.5, high=1.5))
    assert all(0.5 <= value <= 1.5 for value in even)
    logarithmic = draw(Dimension("x", "log_uniform", low=1e-5, high=1e-1))
    assert all(1e-5 <= value <= 1e-1 for value in logarithmic)
    assert 0.35 < sum(value < 1e-3 for value in logarithmic) / len(logarithmic) < 0.65
    assert set(draw(Dimension("x", "choice", values=("a", "b")))) == {"a", "b"}


def test_a_grid_is_every_combination_once():
    space = {
        name: terms._domain(Dimension(name, "choice", values=values), grid=True)
        for name, values in (("a", (1, 2)), ("b", ("x", "y", "z")))
    }
    found = {(made["a"], made["b"]) for _, made in generate_variants(space)}
    assert len(found) == len(list(generate_variants(space))) == 6


def test_the_same_seed_draws_the_same_trials():
    def drawn(seed):
        generator = BasicVariantGenerator(random_state=seed)
        return [
            made
            for _, made in generate_variants(
                {"lr": terms._domain(Dimension("lr", "uniform", low=0, high=1), False)}, random_state=generator._random_state
            )
        ]

    assert drawn(3) == drawn(3) != drawn(4)


@pytest.mark.parametrize(("grace", "rungs"), [(0.25, [1, 2]), (0.1, [1, 2, 4, 8]), (0.5, [1]), (0.3, [1, 2]), (0.2, [1, 2, 4])])
def test_asha_judges_at_parts_of_the_way_and_never_at_its_end(grace, rungs):
    scheduler = terms._scheduler(search("asha", grace))
    [bracket] = scheduler._brackets
    assert sorted(milestone for milestone, _ in bracket._rungs) == rungs
    assert max(rungs) * grace < 1


def test_asha_stops_the_worse_half_by_held_out_loss():
    scheduler = terms._scheduler(search("asha"))
    decisions = []
    for number, loss in enumerate((1.0, 2.0, 0.5, 3.0)):
        trial = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        decisions.append(scheduler.on_trial_result(None, trial, {"training_iteration": 1, "eval_loss": loss}))
    stop, go = TrialScheduler.STOP, TrialScheduler.CONTINUE
    assert decisions == [go, stop, go, stop]


@pytest.mark.parametrize(("algorithm", "grace"), [("random", 0.25), ("grid", 0.25), ("asha", 1.0)])
def test_otherwise_every_trial_runs_to_its_end(algorithm, grace):
    assert isinstance(terms._scheduler(search(algorithm, grace)), FIFOScheduler)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("hyper", [{}, {"max_steps": 9}, {"epochs": 0.3}, {"batch_size": 3, "gradient_accumulation": 4}])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_steps_counted_on_are_those_of_the_training(rows, hyper, workers):
    spec = training_pb2.FinetuneSpec(base="x", workers=workers, hyperparameters=training_pb2.Hyperparameters(**hyper))
    config = TrainConfig.of(spec)
    assert total_steps(config, rows) == trainer.total_steps(config, rows, workers)
