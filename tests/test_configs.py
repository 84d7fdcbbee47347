"""Every option of every group composes and builds; every method steps twice, resets and resumes to the bit."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import COMPLETE, ROOT, assert_same_bits, marked, names, options
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pipelines import foreign, foreign_dit, foreign_flux, foreign_sd3, foreign_xl
from rich.console import Console
from trainers import CPU, build_trainer, flat_state, make

from unlearn_runner.assembly import build_method, build_network
from unlearn_runner.cache import digest
from unlearn_runner.comparison.packs import runs_in
from unlearn_runner.data.digits import Digits
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.evaluation.evaluator import require_enough_samples
from unlearn_runner.spec import DIGITS, DataSpec
from unlearn_runner.training.checkpoint import open_checkpoint
from unlearn_runner.training.pretraining import pretrained
from unlearn_runner.training.signals import Interrupts
from unlearn_runner.types import make_generator

LAMBDAS = [
    ("adaptive_siss", f"method/lambd={name}", *more)
    for name in options("method/lambd")
    for more in ((), ("method.lambd.per=timestep", "method/timesteps=second_moment"))
    if not (more and name == "constant")
] + [
    ("adaptive_siss", "method/lambd=pathwise", "method.lambd.context=current"),
    ("adaptive_siss", "method/lambd=blend", "method.lambd.context=current", "method.lambd.norms=false",
     "method.lambd.per=image"),
    ("adaptive_siss", "method.lambd.per=image", "method.lambd.image_features=true"),
]  # fmt: skip
DISTILLING = ("hybrid", "sfd", "sfd_two_stage")
ROLLING_OUT = ("critic_guided", "ddpo")
ASKING_A_DIFFUSION_MODEL = ("erase_diff", "salun", "retrack", *DISTILLING, *ROLLING_OUT)
CLOSED_FORM = ("uce", "rece")
ASKING_PROMPTS = (
    "esd",
    "concept_ablation",
    "erase_flow",
    *CLOSED_FORM,
)  # built and stepped in tests/methods/test_on_latents.py
VAES = [(method, "model=vae") for method in COMPLETE if method not in ASKING_A_DIFFUSION_MODEL + ASKING_PROMPTS]
CRITICS = [
    ("critic_guided", "method.critic_sees=clean", "method.kl_weight=0.1"),
    ("critic_guided", "method.reuse=2", "method.critic_warmup=1", "method.timestep_share=0.5", "method.trace=0.0"),
]
HYBRIDS = [
    ("hybrid", "method.target=mixture_score"),
    *(("hybrid", "method.variant=siss_sfd_labels", f"method/lambd={name}") for name in ("variance", "closed_form")),
    ("hybrid", "method.variant=siss_sfd_labels", "method.lambd.per=timestep"),
    ("hybrid", "method.variant=siss_sfd_student", "method/lambd=constant", "method.distil_share=0.25"),
]
OVERRIDES = [
    ("sfd", f"method/override={name}", *(["method.override.label=2"] * (name == "fixed")))
    for name in options("method/override")
]
RELEASED = ("erase_diff", "method.variant=released", "method.inner_steps=2", "method.outer_steps=2")
VARIANTS = LAMBDAS + VAES + HYBRIDS + OVERRIDES + CRITICS + [RELEASED]
# A default run looks at each variant once, and most at those whose state is their own.
RESUMED = {
    *(lambdas for lambdas in LAMBDAS if "method/timesteps=second_moment" not in lambdas),
    ("siss", "model=vae"), ("retrain", "model=vae"), HYBRIDS[-1], RELEASED,
}  # fmt: skip
SLOW = {*VARIANTS, ("ddpo",), ("sfd_two_stage",)} - RESUMED
METHODS = [(method,) for method in COMPLETE if method not in ASKING_PROMPTS] + VARIANTS


def overrides(method: tuple[str, ...], decay: str) -> list[str]:
    """Of a method and the decay of its average. Roll-outs are short, and of a linear schedule: on a cosine one
    untrained weights draw 1e5-fold, where a policy's ratio and a divergence overflow.
    """
    short = ["method.num_inference_steps=4", "model.network.beta_schedule=linear"] * (method[0] in ROLLING_OUT)
    short += ["method.update_every=2", "method.agent.batch_size=2"] * (method[0] == "rl_lambda")  # whole rollouts
    return [f"method={method[0]}", *short, *method[1:], *ema(method[0], decay)]


def ema(method: str, decay: str) -> list[str]:
    """The override of the averaging's decay; `retrain` has the base's recipe, a closed form averages nothing."""
    if method in CLOSED_FORM:
        return []
    return [f"{'model.pretraining' if method == 'retrain' else 'method'}.update.ema_decay={decay}"]


@pytest.mark.parametrize(
    ("method", "ema_decay"),
    marked(
        [
            (method, decay)
            for method in METHODS
            for decay in ("0.9", "null")
            if decay == "0.9" or method not in VARIANTS
        ],
        {*((method, "0.9") for method in RESUMED), *((method, "null") for method in METHODS if method != ("siss",))},
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_method_steps_and_resets_exactly(composed, digits, tmp_path, method, ema_decay):
    cfg = composed(*overrides(method, ema_decay))
    trainer = build_trainer(cfg, digits, tmp_path)
    start = flat_state(trainer)
    first = [trainer.step() for _ in range(2)]
    after = flat_state(trainer)
    assert any(not torch.equal(after[key], start[key]) for key in start if "/weights/" in key)
    trainer.reset()
    assert_same_bits(flat_state(trainer), start)
    assert trainer.clock.step == 2
    assert trainer.clock.run_step == 0
    second = [trainer.step() for _ in range(2)]
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)
    assert_same_bits(flat_state(trainer), after)


@pytest.mark.parametrize("method", marked([(m,) for m in METHODS], {(m,) for m in SLOW}), ids=" ".join)
def test_resume_is_the_uninterrupted_run(composed, digits, tmp_path, method):
    cfg = composed(*overrides(method, "0.9"), "trainer.max_steps=6", "trainer.init=base")
    whole = build_trainer(cfg, digits, tmp_path / "a")
    while not whole.done:
        whole.step()

    first = build_trainer(cfg, digits, tmp_path / "b")
    for _ in range(3):
        first.step()
    first.save()
    second = build_trainer(cfg, digits, tmp_path / "b")
    for weight in second.method.networks[0].parameters():
        if weight.requires_grad:  # the others are the base's, which every run loads
            weight.data.normal_()  # whatever is there is replaced
    torch.rand(7)
    second.resume(open_checkpoint(tmp_path / "b"))
    assert second.clock.run_step == 3
    while not second.done:
        second.step()
    assert_same_bits(flat_state(second), flat_state(whole))
    shipped = [dict(trainer.method.model.state_dict()) for trainer in (second, whole)]
    assert_same_bits(*shipped)
    ends = [(trainer.clock.images, trainer.clock.network_evaluations) for trainer in (second, whole)]
    assert ends[0] == ends[1]


def test_dropout_resumes_to_the_bit_too(composed, digits, tmp_path):
    """Dropout draws from torch's global generator, which checkpoints hold."""
    cfg = composed("method=naive_deletion", "model.network.dropout=0.3", "trainer.max_steps=4")
    torch.manual_seed(0)
    whole = build_trainer(cfg, digits, tmp_path / "a")
    for _ in range(2):
        whole.step()
    whole.save()
    whole.step()
    resumed = build_trainer(cfg, digits, tmp_path / "a")
    resumed.resume(open_checkpoint(tmp_path / "a"))
    resumed.step()
    assert_same_bits(flat_state(resumed), flat_state(whole))


@pytest.mark.parametrize("update", options("method/update"))
def test_update_options_train(composed, digits, tmp_path, update):
    trainer = build_trainer(composed("method=siss", f"method/update={update}"), digits, tmp_path)
    start = flat_state(trainer)
    trainer.step()
    after = flat_state(trainer)
    assert any(not torch.equal(after[key], start[key]) for key in start if "/weights/" in key)


@pytest.mark.parametrize("model", options("model"))
def test_model_options_fit_their_dataset(composed, tmp_path, model):
    sizes = {"ddpm_tiny": (1, 16, 16), "flow_tiny": (1, 16, 16), "dit": (1, 16, 16), "ddpm_cifar10": (3, 32, 32)}
    dataset = sizes.get(model, (1, 28, 28))
    # what their own weights are of lies on the hub
    of_another = {"sd15": foreign, "sdxl": foreign_xl, "sd3": foreign_sd3, "flux": foreign_flux, "dit": foreign_dit}
    more = [f"model.weights={of_another[model](tmp_path)}"] if model in of_another else []
    if model.startswith(("sd", "flux")):
        dataset = (3, 32, 32)
        more += ["dataset=sd_concepts"]
    cfg = composed(f"model={model}", *more)
    spec = DataSpec("toy", dataset, DIGITS, DIGITS, (0,), None, False)
    network = build_network(cfg, spec, 0)
    make(cfg["model"]["pretraining"])
    labels, timesteps = torch.tensor([1, 2]), torch.tensor([0, network.num_train_timesteps - 1])
    with torch.no_grad():
        prediction = network.predict(torch.randn(2, *network.sample_shape), timesteps, labels)
    assert prediction.shape == (2, *network.prediction_shape)


@pytest.mark.parametrize("evaluation", options("evaluation"))
def test_evaluation_options_build(composed, evaluation):
    cfg = composed(f"evaluation={evaluation}", *["dataset=sd_concepts"] * (evaluation == "prompts"), debug=False)
    built = make(cfg["evaluation"])
    assert {"rates", "fid", "kid", "prc", "is", "ssim"} <= set(built.metrics)
    assert {"nll", "mia"} <= set(built.metrics) or evaluation in ("quick", "prompts", "probes")


@pytest.mark.parametrize("hardware", [name for name in options("hardware") if not name.endswith("_gpu")])
def test_hardware_options_build(composed, hardware):
    built = make(composed(f"hardware={hardware}")["hardware"])
    if not torch.cuda.is_available():
        assert built.device == CPU


@pytest.mark.parametrize("logger", options("logger"))
def test_logger_options_open_and_close(composed, tmp_path, logger):
    built = make(composed(f"logger={logger}")["logger"])
    if built is None:  # the run folder alone
        assert logger == "jsonl"
        return
    built.start(tmp_path, {"seed": 0})
    built.log(1, {"loss/retain": 1.0})
    built.table("results", ["metric", "before"], [["forget_rate", 0.5]])
    built.finish({"eval/forget_rate": 0.1}, failed=False)


def of_the_base(dataset: str) -> bool:
    """Whether a dataset's images are drawn by the base, which then must come from elsewhere."""
    return yaml.safe_load((ROOT / "conf" / "dataset" / f"{dataset}.yaml").read_text()).get("source") == "base"


@pytest.mark.parametrize("dataset", options("dataset"))
def test_dataset_options_compose(composed, dataset, tmp_path):
    for name in ("forget", "retain"):
        (tmp_path / name).mkdir()
    folders = [f"dataset.{name}_dir={tmp_path / name}" for name in ("forget", "retain")]
    own = {"image_folder": folders, "request": [f"dataset.source={tmp_path}", "dataset.forget=forget"]}
    more = own.get(dataset, ["model=sd15"] if of_the_base(dataset) else [])
    cfg = composed(f"dataset={dataset}", *more)
    assert cfg["dataset"]["_target_"].startswith("unlearn_runner.data.")


KINDS = ("siss", "rl_lambda", "sfd", "critic_guided", "retrain")  # what experiments set differs by these at most


@pytest.mark.parametrize(
    "experiment", [name for name in options("experiment") if not name.startswith(("sd_", "memorised"))]
)
@pytest.mark.parametrize("methods", [KINDS, pytest.param(COMPLETE, marks=pytest.mark.slow)], ids=["some", "every"])
def test_experiments_compose_with_methods(composed, experiment, methods):
    for method in methods:
        overrides = (f"experiment={experiment}", f"method={method}", "evaluation.features=classifier")
        if method in ASKING_A_DIFFUSION_MODEL + ASKING_PROMPTS:
            try:
                cfg = composed(*overrides, debug=False)
            except ConfigurationError as error:
                assert "or another method" in str(error)  # what the method needs is not there
                continue
        cfg = composed(*overrides, debug=False)
        assert cfg["name"] == experiment
        plan, recipe = make(cfg["trainer"]), make(cfg["model"]["pretraining"])
        wanted = recipe if method == "retrain" else SimpleNamespace(**cfg["budget"])
        assert (plan.max_steps, plan.batch_size) == (wanted.max_steps, wanted.batch_size)
        num_labels = 10 if cfg["dataset"]["conditional"] else None
        shape = (
            (3, 32, 32) if "cifar10" in experiment else (1, cfg["dataset"]["image_size"], cfg["dataset"]["image_size"])
        )
        network = make(cfg["model"]["network"], image_shape=shape, label_names=names(num_labels), seed=0)
        diffusion, asks_labels = network.is_diffusion, method in (*DISTILLING, *ROLLING_OUT)
        refuses = (method in ASKING_A_DIFFUSION_MODEL and not diffusion) or (asks_labels and num_labels is None)
        if refuses or method in ASKING_PROMPTS:
            continue
        spec = DataSpec("toy", shape, None if num_labels is None else DIGITS, DIGITS, (0,), None, False)
        clip = make(cfg["clip"]["network"])
        built = build_method(cfg, network, spec, make_generator(0, "method"), clip)
        assert make(cfg["driver"]).total_steps(built, plan) == plan.max_steps * (1 + getattr(built, "rehearsals", 0))
    evaluation = make(cfg["evaluation"])
    assert set(evaluation.metrics) >= {"rates", "fid", "kid", "prc", "is", "ssim", "nll", "mia"}, "never fewer metrics"
    assert evaluation.relearning is not None
    features = make(cfg["judge"]).num_features
    require_enough_samples(evaluation.metrics, evaluation.sampling, features, num_labels)
    header = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text().split("defaults:")[0]
    assert "CPU" in header or "GPU" in header, "the header says how long it takes"


@pytest.mark.parametrize(
    ("experiment", "populations", "known"),
    [
        ("mnist_trousers_small", ("all", "retain"), 0.985),
        ("mnist_class_small", ("all", "retain"), 0.985),
        ("cifar10_class_small", ("all",), 0.75),
    ],
)
def test_published_models_spare_an_experiment_its_training(composed, digits, tmp_path, experiment, populations, known):
    """docs/cache, copied over a user's cache, holds the base, oracle and classifier that the experiment looks for."""
    cache = shutil.copytree(ROOT / "docs" / "cache", tmp_path / "cache")
    cfg = composed(f"experiment={experiment}", debug=False)
    key = {"network": cfg["model"]["network"], "pretraining": cfg["model"]["pretraining"]}
    bases = [json.loads(path.read_text()) for path in cache.glob("bases/*/key.json")]
    [fingerprint] = {base["data"] for base in bases if base["pretraining"] == key["pretraining"]}
    data = copy.copy(digits) if experiment == "mnist_trousers_small" else Digits().load()
    image_shape = (3, 32, 32) if experiment == "cifar10_class_small" else (1, 28, 28)
    data.__dict__["spec"] = data.spec._replace(image_shape=image_shape)
    data.__dict__["fingerprint"] = fingerprint  # no more is asked for, but the number of contents

    def build(seed: int):
        raise AssertionError("it would be trained")

    network = make(key["network"], image_shape=image_shape, label_names=names(10), seed=0)
    digests = {digest(network.state_dict())}
    recipe = make(key["pretraining"])
    for population in populations:
        network.load(pretrained(population, recipe, key, build, data, cache, Interrupts(), Console()))
        digests.add(digest(network.state_dict()))
    assert len(digests) == 1 + len(populations)
    judge = make(cfg["judge"]).judge(data, cache, CPU, build)
    assert judge.test_accuracy["retain"] >= known


PUBLISHED = []
for path in sorted((ROOT / "docs" / "runs").iterdir()):
    if not path.stem.endswith("_before"):  # those were made before the judge could abstain, and are to be made again
        of_siss = [texts for name, texts in runs_in(path) if re.fullmatch(r"siss.*_0", name)]
        PUBLISHED.append(pytest.param(path.stem, of_siss, id=path.stem))


@pytest.mark.parametrize("experiment, of_siss", PUBLISHED)
def test_runs_of_today_are_measured_like_the_published_ones(composed, experiment, of_siss):
    """Or compare.py would refuse to put a user's method beside them."""
    for texts in of_siss:
        published = json.loads(texts["summary.json"])["provenance"]["evaluation"]
        chosen = yaml.safe_load(texts["config.yaml"])["choices"]["experiment"]
        more = (
            [f"evaluation.metrics.{name}.per_class=false" for name in ("fid", "kid")] if "lambda" in experiment else []
        )
        cfg = composed(f"experiment={chosen}", *more, debug=False)
        shape = (3, 32, 32) if "cifar10" in experiment else (1, 28, 28)
        network = make(cfg["model"]["network"], image_shape=shape, label_names=names(10), seed=0)
        sampling, metrics = cfg["evaluation"]["sampling"], make(cfg["evaluation"]).metrics
        for name, found in published["metrics"].items():
            metric = metrics[name]
            assert found == {**metric.provenance(network), "version": metric.version}, name
        for key in ("sampler", "num_inference_steps", "batch_size", "seed", "bootstrap"):
            assert published[key] == sampling[key]


TUNED = sorted(path.relative_to(ROOT / "conf" / "tuned") for path in (ROOT / "conf" / "tuned").rglob("*.yaml"))


def families() -> dict[str, set[str]]:
    """The methods of each family, as Hydra composes them; one that names none is a family by itself."""
    found: dict[str, set[str]] = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for method in options("method"):
            choices = compose("train", [f"method={method}"], return_hydra_config=True).hydra.runtime.choices
            found.setdefault(choices.get("method/family", method), set()).add(method)
    return found


def test_tuned_settings_belong_to_an_experiment_or_a_model_and_a_family():
    """<experiment>/<model>/<family>.yaml, model/<model>/<family>.yaml, and <family>/<method>.yaml for what one method
    needs besides. No file only names another.
    """
    members = families()
    assert set(options("method/family")) <= {family for family, methods in members.items() if len(methods) > 1}
    for path in TUNED:
        experiment, model, family, *method = path.with_suffix("").parts
        assert experiment in ["model", *options("experiment")], path
        assert model in options("model"), path
        assert family in members, path
        assert set(method) <= members[family], path
        content = yaml.safe_load((ROOT / "conf" / "tuned" / path).read_text())
        assert set(content) - {"defaults"}, f"{path} has no value of its own"
    assert len(TUNED) < 40


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ("model=vae method=siss", {"rho": 0.1, "learning_rate": 4e-3}),
        ("model=vae method=siss_no_is", {"rho": 0.1, "learning_rate": 4e-3}),
        ("model=vae method=siss method.rho=0.2", {"rho": 0.2}),
        ("method=siss", {"rho": 0.04, "learning_rate": 5e-4}),
        ("experiment=mnist_tshirt", {"tau": 5}),
        ("experiment=mnist_tshirt method.tau=7", {"tau": 7}),
        ("experiment=mnist_tshirt method=rl_lambda", {"tau": 5}),  # a family inherited through a package
        ("experiment=digits_class method=adaptive_siss", {"rho": 0.2, "learning_rate": 5e-4}),
        ("experiment=digits_class method=siss", {"rho": 0.2, "learning_rate": 5e-4}),
        ("experiment=digits_class method=erase_diff", {"learning_rate": 1e-3}),
        ("experiment=digits_trousers method=siss", {"rho": 0.04, "learning_rate": 2e-4}),
        ("experiment=digits_trousers method=siss model=vae", {"rho": 0.1, "learning_rate": 4e-3}),  # the model's alone
        ("experiment=digits_class method=siss model=ddpm_small", {"rho": 0.04}),  # tuned for another model
        ("experiment=digits_trousers method=neg_grad", {"learning_rate": 5e-5}),  # a family by itself
        ("experiment=digits_trousers_lambda method=sfd", {"forget_weight": 0.01, "learning_rate": 5e-4}),
        ("experiment=cifar10_class_small method=hybrid", {"alpha": 1.0, "learning_rate": 6e-5}),
        ("experiment=sd_trousers method=critic_guided", {"max_steps": 40, "clip_range": 6e-3}),
        ("experiment=sd_trousers method=ddpo", {"max_steps": 64, "clip_range": 6e-3}),
        ("model=sd_tiny dataset=sd_concepts method=ddpo", {"max_steps": 128, "clip_range": 6e-3}),
    ],
)
def test_tuned_settings_are_found(composed, overrides, values):
    cfg = composed(*overrides.split(), debug=False)
    assert {name: cfg["budget" if name in cfg["budget"] else "method"][name] for name in values} == values


def test_a_method_adds_to_what_its_family_has(composed):
    chosen = "experiment=cifar10_class_small"
    schedules = [
        composed(chosen, f"method={method}", debug=False)["method"]["fake_update"]["lr_schedule"]
        for method in ("sfd", "sfd_two_stage")
    ]
    assert schedules[0] is None
    assert schedules[1]["factor"] == 1.0


def test_a_method_from_elsewhere_may_join_a_family(tmp_path):
    """Or be one by itself; what is tuned is found either way."""
    (tmp_path / "method").mkdir()
    text = (ROOT / "conf" / "method" / "siss_no_is.yaml").read_text()
    assert "rho: 0.04" in text
    (tmp_path / "method" / "mine.yaml").write_text(text.replace("rho: 0.04", "rho: 0.5"))
    (tmp_path / "method" / "alone.yaml").write_text("defaults: [neg_grad]\n")
    tuned = tmp_path / "tuned" / "digits_class" / "ddpm_tiny"
    tuned.mkdir(parents=True)
    (tuned / "alone.yaml").write_text("# @package _global_\nbudget: {max_steps: 7}\n")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        searched = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=digits_class"]
        assert compose("train", [*searched, "method=mine"]).method.rho == 0.2
        assert compose("train", [*searched, "method=alone"]).budget.max_steps == 7


def test_searches_name_options_that_there_are(composed):
    """What hparams_search=... sets, without Optuna; with it tests/test_sweeps.py runs one."""
    for name in options("hparams_search"):
        search = yaml.safe_load((ROOT / "conf" / "hparams_search" / f"{name}.yaml").read_text())
        chosen = [
            f"{group.partition('/')[2]}={option}"
            for entry in search["defaults"]
            for group, option in entry.items()
            if "hydra" not in group
        ]
        cfg = composed(*chosen, f"objective=[{','.join(search['objective'])}]")
        sweeper = search["hydra"]["sweeper"]
        assert len(sweeper["direction"]) == len(search["objective"])
        for key, space in sweeper["params"].items():
            assert OmegaConf.select(OmegaConf.create(cfg), key) is not None, key
            override = OverridesParser.create().parse_override(f"{key}={space}")
            assert override.is_interval_sweep()
            for end in (override.value().start, override.value().end):
                assert OmegaConf.select(OmegaConf.create(composed(*chosen, f"{key}={end}")), key) == end
