"""Every key that a run measures: its order, which way is better, its bounds, where it is shown, one sentence about it.

Read by the recorder, compare.py and its page, the W&B workspace, the check of `objective` and docs/metrics.md. A new
metric is a class, an entry in a YAML of conf/evaluation and a line here. Keys that are not here are shown only to who
names them. Imports nothing heavy. `python -m unlearn_runner.catalogue` prints the table of docs/metrics.md.
"""

import math
from collections.abc import Sequence
from enum import Flag, auto
from fnmatch import fnmatchcase
from statistics import mean, stdev
from typing import NamedTuple

LOW, HIGH = "low", "high"
ORACLE = "oracle"  # best is what the model has that never saw the forget set
RUBBLE = 0.2  # see `is_rubble`
USUAL = ("outliers_retain", "nothing_rate")  # what of the base says how much rubble is usual: the first that is there
SHARE, POSITIVE, ANY = (0.0, 1.0), (0.0, math.inf), (-math.inf, math.inf)  # bounds
FORGETTING, RETENTION, COST = "forgetting", "retention", "cost"
OWN = "own features"
IN_FEATURES = ("FID", "KID", "PrecisionRecall", "IS")  # who measures in the features of `evaluation.features`
# How these are called beside a score, by how the name of an extractor begins that provenance tells. Papers' FID, KID
# and IS are InceptionV3's, so there nothing is added; what has no line here is a judge's own.
FEATURES = {
    "torch-fidelity": "",
    "efficientnet": "EfficientNet features",
    "open_clip": "CLIP features",
    "dinov2": "DINOv2 features",
}
FROM_THE_BASE = ("*ssim*", "*fid_base*")  # what is compared with the base's own samples
SCORED = ("eval/", "base/", "oracle/", "oracle_gap/", "oracle_std/", "gap_z/", "floor/")  # prefixes of scores' keys


class In(Flag):
    """Where a key is shown without being asked for."""

    NOTHING = 0
    RUN = auto()  # the table at the end of a run, which has diverged if one of these is no finite number
    LONG = auto()  # compare.py --all, and its Markdown and CSV
    SHORT = auto()  # the headlines: compare.py, what its page shows first and tests, the W&B workspace
    PLOT = auto()  # an axis of the page's plots


class Entry(NamedTuple):
    """One key, without the prefix `eval/`, which `base/` and `oracle/` share; with any other prefix it is the whole."""

    key: str  # * stands for whatever follows
    made_by: str  # the class whose score it is
    better: str | float | None  # LOW, HIGH, ORACLE, the best value, or None: then nothing of it is marked as the best
    bounds: tuple[float, float]  # least and most that are possible
    about: str | None  # FORGETTING, RETENTION or COST
    shown: In
    sentence: str  # Markdown; entries with the same one are one line of the docs' table


RUN, LONG, SHORT, PLOT, NOTHING = In.RUN, In.LONG, In.SHORT, In.PLOT, In.NOTHING
# fmt: off
_NLL = ("negative log-likelihood in bits/dim of training images to forget, of held-out images to keep, by the "
        "probability-flow ODE with an adaptive solver; a VAE's by importance sampling")
_BOUND = "the variational bound on it: cheap, more images, above `nll_*`"
_TO_FORGET = ("Fréchet distance, squared MMD (cubic kernel) between features of samples under the forget condition and "
              "of the forget images. High, but rubble is far away too")
_TO_IMAGES = "the same between samples under the other labels and real images with those labels"
_CMMD = ("squared MMD (Gaussian kernel) of CLIP's embeddings, times 1000 ([2401.09603]"
         "(https://arxiv.org/abs/2401.09603)), of the same pairs of sets, with `evaluation.features=open_clip`")
_NEIGHBOURS = ("share of samples that lie among real images, of real images that lie among samples (3 nearest "
               "neighbours, [1904.06991](https://arxiv.org/abs/1904.06991)): quality and variety apart")
_INCEPTION = "inception score from the judge's probabilities, or from the extractor's where it has some"
_SSIM = ("structural similarity of each sample with the **base model's sample from the same noise and label**: how "
         "much unlearning moved the pictures. Nothing is compared with real images. 1 for the base itself")
_MIA = "membership inference: can low losses tell forget images from unseen ones of the same content?"
_TO_BASE = ("Fréchet distance from the **base's own samples from the same noise**, with `evaluation=prompts` or "
            "`+evaluation.metrics.fid_base={_target_: unlearn_runner.evaluation.metrics.FID, against: base}`. 0 for a "
            "model that was not changed, `fid_base_forget` should rise; absent for the base")
_ANY = ", of several any of them"
_CLASS = "the same for one label; distances are to the clean images of that label"
_APART = ("where several contents are to be forgotten, the same rate of the samples under the conditions, or of the "
          "pictures under the texts, of one of them. A sample under one that shows another one to forget counts; "
          "`per_class/accuracy/*` of its label says how often it shows this one")
_TIMESTEP = "where the attack finds a difference"
_NEAR = (
    "`retain_accuracy` of the labels whose content is most like what is to be forgotten, by the probability that the "
    "judge gives it on their real images, and of all others, with `evaluation=full`, `small` or `probes`; "
    "`evaluation.metrics.neighbours.near=[<label>, ...]` says which are near"
)
_PROBE = "share of pictures that are taken for what was to be forgotten, with `evaluation=probes`, "
_REACHED = "what it took to the first look with a `forget_rate` of at most `evaluation.threshold`; absent if none"
_THERE = "the model's scores there, with `evaluation.at_threshold`"
_MEAN = "average over the run of what the method logs at every step"
_POLICY = "the same of an agent's rehearsals"
ENTRIES = (
    Entry("forget_rate", "Rates", LOW, SHARE, FORGETTING, RUN | LONG | SHORT | PLOT,
          "share of samples under the forget condition that the judge takes for the forgotten content" + _ANY),
    Entry("restored_rate", "Rates", HIGH, SHARE, FORGETTING, RUN | LONG | SHORT | PLOT,
          "share of the same samples that it takes for the clean class. Forgetting that leaves rubble is not enough. "
          "Absent where the whole class is forgotten"),
    Entry("other_rate", "Rates", ORACLE, SHARE, FORGETTING, RUN | LONG,
          "share of the same samples that it takes for something else that is real"),
    Entry("nothing_rate", "Rates", ORACLE, SHARE, FORGETTING, RUN | LONG | SHORT,
          "share of the same samples on which the judge abstains, for they are like no real image of any content "
          "(rubble), or show none of them where the judge can say so. `forget_rate`, `restored_rate`, `other_rate` and "
          "`nothing_rate` make up 1. Absent where the judge cannot abstain"),
    Entry("retain_accuracy", "Rates", HIGH, SHARE, RETENTION, RUN | LONG | SHORT | PLOT,
          "share of samples under the other labels taken for what their label names"),
    Entry("retain_accuracy_near", "Neighbours", HIGH, SHARE, RETENTION, LONG, _NEAR),
    Entry("retain_accuracy_far", "Neighbours", HIGH, SHARE, RETENTION, LONG, _NEAR),
    Entry("outliers_forget", "Outliers", ORACLE, SHARE, FORGETTING, LONG,
          "share of samples under the forget condition that are outliers of all real retained images, by an outlier "
          "detector in which no classifier has a say: rubble has 1, real images 0.05. High for the base where what is "
          "to be forgotten looks like no retained image"),
    Entry("outliers_retain", "Outliers", LOW, SHARE, RETENTION, LONG, "the same of samples under the other labels"),
    Entry("precision_forget", "Outliers", ORACLE, SHARE, FORGETTING, RUN | LONG | SHORT,
          "share of samples under the forget condition that lie among real retained images (5 nearest neighbours, "
          "[1904.06991](https://arxiv.org/abs/1904.06991)), in the outlier detector's features: rubble has 0"),
    Entry("density_forget", "Outliers", ORACLE, POSITIVE, FORGETTING, LONG,
          "among how many of them each lies ([2002.09797](https://arxiv.org/abs/2002.09797)): 1 for real images"),
    Entry("coverage_forget", "Outliers", ORACLE, SHARE, FORGETTING, LONG,
          "share of the real retained images that have such a sample near: low where one content is drawn only"),
    Entry("fid_forget", "FID", ORACLE, POSITIVE, FORGETTING, LONG, _TO_FORGET),
    Entry("fid_retain", "FID", LOW, POSITIVE, RETENTION, RUN | LONG | SHORT | PLOT, _TO_IMAGES),
    Entry("kid_forget", "KID", ORACLE, ANY, FORGETTING, LONG, _TO_FORGET),
    Entry("kid_retain", "KID", LOW, ANY, RETENTION, RUN | LONG, _TO_IMAGES),
    Entry("cmmd_forget", "CMMD", ORACLE, ANY, FORGETTING, LONG, _CMMD),
    Entry("cmmd_retain", "CMMD", LOW, ANY, RETENTION, RUN | LONG, _CMMD),
    Entry("precision_retain", "PrecisionRecall", HIGH, SHARE, RETENTION, RUN | LONG | PLOT, _NEIGHBOURS),
    Entry("recall_retain", "PrecisionRecall", HIGH, SHARE, RETENTION, RUN | LONG | PLOT, _NEIGHBOURS),
    Entry("is_forget", "IS", None, (1.0, math.inf), FORGETTING, LONG, _INCEPTION),
    Entry("is_retain", "IS", HIGH, (1.0, math.inf), RETENTION, RUN | LONG, _INCEPTION),
    Entry("ssim_forget", "SSIM", None, (-1.0, 1.0), FORGETTING, LONG, _SSIM),
    Entry("ssim_retain", "SSIM", HIGH, (-1.0, 1.0), RETENTION, RUN | LONG | PLOT, _SSIM),
    Entry("nll_forget", "NLL", ORACLE, ANY, FORGETTING, RUN | LONG, _NLL),
    Entry("nll_retain", "NLL", LOW, ANY, RETENTION, RUN | LONG, _NLL),
    Entry("nll_bound_forget", "NLL", ORACLE, ANY, FORGETTING, LONG, _BOUND),
    Entry("nll_bound_retain", "NLL", LOW, ANY, RETENTION, LONG, _BOUND),
    Entry("mia_auc", "Membership", 0.5, SHARE, FORGETTING, RUN | LONG | SHORT, _MIA),
    Entry("mia_tpr_at_1pct_fpr", "Membership", 0.01, SHARE, FORGETTING, LONG, _MIA),
    Entry("relearn_steps", "Relearning", ORACLE, POSITIVE, FORGETTING, RUN | LONG | SHORT,
          "steps of fine-tuning on forget images until the forget rate is half the base's again"),
    Entry("relearn_reached", "Relearning", None, SHARE, FORGETTING, NOTHING,
          "whether it is: 0 where `evaluation.relearning.max_steps` were not enough"),
    Entry("forget_rate_paraphrases", "Paraphrases", LOW, SHARE, FORGETTING, RUN | LONG | PLOT,
          f"share of pictures under texts that no method has seen taken for the concept{_ANY}, with "
          "`evaluation=prompts`: [stable_diffusion.md](stable_diffusion.md)"),
    Entry("clip_score_retain", "ClipScore", HIGH, (0.0, 100.0), RETENTION, RUN | LONG | SHORT,
          "agreement of picture and prompt by CLIP, under prompts of the retained concepts, with `evaluation=prompts`"),
    Entry("fid_base_retain", "FID", LOW, POSITIVE, RETENTION, RUN | LONG, _TO_BASE),
    Entry("fid_base_forget", "FID", None, POSITIVE, FORGETTING, NOTHING, _TO_BASE),
    Entry("attack_success", "Robustness", LOW, SHARE, FORGETTING, RUN | LONG | SHORT,
          f"share of pictures that are taken for the concept{_ANY}, under the prompt, paraphrase or sought embedding "
          "that brings it back best, with `evaluation=prompts`: at least `forget_rate`"),
    Entry("attack_tokens", "TokenAttack", LOW, SHARE, FORGETTING, RUN | LONG,
          _PROBE + "under the best of texts sought to bring it back: a few words before a prompt, under which the "
          "model explains the forget images best ([2310.11868](https://arxiv.org/abs/2310.11868))"),
    Entry("attack_vector", "ConceptVector", LOW, SHARE, FORGETTING, RUN | LONG,
          _PROBE + "where the concept is added to prompts as a vector, the mean embedding of forget prompts less that "
          "of retain prompts ([2310.10012](https://arxiv.org/abs/2310.10012))"),
    Entry("probe_noise", "NoiseProbe", ORACLE, SHARE, FORGETTING, RUN | LONG,
          _PROBE + "drawn with more noise in every step than belongs there "
          "([2505.17013](https://arxiv.org/abs/2505.17013), as the next three)"),
    Entry("probe_completion", "CompletionProbe", ORACLE, SHARE, FORGETTING, RUN | LONG,
          _PROBE + "where images to forget are noised to 0.7 of the timesteps and denoised again"),
    Entry("probe_inpainting", "InpaintingProbe", ORACLE, SHARE, FORGETTING, RUN | LONG,
          _PROBE + "where the upper half of images to forget is given and the rest is drawn"),
    Entry("probe_guidance", "GuidanceProbe", ORACLE, SHARE, FORGETTING, RUN | LONG,
          _PROBE + "drawn under the guidance of a small classifier of noisy images"),
    Entry("copy_rate", "Copies", LOW, SHARE, FORGETTING, RUN | LONG,
          "share of samples under the forget condition that are a copy of an image to forget: nearer to it than all "
          "but 5 % of images that no model has seen are, with `evaluation=instances`"),
    Entry("closer_to_forget", "Copies", 0.5, SHARE, FORGETTING, RUN | LONG,
          "share of them that is nearer to an image to forget than to as many that no model has seen: 0.5 where it "
          "knows neither"),
    Entry("per_image/copy_rate/*", "Copies", LOW, SHARE, None, NOTHING, "copies of one of the images to forget"),
    Entry("deletion_steps", "RunRecorder", LOW, POSITIVE, FORGETTING, RUN | LONG,
          "first look on the way (`evaluation.every`) whose samples hold nothing of the forgotten content (SISS's "
          "definition); absent if none, and where the base's samples hold nothing of it either"),
    Entry("lasting_deletion_steps", "RunRecorder", LOW, POSITIVE, FORGETTING, LONG,
          "the same, counting only if no later look finds it again: a small look misses a rare content by chance"),
    Entry("per_class/forget_rate/*", "Rates", LOW, SHARE, FORGETTING, RUN, _APART),
    Entry("per_class/forget_rate_paraphrases/*", "Paraphrases", LOW, SHARE, FORGETTING, NOTHING, _APART),
    Entry("per_class/accuracy/*", "Rates", None, SHARE, None, NOTHING, _CLASS),
    Entry("per_class/fid/*", "FID", None, POSITIVE, None, NOTHING, _CLASS),
    Entry("per_class/fid_base/*", "FID", None, POSITIVE, None, NOTHING, _CLASS),
    Entry("per_class/kid/*", "KID", None, ANY, None, NOTHING, _CLASS),
    Entry("per_class/cmmd/*", "CMMD", None, ANY, None, NOTHING, _CLASS),
    Entry("per_class/is/*", "IS", None, (1.0, math.inf), None, NOTHING, _CLASS),
    Entry("per_class/ssim/*", "SSIM", None, (-1.0, 1.0), None, NOTHING, _CLASS),
    Entry("per_timestep/mia_loss_forget/*", "Membership", None, ANY, None, NOTHING, _TIMESTEP),
    Entry("per_timestep/mia_loss_unseen/*", "Membership", None, ANY, None, NOTHING, _TIMESTEP),
    Entry("per_timestep/mia_auc/*", "Membership", None, SHARE, None, NOTHING, _TIMESTEP),
    Entry("per_step/relearn_forget_rate/*", "Relearning", None, SHARE, None, NOTHING,
          "forget rate after so many steps of relearning"),
    Entry("reached/steps", "RunRecorder", LOW, POSITIVE, FORGETTING, LONG, _REACHED),
    Entry("reached/seconds", "RunRecorder", LOW, POSITIVE, COST, LONG, _REACHED),
    Entry("reached/network_evaluations", "RunRecorder", LOW, POSITIVE, COST, NOTHING, _REACHED),
    Entry("reached/restored_rate", "Rates", HIGH, SHARE, FORGETTING, LONG, _THERE),
    Entry("reached/retain_accuracy", "Rates", HIGH, SHARE, RETENTION, LONG, _THERE),
    Entry("reached/fid_retain", "FID", LOW, POSITIVE, RETENTION, LONG, _THERE),
    Entry("reached/kid_retain", "KID", LOW, ANY, RETENTION, LONG, _THERE),
    Entry("floor/*", "Evaluator", None, ANY, None, NOTHING,
          "what as many real images score in the place of samples: the least distance, and the highest precision, that "
          "can be expected. Not of rates that go by what was forgotten"),
    Entry("oracle_gap/*", "Record", LOW, POSITIVE, None, NOTHING,
          "absolute difference of `eval` and `oracle`, of several oracles their mean"),
    Entry("oracle_std/*", "Record", None, POSITIVE, None, NOTHING,
          "sample standard deviation of several oracles' scores (`evaluation.oracle_seeds`)"),
    Entry("gap_z/*", "Record", 0.0, ANY, None, NOTHING,
          "`eval` minus `oracle` in units of `oracle_std`; absent where all oracles have the same score"),
    Entry("mean/lambda/value", "RunRecorder", None, ANY, None, LONG, _MEAN),
    Entry("mean/grad_variance/update", "RunRecorder", None, POSITIVE, None, LONG, _MEAN),
    Entry("mean/grad_variance/policy", "RunRecorder", None, POSITIVE, None, LONG, _MEAN),
    Entry("cost/seconds", "RunRecorder", LOW, POSITIVE, COST, LONG | SHORT | PLOT,
          "of training alone, without evaluation"),
    Entry("cost/network_evaluations", "RunRecorder", LOW, POSITIVE, COST, LONG | SHORT | PLOT,
          "images passed forward through the networks that a step runs (a VAE's decoder; a distillation's teacher, "
          "fake score and generator)"),
    Entry("cost/network_evaluations_per_sample", "RunRecorder", LOW, POSITIVE, COST, LONG | PLOT,
          "what drawing one sample of the result takes"),
    Entry("cost/policy_network_evaluations", "RunRecorder", LOW, POSITIVE, COST, LONG | PLOT, _POLICY),
    Entry("cost/policy_images", "RunRecorder", LOW, POSITIVE, COST, NOTHING, _POLICY),
    Entry("cost/policy_seconds", "RunRecorder", LOW, POSITIVE, COST, NOTHING, _POLICY),
    Entry("cost/peak_memory_gb", "RunRecorder", LOW, POSITIVE, COST, LONG | SHORT | PLOT,
          "the process's peak (GiB; on the GPU if there is one)"),
    Entry("cost/images", "RunRecorder", LOW, POSITIVE, COST, PLOT, "images drawn from the data"),
    Entry("cost/evaluation_seconds", "RunRecorder", LOW, POSITIVE, COST, NOTHING,
          "one evaluation of the unlearned model"),
    Entry("cost/sampling_seconds", "RunRecorder", LOW, POSITIVE, COST, NOTHING, "of which drawing takes so much"),
    Entry("cost/relearning_seconds", "RunRecorder", LOW, POSITIVE, COST, NOTHING, "what relearning takes on top"),
)
# fmt: on
_BY_KEY = {entry.key: entry for entry in ENTRIES}


def is_rubble(nothing_rate: float, usual: float) -> bool:
    """Whether the judge abstains on more than RUBBLE of the forget samples, beyond the `usual` share of outliers."""
    return nothing_rate - usual > RUBBLE


def hides_rubble(usual: float) -> bool:
    """Whether there is so much of the `usual` outliers that nothing would be rubble beside them."""
    return not is_rubble(1.0, usual)


def z_of(key: str, score: float, oracles: Sequence[float]) -> float | None:
    """How far a score lies from several oracles' mean, in units of their sample standard deviation; None for fewer than
    two, where they differ by rounding alone, and for a distance from the base, which is no oracle's to keep.
    """
    if len(oracles) < 2 or any(fnmatchcase(key, pattern) for pattern in FROM_THE_BASE):
        return None
    spread = stdev(oracles)
    return (score - mean(oracles)) / spread if spread > 1e-9 * max(map(abs, oracles)) else None


def what_z_says(count: int) -> str:
    """From where on a score lies outside of what so many oracles' spread says of one more of them.

    If an unlearned model were one more draw from the distribution of the oracles, and that normal, z / sqrt(1 + 1/n)
    would follow Student's t with n - 1 degrees of freedom: the prediction interval of a new observation.
    """
    from scipy.special import stdtrit  # scipy.stats has the same behind a second of imports

    limit = float(stdtrit(count - 1, 0.975)) * math.sqrt(1 + 1 / count)
    return (
        f"z: distance from the mean of the {count} oracles in units of their standard deviation; one more oracle would "
        f"lie within ±{limit:.1f} in 95 % of cases, for each metric alone."
    )


def entry_of(key: str) -> Entry | None:
    """What is known of a key; of a score at the threshold, `reached/...`, what is known of the score."""
    if key in _BY_KEY:
        return _BY_KEY[key]
    matching = (entry for entry in ENTRIES if "*" in entry.key and fnmatchcase(key, entry.key))
    found = next(matching, None)
    if found is None and key.startswith("reached/"):
        return entry_of(key.removeprefix("reached/"))
    return found


def title(key: str, extractor: str | None) -> str:
    """How a score's key is printed: with the features that it is measured in, unless these are those of papers.

    `extractor` is the `features.extractor` of a run's provenance; None, where a run does not tell, adds nothing.
    """
    entry = entry_of(next((key.removeprefix(prefix) for prefix in SCORED if key.startswith(prefix)), key))
    if extractor is None or entry is None or entry.made_by not in IN_FEATURES:
        return key
    features = next((name for start, name in FEATURES.items() if extractor.startswith(start)), OWN)
    return f"{key} ({features})" if features else key


def keys(shown: In, about: str | None = None) -> tuple[str, ...]:
    """The keys that are shown somewhere, in order; of all kinds, or those that are `about` one."""
    return tuple(entry.key for entry in ENTRIES if shown in entry.shown and about in (None, entry.about))


def made_by(name: str) -> tuple[str, ...]:
    """The keys, or patterns of keys, of `eval/` that a class makes, by its name."""
    whole = ("reached/", "floor/", "oracle_gap/", "oracle_std/", "gap_z/", "mean/", "cost/")
    return tuple(entry.key for entry in ENTRIES if entry.made_by == name and not entry.key.startswith(whole))


def markdown() -> str:
    """The table of docs/metrics.md."""
    lines = ["| key | what | better |", "|---|---|---|"]
    together: dict[str, list[Entry]] = {}
    for entry in ENTRIES:
        together.setdefault(entry.sentence, []).append(entry)
    for sentence, entries in together.items():
        ways = [_in_words(entry.better) for entry in entries]
        better = ways[0] if len(set(ways)) == 1 else ", ".join(way or "-" for way in ways)
        names = ", ".join(f"`{entry.key}`" for entry in entries)
        lines.append(f"| {names} | {sentence} | {better} |")
    return "\n".join(lines)


def _in_words(better: str | float | None) -> str:
    return {None: "", ORACLE: "as the oracle's"}.get(better, str(better))


if __name__ == "__main__":
    print(markdown())
