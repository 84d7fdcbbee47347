"""Wrong configurations: one sentence that names the option, before anything heavy is imported; none is accepted."""

import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COMPLETE, ROOT, SHARED, marked, options
from diffusers import DDPMScheduler
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_train import environment

from unlearn_runner.assembly import make
from unlearn_runner.cli import as_override
from unlearn_runner.constructors import constructor_of, parts
from unlearn_runner.errors import ConfigurationError
from unlearn_runner.rules.model_options import ratios_of_schedule
from unlearn_runner.spec import spec_of
from unlearn_runner.validation import checked

SD = ("model=sd_tiny", "dataset=sd_concepts")
ON_SD_ALONE = ("critic_guided", "ddpo", "esd", "concept_ablation", "erase_flow", "uce", "rece")
PROMPTS = (*SD, "method=siss", "evaluation=prompts")
ADAPTIVE = "method.lambd"
WRONG = [
    # types
    (["seed=1.5"], "seed must be a whole number of at least 0, got 1.5."),
    (["trainer.max_steps=1.5"], "trainer.max_steps must be a whole number above 0, got 1.5."),
    (["trainer.max_steps=3.0"], "trainer.max_steps must be a whole number above 0, got 3.0."),
    (["hardware.compile=maybe"], "hardware.compile must be true or false, got 'maybe'."),
    (["evaluation.oracle=maybe"], "evaluation.oracle=maybe: there is no such folder."),
    (["model.network.attention=abc"], "model.network.attention must be a list of true or false, got 'abc'."),
    (["model.network.attention=[1,0,0]"], r"must be a list of true or false, got \[1, 0, 0\]\."),
    (["evaluation.metrics.fid=abc"], "evaluation.metrics.fid must be a group of options .* or null, got 'abc'."),
    (["dataset.conditional=2"], "dataset.conditional must be true or false, got 2."),
    (["method.lambd=variance", "method=siss"], r"\[0, 1\] .*got 'variance'; did you mean method/lambd=variance"),
    (["method=siss", "method.lambd=1.5"], r"method.lambd must be a number in \[0, 1\]"),
    (["trainer.max_steps=[3]"], r"trainer.max_steps must be a whole number above 0, got \[3\]"),
    (["trainer=null"], "trainer must be a group of options that makes a Plan, got null"),
    (["method.update=null"], "method.update must be a group of options that makes an? Update, got null"),
    (["method.update.optimizer.betas=[0.9]"], r"must be a list of 2, got \[0.9\]"),
    (["logger=wandb", "logger.tags={a: 1}"], "logger.tags must be .* or null, got a group of options"),
    # ranges
    (["seed=-1"], "seed must be a whole number of at least 0, got -1."),
    (["seed=4294967296"], r"seed must be a whole number in \[0, 4294967296\), got 4294967296"),
    (["trainer.batch_size=0"], "trainer.batch_size must be a whole number above 0, got 0."),
    (["budget.batch_size=0"], "^budget.batch_size must be a whole number above 0, got 0."),
    (["evaluation.every=0"], "^evaluation.every must be a whole number above 0 or null, got 0"),
    (["evaluation.num_samples=0"], "^evaluation.num_samples must be"),
    (["trainer.batch_size=1000000000"], r"whole number in \(0, 1048576\], got 1000000000"),
    (["trainer.init=middle"], "trainer.init must be one of base, scratch, got 'middle'"),
    (["trainer.checkpointing_steps=0"], "trainer.checkpointing_steps must be a whole number above 0 or null, got 0"),
    (["hardware.threads=1000000"], "hardware.threads must be a whole number"),
    (["hardware.num_processes=0"], "hardware.num_processes must be a whole number"),
    (["hardware.mixed_precision=fp16"], "hardware.mixed_precision must be one of no, bf16 or null, got 'fp16'"),
    (["hardware.accelerator=tpu"], "hardware.accelerator must be one of auto, cpu, cuda, got 'tpu'"),
    (["budget.learning_rate=nan"], "budget.learning_rate must be a number above 0, got nan"),
    (["method.update.optimizer.lr=-1"], "method.update.optimizer.lr must be a number above 0, got -1"),
    (["method.update.optimizer.betas=[0.9,1.5]"], r"must be a list of numbers in \[0, 1\)"),
    (["method.update.lr_schedule.name=cosin"], "method.update.lr_schedule.name must be one of linear, cosine"),
    (["method.update.ema_decay=1.0"], r"must be a number in \[0, 1\) or null, got 1.0"),
    (["method.update.max_grad_norm=0"], "must be a number above 0 or null, got 0"),
    (["method=siss", "method.superfactor=-2"], "method.superfactor must be a number above -1, got -2"),
    (["method=siss", "method.population=both"], "method.population must be one of retain, all, got 'both'"),
    (["method=adaptive_siss", "method.lambd.beta=0"], "method.lambd.beta must be a number above 0"),
    (
        ["method=adaptive_siss", "method.lambd.objective=elbo"],
        "method.lambd.objective must be one of pathwise, variance, blend",
    ),
    (["method=adaptive_siss", "method.lambd.context=current"], "method.lambd.context must be previous with objective"),
    (["method=sfd", "method.second_teacher=fake_score"], "second_teacher=fake_score needs method.distil_share above 0"),
    (["method=erase_diff", "method.eta=0"], "method.eta must be a number above 0, got 0"),
    (["method=sfd", "method.forget_samples=2"], r"method.forget_samples must be a number in \(0, 1\]"),
    (["method=hybrid", "method.variant=none"], "method.variant must be one of multi_class"),
    (["method=rl_lambda", "method/agent=sac", "method.kl_weight=0.1"], "method.kl_weight=0.1 needs method/agent=ppo"),
    (["method=rl_lambda", "method.kl_weight=0.1", "method.agent.ent_coef=0"], "with method.agent.ent_coef above 0"),
    (["method=rl_lambda", "+method.agent.use_sde=true"], "use_sde=true has a standard deviation of its own"),
    (["method=rl_lambda", "+method.agent.gamma=2"], r"method.agent.gamma must be a number in \[0, 1\]"),
    (["method=rl_lambda", "method.training=offline"], "method.training must be one of online, episodic"),
    (["evaluation.threshold=few"], r"evaluation.threshold must be a number in \[0, 1\] or null, got 'few'"),
    (["evaluation.bootstrap=3"], "evaluation.bootstrap must be a whole number of at least 20 or null, got 3"),
    (["evaluation.sampler=euler"], "evaluation.sampler must be one of ddim"),
    (["evaluation.metrics.prc.neighbours=0"], "evaluation.metrics.prc.neighbours must be a whole number above 0"),
    (["evaluation=full", "evaluation.metrics.mia.timesteps=[1000]"], r"list of whole numbers in \[0, 1000\)"),
    (["evaluation=full", "evaluation.metrics.mia.timesteps=[]"], "that is not empty"),
    (["evaluation=full", "evaluation.relearning.every=0"], "relearning.every must be a whole number above 0"),
    (["dataset.contamination=0.999999"], r"dataset.contamination must be a number in \(0, 0.99\], got 0.999999"),
    (["dataset.image_size=4"], r"dataset.image_size must be a whole number in \[8, 4096\], got 4"),
    (["dataset=cifar10", "dataset.channels=4"], "dataset.channels must be one of 1, 3, got 4"),
    (["dataset=mnist_trousers", "dataset.garment=hat"], "dataset.garment must be one of t-shirt, trousers"),
    (["model.network.prediction_type=sample"], "model.network.prediction_type must be one of epsilon, v_prediction"),
    (["model=vae", "model.network.latent_size=0"], "model.network.latent_size must be a whole number above 0"),
    ([*SD, "model.network.guidance_scale=0.5"], r"guidance_scale must be a number in \[1, 1000\], got 0.5"),
    ([*SD, "model.network.vae.norm_num_groups=5"], "vae.block_out_channels must divide by norm_num_groups=5"),
    ([*SD, "model.network.prediction_type=flow"], "got 'flow': flows are models of pixels so far"),
    ([*SD, "+model.network.vae.layers=5"], "model.network.vae.layers: there is no such option"),
    # names
    (["name=../../x"], "name must be a text that can be the name of one folder"),
    (["paths.cache=''"], "paths.cache must be a text that is not empty"),
    (["+method.lambda=0.5"], "method.lambda: Posterior has no such option; near it: lambd"),
    (["+foo=1"], "foo: there is no such option"),
    (["+evaluation.metrics.mine._target_=unlearn_runner.evaluation.metrics.Mine"], "there is no such class"),
    (["evaluation.metrics.fid._target_=unlearn_runner.hardware.Hardware"], "makes no Metric, which is needed there"),
    (["method._target_=unlearn_runner.methods.method.Update"], "makes no Method, which is needed there"),
    (["method=sfd", "+method.labels=3"], "method.labels: SFD has no such option"),
    (["~evaluation.oracle"], "evaluation.oracle is missing: give it, evaluation.oracle=..."),
    # combinations
    (["evaluation.metrics.is.splits=1000"], "needs at least 1000 samples .its splits.; evaluation.num_samples=200"),
    (["evaluation.num_samples=10"], "evaluation.metrics.fid needs at least 100 samples"),
    (
        ["+evaluation.probe.metrics.kid={_target_: unlearn_runner.evaluation.metrics.KID}"],
        "evaluation.probe.metrics.kid needs at least 100 samples .*; evaluation.probe.sampling.num_samples=50 gives 50",
    ),
    (
        ["objective=eval/fid"],
        "objective: no metric of this run makes 'eval/fid'; there are eval/coverage_forget, eval/deletion_steps",
    ),
    (["objective=oracle/fid_retain"], "objective: no metric of this run makes 'oracle/fid_retain'"),
    (["method=sfd", "method.distil_share=1"], r"method.distil_share must be a number in \[0, 1\)"),
    (["method=sfd", "method.distil_share=0.999"], "leaves none of 250 steps to forget in"),
    ([*SD, "method=critic_guided", "method.forget_share=0"], r"method.forget_share must be a number in \(0, 1\]"),
    ([*SD, "method=critic_guided", "method.critic_warmup=999"], "method.critic_warmup must be below trainer.max_steps"),
    ([*SD, "method=critic_guided", "method.least_history=99"], "must be at most method.history=32"),
    ([*SD, "method=critic_guided", "clip=none"], "method=critic_guided asks CLIP; say which with clip=tiny"),
    (["evaluation.num_inference_steps=1001"], "must be at most 1000, the timesteps of the model's schedule; got 1001"),
    (["model=sd_tiny"], "Stable Diffusion draws under prompts, and the dataset has none; take dataset=sd_concepts"),
    (["method=sfd", "+method.setting=3"], "method.setting: the runner itself gives it; take it away"),
    (["+method.update.model=3"], "method.update.model: the runner itself gives it; take it away"),
    (["+model.network.seed=3"], "model.network.seed: the runner itself gives it; take it away"),
    (["method._partial_=false"], "method._partial_ must be true, got false"),
    (["model=vae", "method=sfd"], "method=sfd needs a diffusion model; take model=ddpm_tiny"),
    (["model=vae", "method=erase_diff"], "method=erase_diff needs a diffusion model; take model=ddpm_tiny"),
    (
        ["method=erase_diff", "method.variant=released", "dataset.conditional=false"],
        "method=erase_diff method.variant=released needs a dataset with labels or prompts",
    ),
    (["model=vae", "method=ddpo"], "method=ddpo needs a diffusion model; take model=ddpm_tiny"),
    (["dataset.conditional=false", "method=hybrid"], "method=hybrid needs a dataset with labels or prompts; take"),
    (["dataset.conditional=false", "method=sfd"], "method=sfd needs a dataset with labels or prompts; take"),
    (["method=esd"], "method=esd needs prompts; take model=sd_tiny dataset=sd_concepts, or another"),
    (["method=sfd", "trainer.init=scratch"], "method=sfd begins with the base; trainer.init must be base, got"),
    (["model=vae", "hardware.compile=true"], "hardware.compile must be false, got true: this model has no UNet"),
    (["model.pretraining=null"], "model.weights must be a folder or a hub id, got 'auto'"),
    # oracles
    ([*SD, "method=siss", "evaluation.oracle=true"], "evaluation.oracle=true retrains .* learns from .*corpus"),
    ([*SD, "method=siss", "evaluation.oracle_seeds=[0,1]"], r"evaluation.oracle_seeds=\[0, 1\] retrains .*corpus"),
    (["model.weights=tests", "evaluation.oracle=true"], "how model.weights=tests was trained is not known"),
    (["model.weights=tests", "evaluation.oracle_seeds=[0]"], r"seeds=\[0\] retrains .*oracle=<folder>, or leave it"),
    (["model.weights=tests", "method=retrain"], "method=retrain .*init=scratch.* is not known, .* take method=given"),
    (["evaluation.oracle=''"], "evaluation.oracle must be true, false, or one or more folders of models, got ''"),
    (["evaluation.oracle=[]"], r"evaluation.oracle must be true, false, or one or more folders of models, got \[\]"),
    (["evaluation.oracle=[tests,./nowhere]"], "evaluation.oracle=./nowhere: there is no such folder"),
    (["evaluation.oracle=outputs/today/oracel"], "evaluation.oracle=outputs/today/oracel: there is no such folder"),
    (["evaluation.oracle=[tests,tests]"], "evaluation.oracle=tests holds the same model as tests, which would count"),
    (["evaluation.oracle=[tests,./tests]"], "evaluation.oracle=./tests holds the same model as tests, which would"),
    (["model.weights=./tests", "evaluation.oracle=tests"], "tests holds the same model as model.weights=./tests"),
    (["evaluation.oracle=tests", "evaluation.oracle_seeds=[0,1]"], "is of your own, .* give one of the two"),
    (["evaluation.oracle_seeds=[1,0,1]"], r"evaluation.oracle_seeds must be different seeds, got \[1, 0, 1\]"),
    (["evaluation.oracle_seeds=[]"], "evaluation.oracle_seeds must be a list .* that is not empty"),
    (["evaluation.oracle_seeds=[-1]"], "evaluation.oracle_seeds must be a list of whole numbers"),
    (["evaluation.oracle_seeds=3"], "evaluation.oracle_seeds must be a list of whole numbers .*, got 3"),
    (["evaluation.oracle_seeds=[3]", "objective=gap_z/fid_retain"], "no metric of this run makes 'gap_z/fid_retain'"),
    ([*SD, "method=siss", "evaluation=prompts", "clip=none"], "clip_score asks CLIP; say which with clip=tiny"),
    (["model.network.norm_num_groups=7"], r"divide by norm_num_groups=7, got \[16, 32, 64\]"),
    (["dataset.image_size=17"], "its sides must divide by 4; the dataset's are 17 x 17"),
    (["evaluation.probe.metrics.rates=null"], "evaluation.probe.metrics.rates must not be null"),
    (["dataset=image_folder", "dataset.forget_dir=tests", "dataset.retain_dir=tests/../tests"], "hold the same images"),
    (["evaluation.novelty.neighbours=500", "evaluation.novelty.max_images=100"], r"max_images \(100\), got 500"),
    (["evaluation.novelty.max_images=100000"], r"max_images must be a whole number in \[20, 20000\], got 100000"),
    (["evaluation.features=inception", "judge.extractor=null"], "inception is not what the judge has, .*=null"),
    (["judge.extractor.name=open_clip"], "features=classifier is not what the judge has, which is open_clip"),
    ([*PROMPTS, "evaluation.metrics.robustness.templates=[abc]"], r"robustness.templates must be .*; got \['abc'\]"),
    ([*PROMPTS, "evaluation.metrics.paraphrases.templates=['{}{}']"], "templates must be one or more prompts"),
    (["objective=eval/outliers_forget", "evaluation.novelty=null"], "no metric of this run makes 'eval/outl"),
    (["model.weights=./nowhere"], "model.weights=./nowhere: there is no such folder"),
    (["method=siss", "method.tau=1"], "give method.tau or method.rho, not both"),
    ([*SD, "+model.network.beta_start=0.5"], "model.network.beta_start must be at most beta_end, got 0.5 and 0.012"),
    # what is known of a dataset before its images are read
    (["dataset=digits", "dataset.forget_class=eleven"], "dataset.forget_class=eleven: there is no such class"),
    (["dataset=digits", "dataset.forget_class=[3,eleven]"], "dataset.forget_class=eleven: there is no such class"),
    (["dataset=digits", "dataset.forget_class=[3,'3']"], "dataset.forget_class names '3' twice; give each name once"),
    (["dataset=cifar10", "dataset.forget_class=[cat,cat]"], "dataset.forget_class names 'cat' twice"),
    (["dataset=digits", "dataset.forget_class=[]"], "dataset.forget_class must be one or more names .* an empty list"),
    (["dataset=digits", "dataset.forget_class=[0,1,2,3,4,5,6,7,8,9]"], "names all 10 classes, so none would be kept"),
    (["dataset=digits", "dataset.forget_class=null"], "a whole number or a list of texts or whole numbers, got null"),
    (["dataset=digits", "dataset.forget_class=[3,[7]]"], r"a list of texts or whole numbers, got \[3, \[7\]\]"),
    (["dataset=digits", "dataset.forget_class=[3,7]", "method=sfd", "method/override=fixed", "method.override.label=7"],
     "the labels that are kept, 0, 1, 2, 4, 5, 6, 8, 9; got 7"),
    (["dataset=digits", "dataset.forget_class=[3,7]", "method=hybrid", "method.prior=[0.5,0.5]"], "null or 8 shares"),
    (["method=sfd", "method/override=fixed", "method.override.label=99"], "the labels that are kept, 0, 2, .*; got 99"),
    (["method=sfd", "method/override=fixed", "method.override.label=1"], "the labels that are kept, 0, 2, .*; got 1"),
    (["method=hybrid", "method.prior=[0.5,0.5]"], "method.prior must be null or 9 shares, one for each class"),
    (["method=hybrid", "method/lambd=pathwise"], "method/lambd=pathwise speaks of a forget loss that is to rise"),
    (["method=sfd", "model.network.prediction_type=flow", "method.noise.most=1e3"], r"0\.001 to 999; got 1000"),
    (["model.network.prediction_type=flow", "model.network.num_train_timesteps=2"], "must be at least 3 for a flow"),
    (["method=sfd", "method.noise.most=5e8"], "method.noise.most must be a ratio of .*, 0.00643 to 2.03e.04; got"),
    ([*SD, "dataset.background=blurple"], "dataset.background must be a colour, as white or '#ffffff', got 'blurple'"),
    ([*SD, "dataset.concept=elephant"], "dataset.source=embedded has pictures of a zero, .*; not of elephant"),
    ([*SD, "dataset.concept=[trousers,elephant]"], "has pictures of a zero, .*; not of elephant"),
    ([*SD, "dataset.concept=[trousers,trousers]"], "dataset.concept names 'trousers' twice; give each name once"),
    ([*SD, "dataset.concept=[trousers,a seven]"], "concepts, and not 'a seven', which is to be forgotten"),
    ([*SD, "dataset.concept=[]"], "dataset.concept must be one or more names of what is to be forgotten, got an empty"),
    ([*SD, "dataset.forget_templates=[abc]"], "dataset.forget_templates must be one or more prompts with one {} each"),
    ([*SD, "dataset.paraphrases=[abc]"], "dataset.paraphrases must be one or more prompts with one {} each"),
    ([*SD, "dataset.paraphrases=['a {} of {x}']"], "dataset.paraphrases must be one or more prompts with one {} each"),
    (["judge=clip", "judge.recognizer.templates=['a { of {}']"], "judge.recognizer.templates must be one or more"),
    ([*SD, "model.pretraining.corpus.templates=[]"], "model.pretraining.corpus.templates must be one or more prompts"),
    ([*SD, "dataset.retain_concepts=[trousers]"], "dataset.retain_concepts must be one or more different concepts"),
    (["evaluation=full", "evaluation.num_samples=200"], "evaluation.metrics.fid needs at least 100 samples for each"),
    (["clip=tiny", "clip.network.heads=3"], "clip.network.width must divide by heads=3, got 64"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "sentence"), WRONG, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_wrong_options_are_refused(composed, overrides, sentence):
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        composed(*overrides, debug=False)
    assert "\n" not in str(refused.value)


def test_nothing_heavy_is_imported_for_a_mistake():
    code = "import sys; import unlearn_runner.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    code = (
        "import sys; from hydra import compose, initialize_config_dir; from omegaconf import OmegaConf;"
        "import unlearn_runner.cli; from unlearn_runner.validation import checked;"
        f"initialize_config_dir({str(ROOT / 'conf')!r}, version_base='1.3').__enter__();"
        "cfg = compose('train', ['name=x', 'label=x', 'choices={dataset: a, model: b, method: c, experiment: null}',"
        "'logger=jsonl']); checked(OmegaConf.to_container(cfg, resolve=True)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("dataset", ["digits", "digits_trousers", "sd_concepts", "mnist_trousers", "cifar10", "mnist"])
def test_what_is_known_before_reading_is_what_the_constructor_makes(composed, dataset):
    places = {"cifar10": ("source=cifar10",), "mnist": ("source=mnist",),
              "mnist_trousers": ("source=mnist", "garment_source=fashion_mnist")}.get(dataset, ())  # fmt: skip
    if places and not SHARED.exists():
        pytest.skip(f"needs {SHARED}")
    given = [f"dataset.{name}={SHARED / folder}" for name, folder in (place.split("=") for place in places)]
    model = ("model=sd_tiny",) if dataset == "sd_concepts" else ()
    node = composed(f"dataset={dataset}", *given, *model, debug=False)["dataset"]
    assert spec_of(node) == make(node).spec is not None


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("timesteps", [2, 100, 1000])
def test_the_noise_of_a_schedule_is_known_before_it_is_made(schedule, timesteps):
    network = {"beta_schedule": schedule, "beta_start": 1e-4, "beta_end": 0.02}
    signal = DDPMScheduler(num_train_timesteps=timesteps, **network).alphas_cumprod.double()
    assert ratios_of_schedule(network, timesteps) == pytest.approx((1 / signal - 1).sqrt()[[0, -1]].tolist(), rel=1e-3)


@pytest.mark.parametrize("method", COMPLETE)
def test_annotations_of_every_method_are_understood(composed, method):
    """No option of our own constructors is unknown to the check, or it would take anything."""
    dataset = SD if method in ON_SD_ALONE else ()
    cfg = composed(f"method={method}", *dataset, "evaluation=full", "evaluation.num_samples=2000", debug=False)
    unknown = [
        f"{path}.{name}"
        for path, node in parts(cfg)
        if node["_target_"].startswith("unlearn_runner.")
        for name in node
        if not name.startswith("_") and str(constructor_of(node["_target_"]).options[name].type) == "typing.Any"
    ]
    assert not unknown


def test_names_that_look_like_numbers_are_text(composed):
    cfg = composed("label=7", "name=123", "method=critic_guided", *SD, "method.override=1984", debug=False)
    assert (cfg["label"], cfg["name"], cfg["method"]["override"]) == ("7", "123", "1984")


@pytest.mark.parametrize(
    "text",
    ["a", "a b", "é/ü=c", "it's", "a\\", "a\\'b", "\\\\'", "${x}", "\\${x}", "[1,2]", "{a:b}", "1", "null", "a,b", "#x",
     'a"b', "  sp ", "(x)", "*?", "~/x y", "$HOME", "[/b]c", "1e3"],
)  # fmt: skip
def test_overrides_are_quoted_for_shell_and_hydra(text):
    (word,) = shlex.split(as_override("dataset.forget_dir", text))
    override = OverridesParser.create().parse_override(word)
    assert OmegaConf.to_container(OmegaConf.create({"x": override.value()}), resolve=True) == {"x": text}


# Trust


HOSTILE = [
    ["method._target_=torch.hub.load"],
    ["method._target_=torch.load"],
    ["method._target_=shutil.copy"],
    ["method._target_=os.system"],
    ["+method.update.optimizer.x={_target_: os.system, command: 'touch owned'}"],
    ["+dataset.x={_target_: os.system, command: 'touch owned'}"],
    ["logger=wandb", "logger._target_=subprocess.Popen"],
    ["++logger._target_=subprocess.Popen"],
    ["hardware._target_=unlearn_runner.distributed.work"],
    ["method._target_=unlearn_runner.distributed.launch"],
    ["method=rl_lambda", "method.agent._target_=stable_baselines3.common.save_util.load_from_pkl"],
    ["method=rl_lambda", "+method.agent.policy_kwargs.x={_target_: os.system}"],
]


@pytest.mark.parametrize("overrides", HOSTILE)
def test_no_foreign_code_runs(composed, overrides):
    with pytest.raises(ConfigurationError):
        composed(*overrides, debug=False)


def test_what_is_trusted_besides_is_said(composed):
    wanted = "evaluation.metrics.fid._target_=collections.OrderedDict"
    with pytest.raises(ConfigurationError, match=r"\+\+security.allow=\[collections.\]"):
        composed(wanted, debug=False)
    with pytest.raises(
        ConfigurationError, match=r"no such class or function|makes no Metric"
    ):  # trusted, but no metric
        composed(wanted, "security.allow=[collections.]", debug=False)
    assert composed("security.allow=[collections.]", debug=False)["security"] == {"allow": []}, "not handed on"


def test_a_class_of_ones_own_is_checked_like_ours(composed, tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from unlearn_runner.evaluation.metrics import IS\n"
        "from unlearn_runner.options import PositiveInt\n\n\n"
        "class Mine(IS):\n    def __init__(self, count: PositiveInt = 3):\n        super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["+evaluation.metrics.mine={_target_: of_mine.Mine, count: %s}", "security.allow=[of_mine.]"]
    assert composed(mine[0] % 2, mine[1], debug=False)["evaluation"]["metrics"]["mine"]["count"] == 2
    with pytest.raises(ConfigurationError, match=r"mine.count must be a whole number above 0, got 0"):
        composed(mine[0] % 0, mine[1], debug=False)


def test_a_run_folder_cannot_trust_itself(composed, tmp_path):
    cfg = composed(debug=False)
    cfg["security"] = {"allow": ["os."]}
    cfg["method"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'owned'}"}
    OmegaConf.save(OmegaConf.create(cfg), tmp_path / "config.yaml")
    done = command("--config-path", str(tmp_path), "--config-name", "config", folder=tmp_path)
    assert done.returncode == 1
    assert "method._target_=os.system: only what begins with" in done.stderr
    assert not (tmp_path / "owned").exists()


def command(*overrides: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        capture_output=True, text=True, timeout=300, env=environment(folder / "o", folder / "c"), cwd=folder,
    )  # fmt: skip


def groups_below(node, path=()):
    """Every option and every group of options, by its path."""
    if isinstance(node, dict):
        for key, part in node.items():
            yield (*path, key)
            yield from groups_below(part, (*path, key))


STARTS = [
    ("method=siss",),
    ("method=rl_lambda", "method.update_every=2", "method.agent.batch_size=2"),
    ("method=hybrid", "evaluation=full"),
    ("model=vae", "method=retrain"),
    (*SD, "method=critic_guided", "evaluation=prompts", "method.critic_warmup=0"),
]


@pytest.mark.parametrize(("start",), marked([(start,) for start in STARTS], {(start,) for start in STARTS[1:]}))
def test_nothing_but_a_sentence_comes_of_an_option_that_is_gone(composed, start):
    """Without one it is the constructor's default that counts, also for combinations."""
    cfg = composed(*start)
    for path in list(groups_below(cfg)):
        above = group_of(cfg, path)
        kept = dict(above)
        del above[path[-1]]
        accepted_or_one_sentence(cfg)
        above |= kept
    assert checked(cfg) == cfg


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS, ids=" ".join)
def test_nothing_but_a_sentence_comes_of_any_option_that_is_odd(composed, start):
    cfg = composed(*start)
    for path in list(groups_below(cfg)):
        above = group_of(cfg, path)
        kept = above[path[-1]]
        for odd in (None, -1, 0.5, "x", [], [{}], {1: 2}, {"_target_": 3}):
            above[path[-1]] = odd
            accepted_or_one_sentence(cfg)
        above[path[-1]] = kept
    assert checked(cfg) == cfg


def group_of(cfg, path):
    for key in path[:-1]:
        cfg = cfg[key]
    return cfg


def accepted_or_one_sentence(cfg) -> None:
    try:
        checked(cfg)
    except ConfigurationError as error:
        assert "\n" not in str(error)


# Many of them, by chance


def mistyped(word: str, rng: random.Random) -> str:
    """A word with a letter left out, doubled or exchanged for its neighbour."""
    i = rng.randrange(1, len(word) - 1)
    return rng.choice(
        [word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2 :]]
    )


ANY_NUMBER = ("prior_mean", "alpha")  # whose range is all of them
MAY_BE_EMPTY = ("words", "retain_concepts", "paraphrases", "tags")


def leaves(node, path=""):
    if isinstance(node, dict):
        for key, part in node.items():
            if not key.startswith("_"):
                yield from leaves(part, f"{path}.{key}".strip("."))
    else:
        yield path, node


def wrong_value(path: str, value, rng: random.Random) -> str | None:
    """Something that an option with this value cannot be; None where nothing is known to be wrong."""
    name = path.rpartition(".")[2]
    anything = ["{a: 1}", "[[1],[2]]", "{_target_: os.system}"]
    if isinstance(value, bool):
        return rng.choice(["maybe", "2", "1.0", "[true]", "'true'", *anything])
    if isinstance(value, int):
        return rng.choice(["1.5", "many", "'3'", "true", "[1]", "-7", "1000000000000000", "nan", *anything])
    if isinstance(value, float):
        signs = [] if name in ANY_NUMBER else ["-1e9"]
        return rng.choice(["abc", "'0.1'", "true", "[0.1,0.2]", "nan", "inf", *signs, *anything])
    if isinstance(value, str):
        return rng.choice(["[a,b]", "1.5", "true", *anything])
    if isinstance(value, list):
        inner = ["[{a: 1}]", "[[1]]"] + (["[abc]"] if value and not isinstance(value[0], str) else [])
        return rng.choice(["5", "true", "1.5", *inner, "{a: 1}"])
    return None


def wrong_configurations(count: int, seed: int, compose) -> list[tuple[str, ...]]:
    """Overrides that are wrong in one place, by a fixed seed."""
    rng = random.Random(seed)
    starts = [(f"method={method}",) for method in COMPLETE if method not in ON_SD_ALONE]
    starts += [(*SD, f"method={method}") for method in (*ON_SD_ALONE, "siss")]
    starts += [("model=vae", "method=siss"), ("evaluation=full",), ("dataset=digits",), ("clip=tiny",)]
    known = {start: list(leaves(compose(*start))) for start in starts}
    groups = ["dataset", "model", "method", "hardware", "evaluation", "judge", "logger", "experiment", "clip"]
    found = []
    while len(found) < count:
        start = rng.choice(starts)
        path, value = rng.choice(known[start])
        kind = rng.random()
        if path.startswith(("choices", "security")):
            continue
        if kind < 0.1:
            group = rng.choice(groups)
            option = mistyped(rng.choice([name for name in options(group) if len(name) > 3]), rng)
            if option not in options(group):
                found.append((*start, f"{group}={option}") if group not in str(start) else (f"{group}={option}",))
        elif kind < 0.25:
            above, _, name = path.rpartition(".")
            if (
                len(name) > 3
                and (wrong := mistyped(name, rng)) != name
                and f"{above}.{wrong}".strip(".") not in dict(known[start])
            ):
                found.append((*start, f"{rng.choice(['', '+'])}{above}.{wrong}=1".replace("+.", "+").removeprefix(".")))
        elif (wrong := wrong_value(path, value, rng)) is not None:
            found.append((*start, f"{path}={wrong}"))
    return found


@pytest.mark.slow
def test_many_wrong_configurations(composed, tmp_path):
    """Each gets one sentence, within seconds and without a traceback, and leaves nothing behind.

    UNLEARN_RUNNER_WRONG=<count> and UNLEARN_RUNNER_WRONG_SEED choose how many and which.
    """
    count, seed = (int(os.environ.get(name, default)) for name, default in
                   (("UNLEARN_RUNNER_WRONG", 60), ("UNLEARN_RUNNER_WRONG_SEED", 0)))  # fmt: skip
    faults, seconds = [], []
    for overrides in wrong_configurations(count, seed, lambda *start: composed(*start, debug=False)):
        started = time.perf_counter()
        done = command(*overrides, folder=tmp_path)
        seconds.append(time.perf_counter() - started)
        said = done.stderr.strip()
        if (
            done.returncode != 1
            or len(said.splitlines()) != 1
            or re.search("Traceback|Error in call|Error executing", said)
        ):
            faults.append((overrides, done.returncode, said[-300:]))
        elif seconds[-1] > 5:
            faults.append((overrides, f"{seconds[-1]:.1f} s", said))
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    print(f"{count} wrong configurations: median {sorted(seconds)[count // 2]:.2f} s, longest {max(seconds):.2f} s")
    assert not faults, "\n".join(map(str, faults))
    assert not left
